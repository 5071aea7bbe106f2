"""DDP with two ranks: few bytes between them, a flipped bit, exact sums, and what happens once."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from cases_tensor import column

from falqon.checkpoint import hash_tensors, read_checkpoint

NAME = "model.layers.1.mlp.up_proj"


def add(two: Any, tiny_run: Callable) -> dict:
    """Add the runs; returns the configuration of the exact one."""
    config = tiny_run(update="anchored")
    config["data"]["init_args"] |= {"batch_size": 2, "group_by_length": False}
    config["trainer"]["enable_progress_bar"] = True
    two.add("watched", config, "--trainer.max_steps=3", "--wandb.mode=offline", watch=2)
    budget = "--model.init_args.activation_gib=0.00001"
    two.add("budget", config, "--trainer.max_steps=3", budget, watch=2)
    two.add(
        "corrupted",
        config,
        "--rank_checksum.every_n_steps=2",
        "--trainer.max_steps=4",
        corrupt={"rank": 1, "layer": NAME, "step": 2},
    )
    exact = tiny_run(recipe="paper")  # one scale a tensor: of a row, not of a batch
    exact["model"]["init_args"]["exact_sums"] = True
    exact["data"]["init_args"] |= {"batch_size": 2, "group_by_length": False}
    exact["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}
    two.add("exact", exact)
    return exact


def check(two: Any, exact: dict, cli: Callable, tmp_path: Path) -> None:
    """Look at what they noted."""
    # Bytes: B's gradients, and what is logged; no parameter, and nothing is broadcast.
    for note in two.notes("watched"):
        assert len(set(note["hashes"])) == 3
        assert {kind for kind, _ in note["sent"]} <= {"all_reduce", "barrier"}
        sizes = sorted(size for kind, size in note["sent"] if kind == "all_reduce")
        state = read_checkpoint(two.directory("watched") / "checkpoints" / "last.ckpt")
        trained = sum(t.numel() for n, t in state["state_dict"].items() if n.endswith(".B"))
        assert sizes[-1] == trained  # one bucket
        assert sum(sizes[:-1]) <= 4  # sums of loss and tokens
    first, second = two.notes("watched")
    assert first["hashes"] == second["hashes"]
    for note in two.notes("budget"):  # layers that run again change nothing
        assert note["hashes"] == first["hashes"]

    # One rank with batches twice as large: the same up to the order of sums.
    config = yaml.safe_load(Path(two.root / "watched-2.yaml").read_text())
    config["data"]["init_args"]["batch_size"] = 4
    config["trainer"] |= {"default_root_dir": str(tmp_path / "large"), "devices": 1}
    config["trainer"] |= {"strategy": "auto", "max_steps": 3}
    cli("fit", config)
    for key in ("train/loss", "grad_norm", "val/loss"):
        wanted = column(tmp_path / "large", key)
        assert column(two.directory("watched"), key) == pytest.approx(wanted, rel=2e-2), key

    # Once over both ranks: metrics, W&B, progress bar, report, messages.
    root = two.directory("watched")
    with (root / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == ["0", "1", "2"]
    assert len(list((root / "wandb").glob("offline-run-*"))) == 1
    assert [note["progress_bar"] for note in (first, second)] == [True, False]
    runs = len(two.jobs)
    finished = sum("exit" not in two.notes(job["name"])[0] for job in two.jobs)
    assert two.output.count("Run report") == finished
    assert two.output.count("train data: ") == runs
    assert two.output.count("melded 14 linear layers") == runs

    # A flipped bit on rank 1 stops both ranks, with its layer named.
    for note in two.notes("corrupted"):
        assert note["exit"] == 2
        assert f"after step 4: {NAME}.codes on rank 1 is not that of rank 0" in note["error"]
    assert "differ after step 4" in two.output
    assert two.output.count("differ after step 4") == 1  # one message for all ranks

    # Two ranks with two rows each, one with four, one that accumulates two batches of two.
    def alone(directory: str, batch_size: int, accumulate: int) -> str:
        exact["trainer"] |= {
            "default_root_dir": str(tmp_path / directory),
            "devices": 1,
            "strategy": "auto",
            "accumulate_grad_batches": accumulate,
        }
        exact["data"]["init_args"]["batch_size"] = batch_size
        model = cli("fit", exact).model
        return hash_tensors({n: p.detach() for n, p in model.named_parameters()})

    ranks = {note["hash"] for note in two.notes("exact")}
    assert ranks == {alone("four", 4, 1)} == {alone("accumulated", 2, 2)}
    exact["model"]["init_args"]["exact_sums"] = False
    assert ranks != {alone("usual", 4, 1)}  # else the test would show nothing

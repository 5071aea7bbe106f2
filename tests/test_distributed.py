"""Two processes: the same bits on both ranks and in two runs, and exact resume."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from falqon.checkpoint import read_checkpoint, training_hash

ROOT = Path(__file__).parents[1]

# Both ranks hash what they hold at the end of training; the launcher of ddp starts this file again.
SCRIPT = """
import os, sys
from pathlib import Path
from falqon.checkpoint import hash_tensors
from falqon.training import run
cli = run()
tensors = {n: p.detach() for n, p in cli.model.named_parameters()}
rank = os.environ.get("LOCAL_RANK", "0")
Path(os.environ["HASHES"], f"rank{rank}").write_text(hash_tensors(tensors))
"""


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[list[str], str]]:
    """Trains in two processes; returns each rank's hash and that of the checkpoint."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)

    def go(config: dict, name: str, *flags: str) -> tuple[list[str], str]:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        config["trainer"] |= {"default_root_dir": str(root), "devices": 2, "strategy": "ddp"}
        config["data"]["init_args"]["batch_size"] = 2
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = os.environ | {
            "HASHES": str(root),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        result = subprocess.run(
            [sys.executable, str(script), "fit", "--config", str(path), *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        hashes = [(root / f"rank{rank}").read_text() for rank in (0, 1)]
        return hashes, training_hash(read_checkpoint(root / "checkpoints" / "last.ckpt"))

    return go


def test_two_ranks_agree_repeat_and_resume(
    train: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    delayed = {"base": "paper", "scaling": "delayed", "amax_history": 2}
    live = {"preset": "compensated", "every": 2}
    config = tiny_run(update=live, rounding="stochastic", recipe=delayed)
    ranks, straight = train(config, "straight")
    assert ranks[0] == ranks[1]
    train(config, "again", "--trainer.max_steps=3")
    ranks, resumed = train(config, "again", "--ckpt_path=last")
    assert ranks[0] == ranks[1]
    assert resumed == straight

    def losses(name: str) -> list[str]:
        with (tmp_path / name / "metrics.csv").open() as file:
            return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]

    assert losses("again") == losses("straight")
    assert len(losses("straight")) == 6


def test_two_devices_give_the_loss_of_one(
    train: Callable, cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    # The same rows a step, split over two ranks with different numbers of supervised tokens.
    config = tiny_run(recipe="none", dtype="fp32")
    config["data"]["init_args"]["group_by_length"] = False
    train(config, "two", "--trainer.max_steps=4")
    config["data"]["init_args"]["batch_size"] = 4
    config["trainer"] |= {
        "default_root_dir": str(tmp_path / "one"),
        "devices": 1,
        "strategy": "auto",
    }
    cli("fit", config, "--trainer.max_steps=4")

    def column(name: str, key: str) -> list[float]:
        with (tmp_path / name / "metrics.csv").open() as file:
            return [float(row[key]) for row in csv.DictReader(file) if row[key]]

    for key in ("train/loss", "grad_norm", "val/loss"):
        assert column("two", key) == pytest.approx(column("one", key), rel=1e-3), key

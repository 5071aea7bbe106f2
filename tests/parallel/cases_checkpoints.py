"""Checkpoints in parts and in one file, resumed on other devices and with other strategies."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from falqon.checkpoint import CheckpointError, read_checkpoint, training_hash
from falqon.checkpoint.inspect import inspect_checkpoint
from falqon.checkpoint.sharded import MANIFEST, is_sharded, write_seal
from falqon.export import export_model

LAST = Path("checkpoints") / "last.ckpt"
ONE_FILE = {
    "class_path": "falqon.ShardedStrategy",
    "init_args": {"save_distributed_checkpoint": False},
}


def add(two: Any, tiny_run: Callable) -> dict:
    """Add the runs; returns their configuration."""
    config = tiny_run(update={"preset": "compensated", "every": 3, "calibration_rows": 6})
    config["model"]["init_args"]["exact_sums"] = True  # one device is to give the same bits
    config["data"]["init_args"]["batch_size"] = 2
    config["trainer"] |= {"limit_val_batches": 0, "max_steps": 4}
    config["checkpoint"]["complete"] = True  # one with changes only has another hash

    def add_run(name: str, strategy: object, *flags: str) -> None:
        config["trainer"]["strategy"] = strategy
        two.add(name, config, *flags)

    add_run("straight", "ddp")
    for name, strategy in (("ddp", "ddp"), ("parts", "fsdp2")):
        add_run(name, strategy, "--trainer.max_steps=2")
    add_run("small", "ddp", "--trainer.max_steps=2", "--checkpoint.complete=false")
    for source, name, strategy in (
        ("ddp", "ddp-parts", "fsdp2"),
        ("small", "small-parts", "fsdp2"),
        ("parts", "parts-ddp", "ddp"),
        ("parts", "parts-file", ONE_FILE),
    ):
        add_run(name, strategy, f"--ckpt_path={two.directory(source) / LAST}")
    damaged = {
        "source": str(two.directory("parts") / LAST),
        "target": str(two.root / "damaged.ckpt"),
        "name": "__1_0.distcp",
    }
    two.add("damaged", config, f"--ckpt_path={damaged['target']}", damaged=damaged)
    return config


def check(two: Any, config: dict, cli: Callable, tmp_path: Path) -> None:
    """Look at what they saved."""
    straight = read_checkpoint(two.directory("straight") / LAST)
    expected = training_hash(straight)
    assert "FalqonChanges" in read_checkpoint(two.directory("small") / LAST)
    for name in ("ddp-parts", "small-parts", "parts-ddp", "parts-file"):
        found = read_checkpoint(two.directory(name) / LAST)
        assert found["global_step"] == 4
        assert training_hash(found) == expected, name
        assert (
            found["optimizer_states"][0]["param_groups"]
            == (straight["optimizer_states"][0]["param_groups"])
        )
    # Files are shared out: one rank finds what both of them say.
    for note in two.notes("damaged"):
        assert note["exit"] and "damaged.ckpt/__1_0.distcp is damaged" in note["error"], note
    parts = two.directory("ddp-parts")
    assert is_sharded(parts / LAST)
    assert not is_sharded(two.directory("parts-file") / LAST)

    # One device goes on from what two wrote in parts.
    config["data"]["init_args"]["batch_size"] = 4
    config["trainer"] |= {
        "default_root_dir": str(tmp_path / "one"),
        "devices": 1,
        "strategy": "auto",
    }
    cli("fit", config, f"--ckpt_path={two.directory('parts') / LAST}")
    assert training_hash(read_checkpoint(tmp_path / "one" / LAST)) == expected

    # Looking at a run in parts, and exporting it.
    report = inspect_checkpoint(parts)
    assert report["training_sha256"] == expected
    assert report["file_bytes"] > sum(report["bytes"].values())
    exported = export_model(parts, tmp_path / "exported")
    other = export_model(two.directory("straight"), tmp_path / "other")
    weights = "model.safetensors"
    assert exported["files"][weights] == other["files"][weights]
    _refuses_damage(parts / LAST, tmp_path)


def _refuses_damage(good: Path, tmp_path: Path) -> None:
    class Dangerous:
        def __reduce__(self) -> tuple:
            return print, ("code was run",)

    assert {p.name for p in good.glob("__*")} == {"__0_0.distcp", "__1_0.distcp"}
    for number, damage in enumerate(("code", "table", "meta", "data", "bit")):
        bad = tmp_path / f"bad{number}.ckpt"
        shutil.copytree(good, bad)
        if damage == "code":
            (bad / ".metadata").write_bytes(pickle.dumps(Dangerous()))
        elif damage == "table":
            (bad / ".metadata").write_bytes((good / ".metadata").read_bytes()[:100])
        elif damage == "meta":
            (bad / "meta.pt").unlink()
        elif damage == "data":
            next(bad.glob("*.distcp")).unlink()
        else:
            data = bytearray((bad / "__1_0.distcp").read_bytes())
            data[len(data) // 2] ^= 1
            (bad / "__1_0.distcp").write_bytes(data)
        if damage in ("code", "table"):  # what is sealed is still not run
            (bad / MANIFEST).unlink()
            write_seal(bad)
        with pytest.raises(CheckpointError, match=bad.name):
            read_checkpoint(bad)

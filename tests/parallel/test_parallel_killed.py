"""A rank is killed: all end with one message, and a restarted run goes on where it was saved."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from falqon.checkpoint import read_checkpoint, training_hash
from falqon.parallel.lost import explain, is_restarted

ROOT = Path(__file__).parents[2]

LAST = Path("checkpoints") / "last.ckpt"
SCRIPT = str(Path(__file__).with_name("killed.py"))
MESSAGE = "cannot reach another rank any more"


@pytest.fixture
def config(tiny_run: Callable) -> dict:
    config = tiny_run(update="anchored")
    config["model"]["init_args"]["exact_sums"] = True  # to be compared with one device
    config["data"]["init_args"] |= {"batch_size": 2, "val_fraction": 0.1}
    config["checkpoint"]["every_n_train_steps"] = 2
    config["report"]["sample_answer"] = False
    config["trainer"] |= {"limit_val_batches": 0, "max_steps": 5}
    return config


def start(config: dict, tmp_path: Path, *launcher: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "killed.yaml"
    path.write_text(yaml.safe_dump(config))
    return subprocess.run(
        [sys.executable, *launcher, SCRIPT, "fit", "--config", str(path)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_restarted_run_loses_nothing_that_was_saved(
    config: dict, cli: Callable, tmp_path: Path
) -> None:
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    result = start(config, tmp_path, *torchrun, "--max-restarts=1")
    assert result.returncode == 0, result.stderr[-5000:]
    assert result.stderr.count(MESSAGE) <= 1  # torchrun may be faster in ending rank 0
    root = Path(config["trainer"]["default_root_dir"])
    with (root / "metrics.csv").open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == ["0", "1", "2", "3", "4"]
    assert not (root / "previous").exists()

    config["trainer"] |= {"devices": 1, "strategy": "auto"}
    config["trainer"]["default_root_dir"] = str(tmp_path / "one")
    config["data"]["init_args"]["batch_size"] = 4
    cli("fit", config)
    found, wanted = (read_checkpoint(path / LAST) for path in (root, tmp_path / "one"))
    assert training_hash(found) == training_hash(wanted)


def test_all_ranks_end_with_one_message(config: dict, tmp_path: Path) -> None:
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    began = time.monotonic()
    result = start(config, tmp_path)
    assert result.returncode == 1
    assert time.monotonic() - began < 120
    assert result.stderr.count(MESSAGE) == 1, result.stderr[-5000:]
    assert "Traceback" not in result.stderr
    assert read_checkpoint(tmp_path / "run" / LAST)["global_step"] == 2


def test_a_rank_zero_that_does_not_notice_is_ended() -> None:
    script = """
import subprocess, sys, time
from pathlib import Path
from types import SimpleNamespace
from lightning.fabric.strategies.launchers.subprocess_script import _launch_process_observer
from falqon.parallel.lost import RankWatch
started = [subprocess.Popen([sys.executable, "-c", code]) for code in (
    "import time; time.sleep(8); raise SystemExit(3)", "import time; time.sleep(100)")]
_launch_process_observer(started)
print(started[1].pid, flush=True)
strategy = SimpleNamespace(launcher=SimpleNamespace(procs=started))
trainer = SimpleNamespace(strategy=strategy, global_rank=0, default_root_dir="root")
RankWatch(Path("last.ckpt"), patience=7).setup(trainer, None, "fit")
time.sleep(100)
"""
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1  # and not by Lightning's signal
    assert 15 <= time.monotonic() - began < 90
    assert result.stderr.count(MESSAGE) == 1 and "ended with status 3" in result.stderr
    assert "root/last.ckpt" in result.stderr and "Traceback" not in result.stderr
    deadline = time.monotonic() + 10
    while Path(f"/proc/{int(result.stdout)}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert time.monotonic() < deadline  # the third rank is gone as well


def test_other_errors_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert explain(RuntimeError("Connection closed by peer"), "x") is None  # no other rank
    for name, value, expected in (
        ("TORCHELASTIC_RESTART_COUNT", "0", False),
        ("TORCHELASTIC_RESTART_COUNT", "2", True),
        ("SLURM_RESTART_COUNT", "1", True),
    ):
        with monkeypatch.context() as changed:
            changed.setenv(name, value)
            assert is_restarted() is expected

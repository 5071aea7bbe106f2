"""metrics.csv: complete after a kill, equal after a resume, never overwritten."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from falqon.callbacks import MetricsCSV
from falqon.errors import InputError

ROOT = Path(__file__).parents[2]


def rows(directory: Path) -> list[dict[str, str]]:
    with open(directory / "metrics.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_each_row_is_there_at_once(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path / "run")
    for step in range(3):
        logger.log_metrics({"loss": 1.0 / (step + 3), "epoch": 0}, step)
        assert len(rows(tmp_path / "run")) == step + 1
    assert (tmp_path / "run" / "metrics.csv").read_text() == (
        "step,epoch,loss\n0,0,0.3333333333333333\n1,0,0.25\n2,0,0.2\n"
    )
    assert os.listdir(tmp_path / "run") == ["metrics.csv"]


def test_a_new_metric_widens_the_file(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/loss": 2.0, "epoch": 0}, 0)
    logger.log_metrics({"val/loss": 1.5, "epoch": 0}, 0)
    logger.log_metrics({"train/loss": 1.0, "epoch": 1}, 1)
    assert rows(tmp_path) == [
        {"step": "0", "epoch": "0", "train/loss": "2.0", "val/loss": ""},
        {"step": "0", "epoch": "0", "train/loss": "", "val/loss": "1.5"},
        {"step": "1", "epoch": "1", "train/loss": "1.0", "val/loss": ""},
    ]
    assert os.listdir(tmp_path) == ["metrics.csv"]


def test_widening_replaces_the_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1}, 0)
    before = (tmp_path / "metrics.csv").read_bytes()

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(InputError, match=r"metrics\.csv cannot be written: No space left"):
        logger.log_metrics({"b": 1}, 1)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    assert os.listdir(tmp_path) == ["metrics.csv"]
    monkeypatch.undo()
    logger.log_metrics({"b": 1}, 1)
    assert [row["b"] for row in rows(tmp_path)] == ["", "1"]


def test_values_read_back_exactly(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "third": 1 / 3,
        "tiny": 5e-324,
        "nan": float("nan"),
        "inf": float("inf"),
        "neg": -float("inf"),
        "tensor": torch.tensor(0.1, dtype=torch.float64),
        "bf16": torch.tensor([2.5], dtype=torch.bfloat16),
        "count": 7,
        "with, comma": 1.0,
    }
    MetricsCSV(tmp_path).log_metrics(values, 0)
    (row,) = rows(tmp_path)
    assert (row["nan"], row["inf"], row["neg"], row["count"]) == ("nan", "inf", "-inf", "7")
    assert math.isnan(float(row["nan"]))
    for name in ("third", "tiny", "tensor", "bf16", "with, comma"):
        assert float(row[name]) == float(values[name])


def test_a_missing_step_stays_empty(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1})
    logger.resume_at(0)
    assert rows(tmp_path) == [{"step": "", "epoch": "", "a": "1"}]


def test_lightnings_view_of_it(tmp_path: Path) -> None:
    logger = MetricsCSV(str(tmp_path))
    assert (logger.name, logger.version) == ("", "")
    assert logger.save_dir == logger.log_dir == logger.root_dir == str(tmp_path)
    logger.log_hyperparams({"lr": 1})
    logger.save()
    logger.finalize("success")
    assert os.listdir(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    MetricsCSV(tmp_path).log_metrics({"a": 1}, 0)
    assert os.listdir(tmp_path) == []


# ------------------------------------------------------------- existing files


def test_an_existing_file_is_continued(tmp_path: Path) -> None:
    MetricsCSV(tmp_path).log_metrics({"a": 1}, 0)
    MetricsCSV(tmp_path).log_metrics({"a": 2, "b": 3}, 1)
    assert [(row["a"], row["b"]) for row in rows(tmp_path)] == [("1", ""), ("2", "3")]


@pytest.mark.parametrize("resume", [True, False])
def test_half_a_row_is_dropped(tmp_path: Path, resume: bool) -> None:
    MetricsCSV(tmp_path).log_metrics({"a": 1}, 0)
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("1,0")
    logger = MetricsCSV(tmp_path)
    if resume:
        logger.resume_at(1)
    logger.log_metrics({"a": 2}, 1)
    assert [(row["step"], row["a"]) for row in rows(tmp_path)] == [("0", "1"), ("1", "2")]


def test_resume_at_drops_what_will_come_again(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    for step in range(5):
        logger.log_metrics({"a": step}, step)
    resumed = MetricsCSV(tmp_path)
    resumed.resume_at(3)  # three optimizer steps are done: those with the steps 0, 1, 2
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2"]
    resumed.log_metrics({"a": 30}, 3)
    assert [row["a"] for row in rows(tmp_path)] == ["0", "1", "2", "30"]


def test_resume_without_a_file_is_a_start(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.resume_at(10)
    logger.log_metrics({"a": 1}, 10)
    assert [row["step"] for row in rows(tmp_path)] == ["10"]


@pytest.mark.parametrize("content", ["a,b\n1,2\n", "step,epoch,a\n0,0\n", "step,epoch\nx,0\n"])
def test_a_file_that_is_not_ours_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "metrics.csv").write_text(content)
    for call in (
        lambda: MetricsCSV(tmp_path).resume_at(1),
        lambda: MetricsCSV(tmp_path).log_metrics({"new": 1}, 0),
    ):
        with pytest.raises(InputError, match=r"metrics\.csv is"):
            call()
    assert (tmp_path / "metrics.csv").read_text() == content


LIMITED = """
import resource, signal, sys
from falqon.callbacks import MetricsCSV
from falqon.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
logger = MetricsCSV(sys.argv[1])
logger.log_metrics({"a": 0}, 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
try:
    for step in range(1, 100):
        logger.log_metrics({"a": step}, step)
except InputError as error:
    sys.stdout.write(str(error))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX resource limits")
def test_full_disk_leaves_whole_rows(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert "metrics.csv cannot be written: File too large" in done.stdout
    text = (tmp_path / "metrics.csv").read_text()
    assert 80 < len(text) <= 100
    assert text.endswith("\n")
    assert [row["a"] for row in rows(tmp_path)] == [str(i) for i in range(len(rows(tmp_path)))]


KILLED = """
import os, signal, sys
from falqon.callbacks import MetricsCSV
logger = MetricsCSV(sys.argv[1])
for step in range(50):
    logger.log_metrics({"a": step, f"m{step // 10}": 1.0}, step)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_loses_no_row(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert [row["a"] for row in rows(tmp_path)] == [str(step) for step in range(50)]


# ------------------------------------------------------------- with Lightning


class Logging(BoringModel):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("train/step", float(self.global_step))
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        self.log("val/step", float(self.global_step))
        return super().validation_step(batch, batch_idx)


def fit(directory: Path, max_epochs: int, resume_step: int | None = None) -> pl.Trainer:
    """Epochs of 4 optimizer steps (2 batches each), each with validation and a checkpoint."""
    logger = MetricsCSV(directory)
    if resume_step is not None:
        logger.resume_at(resume_step)
    trainer = pl.Trainer(
        max_epochs=max_epochs,
        limit_train_batches=8,
        limit_val_batches=1,
        accumulate_grad_batches=2,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        accelerator="cpu",
        logger=logger,
        callbacks=[ModelCheckpoint(save_last=True, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = directory / "checkpoints" / "last.ckpt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # few workers: as meant
        trainer.fit(Logging(), ckpt_path=str(last) if resume_step is not None else None)
    return trainer


def test_a_resumed_run_has_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    fit(tmp_path / "whole", max_epochs=3)
    fit(tmp_path / "parts", max_epochs=2)
    # Rows past the checkpoint, as a run that was killed later has them.
    stray = MetricsCSV(tmp_path / "parts")
    stray.log_metrics({"train/step": 8.0, "epoch": 2}, 8)
    stray.log_metrics({"train/step": 9.0, "epoch": 2}, 9)
    resumed = fit(tmp_path / "parts", max_epochs=3, resume_step=8)
    assert resumed.global_step == 12
    assert (tmp_path / "parts" / "metrics.csv").read_text() == (
        tmp_path / "whole" / "metrics.csv"
    ).read_text()
    steps = [row["step"] for row in rows(tmp_path / "whole") if row["train/step"]]
    assert steps == [str(step) for step in range(12)]
    assert [row["step"] for row in rows(tmp_path / "whole") if row["val/step"]] == ["3", "7", "11"]
    assert (tmp_path / "whole" / "checkpoints" / "last.ckpt").is_file()

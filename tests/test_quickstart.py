"""The quickstart with the real model, shortened."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from falqon.checkpoint import inspect
from falqon.training import run

ROOT = Path(__file__).parents[1]


def test_quickstart_shortened(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py"])
    monkeypatch.chdir(ROOT)
    root = tmp_path / "run"
    run(
        [
            "fit",
            "--config=configs/quickstart.yaml",
            f"--trainer.default_root_dir={root}",
            "--trainer.max_steps=3",
            "--trainer.enable_progress_bar=false",
            "--report.max_new_tokens=4",
            "--data.init_args.batch_size=4",
        ]
    )
    summary = json.loads((root / "summary.json").read_text())
    assert summary["melded_layers"] == 210
    assert list(summary["left_alone"]) == ["lm_head"]
    # On all 30 rows melding costs a little, and three steps already gain.
    assert 0 < summary["val_loss_before"] - summary["val_loss_base"] < 0.1
    assert summary["val_loss_after"] < summary["val_loss_before"]
    assert len(list((root / "wandb").glob("offline-run-*"))) == 1
    with (root / "metrics.csv").open() as file:
        trained = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(trained) == 3
    assert float(trained[-1]["falqon/pending_norm"]) > 0
    last = root / "checkpoints" / "last.ckpt"
    # B, its moments and A, not the model: 269 MB in 16 bits, 333 MB with all that B needs.
    assert 120e6 < last.stat().st_size < 140e6 < (root / "served.ckpt").stat().st_size
    report = inspect.inspect_checkpoint(last)
    assert report["global_step"] == 3
    assert "Run report" in capsys.readouterr().out

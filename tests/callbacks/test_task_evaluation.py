"""Tasks within training: their metrics are logged, and training is the same to the last bit."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from falqon.callbacks.task_evaluation import TaskEvaluation
from falqon.checkpoint import read_checkpoint, training_hash
from falqon.errors import InputError
from falqon.evaluation.harness import TaskSettings, run_tasks
from falqon.evaluation.tasks import load_tasks
from falqon.loading import open_model

pytest.importorskip("lm_eval")
ROOT = Path(__file__).parents[2]
ACC = "eval/falqon_mini/acc"


def rows(root: Path, key: str) -> dict[int, float]:
    with (root / "metrics.csv").open() as file:
        return {int(r["step"]): float(r[key]) for r in csv.DictReader(file) if r.get(key)}


def test_training_goes_on_as_without_it(
    cli: Callable, tiny_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Stochastic rounding and delayed scaling: whatever a forward pass could disturb.
    delayed = {"base": "paper", "scaling": "delayed", "amax_history": 2}
    live = {"preset": "compensated", "every": 2}
    config = tiny_run(update=live, rounding="stochastic", recipe=delayed)
    cli("fit", config)
    root = tmp_path / "run"
    without = training_hash(read_checkpoint(root / "checkpoints" / "last.ckpt"))
    losses, randoms = rows(root, "train/loss"), torch.rand(3)
    seen: list[float] = []

    def watched(model: Any, *args: Any, **kwargs: Any) -> Any:
        assert model.training
        result = run_tasks(model, *args, **kwargs)
        assert all(module.training for module in model.modules())
        seen.append(result["tasks"]["falqon_mini"]["metrics"]["acc"])
        return result

    monkeypatch.setattr("falqon.callbacks.task_evaluation.run_tasks", watched)
    config["evaluation"] = {"tasks": ["falqon_mini"], "every_n_steps": 3, "limit": 12}
    fit = cli("fit", config)
    assert training_hash(read_checkpoint(root / "checkpoints" / "last.ckpt")) == without
    assert rows(root, "train/loss") == losses
    assert torch.equal(torch.rand(3), randoms)
    assert rows(root, ACC) == dict(zip((2, 5), seen, strict=True))  # as val/loss is numbered
    assert {2, 5} <= rows(root, "val/loss").keys()
    assert fit.trainer.datamodule.tokenizer.pad_token == "<pad>"


def test_test_on_two_ranks_reports_loss_perplexity_and_tasks(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    config = tiny_run()
    fit = cli("fit", config)
    root = tmp_path / "run"
    served = str(root / "served.ckpt")
    config["evaluation"] = {"tasks": ["falqon_mini"], "limit": 13, "num_fewshot": 1}
    config["trainer"] |= {"devices": 2, "strategy": "ddp"}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "train.py", "test", "--config", str(tmp_path / "two.yaml")]
    result = subprocess.run(
        [*command, "--ckpt_path", served],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads((root / "test.json").read_text())
    assert report["checkpoint"] == served
    found = report["metrics"]
    # There is no test data, so it is the validation data.
    assert found["test/loss"] == pytest.approx(list(rows(root, "val/loss").values())[-1], rel=1e-3)
    assert found["test/perplexity"] == pytest.approx(math.exp(found["test/loss"]), rel=1e-5)
    tasks = load_tasks(["falqon_mini"])
    settings = TaskSettings(num_fewshot=1, limit=13)
    one = run_tasks(open_model(served).load(), fit.datamodule.tokenizer, tasks, settings)
    assert one is not None and one["tasks"]["falqon_mini"]["n_shot"] == 1
    assert found[ACC] == pytest.approx(one["tasks"]["falqon_mini"]["metrics"]["acc"])


def test_mistakes_are_seen_before_the_model_is_loaded(
    cli: Callable, tiny_run: Callable, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model is being loaded")

    monkeypatch.setattr("lit_modules.causal_lm.load_model", refuse)
    config = tiny_run()
    config["evaluation"] = {"tasks": ["./nothing.yaml"]}
    with pytest.raises(SystemExit) as stop:
        cli("fit", config)
    assert stop.value.code == 2
    assert "no task file or directory './nothing.yaml'" in capsys.readouterr().err
    with pytest.raises(InputError, match="every_n_steps is 0"):
        TaskEvaluation(every_n_steps=0)

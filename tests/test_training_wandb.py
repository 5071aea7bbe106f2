"""W&B through train.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import wandb

from tests.wandb_file import records


def test_wandb_gets_the_resolved_configuration_and_the_fp8_metrics(
    cli: Callable, tiny_run: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    config = tiny_run()
    config["wandb"] = {"mode": "offline"}
    cli("fit", config, "--trainer.max_steps=3")
    assert wandb.run is None
    root = Path(config["trainer"]["default_root_dir"])
    (directory,) = (root / "wandb").glob("offline-run-*")
    found = list(records(directory))
    settings = {i.key: json.loads(i.value_json) for r in found for i in r.config.update}
    settings |= {i.key: json.loads(i.value_json) for r in found for i in r.run.config.update}
    assert settings["trainer"]["plugins"][0]["init_args"]["rank"] == 4
    assert (
        settings["model"]["init_args"]["lr_scheduler"]["class_path"] == "lit_modules.WarmupConstant"
    )
    names = {".".join(i.nested_key) or i.key for r in found for i in r.history.item}
    assert {"train/loss", "val/loss", "falqon/realised_ratio", "train/tokens_per_s"} <= names

"""served.ckpt: what a run ends with holds the weights that its last loss is of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from falqon.checkpoint import read_checkpoint


def root_of(config: dict[str, Any]) -> Path:
    return Path(config["trainer"]["default_root_dir"])


def proxies(checkpoint: dict[str, Any]) -> list[torch.Tensor]:
    return [value for name, value in checkpoint["state_dict"].items() if name.endswith(".B")]


@pytest.mark.parametrize("update", ["paper", "compensated"])
@pytest.mark.parametrize("validation", [True, False])
def test_a_run_ends_with_the_weights_that_are_served(
    cli: Callable, tiny_run: Callable, update: str, validation: bool
) -> None:
    config = tiny_run(update=update)
    if not validation:
        config["trainer"]["limit_val_batches"] = 0
    fit = cli("fit", config)
    root = root_of(config)
    served = read_checkpoint(root / "served.ckpt")
    last = read_checkpoint(root / "checkpoints" / "last.ckpt")
    assert any(bool(proxy.any()) for proxy in proxies(last))
    assert not any(bool(proxy.any()) for proxy in proxies(served))
    assert served["global_step"] == last["global_step"] == 6
    if validation:
        validated = cli("validate", config, f"--ckpt_path={root}/served.ckpt")
        loss = float(fit.trainer.callback_metrics["val/loss"])
        assert float(validated.trainer.callback_metrics["val/loss"]) == loss


@pytest.mark.parametrize("update", ["paper", "compensated"])
def test_any_checkpoint_can_be_made_one_that_is_served(
    cli: Callable, tiny_run: Callable, tmp_path: Path, update: str
) -> None:
    # What `falqon export` recommends for a checkpoint with pending changes.
    config = tiny_run(update=update)
    cli("fit", config)
    root, other = root_of(config), tmp_path / "other"
    expected = read_checkpoint(root / "served.ckpt")
    before = (root / "checkpoints" / "last.ckpt").read_bytes()
    flags = ("--trainer.max_steps=6", f"--trainer.default_root_dir={other}")
    cli("fit", config, f"--ckpt_path={root}/checkpoints/last.ckpt", *flags)
    made = read_checkpoint(other / "served.ckpt")
    for name, value in expected["state_dict"].items():
        assert torch.equal(made["state_dict"][name], value), name
    assert (root / "checkpoints" / "last.ckpt").read_bytes() == before

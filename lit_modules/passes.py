"""Passes over a data module's rows outside of training: without gradients or steps."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.parallel.strategies import data_parallel_group
from falqon.precision import FalqonPrecision
from lit_modules.loss import supervised_loss


@torch.no_grad()
def held_out_loss(model: nn.Module, trainer: Trainer) -> float | None:
    """Validation loss of a model that the Trainer does not have yet, nats a supervised token.

    Args:
        model: On the device; it is put into evaluation mode.
        trainer: With a data module, whose validation batches are taken, as many as
            `limit_val_batches` says.

    Returns:
        The mean over all ranks; None without a data module or a supervised token.
    """
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is None:
        return None
    batches: Iterable[Any] = datamodule.val_dataloader()
    limit = trainer.limit_val_batches
    if isinstance(limit, float):
        limit = int(limit * len(batches))  # type: ignore[arg-type]
    device = next(model.parameters()).device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for batch in islice(batches, limit):
        batch = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
        sums += torch.stack(supervised_loss(model, batch)).double()
    group = data_parallel_group(trainer)
    loss, tokens = trainer.strategy.reduce(sums, group, reduce_op="sum").tolist()
    return loss / tokens if tokens else None


def check_calibration(plugin: FalqonPrecision, trainer: Trainer) -> None:
    """Refuse a compensated flush that has no training examples to look at.

    Raises:
        InputError: for such a flush and a data module of another kind.
    """
    data = getattr(trainer, "datamodule", None)
    if plugin.update.flush_rounding != "same" and not hasattr(data, "calibration_rows"):
        raise InputError(
            "flush_rounding 'compensated' looks at training examples, which a data module of "
            "this project gives: use one, or set update.flush_rounding to 'same'."
        )


@torch.no_grad()
def calibrate(model: nn.Module, plugin: FalqonPrecision, trainer: Trainer) -> None:
    """Run the model on training examples, for a flush that looks at the layers' inputs.

    Raises:
        InputError: as `check_calibration` does.
    """
    check_calibration(plugin, trainer)
    rows = trainer.datamodule.calibration_rows  # type: ignore[attr-defined]
    device = next(model.parameters()).device  # after `fit` Lightning has it on the CPU
    was_training = model.training
    model.eval()
    try:
        for tokens in rows(plugin.update.calibration_rows):
            model(input_ids=tokens[None].to(device), use_cache=False)
    finally:
        model.train(was_training)

"""Speed of a run: tokens a second."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from falqon.callbacks.utilisation import (
    Flops,
    Peaks,
    count_flops,
    count_supervised,
    peaks,
    utilisation,
)
from falqon.parallel.strategies import data_parallel_group


def is_log_step(trainer: Trainer) -> bool:
    """The step that just ended is one that Lightning sends to the loggers."""
    accumulating = trainer.fit_loop._should_accumulate()
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return not accumulating and trainer.global_step % max(1, every) == 0


def count_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Tokens of a batch without padding, int64 scalar.

    Args:
        batch: `input_ids` [b, s], and `attention_mask` [b, s] unless rows are packed; then every
            position counts.
    """
    mask = batch.get("attention_mask")
    if mask is not None:
        return mask.sum()
    ids = batch["input_ids"]
    return torch.full((), ids.numel(), device=ids.device)  # made there: nothing is sent


class Throughput(Callback):
    """Logs `train/tokens_per_s`: tokens, without padding, a second over all devices.

    And `train/mfu`, the share of the devices' matmul peak that the model's FLOPs make up (see
    `falqon.callbacks.utilisation`), where the peak is known. Time between logged steps counts,
    validation does not.
    """

    def __init__(self) -> None:
        self._flops: Flops | None = None
        self._peaks: Peaks | None = None
        self.total_tokens = 0
        self.total_seconds = 0.0
        self._tokens: Tensor | None = None
        self._since = 0.0
        self._paused = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flops = count_flops(pl_module)
        self._peaks = peaks(trainer.strategy.root_device)
        self._tokens, self._since = None, time.perf_counter()

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._paused = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since += time.perf_counter() - self._paused

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        tokens = torch.stack([count_tokens(batch), count_supervised(batch)])
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        if not is_log_step(trainer):
            return
        rate, share = self._count(trainer, self._tokens)
        pl_module.log("train/tokens_per_s", rate)
        if share is not None:
            pl_module.log("train/mfu", share)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tokens is not None:  # steps since the last logged one
            self._count(trainer, self._tokens)

    def _count(self, trainer: Trainer, counts: Tensor) -> tuple[float, float | None]:
        """Add to the totals; tokens a second since the last call, and the utilisation."""
        group = data_parallel_group(trainer)
        sums = trainer.strategy.reduce(counts.double(), group, reduce_op="sum")
        total, supervised = sums.tolist()
        now = time.perf_counter()  # after the wait for the device that tolist() is
        seconds = max(now - self._since, 1e-9)
        self.total_tokens += int(total)
        self.total_seconds += seconds
        self._tokens, self._since = None, now
        share = None
        if self._flops is not None and self._peaks is not None:
            each = trainer.world_size
            parts = (total / each, supervised / each, seconds)
            share = utilisation(self._flops, self._peaks, *parts)
        return total / seconds, share

    @property
    def tokens_per_second(self) -> float:
        """Mean over the training so far, 0 before the first logged step."""
        return self.total_tokens / self.total_seconds if self.total_seconds else 0.0

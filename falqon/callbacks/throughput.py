"""Speed of a run: tokens a second."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

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
    return torch.tensor(batch["input_ids"].numel(), device=batch["input_ids"].device)


class Throughput(Callback):
    """Logs `train/tokens_per_s`: tokens, without padding, a second over all devices.

    Time between logged steps counts, validation does not.
    """

    def __init__(self) -> None:
        self.total_tokens = 0
        self.total_seconds = 0.0
        self._tokens: Tensor | None = None
        self._since = 0.0
        self._paused = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
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
        tokens = count_tokens(batch)
        self._tokens = tokens if self._tokens is None else self._tokens + tokens
        if not is_log_step(trainer):
            return
        pl_module.log("train/tokens_per_s", self._count(trainer, self._tokens), prog_bar=True)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._tokens is not None:  # steps since the last logged one
            self._count(trainer, self._tokens)

    def _count(self, trainer: Trainer, tokens: Tensor) -> float:
        """Add tokens to the totals; returns tokens a second since the last call."""
        group = data_parallel_group(trainer)
        total = int(trainer.strategy.reduce(tokens.double(), group, reduce_op="sum"))
        now = time.perf_counter()  # after the wait for the device that int() is
        seconds = max(now - self._since, 1e-9)
        self.total_tokens += total
        self.total_seconds += seconds
        self._tokens, self._since = None, now
        return total / seconds

    @property
    def tokens_per_second(self) -> float:
        """Mean over the training so far, 0 before the first logged step."""
        return self.total_tokens / self.total_seconds if self.total_seconds else 0.0

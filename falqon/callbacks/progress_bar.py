"""Lightning's progress bar, with the loss and the speed of the last logged step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from typing_extensions import override

from falqon.callbacks.throughput import is_log_step

SHOWN = ("train/loss", "train/tokens_per_s")


class ProgressBar(TQDMProgressBar):
    """Shows metrics of training without waiting for the device in every step.

    What is logged with `prog_bar=True` is fetched from the device after each batch; these are
    fetched when the loggers get them, every `log_every_n_steps` steps.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, float] = {}

    @override
    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        items: dict[str, Any] = super().get_metrics(trainer, pl_module)
        if trainer.training and is_log_step(trainer):
            metrics = trainer.callback_metrics
            self._shown = {name: float(metrics[name]) for name in SHOWN if name in metrics}
        return items | self._shown

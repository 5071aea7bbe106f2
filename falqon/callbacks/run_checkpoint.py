"""Checkpoints of a run: the last state always, the best ones on request."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from falqon.callbacks.csv_logger import MetricsCSV
from falqon.errors import InputError


class RunCheckpoint(ModelCheckpoint):
    """Keeps `<default_root_dir>/checkpoints/last.ckpt` up to date, to resume from.

    It is written every so many optimizer steps and after the last one, whatever its number.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints.
        save_top_k: Keep so many more checkpoints: the best by `monitor`, looked at after each
            validation within the training, or without one 1 (the newest) or -1 (all).
        monitor: Metric that says what is best, for example `val/loss`.
        mode: Whether the smallest (`min`) or the largest (`max`) value is best.
        complete: Save all weights, to resume or export without the model that the run started from.
            By default checkpoints of FALQON hold what was changed.

    Raises:
        InputError: If `every_n_train_steps` is below 1.
    """

    def __init__(
        self,
        every_n_train_steps: int = 100,
        save_top_k: int = 0,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        complete: bool = False,
    ) -> None:
        if every_n_train_steps < 1:
            raise InputError(
                f"checkpoint.every_n_train_steps is {every_n_train_steps}; it must be at least 1."
            )
        super().__init__(
            filename="{epoch}-{step}",
            monitor=monitor,
            mode=mode,
            save_last=True,
            save_top_k=save_top_k,
            every_n_train_steps=every_n_train_steps,
            enable_version_counter=False,
        )
        self._saved_step = -1
        self.complete = complete

    @property
    def last_path(self) -> Path:
        """The checkpoint to resume from."""
        return Path(self.dirpath or "checkpoints") / "last.ckpt"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self.dirpath is None:
            self.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        if hasattr(pl_module, "saves_all_weights"):
            pl_module.saves_all_weights = self.complete  # type: ignore[assignment]
        super().setup(trainer, pl_module, stage)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _write_metrics(trainer)
        if self.monitor is None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        elif trainer.global_step % self._every_n_train_steps == 0:
            self._save_last(trainer)
        # Here and not in on_train_end: a state saved after the loop ended resumes one batch off.
        if _is_final_step(trainer):
            self._save_last(trainer)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would rank a step's weights by the validation before that step.
        if self.monitor is not None and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if training was stopped between checkpoints, by a callback or a time limit."""
        self._save_last(trainer)

    def _save_last(self, trainer: Trainer) -> None:
        step = trainer.global_step
        if step == 0 or self._saved_step == step or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self.monitor or self._last_global_step_saved != step or not self.last_model_path:
            self.last_model_path = str(self.last_path)
            trainer.save_checkpoint(self.last_model_path)
        self._saved_step = step


def _write_metrics(trainer: Trainer) -> None:
    """Write the step's row of metrics.csv now.

    Lightning does so right after its callbacks: a run that is killed between a checkpoint and that
    would resume behind a row that was never written.
    """
    connector = trainer._logger_connector
    if trainer.fit_loop._should_accumulate() or not connector.should_update_logs:
        return
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    metrics.setdefault("epoch", trainer.current_epoch)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsCSV) and metrics:
            logger.log_metrics(metrics, trainer.fit_loop.epoch_loop._batches_that_stepped)


def _is_final_step(trainer: Trainer) -> bool:
    if trainer.fit_loop._should_accumulate():
        return False
    if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
        return True
    epochs = trainer.max_epochs
    is_last_epoch = epochs is not None and 0 <= epochs <= trainer.current_epoch + 1
    return is_last_epoch and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch

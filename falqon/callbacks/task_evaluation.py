"""Scores of lm-eval's tasks while a model is trained, and with `test`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from transformers import PreTrainedModel
from typing_extensions import override

from falqon.errors import InputError
from falqon.evaluation.harness import TaskSettings, average, run_tasks
from falqon.evaluation.report import metrics
from falqon.evaluation.tasks import TaskSet, load_tasks


class TaskEvaluation(Callback):
    """Runs tasks on what is being trained, and logs `eval/<task>/<metric>`.

    Within `fit` the model is scored as validation within the training sees it: changes that are
    pending act if the update policy is live, and do not yet if it is not. Training goes on with the
    same bits as without: random generators and the modules' modes are put back. With `test` the
    weights that would be served are scored. Under ddp every rank takes its share of the questions;
    under a strategy that shards the model all ranks go through all of them together.

    The tasks' data are fetched before the model is loaded. Needs the extra `eval`.

    Args:
        tasks: Names as `falqon evaluate --tasks` takes them; none: nothing is done.
        every_n_steps: Score after every so many optimizer steps; left out, not in between.
        at_end: Score when training ends.
        num_fewshot: Solved examples before each question; left out, what a task says.
        limit: Only the first so many questions of each task, or a share below 1.
        batch_size: Requests at once, per device.
        add_bos: Put a BOS in front of every prompt; left out, what the tokenizer does.
        chat_template: Put the questions into the tokenizer's chat template.
        include_path: Directories with YAML files of more tasks. Code beside them is run.

    Raises:
        InputError: If a number is out of range.
    """

    def __init__(
        self,
        tasks: list[str] | None = None,
        every_n_steps: int | None = None,
        at_end: bool = True,
        num_fewshot: int | None = None,
        limit: float | None = None,
        batch_size: int = 8,
        add_bos: bool | None = None,
        chat_template: bool = False,
        include_path: list[str] | None = None,
    ) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise InputError(f"evaluation.every_n_steps is {every_n_steps}; it must be at least 1.")
        self.tasks = tasks or []
        self.every_n_steps = every_n_steps
        self.at_end = at_end
        self.include_path = include_path or []
        self.settings = TaskSettings(
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            add_bos=add_bos,
            chat_template=chat_template,
        )
        self._loaded: TaskSet | None = None
        self._last_step = -1

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Get the tasks' data, on rank zero first, so that the others find them in the cache.

        Raises:
            InputError: They cannot be had.
        """
        if not self.tasks or self._loaded is not None or stage not in ("fit", "test"):
            return
        if getattr(getattr(trainer, "datamodule", None), "tokenizer", None) is None:
            raise InputError(
                "evaluation.tasks needs a data module with a tokenizer, as those of this project "
                "have: use one, or leave evaluation.tasks out."
            )
        if not trainer.is_global_zero:
            trainer.strategy.barrier("tasks")
        self._loaded = load_tasks(self.tasks, self.include_path)
        if trainer.is_global_zero:
            trainer.strategy.barrier("tasks")

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = self.every_n_steps is not None and step % self.every_n_steps == 0
        if due and not trainer.fit_loop._should_accumulate():
            self._log(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.at_end:
            self._log(trainer, pl_module)

    @override
    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._loaded is not None:
            found = trainer.strategy.broadcast(self._score(trainer, pl_module))
            pl_module.log_dict(found, sync_dist=trainer.world_size > 1)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score and log, once a step."""
        if self._loaded is None or trainer.fast_dev_run or trainer.global_step == self._last_step:  # type: ignore[attr-defined]
            return
        self._last_step = trainer.global_step
        found = self._score(trainer, pl_module)
        if not found:  # on other ranks
            return
        # The number that Lightning gives the validation of this step: a resumed run keeps the row.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(found, step=step)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
        rank_zero_info(f"step {trainer.global_step}: {scores}")

    def _score(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, float]:
        """Metrics by name; empty where lm-eval gives no result, on all ranks but the first."""
        model = getattr(pl_module, "model", None)
        if not isinstance(model, PreTrainedModel):
            raise InputError(
                "evaluation.tasks needs a LightningModule whose `model` is a model of transformers."
            )
        assert self._loaded is not None
        rank, world_size = 0, 1
        if isinstance(trainer.strategy, DDPStrategy):
            rank, world_size = trainer.global_rank, trainer.world_size
        result = run_tasks(
            model,
            trainer.datamodule.tokenizer,  # type: ignore[attr-defined]
            self._loaded,
            self.settings,
            rank=rank,
            world_size=world_size,
            silent=True,
        )
        if result is None:
            return {}
        return metrics(result | {"average": average(result["tasks"])})

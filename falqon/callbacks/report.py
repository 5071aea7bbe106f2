"""The report at the end of a run: losses before and after, speed, memory, files, one answer."""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from falqon.callbacks.throughput import Throughput
from falqon.precision import FalqonPrecision


class RunReport(Callback):
    """Collects what a run did and prints it at its end; also writes `summary.json`.

    The validation loss before training is that of the full pass that Lightning makes as a sanity
    check (`trainer.num_sanity_val_steps: -1`); it is logged as `val/loss` of step 0. The loss after
    training is that of the weights that would be served, with every pending change written.

    Args:
        sample_answer: Answer the first validation prompt before and after training.
        max_new_tokens: Longest such answer.
    """

    def __init__(self, sample_answer: bool = True, max_new_tokens: int = 64) -> None:
        self.sample_answer = sample_answer
        self.max_new_tokens = max_new_tokens
        self.loss_before: float | None = None
        self.loss_after: float | None = None
        self.last_validated_step = -1
        self.closing = False  # validating what a training that has just ended would serve
        self.answers: list[str] = []
        self.prompt = self.reference = ""

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if loss is None:
            return
        if not trainer.sanity_checking:
            self.loss_after, self.last_validated_step = float(loss), trainer.global_step
            if trainer.state.fn == "validate" and self.closing and len(self.answers) == 1:
                self._answer(trainer, pl_module)
        elif trainer.num_sanity_val_steps == float("inf"):
            self.loss_before = float(loss)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        base = getattr(pl_module, "base_loss", None)
        first = {"val/loss": self.loss_before, "val/base_loss": base}
        metrics = {name: value for name, value in first.items() if value is not None}
        if metrics and trainer.global_step == 0:
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=0)
        if trainer.global_step == 0:
            self._answer(trainer, pl_module)
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # loading and the untuned model do not count

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was seen before training, so that a resumed run can report it."""
        return {"loss_before": self.loss_before, "answers": self.answers[:1]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.loss_before = state_dict["loss_before"]
        self.answers = state_dict["answers"]

    def _answer(self, trainer: Trainer, pl_module: LightningModule) -> None:
        sample = getattr(getattr(trainer, "datamodule", None), "sample_prompt", None)
        generate: Any = getattr(pl_module, "generate", None)
        if sample and generate and self.sample_answer and trainer.enable_validation:
            batch, self.prompt, self.reference = sample()
            self.answers.append(generate(batch, self.max_new_tokens)[0])

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        plugin = trainer.precision_plugin
        pending = isinstance(plugin, FalqonPrecision) and plugin.is_pending()
        if self.answers and not pending:  # else after the closing validation, which flushes
            self._answer(trainer, pl_module)

    # -- the end ------------------------------------------------------------------------------

    def summary(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The run in numbers and names, in plain containers."""
        throughput = next(c for c in trainer.callbacks if isinstance(c, Throughput))  # type: ignore[attr-defined]
        plugin = trainer.precision_plugin
        summary: dict[str, Any] = {
            "steps": trainer.global_step,
            "val_loss_base": getattr(pl_module, "base_loss", None),
            "val_loss_before": self.loss_before,
            "val_loss_after": self.loss_after,
            "tokens_per_s": round(throughput.tokens_per_second, 1),
            "peak_memory_bytes": peak_memory(trainer.strategy.root_device),
            "run_directory": os.path.abspath(trainer.default_root_dir),
        }
        method = getattr(pl_module, "method", None)
        if method is not None:
            summary["method"] = method.describe()
        if isinstance(plugin, FalqonPrecision) and plugin.report is not None:
            summary |= {
                "melded_layers": len(plugin.layers),
                "melded_bytes_before": plugin.report.bytes_before,
                "melded_bytes_after": plugin.report.bytes_after,
                "left_alone": plugin.report.skipped,
                "settings": plugin.settings(),
            }
        if len(self.answers) == 2:
            summary |= {
                "prompt": self.prompt,
                "answer_before": self.answers[0],
                "answer_after": self.answers[1],
                "reference": self.reference,
            }
        return summary

    def finish(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the report and write `<default_root_dir>/summary.json`; on rank zero only."""
        if not trainer.is_global_zero:
            return
        summary = self.summary(trainer, pl_module)
        path = Path(trainer.default_root_dir) / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".json.tmp")
        temporary.write_text(json.dumps(summary, indent=2) + "\n")
        temporary.replace(path)
        print(render(summary))


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: on a CUDA device of the training, else of the process so far.

    Args:
        device: that was trained on.
    """
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def render(summary: dict[str, Any]) -> str:
    """The summary as text for a person."""

    def loss(key: str) -> str:
        value = summary[key]
        return "not measured" if value is None else f"{value:.4f}"

    lines = ["", "Run report"]
    if "melded_layers" in summary:
        before, after = summary["melded_bytes_before"], summary["melded_bytes_after"]
        lines += [
            f"  converted       {summary['melded_layers']} linear layers to FP8, "
            f"{before / 2**20:.1f} MiB -> {after / 2**20:.1f} MiB",
        ]
        lines += [f"  left alone      {n} ({r})" for n, r in summary["left_alone"].items()]
    lines += [
        f"  val loss        {loss('val_loss_base')}  untuned base in bf16",
        f"                  {loss('val_loss_before')}  before training, as loaded",
        f"                  {loss('val_loss_after')}  after {summary['steps']} steps",
        f"  speed           {summary['tokens_per_s']:,.0f} tokens/s in training",
        f"  peak memory     {summary['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"  files           {summary['run_directory']}",
    ]
    if "prompt" in summary:
        for title, key in (
            ("prompt", "prompt"),
            ("answer before", "answer_before"),
            ("answer after", "answer_after"),
            ("reference", "reference"),
        ):
            lines += [f"  {title}:", *(f"    {line}" for line in summary[key].splitlines())]
    return "\n".join(lines)

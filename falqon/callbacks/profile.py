"""Where the time of a training step goes: a trace of one step, and a table by category."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from falqon.errors import InputError

# The outermost operation that one of these matches decides, for all that happens within it.
_WHOLE = (
    ("update", r"falqon::update"),
    # Not Optimizer.step: Lightning runs forward and backward within it.
    ("optimizer", r"Optimizer\.zero_grad|aten::_foreach|aten::_fused_|aten::.*vector_norm"),
    ("data", r"enumerate\(DataLoader\)|.*_next_data|.*batch_to_device"),
    ("loss", r".*(LinearCrossEntropy|LogSoftmax|NllLoss|cross_entropy)"),
    ("attention", r".*(_Attention(Backward)?\b|scaled_dot_product|ScaledDotProduct)"),
)
# Otherwise the operation itself does.
_SINGLE = (
    ("matmul", r"aten::(mm|addmm_?|bmm|baddbmm|matmul|linear|_scaled_mm|_int_mm)$"),
    ("matmul", r"falqon::(melded_matmul|backbone_matmul|proxy_grad|matmul)"),
    ("norm", r"falqon::rms_norm|aten::(pow|mean|rsqrt|rms_norm)"),
    ("decode and quantise", r"falqon::(decode|quantize|swiglu)|aten::(index_select|amax|clamp)"),
    ("decode and quantise", r"aten::(_to_copy|to)$"),
)
CATEGORIES = (
    "matmul", "decode and quantise", "attention", "norm", "loss", "optimizer", "update", "data",
    "other",
)  # fmt: skip
"""What time is divided into; SwiGLU counts with its quantiser."""


def _category(event: Any) -> str:
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    for outer in reversed(chain):
        for category, pattern in _WHOLE:
            if re.match(pattern, outer.name):
                return category
    for inner in chain:  # a copy within a matmul is the matmul's
        for category, pattern in _SINGLE:
            if re.match(pattern, inner.name):
                return category
    return "other"


def breakdown(events: Iterable[Any], device: bool = False) -> dict[str, float]:
    """Seconds by category, every operation counted once.

    Args:
        events: of `torch.profiler.profile.events()`.
        device: time of a GPU's kernels instead of the CPU's.

    Returns:
        One entry for each of `CATEGORIES`.
    """
    seconds: dict[str, float] = defaultdict(float)
    name = "self_device_time_total" if device else "self_cpu_time_total"
    for event in events:
        seconds[_category(event)] += getattr(event, name) / 1e6
    return {category: seconds[category] for category in CATEGORIES}


def table(seconds: dict[str, float]) -> str:
    """The breakdown as text."""
    total = sum(seconds.values()) or 1.0
    lines = [f"  {name:20s} {s * 1e3:9.1f} ms  {s / total:6.1%}" for name, s in seconds.items()]
    return "\n".join([*lines, f"  {'all':20s} {total * 1e3:9.1f} ms"])


class StepProfile(Callback):
    """Profiles one training step: writes a trace for chrome://tracing or Perfetto, prints a table.

    With gradient accumulation it is one batch of the step, its last one. Loading the batch is part
    of it where the loader works in this process.

    Args:
        step: number of the step, from 0; early ones compile and fill caches.
        path: of the trace; `<default_root_dir>/profile.json.gz` if None.
    """

    def __init__(self, step: int = 3, path: str | None = None) -> None:
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise InputError(f"StepProfile.step is {step!r}; use a whole number of at least 0.")
        self.step, self.path = step, path
        self.seconds: dict[str, float] = {}
        self._profile: Any = None

    def _is_step(self, trainer: Trainer) -> bool:
        return trainer.is_global_zero and trainer.global_step == self.step and not self.seconds

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step == 0 and self._is_step(trainer):
            self._start(trainer)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._profile is not None and trainer.global_step > self.step:
            self._finish(trainer)
        elif self._is_step(trainer):
            self._drop()
            self._start(trainer)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profile is not None:  # between two steps; the next one is looked at
            self._drop()
            self.step = trainer.global_step + 1

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._drop()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._drop()

    def _start(self, trainer: Trainer) -> None:
        activities = [ProfilerActivity.CPU]
        if trainer.strategy.root_device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        self._profile = profile(activities=activities)
        self._profile.__enter__()

    def _drop(self) -> None:
        if self._profile is not None:
            self._profile.__exit__(None, None, None)
            self._profile = None

    def _finish(self, trainer: Trainer) -> None:
        finished = self._profile
        self._drop()
        on_device = trainer.strategy.root_device.type == "cuda"
        self.seconds = breakdown(finished.events(), on_device)
        path = Path(self.path or Path(trainer.default_root_dir) / "profile.json.gz")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"tmp-{path.name}")
        finished.export_chrome_trace(str(temporary))
        temporary.replace(path)
        where = "GPU kernels" if on_device else "CPU operations"
        print(f"\nStep {self.step}, {where}, trace in {path}\n{table(self.seconds)}")

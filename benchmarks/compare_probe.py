"""A callback that times every step of a training and looks at what it trained."""

from __future__ import annotations

import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.compare_breakdown import breakdown
from benchmarks.compare_turns import wait_for_turn
from falqon.callbacks.report import peak_memory
from falqon.callbacks.throughput import count_tokens
from falqon.callbacks.utilisation import count_flops, count_supervised
from falqon.kernels.wide import product
from lit_modules.methods import Method

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


class Probe(Callback):
    """Times every step and looks at what it trained.

    Args:
        warmup: First steps, whose memory does not count.
        profile_from: First step that is profiled; none if None.
        profile_steps: How many are. Several, since methods do not do the same in every step.
        turns: Wait for a turn before a step: see `benchmarks.compare_turns`.
        steps_a_turn: Before every so many-th step.
        floor: Before and after each step that is not profiled look how fast a large matmul is, to
            tell how much of the step its own matmuls would take at that rate.
    """

    def __init__(
        self,
        warmup: int = 3,
        profile_from: int | None = None,
        profile_steps: int = 1,
        turns: tuple[int, int] | None = None,
        steps_a_turn: int = 1,
        floor: bool = False,
    ) -> None:
        self.warmup = warmup
        self.turns = turns
        self.steps_a_turn = steps_a_turn
        self.floor = floor
        self.profiled = range(0)
        if profile_from is not None:
            self.profiled = range(profile_from, profile_from + profile_steps)
        self.steps: list[dict[str, Any]] = []
        self.validations: list[dict[str, float]] = []
        self.parts: dict[str, float] = {}
        self.unseen: set[str] = set()
        self.trainable = 0
        self.peak_rss = 0
        self._before: dict[str, tuple[float, float]] = {}
        self._start = 0.0
        self._end: float | None = None
        self._between: float | None = None
        self._rate = 0.0
        self._profile: profile | None = None

    # -- what trains --------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        method, model = parts_of(pl_module)
        parameters = method.trainable(model)
        self.unseen = set(parameters)
        self.trainable = sum(p.numel() for p in parameters.values())
        self._before = fingerprints(method, model)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        method, model = parts_of(pl_module)
        for name, parameter in method.trainable(model).items() if self.unseen else ():
            gradient = parameter.grad
            if name in self.unseen and gradient is not None and gradient.any():
                self.unseen.discard(name)

    def unchanged(self, pl_module: LightningModule) -> list[str]:
        """Modules with trained parameters in which nothing of a checkpoint's state has changed."""
        method, model = parts_of(pl_module)
        after = fingerprints(method, model)
        changed = {name.rpartition(".")[0] for name in after if after[name] != self._before[name]}
        owners = {name.rpartition(".")[0] for name in method.trainable(model)}
        return sorted(owners - changed)

    # -- times --------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        step = len(self.steps)
        self._between = time.perf_counter() - self._end if self._end is not None else None
        if self.turns is not None and step % self.steps_a_turn == 0:
            wait_for_turn(self.turns)
        if step in self.profiled and self._profile is None:
            self._profile = profile(activities=_activities(), acc_events=True)
            self._profile.start()
        if self.floor and step not in self.profiled:
            self._rate = rate_of_large_matmul()
        if step >= self.warmup:
            reset_peak_rss()
        _wait(trainer)
        self._start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        _wait(trainer)
        seconds = time.perf_counter() - self._start
        step = len(self.steps)
        if self._profile is not None and step + 1 not in self.profiled:
            self._profile.stop()
            total = breakdown(self._profile.events())
            self.parts = {part: value / len(self.profiled) for part, value in total.items()}
            self._profile = None
        if step >= self.warmup and step not in self.profiled:
            self.peak_rss = max(self.peak_rss, peak_rss())
        of_floor = None
        if self.floor and step not in self.profiled:
            rate = (self._rate + rate_of_large_matmul()) / 2
            of_floor = flops_of(pl_module, batch) / rate / seconds
        self.steps.append(
            {
                "start": self._start,
                "seconds": seconds,
                "tokens": int(count_tokens(batch)),
                "positions": batch["input_ids"].numel(),
                "loss": float(trainer.callback_metrics["train/loss"]),
                "profiled": step in self.profiled,
                "after_others": self.turns is not None and step % self.steps_a_turn == 0,
                "between": self._between,
                "of_floor": of_floor,
            }
        )
        self._end = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end = None  # what passes until the next step is not only loading and logging

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val/loss")
        if loss is not None:
            self.validations.append(
                {
                    "step": len(self.steps),
                    "seconds": sum(step["seconds"] for step in self.steps),
                    "loss": float(loss),
                }
            )


@lru_cache(maxsize=1)
def _square(size: int) -> Tensor:
    """Values as different as real ones: with equal ones a processor runs faster."""
    return (torch.arange(size * size) % 2001 / 1000 - 1).reshape(size, size).to(torch.bfloat16)


def rate_of_large_matmul(size: int = 2048) -> float:
    """FLOP/s of torch's bfloat16 matmul on the CPU; in float32 if it has none in 16 bits."""
    x = _square(size)
    start = time.perf_counter()
    for _ in range(2):
        product(x, x)
    return 2 * 2 * size**3 / (time.perf_counter() - start)


def flops_of(module: nn.Module, batch: dict[str, Tensor]) -> float:
    """FLOPs of a step's matmuls, without attention's: see `falqon.callbacks.utilisation`."""
    each = count_flops(module)
    tokens, supervised = batch["input_ids"].numel(), int(count_supervised(batch))
    return float((each.fp8 + each.other) * tokens + each.supervised * supervised)


def parts_of(module: LightningModule) -> tuple[Method, nn.Module]:
    """Method and prepared model of a LitCausalLM."""
    return module.method, module.model  # type: ignore[return-value]


@torch.no_grad()
def fingerprints(method: Method, model: nn.Module) -> dict[str, tuple[float, float]]:
    """Two sums over each tensor that training may change: equal only if it is, for all practice.

    A copy of the tensors would show in the memory that is measured.
    """

    def sums(tensor: Tensor) -> tuple[float, float]:
        flat = tensor.detach().reshape(-1)
        values = flat.double()
        weights = torch.arange(1, len(flat) + 1, dtype=torch.float64, device=flat.device)
        return float(values.sum()), float(values @ weights)

    return {name: sums(tensor) for name, tensor in method.state(model).items()}


def reset_peak_rss() -> None:
    """Let the kernel count the peak of resident memory from here, where it can (Linux)."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_rss() -> int:
    """Peak of resident memory, bytes: since the last reset on Linux, else of the process."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return peak_memory(torch.device("cpu"))
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _wait(trainer: Trainer) -> None:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize()


def _activities() -> list[ProfilerActivity]:
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *gpu]

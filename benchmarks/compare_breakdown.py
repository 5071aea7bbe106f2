"""Where a step's time goes, from the profiler: the parts of the paper's Fig. 4."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

PARTS = ("matmul", "casts", "attention", "loss", "optimizer", "update", "other")
UPDATES = ("falqon::update", "method::update")
"""Ranges that the trainer marks for what a method does after the optimizer's step."""

_RANGES = {"update": UPDATES, "attention": ("falqon::attention",)}

# By the operation's name; the first that fits counts.
_NAMES = (
    ("loss", ("cross_entropy", "log_softmax", "nll_loss")),
    ("attention", ("scaled_dot_product", "flash_attention", "efficient_attention", "_softmax")),
    ("other", ("falqon::rotate",)),  # as the rotation of any other method
    ("optimizer", ("_fused_adam", "_foreach_", "Optimizer.step", "_fused_sgd")),
    (
        "matmul",
        (
            "mm",
            "matmul",
            "falqon::dense",
            "linear",
            "gemm",
            "gemv",
            "einsum",
            "dot",
            "cutlass",
            "cublas",
            "sgemm",
        ),
    ),
    (
        "casts",
        (
            "_to_copy",
            "::to",
            "copy_",
            "quantize",
            "amax",
            "clamp",
            "round",
            "frexp",
            "absmax",
            "decode",
        ),
    ),
)


def part_of(name: str) -> str:
    """The part that an operation belongs to, by its name."""
    short = name.rpartition("::")[2] if name.startswith("aten::") else name
    if name == "aten::to":
        return "casts"
    return next((part for part, words in _NAMES if any(w in short for w in words)), "other")


def breakdown(events: Iterable[Any]) -> dict[str, float]:
    """Seconds of a step by part: of the device where kernels ran there, else of the CPU.

    Args:
        events: `FunctionEvent`s of one step.

    Returns:
        Seconds by part; each operation's own time, without the operations that it calls.
    """
    seconds = dict.fromkeys(PARTS, 0.0)
    on_device = dict.fromkeys(PARTS, 0.0)
    for event in events:
        part = part_of(event.name)
        for name, ranges in _RANGES.items():
            part = name if _within(event, ranges) else part
        seconds[part] += event.self_cpu_time_total / 1e6
        on_device[part] += event.self_device_time_total / 1e6
    return on_device if any(on_device.values()) else seconds


def _within(event: Any, names: tuple[str, ...]) -> bool:
    while event is not None:
        if event.name in names:
            return True
        event = event.cpu_parent
    return False

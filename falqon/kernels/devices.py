"""What a device can do: which kernels run on it, and how they multiply FP8."""

from __future__ import annotations

import importlib.util
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
from torch import Tensor

from falqon.errors import InputError

LONGEST_ROW = 32768
"""Values of a row that fit into the registers of one program of 16 warps."""
LONGEST_NORMED_ROW = 16384
"""The same where two tensors meet; no known model has a larger hidden size."""
OLDEST = 80
"""Compute capability of the oldest NVIDIA GPUs that Triton compiles for (Ampere)."""


@lru_cache(maxsize=64)
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@lru_cache(maxsize=64)
def _architecture(index: int) -> str:
    """Name of an AMD architecture such as `gfx942`, empty on NVIDIA."""
    if torch.version.hip is None:
        return ""
    return str(torch.cuda.get_device_properties(index).gcnArchName).split(":")[0]


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def uses_kernels(x: Tensor) -> bool:
    """Whether operations on a tensor are done by Triton kernels; otherwise by plain torch."""
    return x.is_cuda


def capability(device: torch.device) -> int:
    """NVIDIA compute capability as a number such as 89; 0 for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = _capability(_index(device))
    return 10 * major + minor


def architecture(device: torch.device) -> int:
    """Which of the architectures that kernels are made for: 89, 90, 100, 120, or 0 for none."""
    number = capability(device)
    return {9: 90, 10: 100, 12: 120}.get(number // 10, 89 if number == 89 else 0)


def has_fp8_units(device: torch.device) -> bool:
    """Whether its matrix units multiply E4M3 and E5M2 as the OCP defines them.

    NVIDIA from Ada (8.9) on, AMD gfx950 and gfx12. AMD's gfx942 has FP8 units for another encoding
    (fnuz); there, as on older GPUs, codes are multiplied in float16, which holds them exactly.
    """
    if device.type != "cuda":
        return False
    if torch.version.hip is not None:
        return _architecture(_index(device)).startswith(("gfx950", "gfx12"))
    return capability(device) >= 89


@lru_cache(maxsize=64)
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors; a small number of programs where there are none."""
    return _processors(_index(device)) if device.type == "cuda" else 4


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Make it the current device, as a kernel launch needs it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check(device: torch.device) -> None:
    """Refuse a device that the kernels cannot run on, before any work.

    Raises:
        InputError: naming the device and what to use instead.
    """
    if device.type != "cuda":
        return
    name = torch.cuda.get_device_name(device)
    number = capability(device)
    if number and number < OLDEST:
        raise InputError(
            f"{name} has compute capability {number // 10}.{number % 10}; the kernels need "
            f"{OLDEST // 10}.{OLDEST % 10} (Ampere) or newer. Use another GPU, or the CPU "
            "(trainer.accelerator: cpu)."
        )
    if importlib.util.find_spec("triton") is None:
        raise InputError(
            f"training on {name} needs the package triton, which is not installed: pip install "
            "triton, or use the CPU (trainer.accelerator: cpu)."
        )


def describe(device: torch.device) -> str:
    """One sentence on how FP8 is multiplied there, and why."""
    if device.type == "cpu":
        return (
            "FP8 codes are decoded to bfloat16, an exact step, and multiplied with float32 sums: "
            "CPUs have no FP8 units. The recipe 'weights' leaves inputs in 16 bits, which is "
            "more accurate at no cost here."
        )
    if device.type != "cuda":
        return "Not a device the kernels know; plain torch operations are used, untested."
    if has_fp8_units(device):
        return (
            "Its matrix units multiply FP8: Triton kernels, and the vendor's matmul "
            "(torch._scaled_mm) for shapes where it is measured to be faster."
        )
    if torch.version.hip is not None:
        known = _architecture(_index(device))
        reason = (
            "its FP8 units are for another encoding (fnuz)"
            if known.startswith("gfx94")
            else "it has no FP8 units that are known"
        )
    else:
        reason = "it has no FP8 units (they came with Ada, 8.9)"
    return (
        f"FP8 codes are multiplied in float16, which holds them exactly: {reason}. That saves "
        "memory, not time. The recipe 'weights' leaves inputs in 16 bits, which is more accurate."
    )

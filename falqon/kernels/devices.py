"""What a device can do: which kernels run on it, and how they multiply FP8."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch


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


def capability(device: torch.device) -> int:
    """NVIDIA compute capability as a number such as 89; 0 for other devices."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = _capability(_index(device))
    return 10 * major + minor


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

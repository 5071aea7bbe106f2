"""How much of what a device could multiply a training multiplies.

Counted are the FLOPs that the method needs, not those that checkpointing repeats: of the matmuls of
linear layers, an output embedding's only for supervised tokens. Attention's products are left out,
a few per cent with short rows, and so are elementwise operations: the share is rather too low. FP8
matmuls count against the FP8 peak of the device and others against its 16-bit peak, so that 100%
means the same for both; without FP8 units both are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from torch import Tensor, nn

from falqon.kernels import devices
from falqon.kernels.native import products
from falqon.kernels.wide import product
from falqon.linear import MeldedLinear


class Flops(NamedTuple):
    """Of forward and backward matmuls.

    Attributes:
        fp8: of melded layers' weights, for a token.
        other: in 16 bits, for a token.
        supervised: of the output embedding, for a supervised token.
    """

    fp8: int
    other: int
    supervised: int


class Peaks(NamedTuple):
    """FLOP/s of a device's matmuls."""

    fp8: float
    other: float


def count_flops(module: nn.Module) -> Flops:
    """FLOPs of a training step's matmuls with frozen weights and trained adapters.

    Args:
        module: a model, melded or not, or a module that holds one as `model`.
    """
    owners = (module, getattr(module, "model", None))
    owner = next((o for o in owners if callable(getattr(o, "get_output_embeddings", None))), None)
    head = None if owner is None else owner.get_output_embeddings()  # type: ignore[operator]
    fp8 = other = supervised = 0
    for layer in module.modules():
        if isinstance(layer, MeldedLinear):
            n, out, r = layer.in_features, layer.out_features, layer.rank
            products = 2 * (out + r) * n + 2 * out * n
            thin = 2 * out * r + (2 * r * (2 * out + n) if layer.live else 0)
        elif isinstance(layer, nn.Linear):
            products = 0
            size = layer.in_features * layer.out_features  # its weight may be packed
            thin = size * (6 if layer.weight.requires_grad else 4)
        else:
            continue
        if layer is head:
            supervised += products + thin
        elif isinstance(layer, MeldedLinear) and layer.recipe.emulate == "fp8":
            fp8, other = fp8 + products, other + thin
        else:
            other += products + thin
    return Flops(fp8, other, supervised)


def count_supervised(batch: dict[str, Tensor]) -> Tensor:
    """Supervised tokens of a batch, int64 scalar; zero for a batch without labels."""
    labels = batch.get("labels")
    if labels is None:
        return torch.zeros((), dtype=torch.int64)
    return (labels[:, 1:] != -100).sum()


def peaks(device: torch.device) -> Peaks | None:
    """Peaks of a device; None if they are not known.

    A CPU's is measured, in a tenth of a second, with the number of threads that torch has: the best
    of a few matmuls that fit its caches. A GPU's are those that Lightning lists as published.
    """
    if device.type == "cpu":
        rate = _measured()
        return Peaks(rate, rate)
    if device.type != "cuda":
        return None
    wide = get_available_flops(device, torch.bfloat16)
    # FP8 units are as fast as int8's on all GPUs that have both.
    narrow = get_available_flops(device, torch.int8) if devices.has_fp8_units(device) else wide
    return Peaks(float(narrow), float(wide)) if narrow and wide else None


def _measured(size: int = 768) -> float:
    x = torch.ones(size, size, dtype=torch.bfloat16)
    room = torch.empty_like(x)
    ways: list[Callable[[], object]] = [lambda: product(x, x)]
    if products.takes_dense(x):
        ways.append(lambda: products.dense(x, x, room))
    best, end = 0.0, time.perf_counter() + 0.1
    while time.perf_counter() < end:
        for way in ways:
            start = time.perf_counter()
            way()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best


def utilisation(
    flops: Flops, peak: Peaks, tokens: float, supervised: float, seconds: float
) -> float:
    """Time that the matmuls would take at their peaks, over the time that it took.

    Args:
        flops: for a token.
        peak: of one device.
        tokens, supervised: numbers on one device.
        seconds: that they took.
    """
    other = flops.other * tokens + flops.supervised * supervised
    return (flops.fp8 * tokens / peak.fp8 + other / peak.other) / seconds

"""Rows to write of layers that are cut up, chosen without sending all of B round.

Each rank knows the L1 norms of its rows of B. All norms of all layers travel in one exchange, after
which every rank chooses the same rows; these travel in a second one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from falqon.parallel.layers import ShardedLayer


def norms(layers: Sequence[ShardedLayer]) -> list[Tensor]:
    """L1 norms of all rows of B, as pending changes, as `falqon.choice` sums them.

    Returns:
        float32 [out] a layer.
    """

    def put(layer: ShardedLayer, into: Tensor) -> None:
        start, own = layer.own_b()
        own = own * layer.lora_scaling
        into[start : start + len(own)] = own.abs().sum(dim=1, dtype=torch.float64)

    return _exchange(layers, [(layer.out_features,) for layer in layers], put)


def pending_rows(layers: Sequence[ShardedLayer], rows: Sequence[Tensor]) -> list[Tensor]:
    """Pending changes of some rows; float32 [k, r] a layer.

    Args:
        layers: with at least one element.
        rows: int64 [k] a layer, the same on all ranks.
    """
    of = dict(zip(map(id, layers), rows, strict=True))

    def put(layer: ShardedLayer, into: Tensor) -> None:
        _, own = layer.own_b()
        here, local = layer.own_rows(of[id(layer)])
        into[here] = own[local] * layer.lora_scaling

    shapes = [(len(k), layer.rank) for layer, k in zip(layers, rows, strict=True)]
    return _exchange(layers, shapes, put)


def _exchange(
    layers: Sequence[ShardedLayer],
    shapes: Sequence[tuple[int, ...]],
    put: Callable[[ShardedLayer, Tensor], None],
) -> list[Tensor]:
    """Tensors of which every rank puts its part: sums with zeros, which are exact."""
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.zeros(sum(sizes), device=layers[0].codes.device)
    parts = [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]
    for layer, part in zip(layers, parts, strict=True):
        if layer.gives_b:
            put(layer, part)
    layers[0].sum(flat)
    return parts

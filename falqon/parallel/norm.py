"""The norm of gradients that are cut up over ranks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from falqon.kernels.native import ops
from falqon.linear import MeldedLinear
from falqon.parallel.layers import tensor_part
from falqon.parallel.slices import is_cut


@torch.no_grad()
def total_norm(parameters: Iterable[nn.Parameter], layers: Iterable[MeldedLinear] = ()) -> Tensor:
    """Euclidean norm of gradients, float32 scalar on their device, the same for all ways to cut.

    Squares are summed in float64, over ranks too, and the root is rounded to float32 at the end:
    the order of summation, which depends on how a tensor is cut up, is below what that keeps, but
    for sums within about 1e-15 of the middle between two float32 numbers.

    Args:
        parameters: that have the gradients, or DTensors of them.
        layers: those of which tensor parallelism may have left this rank some rows of B.
    """
    groups = {}
    for layer in layers:
        part = tensor_part(layer)
        if part is not None and part.by_rows:
            groups[id(layer.B)] = part.group
    local_parts: dict[tuple[Any, Any], list[Tensor]] = {}  # by the groups to add up over
    for parameter in parameters:
        gradient = parameter.grad
        if gradient is None:
            continue
        group = gradient.device_mesh.get_group() if isinstance(gradient, DTensor) else None
        where = (group if is_cut(gradient) else None, groups.get(id(parameter)))
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local_parts.setdefault(where, []).append(local)
    total: Tensor | None = None
    for where, parts in local_parts.items():
        squares = ops.square_sums(parts)
        if squares is None:
            squares = torch.stack([part.double().square().sum() for part in parts])
        part_sum = squares.sum()
        for group in where:
            if group is not None:
                dist.all_reduce(part_sum, group=group)
        total = part_sum if total is None else total + part_sum
    return torch.zeros(()) if total is None else total.sqrt().float()

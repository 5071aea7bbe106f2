"""The part of a whole tensor that this rank holds."""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


def bounds(tensor: DTensor, dim: int) -> tuple[int, int]:
    """First and last-but-one index along a dimension of what this rank holds."""
    shape, offset = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    return offset[dim], offset[dim] + shape[dim]


def local_part(whole: Tensor, like: DTensor) -> Tensor:
    """A view of what this rank holds of a tensor that is cut up as another one.

    Args:
        whole: of the shape of `like`.
        like: cut up.
    """
    for dim in {p.dim for p in like.placements if isinstance(p, Shard)}:
        start, end = bounds(like, dim)
        whole = whole.narrow(dim, start if end > start else 0, end - start)
    return whole


def is_cut(tensor: Tensor) -> bool:
    """Whether this rank holds a part only."""
    return isinstance(tensor, DTensor) and any(isinstance(p, Shard) for p in tensor.placements)

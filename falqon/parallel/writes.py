"""Rows of a layer that is cut up, on their way into the codes that this rank holds."""

from __future__ import annotations

from torch import Tensor

from falqon.kernels import Compensation, Origin, RowWrite
from falqon.kernels.row_update import LARGEST
from falqon.parallel.layers import ShardedLayer


def part_write(
    layer: ShardedLayer,
    original: Tensor | None,
    rows: Tensor | None,
    change: Tensor,
    index: int,
    total: Tensor | None,
    compensation: Compensation | None,
) -> tuple[RowWrite, Tensor]:
    """What this rank writes of rows that all ranks write; for compensated rounding the whole layer.

    That rounds column after column of whole rows, so every rank writes all of the layer, and keeps
    its part.

    Args:
        layer: what this rank sees of it.
        original: this rank's part of what rows are derived from, or None.
        rows: int64 [k] of the whole layer, None for all.
        change: their pending change as a B, float32 [k, r].
        index: number of the layer.
        total: with `original`, all of their B so far, float32 [k, r], in host memory.
        compensation: to round with, or None.

    Returns:
        For the kernel; and how many rows all ranks write, int64 scalar.
    """
    size = change.abs().sum(dim=1)
    written = ((size < LARGEST) & ((size > 0) | (compensation is not None))).sum()
    device, origin = change.device, None
    if compensation is not None:
        if original is not None and total is not None:
            origin = Origin(layer.gather(original.to(device)), total.to(device))
        codes = layer.gather(layer.codes)
        write = RowWrite(codes, layer.scale, rows, change, index, origin, None, compensation)
        return write, written
    here, local = layer.local_rows(rows)
    if original is not None and total is not None:
        on_host = slice(None) if local is None else local.cpu()
        mine = here.cpu() if isinstance(here, Tensor) else here
        origin = Origin(original[on_host].to(device), total[mine].to(device))
    place = (layer.rows[0], layer.columns[0])
    write = RowWrite(
        layer.codes, layer.scale, local, change[here], index, origin, None, None, place
    )
    return write, written

"""Write rows of the low-rank change B A into the FP8 codes (paper eq. 15)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3, decode, encode, encode_stochastic, philox
from falqon.kernels import devices, transposed
from falqon.kernels.compensated import Compensation, encode_compensated
from falqon.kernels.native import ops
from falqon.kernels.native import proxy as native
from falqon.kernels.operands import are_consecutive
from falqon.recipe import Rounding

LARGEST = 1e30
"""L1 norm of a row of B from which on it cannot be written; below it B A is finite with any A."""


class RowUpdateCounts(NamedTuple):
    """What a row update did; scalar tensors.

    Attributes:
        written: rows whose B was finite and not zero (with a compensation also
            those whose B was zero), int64.
        codes: codes in those rows, int64.
        flipped: codes that changed, int64.
        saturated: codes of written rows at the largest magnitude, int64.
        projection: sum of landed x wanted change over the written rows, float64; of 128 values at
            least it is summed in float32.
        wanted: sum of squares of the wanted change, likewise.
    """

    written: Tensor
    codes: Tensor
    flipped: Tensor
    saturated: Tensor
    projection: Tensor
    wanted: Tensor


class Origin(NamedTuple):
    """What written rows are derived from again, instead of from their codes at hand.

    Attributes:
        values: original rows [k, in]: uint8 codes with the layer's scale, or floating weights.
        total: B[K] summed over all writes, this one included, float32 [k, r].
    """

    values: Tensor
    total: Tensor


class RowWrite(NamedTuple):
    """Rows of one layer to write; see `row_update`.

    Attributes:
        codes, scale, rows, proxy: as there.
        layer: its number in the model, a counter of stochastic rounding.
        origin, gram_inverse, compensation, place: as there.
    """

    codes: Tensor
    scale: Tensor
    rows: Tensor | None
    proxy: Tensor
    layer: int = 0
    origin: Origin | None = None
    gram_inverse: Tensor | None = None
    compensation: Compensation | None = None
    place: tuple[int, int] = (0, 0)


def row_updates(
    writes: Sequence[RowWrite], rounding: Rounding = "nearest", seed: int = 0, step: int = 0
) -> list[tuple[RowUpdateCounts, Tensor | None]]:
    """`row_update` of several layers; on a GPU one launch for each group that is tied.

    Args:
        writes: layers and rows.
        rounding: `nearest` or `stochastic`.
        seed, step: counters of the stochastic rounding, beside the layer's number.

    Returns:
        What `row_update` returns, for each of them.
    """
    results = []
    for batch in _launches(writes):
        first = batch[0]
        compensated = any(write.compensation is not None for write in batch)
        if (
            devices.uses_kernels(first.codes)
            and not compensated
            and not _needs_place(rounding, first.place)
            and first.codes.dtype == torch.uint8
        ):
            results += _row_updates_triton(batch, rounding, seed, step)
            continue
        for w in batch:
            counter = (seed, step, w.layer)
            results.append(
                row_update(
                    w.codes,
                    w.scale,
                    w.rows,
                    w.proxy,
                    rounding,
                    counter,
                    w.origin,
                    w.gram_inverse,
                    w.compensation,
                    w.place,
                )
            )
    return results


def _needs_place(rounding: Rounding, place: tuple[int, int]) -> bool:
    """Whether random bits depend on where the codes lie in the layer, which no kernel knows."""
    return rounding == "stochastic" and place != (0, 0)


def row_update(
    codes: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    proxy: Tensor,
    rounding: Rounding = "nearest",
    counter: tuple[int, int, int] = (0, 0, 0),
    origin: Origin | None = None,
    gram_inverse: Tensor | None = None,
    compensation: Compensation | None = None,
    place: tuple[int, int] = (0, 0),
) -> tuple[RowUpdateCounts, Tensor | None]:
    """`W[K] = Q(DQ(W[K]) + B[K] A)` in place, with the unchanged scale, saturating.

    With an origin `W[K] = Q(origin + (sum of B[K]) A)`. Rows of B that are zero leave their codes
    alone bit for bit (requantising would turn -0 into 0), and so do rows that are not finite or
    whose L1 norm reaches `LARGEST`: a NaN gradient must not reach the weights. On a CUDA device it
    is one Triton kernel, on a CPU compiled C++ for the nearest codes; elsewhere plain torch, the
    reference of both, and with a compensation everywhere.

    Args:
        codes: merged weight, uint8 [out + r, in] (or float32: then the change is added exactly).
        scale: float32 [1].
        rows: int64 [k], distinct, in [0, out); None means all of them in their order.
        proxy: B[K], float32 [k, r].
        rounding: `nearest` or `stochastic`.
        counter: seed, step and layer of the stochastic rounding's random bits; the row and column
            are counted too, so that the bits do not depend on rank, order or selection.
        origin: derive the rows from it.
        gram_inverse: pseudo-inverse of `A A^T` in units of codes, float32 [r, r]: asks for the
            remainder, the part of the change that rounding left, projected on the rows of A.
        compensation: round with it (see `encode_compensated`), rows whose B is zero as well.
            Without FP8 rounding there is nothing to compensate.
        place: row and column of the layer that `codes` begin with, where they are a part of it.

    Returns:
        Counts over the written rows, and with `gram_inverse` the remainder as a B, float32 [k, r]
        (zero in rows that were not written).
    """
    on_kernel = devices.uses_kernels(codes) and codes.dtype == torch.uint8
    if on_kernel and compensation is None and not _needs_place(rounding, place):
        seed, step, layer = counter
        write = RowWrite(codes, scale, rows, proxy, layer, origin, gram_inverse)
        return _row_updates_triton([write], rounding, seed, step)[0]
    size = proxy.abs().sum(dim=1)  # NaN and infinity fail the comparison
    keep = size < LARGEST
    if compensation is None:
        keep &= size > 0
    if bool(keep.all()):
        in_one = rounding == "nearest" and compensation is None and gram_inverse is None
        if in_one and native.takes(codes, None if origin is None else origin.values):
            done = native.write_rows(codes, scale, rows, proxy, origin)
            return RowUpdateCounts(*done[:4].long(), *done[4:]), None
        wanted, target = _targets(codes, scale, rows, proxy, origin)
        new = _round(codes, rows, target, rounding, counter, compensation, place)
        return _write(codes, scale, rows, wanted, target, new, gram_inverse)
    # Selecting rows and starting again costs less than masking whole matrices every time.
    number = torch.arange(len(proxy), device=proxy.device) if rows is None else rows
    if origin is not None:
        origin = Origin(origin.values[keep], origin.total[keep])
    counts, some = row_update(
        codes,
        scale,
        number[keep],
        proxy[keep],
        rounding,
        counter,
        origin,
        gram_inverse,
        compensation,
        place,
    )
    remainder = None
    if some is not None:
        remainder = proxy.new_zeros(proxy.shape)
        remainder[keep] = some
    return counts, remainder


def _row_updates_triton(
    writes: Sequence[RowWrite], rounding: Rounding, seed: int, step: int
) -> list[tuple[RowUpdateCounts, Tensor | None]]:
    """`row_updates` of consecutive layers by one Triton kernel, without waiting for the device.

    Transposed copies of the codes that are kept are written as well.
    """
    from falqon.kernels.row_update_triton import launch_row_updates

    copies = [transposed.view_of(write.codes) for write in writes]
    buffers = {
        None if copy is None else (copy.untyped_storage().data_ptr(), copy.stride(0))
        for copy in copies
    }
    if None in buffers or len(buffers) > 1:  # layers that ran one by one have copies of their own
        copies = [None] * len(writes)
    counter = (seed, step) if rounding == "stochastic" else None
    results = []
    for write, done in zip(
        writes, launch_row_updates(writes, LARGEST, counter, copies), strict=True
    ):
        torch.autograd.graph.increment_version(write.codes)  # autograd does not see kernels write
        if copies[0] is not None:
            transposed.written(write.codes)
        sums = done.summed / write.scale.double().square()
        kept = None
        if done.rest is not None and write.gram_inverse is not None:
            adapter = _values(write.codes[len(write.codes) - len(write.gram_inverse) :])
            kept = (done.rest @ adapter.t()) @ write.gram_inverse
        results.append((RowUpdateCounts(*done.counted.unbind(), *sums.unbind()), kept))
    return results


def _kind(write: RowWrite) -> tuple[object, ...]:
    """What one launch needs its layers to have in common."""
    origin = None if write.origin is None else write.origin.values.dtype
    return write.rows is None, origin, write.gram_inverse is None, write.proxy.shape[1]


def _launches(writes: Sequence[RowWrite]) -> Iterator[list[RowWrite]]:
    """Layers in their order, those that one launch can write together."""
    batch: list[RowWrite] = []
    for write in writes:
        together = batch and _kind(batch[-1]) == _kind(write)
        if together and are_consecutive([batch[-1].codes, write.codes]):
            batch.append(write)
            continue
        if batch:
            yield batch
        batch = [write]
    if batch:
        yield batch


def _targets(
    codes: Tensor, scale: Tensor, rows: Tensor | None, proxy: Tensor, origin: Origin | None
) -> tuple[Tensor, Tensor]:
    """Wanted change, and the values to round, float32 [k, in] in units of codes.

    Values are multiplied by the scale there, which cancels in B A.
    """
    split = codes.shape[0] - proxy.shape[1]
    adapter = _values(codes[split:])
    wanted = proxy @ adapter
    if origin is None:
        return wanted, _values(_rows_of(codes[:split], rows)) + wanted
    exact = origin.values.dtype == torch.uint8
    start = decode(origin.values, E4M3) if exact else origin.values.float() * scale
    return wanted, torch.addmm(start, origin.total, adapter)


def _round(
    codes: Tensor,
    rows: Tensor | None,
    target: Tensor,
    rounding: Rounding,
    counter: tuple[int, int, int],
    compensation: Compensation | None,
    place: tuple[int, int],
) -> Tensor:
    """What is written: the rounded target, uint8 [k, in] (or the target itself)."""
    if codes.dtype != torch.uint8:
        return target
    if compensation is not None:
        return encode_compensated(target, compensation)
    if rounding == "nearest":
        return encode(target, E4M3)
    seed, step, layer = counter
    columns = torch.arange(codes.shape[1], device=codes.device) + place[1]
    number = torch.arange(len(target), device=codes.device) if rows is None else rows
    bits = philox(seed, columns[None, :], number[:, None] + place[0], step, layer)
    return encode_stochastic(target, E4M3, bits)


def _write(
    codes: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    wanted: Tensor,
    target: Tensor,
    new: Tensor,
    gram_inverse: Tensor | None,
) -> tuple[RowUpdateCounts, Tensor | None]:
    """Write and count; every row counts as written."""
    exact = codes.dtype != torch.uint8
    out = len(wanted) if rows is None else None
    old = _rows_of(codes[:out], rows)
    flipped = torch.count_nonzero(new != old)
    after = _values(new)
    change = wanted.flatten()
    landed, saturated = change, torch.zeros_like(flipped)  # without FP8 rounding nothing is lost
    if not exact:
        landed = (after - _values(old)).flatten()
        largest = (new == E4M3.max_code) | (new == E4M3.max_code + 128)
        saturated = torch.count_nonzero(largest)
    if rows is None:
        codes[:out] = new
    else:
        codes[rows] = new
    unit = scale.double()[0].square()
    counts = RowUpdateCounts(
        written=torch.full_like(flipped, len(wanted)),
        codes=torch.full_like(flipped, wanted.numel()),
        flipped=flipped,
        saturated=saturated,
        projection=torch.dot(landed, change).double() / unit,
        wanted=torch.dot(change, change).double() / unit,
    )
    if gram_inverse is None:
        return counts, None
    adapter = _values(codes[codes.shape[0] - len(gram_inverse) :])
    return counts, ((target - after) @ adapter.t()) @ gram_inverse


def _values(codes: Tensor) -> Tensor:
    if native.takes(codes):
        return ops.values(codes)
    return decode(codes, E4M3) if codes.dtype == torch.uint8 else codes


def _rows_of(matrix: Tensor, rows: Tensor | None) -> Tensor:
    return matrix if rows is None else matrix[rows]


class RowUpdate(nn.Module):
    """`row_updates` as a module.

    Args:
        rounding: `nearest` or `stochastic`.
    """

    def __init__(self, rounding: Rounding = "nearest") -> None:
        super().__init__()
        self.rounding: Rounding = rounding

    def forward(
        self, writes: Sequence[RowWrite], seed: int = 0, step: int = 0
    ) -> list[tuple[RowUpdateCounts, Tensor | None]]:
        """See `row_updates`."""
        return row_updates(writes, self.rounding, seed, step)

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return f"rounding={self.rounding}"

"""Write rows of the low-rank change B A into the FP8 codes (paper eq. 15)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3, decode, encode, encode_stochastic, philox
from falqon.recipe import Rounding


class RowUpdateCounts(NamedTuple):
    """What a row update did; scalar tensors, so that nothing waits for the device.

    Attributes:
        written: rows whose change was finite and whose B was not zero, int64.
        codes: codes in those rows, int64.
        flipped: codes that changed, int64.
        saturated: codes of written rows at the largest magnitude, int64.
        projection: sum of landed x wanted change over the written rows, float64.
        wanted: sum of squares of the wanted change, float64.
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


def row_update(
    codes: Tensor,
    scale: Tensor,
    rows: Tensor,
    proxy: Tensor,
    rounding: Rounding = "nearest",
    counter: tuple[int, int, int] = (0, 0, 0),
    origin: Origin | None = None,
    gram_inverse: Tensor | None = None,
) -> tuple[RowUpdateCounts, Tensor | None]:
    """`W[K] = Q(DQ(W[K]) + B[K] A)` in place, with the unchanged scale, saturating.

    With an origin `W[K] = Q(origin + (sum of B[K]) A)`. Rows of B that are zero leave their codes
    alone bit for bit (requantising would turn -0 into 0), and so do rows whose change is not
    finite: a NaN gradient must not reach the weights.

    Args:
        codes: merged weight, uint8 [out + r, in] (or float32: then the change is added exactly).
        scale: float32 [1].
        rows: int64 [k], distinct, in [0, out).
        proxy: B[K], float32 [k, r].
        rounding: `nearest` or `stochastic`.
        counter: seed, step and layer of the stochastic rounding's random bits; the row and column
            are counted too, so that the bits do not depend on rank, order or selection.
        origin: derive the rows from it.
        gram_inverse: pseudo-inverse of `A A^T` in units of codes, float32 [r, r]: asks for the
            remainder, the part of the change that rounding left, projected on the rows of A.

    Returns:
        Counts over the written rows, and with `gram_inverse` the remainder as a B, float32 [k, r]
        (zero in rows that were not written).
    """
    rank = proxy.shape[1]
    a_codes, old = codes[codes.shape[0] - rank :], codes[rows]
    exact = codes.dtype != torch.uint8
    # In units of codes, that is multiplied by the scale, which cancels in B A. A finite B can still
    # overflow here, to infinity or to NaN.
    adapter = a_codes if exact else decode(a_codes, E4M3)
    before = old if exact else decode(old, E4M3)
    wanted = proxy @ adapter
    if origin is None:
        target = before + wanted
    else:
        values = origin.values
        start = decode(values, E4M3) if values.dtype == torch.uint8 else values.float() * scale
        target = torch.addmm(start, origin.total, adapter)
    # A sum is finite only if all its terms are: one pass over the change, none over B.
    finite = torch.isfinite(wanted.sum(dim=1) + target.sum(dim=1)) & torch.isfinite(proxy.sum(1))
    live = (finite & (proxy != 0).any(dim=1))[:, None]
    if exact:
        new = torch.where(live, target, old)
    else:
        if rounding == "nearest":
            new = encode(target, E4M3)
        else:
            seed, step, layer = counter
            columns = torch.arange(codes.shape[1], device=codes.device)
            bits = philox(seed, columns[None, :], rows[:, None], step, layer)
            new = encode_stochastic(target, E4M3, bits)
        new = torch.where(live, new, old)
    codes[rows] = new
    after = new if exact else decode(new, E4M3)
    wanted = torch.where(live, wanted, torch.zeros_like(wanted))
    # Per row in float32 and over rows in float64: exact enough for a ratio, and twice as fast.
    unit = scale.double().square()
    counts = RowUpdateCounts(
        written=live.sum(),
        codes=live.sum() * codes.shape[1],
        flipped=(new != old).sum(),
        saturated=(((new & 0x7F) == E4M3.max_code) & live).sum() if not exact else live.sum() * 0,
        projection=((after - before) * wanted).sum(dim=1).sum(dtype=torch.float64) / unit[0],
        wanted=wanted.square().sum(dim=1).sum(dtype=torch.float64) / unit[0],
    )
    if gram_inverse is None:
        return counts, None
    missed = torch.where(live, target - after, torch.zeros_like(target))
    return counts, (missed @ adapter.t()) @ gram_inverse


class RowUpdate(nn.Module):
    """`row_update` as a module.

    Args:
        rounding: `nearest` or `stochastic`.
    """

    def __init__(self, rounding: Rounding = "nearest") -> None:
        super().__init__()
        self.rounding: Rounding = rounding

    def forward(
        self,
        codes: Tensor,
        scale: Tensor,
        rows: Tensor,
        proxy: Tensor,
        counter: tuple[int, int, int] = (0, 0, 0),
        origin: Origin | None = None,
        gram_inverse: Tensor | None = None,
    ) -> tuple[RowUpdateCounts, Tensor | None]:
        """See `row_update`."""
        return row_update(
            codes, scale, rows, proxy, self.rounding, counter, origin, gram_inverse
        )

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return f"rounding={self.rounding}"

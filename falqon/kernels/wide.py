"""Products of bfloat16 matrices on a CPU, in float32 where torch has no 16-bit ones.

torch gives them to oneDNN on processors with AVX512 or Arm's BF16 instructions. Elsewhere, as on
most laptops, it multiplies in loops: 30 GFLOP/s a core, and 2 in the layout of backward passes,
were seen where float32 reaches 100. Widening is exact, sums are in float32 either way, and results
are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FEW = 8  # rows that torch's loops multiply faster with a transposed matrix than it is widened
_AT_ONCE = 2**22  # values of a matrix that are widened at a time, 16 MiB


def _has_products() -> bool:
    """Whether torch multiplies bfloat16 by instructions that are made for 16 bits, or AVX512."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # a torch without oneDNN
        return False


WIDENS = not _has_products()
"""Whether `product` multiplies bfloat16 on a CPU in float32."""


def product(a: Tensor, b: Tensor, onto: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """`a b`, or `onto + a b`, in the dtype of the factors; in 16 bits the sum is rounded once.

    Args:
        a: [m, k], or [n, m, k].
        b: [k, n] in the dtype of `a`, or [n, k, n].
        onto: [m, n], used up.
        out: [m, n] to write the result to; not with `onto`.

    Returns:
        [m, n], or [n, m, n].
    """
    if not _widens(a, b):
        return torch.matmul(a, b, out=out) if onto is None else onto.addmm_(a, b)
    with torch.autocast("cpu", enabled=False):  # it would narrow the factors again
        if b.dim() == 2 and b.numel() > _AT_ONCE:
            return _by_parts(a, b, onto, out)
        wide = _sum(a.float(), b, onto)
        if onto is not None:
            out = onto
        return wide.to(a.dtype) if out is None else out.copy_(wide)


def _widens(a: Tensor, b: Tensor) -> bool:
    if not WIDENS or a.dtype != torch.bfloat16 or a.device.type != "cpu":
        return False
    return a.shape[-2] >= _FEW or b.stride(-2) != 1


def _sum(a: Tensor, b: Tensor, onto: Tensor | None) -> Tensor:
    return a @ b.float() if onto is None else torch.addmm(onto.float(), a, b.float())


def _by_parts(a: Tensor, b: Tensor, onto: Tensor | None, out: Tensor | None) -> Tensor:
    """Widen parts of a large b, columns or rows, whichever are more."""
    rows, columns = b.shape
    step = max(1, _AT_ONCE // min(rows, columns))
    if onto is not None:
        out = onto
    elif out is None:
        out = a.new_empty(a.shape[0], columns)
    if columns >= rows:
        wide = a.float()
        for part in (slice(i, i + step) for i in range(0, columns, step)):
            out[:, part] = _sum(wide, b[:, part], None if onto is None else onto[:, part])
        return out
    total = torch.zeros_like(out, dtype=torch.float32) if onto is None else onto.float()
    for part in (slice(i, i + step) for i in range(0, rows, step)):
        total.addmm_(a[:, part].float(), b[part].float())
    return out.copy_(total)

"""Rows of B A written into FP8 codes by the compiled functions of proxy.cpp.

Shapes: r the rank, k rows of a layer [out, n].
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from falqon.kernels import devices
from falqon.kernels.native import ops

_INT = ctypes.c_int64
_POINTER = ctypes.c_void_p
_KINDS = {torch.uint8: 0, torch.bfloat16: 1, torch.float32: 2}
_BLOCK = 32  # rows that a thread writes at a time
_COUNTS = 6


class _Rows(ctypes.Structure):  # FalqonRows of proxy.cpp
    _fields_ = [
        ("codes", _POINTER),
        ("scale", _POINTER),
        ("out", _INT),
        ("n", _INT),
        ("rank", _INT),
        ("count", _INT),
        ("rows", _POINTER),
        ("change", _POINTER),
        ("total", _POINTER),
        ("origin", _POINTER),
        ("kind", _INT),
        ("source", _POINTER),
    ]


class _Proxy(ctypes.Structure):  # FalqonProxy of proxy.cpp
    _fields_ = [
        ("b", _POINTER),
        ("codes", _POINTER),
        ("scale", _POINTER),
        ("out", _INT),
        ("n", _INT),
        ("rank", _INT),
        ("count", _INT),
        ("factor", ctypes.c_float),
        ("now", ctypes.c_int32),
        ("origin", _POINTER),
        ("kind", _INT),
        ("applied", _POINTER),
        ("last_written", _POINTER),
        ("touched", _POINTER),
    ]


class _Pending(ctypes.Structure):  # FalqonPending of proxy.cpp
    _fields_ = [
        ("b", _POINTER),
        ("gram", _POINTER),
        ("out", _INT),
        ("rank", _INT),
        ("factor", ctypes.c_float),
        ("now", ctypes.c_int32),
        ("last_written", _POINTER),
    ]


class Pending(NamedTuple):
    """What is pending in a layer's B.

    Attributes:
        b: float32 [out, r].
        gram: A A^T, float32 [r, r].
        factor: what B is multiplied by.
        now, last_written: the step it is, and in which each row was written, int32 [out].
    """

    b: Tensor
    gram: Tensor
    factor: float
    now: int
    last_written: Tensor


class Proxy(NamedTuple):
    """A layer whose rows are to be chosen and written.

    Attributes:
        b: float32 [out, r].
        codes: merged weight, uint8 [out + r, n].
        scale: float32 [1].
        number: how many rows, those with the largest L1 norms of B; all from `out` on.
        factor: what B is multiplied by.
        now: what `last_written` becomes for rows that are written.
        original, applied: what rows are derived from, uint8 (codes), bfloat16 or float32 [out, n],
            and the sum of B that was written before, float32 [out, r]; both None to start from the
            codes at hand.
        last_written, touched: int32 and bool [out].
    """

    b: Tensor
    codes: Tensor
    scale: Tensor
    number: int
    factor: float
    now: int
    original: Tensor | None
    applied: Tensor | None
    last_written: Tensor
    touched: Tensor


def takes(codes: Tensor, original: Tensor | None = None) -> bool:
    """Whether the compiled functions take these codes, and rows that are derived from these."""
    if not (_is_plain(codes, torch.uint8) and ops.usable()):
        return False
    return original is None or (original.dtype in _KINDS and original.is_contiguous())


def takes_layer(b: Tensor, codes: Tensor, scale: Tensor, original: Tensor | None = None) -> bool:
    """Whether `update` and `pending_sums` take a layer with this B, these codes and scale."""
    plain = _is_plain(b, torch.float32) and _is_plain(scale, torch.float32)
    plain = plain and len(codes) == sum(b.shape) and takes(codes, original)
    return plain and not devices.uses_kernels(codes)


def _is_plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu
    return plain and tensor.dtype == dtype and tensor.is_contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def write_rows(
    codes: Tensor,
    scale: Tensor,
    rows: Tensor | None,
    change: Tensor,
    origin: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Write rows of one layer to the nearest codes, in place.

    Args:
        codes: merged weight, uint8 [out + r, n], that `takes` allows.
        scale: float32 [1].
        rows: int64 [k], distinct, in [0, out); None for the first k.
        change: finite rows of B, float32 [k, r].
        origin: what they are derived from, uint8 (codes), bfloat16 or float32 [k, n], and the sum
            of their B, float32 [k, r]; None for the codes at hand.

    Returns:
        float64 [6]: rows and codes that were written, codes that changed, codes at the largest
        magnitude, and the sums of landed times wanted change and of squares of the latter; those
        of a row's 128 values are summed in float32.
    """
    (count, rank), n = change.shape, codes.shape[1]
    out = len(codes) - rank
    change = change.contiguous()
    rows = rows if rows is None else rows.contiguous()
    values, total = (None, None) if origin is None else [t.contiguous() for t in origin]
    assert change.dtype == scale.dtype == torch.float32 and takes(codes, values)
    assert values is None or values.shape == (count, n)
    assert total is None or (total.dtype == torch.float32 and total.shape == change.shape)
    if rows is not None:
        assert rows.dtype == torch.int64 and rows.shape == (count,)
        assert not count or 0 <= int(rows.min()) <= int(rows.max()) < out
    assert rows is not None or count <= out
    done = torch.zeros(-(-count // _BLOCK), _COUNTS, dtype=torch.float64, device="cpu")
    given = _Rows(_at(codes), _at(scale), out, n, rank, count, _at(rows), _at(change), _at(total))
    given.origin, given.kind = _at(values), 0 if values is None else _KINDS[values.dtype]
    ops.call("write_rows", ctypes.byref(given), _INT(_BLOCK), ops.at(done))
    torch.autograd.graph.increment_version(codes)  # autograd does not see the C++ write
    return done.sum(dim=0)


def update(layers: Sequence[Proxy]) -> Tensor:
    """Choose rows of layers, write them to the nearest codes and clear them in B, in one call.

    Rows of B that are not finite are cleared first. Among rows with the same L1 norm, summed in
    float64 and rounded to float32, the lower ones are chosen.

    Args:
        layers: that `takes_layer` allows.

    Returns:
        float64 [layers, 6], as `write_rows` gives them.
    """
    given = (_Proxy * len(layers))()
    for to, of in zip(given, layers, strict=True):
        out, rank = of.b.shape
        kind = 0 if of.original is None else _KINDS[of.original.dtype]
        to.b, to.codes, to.scale = of.b.data_ptr(), of.codes.data_ptr(), of.scale.data_ptr()
        to.out, to.n, to.rank, to.count = out, of.codes.shape[1], rank, of.number
        to.factor, to.now = of.factor, of.now
        to.origin, to.kind, to.applied = _at(of.original), kind, _at(of.applied)
        to.last_written, to.touched = of.last_written.data_ptr(), of.touched.data_ptr()
    done = torch.zeros(len(layers), _COUNTS, dtype=torch.float64, device="cpu")
    ops.call("proxy_update", _INT(len(layers)), given, ops.at(done))
    torch.autograd.graph.increment_version([t for of in layers for t in (of.b, of.codes)])
    return done


def pending_sums(layers: Sequence[Pending]) -> Tensor:
    """What is pending in layers, in one call.

    Args:
        layers: that `takes_layer` allows.

    Returns:
        float64 [layers, 3]: the squared norm of B A, steps that rows with something pending have
        waited, and their number.
    """
    given = (_Pending * len(layers))()
    for to, of in zip(given, layers, strict=True):
        to.out, to.rank = of.b.shape
        to.b, to.gram, to.factor = of.b.data_ptr(), of.gram.data_ptr(), of.factor
        to.now, to.last_written = of.now, of.last_written.data_ptr()
    done = torch.zeros(len(layers), 3, dtype=torch.float64, device="cpu")
    ops.call("pending_sums", _INT(len(layers)), given, ops.at(done))
    return done

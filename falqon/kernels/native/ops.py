"""Typed wrappers of kernels.cpp: tensors in, tensors out.

Unless they say otherwise they take bfloat16 CPU tensors and scales that are powers of two; `usable`
says whether they can be called. Shapes: T tokens, n features.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from falqon.kernels.native.build import library, wanted

_INT = ctypes.c_int64
_BF16 = torch.bfloat16
_PLAIN = (Tensor, torch.nn.Parameter)
_UNNAMED: AbstractContextManager[Any] = nullcontext()


@lru_cache(maxsize=1)
def functions() -> ctypes.CDLL | None:
    """The library after a look at whether it rounds as torch does, on every bfloat16 value."""
    found = library()
    if found is None:
        return None
    values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(_BF16)
    usual = values[values.abs() <= 2**15].view(-1)
    for name, most in ((torch.float8_e4m3fn, 448.0), (torch.float8_e5m2, 57344.0)):
        # One row with the format's largest value has scale 1.
        row = torch.cat([usual.clamp(-most, most), usual.new_full((1,), most)])
        expected = row.to(name).to(_BF16)
        out = torch.empty_like(row)
        _quantize(found.falqon_quantize, [row[None]], [1.0], name == torch.float8_e5m2, out)
        if not torch.equal(out, expected):
            return None
    return found


def usable(*tensors: Tensor) -> bool:
    """Whether the compiled functions exist and take these tensors (any strides)."""
    for t in tensors:  # asked for hundreds of times a step
        if not (type(t) in _PLAIN and t.is_cpu and t.dtype == _BF16):
            return False
    return not torch.compiler.is_compiling() and wanted() and functions() is not None


def call(name: str, *args: object) -> None:
    """Call a compiled function; a profiler that is running sees it as `falqon::name`."""
    function = getattr(functions(), "falqon_" + name)
    with named(name):
        function(*args)


def named(name: str) -> AbstractContextManager[Any]:
    """What is run in it, a profiler that is running sees as `falqon::name`."""
    if torch.autograd._profiler_enabled():  # entering a range costs more than some of the calls
        return torch.profiler.record_function(f"falqon::{name}")
    return _UNNAMED


def at(tensor: Tensor) -> ctypes.c_void_p:
    """Where a tensor's values begin; it has to be kept alive for the call."""
    return ctypes.c_void_p(tensor.data_ptr())


def rows(x: Tensor) -> Tensor:
    """With values of a row side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def decoded(codes: Sequence[Tensor], scales: Sequence[Tensor], rank: int) -> Tensor:
    """Values of merged weights in E4M3: those of all backbones, then those of all adapters.

    Args:
        codes: uint8 [out_i + r, n], contiguous.
        scales: float32 [1] each, powers of two.
        rank: r.

    Returns:
        [sum of out_i + r for each, n].
    """
    count, columns = len(codes), codes[0].shape[1]
    outs = [len(c) - rank for c in codes]
    assert all(c.is_contiguous() and c.shape[1] == columns for c in codes)
    assert all(s.dtype == torch.float32 for s in scales)
    out = codes[0].new_empty(sum(outs) + count * rank, columns, dtype=_BF16)
    pointers = ctypes.c_void_p * count
    call(
        "decode",
        _INT(count),
        pointers(*(c.data_ptr() for c in codes)),
        pointers(*(s.data_ptr() for s in scales)),
        (_INT * count)(*outs),
        _INT(rank),
        _INT(columns),
        at(out),
    )
    return out


def values(codes: Tensor) -> Tensor:
    """Values of E4M3 codes, uint8 on the CPU of any shape, without scale, in float32."""
    codes = codes.contiguous()
    assert codes.dtype == torch.uint8
    out = torch.empty(codes.shape, dtype=torch.float32, device="cpu")
    call("values", at(codes), _INT(codes.numel()), at(out))
    return out


def _quantize(
    call: Callable[..., None],
    parts: Sequence[Tensor],
    factors: Sequence[float],
    e5m2: bool,
    out: Tensor,
) -> None:
    count = len(parts)
    pointers = (ctypes.c_void_p * count)(*(p.data_ptr() for p in parts))
    widths = (_INT * count)(*(p.shape[1] for p in parts))
    strides = (_INT * count)(*(p.stride(0) for p in parts))
    scales = (ctypes.c_float * count)(*factors)
    rows = _INT(parts[0].shape[0])
    call(_INT(count), pointers, widths, strides, scales, rows, _INT(e5m2), at(out))


def quantized(parts: Sequence[Tensor], factors: Sequence[float], e5m2: bool = False) -> Tensor:
    """`DQ(Q([f_0 x_0 | f_1 x_1 | ...]))`, its parts divided by their factors again, in bfloat16.

    A row has one scale.

    Args:
        parts: [T, n_i].
        factors: powers of two.
        e5m2: to E5M2 instead of E4M3.

    Returns:
        [T, sum of n_i].
    """
    parts = [rows(part) for part in parts]
    out = parts[0].new_empty(parts[0].shape[0], sum(part.shape[1] for part in parts))
    _quantize(partial(call, "quantize"), parts, factors, e5m2, out)
    return out


def rms_norm_quantized(
    x: Tensor, weight: Tensor, eps: float, rounded: bool = True
) -> tuple[Tensor, Tensor]:
    """`DQ(Q(w * (x / rms(x))))` in E4M3, with one scale a row, `rms(x) = sqrt(mean(x^2) + eps)`.

    The bits of `falqon.kernels.rms_norm_quantize.rms_norm_quantize`.

    Args:
        x: [T, n].
        weight: w, [n].
        eps: added to the mean square.
        rounded: to E4M3; otherwise only to bfloat16.

    Returns:
        [T, n]; 1 / rms(x), float32 [T, 1].
    """
    x, weight = x.contiguous(), weight.contiguous()
    known = not sums_as_torch()
    inverse = _inverse_rms(x, eps) if known else x.new_empty(len(x), 1, dtype=torch.float32)
    return _rms_norm(x, weight, eps, inverse, known, rounded), inverse


def _rms_norm(
    x: Tensor, weight: Tensor, eps: float, inverse_rms: Tensor, known: bool, rounded: bool
) -> Tensor:
    out = torch.empty_like(x)
    given = (at(x), at(weight), ctypes.c_float(eps), _INT(known), at(inverse_rms))
    call("rms_norm", *given, _INT(x.shape[0]), _INT(x.shape[1]), _INT(rounded), at(out))
    return out


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return x.to(torch.float32, copy=True).square_().mean(-1, keepdim=True).add_(eps).rsqrt_()


@lru_cache(maxsize=1)
def sums_as_torch() -> bool:
    """Whether the C++ sums the squares of a row in torch's order, which differs by processor."""
    generator = torch.Generator("cpu").manual_seed(0)
    for n in (1, 7, 8, 40, 576, 1541, 2048, 8232, 16384):
        numbers = torch.empty(64, n, dtype=torch.float32, device="cpu")
        x = numbers.normal_(generator=generator).to(_BF16)
        inverse = x.new_empty(64, 1, dtype=torch.float32)
        _rms_norm(x, x[0], 1e-5, inverse, False, False)
        if not torch.equal(inverse, _inverse_rms(x, 1e-5)):
            return False
    return True


def rms_norm_grad(grad: Tensor, x: Tensor, weight: Tensor, inverse_rms: Tensor) -> Tensor:
    """See `falqon.kernels.rms_norm_quantize.rms_norm_grad`."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    given = (at(grad), at(x), at(weight), at(inverse_rms), None)
    call("rms_norm_grad", *given, _INT(x.shape[0]), _INT(x.shape[1]), at(out))
    return out


def swiglu_quantized(gate: Tensor, up: Tensor, rounded: bool = True) -> Tensor:
    """`DQ(Q(silu(gate) * up))` in E4M3, with one scale a row; [T, n] each.

    Not `rounded`, `silu(gate) * up` in bfloat16.
    """
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    sizes = (_INT(gate.shape[0]), _INT(gate.shape[1]), _INT(rounded))
    call("swiglu", at(gate), at(up), *sizes, at(out))
    return out


def swiglu_grad(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """See `falqon.kernels.swiglu_quantize.swiglu_grad`."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
    given = (at(grad), at(gate), at(up))
    sizes = (_INT(gate.shape[0]), _INT(gate.shape[1]))
    call("swiglu_grad", *given, *sizes, at(d_gate), at(d_up))
    return d_gate, d_up


def cross_entropy(
    logits: Tensor, targets: Tensor, want_grad: bool
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Losses of rows of logits, which with `want_grad` are left as parts of the gradient.

    The gradient of a row is `exp(logits - max) / sum`, minus one at the target. Here it is in three
    parts, so that each logit needs one exponential: what the logits become, which is zero at the
    target and not divided by the sum; the sums; and the gradient at the target.

    Args:
        logits: [T, n], contiguous; overwritten with `want_grad`.
        targets: int64 [T], in [0, n).
        want_grad: whether a gradient is wanted.

    Returns:
        The losses, float32 [T]; the sums and the gradients at the targets, float32 [T] each, or
        None unless `want_grad`.
    """
    assert logits.is_contiguous() and targets.dtype == torch.int64
    targets = targets.contiguous()
    losses, *parts = torch.empty(3, len(logits), dtype=torch.float32)
    sizes = (_INT(logits.shape[0]), _INT(logits.shape[1]))
    places = [at(part) if want_grad else None for part in parts]
    call("cross_entropy", at(logits), at(targets), *sizes, at(losses), *places)
    return losses, (parts[0], parts[1]) if want_grad else None


def square_sums(tensors: Sequence[Tensor]) -> Tensor | None:
    """Sums of squares, float64 [n]; None if they are not plain, contiguous float32 CPU tensors.

    The order of summation does not depend on the number of threads.
    """
    plain = all(
        type(t) is Tensor and t.is_cpu and t.dtype == torch.float32 and t.is_contiguous()
        for t in tensors
    )
    if not plain or not usable():
        return None
    count = len(tensors)
    sums = torch.empty(count, dtype=torch.float64)
    pointers = (ctypes.c_void_p * count)(*[t.data_ptr() for t in tensors])
    sizes = (_INT * count)(*[t.numel() for t in tensors])
    call("square_sums", _INT(count), pointers, sizes, at(sums))
    return sums


def rotated(x: Tensor, cos: Tensor, sin: Tensor, kv: int) -> Tensor:
    """Heads after rotary embedding, with those that share keys side by side.

    Args:
        x: [b, s, heads, d]; heads and their values side by side in memory.
        cos, sin: [b or 1, s, d].
        kv: number of key heads.

    Returns:
        [b, kv, s, heads / kv, d].
    """
    batch, length, heads, d = x.shape
    x = tokens_apart(x)
    out = x.new_empty(batch, kv, length, heads // kv, d)
    sizes = (batch, table_stride(cos), length, kv, heads // kv, d)
    call(
        "rotate",
        at(x),
        _INT(x.stride(1)),
        _INT(d),
        at(cos),
        at(sin),
        *map(_INT, sizes),
        at(out),
    )
    return out


def rotated_grad(grad: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Gradient of the input of `rotated`, [b, s, heads, d].

    Args:
        grad: [b, kv, s, heads / kv, d], contiguous.
        cos, sin: [b or 1, s, d].
    """
    batch, kv, length, group, d = grad.shape
    assert grad.is_contiguous()
    out = grad.new_empty(batch, length, kv * group, d)
    sizes = (batch, table_stride(cos), length, kv, group, d)
    call("rotate_grad", at(grad), at(cos), at(sin), *map(_INT, sizes), at(out))
    return out


def tokens_apart(x: Tensor) -> Tensor:
    """[b, s, heads, d] with all of a token side by side, and one distance between all tokens."""
    length, d = x.shape[1], x.shape[3]
    return x if x.stride() == (length * x.stride(1), x.stride(1), d, 1) else x.contiguous()


def table_stride(table: Tensor) -> int:
    """Distance between rows of cosines or sines [b or 1, s, d]; 0 if one is for all."""
    assert table.is_contiguous()
    return table.stride(0) if table.shape[0] > 1 else 0


def regrouped(x: Tensor, kv: int) -> Tensor:
    """[b, s, heads, d] as [b, kv, s, heads / kv, d]; see `rotated`."""
    batch, length, heads, d = x.shape
    x = tokens_apart(x)
    out = x.new_empty(batch, kv, length, heads // kv, d)
    sizes = (x.stride(1), batch, length, kv, heads // kv, d, 0)
    call("regroup", at(x), *map(_INT, sizes), at(out))
    return out


def ungrouped(x: Tensor) -> Tensor:
    """[b, kv, s, group, d], contiguous, as [b, s, heads, d]."""
    batch, kv, length, group, d = x.shape
    assert x.is_contiguous()
    out = x.new_empty(batch, length, kv * group, d)
    sizes = (kv * group * d, batch, length, kv, group, d, 1)
    call("regroup", at(x), *map(_INT, sizes), at(out))
    return out


def softmax_(
    scores: Tensor,
    first: Tensor,
    last: Tensor,
    query: int,
    queries: int,
    offset: int,
    factor: float,
) -> Tensor:
    """Softmax of `factor * scores` over each query's keys, in place; zero for all other keys.

    Args:
        scores: [b * kv, queries * group, keys], contiguous.
        first, last: int32 [b, s]: query i sees keys first[i] up to, and without, last[i].
        query, queries: number of the first query, and how many there are.
        offset: number of the first key.
        factor: of the scores.
    """
    (batch, length), (heads, rows, keys) = first.shape, scores.shape
    assert scores.is_contiguous() and heads % batch == rows % queries == 0
    sizes = (batch, heads // batch, length, query, queries, rows // queries, offset, keys)
    call("softmax", at(scores), at(first), at(last), *map(_INT, sizes), ctypes.c_float(factor))
    return scores


def softmax_grad_(p: Tensor, dp: Tensor, factor: float) -> Tensor:
    """`factor * p * (dp - sum(p * dp))` over the last dimension, into `dp`; both contiguous."""
    assert p.is_contiguous() and dp.is_contiguous()
    keys = p.shape[-1]
    rows = (_INT(p.numel() // max(1, keys)), _INT(keys))
    call("softmax_grad", at(p), at(dp), *rows, ctypes.c_float(factor))
    return dp

"""Typed wrappers of the C++ that multiplies: melded layers, an output embedding, and attention.

One call a direction, for processors with AMX, AVX512-BF16, other AVX512 or AVX2. Sums run over
the inner dimension from first to last in float32, whatever the number of threads: the bits of
torch's products. A pending change is the first part of a sum, and is not rounded before the rest is
added; torch rounds it by itself. All tensors are on the CPU, 16-bit ones are bfloat16.

Shapes: T tokens, `in`/`out` features, r adapter rank; layers of a group have one input.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from falqon.kernels.native import ops
from falqon.kernels.native.build import wanted

_INT = ctypes.c_int64
_PANEL = 32  # of blocks.h


def present() -> bool:
    """Whether `unit` finds something: before it was asked for, nothing here may be called."""
    return wanted() and _unit() is not None


def unit() -> str | None:
    """What products are computed by: AMX, AVX512-BF16, AVX512 or AVX2.

    None if the processor has none, or compiler or `FALQON_NATIVE` do not let it be used. Where the
    system refuses AMX, it is what the processor has besides.
    """
    return _unit() if wanted() else None


@lru_cache(maxsize=1)
def _unit() -> str | None:
    found = ops.functions()
    if found is None:
        return None
    found.falqon_unit.restype = _INT
    units = {1: "AMX", 2: "AVX512-BF16", 3: "AVX512", 4: "AVX2"}
    return units.get(found.falqon_unit())


def takes(codes: Sequence[Tensor], tokens: int, rank: int) -> bool:
    """Whether layers of these shapes can be multiplied: whole panels, and tokens to fill one.

    Args:
        codes: merged weights, uint8 [out_i + r, in].
        tokens: T.
        rank: r.
    """
    sides = [codes[0].shape[1], *(c.shape[0] - rank for c in codes)]
    return fits(tokens, sides) and present()


def fits(tokens: int, sides: Sequence[int]) -> bool:
    """Whether matrices with these sides, and so many tokens, are whole panels."""
    return tokens >= _PANEL and not any(side % _PANEL for side in sides)


def forward(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    rank: int,
    proxies: Sequence[Tensor],
    factors: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """`O_A_i = x A_i^T`, rounded, and `O_i = O_A_i B_i^T + x W_i^T`, rounded once.

    Args:
        x: [T, in].
        codes: merged weights, uint8 [out_i + r, in], contiguous.
        scales: float32 [1] each, powers of two.
        rank: r.
        proxies: B_i, float32 [out_i, r], contiguous; none if nothing pending acts.
        factors: of the B_i.

    Returns:
        O_i [T, out_i], tensors of their own; O_A_i [T, r], parts of one tensor.
    """
    x, proxies = x.contiguous(), _plain(proxies)
    (tokens, columns), count = x.shape, len(codes)
    assert all(c.is_contiguous() and c.shape[1] == columns for c in codes)
    outs = [c.shape[0] - rank for c in codes]
    results = [x.new_empty(tokens, n) for n in outs]
    adapters = x.new_empty(tokens, count * rank)
    team = torch.get_num_threads()
    sizes = (_INT(count), (_INT * count)(*outs), _INT(columns), _INT(rank), _INT(tokens))
    work = _work("matmul", *sizes, _INT(bool(proxies)), _INT(team))
    ops.call(
        "matmul",
        _INT(count),
        ops.at(x),
        _INT(tokens),
        _INT(columns),
        _pointers(codes),
        _pointers(scales),
        (_INT * count)(*outs),
        _INT(rank),
        _pointers(proxies) if proxies else None,
        (ctypes.c_float * count)(*factors),
        _pointers(results),
        ops.at(adapters),
        _INT(team),
        ops.at(work),
    )
    return results, [adapters] if count == 1 else list(adapters.split(rank, dim=1))


def backward(
    grads: Sequence[Tensor],
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    rank: int,
    proxies: Sequence[Tensor],
    factors: Sequence[float],
    adapters: Sequence[Tensor],
    rounded: bool,
    want_input: bool,
    want_proxies: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """dL/dx, and dL/dB_i times its factor.

    Args:
        grads: dL/dO_i [T, out_i].
        codes, scales, rank, proxies, factors: as in `forward`.
        adapters: O_A_i [T, r].
        rounded: gradients are quantised to E5M2, with one scale a row, before they meet W.
        want_input, want_proxies: which of the results to make.

    Returns:
        [T, in] or None; float32 [out_i, r] or None each.
    """
    grads, proxies = [ops.rows(grad) for grad in grads], _plain(proxies)
    adapters = [ops.rows(adapter) for adapter in adapters]
    count, columns, tokens = len(codes), codes[0].shape[1], grads[0].shape[0]
    outs = [c.shape[0] - rank for c in codes]
    grad_input = grads[0].new_empty(tokens, columns) if want_input else None
    grad_proxies = [
        grads[0].new_empty(n, rank, dtype=torch.float32) if want else None
        for n, want in zip(outs, want_proxies, strict=True)
    ]
    team = torch.get_num_threads()
    sizes = (_INT(count), (_INT * count)(*outs), _INT(columns), _INT(rank), _INT(tokens))
    work = _work("matmul_grad", *sizes, _INT(team))
    ops.call(
        "matmul_grad",
        _INT(count),
        _pointers(grads),
        (_INT * count)(*(grad.stride(0) for grad in grads)),
        _INT(tokens),
        _INT(columns),
        _pointers(codes),
        _pointers(scales),
        (_INT * count)(*outs),
        _INT(rank),
        _pointers(proxies) if proxies else None,
        (ctypes.c_float * count)(*factors),
        _INT(rounded),
        _pointers(adapters),
        (_INT * count)(*(adapter.stride(0) for adapter in adapters)),
        None if grad_input is None else ops.at(grad_input),
        _pointers(grad_proxies),
        _INT(team),
        ops.at(work),
    )
    return grad_input, grad_proxies


def attends(d: int) -> bool:
    """Whether attention with heads of d values can be computed."""
    return d % _PANEL == 0 and present()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    last: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention of rotated queries to rotated keys; see `falqon.kernels.native.attention`.

    Args:
        query: [b, s, h, d].
        key, value: [b, s, kv, d].
        cos, sin: of the rotation, [b or 1, s, d], contiguous.
        first, last: int32 [b, s]: query i sees keys first[i] up to, and without, last[i].
        scaling: of the scores.

    Returns:
        [b, s, h, d]; and rotated queries [b, kv, s h / kv, d], rotated keys and values
        [b, kv, s, d], with zeros up to a multiple of 32 rows, for `attention_grad`.
    """
    query, key, value = map(ops.tokens_apart, (query, key, value))
    (batch, length, heads, d), kv = query.shape, key.shape[2]
    rows, keys = _filled(length * heads // kv), _filled(length)
    kept = (
        query.new_empty(batch, kv, rows, d),
        query.new_empty(batch, kv, keys, d),
        query.new_empty(batch, kv, keys, d),
    )
    out = query.new_empty(batch, length, heads, d)
    team = torch.get_num_threads()
    work = _work("attention", *map(_INT, (batch, length, kv, d, team)))
    strided = (part for x in (query, key, value) for part in (ops.at(x), _INT(x.stride(1))))
    sizes = map(_INT, (batch, length, kv, heads // kv, d))
    ops.call(
        "attention",
        *strided,
        ops.at(cos),
        ops.at(sin),
        _INT(ops.table_stride(cos)),
        ops.at(first),
        ops.at(last),
        *sizes,
        ctypes.c_float(scaling),
        *map(ops.at, (*kept, out)),
        _INT(team),
        ops.at(work),
    )
    return out, *kept


def attention_grad(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    first: Tensor,
    last: Tensor,
    scaling: float,
    heads: int,
    kv: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the query, key and value of `attention`.

    Args:
        grad: of its result, [b, s, h, d].
        query, key, value: what it returned besides.
        cos, sin, first, last, scaling: what it was given.
        heads, kv: numbers of heads of queries and of keys.

    Returns:
        [b, s, h, d], [b, s, kv, d] twice.
    """
    grad = ops.tokens_apart(grad)
    batch, length, _, d = grad.shape
    grads = tuple(grad.new_empty(batch, length, n, d) for n in (heads, kv, kv))
    team = torch.get_num_threads()
    work = _work("attention_grad", *map(_INT, (length, d, team)))
    sizes = map(_INT, (batch, length, kv, heads // kv, d))
    ops.call(
        "attention_grad",
        ops.at(grad),
        _INT(grad.stride(1)),
        *map(ops.at, (query, key, value, cos, sin)),
        _INT(ops.table_stride(cos)),
        ops.at(first),
        ops.at(last),
        *sizes,
        ctypes.c_float(scaling),
        *map(ops.at, grads),
        _INT(team),
        ops.at(work),
    )
    return grads[0], grads[1], grads[2]


def takes_dense(weight: Tensor) -> bool:
    """Whether `dense` and `dense_grad` take a matrix W, [out, n]: whole panels of bfloat16."""
    whole = weight.numel() > 0 and fits(_PANEL, weight.shape)
    return whole and weight.is_contiguous() and present()


def dense(x: Tensor, weight: Tensor, result: Tensor) -> None:
    """`x W^T`, for a W with many rows: logits, written to `result`.

    Args:
        x: [T, n]; 32 rows or more.
        weight: W, [out, n], contiguous.
        result: [T, out], contiguous.
    """
    x = x.contiguous()
    (tokens, columns), out = x.shape, weight.shape[0]
    assert tokens >= _PANEL and weight.shape == (out, columns) and takes_dense(weight)
    assert result.shape == (tokens, out) and result.is_contiguous()
    assert x.dtype == weight.dtype == result.dtype == torch.bfloat16
    team = torch.get_num_threads()
    work = _work("dense", *map(_INT, (tokens, columns, team)))
    sizes = (_INT(tokens), ops.at(weight), _INT(out), _INT(columns))
    ops.call("dense", ops.at(x), *sizes, ops.at(result), _INT(team), ops.at(work))


def dense_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """`g W`, for a W with many rows: the gradient that comes through the output embedding.

    Args:
        grad: g, [T, out].
        weight: W, [out, n], contiguous.

    Returns:
        [T, n].
    """
    grad = grad.contiguous()
    (tokens, out), columns = grad.shape, weight.shape[1]
    assert weight.shape == (out, columns) and takes_dense(weight)
    assert grad.dtype == weight.dtype == torch.bfloat16
    result = grad.new_empty(tokens, columns)
    team = torch.get_num_threads()
    work = _work("dense_grad", *map(_INT, (tokens, columns, team)))
    sizes = (_INT(tokens), _INT(out), ops.at(weight), _INT(columns))
    ops.call("dense_grad", ops.at(grad), *sizes, ops.at(result), _INT(team), ops.at(work))
    return result


def _plain(proxies: Sequence[Tensor]) -> Sequence[Tensor]:
    return [proxy.to(torch.float32).contiguous() for proxy in proxies]


def _filled(n: int) -> int:
    return -(-n // _PANEL) * _PANEL


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    kind = ctypes.c_void_p * len(tensors)
    return kind(*[None if t is None else t.data_ptr() for t in tensors])


_THREAD = threading.local()


def _work(name: str, *sizes: object) -> Tensor:
    """Memory for what a function with these sizes has by the way: panels, and more."""
    function = getattr(ops.functions(), f"falqon_{name}_work")
    function.restype = _INT
    return memory(function(*sizes))


def memory(size: int) -> Tensor:
    """Memory for `size` 16-bit values, until a thread's next call: the same for all calls.

    Two or three values for each of the largest group's weights, and what a decoder layer has by the
    way: this would otherwise be allocated and freed hundreds of times a step.
    """
    kept: Tensor | None = getattr(_THREAD, "work", None)
    if kept is None or kept.numel() < size:
        kept = _THREAD.work = None  # not both at a time
        kept = _THREAD.work = torch.empty(size, dtype=torch.bfloat16, device="cpu")
    return kept

"""Causal attention on a CPU: matmuls of 16-bit values, batched over heads, explicit softmax.

For the short rows of fine-tuning; torch's own kernel for CPUs is several times slower there. Rotary
embedding is part of it, query heads that share keys are rows of one matmul, and of the keys only
those that a block of queries can see are multiplied.

On processors with AMX, AVX512 or AVX2 all of it is one call a direction (`products.attention`),
with the same roundings.

Scores and probabilities are rounded to bfloat16, softmax and all sums are in float32; torch's
kernel keeps scores in float32. Nothing of the size of the scores is saved: backward makes them
again.

Shapes: b rows of s tokens, h query heads, kv key heads, d values in a head.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from falqon.kernels.native import ops, products
from falqon.kernels.wide import product

_BLOCK = (
    128  # queries: with fewer, matmuls get slow; with more, too many unseen keys are multiplied
)
_SCORES = 2**23  # scores that there are at a time, if blocks of 32 queries allow it


class Ranges:
    """Which keys each query sees: consecutive ones.

    Attributes:
        first, last: int32 [b, s]: from `first` up to, and without, `last`.
        lowest, highest: the least and largest of these for each query over all rows, as lists.
    """

    def __init__(self, first: Tensor, last: Tensor) -> None:
        self.first, self.last = first.to(torch.int32), last.to(torch.int32)
        some = self.last > self.first  # queries of padding see nothing
        self.lowest = torch.where(some, self.first, first.shape[1]).amin(dim=0).tolist()
        self.highest = torch.where(some, self.last, 0).amax(dim=0).tolist()

    def blocks(self, heads: int, group: int) -> Iterator[tuple[int, int, int, int]]:
        """First query, number of queries, first key and end of keys, for all blocks."""
        length = self.first.shape[1]
        size = min(_BLOCK, max(32, _SCORES // (heads * group * length) // 32 * 32))
        for start in range(0, length, size):
            end = min(start + size, length)
            low, high = min(self.lowest[start:end]), max(self.highest[start:end])
            if high > low:
                yield start, end - start, low, high


_LAST: list[tuple[weakref.ref[Tensor], int, Ranges | None]] = []


def ranges_of(mask: Tensor | None, batch: int, length: int) -> Ranges | None:
    """Ranges of a mask; None if queries see other keys than consecutive ones, or heads differ.

    Args:
        mask: bool [b or 1, 1, s, s], or None for a causal one.
        batch, length: b, s.
    """
    if mask is None:
        return _causal(batch, length)
    if mask.is_inference():  # nobody counts how often these are written
        return _read(mask, batch, length)
    if _LAST and _LAST[0][0]() is mask and _LAST[0][1] == mask._version:
        return _LAST[0][2]  # all layers are given the same mask
    found = _read(mask, batch, length)
    _LAST[:] = [(weakref.ref(mask), mask._version, found)]
    return found


@lru_cache(maxsize=8)
def _causal(batch: int, length: int) -> Ranges:
    last = torch.arange(1, length + 1, device="cpu").expand(batch, length).contiguous()
    return Ranges(torch.zeros_like(last), last)


def _read(mask: Tensor, batch: int, length: int) -> Ranges | None:
    if mask.dtype != torch.bool or mask.shape[1:] != (1, length, length):
        return None
    if mask.shape[0] not in (1, batch):
        return None
    seen = mask[:, 0].to(torch.int32)
    first, count = seen.argmax(dim=-1), seen.sum(dim=-1)
    last = length - seen.flip(-1).argmax(dim=-1)
    last = torch.where(count > 0, last, first)
    if not torch.equal(last - first, count):
        return None
    return Ranges(first.expand(batch, length).contiguous(), last.expand(batch, length).contiguous())


def takes(batch: int, length: int, heads: int, kv: int, cos: Tensor, sin: Tensor) -> bool:
    """Whether heads of these numbers, rotated by tables [b or 1, s, d], can be attended to.

    Queries, keys and values have to be `ops.usable`, and as many values as the tables.
    """
    d = cos.shape[-1]
    return (
        ops.usable(cos, sin)
        and d % 2 == 0
        and cos.shape == sin.shape
        and cos.dim() == 3
        and cos.shape[0] in (1, batch)
        and cos.shape[1] == length > 1
        and heads % kv == 0
    )


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cos: Tensor,
    sin: Tensor,
    ranges: Ranges,
    scaling: float,
) -> Tensor:
    """Attention of rotated queries to rotated keys.

    Args:
        query: [b, s, h, d].
        key, value: [b, s, kv, d].
        cos, sin: of the rotation, [b or 1, s, d].
        ranges: which keys are seen.
        scaling: of the scores.

    Returns:
        [b, s, h, d].
    """
    out: Tensor = _Attention.apply(query, key, value, cos, sin, ranges, scaling)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        ranges: Ranges,
        scaling: float,
    ) -> Tensor:
        way = Way(ranges, scaling, query.shape[2], key.shape[2], products.attends(query.shape[-1]))
        cos, sin = cos.contiguous(), sin.contiguous()
        out, kept = way.forward(query, key, value, cos, sin)
        ctx.save_for_backward(*kept, cos, sin)
        ctx.way = way
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *kept, cos, sin = ctx.saved_tensors
        return *ctx.way.backward(grad, kept, cos, sin), None, None, None, None


class Way(NamedTuple):
    """How attention is computed, in both directions and without autograd.

    Attributes:
        ranges: which keys are seen.
        scaling: of the scores.
        heads, kv: numbers of heads of queries and of keys.
        in_one_call: by `products`, which `products.attends` allows.
    """

    ranges: Ranges
    scaling: float
    heads: int
    kv: int
    in_one_call: bool

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """As `attend`, with tables that are contiguous; and what `backward` needs of it."""
        seen = (self.ranges.first, self.ranges.last)
        with ops.named("attention"):
            if not self.in_one_call:
                return self._by_matmuls(query, key, value, cos, sin)
            out, *kept = products.attention(query, key, value, cos, sin, *seen, self.scaling)
            return out, kept

    def backward(
        self, grad: Tensor, kept: Sequence[Tensor], cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value from that of the output, [b, s, h, d]."""
        q, k, v = kept
        seen = (self.ranges.first, self.ranges.last)
        with ops.named("attention"):
            if not self.in_one_call:
                return self._gradients_by_matmuls(grad, q, k, v, cos, sin)
            given = (grad, q, k, v, cos, sin, *seen, self.scaling, self.heads, self.kv)
            return products.attention_grad(*given)

    def _by_matmuls(
        self, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        (batch, length, heads, d), kv = query.shape, self.kv
        ranges, group = self.ranges, heads // kv
        q = ops.rotated(query, cos, sin, kv).view(batch * kv, length * group, d)
        k = ops.rotated(key, cos, sin, kv).view(batch * kv, length, d)
        v = ops.regrouped(value, kv).view(batch * kv, length, d)
        out = torch.zeros_like(q)
        for start, count, low, high in ranges.blocks(batch * kv, group):
            rows = slice(start * group, (start + count) * group)
            scores = product(q[:, rows], k[:, low:high].transpose(1, 2))
            ops.softmax_(scores, ranges.first, ranges.last, start, count, low, self.scaling)
            out[:, rows] = product(scores, v[:, low:high])
        return ops.ungrouped(out.view(batch, kv, length, group, d)), [q, k, v]

    def _gradients_by_matmuls(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        ranges, scaling, kv = self.ranges, self.scaling, self.kv
        batch, length, _, d = grad.shape
        group = self.heads // kv
        grad_out = ops.regrouped(grad, kv).view_as(q)
        grad_q = torch.zeros_like(q)
        # Keys are seen by several blocks of queries: their gradients are summed in float32.
        grad_k, grad_v = (torch.zeros(k.shape, dtype=torch.float32) for _ in range(2))
        for start, count, low, high in ranges.blocks(batch * kv, group):
            rows, keys = slice(start * group, (start + count) * group), slice(low, high)
            q_part, k_part, g_part = q[:, rows], k[:, keys], grad_out[:, rows]
            p = product(q_part, k_part.transpose(1, 2))
            ops.softmax_(p, ranges.first, ranges.last, start, count, low, scaling)
            grad_v[:, keys] += product(p.transpose(1, 2), g_part)
            of_scores = product(g_part, v[:, keys].transpose(1, 2))
            ops.softmax_grad_(p, of_scores, scaling)
            grad_q[:, rows] = product(of_scores, k_part)
            grad_k[:, keys] += product(of_scores.transpose(1, 2), q_part)
        shape = (batch, kv, length, 1, d)
        return (
            ops.rotated_grad(grad_q.view(batch, kv, length, group, d), cos, sin),
            ops.rotated_grad(grad_k.to(k.dtype).view(shape), cos, sin),
            ops.ungrouped(grad_v.to(v.dtype).view(shape)),
        )

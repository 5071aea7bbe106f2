"""A decoder layer of the Llama family in one native call a direction.

What its modules do, in their order and with their roundings, so with their bits. What a layer has
by the way is in memory that all layers use; what its backward pass needs is in three tensors.

Shapes: b rows of s tokens, T = b s, n features, m between gate/up and down, d values in a head.
Between native calls Python finds the processor's caches full of something else, and everything it
does takes several times as long as usual: it is to do little there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from falqon.kernels.native import ops, products

MEMBERS = (3, 1, 2, 1)
"""Number of layers of each group: q/k/v, o, gate/up and down."""

_LAYERS = sum(MEMBERS)
_INT = ctypes.c_int64
_POINTER = ctypes.c_void_p
_Results = _POINTER * _LAYERS
_Tensors = _POINTER * (6 + 4 * _LAYERS)  # FalqonTensors of decoder.cpp


class _Group(ctypes.Structure):  # FalqonGroup
    _fields_ = [("inputs", _INT), ("rank", _INT), ("quantised", _INT), ("pending", _INT)]


class _Decoder(ctypes.Structure):  # FalqonDecoder
    _fields_ = [
        ("groups", _Group * len(MEMBERS)),
        ("outs", _INT * _LAYERS),
        ("factors", ctypes.c_float * _LAYERS),
        ("eps", ctypes.c_float * 2),
        ("batch", _INT),
        ("length", _INT),
        ("kv", _INT),
        ("group", _INT),
        ("d", _INT),
        ("table_stride", _INT),
        ("scaling", ctypes.c_float),
        ("team", _INT),
    ]


class Group(NamedTuple):
    """What melded layers with one input, as `products.takes` allows them, have in common.

    Attributes:
        inputs: features of the input.
        rank: r.
        quantised: inputs and gradients are, to E4M3 and E5M2, with one scale a row.
        pending: changes act, `O + O_A B^T`.
    """

    inputs: int
    rank: int
    quantised: bool
    pending: bool


class Shape(NamedTuple):
    """What a decoder layer is made of, but for its tensors.

    Attributes:
        groups: as in `MEMBERS`.
        outs, factors: of each layer, its output features and the factor of its B.
        eps: what the norms before q/k/v and gate/up add to the mean square.
        batch, length: b and s.
        heads, kv: numbers of heads of queries and of keys.
        d: values in a head.
        scaling: of the scores.
    """

    groups: tuple[Group, ...]
    outs: tuple[int, ...]
    factors: tuple[float, ...]
    eps: tuple[float, float]
    batch: int
    length: int
    heads: int
    kv: int
    d: int
    scaling: float


class _Prepared(NamedTuple):
    given: ctypes._CArgObject  # _Decoder
    decoder: _Decoder  # which that refers to
    memory: int
    work: int
    work_back: int
    proxies: list[tuple[int, int]]  # [out, r] of each layer


@lru_cache(maxsize=256)
def _prepared(shape: Shape, table_stride: int, team: int) -> _Prepared:
    given = _Decoder()
    for to, group in zip(given.groups, shape.groups, strict=True):
        to.inputs, to.rank, to.quantised, to.pending = group
    given.outs[:], given.factors[:], given.eps[:] = shape.outs, shape.factors, shape.eps
    given.batch, given.length, given.d = shape.batch, shape.length, shape.d
    given.kv, given.group = shape.kv, shape.heads // shape.kv
    given.scaling, given.table_stride, given.team = shape.scaling, table_stride, team
    sizes = [_INT() for _ in range(3)]
    ops.call("decoder_sizes", ctypes.byref(given), *map(ctypes.byref, sizes))
    ranks = [group.rank for group, n in zip(shape.groups, MEMBERS, strict=True) for _ in range(n)]
    proxies = list(zip(shape.outs, ranks, strict=True))
    memory, work, work_back = (size.value for size in sizes)
    return _Prepared(ctypes.byref(given), given, memory, work, work_back, proxies)


def _given(shape: Shape, tensors: Sequence[Tensor | None]) -> tuple[_Prepared, object]:
    assert tensors[0] is not None
    prepared = _prepared(shape, ops.table_stride(tensors[0]), torch.get_num_threads())
    return prepared, _Tensors(*[None if t is None else t.data_ptr() for t in tensors])


def forward(
    shape: Shape, tensors: Sequence[Tensor | None], x: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The layer's output.

    Args:
        shape: what the layer is made of.
        tensors: all contiguous. Cosines and sines of the rotation, [b or 1, s, d]; weights of the
            norms, [n] each; int32 [b, s] twice: query i sees keys from the first up to, and
            without, the second; then for each layer codes, uint8 [out + r, in]; scales, float32
            [1], powers of two; B, float32 [out, r], or None where no change acts; and biases,
            [out] or None.
        x: its input, [b, s, n], contiguous.

    Returns:
        [b, s, n]; and what `backward` needs: outputs of gate and up, [T, m], and the rest.
    """
    prepared, places = _given(shape, tensors)
    inner = shape.groups[-1].inputs
    tokens = shape.batch * shape.length
    # Not one tensor: what is larger than 32 MiB the allocator gives back, and has to map again.
    kept = [x.new_empty(tokens, inner), x.new_empty(tokens, inner), x.new_empty(prepared.memory)]
    out = torch.empty_like(x)
    pointers = map(ops.at, (x, out, *kept, products.memory(prepared.work)))
    ops.call("decoder", prepared.given, places, *pointers)
    return out, kept


def backward(
    shape: Shape,
    tensors: Sequence[Tensor | None],
    grad: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    want_input: bool,
    want_proxies: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the input and of the B_i, times their factors.

    Args:
        shape, tensors: as in `forward`.
        grad: of the output, [b, s, n], contiguous.
        x, kept: the input, and what `forward` gave besides.
        want_input, want_proxies: which of the results to make.

    Returns:
        [b, s, n] or None; float32 [out_i, r] or None for each layer.
    """
    prepared, places = _given(shape, tensors)
    of_input = torch.empty_like(x) if want_input else None
    of_proxies = [
        x.new_empty(size, dtype=torch.float32) if want else None
        for size, want in zip(prepared.proxies, want_proxies, strict=True)
    ]
    results = _Results(*[None if t is None else t.data_ptr() for t in of_proxies])
    pointers = map(ops.at, (grad, x, *kept))
    to = None if of_input is None else ops.at(of_input)
    room = ops.at(products.memory(prepared.work_back))
    ops.call("decoder_grad", prepared.given, places, *pointers, to, results, room)
    return of_input, of_proxies

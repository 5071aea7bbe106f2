"""A decoder layer of the Llama family by AMX, in one native call a direction.

What its modules do, in their order and with their roundings, so with their bits. What a layer has
by the way is in memory that all layers use; what its backward pass needs is in three tensors.

Shapes: b rows of s tokens, T = b s, n features, m between gate/up and down, d values in a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from falqon.kernels.native import amx, ops

_INT = ctypes.c_int64
_POINTER = ctypes.c_void_p
_MOST = 3  # layers of a group


class _Group(ctypes.Structure):  # FalqonGroup of amx_decoder.cpp
    _fields_ = [
        ("layers", _INT),
        ("inputs", _INT),
        ("rank", _INT),
        ("quantised", _INT),
        ("outs", _INT * _MOST),
        ("codes", _POINTER * _MOST),
        ("scales", _POINTER * _MOST),
        ("proxies", _POINTER * _MOST),
        ("biases", _POINTER * _MOST),
        ("factors", ctypes.c_float * _MOST),
    ]


class _Decoder(ctypes.Structure):  # FalqonDecoder
    _fields_ = [
        ("groups", _Group * 4),
        ("norms", _POINTER * 2),
        ("eps", ctypes.c_float * 2),
        ("batch", _INT),
        ("length", _INT),
        ("kv", _INT),
        ("group", _INT),
        ("d", _INT),
        ("cos", _POINTER),
        ("sin", _POINTER),
        ("table_stride", _INT),
        ("first", _POINTER),
        ("last", _POINTER),
        ("scaling", ctypes.c_float),
        ("team", _INT),
    ]


class Group(NamedTuple):
    """Melded layers with one input, as `amx.takes` allows them.

    Attributes:
        codes: uint8 [out_i + r, in], contiguous.
        scales: float32 [1] each, powers of two.
        proxies: B_i, float32 [out_i, r], contiguous; none if nothing pending acts.
        biases: [out_i] or None each.
        factors: of the B_i.
        rank: r.
        quantised: inputs and gradients are, to E4M3 and E5M2, with one scale a row.
    """

    codes: Sequence[Tensor]
    scales: Sequence[Tensor]
    proxies: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    factors: Sequence[float]
    rank: int
    quantised: bool


class Plan(NamedTuple):
    """What a decoder layer is made of.

    Attributes:
        groups: q/k/v, o, gate/up, down.
        norms: weights of the norms before q/k/v and gate/up, [n].
        eps: what they add to the mean square.
        heads, kv: numbers of heads of queries and of keys.
        cos, sin: of the rotation, [b or 1, s, d], contiguous.
        first, last: int32 [b, s]: query i sees keys first[i] up to, and without, last[i].
        scaling: of the scores.
    """

    groups: Sequence[Group]
    norms: Sequence[Tensor]
    eps: Sequence[float]
    heads: int
    kv: int
    cos: Tensor
    sin: Tensor
    first: Tensor
    last: Tensor
    scaling: float

    def _given(self) -> _Decoder:
        given = _Decoder()
        for to, group in zip(given.groups, self.groups, strict=True):
            to.layers, to.rank, to.quantised = len(group.codes), group.rank, group.quantised
            to.inputs = group.codes[0].shape[1]
            for i, codes in enumerate(group.codes):
                to.outs[i] = codes.shape[0] - group.rank
                to.codes[i] = codes.data_ptr()
                to.scales[i] = group.scales[i].data_ptr()
                to.factors[i] = group.factors[i]
                bias = group.biases[i]
                if bias is not None:
                    to.biases[i] = bias.data_ptr()
            for i, proxy in enumerate(group.proxies):
                to.proxies[i] = proxy.data_ptr()
        for i, (norm, eps) in enumerate(zip(self.norms, self.eps, strict=True)):
            given.norms[i], given.eps[i] = norm.data_ptr(), eps
        given.batch, given.length = self.first.shape
        given.kv, given.group, given.d = self.kv, self.heads // self.kv, self.cos.shape[-1]
        given.cos, given.sin = self.cos.data_ptr(), self.sin.data_ptr()
        given.table_stride = ops.table_stride(self.cos)
        given.first, given.last = self.first.data_ptr(), self.last.data_ptr()
        given.scaling, given.team = self.scaling, torch.get_num_threads()
        return given

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The layer's output.

        Args:
            x: its input, [b, s, n], contiguous.

        Returns:
            [b, s, n]; and what `backward` needs: outputs of gate and up, [T, m], and the rest.
        """
        given = self._given()
        memory, work, _ = _sizes(given)
        inner = self.groups[3].codes[0].shape[1]
        tokens = x.shape[0] * x.shape[1]
        kept = [x.new_empty(tokens, inner), x.new_empty(tokens, inner), x.new_empty(memory)]
        out = torch.empty_like(x)
        room = amx.memory(work)
        ops.call("amx_decoder", ctypes.byref(given), *map(ops.at, (x, out, *kept, room)))
        return out, kept

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        kept: Sequence[Tensor],
        want_input: bool,
        want_proxies: Sequence[bool],
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """Gradients of the input and of the B_i, times their factors.

        Args:
            grad: of the output, [b, s, n], contiguous.
            x, kept: the input, and what `forward` gave besides.
            want_input, want_proxies: which of the results to make.

        Returns:
            [b, s, n] or None; float32 [out_i, r] or None for each layer of each group.
        """
        given = self._given()
        of_input = torch.empty_like(x) if want_input else None
        of_proxies: list[Tensor | None] = []
        places = (_POINTER * (len(self.groups) * _MOST))()
        for i, group in enumerate(self.groups):
            for j, codes in enumerate(group.codes):
                made = None
                if want_proxies[len(of_proxies)]:
                    size = (codes.shape[0] - group.rank, group.rank)
                    made = x.new_empty(size, dtype=torch.float32)
                    places[i * _MOST + j] = made.data_ptr()
                of_proxies.append(made)
        room = amx.memory(_sizes(given)[2])
        to = None if of_input is None else ops.at(of_input)
        pointers = map(ops.at, (grad, x, *kept))
        ops.call("amx_decoder_grad", ctypes.byref(given), *pointers, to, places, ops.at(room))
        return of_input, of_proxies


def _sizes(given: _Decoder) -> list[int]:
    sizes = [_INT() for _ in range(3)]
    ops.call("amx_decoder_sizes", ctypes.byref(given), *map(ctypes.byref, sizes))
    return [size.value for size in sizes]

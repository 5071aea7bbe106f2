"""Forward matmul of melded layers: one GEMM gives backbone and adapter outputs (paper Alg. 2).

Layers with one input, a group, share it; a single layer is a group of one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3
from falqon.kernels import devices
from falqon.kernels.operands import compute_dtype, operand, rescaled, stacked
from falqon.kernels.pending import pending_outputs
from falqon.kernels.scaled_matmul import ADAPTER, MEMBERS, Segment, scaled_matmul
from falqon.kernels.wide import product


def melded_matmul(
    x: Tensor,
    x_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rank: int,
    dtype: torch.dtype,
    power_of_two: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """`[O_i | O_A_i] = x M_i^T / (s_x s_i)` for every layer i, plus the biases on O_i.

    With power-of-two scales that of `x` is applied to `x`, where it is exact in bfloat16, and those
    of the layers to their part of the product, where they are exact too; others to the product
    together, which a bfloat16 matmul has rounded once by then. So a layer's results are those that
    it has alone, to the last bit, wherever the GEMM adds up in the same order.

    Args:
        x: E4M3 codes uint8 [T, in] (or values, in a recipe that does not round them; scale 1).
        x_scale: float32 [1] or [T, 1].
        codes: merged weights M_i, uint8 [out_i + r, in] (or float32): backbone rows, then rows of
            A. No copy is made of them where they lie one behind the other in memory.
        scales: float32 [1] each.
        biases: [out_i] or None each.
        rank: r, the number of rows of A in each.
        dtype: of the results.
        power_of_two: all scales are powers of two (a faster exact path).

    Returns:
        O_i [T, out_i] and O_A_i [T, r], contiguous tensors of their own: keeping O_A_i keeps
        nothing else.
    """
    left = _input(x, x_scale, codes, dtype, power_of_two)
    both = product(left, operand(stacked(codes), E4M3, left.dtype).t())
    outs, adapters, start = [], [], 0
    for merged, scale, bias in zip(codes, scales, biases, strict=True):
        end = start + merged.shape[0]
        unit = _unit(merged, x_scale, scale, power_of_two)
        out = _part(both[:, start : end - rank], unit, dtype, power_of_two)
        outs.append(out if bias is None else out.add_(bias.to(dtype)))
        adapters.append(_part(both[:, end - rank : end], unit, dtype, power_of_two))
        start = end
    return outs, adapters


def adapter_matmul(
    x: Tensor,
    x_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    rank: int,
    dtype: torch.dtype,
    power_of_two: bool = False,
) -> list[Tensor]:
    """The O_A_i of `melded_matmul` alone; arguments as there."""
    left = _input(x, x_scale, codes, dtype, power_of_two)
    adapters = []
    for merged, scale in zip(codes, scales, strict=True):
        right = operand(merged[merged.shape[0] - rank :], E4M3, left.dtype)
        unit = _unit(merged, x_scale, scale, power_of_two)
        adapters.append(_part(product(left, right.t()), unit, dtype, power_of_two))
    return adapters


def backbone_outputs(
    x: Tensor,
    x_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rank: int,
    dtype: torch.dtype,
    power_of_two: bool,
    onto: Sequence[Tensor],
) -> list[Tensor]:
    """The O_i of `melded_matmul` alone, added to something, each sum rounded once.

    Args:
        x, x_scale, codes, scales, biases, rank, dtype, power_of_two: as there.
        onto: [T, out_i] each of `dtype`, used up.
    """
    left = _input(x, x_scale, codes, dtype, power_of_two)
    outs = []
    for merged, scale, bias, start in zip(codes, scales, biases, onto, strict=True):
        right = operand(merged[: merged.shape[0] - rank], E4M3, left.dtype)
        unit = _unit(merged, x_scale, scale, power_of_two)
        begin = start if unit is None else start * unit  # exact for powers of two
        both = product(left, right.t(), begin.to(left.dtype))
        out = _part(both, unit, dtype, power_of_two)
        outs.append(out if bias is None else out.add_(bias.to(dtype)))
    return outs


def _input(
    x: Tensor, x_scale: Tensor, codes: Sequence[Tensor], dtype: torch.dtype, power_of_two: bool
) -> Tensor:
    """Values of `x`, with their scale where that is exact."""
    left = operand(x, E4M3, compute_dtype(dtype))
    if x.dtype == torch.uint8 and codes[0].dtype == torch.uint8 and power_of_two:
        left = left.mul_((1.0 / x_scale).to(left.dtype))
    return left


def _unit(merged: Tensor, x_scale: Tensor, scale: Tensor, power_of_two: bool) -> Tensor | None:
    """What a product of decoded values has to be divided by; None if by nothing."""
    if merged.dtype != torch.uint8:
        return None
    return scale if power_of_two else x_scale * scale


def _part(part: Tensor, unit: Tensor | None, dtype: torch.dtype, power_of_two: bool) -> Tensor:
    if unit is None:
        return part.to(dtype).clone(memory_format=torch.contiguous_format)
    return rescaled(part, unit, dtype, power_of_two)


@torch.library.custom_op("falqon::melded_matmul", mutates_args=())
def melded_matmul_gpu(
    x: Tensor,
    x_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rank: int,
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    """`melded_matmul` on a GPU, of at most three layers.

    Returns:
        O_i [T, out_i], tensors of their own, and all O_A_i side by side, [T, r for each layer].
    """
    weights, scale, bias = _joined(codes, scales, biases, rank, dtype)
    segments = _segments(codes, rank, outs=True, adapters=True)
    return scaled_matmul(x, x_scale, "e4m3", weights, scale, segments, dtype, bias, rank=rank)


@torch.library.custom_op("falqon::adapter_matmul", mutates_args=())
def adapter_matmul_gpu(
    x: Tensor,
    x_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    rank: int,
    dtype: torch.dtype,
) -> Tensor:
    """`adapter_matmul` on a GPU, of at most three layers: O_A_i side by side."""
    weights, scale, _ = _joined(codes, scales, [None] * len(codes), rank, dtype)
    segments = _segments(codes, rank, outs=False, adapters=True)
    return scaled_matmul(x, x_scale, "e4m3", weights, scale, segments, dtype, rank=rank)[1]


@torch.library.custom_op("falqon::backbone_outputs", mutates_args={"onto"})
def backbone_outputs_gpu(
    x: Tensor,
    x_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rank: int,
    dtype: torch.dtype,
    onto: Sequence[Tensor],
) -> None:
    """`backbone_outputs` on a GPU, of at most three layers, in the memory of `onto`."""
    weights, scale, bias = _joined(codes, scales, biases, rank, dtype)
    segments = _segments(codes, rank, outs=True, adapters=False)
    scaled_matmul(x, x_scale, "e4m3", weights, scale, segments, dtype, bias, rank=rank, onto=onto)


def _segments(
    codes: Sequence[Tensor], rank: int, outs: bool, adapters: bool
) -> tuple[Segment, ...]:
    """Of which rows of stacked weights the results are; two a layer, empty where not wanted."""
    segments, row = [], 0
    for number, merged in enumerate(codes):
        out = merged.shape[0] - rank
        segments.append((row, out if outs else 0, 0, number))
        segments.append((row + out, rank if adapters else 0, number * rank, ADAPTER))
        row += out + rank
    return tuple(segments)


def _joined(
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rank: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights, scales and biases of a group, each in one tensor."""
    bias = None
    if any(b is not None for b in biases):
        given = zip(codes, biases, strict=True)
        parts = [scales[0].new_zeros(len(m) - rank) if b is None else b for m, b in given]
        bias = torch.cat([part.to(dtype) for part in parts])
    return stacked(codes), scales[0] if len(scales) == 1 else torch.cat(list(scales)), bias


@adapter_matmul_gpu.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    rank: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty(x.shape[0], rank * len(codes), dtype=dtype)


@melded_matmul_gpu.register_fake
def _(
    x: Tensor,
    x_scale: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    rank: int,
    dtype: torch.dtype,
) -> tuple[list[Tensor], Tensor]:
    outs = [x.new_empty(x.shape[0], merged.shape[0] - rank, dtype=dtype) for merged in codes]
    return outs, x.new_empty(x.shape[0], rank * len(codes), dtype=dtype)


class MeldedMatmul(nn.Module):
    """`melded_matmul` as a module.

    Args:
        rank: r, the number of rows of A under each backbone.
        power_of_two: all scales are powers of two.
    """

    def __init__(self, rank: int, power_of_two: bool = False) -> None:
        super().__init__()
        self.rank, self.power_of_two = rank, power_of_two

    def forward(
        self,
        x: Tensor,
        x_scale: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
        proxies: Sequence[Tensor] = (),
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `melded_matmul`; on a GPU the O_A_i are views of one tensor.

        Args:
            x, x_scale, codes, scales, biases, dtype: as there.
            proxies: B_i, times the LoRA scaling, float32 [out_i, r], of changes that act:
                `O_A_i B_i^T` is in O_i, which is rounded once. None or one a layer.
        """
        given = (x, x_scale, codes, scales)
        if proxies:
            adapters = self.adapters(*given, dtype)
            onto = [pending_outputs(a, proxy) for a, proxy in zip(adapters, proxies, strict=True)]
            return self._onto(onto, *given, biases, dtype), adapters
        if not _runs_kernels(x):
            return melded_matmul(*given, biases, self.rank, dtype, self.power_of_two)
        outs: list[Tensor] = []
        adapters = []
        for some in _portions(codes):
            part, adapter = melded_matmul_gpu(
                x, x_scale, codes[some], scales[some], biases[some], self.rank, dtype
            )
            outs += part
            adapters += adapter.split(self.rank, dim=1)
        return outs, adapters

    def adapters(
        self,
        x: Tensor,
        x_scale: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        """See `adapter_matmul`; on a GPU views of one tensor."""
        if not _runs_kernels(x):
            return adapter_matmul(x, x_scale, codes, scales, self.rank, dtype, self.power_of_two)
        return [
            part
            for some in _portions(codes)
            for part in adapter_matmul_gpu(
                x, x_scale, codes[some], scales[some], self.rank, dtype
            ).split(self.rank, dim=1)
        ]

    def _onto(
        self,
        onto: list[Tensor],
        x: Tensor,
        x_scale: Tensor,
        codes: Sequence[Tensor],
        scales: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> list[Tensor]:
        if not _runs_kernels(x):
            kind = (self.rank, dtype, self.power_of_two)
            return backbone_outputs(x, x_scale, codes, scales, biases, *kind, onto)
        for some in _portions(codes):
            given = (codes[some], scales[some], biases[some])
            backbone_outputs_gpu(x, x_scale, *given, self.rank, dtype, onto[some])
        return onto

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return f"rank={self.rank}, power_of_two={self.power_of_two}"


def _runs_kernels(x: Tensor) -> bool:
    return devices.uses_kernels(x) and x.dtype == torch.uint8


def _portions(codes: Sequence[Tensor]) -> list[slice]:
    """As many layers as a kernel takes at a time."""
    return [slice(at, at + MEMBERS) for at in range(0, len(codes), MEMBERS)]

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
from falqon.kernels.scaled_matmul import ADAPTER, MEMBERS, scaled_matmul


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
        x: E4M3 codes uint8 [T, in] (or values, in a recipe without FP8 rounding).
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
    compute = compute_dtype(dtype)
    is_rounded = codes[0].dtype == torch.uint8
    left, right = operand(x, E4M3, compute), operand(stacked(codes), E4M3, compute).t()
    if is_rounded and power_of_two:
        left = left.mul_((1.0 / x_scale).to(compute))
    both = left @ right

    def part(start: int, end: int, scale: Tensor) -> Tensor:
        if not is_rounded:
            return both[:, start:end].to(dtype).clone(memory_format=torch.contiguous_format)
        scale = scale if power_of_two else x_scale * scale
        return rescaled(both[:, start:end], scale, dtype, power_of_two)

    outs, adapters, start = [], [], 0
    for merged, scale, bias in zip(codes, scales, biases, strict=True):
        end = start + merged.shape[0]
        out = part(start, end - rank, scale)
        outs.append(out if bias is None else out.add_(bias.to(dtype)))
        adapters.append(part(end - rank, end, scale))
        start = end
    return outs, adapters


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
    segments, row = [], 0
    for number, merged in enumerate(codes):
        out = merged.shape[0] - rank
        segments += [(row, out, 0, number), (row + out, rank, number * rank, ADAPTER)]
        row += out + rank
    bias = None
    if any(b is not None for b in biases):
        given = zip(codes, biases, strict=True)
        parts = [x_scale.new_zeros(len(m) - rank) if b is None else b for m, b in given]
        bias = torch.cat([part.to(dtype) for part in parts])
    scale = scales[0] if len(scales) == 1 else torch.cat(list(scales))
    return scaled_matmul(
        x, x_scale, "e4m3", stacked(codes), scale, tuple(segments), dtype, bias, rank=rank
    )


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
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See `melded_matmul`; on a GPU the O_A_i are views of one tensor."""
        if devices.uses_kernels(x) and x.dtype == torch.uint8:
            outs: list[Tensor] = []
            adapters: list[Tensor] = []
            for at in range(0, len(codes), MEMBERS):
                some = slice(at, at + MEMBERS)
                given = (codes[some], scales[some], biases[some])
                part, adapter = melded_matmul_gpu(x, x_scale, *given, self.rank, dtype)
                outs += part
                adapters += adapter.split(self.rank, dim=1)
            return outs, adapters
        return melded_matmul(x, x_scale, codes, scales, biases, self.rank, dtype, self.power_of_two)

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        return f"rank={self.rank}, power_of_two={self.power_of_two}"

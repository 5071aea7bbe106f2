"""The quantiser of IR-QLoRA (arXiv:2402.05445, sec. 3.2): NF4 shifted for the highest entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from falqon.errors import InputError
from falqon.fp8 import E4M3, dequantize, quantize
from lit_modules.methods.packing import look_up, pack4, pair_table
from lit_modules.methods.quantised import QuantisedLinear, frozen

BLOCK = 64
SUPERBLOCK = 256
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
"""Values of the 16 codes (QLoRA, arXiv:2305.14314, appendix E)."""


def thresholds(like: Tensor) -> Tensor:
    """Middles between neighbouring NF4 values, [15]."""
    values = torch.tensor(NF4, dtype=like.dtype, device=like.device)
    return (values[1:] + values[:-1]) / 2


def entropy(blocks: Tensor, shift: Tensor) -> Tensor:
    """Entropy in bits of the NF4 codes that each block gets with a shift (paper's eq. 6).

    Args:
        blocks: float32 [n, 64], each sorted.
        shift: float32 [n, 1].

    Returns:
        float32 [n].
    """
    moved = blocks - shift
    moved /= moved.abs().amax(1, keepdim=True).clamp(min=1e-30)
    at = thresholds(moved).expand(len(moved), -1).contiguous()
    below = torch.searchsorted(moved, at, right=True)  # sorted, so one look for each threshold
    counts = below.diff(
        dim=1, prepend=below.new_zeros(len(below), 1), append=below.new_full((len(below), 1), BLOCK)
    )
    shares = torch.arange(BLOCK + 1, dtype=torch.float32, device=blocks.device) / BLOCK
    return -(torch.special.xlogy(shares, shares) / math.log(2))[counts].sum(1)


def best_shift(blocks: Tensor, width: float, count: int) -> Tensor:
    """The shift of each block with the highest entropy of codes (ICQ, eq. 7), float32 [n, 1].

    Candidates are `median + width * std * k / count`, k from -count to count; the first wins.
    """
    blocks = blocks.sort(dim=1).values
    middle = blocks[:, (BLOCK - 1) // 2, None]  # torch's median: the lower of the two in the middle
    step = blocks.std(dim=1, keepdim=True) * (width / count)
    best, most = middle.clone(), torch.full_like(middle, -1.0)
    for k in range(-count, count + 1):
        shift = middle + step * k
        bits = entropy(blocks, shift)[:, None]
        best = torch.where(bits > most, shift, best)
        most = torch.maximum(most, bits)
    return best


def double_quantise(values: Tensor) -> tuple[Tensor, Tensor]:
    """Constants of blocks as E4M3 with a float32 scale for each 256 of them (eq. 8).

    Args:
        values: float32 [n].

    Returns:
        codes uint8 [ceil(n / 256), 256], scale float32 [ceil(n / 256), 1].
    """
    padded = functional.pad(values, (0, -len(values) % SUPERBLOCK))
    return quantize(padded.view(-1, SUPERBLOCK), E4M3, "per_token", "none")


class IcqLinear(QuantisedLinear):
    """`W = s NF4[q] + tau`: NF4 in blocks of 64, shifted so that the codes' entropy is highest.

    `q` are the codes nearest to `(W - tau) / s`, `s = amax(W - tau)` (ICQ, eq. 5-7). Then the
    constants are stored in 8 bits (eq. 8), s less its mean as in QLoRA. Codes taken with the
    stored constants would be a little nearer to the weights, and lose what the search has found.

    Args:
        linear: the layer to be replaced.
        width: reach of the search for tau, in standard deviations of the block (lambda).
        candidates: on each side of the median (n).
        name: of the layer, for errors.

    Attributes:
        codes: uint8 [out * in / 2], two codes a byte.
        tau, tau_scale, absmax, absmax_scale: of `double_quantise`.
        mean: float32 [1], of the blocks' amax.
    """

    def __init__(self, linear: nn.Linear, width: float, candidates: int, name: str) -> None:
        super().__init__(linear)
        weight = linear.weight.detach().float()
        if weight.numel() % BLOCK:
            raise InputError(
                f"{name} has {weight.numel()} weights, which blocks of {BLOCK} do not divide: "
                "choose another model or method."
            )
        blocks = weight.reshape(-1, BLOCK)
        tau = (
            best_shift(blocks, width, candidates) if candidates else torch.zeros_like(blocks[:, :1])
        )
        moved = blocks - tau
        absmax = moved.abs().amax(1, keepdim=True)
        codes = torch.bucketize(moved / absmax.clamp(min=1e-30), thresholds(moved))
        self.codes = frozen(pack4(codes.to(torch.uint8)).flatten())
        self.tau, self.tau_scale = map(frozen, double_quantise(tau[:, 0]))
        self.mean = frozen(absmax.mean().reshape(1))
        self.absmax, self.absmax_scale = map(frozen, double_quantise(absmax[:, 0] - self.mean))
        table = pair_table(torch.tensor(NF4, device=weight.device))
        self.register_buffer("table", table, persistent=False)

    def _constants(self, codes: Tensor, scale: Tensor) -> Tensor:
        count = self.out_features * self.in_features // BLOCK
        return dequantize(codes, scale, E4M3).flatten()[:count, None]

    def _scales(self) -> Tensor:
        return self._constants(self.absmax, self.absmax_scale) + self.mean

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """`s NF4[q] + tau`, float32 arithmetic."""
        values = look_up(self.get_buffer("table"), self.codes).view(-1, BLOCK)
        values = values.mul_(self._scales()).add_(self._constants(self.tau, self.tau_scale))
        return values.view(self.out_features, self.in_features).to(dtype)

"""QA-LoRA: INT4 weights and an adapter that merges into their zero points (arXiv:2309.14717)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from falqon.errors import InputError
from lit_modules.methods.packing import pack4, unpack4
from lit_modules.methods.quantised import LoraLinear, LoraOnFrozen, QuantisedLinear, frozen

Pooling = Literal["sum", "mean"]
LEVELS = 15  # 2^N - 1 for N = 4 bits


def groups_of(weight: Tensor, size: int, name: str) -> Tensor:
    """[out, in] as float32 [out, in / size, size].

    Raises:
        InputError: if the input features are no multiple of `size`.
    """
    if size < 2 or size % 2 or weight.shape[1] % size:
        raise InputError(
            f"method.group_size {size} does not fit {name}, which has {weight.shape[1]} input "
            "features: give an even divisor of them."
        )
    return weight.detach().float().unflatten(1, (-1, size))


class Int4Linear(QuantisedLinear):
    """`W = alpha (q - z)` with codes q of 4 bits, a scale alpha and a zero point z a group.

    Min-max quantisation of the paper's eq. 1: `alpha = (max W - min W) / 15`, `beta = min W`,
    `q = round((W - beta) / alpha)`, written with `z = -beta / alpha`.

    Args:
        linear: the layer to be replaced.
        group_size: input features of a group.
        name: of the layer, for errors.

    Attributes:
        codes: uint8 [out, in / 2], two codes a byte.
        scale: float32 [out, groups].
        zero: float32 [out, groups]. Not whole numbers: that is what takes up the adapter.
    """

    def __init__(self, linear: nn.Linear, group_size: int, name: str) -> None:
        super().__init__(linear)
        self.group_size = group_size
        groups = groups_of(linear.weight, group_size, name)
        low, high = groups.amin(-1), groups.amax(-1)
        # A group of equal values is all zero point; any scale that is not 0 keeps it.
        scale = (high - low) / LEVELS
        scale = torch.where(scale > 0, scale, torch.where(low != 0, low.abs(), 1.0))
        codes = ((groups - low[..., None]) / scale[..., None]).round_().clamp_(0, LEVELS)
        self.codes = frozen(pack4(codes.to(torch.uint8).flatten(1)))
        self.scale, self.zero = frozen(scale), frozen(-low / scale)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """`alpha (q - z)`, float32 arithmetic."""
        codes = unpack4(self.codes).unflatten(1, (-1, self.group_size)).float()
        return (codes - self.zero[..., None]).mul_(self.scale[..., None]).flatten(1).to(dtype)


class PooledLora(LoraLinear):
    """`base(x) + alpha / r * B A pool(x)`: A sees one number a group (paper sec. 3.3, Alg. 1)."""

    def __init__(self, base: Int4Linear, rank: int, alpha: float, pooling: Pooling) -> None:
        super().__init__(base, rank, alpha, base.in_features // base.group_size)
        self.pooling = pooling

    def adapter(self, x: Tensor) -> Tensor:
        """B A of the groups' sums (or means)."""
        groups = x.unflatten(-1, (-1, self.base.group_size))
        return super().adapter(groups.sum(-1) if self.pooling == "sum" else groups.mean(-1))

    def group_delta(self) -> Tensor:
        """What the adapter adds to every weight of a group, float32 [out, groups]."""
        delta = super().delta()
        return delta if self.pooling == "sum" else delta / self.base.group_size

    def delta(self) -> Tensor:
        """The same for each weight, float32 [out, in]."""
        return self.group_delta().repeat_interleave(self.base.group_size, dim=1)

    def merged(self) -> nn.Module:
        """The INT4 layer with other zero points: `z' = z - delta / alpha` (paper's eq. 5)."""
        self.base.zero = frozen(self.base.zero - self.group_delta() / self.base.scale)
        return self.base


class QALoRA(LoraOnFrozen):
    """INT4 min-max weights in groups, LoRA whose A takes the input pooled over each group.

    What B A adds is then the same for all weights of a group, so merging adds it to the group's
    zero point: the merged model is INT4 again, with the same codes and scales, and computes what
    was trained. `QLoRA` has to round once more.

    Args:
        rank: r.
        alpha: The product B A is multiplied by alpha / r.
        group_size: input features of a group.
        pooling: `sum` is the paper's Alg. 1, `mean` what its released code does; they differ in the
            learning rate that A wants.

    Raises:
        InputError: for a value out of range.
    """

    name = "qa_lora"

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 16.0,
        group_size: int = 32,
        pooling: Pooling = "mean",
    ) -> None:
        super().__init__(rank, alpha)
        if pooling not in get_args(Pooling):
            raise InputError(f"pooling is {pooling!r}; choose sum or mean.")
        self.group_size, self.pooling = group_size, pooling

    def convert(self, name: str, linear: nn.Linear) -> Int4Linear:
        """INT4 with scale and zero point a group."""
        return Int4Linear(linear, self.group_size, name)

    def adapt(self, base: nn.Module) -> PooledLora:
        """The pooled adapter."""
        assert isinstance(base, Int4Linear)
        return PooledLora(base, self.rank, self.alpha, self.pooling)

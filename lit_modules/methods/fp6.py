"""FP6 weights, 16-bit activations (FP6-LLM, arXiv:2401.14112), with LoRA."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from falqon.errors import InputError
from lit_modules.methods.libraries import torchao
from lit_modules.methods.packing import look_up, pack6, pair_table, pairs6
from lit_modules.methods.quantised import LoraOnFrozen, QuantisedLinear, frozen

Format6 = Literal["e3m2", "e2m3"]
LARGEST = {"e3m2": 28.0, "e2m3": 7.5}


class Fp6Linear(QuantisedLinear):
    """`W = q s` with q in a 6-bit float and one scale an output channel (FP6-LLM sec. 2.3).

    `s = amax(row) / max(format)`; the format has no infinity and no NaN. Rounded to nearest even by
    torchao.

    Args:
        linear: the layer to be replaced.
        fmt: `e3m2` (3 exponent and 2 mantissa bits) or `e2m3`.
        name: of the layer, for errors.

    Attributes:
        codes: uint8 [out, 3 in / 4], four codes in three bytes.
        scale: float32 [out, 1].
    """

    def __init__(self, linear: nn.Linear, fmt: Format6, name: str) -> None:
        super().__init__(linear)
        if self.in_features % 4:
            raise InputError(
                f"{name} has {self.in_features} input features; FP6 packs them by 4: "
                "choose another method for this model."
            )
        kernels = torchao("prototype.mx_formats.kernels")
        weight = linear.weight.detach().float()
        amax = weight.abs().amax(1, keepdim=True)
        scale = torch.where(amax > 0, amax / LARGEST[fmt], 1.0)
        codes = getattr(kernels, f"f32_to_f6_{fmt}_unpacked")((weight / scale).contiguous())
        self.codes, self.scale = frozen(pack6(codes)), frozen(scale)
        values = getattr(kernels, f"f6_{fmt}_unpacked_to_f32")
        table = pair_table(values(torch.arange(64, dtype=torch.uint8))).to(weight.device)
        self.register_buffer("table", table, persistent=False)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Value of the code times scale, float32 arithmetic."""
        values = look_up(self.get_buffer("table"), pairs6(self.codes))
        return values.mul_(self.scale).to(dtype)


class FP6(LoraOnFrozen):
    """Weights in FP6 with a scale an output channel, activations and LoRA in bfloat16.

    FP6-LLM's kernels are for GPUs; here the weights are unpacked before each matmul.

    Args:
        rank: r.
        alpha: The product B A is multiplied by alpha / r.
        fmt: `e3m2` or `e2m3`.

    Raises:
        InputError: for a value out of range, and without torchao.
    """

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 16.0,
        fmt: Format6 = "e3m2",
    ) -> None:
        super().__init__(rank, alpha)
        if fmt not in get_args(Format6):
            raise InputError(f"fmt is {fmt!r}; choose e3m2 or e2m3.")
        torchao("prototype.mx_formats.kernels")
        self.name, self.fmt = f"fp6_{fmt}", fmt

    def convert(self, name: str, linear: nn.Linear) -> Fp6Linear:
        """FP6 with a scale a row."""
        return Fp6Linear(linear, self.fmt, name)

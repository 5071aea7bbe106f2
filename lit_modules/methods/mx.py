"""Block-scaled weights of the OCP Microscaling (MX) specification 1.0, with LoRA."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.fp8 import E4M3, decode
from lit_modules.methods.libraries import torchao
from lit_modules.methods.packing import look_up, pair_table
from lit_modules.methods.quantised import LoraOnFrozen, QuantisedLinear, frozen

MxFormat = Literal["mxfp8", "mxfp4"]
BLOCK = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
ELEMENTS = {"mxfp8": torch.float8_e4m3fn, "mxfp4": torch.float4_e2m1fn_x2}


class MxLinear(QuantisedLinear):
    """`W = q X` with E4M3 or E2M1 elements q and a power of two X for each 32 of a row.

    `X = 2^(floor(log2 amax) - emax)`, emax 8 for E4M3 and 2 for E2M1 (MX spec. sec. 6.3); elements
    are rounded to nearest even and saturate: by torchao. Decoded here, which is faster on a CPU.

    Args:
        linear: the layer to be replaced.
        fmt: `mxfp8` or `mxfp4`.
        name: of the layer, for errors.

    Attributes:
        codes: uint8 [out, in], or [out, in / 2] for mxfp4.
        scale: uint8 [out, in / 32], E8M0: exponents plus 127.
    """

    def __init__(self, linear: nn.Linear, fmt: MxFormat, name: str) -> None:
        super().__init__(linear)
        if self.in_features % BLOCK:
            raise InputError(
                f"{name} has {self.in_features} input features; MX blocks have {BLOCK}: "
                "choose another method for this model."
            )
        weight = linear.weight.detach().float().contiguous()
        to_mx = torchao("prototype.mx_formats.mx_tensor").to_mx
        scale, codes = to_mx(weight, ELEMENTS[fmt], BLOCK)
        self.codes, self.scale = frozen(codes.view(torch.uint8)), frozen(scale.view(torch.uint8))
        self.is_fp4 = fmt == "mxfp4"
        table = pair_table(torch.tensor(E2M1, device=weight.device))
        self.register_buffer("table", table, persistent=False)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """Elements times their blocks' scale; exact in bfloat16 but for its subnormals."""
        if self.is_fp4:
            values = look_up(self.get_buffer("table").to(dtype), self.codes)
        else:
            values = decode(self.codes, E4M3, dtype)
        scale = self.scale.view(torch.float8_e8m0fnu).to(dtype)
        return values.unflatten(1, (-1, BLOCK)).mul_(scale[..., None]).flatten(1)


class MX(LoraOnFrozen):
    """Weights in MXFP8 or MXFP4, activations and LoRA in bfloat16.

    Args:
        rank: r.
        alpha: The product B A is multiplied by alpha / r.
        fmt: `mxfp8` or `mxfp4`.

    Raises:
        InputError: for a value out of range, and without torchao.
    """

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 16.0,
        fmt: MxFormat = "mxfp4",
    ) -> None:
        super().__init__(rank, alpha)
        if fmt not in get_args(MxFormat):
            raise InputError(f"fmt is {fmt!r}; choose mxfp8 or mxfp4.")
        torchao("prototype.mx_formats.mx_tensor")
        self.name, self.fmt = fmt, fmt

    def convert(self, name: str, linear: nn.Linear) -> MxLinear:
        """Elements and a scale a block."""
        return MxLinear(linear, self.fmt, name)

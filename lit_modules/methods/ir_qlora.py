"""IR-QLoRA: NF4 that keeps more information, and adapters with parameter-free paths beside A and B.

Qin et al., arXiv:2402.05445.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from falqon.errors import InputError
from lit_modules.methods.icq import IcqLinear
from lit_modules.methods.quantised import LoraLinear, LoraOnFrozen


class ElasticLora(LoraLinear):
    """LoRA with the information elastic connection (IEC, eq. 11-13).

    `u = A x + beta1 P x`, `y = B u + beta2 E u`. P takes means of neighbouring features, gcd(in, r)
    of them, one after the other until there are r; E does the same from r to out, each value
    repeated for neighbouring outputs, as the paper's code has it. Both betas train, from zero.
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float) -> None:
        super().__init__(base, rank, alpha)
        self.beta1 = nn.Parameter(torch.zeros(1, device=self.A.device))
        self.beta2 = nn.Parameter(torch.zeros(1, device=self.A.device))

    def adapter(self, x: Tensor) -> Tensor:
        """The adapter's term before scaling."""
        u = functional.linear(x, self.A.to(x.dtype)) + self.beta1.to(x.dtype) * self.reduce(x)
        return functional.linear(u, self.B.to(x.dtype)) + self.beta2.to(x.dtype) * self.expand(u)

    def reduce(self, x: Tensor) -> Tensor:
        """P x: [..., in] to [..., r]."""
        rank, inputs = self.A.shape
        means = x.unflatten(-1, (math.gcd(inputs, rank), -1)).mean(-1)
        return torch.cat([means] * (rank // means.shape[-1]), dim=-1)

    def expand(self, u: Tensor) -> Tensor:
        """E u: [..., r] to [..., out]."""
        outputs, rank = self.B.shape
        means = u.unflatten(-1, (math.gcd(outputs, rank), -1)).mean(-1)
        return means.repeat_interleave(outputs // means.shape[-1], dim=-1)

    def delta(self) -> Tensor:
        """`alpha / r (B + beta2 E) (A + beta1 P)`, float32 [out, in]."""
        eye = torch.eye(self.A.shape[1], device=self.A.device)
        return self.adapter(eye).t() * self.scaling


class IRQLoRA(LoraOnFrozen):
    """NF4 with information calibration (ICQ), LoRA with the elastic connection (IEC).

    Settings: weights unpacked to bfloat16 before each matmul; adapters float32, computing in
    bfloat16.

    Args:
        rank: r.
        alpha: The adapter's term is multiplied by alpha / r.
        width: Reach of the search for each block's shift, in standard deviations (lambda).
        candidates: Shifts tried on each side of the block's median (n); the search is done once,
            when the model is prepared. 0 takes plain NF4.

    Raises:
        InputError: for a value out of range.
    """

    name = "ir_qlora"

    def __init__(
        self, rank: int = 64, alpha: float = 16.0, width: float = 0.1, candidates: int = 100
    ) -> None:
        super().__init__(rank, alpha)
        if width <= 0 or candidates < 0:
            raise InputError(
                f"method.width is {width} and method.candidates {candidates}; give a width above 0 "
                "and at least 0 candidates."
            )
        self.width, self.candidates = width, candidates

    def convert(self, name: str, linear: nn.Linear) -> IcqLinear:
        """NF4 with a shift a block."""
        return IcqLinear(linear, self.width, self.candidates, name)

    def adapt(self, base: nn.Module) -> ElasticLora:
        """The adapter with its parameter-free paths."""
        return ElasticLora(base, self.rank, self.alpha)

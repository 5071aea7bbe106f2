"""A layer with a low-rank product beside it, for the methods that peft does not have."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class LowRankLinear(nn.Module):
    """base(x) + scale * B R A x, of which any factor may be trained.

    Args:
        base: The frozen layer, quantised or not.
        A: [r, in].
        B: [out, r].
        scale: Of the product.
        R: [r, r]; the identity if None.
    """

    def __init__(
        self,
        base: nn.Module,
        A: Tensor,
        B: Tensor,
        scale: float = 1.0,
        R: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.R = None if R is None else nn.Parameter(R)
        self.scale = scale
        self.active = A.shape[0]  # rows of A, and columns of B, that take part

    def forward(self, x: Tensor) -> Tensor:
        """y [..., out] for x [..., in]."""
        output: Tensor = self.base(x)
        hidden = functional.linear(x, self.A[: self.active])
        if self.R is not None:
            hidden = functional.linear(hidden, self.R)
        product = functional.linear(hidden, self.B[:, : self.active])
        return output + (self.scale * product).to(output.dtype)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """What the product adds to the weight, float32 [out, in]."""
        A, B = self.A[: self.active].float(), self.B[:, : self.active].float()
        if self.R is not None:
            A = self.R.float() @ A
        return self.scale * (B @ A)

    def extra_repr(self) -> str:
        """Rank and scale."""
        return f"rank={self.A.shape[0]}, active={self.active}, scale={self.scale:g}"

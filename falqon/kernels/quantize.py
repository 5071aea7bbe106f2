"""Quantise an input or a gradient to FP8 (paper eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon.fp8 import Format, amax_of, compute_scale, quantize
from falqon.recipe import Granularity, ScaleRounding


class Quantize(nn.Module):
    """High precision to FP8 codes and their scale, dynamic or with a scale set from outside.

    With `delayed` the scale is the one that `falqon.scaling.DelayedScaling` last set (`None`: none
    yet, computed from the tensor at hand). While training, the module then notes the largest amax
    it has seen and how many values lay beyond the scale; those saturate. (A kernel can do all of it
    in one pass; this reference does not. Activation checkpointing counts overflow twice.)

    Args:
        fmt: target format.
        granularity: one scale for the tensor or one a row.
        scale_rounding: of the scale.
        delayed: use and feed a delayed scale; per-tensor only.
    """

    def __init__(
        self,
        fmt: Format,
        granularity: Granularity = "per_token",
        scale_rounding: ScaleRounding = "power_of_two",
        delayed: bool = False,
    ) -> None:
        super().__init__()
        self.fmt = fmt
        self.granularity: Granularity = granularity
        self.scale_rounding: ScaleRounding = scale_rounding
        self.delayed = delayed
        # Plain attributes: as buffers DDP would send them round and state_dict would list them.
        self.scale: Tensor | None = None
        self.observed_amax: Tensor | None = None
        self.overflowed: Tensor | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Quantise.

        Args:
            x: [T, n], floating.

        Returns:
            codes uint8 [T, n]; scale float32 [1] (`per_tensor`) or [T, 1] (`per_token`).
        """
        if not self.delayed:
            return quantize(x, self.fmt, self.granularity, self.scale_rounding)
        if self.scale is not None and self.scale.device != x.device:
            self.scale = self.scale.to(x.device)
        scale = self.scale
        if self.training or scale is None:
            amax = amax_of(x, "per_tensor")
            if scale is None:
                scale = compute_scale(amax, self.fmt, self.scale_rounding)
            if self.training:
                self._observe(x, amax, scale)
        return quantize(x, self.fmt, "per_tensor", self.scale_rounding, scale)

    def _observe(self, x: Tensor, amax: Tensor, scale: Tensor) -> None:
        # The margin is for scales that are not powers of two: x * scale may round up to the limit.
        count = (x.detach().abs() > self.fmt.max * (1 + 2**-20) / scale).sum()
        if self.observed_amax is None or self.overflowed is None:
            self.observed_amax, self.overflowed = amax, count
        else:
            self.observed_amax = torch.maximum(self.observed_amax, amax)
            self.overflowed = self.overflowed + count

    def extra_repr(self) -> str:
        """What `repr` shows in the brackets."""
        scaling = "delayed" if self.delayed else "dynamic"
        return (
            f"{self.fmt.name}, {self.granularity}, {scaling}, scale_rounding={self.scale_rounding}"
        )


class PassThrough(nn.Module):
    """Stands in for `Quantize` in a recipe without FP8 rounding: the tensor itself and scale 1."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` [T, n] and a float32 scale [1] of one."""
        return x, torch.ones(1, dtype=torch.float32, device=x.device)

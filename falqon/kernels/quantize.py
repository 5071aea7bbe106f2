"""Quantise an input or a gradient to FP8 (paper eq. 3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3, E5M2, Format, amax_of, compute_scale, quantize
from falqon.kernels import devices
from falqon.kernels.native import ops
from falqon.recipe import Granularity, ScaleRounding

FORMATS = {fmt.name: fmt for fmt in (E4M3, E5M2)}


@torch.library.custom_op("falqon::quantize", mutates_args=())
def quantize_gpu(x: Tensor, fmt: str, granularity: str, rounding: str) -> tuple[Tensor, Tensor]:
    """`fp8.quantize` by Triton, with the scale of the tensor at hand.

    Args:
        x: [T, n], floating, any strides.
        fmt: `e4m3` or `e5m2`.
        granularity: `per_token` or `per_tensor`.
        rounding: of the scale, `power_of_two` or `none`.

    Returns:
        codes uint8 [T, n]; scale float32 [T, 1] or [1].
    """
    from falqon.kernels.quantize_triton import quantize_triton

    codes, scale, _ = quantize_triton(x, FORMATS[fmt], granularity, rounding)  # type: ignore[arg-type]
    return codes, scale


@quantize_gpu.register_fake
def _(x: Tensor, fmt: str, granularity: str, rounding: str) -> tuple[Tensor, Tensor]:
    count = (x.shape[0], 1) if granularity == "per_token" else (1,)
    return x.new_empty(x.shape, dtype=torch.uint8), x.new_empty(count, dtype=torch.float32)


@torch.library.custom_op("falqon::quantize_delayed", mutates_args=())
def quantize_delayed_gpu(
    x: Tensor, fmt: str, scale: Tensor, observe: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Cast with a known scale by Triton, in one pass.

    Args:
        x: [T, n], floating, any strides.
        fmt: `e4m3` or `e5m2`.
        scale: float32 [1].
        observe: note the amax and count the values that saturate.

    Returns:
        codes uint8 [T, n]; amax float32 [1] and count int64 [], zero without `observe`.
    """
    from falqon.kernels.quantize_triton import quantize_delayed_triton

    codes, amax, beyond = quantize_delayed_triton(x, FORMATS[fmt], scale, observe)
    if amax is None or beyond is None:
        amax, beyond = scale.new_zeros(1), scale.new_zeros((), dtype=torch.int64)
    return codes, amax, beyond


@quantize_delayed_gpu.register_fake
def _(x: Tensor, fmt: str, scale: Tensor, observe: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes = x.new_empty(x.shape, dtype=torch.uint8)
    return codes, scale.new_empty(1), scale.new_empty((), dtype=torch.int64)


class Quantize(nn.Module):
    """High precision to FP8 codes and their scale, dynamic or with a scale set from outside.

    With `delayed` the scale is the one that `falqon.scaling.DelayedScaling` last set (`None`: none
    yet, computed from the tensor at hand). While training, the module then notes the largest amax
    it has seen and how many values lay beyond the scale; those saturate. On a GPU one pass does all
    of it, without one for the amax first. (Activation checkpointing counts overflow twice.)

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
            return self._dynamic(x)
        if self.scale is not None and self.scale.device != x.device:
            self.scale = self.scale.to(x.device)
        scale = self.scale
        if scale is None:
            scale = compute_scale(amax_of(x, "per_tensor"), self.fmt, self.scale_rounding)
        if devices.uses_kernels(x):
            codes, amax, count = quantize_delayed_gpu(x, self.fmt.name, scale, self.training)
        else:
            codes, _ = quantize(x, self.fmt, "per_tensor", self.scale_rounding, scale)
            if self.training:
                amax = amax_of(x, "per_tensor")
                # The margin is for scales that are not powers of two: x * scale may round up.
                count = (x.detach().abs() > self.fmt.max * (1 + 2**-20) / scale).sum()
        if self.training:
            self._observe(amax, count)
        return codes, scale

    def values(self, x: Tensor) -> tuple[Tensor]:
        """Values of the codes, by the compiled CPU path: E4M3, one scale a token."""
        return (ops.quantized([x], [1.0]),)

    def _dynamic(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if devices.uses_kernels(x):
            scales = quantize_gpu(x, self.fmt.name, self.granularity, self.scale_rounding)
            return scales[0], scales[1]
        return quantize(x, self.fmt, self.granularity, self.scale_rounding)

    def _observe(self, amax: Tensor, count: Tensor) -> None:
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
    """Stands in for `Quantize` in a recipe that does not round: the tensor itself and scale 1."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return `x` [T, n] and a float32 scale [1] of one."""
        return x, torch.ones(1, dtype=torch.float32, device=x.device)

    def values(self, x: Tensor) -> tuple[Tensor]:
        """The tensor itself."""
        return (x,)

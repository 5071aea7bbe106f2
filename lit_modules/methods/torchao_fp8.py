"""torchao's FP8 training (torchao.float8) with LoRA: the paper's baseline, and the better one."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.kernels.devices import has_fp8_units
from lit_modules.methods.layers import plain_linear
from lit_modules.methods.libraries import torchao
from lit_modules.methods.quantised import LoraLinear, LoraOnFrozen, layers_of

Adapters = Literal["fp8", "bf16"]


class Fp8Lora(LoraLinear):
    """Adapter whose two matmuls are torchao's as well: inputs, A, B and gradients in FP8."""

    def adapter(self, x: Tensor) -> Tensor:
        """B A x, each product as `torchao.float8.Float8Linear` computes it."""
        multiply = torchao("float8.float8_linear").matmul_with_hp_or_float8_args.apply
        for weight in (self.A, self.B):
            x = multiply(x, weight.to(x.dtype).t(), self.base.linear_mm_config, self.base.config)
        return x


class TorchaoFP8(LoraOnFrozen):
    """Every linear layer by `torchao.float8.convert_to_float8_training`, with LoRA.

    Weights, inputs (E4M3) and gradients (E5M2) are cast in every step with one dynamic scale a
    tensor. Without FP8 units torchao emulates: it multiplies the rounded values in float32.

    Settings: torchao's default recipe (tensorwise); weights bfloat16, adapters float32, cast to
    bfloat16. torchao computes the gradient of frozen weights too and throws it away.

    Args:
        rank: r.
        alpha: The product B A is multiplied by alpha / r.
        adapters: `fp8` converts the adapters as well, which is what comes of peft first and then
            converting every linear layer, the arrangement of the FALQON paper's baseline; `bf16`
            leaves them in bfloat16, which is faster: they are too thin for FP8 to pay off.

    Raises:
        InputError: for a value out of range, and without torchao.
    """

    def __init__(self, rank: int = 64, alpha: float = 16.0, adapters: Adapters = "fp8") -> None:
        super().__init__(rank, alpha)
        if adapters not in get_args(Adapters):
            raise InputError(f"method.adapters is {adapters!r}; choose fp8 or bf16.")
        self.name = "torchao_fp8" if adapters == "fp8" else "torchao_fp8_bf16"
        self.adapters = adapters
        torchao("float8")

    def convert(self, name: str, linear: nn.Linear) -> nn.Module:
        """torchao's `Float8Linear` with the same weight."""
        float8 = torchao("float8")
        config = float8.Float8LinearConfig(emulate=not has_fp8_units(self.device))
        return float8.convert_to_float8_training(linear, config=config)

    def adapt(self, base: nn.Module) -> LoraLinear:
        """The adapter, in FP8 or not."""
        kind = Fp8Lora if self.adapters == "fp8" else LoraLinear
        return kind(base, self.rank, self.alpha)

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Plain layers with `DQ(Q(W)) + alpha / r B A`; inputs are then no longer rounded to FP8.

        With FP8 adapters B and A are those that their matmuls see, rounded.
        """
        for name, layer in layers_of(model, LoraLinear):
            base: Any = layer.base
            dtype = base.weight.dtype
            delta = layer.delta()
            if isinstance(layer, Fp8Lora):
                a, b = (as_fp8(t.to(dtype), base).float() for t in (layer.A, layer.B))
                delta = b @ a * layer.scaling
            weight = as_fp8(base.weight, base).float() + delta
            model.set_submodule(name, plain_linear(weight.to(dtype), base.bias))
        return model


def as_fp8(weight: Tensor, layer: Any) -> Tensor:
    """The values that a `Float8Linear` multiplies for a weight."""
    cast = torchao("float8.float8_scaling_utils").hp_tensor_to_float8_dynamic
    fmt = layer.config.cast_config_weight.target_dtype
    return cast(weight, fmt, layer.linear_mm_config).to_original_precision()

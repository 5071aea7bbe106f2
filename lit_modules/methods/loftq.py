"""LoftQ (arXiv:2310.08659): QLoRA whose adapters start at what quantisation lost."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.base import Weights
from lit_modules.methods.layers import check_rank, low_rank, swap_linears
from lit_modules.methods.qlora import QLoRA, bitsandbytes, dequantized, nf4_linear


class LoftQ(QLoRA):
    """NF4 weights Q and adapters with Q + alpha / r B A close to W from the start (Alg. 1).

    Alternates Q_t = nf4(W - L_(t-1)) and L_t = the best product of rank r to W - Q_t. peft has it
    too, but for CUDA alone, over codes without double quantisation, and keeps Q in 16 bits; this
    has QLoRA's layers. Settings as QLoRA's.

    Args:
        rank: r.
        alpha: The product is multiplied by alpha / r.
        iterations: Rounds of the alternation.
        adapters: What A and B are kept in, `fp32` or `bf16`.
        seed: Of the randomised SVD.
    """

    name = "loftq"

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 16.0,
        iterations: int = 5,
        adapters: Weights = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__(rank, alpha, adapters, seed)
        if iterations < 1:
            raise InputError(f"method.iterations is {iterations}; it must be at least 1.")
        self.iterations = iterations

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Quantise and decompose each layer in turn, then put the adapters in."""
        bnb = bitsandbytes(self.name)
        check_rank(model, self.rank)
        factors = {}

        def convert(name: str, linear: nn.Linear) -> nn.Module:
            weight = linear.weight.to(self.device, torch.float32)
            dtype = linear.weight.dtype
            product = torch.zeros_like(weight)
            for _ in range(self.iterations):
                layer = nf4_linear(bnb, (weight - product).to(dtype), linear.bias, self.device)
                left, right = low_rank(weight - dequantized(layer).float(), self.rank, self.seed)
                product = left @ right
            factors[name] = (left.cpu(), right.cpu())
            return layer

        swap_linears(model, convert)
        setattr(model, "is_loaded_in_4bit", True)  # noqa: B010
        wrapped = self.wrap(model, list(factors))
        root = (self.rank / self.alpha) ** 0.5  # peft multiplies the product by alpha / r
        inner = wrapped.get_base_model()  # type: ignore[operator]
        for name, (left, right) in factors.items():
            module = inner.get_submodule(name)
            module.lora_A["default"].weight.copy_(right * root)
            module.lora_B["default"].weight.copy_(left * root)
        return wrapped

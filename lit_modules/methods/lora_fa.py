"""LoRA-FA (arXiv:2308.03303): LoRA with a frozen A, from peft."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from lit_modules.methods.lora import LoRA


class LoRAFA(LoRA):
    """W x + alpha / r B A x with only B trained; A stays as it was drawn.

    Autograd then keeps A x (r numbers a token) for the backward pass instead of x, which is the
    point of it. Settings as LoRA's; half as many parameters are trained, by any optimizer, as in
    the first version of the paper. (peft's `LoraFAOptimizer` is that of a later one, which projects
    B's gradient.)
    """

    name = "lora_fa"

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Put the adapters in and freeze every A."""
        wrapped = super().prepare(model)
        for name, parameter in wrapped.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
        return wrapped

"""LoRA-XS (arXiv:2405.17604): an r x r matrix trained between the singular vectors of W."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from falqon.recipe import MeldRecipe
from falqon.svd import one_thread, truncated_svd
from lit_modules.methods.base import Method
from lit_modules.methods.layers import check_rank, plain_linear, swap_linears
from lit_modules.methods.low_rank import LowRankLinear


class LoRAXS(Method):
    """W x + alpha / r U_r S_r R V_r^T x with only R [r, r] trained.

    U_r, S_r and V_r are the leading singular vectors and values of W, frozen. R starts at normal
    numbers of standard deviation 1e-5. By hand, since peft does not have it. Settings: frozen
    weights and vectors bfloat16, R float32 computing in bfloat16.

    Args:
        rank: r.
        alpha: The product is multiplied by alpha / r.
        seed: Of R and of the randomised SVD.
    """

    name = "lora_xs"

    def __init__(self, rank: int = 64, alpha: float = 16.0, seed: int = 0) -> None:
        if alpha <= 0:
            raise InputError(f"method.alpha is {alpha}; it must be above 0.")
        self.rank = rank
        self.alpha = alpha
        self.seed = seed

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Decompose each layer in turn."""
        check_rank(model, self.rank)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        model.requires_grad_(False)

        def convert(name: str, linear: nn.Linear) -> nn.Module:
            weight = linear.weight.to(self.device, torch.float32)
            _, right = truncated_svd(weight, MeldRecipe(rank=self.rank), self.seed)
            with one_thread():  # the same bits whatever the number of threads
                left = weight @ right.T  # U_r S_r
            start = torch.randn(self.rank, self.rank, generator=generator, device="cpu") * 1e-5
            dtype = linear.weight.dtype
            layer = LowRankLinear(
                linear, right.to(dtype), left.to(dtype), self.alpha / self.rank, start
            )
            layer.A.requires_grad_(False)
            layer.B.requires_grad_(False)
            return layer.to(self.device)

        swap_linears(model, convert)
        return model

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Add the product to the weights, rounded to their dtype."""
        for name, layer in list(model.named_modules()):
            if isinstance(layer, LowRankLinear):
                base = layer.base
                assert isinstance(base, nn.Linear)
                weight = (base.weight.float() + layer.delta()).to(base.weight.dtype)
                model.set_submodule(name, plain_linear(weight, base.bias))
        return model

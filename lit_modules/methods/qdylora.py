"""QDyLoRA (arXiv:2402.10462): QLoRA trained so that it can be cut to any smaller rank."""

from __future__ import annotations

import random

import torch
from torch import nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.base import Method
from lit_modules.methods.layers import check_rank, plain_linear, swap_linears
from lit_modules.methods.low_rank import LowRankLinear
from lit_modules.methods.qlora import bitsandbytes, dequantized, nf4_linear


class QDyLoRA(Method):
    """NF4 weights; each step trains the first b rows of A and columns of B, b drawn from 1 to r.

    W x + alpha / r B[:, :b] A[:b] x (Alg. 1 of the paper). The same b in all layers, from the seed
    and the number of the step. By hand over bitsandbytes, since peft does not have it. Settings as
    QLoRA's.

    Args:
        rank: r, the largest rank.
        alpha: The product is multiplied by alpha / r at every rank.
        serve_rank: Rank that is evaluated and merged; r if None.
        seed: Of the start of A and of the ranks drawn.
    """

    name = "qdylora"

    def __init__(
        self,
        rank: int = 64,
        alpha: float = 16.0,
        serve_rank: int | None = None,
        seed: int = 0,
    ) -> None:
        if alpha <= 0:
            raise InputError(f"method.alpha is {alpha}; it must be above 0.")
        if serve_rank is not None and not 1 <= serve_rank <= rank:
            raise InputError(f"method.serve_rank is {serve_rank}; it must be from 1 to {rank}.")
        self.rank = rank
        self.alpha = alpha
        self.serve_rank = serve_rank
        self.seed = seed

    @torch.no_grad()
    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Quantise the linear layers one by one, and put the adapters in."""
        bnb = bitsandbytes(self.name)
        check_rank(model, self.rank)
        generator = torch.Generator("cpu").manual_seed(self.seed)
        model.requires_grad_(False)

        def convert(_: str, linear: nn.Linear) -> nn.Module:
            base = nf4_linear(bnb, linear.weight, linear.bias, self.device)
            noise = torch.rand(self.rank, linear.in_features, generator=generator, device="cpu")
            A = (2 * noise - 1) * linear.in_features**-0.5  # LoRA's start: kaiming, uniform
            B = torch.zeros(linear.out_features, self.rank)
            layer = _DynamicLinear(base, A, B, self.alpha / self.rank)
            layer.served = self.serve_rank or self.rank
            return layer.to(self.device)

        swap_linears(model, convert)
        return model

    def before_step(self, model: nn.Module, step: int) -> None:
        """Draw the rank of a step."""
        rank = random.Random(f"{self.seed}/{step}").randint(1, self.rank)
        for layer in model.modules():
            if isinstance(layer, _DynamicLinear):
                layer.trained = rank

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Decode the codes and add the product of rank `serve_rank`."""
        dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
        for name, layer in list(model.named_modules()):
            if isinstance(layer, _DynamicLinear):
                layer.active = layer.served
                weight = dequantized(layer.base).float() + layer.delta()
                bias = layer.base.bias
                model.set_submodule(name, plain_linear(weight.to(dtype), bias))  # type: ignore[arg-type]
        return model


class _DynamicLinear(LowRankLinear):
    """`LowRankLinear` whose rank is one in training and another in evaluation."""

    trained = served = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in]."""
        self.active = self.trained or self.served if self.training else self.served
        return super().forward(x)

"""LoRA in 16 bits (arXiv:2106.09685), from peft, and what all of peft's adapters share."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.base import DTYPES, Method, Weights
from lit_modules.methods.layers import check_rank, target_linears


class PeftMethod(Method):
    """A method that is a configuration of peft.

    Adapters are float32 and compute in bfloat16 under `torch.autocast`, as Hugging Face's Trainer
    does with `bf16`. peft's own cast of inputs to the adapters' dtype, which would make their
    matmuls float32, is switched off.

    Attributes:
        rank: Of the adapters.
        seed: Of their start, which therefore does not depend on what was drawn before.
        adapters: What they are kept in.
    """

    rank: int
    seed: int = 0
    adapters: Weights = "fp32"

    def config(self, layers: list[str]) -> Any:
        """The `PeftConfig` for layers with these full names."""
        raise NotImplementedError

    def wrap(self, model: PreTrainedModel, layers: list[str] | None = None) -> nn.Module:
        """Freeze a model and put adapters in.

        Args:
            model: To be wrapped.
            layers: Full names of the layers; every target layer if None.
        """
        try:
            from peft import get_peft_model
        except ImportError as error:
            raise InputError(
                f"the method {self.name} needs peft: pip install 'falqon[methods]'."
            ) from error
        names = layers or list(target_linears(model))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            wrapped = get_peft_model(
                model, self.config(names), autocast_adapter_dtype=self.adapters == "fp32"
            )
        for module in wrapped.modules():
            if hasattr(module, "cast_input_dtype_enabled"):
                module.cast_input_dtype_enabled = False
        return wrapped

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Freeze the model and put the adapters in."""
        check_rank(model, self.rank)
        return self.wrap(model)

    @torch.no_grad()
    def merge(self, model: nn.Module) -> nn.Module:
        """Add what the adapters do to the weights, rounded to the weights' dtype."""
        return model.merge_and_unload(safe_merge=True)  # type: ignore[operator]


class LoRA(PeftMethod):
    """W x + alpha / r B A x with A, B trained and W frozen (eq. 3 of the paper).

    Settings: frozen weights bfloat16, adapters float32 computing in bfloat16, all linear layers but
    the output embedding, no dropout.

    Args:
        rank: r.
        alpha: The product is multiplied by alpha / r.
        adapters: What A and B are kept in, `fp32` or `bf16`.
        seed: Of the start of A.
    """

    name = "lora"

    def __init__(
        self, rank: int = 64, alpha: float = 16.0, adapters: Weights = "fp32", seed: int = 0
    ) -> None:
        if adapters not in DTYPES:
            raise InputError(f"method.adapters is {adapters!r}; choose fp32 or bf16.")
        if alpha <= 0:
            raise InputError(f"method.alpha is {alpha}; it must be above 0.")
        self.rank = rank
        self.alpha = alpha
        self.adapters = adapters
        self.seed = seed

    def options(self) -> dict[str, Any]:
        """Further arguments of `peft.LoraConfig`."""
        return {}

    def config(self, layers: list[str]) -> Any:
        """A `peft.LoraConfig`."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=layers,
            task_type="CAUSAL_LM",
            **self.options(),
        )

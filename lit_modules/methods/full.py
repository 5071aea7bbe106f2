"""Full fine-tuning: every parameter of the model is trained."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.base import DTYPES, Method, Weights


class FullFinetune(Method):
    """Train all parameters, as pretraining does.

    Settings: weights and optimizer state in float32, computation in bfloat16 (`torch.autocast`), so
    that small steps are not lost to rounding; `weights: bf16` halves the memory and loses them.
    Embeddings and norms are trained too.

    Args:
        weights: What the parameters are kept in, `fp32` or `bf16`.
    """

    name = "full"

    def __init__(self, weights: Weights = "fp32") -> None:
        if weights not in DTYPES:
            raise InputError(f"method.weights is {weights!r}; choose fp32 or bf16.")
        self.weights = weights
        self.dtype = DTYPES[weights]
        self.autocast = weights == "fp32"

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Everything requires a gradient."""
        return model.requires_grad_(True)

    def merge(self, model: nn.Module) -> nn.Module:
        """The model itself."""
        return model

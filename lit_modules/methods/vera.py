"""VeRA (arXiv:2310.11454): one frozen random A and B for all layers, trained vectors; from peft."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.lora import PeftMethod


class VeRA(PeftMethod):
    """W x + b * (B (d * (A x))) with the vectors b [out] and d [r] trained (eq. 2 of the paper).

    A and B are drawn once for the largest layer and cut to size for the others. Settings: frozen
    weights bfloat16, vectors float32, computing in bfloat16. Its learning rate is about ten times
    LoRA's.

    Args:
        rank: r; may be larger than a layer, since A and B cost memory once.
        d_initial: What d starts at; b starts at 0.
        seed: Of A and B.
    """

    name = "vera"

    def __init__(self, rank: int = 256, d_initial: float = 0.1, seed: int = 0) -> None:
        if rank < 1:
            raise InputError(f"method.rank is {rank}; it must be at least 1.")
        self.rank = rank
        self.d_initial = d_initial
        self.seed = seed

    def config(self, layers: list[str]) -> Any:
        """A `peft.VeraConfig`."""
        from peft import VeraConfig

        return VeraConfig(
            r=self.rank,
            d_initial=self.d_initial,
            projection_prng_key=self.seed,
            target_modules=layers,
            task_type="CAUSAL_LM",
        )

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Freeze the model and put the adapters in."""
        return self.wrap(model)

"""Tiny models of several families, and a trained one beside its checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from falqon import FalqonPrecision, meld, melded_layers
from falqon.checkpoint import AtomicCheckpointIO
from falqon.pretrained import load_model

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"tie_word_embeddings": False}),
    "tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "bias": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "one key": (LlamaConfig, {"num_key_value_heads": 1}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, {"head_dim": 16}),
    "mistral": (MistralConfig, {"sliding_window": 16}),
}


@dataclass
class Case:
    """A trained model: its checkpoint, the directory of its base, and itself in memory."""

    file: Path
    base: str
    model: PreTrainedModel
    content: dict[str, Any]
    precision: FalqonPrecision

    def melded(self) -> PreTrainedModel:
        """The base, melded again."""
        model = load_model(self.base)
        settings = self.precision.melding
        meld(model, self.precision.fp8, settings)
        return model

    def save_small(self) -> None:
        """Save as a checkpoint that holds changes only."""
        content = {**self.content, "state_dict": dict(self.content["state_dict"])}
        self.precision.pack_checkpoint(content)
        assert "FalqonChanges" in content
        AtomicCheckpointIO().save_checkpoint(content, self.file)

    def values(self) -> dict[str, Tensor]:
        """What would be served, float32, by the names of a plain model."""
        layers = melded_layers(self.model)
        found = {f"{n}.weight": layer.dequantized_weight() for n, layer in layers.items()}
        for name, tensor in self.model.state_dict().items():
            fqn, _, part = name.rpartition(".")
            if fqn not in layers or part == "bias":
                found[name] = tensor.float()
        return found

    def plain(self) -> PreTrainedModel:
        """A plain float32 model of these values."""
        model = Auto.from_pretrained(self.base, dtype=torch.float32)
        model.load_state_dict(self.values())
        return model.eval()

    def save(self) -> None:
        AtomicCheckpointIO().save_checkpoint(self.content, self.file)

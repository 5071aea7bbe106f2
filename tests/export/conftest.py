"""Trained models, as far as an export can see: with codes that were changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import FAMILIES, Case
from torch import Tensor
from transformers import AutoModelForCausalLM as Auto
from transformers import PreTrainedTokenizerFast

from falqon import FalqonPrecision
from falqon.pretrained import load_model


@pytest.fixture
def train(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Callable[..., Case]:
    """Melds a random model of a family, writes random changes, and saves a checkpoint."""

    def make(family: str = "llama", size: float = 0.05, seed: int = 0, **plugin: Any) -> Case:
        kind, changes = FAMILIES[family]
        shape = {
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "eos_token_id": 2,
        }
        torch.manual_seed(0)
        base = tmp_path / "base"
        model = Auto.from_config(kind(**{**shape, **changes}), dtype=torch.bfloat16)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "norm.weight")):  # a bias of zero would show nothing
                    parameter.add_(torch.randn_like(parameter) / 4)
        model.save_pretrained(base)
        tokenizer.save_pretrained(base)
        trained = load_model(str(base))
        precision = FalqonPrecision(**{"rank": 4, "update": "paper", "rows": "all", **plugin})
        precision.convert(trained)
        precision.remember_base()
        start = {n: layer.codes.clone() for n, layer in precision.layers.items()}
        torch.manual_seed(seed)
        with torch.no_grad():
            for layer in precision.layers.values():
                layer.B.copy_(torch.randn_like(layer.B) * size)
        precision.flush()
        for name, layer in precision.layers.items():
            assert not torch.equal(layer.codes, start[name])
        content = {
            "epoch": 0,
            "global_step": 7,
            "state_dict": {f"model.{n}": t for n, t in trained.state_dict().items()},
            "FalqonPrecision": precision.state_dict(),
            "LitCausalLM": {
                "model_name": str(base),
                "revision": None,
                "base_loss": None,
                "prompt": "alpaca",
            },
        }
        file = tmp_path / ("trained.ckpt" if seed == 0 else f"trained{seed}.ckpt")
        case = Case(file, str(base), trained, content, precision)
        case.save()
        return case

    return make


@pytest.fixture
def tokens() -> Tensor:
    """int64 [2, 24], longer than the sliding window of the Mistral model."""
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))

"""Tiny Llamas on the disk, for the tests of `falqon meld`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from falqon.recipe import MeldRecipe

RANK = 4
MELDING = MeldRecipe(rank=RANK)
SINGLE = "model.safetensors"


def make(path: Path, shard: str = "5GB", dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        **config,
    }
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero otherwise
                parameter.normal_()
    model.save_pretrained(path, max_shard_size=shard)
    return path


def meld_command(source: Path | str, output: Path, *flags: str) -> list[str]:
    return ["meld", "--model", str(source), "--output", str(output), "--rank", str(RANK), *flags]

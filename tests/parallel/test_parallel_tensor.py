"""Tensor parallelism and FSDP2 at once, and what neither can cut up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from cases_tensor import TENSOR, alone, compare
from transformers import LlamaConfig, LlamaForCausalLM

from falqon import FalqonPrecision, InputError, ShardedStrategy
from falqon.meld import meld
from falqon.parallel.sharding import check_divisible, decoder_layers, units
from falqon.parallel.tensor import check
from falqon.recipe import MeldRecipe, fp8_recipe


def test_fsdp2_and_tensor_parallelism_at_once(
    jobs: Callable, tiny_run: Callable, cli: Callable, tmp_path: Path
) -> None:
    four = jobs(4)
    config = tiny_run(update="anchored", rows=6, dtype="fp32")
    config["trainer"] |= {"max_steps": 2, "limit_val_batches": 0, "strategy": TENSOR}
    config["data"]["init_args"] |= {"batch_size": 2, "group_by_length": False}
    four.add("both", config)
    four.run()
    hashes = {note["hash"] for note in four.notes("both")}
    assert len(hashes) == 2  # one for each part
    config["data"]["init_args"]["batch_size"] = 4
    compare(four.directory("both"), alone(cli, config, tmp_path / "one"), rel=2e-2)


def test_what_cannot_be_cut_up() -> None:
    def llama(**sizes: int) -> LlamaForCausalLM:
        given = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 60}
        config = LlamaConfig(vocab_size=40, hidden_size=32, num_hidden_layers=1, **given | sizes)
        return LlamaForCausalLM(config)

    model = llama()
    meld(model, recipe=MeldRecipe(rank=4))
    check(model, 2)
    check_divisible(model, 4)
    with pytest.raises(InputError, match=r"down_proj has 60 input features, which 8 .* use 2 or"):
        check_divisible(model, 8)
    with pytest.raises(InputError, match="q_proj has 32 output features"):
        check(model, 3)
    with pytest.raises(InputError, match="num_key_value_heads is 2"):
        check(model, 4)
    model = llama()
    meld(model, recipe=MeldRecipe(rank=4, output_embedding=True))
    with pytest.raises(InputError, match="lm_head is none of them"):
        check(model, 2)
    model = llama()
    meld(model, fp8_recipe({"base": "paper", "scaling": "delayed"}), MeldRecipe(rank=4))
    with pytest.raises(InputError, match="dynamic"):
        check(model, 2)
    model = llama()
    meld(model, fp8_recipe("none"), MeldRecipe(rank=4))
    with pytest.raises(InputError, match="float32"):
        check_divisible(model, 2)


def test_what_is_gathered_at_a_time() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=40, num_hidden_layers=1, **sizes)
    model = LlamaForCausalLM(config)
    (block,) = decoder_layers(model)
    assert units(block) == [block]  # a decoder layer that is not ours
    FalqonPrecision(rank=4).convert(model)
    (block,) = decoder_layers(model)
    assert units(block) == [block.self_attn, block.mlp, block.mlp.down_proj]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"tensor_parallel_size": 2}, "save_distributed_checkpoint"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0"),
        ({"data_parallel_size": -1}, "data_parallel_size is -1"),
    ],
)
def test_sizes_are_checked(settings: dict[str, int], text: str) -> None:
    with pytest.raises(InputError, match=text):
        ShardedStrategy(**settings)

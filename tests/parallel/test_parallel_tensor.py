"""Tensor parallelism: one device's training, up to the order of sums."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from falqon import InputError, ShardedStrategy
from falqon.checkpoint import read_checkpoint
from falqon.meld import meld
from falqon.parallel.sharding import check_divisible
from falqon.parallel.tensor import check
from falqon.recipe import MeldRecipe, fp8_recipe

TENSOR = {
    "class_path": "falqon.ShardedStrategy",
    "init_args": {"tensor_parallel_size": 2, "save_distributed_checkpoint": False},
}


def column(directory: Path, key: str) -> list[float]:
    with (directory / "metrics.csv").open() as file:
        return [float(row[key]) for row in csv.DictReader(file) if row.get(key)]


def test_the_training_of_one_device(
    jobs: Callable, tiny_run: Callable, cli: Callable, tmp_path: Path
) -> None:
    two = jobs(2)
    live = {"preset": "compensated", "every": 2, "calibration_rows": 6}
    cases = {
        "exact": tiny_run(recipe="none", dtype="fp32", update={"preset": "live"}),
        "fp8": tiny_run(update=live, dtype="fp32"),
        "tensor": tiny_run(recipe="paper", update="anchored", rows=6, dtype="fp32"),
    }
    for name, config in cases.items():
        config["trainer"] |= {"max_steps": 4, "gradient_clip_val": 0.3, "strategy": TENSOR}
        two.add(name, config)
    last = Path("checkpoints") / "last.ckpt"
    flags = (f"--ckpt_path={two.directory('fp8') / last}", "--trainer.max_steps=6")
    two.add("resumed", cases["fp8"], *flags)
    two.run()
    for name, config in cases.items():
        # The same sums in another order; FP8 rounding makes a last bit an eighth of a value.
        one = alone(cli, config, tmp_path / name)
        compare(two.directory(name), one, rel=1e-4 if name == "exact" else 2e-2)
        for note in two.notes(name):
            state = read_checkpoint(one / last)["state_dict"]
            whole = sum(tensor.nbytes for tensor in state.values())
            assert note["bytes_held"] < 0.85 * whole  # embedding and head are not cut up
        if name == "fp8":
            config["trainer"]["max_steps"] = 6
            compare(two.directory("resumed"), alone(cli, config, tmp_path / "six"), rel=2e-2)


def alone(cli: Callable, config: dict[str, Any], root: Path) -> Path:
    """The run on one device."""
    config["trainer"] |= {"default_root_dir": str(root), "devices": 1, "strategy": "auto"}
    config["report"]["sample_answer"] = False
    cli("fit", config)
    return root


def compare(ours: Path, other: Path, rel: float) -> None:
    """Losses and gradients within a tolerance; nearly all codes the same."""
    for key in ("train/loss", "grad_norm", "val/loss"):
        found, wanted = column(ours, key), column(other, key)
        assert found == pytest.approx(wanted[-len(found) :], rel=rel), key
    last = Path("checkpoints") / "last.ckpt"
    found, wanted = (read_checkpoint(path / last)["state_dict"] for path in (ours, other))
    same, count = 0, 0
    for key, value in wanted.items():
        assert found[key].shape == value.shape, key
        if value.dtype == torch.uint8:
            same, count = same + int((found[key] == value).sum()), count + value.numel()
        elif value.numel():
            torch.testing.assert_close(found[key], value, rtol=0.1, atol=0.1, msg=key)
    assert same >= 0.98 * count


def test_fsdp2_and_tensor_parallelism_at_once(
    jobs: Callable, tiny_run: Callable, cli: Callable, tmp_path: Path
) -> None:
    four = jobs(4)
    config = tiny_run(update="anchored", rows=6, dtype="fp32")
    config["trainer"] |= {"max_steps": 3, "strategy": TENSOR}
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

"""Training methods of `model.method`: the interface, full fine-tuning, and 16-bit LoRA."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from falqon import MeldedLinear
from lit_modules.methods import Falqon, FullFinetune, LoRA
from tests.method_checks import (
    LAYERS,
    check_merge,
    check_resume,
    check_run,
    check_training,
    configure,
)

LORA_NAMES = [
    f"base_model.model.{layer}.lora_{part}.default.weight" for layer in LAYERS for part in "AB"
]


@pytest.fixture
def refused(cli: Callable, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a configuration that has to be refused and returns what is said."""

    def refuse(config: dict[str, Any], *flags: str) -> str:
        with pytest.raises(SystemExit) as error:
            cli("fit", config, *flags)
        assert error.value.code == 2
        return capsys.readouterr().err

    return refuse


def test_full_finetuning(tiny_llama: LlamaForCausalLM) -> None:
    names = [n for n, _ in tiny_llama.named_parameters()]
    for weights, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        method = FullFinetune(weights)
        model = check_training(method, tiny_llama, names, 0.01)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert method.merge(model) is model
    state = check_resume(FullFinetune, tiny_llama, 0.01)
    assert set(state) == set(names)


def test_lora(
    cli: Callable, tiny_run: Callable, tmp_path: Path, tiny_llama: LlamaForCausalLM
) -> None:
    state = check_run(cli, configure(tiny_run(), "LoRA", 0.05, rank=4), tmp_path)
    assert set(state) == {f"model.{name}" for name in LORA_NAMES}
    model = check_training(LoRA(rank=4), tiny_llama, LORA_NAMES, 0.05)
    dtypes = {n: p.dtype for n, p in model.named_parameters()}
    assert {dtypes[n] for n in LORA_NAMES} == {torch.float32}
    assert {d for n, d in dtypes.items() if n not in LORA_NAMES} == {torch.bfloat16}
    check_merge(LoRA(rank=4), tiny_llama, 0.05)


def test_lora_multiplies_in_16_bits(tiny_llama: LlamaForCausalLM) -> None:
    method = LoRA(rank=4)
    model = method.prepare(deepcopy(tiny_llama).to(torch.bfloat16))
    seen = set()
    for name, module in model.named_modules():
        if name.endswith(("lora_A.default", "lora_B.default")):
            module.register_forward_hook(lambda m, args, out: seen.add((args[0].dtype, out.dtype)))
    with method.compute():
        model(input_ids=torch.arange(5, 21)[None])
    assert seen == {(torch.bfloat16, torch.bfloat16)}


def test_falqon_is_a_method_like_the_others(
    cli: Callable, tiny_run: Callable, tiny_llama: LlamaForCausalLM
) -> None:
    config = tiny_run()
    module = cli("fit", config).model
    assert isinstance(module.method, Falqon)
    description = module.method.describe()
    assert (description["name"], description["settings"]["rank"]) == ("falqon", 4)
    module.flush()
    module.model.eval()
    layers = {n: m for n, m in module.model.named_modules() if isinstance(m, MeldedLinear)}
    weights = {n: m.dequantized_weight() for n, m in layers.items()}
    assert set(module.method.trainable(module.model)) == {f"{n}.B" for n in layers}
    merged = module.method.merge(module.model)
    for name, weight in weights.items():
        assert torch.equal(merged.get_submodule(name).weight.float(), weight)
    merged(input_ids=torch.arange(5, 21)[None])


def test_methods_and_plugins_that_do_not_go_together(
    tiny_run: Callable, refused: Callable[..., str]
) -> None:
    config = configure(tiny_run(), "LoRA", 0.05, rank=4)
    config["trainer"]["plugins"] = tiny_run()["trainer"]["plugins"]
    assert "set trainer.plugins to []" in refused(config)
    config = tiny_run()
    config["trainer"]["plugins"] = []
    assert "add it, or choose another model.init_args.method" in refused(config)
    config = configure(tiny_run(), "LoRA", 0.05, rank=4)
    assert "leave trainer.precision out" in refused(config, "--trainer.precision=bf16-true")
    assert "use at most 32" in refused(configure(tiny_run(), "LoRA", 0.05, rank=33))


def test_checkpoints_that_do_not_fit(
    cli: Callable, tiny_run: Callable, refused: Callable[..., str], tmp_path: Path
) -> None:
    config = configure(tiny_run(), "LoRA", 0.05, rank=4)
    cli("fit", config, "--trainer.max_steps=3")
    path = f"--ckpt_path={config['trainer']['default_root_dir']}/checkpoints/last.ckpt"
    text = refused(configure(tiny_run(), "LoRA", 0.05, rank=4, alpha=8), path)
    assert "alpha (checkpoint 16.0, configuration 8.0)" in text
    assert "trained with the method lora" in refused(configure(tiny_run(), "FullFinetune", 1), path)
    assert "not trained with FalqonPrecision" in refused(tiny_run(), path)
    moved = configure(tiny_run(), "LoRA", 0.05, rank=4)
    shutil.copytree(moved["model"]["init_args"]["model_name"], tmp_path / "other")
    other = LlamaForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        other.model.norm.weight[0] += 1
    other.save_pretrained(tmp_path / "other")
    moved["model"]["init_args"]["model_name"] = str(tmp_path / "other")
    assert "other frozen weights" in refused(moved, path)

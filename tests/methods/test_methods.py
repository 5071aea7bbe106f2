"""Training methods of `model.method`: the interface, full fine-tuning, and 16-bit LoRA."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from datamodules import AlpacaDataModule
from falqon import InputError, MeldedLinear
from lit_modules import LitCausalLM
from lit_modules.methods import Falqon, FullFinetune, LoRA, QLoRA
from lit_modules.methods.state import check_prepared
from tests.method_checks import (
    LAYERS,
    check_merge,
    check_resume,
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


def test_lora(tiny_llama: LlamaForCausalLM) -> None:
    model = check_training(LoRA(rank=4), tiny_llama, LORA_NAMES, 0.05)
    assert set(check_resume(lambda: LoRA(rank=4), tiny_llama, 0.05)) == set(LORA_NAMES)
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


class Recording(FullFinetune):
    """Notes what the trainer calls; its own backward pass gives every parameter a gradient of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def before_step(self, model: torch.nn.Module, step: int) -> None:
        self.calls.append(("before_step", step))

    def loss(self, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Any:
        with torch.no_grad():
            loss, tokens = super().loss(model, batch)
        self.calls.append(("loss", int(tokens)))
        return loss, tokens

    def backward(self, model: torch.nn.Module, loss: torch.Tensor) -> bool:
        self.calls.append(("backward",))
        for parameter in self.trainable(model).values():
            parameter.grad = torch.ones_like(parameter)
        return True

    def scale_gradients(self, parameters: list, factor: torch.Tensor) -> None:
        super().scale_gradients(parameters, factor)
        self.calls.append(("scale_gradients", float(factor), float(parameters[0].grad.mean())))

    def after_step(self, model: torch.nn.Module, step: int) -> None:
        self.calls.append(("after_step", step, float(model.model.norm.weight.detach()[0])))


def test_what_is_called_when(tokenizer_dir: str, alpaca_file: str, tmp_path: Path) -> None:
    method = Recording()
    module = LitCausalLM(
        tokenizer_dir,
        method=method,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0),
    )
    trainer = Trainer(
        max_steps=2,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    data = AlpacaDataModule(
        train_path=alpaca_file, tokenizer_name=tokenizer_dir, batch_size=2, max_length=128
    )
    trainer.fit(module, datamodule=data)
    names = [call[0] for call in method.calls]
    batch = ["before_step", "loss", "backward"]
    assert names == (batch * 2 + ["scale_gradients", "after_step"]) * 2
    assert [call[1] for call in method.calls if call[0] == "before_step"] == [0, 0, 1, 1]
    weight = 1.0
    for step in (0, 1):
        calls = method.calls[8 * step : 8 * step + 8]
        tokens = sum(call[1] for call in calls if call[0] == "loss")
        _, factor, gradient = calls[6]
        assert (factor, gradient) == pytest.approx((1 / tokens, 1 / tokens))
        weight -= 0.5 / tokens
        assert calls[7] == ("after_step", step, pytest.approx(weight, abs=1e-6))


def test_a_method_that_trains_something_else_than_it_says(tiny_llama: LlamaForCausalLM) -> None:
    class Wrong(FullFinetune):
        def trainable(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
            return {"model.norm.weight": model.get_parameter("model.norm.weight")}

    with pytest.raises(InputError, match="trains other parameters than those"):
        check_prepared(Wrong(), deepcopy(tiny_llama).requires_grad_(True))
    with pytest.raises(InputError, match="no plain nn.Linear"):
        LoRA(rank=4).prepare(torch.nn.Sequential())  # type: ignore[arg-type]
    with pytest.raises(InputError, match="found no layer to train"):
        check_prepared(FullFinetune(), deepcopy(tiny_llama).requires_grad_(False))


@pytest.mark.parametrize(("kind", "package"), [(LoRA, "peft"), (QLoRA, "bitsandbytes")])
def test_a_missing_package_is_named(
    kind: type[LoRA], package: str, tiny_llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"needs {package}: pip install 'falqon\[methods\]'"):
        kind(rank=4).prepare(deepcopy(tiny_llama))


def test_activation_checkpointing_reaches_wrapped_models(
    tokenizer_dir: str, tiny_llama: LlamaForCausalLM
) -> None:
    module = LitCausalLM(tokenizer_dir, method=LoRA(rank=4), gradient_checkpointing=True)
    module._trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    module.configure_model()
    layers = [m for m in module.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers and all(layer.gradient_checkpointing for layer in layers)

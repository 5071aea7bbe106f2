"""What all hand-written methods keep: they train, resume to the same bits, and merge."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from falqon.errors import InputError
from lit_modules import methods
from lit_modules.methods import Method
from lit_modules.methods.fishman import Fp8Linear
from lit_modules.methods.qa_lora import Int4Linear
from lit_modules.methods.quantised import QuantisedLinear
from tests.method_checks import (
    LAYERS,
    check_merge,
    check_resume,
    check_run,
    check_training,
    configure,
    logits,
    prepared,
    train_steps,
)

ADAPTER = ("A", "B")
CASES: dict[str, tuple[str, dict[str, Any], float, tuple[str, ...]]] = {
    # class, settings, learning rate, what trains in each layer
    "qa_lora": ("QALoRA", {"rank": 4, "group_size": 8}, 0.05, ADAPTER),
    "qa_lora_sum": ("QALoRA", {"rank": 4, "group_size": 8, "pooling": "sum"}, 0.05, ADAPTER),
    "ir_qlora": ("IRQLoRA", {"rank": 4, "candidates": 5}, 0.05, (*ADAPTER, "beta1", "beta2")),
    "fp6_e3m2": ("FP6", {"rank": 4}, 0.05, ADAPTER),
    "fp6_e2m3": ("FP6", {"rank": 4, "fmt": "e2m3"}, 0.05, ADAPTER),
    "mxfp4": ("MX", {"rank": 4}, 0.05, ADAPTER),
    "mxfp8": ("MX", {"rank": 4, "fmt": "mxfp8"}, 0.05, ADAPTER),
    "torchao_fp8": ("TorchaoFP8", {"rank": 4}, 0.05, ADAPTER),
    "torchao_fp8_bf16": ("TorchaoFP8", {"rank": 4, "adapters": "bf16"}, 0.05, ADAPTER),
    "fishman": ("Fishman", {"rank": 4, "history": 2}, 0.05, ADAPTER),
    "fishman_dynamic": ("Fishman", {"rank": 4, "scaling": "dynamic"}, 0.05, ADAPTER),
    "peqa": ("PEQA", {"group_size": 8}, 1e-3, ("scale",)),
    "peqa_channel": ("PEQA", {}, 1e-3, ("scale",)),
    "mezo": ("MeZO", {"rank": 4}, 0.02, ADAPTER),
}
RUNS = ["qa_lora", "fishman", "mezo"]  # through train.py; what checkpoints hold differs
EXACT = [name for name in CASES if not name.startswith(("torchao", "fishman", "qa_lora"))]


def made(case: str) -> Method:
    name, settings, _, _ = CASES[case]
    return getattr(methods, name)(**settings)


@pytest.mark.parametrize("case", CASES)
def test_exactly_the_intended_parameters_train(case: str, tiny_llama: LlamaForCausalLM) -> None:
    _, _, rate, parts = CASES[case]
    names = [f"{layer}.{part}" for layer in LAYERS for part in parts]
    model = check_training(made(case), tiny_llama, names, rate)
    kinds = {p.dtype for n, p in model.named_parameters() if n in names}
    assert kinds == {torch.float32}
    # What holds codes and scales stays as it is when the model is moved to another dtype.
    before = deepcopy(model.state_dict())
    layers = [m for m in model.modules() if isinstance(m, QuantisedLinear)]
    weights = [layer.dequantise(torch.float32) for layer in layers]
    model.to(torch.float16)
    for layer, weight in zip(layers, weights, strict=True):
        assert torch.equal(layer.dequantise(torch.float32), weight)
    for name, value in model.state_dict().items():
        if value.dtype == torch.float16:
            assert before[name].dtype == torch.bfloat16, name
        else:
            assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("case", CASES)
def test_resumes_to_the_same_bits(case: str, tiny_llama: LlamaForCausalLM) -> None:
    check_resume(lambda: made(case), tiny_llama, CASES[case][2])


@pytest.mark.parametrize("case", RUNS)
def test_run_and_resumed_run_are_the_same(
    case: str, cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    name, settings, rate, parts = CASES[case]
    config = configure(tiny_run(), name, rate, **settings)
    if name == "MeZO":
        config["trainer"]["gradient_clip_val"] = None
    state = check_run(cli, config, tmp_path)
    extra = {"model.amaxes.steps"} if name == "Fishman" else set()
    assert set(state) == {f"model.{layer}.{p}" for layer in LAYERS for p in parts} | extra


@pytest.mark.parametrize("case", EXACT)
def test_merged_model_computes_the_trained_function(
    case: str, tiny_llama: LlamaForCausalLM
) -> None:
    check_merge(made(case), tiny_llama, CASES[case][2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["qa_lora", "qa_lora_sum"])
def test_qa_lora_merges_into_int4(
    case: str, dtype: torch.dtype, tiny_llama: LlamaForCausalLM
) -> None:
    state = tiny_llama.state_dict()
    inputs = {n: torch.randn(24, state[f"{n}.weight"].shape[1], dtype=dtype) for n in LAYERS}

    def outputs(method: Method | None, model: nn.Module) -> list[Tensor]:
        """The model's, or in bfloat16 each layer's: a last bit that differs grows over layers."""
        if dtype == torch.float32:
            return [logits(method, model)]
        with torch.no_grad(), method.compute() if method else nullcontext():
            return [model.get_submodule(n)(x).float() for n, x in inputs.items()]

    method = made(case)
    model = prepared(method, tiny_llama, dtype)
    untrained = outputs(method, model)
    train_steps(method, model, CASES[case][2])
    trained = outputs(method, model)

    def check(merged: nn.Module) -> None:
        """Sums of 64 products are in another order, and what bfloat16 rounds is another."""
        for out, before, after in zip(outputs(None, merged), untrained, trained, strict=True):
            assert (after - before).norm() > 0.5 * after.norm()
            if dtype == torch.float32:
                torch.testing.assert_close(out, after, rtol=0, atol=1e-5)
            assert (out - after).norm() < (2e-6 if dtype == torch.float32 else 8e-3) * after.norm()

    codes = {n: m.codes.clone() for n, m in model.named_modules() if isinstance(m, Int4Linear)}
    scales = {n: m.scale.clone() for n, m in model.named_modules() if isinstance(m, Int4Linear)}
    merged = method.merge(model)
    check(merged)
    layers = {n: m for n, m in merged.named_modules() if n in LAYERS}
    assert {type(m) for m in layers.values()} == {Int4Linear}
    for name, layer in layers.items():
        assert torch.equal(layer.codes, codes[f"{name}.base"])
        assert torch.equal(layer.scale, scales[f"{name}.base"])
        merged.set_submodule(name, layer.plain())
    check(merged)


@pytest.mark.parametrize("case", ["torchao_fp8", "torchao_fp8_bf16", "fishman", "fishman_dynamic"])
def test_merged_fp8_differs_by_the_rounding_of_inputs(
    case: str, tiny_llama: LlamaForCausalLM
) -> None:
    method = made(case)
    model = prepared(method, tiny_llama, torch.float32)
    untrained = logits(method, model)
    train_steps(method, model, CASES[case][2])
    trained = logits(method, model)
    if case.startswith("fishman"):
        exact = deepcopy(model)
        for module in exact.modules():
            if isinstance(module, Fp8Linear):  # forward without the rounding of inputs
                module.forward = QuantisedLinear.forward.__get__(module)  # type: ignore[method-assign]
        expected = logits(method, exact)
    merged = method.merge(model)
    assert {type(m) for n, m in merged.named_modules() if n in LAYERS} == {nn.Linear}
    result = logits(None, merged)
    if case.startswith("fishman"):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-5)
    assert 0 < (result - trained).norm() < 0.25 * (trained - untrained).norm()


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("QALoRA", {"pooling": "max"}, "choose sum or mean"),
        ("QALoRA", {"alpha": 0.0}, "must be above 0"),
        ("IRQLoRA", {"width": 0.0}, "a width above 0"),
        ("FP6", {"fmt": "e4m1"}, "choose e3m2 or e2m3"),
        ("MX", {"fmt": "mxfp6"}, "choose mxfp8 or mxfp4"),
        ("TorchaoFP8", {"adapters": "fp16"}, "choose fp8 or bf16"),
        ("Fishman", {"scaling": "static"}, "choose delayed or dynamic"),
        ("Fishman", {"history": 0}, "at least 1"),
        ("PEQA", {"group_size": 1}, "at least 2, or null"),
        ("MeZO", {"trains": "some"}, "choose lora or full"),
        ("MeZO", {"epsilon": 0.0}, "must be above 0"),
    ],
)
def test_settings_that_are_refused(name: str, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError, match=text):
        getattr(methods, name)(**settings)


@pytest.mark.parametrize(
    ("name", "settings", "text"),
    [
        ("QALoRA", {"rank": 4, "group_size": 12}, "does not fit model.layers.0.self_attn.q_proj"),
        ("PEQA", {"group_size": 12}, "does not fit model.layers.0.self_attn.q_proj"),
        ("FP6", {"rank": 33}, "use at most 32"),
    ],
)
def test_layers_that_do_not_fit(
    name: str, settings: dict[str, Any], text: str, tiny_llama: LlamaForCausalLM
) -> None:
    with pytest.raises(InputError, match=text):
        prepared(getattr(methods, name)(**settings), tiny_llama)


def test_missing_torchao_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torchao.float8", None)
    with pytest.raises(InputError, match=r"pip install 'falqon\[torchao\]'"):
        methods.TorchaoFP8()

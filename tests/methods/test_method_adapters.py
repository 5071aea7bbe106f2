"""Adapters on 16-bit weights: what trains, what they compute, merge and resume."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from falqon.errors import InputError
from lit_modules.methods import DoRA, LoRAFA, LoRAXS, Method, VeRA
from lit_modules.methods.layers import low_rank
from tests.method_checks import (
    LAYERS,
    check_merge,
    check_resume,
    check_training,
    logits,
    prepared,
    train_steps,
)

PEFT = "base_model.model."


def names(*parts: str, prefix: str = PEFT) -> list[str]:
    return [f"{prefix}{layer}.{part}" for layer in LAYERS for part in parts]


A, B = "lora_A.default.weight", "lora_B.default.weight"
CASES = [
    (LoRAFA, {"rank": 4}, names(B), 0.05),
    (DoRA, {"rank": 4}, names(A, B, "lora_magnitude_vector.default.weight"), 0.05),
    (VeRA, {"rank": 40}, names("vera_lambda_b.default", "vera_lambda_d.default"), 0.2),
    (LoRAXS, {"rank": 4}, names("R", prefix=""), 0.05),
]


@pytest.mark.parametrize(
    ("kind", "settings", "trained", "rate"), CASES, ids=[c[0].name for c in CASES]
)
def test_it_trains_resumes_and_merges(
    kind: type[Method],
    settings: dict[str, int],
    trained: list[str],
    rate: float,
    tiny_llama: LlamaForCausalLM,
) -> None:
    model = check_training(kind(**settings), tiny_llama, trained, rate)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    state = check_resume(lambda: kind(**settings), tiny_llama, rate)
    assert set(state) == set(trained)
    check_merge(kind(**settings), tiny_llama, rate)
    assert kind(**settings).describe()["settings"] | settings == kind(**settings).settings()


def test_nothing_changes_before_the_first_step(tiny_llama: LlamaForCausalLM) -> None:
    base = logits(None, tiny_llama)
    for kind, settings, _, _ in CASES:
        method = kind(**settings)
        method.autocast = False
        start = logits(method, prepared(method, tiny_llama, torch.float32))
        atol = 1e-4 if kind is LoRAXS else 1e-5  # R starts near zero, not at it
        torch.testing.assert_close(start, base, rtol=0, atol=atol)


@torch.no_grad()
def test_what_the_layers_compute_is_the_papers_equation(tiny_llama: LlamaForCausalLM) -> None:
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    layer = LAYERS[0]
    weight = tiny_llama.get_submodule(layer).weight
    for kind, settings, _, rate in CASES:
        method = kind(**settings)
        method.autocast = False
        model = prepared(method, tiny_llama, torch.float32)
        with torch.enable_grad():
            train_steps(method, model, rate, range(2))
        module = model.get_submodule(layer if kind is LoRAXS else PEFT + layer)
        p = {n.replace(".default", ""): v for n, v in module.named_parameters()}
        p |= {n.replace(".default", ""): v for n, v in module.named_buffers()}
        if kind is LoRAXS:
            left, values, right = torch.linalg.svd(weight)
            signs = torch.sign((p["A"] * right[:4]).sum(1))  # free, but the same on both sides
            left, right = left[:, :4] * values[:4] * signs, signs[:, None] * right[:4]
            expected = x @ (weight + 16 / 4 * left @ p["R"] @ right).T
        elif kind is VeRA:
            random_a, random_b = p["vera_A"][:, :32], p["vera_B"][:32]
            hidden = p["vera_lambda_d"] * (x @ random_a.T)
            expected = x @ weight.T + p["vera_lambda_b"] * (hidden @ random_b.T)
        else:
            merged = weight + 16 / 4 * p["lora_B.weight"] @ p["lora_A.weight"]
            if kind is DoRA:
                merged = merged * (p["lora_magnitude_vector.weight"] / merged.norm(dim=1))[:, None]
            expected = x @ merged.T
        assert not torch.allclose(functional.linear(x, weight), expected, atol=1e-4)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5)


def test_low_rank_is_the_best_approximation() -> None:
    matrix = torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    left, right = low_rank(matrix, 5, seed=0)
    assert (left.shape, right.shape) == ((24, 5), (5, 16))
    error = (matrix - left @ right).norm()
    torch.testing.assert_close(error, torch.linalg.svdvals(matrix)[5:].norm())
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))  # evenly shared
    zero_left, zero_right = low_rank(torch.zeros(8, 8), 2, seed=0)
    assert not zero_left.any() and not zero_right.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LoRAFA(alpha=0), "method.alpha is 0"),
        (lambda: LoRAFA(adapters="fp8"), "choose fp32 or bf16"),
        (lambda: VeRA(rank=0), "method.rank is 0"),
        (lambda: LoRAXS(alpha=-1.0), "method.alpha is -1.0"),
    ],
)
def test_settings_out_of_range(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()

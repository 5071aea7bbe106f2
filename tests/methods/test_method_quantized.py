"""Adapters on quantised weights of bitsandbytes: the quantisers, training, merge and resume."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from falqon.errors import InputError
from lit_modules.methods import LLMInt8LoRA, LoftQ, Method, QDyLoRA, QLoRA
from lit_modules.methods.llm_int8 import dequantized as dequantized_int8
from lit_modules.methods.llm_int8 import int8_linear
from lit_modules.methods.low_rank import LowRankLinear
from lit_modules.methods.qlora import dequantized, nf4_linear
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

bnb = pytest.importorskip("bitsandbytes")
PEFT = [f"base_model.model.{layer}.lora_{part}.default.weight" for layer in LAYERS for part in "AB"]
PLAIN = [f"{layer}.{part}" for layer in LAYERS for part in "AB"]
CASES = [
    (QLoRA, {"rank": 4}, PEFT),
    (LLMInt8LoRA, {"rank": 4}, PEFT),
    (LoftQ, {"rank": 4, "iterations": 2}, PEFT),
    (QDyLoRA, {"rank": 4}, PLAIN),
]
CPU = torch.device("cpu")


# Quantiles of the normal distribution that NF4 rounds to: arXiv:2305.14314, appendix E.
NF4 = torch.tensor(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ]
)  # fmt: skip


def nf4_reference(weight: Tensor) -> Tensor:
    """Blocks of 64 by their amax, and the amaxes, less their mean, in 8-bit floats by 256."""
    blocks = weight.float().reshape(-1, 64)
    amax = blocks.abs().amax(1)
    codes = (blocks / amax[:, None]).unsqueeze(-1).sub(NF4).abs().argmin(-1)
    offset = amax.mean()
    shifted = functional.pad(amax - offset, (0, -len(amax) % 256)).reshape(-1, 256)
    second = shifted.abs().amax(1, keepdim=True)
    table = bnb.functional.create_dynamic_map()  # 8 bits: sign, exponent by unary, fraction
    nearest = (shifted / second).unsqueeze(-1).sub(table).abs().argmin(-1)
    restored = (table[nearest] * second).reshape(-1)[: len(amax)] + offset
    return (NF4[codes] * restored[:, None]).reshape(weight.shape)


@pytest.mark.parametrize("shape", [(32, 64), (192, 576), (48, 128)])
def test_nf4_equals_a_written_out_reference(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    layer = nf4_linear(bnb, weight, None, CPU)
    assert layer.weight.quant_state.nested and layer.weight.dtype == torch.uint8
    expected = nf4_reference(weight)
    actual = dequantized(layer)
    # Equal but where a scale or a value lies on the edge between two codes.
    assert (actual - expected).abs().gt(1e-5).float().mean() < 2e-3
    x = torch.randn(5, shape[1])
    torch.testing.assert_close(layer(x), x @ actual.T, rtol=0, atol=1e-4)


def test_a_validation_leaves_nf4_layers_as_they_are() -> None:
    # bitsandbytes would lay the codes out anew here, with rounded scales and without a gradient.
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = nf4_linear(bnb, weight, None, CPU)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(4, 128).bfloat16())
    assert all(torch.equal(t, before[n]) for n, t in layer.state_dict().items())
    layer.train()
    x = torch.randn(4, 128).bfloat16().requires_grad_()
    layer(x).float().sum().backward()
    expected = dequantized(layer).float().sum(0).expand_as(x)
    torch.testing.assert_close(x.grad.float(), expected, rtol=2e-2, atol=2e-2)


def test_int8_equals_a_written_out_reference() -> None:
    linear = nn.Linear(64, 48, bias=True)
    layer = int8_linear(bnb, deepcopy(linear), 6.0, CPU)
    half = linear.weight.detach().half().float()
    amax = half.abs().amax(1, keepdim=True)
    expected = (half * 127 / amax).round() * amax / 127
    torch.testing.assert_close(dequantized_int8(layer), expected, rtol=0, atol=1e-6)
    x = torch.randn(4, 64)
    x[:, 3] = 20.0  # an outlier feature: multiplied in 16 bits
    inputs = x.clone()
    inputs[:, 3] = 0.0
    rows = inputs.half().float().abs().amax(1, keepdim=True)
    rounded = (inputs * 127 / rows).round() * rows / 127
    rounded[:, 3] = 20.0
    torch.testing.assert_close(layer(x), rounded @ expected.T + linear.bias, rtol=0, atol=0.05)


@pytest.mark.parametrize(("kind", "settings", "trained"), CASES, ids=[c[0].name for c in CASES])
def test_it_trains_resumes_and_merges(
    kind: type[Method], settings: dict[str, int], trained: list[str], tiny_llama: LlamaForCausalLM
) -> None:
    model = check_training(kind(**settings), tiny_llama, trained, 0.05)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    state = check_resume(lambda: kind(**settings), tiny_llama, 0.05)
    assert set(state) == set(trained)
    # LLM.int8 rounds its inputs to 8 bits, which the merged model does not: to 1/127 of a row's
    # largest value, up to 6, so that values around 1 are off by 1.4%, and more after some layers.
    check_merge(kind(**settings), tiny_llama, 0.05, share=0.05 if kind is LLMInt8LoRA else None)


def test_qlora_as_a_run(cli: Callable, tiny_run: Callable, tmp_path: Path) -> None:
    state = check_run(cli, configure(tiny_run(), "QLoRA", 0.05, rank=4), tmp_path)
    assert set(state) == {f"model.{name}" for name in PEFT}


def test_loftq_starts_closer_to_the_model_than_qlora(tiny_llama: LlamaForCausalLM) -> None:
    def error(method: Method) -> float:
        model = method.merge(prepared(method, tiny_llama, torch.float32))
        weights = [
            (model.get_submodule(n).weight - tiny_llama.get_submodule(n).weight).norm()
            for n in LAYERS
        ]
        return float(torch.stack(weights).norm().detach())

    one, five = LoftQ(rank=8, iterations=1), LoftQ(rank=8, iterations=5)
    assert error(five) < error(one) < 0.9 * error(QLoRA(rank=8))


def test_qdylora_trains_the_rank_of_the_step(tiny_llama: LlamaForCausalLM) -> None:
    method = QDyLoRA(rank=8, serve_rank=2)
    model = prepared(method, tiny_llama)
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    ranks = set()
    for step in range(6):
        train_steps(method, model, 0.05, range(step, step + 1))
        assert len({layer.active for layer in layers}) == 1
        ranks.add(layers[0].active)
    assert len(ranks) > 2 and ranks <= set(range(1, 9))
    again = QDyLoRA(rank=8)
    other = prepared(again, tiny_llama)
    again.before_step(other, 5)
    other.train()
    assert next(m for m in other.modules() if isinstance(m, LowRankLinear)).trained == (
        layers[0].trained
    )
    logits(method, model)
    assert {layer.active for layer in layers} == {2}
    delta = layers[0].delta()
    assert torch.linalg.matrix_rank(delta) == 2
    with pytest.raises(InputError, match="from 1 to 4"):
        QDyLoRA(rank=4, serve_rank=5)

"""The INT4 quantisers of QA-LoRA and PEQA, the packing of codes, and the gradient of scales."""

from __future__ import annotations

import math

import torch
from torch import nn

from lit_modules.methods.packing import pack4, pack6, pairs6, unpack4
from lit_modules.methods.peqa import SHRINKINGS, ScaledLinear
from lit_modules.methods.qa_lora import Int4Linear, PooledLora


def linear(out: int, inputs: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(inputs, out, bias=bias).requires_grad_(False)
    layer.weight[0, :8] = 0.25  # a group of equal values
    layer.weight[1] = 0.0
    layer.weight[2] = layer.weight[2].abs() + 1.0  # nothing below zero
    return layer


def test_packing_keeps_every_bit() -> None:
    codes = torch.arange(64, dtype=torch.uint8).repeat(3, 1)
    assert pack6(codes).shape == (3, 48)
    pairs = pairs6(pack6(codes))
    assert torch.equal(torch.stack([pairs & 63, pairs >> 6], -1).flatten(1), codes.int())
    codes %= 16
    assert pack4(codes).shape == (3, 32)
    assert torch.equal(unpack4(pack4(codes)), codes)


def test_qa_lora_quantises_as_the_paper_says() -> None:
    layer = linear(5, 32)
    made = Int4Linear(layer, 8, "layer")
    values = made.dequantise(torch.float32)
    codes = unpack4(made.codes)
    for row in range(5):
        for group in range(4):
            part = layer.weight[row, 8 * group : 8 * group + 8].tolist()
            low, high = min(part), max(part)
            for i, weight in enumerate(part):
                if high == low:
                    assert abs(float(values[row, 8 * group + i]) - weight) < 1e-6
                    continue
                alpha = (high - low) / 15
                code = round((weight - low) / alpha)
                assert int(codes[row, 8 * group + i]) == code
                expected = alpha * code + low
                assert abs(float(values[row, 8 * group + i]) - expected) < 1e-5
                assert abs(expected - weight) <= alpha / 2 + 1e-6


def test_pooled_adapter_is_the_papers_algorithm() -> None:
    layer = linear(6, 32, bias=True)
    x = torch.randn(3, 5, 32)
    for pooling, factor in (("sum", 8.0), ("mean", 1.0)):
        adapted = PooledLora(Int4Linear(layer, 8, "layer"), 2, 6.0, pooling)  # type: ignore[arg-type]
        nn.init.normal_(adapted.B)
        pooled = nn.AvgPool1d(8)(x) * factor  # Alg. 1: QA(x) * (D_in // L)
        expected = nn.functional.linear(x, adapted.base.dequantise(torch.float32), layer.bias)
        expected = expected + pooled @ adapted.A.t() @ adapted.B.t() * 3.0
        torch.testing.assert_close(adapted(x), expected)
        torch.testing.assert_close(adapted.merged()(x), expected, atol=2e-5, rtol=1e-5)


def slow_peqa(weights: list[float]) -> tuple[float, float]:
    """Least squared error over shrunken ranges, one number at a time; error and s."""
    low, high = min(0.0, *weights), max(0.0, *weights)
    best = (math.inf, 0.0)
    for shrinking in SHRINKINGS:
        scale = (high - low) * shrinking / 15 or 1.0
        zero = round(-low * shrinking / scale)
        codes = [min(15, max(0, round(w / scale) + zero)) for w in weights]
        error = sum((scale * (q - zero) - w) ** 2 for q, w in zip(codes, weights, strict=True))
        if error < best[0]:
            best = error, scale
    return best


def test_peqa_takes_scales_of_least_error() -> None:
    layer = linear(5, 32)
    for size in (None, 8):
        made = ScaledLinear(layer, size, "layer")
        values, width = made.dequantise(torch.float32), size or 32
        shrunk = 0
        for row in range(5):
            for start in range(0, 32, width):
                part = layer.weight[row, start : start + width]
                error, scale = slow_peqa(part.tolist())
                taken = values[row, start : start + width]
                # Two ranges may be as good as each other to float32, so the error is compared.
                assert abs(float((taken - part).square().sum()) - error) <= 1e-5 * error + 1e-12
                shrunk += scale < (max(0, *part.tolist()) - min(0, *part.tolist())) / 15 * 0.999
        assert shrunk > 0  # else the search would be for nothing


def test_gradient_of_scales_is_autograds() -> None:
    layer = linear(6, 32, bias=True)
    made = ScaledLinear(layer, 8, "layer")
    x = torch.randn(2, 5, 32, requires_grad=True)
    grad = torch.randn(2, 5, 6)
    made(x).backward(grad)
    scale, again = made.scale.detach().requires_grad_(), x.detach().requires_grad_()
    weight = (made.steps() * scale[..., None]).flatten(1)
    nn.functional.linear(again, weight, layer.bias).backward(grad)
    assert made.scale.grad is not None
    torch.testing.assert_close(made.scale.grad, scale.grad)
    torch.testing.assert_close(x.grad, again.grad)

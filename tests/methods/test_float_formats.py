"""FP6 and MX weights against the formats' definitions, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from falqon.errors import InputError
from lit_modules.methods.fp6 import Fp6Linear
from lit_modules.methods.mx import MxLinear


def values_of(exponent_bits: int, mantissa_bits: int, bias: int) -> list[float]:
    """All values not below zero of a format without infinities and NaN, by code."""
    values = []
    for code in range(1 << (exponent_bits + mantissa_bits)):
        exponent, mantissa = code >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
        share = mantissa / (1 << mantissa_bits)
        values.append(
            share * 2.0 ** (1 - bias) if exponent == 0 else (1 + share) * 2.0 ** (exponent - bias)
        )
    return values


FORMATS = {
    "e3m2": values_of(3, 2, 3),
    "e2m3": values_of(2, 3, 1),
    "mxfp4": values_of(2, 1, 1),
    "mxfp8": values_of(4, 3, 7)[:-1],  # the last code of E4M3 is NaN
}


def nearest(x: float, values: list[float]) -> float:
    """The nearest value, ties to the even code; what is beyond the largest saturates."""
    magnitude = abs(x)
    code = min(range(len(values)), key=lambda c: (abs(values[c] - magnitude), c & 1))
    return math.copysign(values[code], x)


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(64, 7, bias=True).requires_grad_(False)
    layer.weight[0] = 0.0
    layer.weight[1] *= torch.logspace(-6, 3, 64)  # subnormals and outliers
    layer.weight[2, 0] = 28.0  # the largest of E3M2: the others of the row then hit ties
    layer.weight[2, 1:17] = torch.arange(16) * 0.25 + 0.125
    return layer


def test_the_formats_are_those_of_the_papers() -> None:
    assert max(FORMATS["e3m2"]) == 28.0
    assert max(FORMATS["e2m3"]) == 7.5
    assert max(FORMATS["mxfp8"]) == 448.0
    assert FORMATS["mxfp4"] == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


@pytest.mark.parametrize("fmt", ["e3m2", "e2m3"])
def test_fp6(fmt: str, layer: nn.Linear) -> None:
    made = Fp6Linear(layer, fmt, "layer")  # type: ignore[arg-type]
    assert made.codes.shape == (7, 48)  # six bits a weight
    result = made.dequantise(torch.float32)
    for row in range(7):
        weights = layer.weight[row]
        amax = weights.abs().max()
        scale = amax / max(FORMATS[fmt]) if amax > 0 else torch.tensor(1.0)
        for weight, value in zip(weights, result[row], strict=True):
            expected = nearest(float(weight / scale), FORMATS[fmt])
            assert float(value) == float(torch.tensor(expected) * scale)


@pytest.mark.parametrize(("fmt", "largest_exponent"), [("mxfp8", 8), ("mxfp4", 2)])
def test_mx(fmt: str, largest_exponent: int, layer: nn.Linear) -> None:
    made = MxLinear(layer, fmt, "layer")  # type: ignore[arg-type]
    assert made.codes.numel() * 8 == 7 * 64 * int(fmt[-1])
    result = made.dequantise(torch.float32)
    for row in range(7):
        for block in range(2):
            part = layer.weight[row, 32 * block : 32 * block + 32].tolist()
            amax = max(abs(w) for w in part)
            if amax == 0:
                assert not result[row, 32 * block : 32 * block + 32].any()
                continue
            exponent = math.floor(math.log2(amax)) - largest_exponent
            assert int(made.scale[row, block]) == exponent + 127
            for i, weight in enumerate(part):
                expected = nearest(weight / 2.0**exponent, FORMATS[fmt]) * 2.0**exponent
                assert float(result[row, 32 * block + i]) == expected


@pytest.mark.parametrize("fmt", ["mxfp8", "mxfp4"])
def test_mx_values_are_torchaos_and_exact_in_bfloat16(fmt: str, layer: nn.Linear) -> None:
    made = MxLinear(layer, fmt, "layer")  # type: ignore[arg-type]
    exact = made.dequantise(torch.float32)
    assert torch.equal(made.dequantise(torch.bfloat16).float(), exact)
    codes = made.codes if fmt == "mxfp4" else made.codes.view(torch.float8_e4m3fn)
    kind = torch.float4_e2m1fn_x2 if fmt == "mxfp4" else torch.float8_e4m3fn
    scale = made.scale.view(torch.float8_e8m0fnu)
    library = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    assert torch.equal(exact, library.to_dtype(codes, scale, kind, 32, torch.float32))


@pytest.mark.parametrize("kind", [Fp6Linear, MxLinear])
def test_forward_and_gradient_are_those_of_the_values(kind: type, layer: nn.Linear) -> None:
    made = kind(layer, "e3m2" if kind is Fp6Linear else "mxfp4", "layer")
    x = torch.randn(2, 3, 64, requires_grad=True)
    grad = torch.randn(2, 3, 7)
    out = made(x)
    out.backward(grad)
    weight = made.dequantise(torch.float32)
    torch.testing.assert_close(out, x @ weight.t() + layer.bias)
    torch.testing.assert_close(x.grad, grad @ weight)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(InputError, match="layer has 30 input features; FP6"):
        Fp6Linear(nn.Linear(30, 4), "e3m2", "layer")
    with pytest.raises(InputError, match="layer has 48 input features; MX"):
        MxLinear(nn.Linear(48, 4), "mxfp4", "layer")

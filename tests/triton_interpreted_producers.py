"""RMS norm and SwiGLU with quantisation in Triton's interpreter, against the separate operations.

Run by test_triton.py in a process of its own. Sums of squares and exponentials may differ in the
last bit of float32, so a value that lies next to the middle of two codes may become the other one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from falqon.fp8 import E4M3, E5M2, quantize
from falqon.kernels.rms_norm_quantize_triton import rms_norm_grad_triton, rms_norm_quantize_triton
from falqon.kernels.swiglu_quantize_triton import swiglu_grad_triton, swiglu_quantize_triton
from tests.policies import random

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (15, 16), (17, 129), (3, 576)]


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As in Llama: float32 statistics, rounded, times the weight, rounded."""
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + epsilon)
    return weight * (wide * inverse).to(x.dtype)


def nearly_same(ours: Tensor, codes: Tensor) -> None:
    """At most one code in a thousand is the one next to the right one."""
    apart = (ours.to(torch.int16) - codes.to(torch.int16)).abs()
    assert int(apart.max()) <= 1
    assert int(apart.sum()) <= 1 + codes.numel() // 1000


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_quantize(shape: tuple[int, int], dtype: torch.dtype) -> None:
    count, features = shape
    wide = (random(count, 2 * features, seed=1) * 3).to(dtype)
    weight = (1 + random(features, seed=2) / 4).to(dtype)
    for x in (wide[:, :features], wide[:, ::2]):
        for fmt, rounding in ((E4M3, "power_of_two"), (E5M2, "none")):
            codes, scale = quantize(norm(x, weight, 1e-5), fmt, "per_token", rounding)  # type: ignore[arg-type]
            ours, factor, inverse = rms_norm_quantize_triton(x, weight, 1e-5, fmt, rounding)  # type: ignore[arg-type]
            torch.testing.assert_close(
                factor, scale, rtol=1e-2 if rounding == "none" else 0, atol=0
            )
            nearly_same(ours, codes)
            mean = x.double().square().mean(dim=-1, keepdim=True)
            torch.testing.assert_close(inverse.double(), (mean + 1e-5).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)  # of a single value little is left
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_grad(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (random(*shape, seed=1) * 3).to(dtype)
    weight = (1 + random(shape[1], seed=2) / 4).to(dtype)
    grad = random(*shape, seed=3).to(dtype)
    _, _, inverse = rms_norm_quantize_triton(x, weight, 1e-5, E4M3, "power_of_two")
    ours = rms_norm_grad_triton(grad, x, weight, inverse)
    exact = x.double().requires_grad_()
    norm_of = exact * (exact.square().mean(dim=-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    norm_of.backward(grad.double())
    assert ours.dtype == dtype
    compare(ours, exact.grad)


def compare(ours: Tensor, exact: Tensor | None) -> None:
    """Within a few roundings of the dtype, relative to the largest value of the row."""
    assert exact is not None
    epsilon = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-21}
    size = exact.abs().amax(dim=1, keepdim=True) + 1e-6
    assert ((ours.double() - exact).abs() / size).max() < 4 * epsilon[ours.dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_quantize(shape: tuple[int, int], dtype: torch.dtype) -> None:
    count, features = shape
    wide = (random(count, 2 * features, seed=1) * 3).to(dtype)
    up = random(count, features, seed=2).to(dtype)
    arguments: Any
    for gate in (wide[:, :features], wide[:, ::2]):
        for arguments in ((E4M3, "power_of_two"), (E5M2, "none")):
            fmt, rounding = arguments
            product = functional.silu(gate) * up
            codes, scale = quantize(product, fmt, "per_token", rounding)
            ours, factor = swiglu_quantize_triton(gate, up, fmt, rounding)
            torch.testing.assert_close(
                factor, scale, rtol=1e-2 if rounding == "none" else 0, atol=0
            )
            nearly_same(ours, codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swiglu_grad(shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate = (random(*shape, seed=1) * 3).to(dtype)
    up, grad = (random(*shape, seed=seed).to(dtype) for seed in (2, 3))
    of_gate, of_up = swiglu_grad_triton(grad, gate, up)
    leaves = gate.double().requires_grad_(), up.double().requires_grad_()
    (functional.silu(leaves[0]) * leaves[1]).backward(grad.double())
    compare(of_gate, leaves[0].grad)
    compare(of_up, leaves[1].grad)


def test_extreme_gates_stay_finite() -> None:
    gate = torch.tensor([[-3e38, -200.0, -0.0, 0.0, 200.0, 3e38]]).to(torch.bfloat16)
    up = torch.ones_like(gate)
    codes, scale = quantize(functional.silu(gate) * up, E4M3, "per_token")
    ours, factor = swiglu_quantize_triton(gate, up, E4M3, "power_of_two")
    assert torch.equal(factor, scale)
    assert torch.equal(ours & 0x7F, codes & 0x7F)
    of_gate, _ = swiglu_grad_triton(up, gate, up)
    assert torch.isfinite(of_gate).all()


def test_no_rows() -> None:
    nothing, weight = torch.zeros(0, 8), torch.ones(8)
    codes, scale, _ = rms_norm_quantize_triton(nothing, weight, 1e-5, E4M3, "power_of_two")
    assert codes.shape == (0, 8) and scale.shape == (0, 1)
    codes, scale = swiglu_quantize_triton(nothing, nothing, E4M3, "power_of_two")
    assert codes.shape == (0, 8) and scale.shape == (0, 1)
    assert rms_norm_grad_triton(nothing, nothing, weight, scale).shape == (0, 8)
    assert swiglu_grad_triton(nothing, nothing, nothing)[0].shape == (0, 8)

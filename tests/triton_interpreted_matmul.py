"""Matmuls in Triton's interpreter, against products in double precision.

FP8 products are exact in float32, sums of n of them are within n 2^-24 of the sum of magnitudes;
the results are then rounded once to their dtype. Run by test_triton.py in a process of its own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falqon.fp8 import E4M3, E5M2, Format, decode, encode
from falqon.kernels import matmul_triton as module
from falqon.kernels.matmul_triton import matmul_triton
from falqon.kernels.proxy_grad import proxy_grad
from falqon.kernels.proxy_grad_triton import TOKENS_A_PART, proxy_grad_triton
from falqon.kernels.scaled_matmul import ADAPTER, Segment
from falqon.kernels.transpose_triton import transpose_triton
from tests.policies import random

DEVICES = {
    "half": (False, 80),
    "ada": (True, 89),
    "hopper": (True, 90),
    "blackwell": (True, 100),
    "rtx50": (True, 120),
}
EPSILON = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    native, arch = DEVICES[request.param]
    monkeypatch.setattr(module, "has_fp8_units", lambda _: native)
    monkeypatch.setattr(module, "architecture", lambda _: arch)
    return str(request.param)


def codes(rows: int, columns: int, fmt: Format, seed: int) -> Tensor:
    spread = random(rows, columns, seed=seed + 1).mul(2).exp2()
    return encode(random(rows, columns, seed=seed) * spread, fmt)


def scales(*shape: int) -> Tensor:
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(1)).float().exp2()


def group(outs: tuple[int, ...], rank: int) -> tuple[Segment, ...]:
    """Segments of stacked members."""
    segments: list[Segment] = []
    row = 0
    for number, out in enumerate(outs):
        segments += [(row, out, 0, number), (row + out, rank, number * rank, ADAPTER)]
        row += out + rank
    return tuple(segments)


def check(ours: Tensor, left: Tensor, right: Tensor, unit: Tensor, bias: Tensor | None) -> None:
    """Each value within what float32 sums and the roundings of the result allow."""
    exact = left.double() @ right.double().t() / unit.double()
    summed = left.double().abs() @ right.double().abs().t() / unit.double()
    bound = left.shape[1] * 2.0**-24 * summed + EPSILON[ours.dtype] * exact.abs()
    if bias is not None:
        exact = exact + bias.double()
        bound += EPSILON[ours.dtype] * exact.abs()
    tiny = 2.0**-25 if ours.dtype == torch.float16 else 1e-30  # half its smallest number
    assert (ours.double() - exact).abs().le(bound + tiny).all()


FORWARD = [
    # tokens, in, outputs of the members, r, a scale a token (and a bias)
    (17, 129, (33,), 5, True),
    (1, 16, (15,), 1, False),
    (1, 1, (1,), 1, True),
    (130, 160, (128, 16, 48), 16, True),
    (70, 272, (256, 129), 17, False),
    (15, 128, (144, 16), 15, False),
]


@pytest.mark.parametrize("shape", FORWARD, ids=str)
@pytest.mark.parametrize("dtype", EPSILON, ids=str)
def test_forward(
    shape: tuple[int, int, tuple[int, ...], int, bool], dtype: torch.dtype, device: str
) -> None:
    tokens, features, outs, rank, per_token = shape
    segments = group(outs, rank)
    left = codes(tokens, features, E4M3, 1)
    right = codes(sum(outs) + len(outs) * rank, features, E4M3, 3)
    left_scale = 64 * (scales(tokens, 1) if per_token else scales(1))  # within float16's range
    right_scale = 64 * scales(len(outs))
    bias = random(sum(outs)).to(dtype) if per_token else None
    found, adapter = matmul_triton(
        left, left_scale, "e4m3", right, right_scale, segments, dtype, bias
    )
    assert [out.shape for out in found] == [(tokens, out) for out in outs]
    assert adapter.shape == (tokens, len(outs) * rank)
    biases = [None] * len(outs) if bias is None else list(bias.split(list(outs)))
    for number, (first, rows, column, to) in enumerate(segments):
        part = adapter[:, column : column + rows] if to == ADAPTER else found[to]
        given = None if to == ADAPTER else biases[to]
        weight = decode(right[first : first + rows].contiguous(), E4M3)
        check(part, decode(left, E4M3), weight, left_scale * right_scale[number // 2], given)


@pytest.mark.parametrize("features", [16, 129])
def test_a_scale_for_each_output_row(features: int, device: str) -> None:
    tokens, outs, rank = 20, (33, 16), 5
    segments = group(outs, rank)
    left = codes(tokens, features, E4M3, 1)
    right = codes(sum(outs) + len(outs) * rank, features, E4M3, 3)
    scale = scales(len(right))
    found, adapter = matmul_triton(
        left, torch.ones(1), "e4m3", right, scale, segments, torch.float32
    )
    for first, rows, column, to in segments:
        part = adapter[:, column : column + rows] if to == ADAPTER else found[to]
        here = slice(first, first + rows)
        weight = decode(right[here].contiguous(), E4M3)
        check(part, decode(left, E4M3), weight, scale[here][None, :], None)


@pytest.mark.parametrize(
    ("tokens", "features", "outs", "rank"),
    [(17, 129, (33,), 5), (1, 1, (1,), 1), (70, 144, (272,), 16), (20, 48, (128, 256, 31), 16)],
)
@pytest.mark.parametrize("row_major", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
def test_backward(
    tokens: int,
    features: int,
    outs: tuple[int, ...],
    rank: int,
    row_major: bool,
    per_token: bool,
    device: str,
) -> None:
    stacked = codes(sum(outs) + len(outs) * rank, features, E4M3, 3)
    grad = codes(tokens, sum(outs), E5M2, 5)
    scale, unit = scales(tokens, 1) if per_token else scales(1), scales(1)
    backbones = [stacked[s[0] : s[0] + s[1]] for s in group(outs, rank)[::2]]
    cuts = tuple(torch.tensor(outs).cumsum(0)[:-1].tolist())
    turned = transpose_triton(stacked, sum(outs), cuts, rank)
    assert torch.equal(turned, torch.cat(backbones).t())
    right, where = (stacked, cuts) if row_major else (turned, None)
    (ours,), _ = matmul_triton(
        grad,
        scale,
        "e5m2",
        right,
        unit,
        ((0, features, 0, 0),),
        torch.bfloat16,
        cuts=where,
        rank=rank,
    )
    check(ours, decode(grad, E5M2), decode(turned, E4M3), scale * unit, None)


def test_no_tokens() -> None:
    nothing = torch.zeros(0, 8, dtype=torch.uint8)
    (out,), adapter = matmul_triton(
        nothing,
        torch.ones(1),
        "e4m3",
        torch.zeros(6, 8, dtype=torch.uint8),
        torch.ones(1),
        group((4,), 2),
        torch.float32,
    )
    assert out.shape == (0, 4) and adapter.shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (17, 129, 5), (TOKENS_A_PART + 1, 15, 16), (3, 8, 129)]
)
def test_proxy_grad(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, out, rank = shape
    wide = random(tokens, 2 * out, seed=1).to(dtype)
    for grad in (wide[:, :out], wide[:, :out].contiguous(), wide[:, ::2]):
        adapter = random(tokens, rank, seed=2).to(dtype)
        ours = proxy_grad_triton(grad, adapter)
        assert ours.dtype == torch.float32
        exact = grad.double().t() @ adapter.double()
        summed = grad.double().abs().t() @ adapter.double().abs()
        assert (ours - exact).abs().le(tokens * 2.0**-24 * summed + 1e-30).all()
        torch.testing.assert_close(ours, proxy_grad(grad, adapter), rtol=1e-4, atol=1e-4)


def test_the_gradient_is_the_same_every_time() -> None:
    tokens = 3 * TOKENS_A_PART + 7
    grad, adapter = random(tokens, 4, seed=1), random(tokens, 130, seed=2)
    first = proxy_grad_triton(grad, adapter)
    assert torch.equal(proxy_grad_triton(grad, adapter), first)
    assert torch.equal(proxy_grad_triton(grad, adapter[:, :3].contiguous()), first[:, :3])


def test_more_layers_than_a_launch_takes() -> None:
    with pytest.raises(ValueError, match="at most 3 layers"):
        matmul_triton(
            torch.zeros(1, 16, dtype=torch.uint8),
            torch.ones(1),
            "e4m3",
            torch.zeros(4 * 18, 16, dtype=torch.uint8),
            torch.ones(4),
            group((16, 16, 16, 16), 2),
            torch.float32,
        )
    with pytest.raises(ValueError, match="at most two cuts"):
        transpose_triton(torch.zeros(20, 4, dtype=torch.uint8), 8, (2, 4, 6), 4)

"""Quantisers in Triton's interpreter, bit for bit against `falqon.fp8`.

Run by test_triton.py in a process of its own: the interpreter is chosen when kernels are defined.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.fp8 import E4M3, E5M2, Format, compute_scale, decode, encode, quantize
from falqon.kernels import quantize_triton as module
from falqon.kernels.quantize_triton import quantize_delayed_triton, quantize_triton
from falqon.kernels.triton_fp8 import decode_half, encode_e5m2, magnitude_bits, scale_of
from falqon.recipe import Granularity, ScaleRounding
from tests.policies import random

FORMATS = [E4M3, E5M2]
ALL_BFLOAT16 = torch.arange(1 << 16).to(torch.int32).bitwise_left_shift(16).view(torch.float32)


@triton.jit
def scale_kernel(x, scale, FORMAT: tl.constexpr, POWER_OF_TWO: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(scale + at, scale_of(magnitude_bits(tl.load(x + at)), FORMAT, POWER_OF_TWO))


@triton.jit
def half_kernel(codes, values, FORMAT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(values + at, decode_half(tl.load(codes + at), FORMAT))


@triton.jit
def encode_kernel(x, codes, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(codes + at, encode_e5m2(tl.load(x + at)).to(tl.uint8))


@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_scale_of_every_amax(fmt: Format, rounding: ScaleRounding) -> None:
    limits = fmt.max * 2.0 ** torch.arange(-130, 100)
    around = torch.cat([limits, limits.nextafter(torch.tensor(torch.inf)), 1 / limits])
    x = torch.cat([ALL_BFLOAT16, around, random((1 << 16) - len(around)).exp()])
    scale = torch.zeros_like(x)
    scale_kernel[(1,)](
        x, scale, FORMAT=int(fmt.name[1]), POWER_OF_TWO=rounding == "power_of_two", BLOCK=len(x)
    )
    assert torch.equal(scale, compute_scale(x.abs(), fmt, rounding))


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_every_code_in_half_precision(fmt: Format) -> None:
    codes, values = torch.arange(256, dtype=torch.uint8), torch.zeros(256, dtype=torch.float16)
    half_kernel[(1,)](codes, values, FORMAT=int(fmt.name[1]), BLOCK=256)
    expected = decode(codes, fmt, torch.float16)
    assert torch.equal(torch.isnan(values), torch.isnan(expected))
    known = ~torch.isnan(expected)
    assert torch.equal(values.view(torch.int16)[known], expected.view(torch.int16)[known])


def test_rounding_to_e5m2() -> None:
    points = decode(torch.arange(0x7C, dtype=torch.uint8), E5M2)
    middles = (points[1:] + points[:-1]) / 2
    around = [middles, *(middles.nextafter(torch.tensor(x)) for x in (torch.inf, -torch.inf))]
    ties = torch.cat([*around, *(-x for x in around)])
    x = torch.cat([ALL_BFLOAT16, ties, random((1 << 16) - len(ties)) * 100])
    codes = torch.zeros(x.shape, dtype=torch.uint8)
    encode_kernel[(1,)](x, codes, BLOCK=len(x))
    known = ~torch.isnan(x)
    assert torch.equal(codes[known], encode(x, E5M2)[known])
    assert ((codes[~known] & 0x7F) == 0x7F).all()


def layouts(x: Tensor) -> dict[str, Tensor]:
    """The same values in memory as they are, in columns, and with gaps."""
    return {
        "rows": x,
        "columns": x.t().contiguous().t(),
        "gaps": torch.stack([x, x], dim=-1).flatten(1)[:, ::2] if x.numel() else x,
    }


def same(ours: Tensor, expected: Tensor, x: Tensor) -> None:
    """Equal codes; every NaN is some NaN."""
    known = ~torch.isnan(x)
    assert torch.equal(ours[known], expected[known])
    assert ((ours[~known] & 0x7F) > 0x7C).all()


@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_quantize(fmt: Format, granularity: Granularity, rounding: ScaleRounding) -> None:
    for shape in [(1, 1), (15, 16), (17, 129), (130, 70)]:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            spread = random(*shape, seed=2).mul(3).exp2()
            values = (random(*shape, seed=1) * spread).to(dtype)
            values[0] = 0.0
            for x in layouts(values).values():
                codes, scale = quantize(x, fmt, granularity, rounding)
                turn = granularity == "per_tensor"
                ours, factor, turned = quantize_triton(x, fmt, granularity, rounding, turn)
                assert torch.equal(factor, scale)
                assert torch.equal(ours, codes)
                assert turned is None or torch.equal(turned, codes.t())


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
@pytest.mark.parametrize("finite", [True, False])
def test_quantize_all_of_bfloat16(fmt: Format, granularity: Granularity, finite: bool) -> None:
    x = ALL_BFLOAT16.to(torch.bfloat16)
    x = x[torch.isfinite(x)][:65024].reshape(254, 256) if finite else x.reshape(256, 256)
    codes, scale = quantize(x, fmt, granularity)
    ours, factor, _ = quantize_triton(x, fmt, granularity, "power_of_two")
    assert torch.equal(factor, scale)
    same(ours, codes, x)


def test_rows_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LONGEST_ROW", 64)
    x = random(5, 200).to(torch.bfloat16)
    ours, factor, _ = quantize_triton(x, E4M3, "per_token", "none")
    codes, scale = quantize(x, E4M3, "per_token", "none")
    assert torch.equal(ours, codes)
    assert torch.equal(factor, scale)


def test_more_tiles_than_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE", 64)
    monkeypatch.setattr(module, "PARTS", 4)
    x = random(40, 30)
    ours, factor, _ = quantize_triton(x, E5M2, "per_tensor", "none")
    codes, scale = quantize(x, E5M2, rounding="none")
    assert torch.equal(ours, codes)
    assert torch.equal(factor, scale)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_nothing_to_quantize(shape: tuple[int, int], granularity: Granularity) -> None:
    x = torch.zeros(shape)
    codes, scale = quantize(x, E4M3, granularity)
    ours, factor, _ = quantize_triton(x, E4M3, granularity, "power_of_two")
    assert torch.equal(ours, codes)
    assert torch.equal(factor, scale)
    ours, amax, beyond = quantize_delayed_triton(x, E4M3, torch.ones(1), True)
    assert ours.shape == shape
    assert amax is not None and not amax.any() and beyond is not None and int(beyond) == 0


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f.name)
def test_delayed(fmt: Format) -> None:
    x = ALL_BFLOAT16.to(torch.bfloat16).reshape(256, 256)
    finite = torch.where(torch.isfinite(x), x, 0)
    for scale in (torch.tensor([2.0**-3]), torch.tensor([0.3])):
        rounding: ScaleRounding = "power_of_two" if scale == 2.0**-3 else "none"
        expected, _ = quantize(x, fmt, rounding=rounding, scale=scale)
        ours, nothing, _ = quantize_delayed_triton(x, fmt, scale, False)
        assert nothing is None
        same(ours, expected, x)
        ours, amax, beyond = quantize_delayed_triton(finite, fmt, scale, True)
        assert amax is not None and beyond is not None
        assert torch.equal(amax, finite.abs().amax().float().reshape(1))
        assert int(beyond) == int((finite.abs() > fmt.max * (1 + 2**-20) / scale).sum())

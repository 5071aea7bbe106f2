"""FP8 rounding, scales and random bits, against definitions written down independently here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from falqon import fp8
from falqon.fp8 import (
    E4M3,
    E5M2,
    Format,
    all_finite,
    amax_of,
    compute_scale,
    decode,
    dequantize,
    encode,
    encode_stochastic,
    largest,
    philox,
    quantize,
)
from falqon.recipe import Granularity, ScaleRounding

both_formats = pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
both_roundings = pytest.mark.parametrize("rounding", ["power_of_two", "none"])
ALL_CODES = torch.arange(256, dtype=torch.uint8)


def value_of(code: int, fmt: Format) -> float:
    """The value of a code by the OCP FP8 definition, in Python floats."""
    mantissa_bits, bias = (3, 7) if fmt is E4M3 else (2, 15)
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if fmt is E4M3 and code & 0x7F == 0x7F:
        return float("nan")
    if fmt is E5M2 and exponent == 31:
        return sign * float("inf") if mantissa == 0 else float("nan")
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / 2**mantissa_bits) * 2.0 ** (exponent - bias)


def magnitudes(fmt: Format) -> Tensor:
    """Finite values of the codes from 0 up, ascending, float64."""
    return torch.tensor([value_of(c, fmt) for c in range(fmt.max_code + 1)], dtype=torch.float64)


def nearest_even(x: Tensor, fmt: Format) -> Tensor:
    """Codes by search over all values: the nearest, of two equally near the even code."""
    table = magnitudes(fmt)
    size = x.to(torch.float64).abs().clamp(max=fmt.max)
    low = (torch.searchsorted(table, size, right=True) - 1).clamp(0, len(table) - 1)
    high = (low + 1).clamp(max=len(table) - 1)
    below, above = size - table[low], table[high] - size
    up = (above < below) | ((above == below) & (low % 2 == 1))
    return (torch.where(up, high, low) | (torch.signbit(x).long() << 7)).to(torch.uint8)


def all_bfloat16() -> Tensor:
    return torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)


def spread(generator: torch.Generator, *shape: int) -> Tensor:
    """Normal numbers times powers of two from 2^-24 to 2^24, some exact zeros."""
    powers = torch.randint(-24, 25, shape, generator=generator)
    x = torch.ldexp(torch.randn(shape, generator=generator), powers)
    return torch.where(torch.rand(shape, generator=generator) < 0.05, torch.zeros(()), x)


# -- encode and decode --------------------------------------------------------------------------


@both_formats
def test_encode_equals_torch_cast_and_search_on_every_bfloat16(fmt: Format) -> None:
    x = all_bfloat16()
    assert len(x.view(torch.int16).unique()) == 65536
    codes, number = encode(x, fmt), ~torch.isnan(x)
    assert torch.equal(codes[number], nearest_even(x[number], fmt))
    within = x.abs() <= fmt.max
    assert torch.equal(codes[within], x[within].to(fmt.dtype).view(torch.uint8))
    beyond = number & ~within
    assert torch.equal(decode(codes[beyond], fmt), fmt.max * x[beyond].float().sign())
    assert torch.isnan(decode(codes[~number], fmt)).all()
    assert torch.equal(encode(x.float(), fmt)[number], codes[number])


@both_formats
def test_encode_ties_to_even_at_every_midpoint(fmt: Format) -> None:
    table = magnitudes(fmt)
    middle = ((table[:-1] + table[1:]) / 2).float()  # exact: one more mantissa bit
    x = torch.cat(
        [middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(9e9))]
    )
    x = torch.cat([x, -x])
    assert torch.equal(encode(x, fmt), nearest_even(x, fmt))


@both_formats
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_encode_of_other_dtypes(fmt: Format, dtype: torch.dtype) -> None:
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
    x = x[~torch.isnan(x)].to(dtype)
    assert torch.equal(encode(x, fmt), nearest_even(x, fmt))


@both_formats
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 1e30, -1e30])
def test_encode_saturates(fmt: Format, value: float) -> None:
    x = torch.tensor([value])
    expected = fmt.max if value > 0 else -fmt.max
    assert decode(encode(x, fmt), fmt).item() == expected
    assert decode(encode_stochastic(x, fmt, torch.tensor([-1])), fmt).item() == expected
    assert (448.0, 57344.0)[fmt is E5M2] == fmt.max


def test_encode_keeps_its_input_unless_told() -> None:
    x = torch.tensor([1e6, 3.0])
    encode(x, E4M3)
    assert x.tolist() == [1e6, 3.0]
    assert encode(x.clone(), E4M3, overwrite=True).equal(encode(x, E4M3))


@both_formats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_decode_of_every_code(fmt: Format, dtype: torch.dtype) -> None:
    expected = torch.tensor([value_of(c, fmt) for c in range(256)], dtype=torch.float64)
    values = decode(ALL_CODES, fmt, dtype)
    assert values.dtype == dtype
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0, equal_nan=True)
    assert torch.signbit(values[0x80])


@both_formats
def test_pair_table_equals_cast_for_every_pair(fmt: Format) -> None:
    pairs = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)
    codes = pairs.view(torch.uint8).view(256, 512)
    plain = codes.view(fmt.dtype).to(torch.bfloat16)
    fast = decode(codes, fmt, torch.bfloat16)
    assert torch.equal(fast.view(torch.int16), plain.view(torch.int16))


CODES = ALL_CODES[(ALL_CODES & 0x7F) != 0x7F].repeat(2)[:480]  # no NaN: they equal nothing
LAYOUTS = {
    "even": (CODES.view(20, 24), True),
    "odd size": (CODES[:35].view(5, 7), False),
    "odd rows": (CODES[:66].view(11, 6), True),
    "transposed": (CODES.view(20, 24).t(), False),
    "every second": (CODES[::2], False),
    "columns": (CODES.view(20, 24)[:, 2:6], False),
    "odd offset": (CODES[1:25], False),
    "even offset": (CODES[2:26].view(4, 6), True),
    "scalar": (CODES[3], False),
    "three dimensions": (CODES.view(2, 10, 24), True),
    "no rows": (CODES[:0].view(0, 24), True),
    "no columns": (CODES[:0].view(20, 0), True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pair_table_with_any_layout(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, fast = LAYOUTS[layout]
    table, used = fp8._pair_table, []
    monkeypatch.setattr(fp8, "_pair_table", lambda *a: used.append(a) or table(*a))
    values = decode(codes, E4M3, torch.bfloat16)
    assert bool(used) == fast
    assert values.shape == codes.shape
    expected = codes.view(torch.float8_e4m3fn).to(torch.bfloat16)
    assert torch.equal(values, expected)


def test_pair_table_first_needed_in_inference_mode_serves_training() -> None:
    fp8._pair_table.cache_clear()
    with torch.inference_mode():
        decode(CODES, E4M3, torch.bfloat16)
    values = decode(CODES, E4M3, torch.bfloat16)
    assert not values.is_inference()
    weight = torch.ones(len(CODES), dtype=torch.bfloat16, requires_grad=True)
    (weight * values).sum().backward()  # autograd refuses to save inference tensors
    assert torch.equal(weight.grad, values)


# -- scales -------------------------------------------------------------------------------------


@both_formats
def test_power_of_two_scale_is_the_largest_that_fits(fmt: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    # Every finite positive bit pattern is equally likely, so 1 in 255 is subnormal.
    bits = torch.randint(1, 0x7F800000, (20000,), generator=generator)
    edges = torch.tensor([1, 0x007FFFFF, 0x00800000, 0x7F7FFFFF])
    amax = torch.cat([bits, edges]).to(torch.int32).view(torch.float32)
    exact = torch.tensor([448.0, 57344.0, 1.0, 447.99997, 448.00003, 2.0**-100])
    amax = torch.cat([amax, exact])
    scale = compute_scale(amax, fmt)
    assert scale.dtype == torch.float32
    mantissa, _ = torch.frexp(scale)
    assert (mantissa == 0.5).all()
    landed = amax.double() * scale.double()
    assert (landed <= fmt.max).all()
    assert ((2 * landed > fmt.max) | (scale == 2.0**126)).all()
    assert torch.isfinite(1 / scale).all()


@both_formats
def test_plain_scale_is_the_float64_quotient_as_float32(fmt: Format) -> None:
    bits = torch.randint(1, 0x7F800000, (2000,), generator=torch.Generator().manual_seed(0))
    amax = bits.to(torch.int32).view(torch.float32)
    quotients = [min(fmt.max / a, 2.0**126) for a in amax.tolist()]  # Python floats: float64
    expected = torch.tensor(quotients, dtype=torch.float64).float()
    assert torch.equal(compute_scale(amax, fmt, "none"), expected)


@both_formats
@both_roundings
def test_scale_of_unusable_amax_is_one(fmt: Format, rounding: ScaleRounding) -> None:
    amax = torch.tensor([[0.0], [float("inf")], [float("nan")]])
    assert compute_scale(amax, fmt, rounding).tolist() == [[1.0], [1.0], [1.0]]


@both_roundings
def test_scale_of_extreme_float64_amax_stays_a_normal_float32(rounding: ScaleRounding) -> None:
    amax = torch.tensor([1e300, 5e-324], dtype=torch.float64)
    assert compute_scale(amax, E4M3, rounding).tolist() == [2.0**-126, 2.0**126]


def test_scale_does_not_depend_on_the_dtype_of_amax() -> None:
    amax = torch.tensor([0.3, 5.0, 1e-3], dtype=torch.bfloat16)
    assert compute_scale(amax, E4M3, "none").equal(compute_scale(amax.double(), E4M3, "none"))


# -- quantize -----------------------------------------------------------------------------------


@both_formats
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_bfloat16_path_equals_float32_path(fmt: Format, granularity: Granularity) -> None:
    x = spread(torch.Generator().manual_seed(1), 64, 96).bfloat16()
    x[0, :3] = torch.tensor([float("nan"), float("inf"), -1.0])
    x[1] = x[1] * 2.0**-130  # subnormal in bfloat16
    x[2, :2] = torch.tensor([3e38, 1e-38])
    x[3] = 0
    codes, scale = quantize(x, fmt, granularity)
    in_float32, same_scale = quantize(x.float(), fmt, granularity)
    assert torch.equal(scale, same_scale)
    assert torch.equal(codes, in_float32)


@both_formats
@both_roundings
def test_quantize_is_scale_and_nearest_code(fmt: Format, rounding: ScaleRounding) -> None:
    x = spread(torch.Generator().manual_seed(2), 16, 40)
    codes, scale = quantize(x, fmt, "per_tensor", rounding)
    assert scale.shape == (1,)
    assert torch.equal(codes, nearest_even(x * scale, fmt))
    decoded = decode(codes, fmt).double() / scale.double()
    # one rounding of the quotient to float32
    torch.testing.assert_close(dequantize(codes, scale, fmt).double(), decoded, rtol=2**-24, atol=0)


@both_formats
@both_roundings
def test_per_token_is_per_tensor_of_every_row(fmt: Format, rounding: ScaleRounding) -> None:
    x = spread(torch.Generator().manual_seed(3), 12, 33)
    codes, scale = quantize(x, fmt, "per_token", rounding)
    assert scale.shape == (12, 1)
    for row in range(12):
        alone, its_scale = quantize(x[row : row + 1], fmt, "per_tensor", rounding)
        assert torch.equal(codes[row], alone[0])
        assert torch.equal(scale[row], its_scale)
    per_tensor = quantize(x, fmt, "per_tensor", rounding)[0]
    assert not torch.equal(codes, per_tensor)  # rows of different size: the choice matters


def test_given_scale_is_used_and_saturates() -> None:
    codes, scale = quantize(torch.tensor([[1.0, 300.0, -900.0]]), E4M3, scale=torch.tensor([2.0]))
    assert scale.item() == 2.0
    assert dequantize(codes, scale, E4M3).tolist() == [[1.0, 224.0, -224.0]]


@pytest.mark.parametrize("shape", [(0, 5), (7, 0), (0, 0)])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_tensors(
    shape: tuple[int, int], granularity: Granularity, dtype: torch.dtype
) -> None:
    x = torch.zeros(shape, dtype=dtype)
    codes, scale = quantize(x, E4M3, granularity)
    assert codes.shape == shape
    assert scale.shape == ((shape[0], 1) if granularity == "per_token" else (1,))
    assert (scale == 1).all()
    assert dequantize(codes, scale, E4M3).shape == shape
    assert amax_of(x, granularity).dtype == torch.float32


# -- stochastic rounding ------------------------------------------------------------------------

# Normals, subnormals, the step between them, near saturation; none is a code.
POINTS = {
    E4M3: [1.01, 3.3, 17.77, 2**-6 * 1.05, 2**-9 * 0.3, 2**-9 * 5.6, 2**-6 * 0.99, 447.9, 420.0],
    E5M2: [1.01, 3.3, 1777.0, 2**-14 * 1.1, 2**-16 * 0.3, 2**-16 * 2.6, 2**-14 * 0.97, 57300.0],
}


def neighbours(x: Tensor, fmt: Format) -> tuple[Tensor, Tensor]:
    """Values of the codes next to |x| below (or equal) and above."""
    table = magnitudes(fmt)
    low = torch.searchsorted(table, x.double().abs().clamp(max=fmt.max), right=True) - 1
    return table[low], table[(low + 1).clamp(max=len(table) - 1)]


@both_formats
def test_stochastic_rounding_has_the_right_mean(fmt: Format) -> None:
    x = torch.tensor([v * s for v in POINTS[fmt] for s in (1, -1)])
    count = 1 << 15
    rows, columns = torch.arange(len(x))[:, None], torch.arange(count)[None, :]
    bits = philox(1234, columns, rows, 0, 0)
    mean = decode(encode_stochastic(x[:, None].expand(-1, count), fmt, bits), fmt).double().mean(1)
    low, high = neighbours(x, fmt)
    share = (x.double().abs() - low) / (high - low)
    deviation = (high - low) * (share * (1 - share) / count).sqrt()
    # 4.5 standard deviations of the mean: seven in a million for one of 18 points by chance.
    assert ((mean - x.double()).abs() <= 4.5 * deviation).all()


@both_formats
@pytest.mark.parametrize("point", [1, 3, 4, 6, 7])
def test_stochastic_rounding_is_exact_over_all_random_bits(fmt: Format, point: int) -> None:
    dropped = 23 - fmt.mantissa_bits
    x = torch.tensor(POINTS[fmt][point])
    bits = torch.arange(1 << dropped)
    values = decode(encode_stochastic(x.expand(1 << dropped), fmt, bits), fmt).double()
    low, high = neighbours(x, fmt)
    # Every normal lies on the grid of random positions; a subnormal is cut to it.
    cut = (high - low) * 2.0**-dropped if x < 2.0**fmt.min_exponent else 0.0
    bias = x.double() - values.mean()
    assert 0 <= bias <= cut


@both_formats
def test_stochastic_rounding_picks_a_neighbour(fmt: Format) -> None:
    generator = torch.Generator().manual_seed(4)
    # Below, around and above the range of the format.
    powers = torch.randint(-20, 18, (200, 200), generator=generator)
    x = torch.ldexp(torch.randn(200, 200, generator=generator), powers)
    bits = torch.randint(0, 1 << 32, x.shape, generator=generator)
    values = decode(encode_stochastic(x, fmt, bits), fmt).double()
    low, high = neighbours(x, fmt)
    size = values.abs()
    assert ((size == low) | (size == high)).all()
    assert torch.equal(torch.signbit(values), torch.signbit(x))
    assert (size == low).any() and (size == high).any()


@both_formats
def test_stochastic_rounding_leaves_codes_alone(fmt: Format) -> None:
    codes = torch.cat([ALL_CODES[: fmt.max_code + 1], ALL_CODES[0x80 : 0x80 + fmt.max_code + 1]])
    for bits in (0, (1 << 32) - 1):
        again = encode_stochastic(decode(codes, fmt), fmt, torch.full(codes.shape, bits))
        assert torch.equal(again, codes)
    nan = encode_stochastic(torch.tensor([torch.nan, -torch.nan]), fmt, torch.tensor([0, bits]))
    assert torch.isnan(decode(nan, fmt)).all()


# -- random bits --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "counter", "word"),
    [  # kat_vectors of the Random123 distribution, philox4x32 10
        (0, (0, 0, 0, 0), 0x6627E8D5),
        ((1 << 64) - 1, (0xFFFFFFFF,) * 4, 0x408F276D),
        (0x299F31D0A4093822, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0xD16CFE09),
    ],
)
def test_philox_known_answers(seed: int, counter: tuple[int, int, int, int], word: int) -> None:
    c0, c1, c2, c3 = counter
    assert philox(seed, torch.tensor([c0]), torch.tensor([c1]), c2, c3).item() == word


def test_philox_depends_on_the_counters_alone() -> None:
    columns, rows = torch.arange(50), torch.arange(30)
    whole = philox(7, columns[None, :], rows[:, None], 3, 2)
    assert whole.shape == (30, 50)
    order = torch.tensor([29, 4, 17])
    assert torch.equal(philox(7, columns[None, 10:20], order[:, None], 3, 2), whole[order, 10:20])
    for other in (
        philox(8, columns[None, :], rows[:, None], 3, 2),
        philox(7, columns[None, :], rows[:, None], 4, 2),
        philox(7, columns[None, :], rows[:, None], 3, 1),
    ):
        assert (other == whole).sum() <= 1  # 1,500 draws of 32 bits: a hit is one in three million
    assert (whole >= 0).all()
    assert (whole < 1 << 32).all()
    assert len(whole.unique()) >= 1499


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_value_that_is_not_finite_is_seen(dtype: torch.dtype, value: float) -> None:
    x = torch.randn(70, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(x) and largest(x) == x.abs().max() and largest(x).dtype == dtype
    x[69, 32] = -100.0
    assert all_finite(x) and largest(x) == 100.0
    x[17, 5] = value
    assert not all_finite(x)
    assert all_finite(x[:0])


def test_fp8_that_is_not_finite_is_seen() -> None:
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).to(torch.float8_e5m2)
    assert all_finite(x)
    x.view(torch.uint8)[1, 2] = 0x7C
    assert not all_finite(x)

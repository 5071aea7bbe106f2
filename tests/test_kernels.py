"""The reference operations: each against its formula, written out in float64 or code by code."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from falqon.fp8 import E4M3, E5M2, Format, decode, encode, encode_stochastic, philox, quantize
from falqon.kernels import (
    MeldedMatmul,
    Origin,
    PassThrough,
    Quantize,
    RowUpdate,
    RowWrite,
    backbone_matmul,
    melded_matmul,
    proxy_grad,
    row_update,
)
from falqon.recipe import Granularity, Rounding, ScaleRounding

ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = [
    (1, 1, 1, 1),
    (5, 33, 17, 4),
    (16, 64, 48, 8),
    (3, 129, 5, 4),
    (0, 16, 8, 2),
]  # T in out r


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def values(codes: Tensor, scale: Tensor, fmt: Format) -> Tensor:
    return decode(codes, fmt).double() / scale.double()


def assert_is_product(
    result: Tensor, left: Tensor, right: Tensor, roundings: int, bias: Tensor | None = None
) -> None:
    """`left @ right (+ bias)` but for float32 sums and `roundings` to the result's dtype."""
    extra = torch.zeros(()) if bias is None else bias.double()
    exact = left @ right
    size = left.abs() @ right.abs()
    # Standard bound of a dot product of n terms, the scale's own rounding included; then each
    # rounding to the result's dtype costs half a unit in the last place.
    bound = (left.shape[1] + 4) * 2.0**-24 * size
    bound = bound + roundings * ROUNDOFF[result.dtype] * (exact.abs() + extra.abs()) + 1e-30
    assert ((result.double() - exact - extra).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_matmuls_equal_their_formulas(
    dtype: torch.dtype,
    granularity: Granularity,
    rounding: ScaleRounding,
    shape: tuple[int, int, int, int],
) -> None:
    tokens, features, out, rank = shape
    x, x_scale = quantize(random(tokens, features), E4M3, granularity, rounding)
    codes, scale = quantize(random(out + rank, features, seed=1), E4M3, rounding=rounding)
    bias = random(out, seed=2).to(dtype)
    exact = rounding == "power_of_two"
    # Scales that are not powers of two are applied after a product in bfloat16: one rounding more.
    roundings = 1 if exact or dtype != torch.bfloat16 else 2

    [o], [o_a] = melded_matmul(x, x_scale, [codes], [scale], [None], rank, dtype, exact)
    left, right = values(x, x_scale, E4M3), values(codes, scale, E4M3).t()
    assert o.dtype == o_a.dtype == dtype
    assert_is_product(o, left, right[:, :out], roundings)
    assert_is_product(o_a, left, right[:, out:], roundings)
    [with_bias], [same] = melded_matmul(x, x_scale, [codes], [scale], [bias], rank, dtype, exact)
    assert_is_product(with_bias, left, right[:, :out], roundings + 1, bias)
    assert torch.equal(same, o_a)

    grad, grad_scale = quantize(random(tokens, out, seed=3), E5M2, granularity, rounding)
    dx = backbone_matmul(grad, grad_scale, [codes], scale, rank, dtype, exact)
    assert dx.dtype == dtype
    assert_is_product(
        dx, values(grad, grad_scale, E5M2), values(codes[:out], scale, E4M3), roundings
    )


@pytest.mark.parametrize("tokens", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_outputs_share_no_storage(tokens: int, dtype: torch.dtype, with_bias: bool) -> None:
    # Else the saved O_A would keep O, and an in-place change of O would break the backward pass.
    x, codes = torch.zeros(tokens, 8, dtype=torch.uint8), torch.zeros(6, 8, dtype=torch.uint8)
    bias = torch.zeros(4) if with_bias else None
    [o], [o_a] = melded_matmul(x, torch.ones(1), [codes], [torch.ones(1)], [bias], 2, dtype)
    assert (o.shape, o_a.shape) == ((tokens, 4), (tokens, 2))
    assert o.is_contiguous()
    assert o_a.is_contiguous()
    assert o_a.untyped_storage().nbytes() == tokens * 2 * dtype.itemsize
    assert o.untyped_storage().nbytes() == tokens * 4 * dtype.itemsize


def test_forward_is_one_matmul() -> None:
    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if any(name in str(func) for name in ("mm", "matmul", "linear", "bmm")):
                self.calls.append(str(func))
            return func(*args, **(kwargs or {}))

    codes = torch.ones(6, 8, dtype=torch.uint8)
    with Count() as count:
        one = torch.ones(1)
        MeldedMatmul(2, True)(codes[:3], one, [codes], [one], [None], torch.float32)
    assert count.calls == ["aten.mm.default"]


def test_large_products_do_not_overflow_float16() -> None:
    ones = torch.full((1, 512), 1.0)
    x, x_scale = quantize(ones, E4M3)  # codes of 256: their unscaled products reach 2^25
    [o], [o_a] = melded_matmul(x, x_scale, [x.expand(3, -1)], [x_scale], [None], 1, torch.float16)
    assert o.tolist() == [[512.0, 512.0]]
    assert o_a.tolist() == [[512.0]]


def test_operands_without_rounding() -> None:
    x, weight = random(5, 8), random(6, 8, seed=1)
    x_values, one = PassThrough()(x)
    [o], [o_a] = melded_matmul(x_values, one, [weight], [torch.ones(1)], [None], 2, torch.float32)
    torch.testing.assert_close(torch.cat([o, o_a], 1), x @ weight.t(), rtol=0, atol=1e-5)
    grad = random(5, 4, seed=2)
    dx = backbone_matmul(grad, one, [weight], torch.ones(1), 2, torch.float32)
    torch.testing.assert_close(dx, grad @ weight[:4], rtol=0, atol=1e-5)
    assert torch.equal(x_values, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_proxy_grad(dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    tokens, _, out, rank = shape
    grad, adapter = random(tokens, out).to(dtype), random(tokens, rank, seed=1).to(dtype)
    result = proxy_grad(grad, adapter)
    assert result.dtype == torch.float32
    exact = grad.double().t() @ adapter.double()
    size = grad.double().abs().t() @ adapter.double().abs()
    at_the_end = ROUNDOFF[dtype] if dtype == torch.bfloat16 else 0.0
    bound = (tokens + 2) * 2.0**-24 * size + at_the_end * exact.abs()
    assert ((result.double() - exact).abs() <= bound).all()


def test_proxy_grad_of_float16_does_not_overflow() -> None:
    big = torch.full((4, 1), 300.0, dtype=torch.float16)
    assert proxy_grad(big, big).item() == 360000.0  # float16 ends at 65,504


@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
def test_dynamic_quantize_module(
    fmt: Format, granularity: Granularity, rounding: ScaleRounding
) -> None:
    x = random(6, 9)
    module = Quantize(fmt, granularity, rounding)
    for result, expected in zip(module(x), quantize(x, fmt, granularity, rounding), strict=True):
        assert torch.equal(result, expected)
    assert module.observed_amax is None  # nothing to follow
    assert not module.state_dict()


# -- row update ---------------------------------------------------------------------------------

OUT, IN, RANK = 24, 40, 4


def backbone(seed: int = 0, rounding: ScaleRounding = "power_of_two") -> tuple[Tensor, Tensor]:
    weight = torch.cat([random(OUT, IN, seed=seed), 0.2 * random(RANK, IN, seed=seed + 1)])
    codes, scale = quantize(weight, E4M3, rounding=rounding)
    codes[:OUT, 0] = 0x80  # -0: requantising would make it 0
    return codes, scale


def test_zero_rows_stay_bit_for_bit() -> None:
    codes, scale = backbone()
    before = codes.clone()
    proxy = torch.zeros(OUT, RANK)
    proxy[3] = -0.0
    counts, _ = row_update(codes, scale, torch.arange(OUT), proxy)
    assert torch.equal(codes, before)
    assert [float(c) for c in counts] == [0.0] * 6


def test_zero_rows_stay_bit_for_bit_without_rounding() -> None:
    weight = random(OUT + RANK, IN)
    weight[:, 0] = -0.0
    before = weight.clone()
    proxy = torch.zeros(OUT, RANK)
    proxy[5] = float("nan")
    counts, _ = row_update(weight, torch.ones(1), torch.arange(OUT), proxy)
    assert torch.equal(weight.view(torch.int32), before.view(torch.int32))
    assert [float(c) for c in counts] == [0.0] * 6


@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
def test_update_is_dequantise_add_requantise(rounding: ScaleRounding) -> None:
    codes, scale = backbone(rounding=rounding)
    before, rows = codes.clone(), torch.tensor([20, 0, 7, 8])
    proxy = random(4, RANK, seed=5)
    row_update(codes, scale, rows, proxy)

    start, adapter = values(before[rows], scale, E4M3), values(before[OUT:], scale, E4M3)
    target = (start + proxy.double() @ adapter) * scale.double()
    expected = encode(target.float(), E4M3)
    # Float32 against float64: codes may differ only where the target lies next to a midpoint.
    differs = codes[rows] != expected
    nudge = 1 + 2.0**-20 * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    low, high = (encode((target * n).float(), E4M3) for n in nudge)
    assert (~differs | (low != high)).all()
    assert differs.float().mean() < 0.01
    assert (codes[rows] != before[rows]).float().mean() > 0.5  # not a vacuous update
    others = torch.tensor([i for i in range(OUT + RANK) if i not in rows.tolist()])
    assert torch.equal(codes[others], before[others])


def test_update_on_exact_numbers() -> None:
    codes = encode(torch.tensor([[1.0, 2.0, -8.0], [0.5, 1.0, 0.0], [2.0, 0.0, 8.0]]), E4M3)
    counts, _ = row_update(
        codes, torch.tensor([4.0]), torch.tensor([0]), torch.tensor([[0.25, 0.75]])
    )
    # 0.25 [0.5 1 0] + 0.75 [2 0 8] = [1.625 0.25 6]; 2.625 -> 2.5 or 2.75: the even 2.5.
    assert decode(codes, E4M3).tolist() == [[2.5, 2.25, -2.0], [0.5, 1.0, 0.0], [2.0, 0.0, 8.0]]
    assert [int(c) for c in counts[:4]] == [1, 3, 3, 0]
    assert counts.projection == (1.5 * 1.625 + 0.25 * 0.25 + 6 * 6) / 16
    assert counts.wanted == (1.625**2 + 0.25**2 + 6**2) / 16


def test_update_saturates_and_is_never_nan() -> None:
    codes, scale = backbone()
    counts, _ = row_update(codes, scale, torch.arange(OUT), 1e6 * random(OUT, RANK, seed=5))
    written = decode(codes[:OUT], E4M3)
    assert torch.isfinite(written).all()
    assert written.max() == 448.0
    assert written.min() == -448.0
    assert counts.saturated == (written.abs() == 448.0).sum()
    assert counts.saturated > 0.9 * OUT * IN


@pytest.mark.parametrize("scale", [2.0**126, 2.0**-126])
def test_extreme_scale_gives_no_nan(scale: float) -> None:
    codes = backbone()[0]
    codes[OUT, 1] = 0  # infinity times this would be NaN
    proxy = torch.full((OUT, RANK), 100.0)
    row_update(codes, torch.tensor([scale]), torch.arange(OUT), proxy)
    assert torch.isfinite(decode(codes, E4M3)).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("kind", ["nearest", "stochastic", "exact"])
def test_rows_without_a_finite_change_are_not_written(bad: float, kind: str) -> None:
    codes, scale = backbone()
    if kind == "exact":
        codes = 5 * random(OUT + RANK, IN)
    codes[OUT:] = codes[OUT : OUT + 1]  # so that 3e38 overflows: B A adds up
    before, proxy = codes.clone(), random(OUT, RANK, seed=5)
    proxy[[4, 9]] = bad
    rounding: Rounding = "stochastic" if kind == "stochastic" else "nearest"
    counts, _ = row_update(codes, scale, torch.arange(OUT), proxy, rounding)
    assert torch.equal(codes[[4, 9]], before[[4, 9]])
    assert counts.written == OUT - 2
    assert all(torch.isfinite(c.double()) for c in counts)
    assert (codes != before)[:OUT].any(dim=1).sum() == OUT - 2


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_counts_equal_a_recount(rounding: Rounding) -> None:
    codes, scale = backbone()
    before = codes.clone()
    proxy = random(OUT, RANK, seed=5) * torch.logspace(-3, 2, OUT)[:, None]
    proxy[2], proxy[3, 0] = 0.0, float("nan")
    rows = torch.arange(0, OUT, 1)
    counts, _ = row_update(codes, scale, rows, proxy, rounding, (1, 2, 3))
    live = torch.tensor([i not in (2, 3) for i in range(OUT)])
    assert counts.written == live.sum() == OUT - 2
    assert counts.codes == (OUT - 2) * IN
    assert counts.flipped == (codes != before).sum()
    landed = values(codes, scale, E4M3) - values(before, scale, E4M3)
    wanted = proxy[live].double() @ values(before[OUT:], scale, E4M3)
    assert counts.saturated == (decode(codes[:OUT][live], E4M3).abs() == 448.0).sum() > 0
    # Sums of float32 products of float32 numbers: relative to the sum of sizes, a few roundings.
    products = landed[:OUT][live] * wanted
    assert abs(counts.projection - products.sum()) <= 1e-6 * products.abs().sum()
    assert abs(counts.wanted - wanted.square().sum()) <= 1e-6 * wanted.square().sum()


def test_stochastic_update_uses_row_and_column_as_counters() -> None:
    start, scale = backbone()
    proxy = 0.05 * random(OUT, RANK, seed=5)
    whole = start.clone()
    row_update(whole, scale, torch.arange(OUT), proxy, "stochastic", (11, 5, 2))
    some, rows = start.clone(), torch.tensor([17, 3, 9])
    row_update(some, scale, rows, proxy[rows], "stochastic", (11, 5, 2))
    assert torch.equal(some[rows], whole[rows])
    one = start.clone()
    for row in (9, 17, 3):
        row_update(one, scale, torch.tensor([row]), proxy[row : row + 1], "stochastic", (11, 5, 2))
    assert torch.equal(one, some)

    bits = philox(11, torch.arange(IN)[None, :], torch.arange(OUT)[:, None], 5, 2)
    target = decode(start[:OUT], E4M3) + proxy @ decode(start[OUT:], E4M3)
    assert torch.equal(whole[:OUT], encode_stochastic(target, E4M3, bits))
    for counter in ((12, 5, 2), (11, 6, 2), (11, 5, 3)):
        other = start.clone()
        row_update(other, scale, torch.arange(OUT), proxy, "stochastic", counter)
        assert not torch.equal(other, whole)


def test_stochastic_update_lands_on_average_what_nearest_loses() -> None:
    start, scale = backbone()
    proxy = 1e-3 * random(OUT, RANK, seed=5)
    wanted = landed = 0.0
    for step in range(64):
        codes = start.clone()
        counts, _ = row_update(codes, scale, torch.arange(OUT), proxy, "stochastic", (0, step, 0))
        wanted, landed = wanted + float(counts.wanted), landed + float(counts.projection)
    nearest, _ = row_update(start.clone(), scale, torch.arange(OUT), proxy)
    assert nearest.projection / nearest.wanted < 0.1
    # The ratio of 64 x 960 codes has a standard deviation of about 0.06 at this size of change.
    assert abs(landed / wanted - 1) < 0.25


def test_row_update_module_takes_its_rounding() -> None:
    start, scale = backbone()
    rows, proxy = torch.arange(OUT), 0.05 * random(OUT, RANK, seed=5)
    for rounding in ("nearest", "stochastic"):
        by_module, by_function = start.clone(), start.clone()
        RowUpdate(rounding)([RowWrite(by_module, scale, rows, proxy, 3)], 1, 2)
        row_update(by_function, scale, rows, proxy, rounding, (1, 2, 3))
        assert torch.equal(by_module, by_function)


# -- all rows, origins and remainders -----------------------------------------------------------


def gram_inverse(codes: Tensor) -> Tensor:
    adapter = decode(codes[OUT:], E4M3).double()
    return torch.linalg.pinv(adapter @ adapter.t(), hermitian=True).float()


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


@pytest.mark.parametrize("kind", ["nearest", "stochastic", "exact"])
@pytest.mark.parametrize("origin", [None, "codes", "weights"])
@pytest.mark.parametrize("some_are_not_written", [False, True])
def test_no_rows_means_all_rows(kind: str, origin: str | None, some_are_not_written: bool) -> None:
    start, scale = backbone()
    inverse = gram_inverse(start)
    proxy = 0.05 * random(OUT, RANK, seed=5)
    if some_are_not_written:
        proxy[[0, 7]], proxy[11, 2] = 0.0, float("nan")
    total = proxy.nan_to_num(0.0) + 0.05 * random(OUT, RANK, seed=6)
    values_of = {"codes": backbone(seed=9)[0][:OUT], "weights": random(OUT, IN, seed=9)}
    source = None if origin is None else Origin(values_of[origin], total)
    if kind == "exact":
        start = decode(start, E4M3)
    rounding: Rounding = "stochastic" if kind == "stochastic" else "nearest"
    results = []
    for rows in (None, torch.arange(OUT)):
        codes = start.clone()
        counts, rest = row_update(codes, scale, rows, proxy, rounding, (1, 2, 3), source, inverse)
        assert rest is not None
        results.append((codes, rest, counts))
    (codes, rest, counts), (by_number, its_rest, its_counts) = results
    assert torch.equal(bits(codes), bits(by_number))
    assert torch.equal(bits(rest), bits(its_rest))
    assert [float(c) for c in counts] == [float(c) for c in its_counts]
    assert counts.written == (OUT - 3 if some_are_not_written else OUT)
    assert (codes != start)[1:7].any(dim=1).all()


@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("kind", ["codes", "float32", "bfloat16"])
def test_update_from_an_origin(rounding: ScaleRounding, kind: str) -> None:
    codes, scale = backbone(rounding=rounding)
    before, rows = codes.clone(), torch.tensor([20, 0, 7, 8])
    proxy, total = 0.1 * random(4, RANK, seed=5), 0.3 * random(4, RANK, seed=6)
    if kind == "codes":
        source = backbone(seed=9, rounding=rounding)[0][rows]
        start = decode(source, E4M3)
    else:
        source = random(4, IN, seed=9).to(getattr(torch, kind))
        start = source.float() * scale
    kept = source.clone()
    counts, rest = row_update(codes, scale, rows, proxy, origin=Origin(source, total))
    assert rest is None
    # The codes at hand do not matter, but for the counts of what changed.
    adapter = decode(before[OUT:], E4M3)
    assert torch.equal(codes[rows], encode(start + total @ adapter, E4M3))
    assert torch.equal(source, kept)
    assert counts.flipped == (codes != before).sum()
    wanted = (proxy.double() @ values(before[OUT:], scale, E4M3)).square().sum()
    # A float32 sum of squares of float32 products.
    assert abs(float(counts.wanted) - float(wanted)) <= 1e-5 * float(wanted)
    others = torch.tensor([i for i in range(OUT + RANK) if i not in rows.tolist()])
    assert torch.equal(codes[others], before[others])


@pytest.mark.parametrize("kind", ["nearest", "stochastic"])
@pytest.mark.parametrize("with_origin", [False, True])
def test_remainder_is_the_projection_of_what_rounding_left(kind: str, with_origin: bool) -> None:
    codes, scale = backbone()
    before, proxy = codes.clone(), 0.05 * random(OUT, RANK, seed=5)
    proxy[[0, 7, 8]] = 0.0
    total, weights = proxy + 0.05 * random(OUT, RANK, seed=6), random(OUT, IN, seed=9)
    origin = Origin(weights, total) if with_origin else None
    rounding: Rounding = "stochastic" if kind == "stochastic" else "nearest"
    rows = torch.arange(OUT)
    _, rest = row_update(
        codes, scale, rows, proxy, rounding, (1, 2, 3), origin, gram_inverse(before)
    )
    assert rest is not None
    adapter = decode(before[OUT:], E4M3).double()
    target = decode(before[:OUT], E4M3).double() + proxy.double() @ adapter
    if with_origin:
        target = weights.double() * scale.double() + total.double() @ adapter
    left = target - decode(codes[:OUT], E4M3).double()
    expected = torch.linalg.lstsq(adapter.t(), left.t()).solution.t()
    expected[[0, 7, 8]] = 0.0
    assert not rest[[0, 7, 8]].any()
    assert torch.equal(codes[[0, 7, 8]], before[[0, 7, 8]])
    # What is left of float32 numbers up to 448 is of size 1 to 16, and off by 2^-16 at most.
    assert (rest - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("every_row", [False, True])
def test_damaged_row_stays_alone_with_origin_and_remainder(bad: float, every_row: bool) -> None:
    start, scale = backbone()
    start[OUT:] = start[OUT : OUT + 1]  # so that 3e38 overflows: B A adds up
    inverse = gram_inverse(start)
    proxy, weights = 0.05 * random(OUT, RANK, seed=5), random(OUT, IN, seed=9)
    proxy[4] = bad
    codes, good = start.clone(), torch.tensor([i for i in range(OUT) if i != 4])
    rows = None if every_row else torch.arange(OUT)
    counts, rest = row_update(
        codes, scale, rows, proxy, origin=Origin(weights, proxy), gram_inverse=inverse
    )
    assert torch.equal(codes[4], start[4])
    assert counts.written == OUT - 1
    assert all(torch.isfinite(c.double()) for c in counts)
    alone = start.clone()
    expected, its_rest = row_update(
        alone,
        scale,
        good,
        proxy[good],
        origin=Origin(weights[good], proxy[good]),
        gram_inverse=inverse,
    )
    assert rest is not None
    assert its_rest is not None
    assert torch.equal(codes, alone)
    assert (codes != start)[good].any(dim=1).all()
    assert [float(c) for c in counts] == [float(c) for c in expected]
    assert torch.equal(rest[good], its_rest)
    assert rest[good].any()
    assert not rest[4].any()

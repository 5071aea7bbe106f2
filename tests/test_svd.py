"""The truncated SVD: from a filtered sketch, from a Gram matrix, and in full."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from falqon import svd
from falqon.fp8 import E4M3, dequantize, quantize
from falqon.recipe import MeldRecipe
from falqon.svd import sketched_svd, svd_of_gram, truncated_svd


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def heavy_tailed(*shape: int) -> Tensor:
    """Student's t with 3 degrees of freedom: outliers of some hundred standard deviations."""
    chi_square = torch.stack([random(*shape, seed=i + 1) for i in range(3)]).square().sum(0)
    return 0.02 * random(*shape) / (chi_square / 3).sqrt()


def steep(*shape: int, ratio: float = 30) -> Tensor:
    """Singular values that fall to 1/`ratio` of the first by the 64th."""
    left, values, right = torch.linalg.svd(random(*shape).double(), full_matrices=False)
    values = ratio ** -(torch.arange(len(values), dtype=torch.float64) / 63)
    return (left * values @ right).float()


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """What the device is said to multiply fastest."""
    dtype: torch.dtype = request.param
    monkeypatch.setattr(svd, "_products_in", lambda device: dtype)
    return dtype


def energy(values: Tensor) -> float:
    return float(values.double().square().sum())


# -- the sketch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [random, heavy_tailed, steep])
@pytest.mark.parametrize("shape", [(576, 1536), (1536, 576), (512, 512), (700, 700)])
@pytest.mark.usefixtures("products")
def test_sketch_holds_the_energy_of_the_full_svd(
    kind: Callable[..., Tensor], shape: tuple[int, int]
) -> None:
    weight = kind(*shape)
    codes, scale = quantize(weight, E4M3)
    recipe = MeldRecipe(rank=64)
    for matrix in (weight, weight - dequantize(codes, scale, E4M3)):
        values, right = truncated_svd(matrix, recipe, 0)
        columns = 64 + recipe.oversampling
        sketched = sketched_svd(matrix, 64, columns, recipe.power_iterations, 0)
        assert torch.equal(right, sketched[1])
        full = energy(torch.linalg.svdvals(matrix.double())[:64])
        assert energy(values) == pytest.approx(full, rel=2.5e-3)
        # The vectors hold no less, and are orthonormal as those of a Gram matrix are.
        held = energy(matrix.double() @ right.double().t())
        assert energy(values) * (1 - 1e-5) < held < full * (1 + 1e-5)
        torch.testing.assert_close(right @ right.t(), torch.eye(64), rtol=0, atol=1e-4)


@pytest.mark.parametrize("iterations", [0, 1, 3, 4, 8])
@pytest.mark.usefixtures("products")
def test_more_products_hold_more(iterations: int) -> None:
    matrix = random(600, 600)
    full = energy(torch.linalg.svdvals(matrix)[:32])
    bound = {0: 0.45, 1: 0.75, 3: 0.93, 4: 0.97, 8: 0.997}[iterations]
    shares = [
        energy(sketched_svd(matrix, 32, 48, n, 0)[0]) / full for n in (iterations, iterations + 1)
    ]
    assert bound < shares[0] < shares[1] < 1 + 1e-5


@pytest.mark.parametrize("ratio", [1e2, 1e3, 1e5])
@pytest.mark.parametrize("shape", [(300, 260), (260, 300), (1500, 1500)])
@pytest.mark.usefixtures("products")
def test_sketch_of_values_that_fall_fast(ratio: float, shape: tuple[int, int]) -> None:
    matrix = steep(*shape, ratio=ratio)
    values, right = sketched_svd(matrix, 64, 80, 8, 0)
    expected = torch.linalg.svdvals(matrix.double())[:64]
    # Each of them, as far as float32 holds its square beside that of the first.
    torch.testing.assert_close(values.double(), expected, rtol=1e-2, atol=2e-4)
    torch.testing.assert_close(right @ right.t(), torch.eye(64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(300, 280), (280, 300)])
@pytest.mark.parametrize("known", [0, 3, 9])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.usefixtures("products")
def test_sketch_of_any_size_and_low_rank(known: int, size: float, shape: tuple[int, int]) -> None:
    weight = random(shape[0], known) @ random(known, shape[1]) * size
    values, right = (x.double() for x in sketched_svd(weight, 8, 10, 5, 0))
    expected = torch.linalg.svdvals(weight.double())[:8]
    bound = 1e-5 * float(expected[0])  # of float32
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=bound)
    torch.testing.assert_close(right @ right.t(), torch.eye(8).double(), rtol=0, atol=1e-5)
    held = (weight.double() @ right.t()).norm(dim=0)
    torch.testing.assert_close(held, expected, rtol=1e-4, atol=bound)


@pytest.mark.usefixtures("products")
def test_the_seed_and_no_other_state_decides_the_sketch() -> None:
    matrix = random(300, 280)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = sketched_svd(matrix, 8, 10, 8, 1)[1]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    kept = matrix.clone()
    assert torch.equal(sketched_svd(matrix, 8, 10, 8, 1)[1], first)
    assert torch.equal(matrix, kept)
    assert not torch.equal(sketched_svd(matrix, 8, 10, 8, 2)[1], first)


# -- the others ---------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("kind", [random, heavy_tailed, steep])
@pytest.mark.parametrize("shape", [(110, 240), (240, 110), (120, 120)])
@pytest.mark.parametrize("rank", [1, 64])
def test_svd_of_gram_is_exact(
    kind: Callable[..., Tensor], shape: tuple[int, int], rank: int, size: float
) -> None:
    weight = kind(*shape) * size
    found = svd_of_gram(weight, rank)
    assert found is not None
    values, right = found
    _, expected, directions = torch.linalg.svd(weight.double(), full_matrices=False)
    assert values.dtype == right.dtype == torch.float32
    torch.testing.assert_close(values.double(), expected[:rank], rtol=1e-4, atol=0)
    torch.testing.assert_close(right @ right.t(), torch.eye(rank), rtol=0, atol=1e-4)
    # The spaces are the same: neighbours with nearly one singular value may be any turn of them.
    cosines = torch.linalg.svdvals(right.double() @ directions[:rank].t())
    assert cosines.min() > 1 - 1e-4


@pytest.mark.parametrize("shape", [(110, 240), (240, 110)])
def test_small_matrices_are_not_sketched(shape: tuple[int, int]) -> None:
    weight = random(*shape)
    found = svd_of_gram(weight, 64)
    assert found is not None
    assert torch.equal(truncated_svd(weight, MeldRecipe(rank=64), 1)[1], found[1])


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_svd_of_a_matrix_of_low_rank_is_the_full_one(shape: tuple[int, int]) -> None:
    weight = random(shape[0], 40) @ random(40, shape[1], seed=1)
    assert svd_of_gram(weight, 64) is None  # squares of the rest are lost in rounding
    assert svd_of_gram(torch.zeros(shape), 1) is None
    values, right = truncated_svd(weight, MeldRecipe(rank=64), 0)
    _, expected, directions = torch.linalg.svd(weight, full_matrices=False)
    assert torch.equal(values, expected[:64]) and torch.equal(right, directions[:64])


def test_full_svd_is_exact() -> None:
    error = random(150, 200)
    values, right = truncated_svd(error, MeldRecipe(rank=8, svd="full"), 0)
    expected = torch.linalg.svdvals(error.double())[:8]
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close((error @ right.t()).norm(dim=0), values, rtol=1e-5, atol=0)

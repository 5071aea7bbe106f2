"""The truncated SVD: from a filtered sketch, from a Gram matrix, and in full."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest
import torch
from torch import Tensor

from falqon import svd
from falqon.fp8 import E4M3, dequantize, quantize
from falqon.recipe import MeldRecipe
from falqon.svd import sketched_svd, svd_of_gram, truncated_svd
from tests.threads import threads


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


def test_filter_is_the_chebyshev_polynomial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(svd, "_products_in", lambda device: torch.float32)
    matrix = random(400, 300)

    def space(iterations: int) -> Tensor:
        with ThreadPoolExecutor(1) as pool:
            rows, size = svd._Rows(matrix, pool), torch.tensor(4.0)
            return svd._leading_space(matrix, size, rows, 20, iterations, 0).double()

    squares, vectors = torch.linalg.eigh(matrix.double().t() @ matrix.double() / 16)
    start = space(0)
    bound = torch.linalg.eigvalsh(start.t() @ (vectors * squares) @ vectors.t() @ start)[0]
    for degree in (1, 2, 3, 4):
        x = 2 * squares / bound - 1
        polynomial = [x, 2 * x**2 - 1, 4 * x**3 - 3 * x, 8 * x**4 - 8 * x**2 + 1][degree - 1]
        expected = torch.linalg.qr((vectors * polynomial) @ vectors.t() @ start).Q
        assert torch.linalg.svdvals(expected.t() @ space(degree)).min() > 1 - 1e-6
        assert torch.linalg.svdvals(expected.t() @ space(degree - 1)).min() < 0.99


@pytest.mark.parametrize("shape", [(1024, 900), (900, 1024)])
@pytest.mark.parametrize("strength", [1.5, 3, 10, 20, 300])
@pytest.mark.parametrize("directions", [1, 8])
@pytest.mark.usefixtures("products")
def test_directions_far_above_the_others(
    shape: tuple[int, int], strength: float, directions: int
) -> None:
    left, right = (torch.linalg.qr(random(n, directions, seed=i)).Q for i, n in enumerate(shape, 1))
    # 62: the largest singular value of the rest.
    matrix = random(*shape) + 62 * strength * (left @ right.t())
    values = sketched_svd(matrix, 64, 80, 12, 0)[0].double()
    expected = torch.linalg.svdvals(matrix.double())[:64]
    torch.testing.assert_close(values[:directions], expected[:directions], rtol=1e-4, atol=0)
    rest = slice(directions, 64)
    assert energy(values[rest]) == pytest.approx(energy(expected[rest]), rel=1.5e-3)


@pytest.mark.parametrize(("ratio", "atol"), [(1e2, 1e-6), (1e3, 1e-6), (1e5, 4e-4)])
@pytest.mark.parametrize("shape", [(300, 260), (260, 300), (1500, 1500)])
@pytest.mark.usefixtures("products")
def test_sketch_of_values_that_fall_fast(ratio: float, atol: float, shape: tuple[int, int]) -> None:
    matrix = steep(*shape, ratio=ratio)
    values, right = sketched_svd(matrix, 64, 80, 12, 0)
    expected = torch.linalg.svdvals(matrix.double())[:64]
    # Each of them; the last one as far as float32 holds its square beside that of the first.
    torch.testing.assert_close(values.double(), expected, rtol=1e-3, atol=atol)
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


@pytest.mark.parametrize("size", [1e-36, 1e36])
@pytest.mark.usefixtures("products")
def test_sketch_of_values_at_the_ends_of_float32(size: float) -> None:
    matrix = random(300, 280)
    values, right = sketched_svd(matrix * size, 8, 10, 8, 0)
    expected, its_right = sketched_svd(matrix, 8, 10, 8, 0)
    torch.testing.assert_close(values.double(), expected.double() * size, rtol=1e-3, atol=0)
    assert torch.linalg.svdvals(right @ its_right.t()).min() > 0.99


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.usefixtures("products")
def test_sketch_is_in_float32(dtype: torch.dtype) -> None:
    matrix = random(300, 280).bfloat16()
    matrix[:, 0] *= 1000  # not found in bfloat16
    values, right = sketched_svd(matrix.to(dtype), 8, 10, 8, 0)
    expected = sketched_svd(matrix.float(), 8, 10, 8, 0)
    assert values.dtype == right.dtype == torch.float32
    assert torch.equal(values, expected[0]) and torch.equal(right, expected[1])


@pytest.mark.parametrize(
    ("way", "shape"),
    [
        ("full", (700, 1100)),
        ("randomized", (90, 20000)),  # by its Gram matrix
        ("randomized", (700, 1100)),
        ("randomized", (2100, 2050)),  # these two by rows in several threads
        ("randomized", (700, 6100)),
    ],
)
@pytest.mark.usefixtures("products")
def test_the_number_of_threads_changes_no_bit(
    way: Literal["randomized", "full"], shape: tuple[int, int]
) -> None:
    matrix, recipe = random(*shape), MeldRecipe(rank=32 if shape[0] == 90 else 64, svd=way)
    assert max(shape) < 2000 or shape[0] == 90 or matrix.numel() > svd.SHARED
    found = []
    for number in (1, 2, 3):
        with threads(number):
            found.append(truncated_svd(matrix, recipe, 0))
            assert torch.get_num_threads() == number
    for values, right in found[1:]:
        assert torch.equal(values, found[0][0]) and torch.equal(right, found[0][1])


def test_threads_are_given_back_after_an_error() -> None:
    with threads(3):
        with pytest.raises(RuntimeError), svd.one_thread():
            torch.zeros(2) @ torch.zeros(3)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as pool:  # what a thread begins with
            assert pool.submit(torch.get_num_threads).result() == 3


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
    with svd.one_thread():
        found = svd_of_gram(weight, 64)
    assert found is not None
    assert torch.equal(truncated_svd(weight, MeldRecipe(rank=64), 1)[1], found[1])


@pytest.mark.parametrize("shape", [(300, 200), (200, 300)])
def test_svd_of_a_matrix_of_low_rank_is_the_full_one(shape: tuple[int, int]) -> None:
    weight = random(shape[0], 40) @ random(40, shape[1], seed=1)
    assert svd_of_gram(weight, 64) is None  # squares of the rest are lost in rounding
    assert svd_of_gram(torch.zeros(shape), 1) is None
    values, right = truncated_svd(weight, MeldRecipe(rank=64), 0)
    with svd.one_thread():
        _, expected, directions = torch.linalg.svd(weight, full_matrices=False)
    assert torch.equal(values, expected[:64]) and torch.equal(right, directions[:64])


def test_full_svd_is_exact() -> None:
    error = random(150, 200)
    values, right = truncated_svd(error, MeldRecipe(rank=8, svd="full"), 0)
    expected = torch.linalg.svdvals(error.double())[:8]
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close((error @ right.t()).norm(dim=0), values, rtol=1e-5, atol=0)

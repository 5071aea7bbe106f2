"""Leading singular values and vectors of a weight: from a filtered sketch, a Gram matrix, in full.

A quantisation error is close to white noise, and so is much of a weight of a small model: its
singular values fall slowly, and powers of the matrix hardly tell the leading ones from the rest.
A Chebyshev polynomial does, with the same number of products: it is small on the squares of all
singular values below a bound, and grows beyond it faster than any other of its degree (filtered
subspace iteration; Zhou, Saad, Tiago and Chelikowsky, 2006).

On a CPU the bits do not depend on the number of threads, so that a run begins with the same A on
one device and on ranks that share its threads. LAPACK and torch's products share out their sums by
that number, so each has one thread; products with large matrices are taken by rows, always as many,
and those are given to threads instead. (Not so where torch is built without OpenMP, and a number of
threads is for good.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import reduce

import torch
from torch import Tensor

from falqon.fp8 import largest
from falqon.kernels import wide
from falqon.recipe import MeldRecipe

EXACT_UP_TO = 3
"""Smaller side of a matrix, in columns of its sketch, up to which it is not sketched."""

_DEGREE = 4  # products of one polynomial; its bound is then known better
_APART = 6.0  # times the bound: T_4 is 116,000 there, which float32 holds beside 1
_STEEP = 1e-3  # square of the last value over that of the first; bfloat16 does not tell below
_ROWS = 1024  # of a matrix on a CPU, multiplied at a time by one thread

SHARED = 2**22
"""Values of a matrix on a CPU from which on products with its rows are given to several threads."""


@contextmanager
def one_thread() -> Iterator[int]:
    """torch's operations on one thread, in this thread and those begun in it; how many they had."""
    threads = torch.get_num_threads()
    try:
        _set_threads(1)
        yield threads
    finally:
        _set_threads(threads)


def _set_threads(number: int) -> None:
    if torch.backends.openmp.is_available():
        torch.set_num_threads(number)


def single_threads(number: int) -> ThreadPoolExecutor:
    """Threads in each of which torch's operations have that thread only."""
    return ThreadPoolExecutor(number, initializer=_set_threads, initargs=(1,))


def truncated_svd(matrix: Tensor, recipe: MeldRecipe, seed: int) -> tuple[Tensor, Tensor]:
    """Leading singular values and right singular vectors of a matrix.

    `randomized` sketches where the smaller side is longer than `EXACT_UP_TO` times the sketch,
    `rank + oversampling` columns. Below that the eigenvectors of a Gram matrix take about as long,
    and are exact; where these would be inexact the SVD is the full one.

    Args:
        matrix: float32 [out, in].
        recipe: method and its settings.
        seed: of the sketch; the same seed gives the same bits on one kind of device, whatever the
            number of threads.

    Returns:
        Singular values [q] and V^T [q, in] with q = min(rank, out, in).
    """
    rank = min(recipe.rank, *matrix.shape)
    columns = rank + recipe.oversampling
    with one_thread():
        if recipe.svd == "full":
            return full_svd(matrix, rank)
        if min(matrix.shape) <= EXACT_UP_TO * columns:
            return _exact_svd(matrix, rank)
    return sketched_svd(matrix, rank, columns, recipe.power_iterations, seed)


def sketched_svd(
    matrix: Tensor, rank: int, columns: int, iterations: int, seed: int
) -> tuple[Tensor, Tensor]:
    """As `truncated_svd`, within a space of a few columns that a polynomial of the matrix filters.

    The space is found with products in bfloat16 where the device has them: rounding turns it by
    far less than what the filter leaves. Values and vectors within it are from float32.

    Args:
        matrix: float32 [out, in].
        rank: r.
        columns: of the space, random at first; at least r.
        iterations: products with `matrix^T matrix`, of which up to four make one polynomial.
        seed: of the columns.
    """
    matrix = matrix.float()
    size = _size(matrix)
    tall = matrix.shape[0] >= matrix.shape[1]
    upright = matrix if tall else matrix.t()
    with one_thread() as threads, single_threads(threads) as pool:
        rows = _Rows(upright, pool)
        basis = _leading_space(upright, size, rows, columns, iterations, seed)
        image = torch.cat(list(rows.each(lambda part: part @ basis, upright)))
        values, right = _exact_svd(image if tall else image.t(), rank)
        return values, (right @ basis.t() if tall else right)


class _Rows:
    """Rows of a matrix in parts that do not depend on the number of threads.

    Args:
        matrix: [m, n].
        pool: runs products with parts of a large matrix on a CPU.
    """

    def __init__(self, matrix: Tensor, pool: ThreadPoolExecutor) -> None:
        on_cpu = matrix.device.type == "cpu"
        self._step = _ROWS if on_cpu else len(matrix)
        self._map = pool.map if on_cpu and matrix.numel() >= SHARED else map

    def each(self, product: Callable[..., Tensor], *matrices: Tensor) -> Iterator[Tensor]:
        """`product` of every part, of as many rows of each matrix."""
        return self._map(product, *(matrix.split(self._step) for matrix in matrices))

    def sum(self, product: Callable[..., Tensor], *matrices: Tensor) -> Tensor:
        """The same, added up in float32, always in one order."""
        return reduce(torch.add, (part.float() for part in self.each(product, *matrices)))


def _size(matrix: Tensor) -> Tensor:
    """Power of two around the largest value: divided by it, no square overflows or vanishes."""
    return torch.exp2(torch.frexp(largest(matrix)).exponent.clamp(-126, 126).to(matrix.dtype))


def _products_in(device: torch.device) -> torch.dtype:
    """In what the device multiplies fastest, of what is accurate enough to find a space."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and not wide.WIDENS
    return torch.bfloat16 if fast else torch.float32


def _leading_space(
    matrix: Tensor, size: Tensor, rows: _Rows, columns: int, iterations: int, seed: int
) -> Tensor:
    """Orthonormal columns [n, columns] close to the leading right singular vectors.

    Args:
        matrix: float32 [m, n], m >= n.
        size: of its values.
        rows: of it.
        columns, iterations, seed: see `sketched_svd`.
    """
    factor = matrix.to(_products_in(matrix.device), copy=True).div_(size)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    start = torch.randn(len(matrix), columns, generator=generator, device=matrix.device)
    basis = rows.sum(lambda part, random: part.t() @ random, factor, start.to(factor.dtype))
    basis = torch.linalg.qr(basis).Q
    # A product with `factor^T factor` at once is worth it where it replaces many by its parts.
    square = None
    if len(basis) <= iterations * columns:
        square = rows.sum(lambda part: part.t() @ part, factor).to(factor.dtype)

    def image_of(block: Tensor) -> Tensor:
        block = block.to(factor.dtype)
        if square is not None:
            return (square @ block).float()
        return rows.sum(lambda part: part.t() @ (part @ block), factor)

    while iterations > 0:
        image = image_of(basis)
        squares, turn = torch.linalg.eigh(basis.t() @ image)
        if factor.dtype == torch.bfloat16 and squares[0] < _STEEP * squares[-1]:
            factor, square = matrix / size, None
            continue
        iterations -= 1
        # What is below the smallest of as many squares as there are columns is not looked for.
        bound = squares[0].clamp_min(1e-7 * squares[-1]).clamp_min(1e-20)
        # Columns far above it would drown the others. A product does for them what there is to do.
        apart = int((squares > _APART * bound).sum())
        filtered = columns - apart
        vectors, image = basis @ turn, image @ turn
        far, before = vectors[:, filtered:], vectors[:, :filtered]
        block = image[:, :filtered] * (2 / bound) - before
        block -= far @ (far.t() @ block)
        for _ in range(min(iterations, _DEGREE - 1)):
            # T_k = 2 (2 / bound M^T M - 1) T_(k-1) - T_(k-2)
            after = image_of(block).mul_(4 / bound).sub_(block, alpha=2).sub_(before)
            after -= far @ (far.t() @ after)
            before, block = block, after
            iterations -= 1
        block = torch.cat([block, image[:, filtered:]], dim=1)
        basis = torch.linalg.qr(block / block.norm(dim=0)).Q
    return basis


def full_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """As `truncated_svd`, from all of the singular values and vectors."""
    _, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return values[:rank], right[:rank]


def _exact_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    if (found := svd_of_gram(matrix, rank)) is not None:
        return found
    return full_svd(matrix, rank)


def svd_of_gram(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor] | None:
    """As `truncated_svd`, from the eigenvectors of the Gram matrix of the smaller side.

    Values and vectors are exact to 1e-4. None if the last value is below 1/30 of the first: then
    too much of its square is lost in rounding.
    """
    # Of numbers around one, and whatever float32 products are allowed to be rounded to.
    size = _size(matrix)
    scaled = matrix.double().div_(size)
    tall = matrix.shape[0] >= matrix.shape[1]
    gram = (scaled.t() @ scaled if tall else scaled @ scaled.t()).float()
    squares, vectors = torch.linalg.eigh(gram)
    squares, vectors = squares.flip(0)[:rank], vectors.flip(1)[:, :rank]
    if not squares[-1] > 1e-3 * squares[0]:
        return None
    if tall:
        return squares.sqrt() * size, vectors.t()
    right = vectors.t().double() @ scaled
    values = right.norm(dim=1)
    return values.float() * size, (right / values[:, None]).float()

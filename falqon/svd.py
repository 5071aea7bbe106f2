"""Leading singular values and vectors of a weight: from a filtered sketch, a Gram matrix, in full.

A quantisation error is close to white noise, and so is much of a weight of a small model: its
singular values fall slowly, and powers of the matrix hardly tell the leading ones from the rest.
A Chebyshev polynomial does, with the same number of products: it is small on the squares of all
singular values below a bound, and grows beyond it faster than any other of its degree (filtered
subspace iteration; Zhou, Saad, Tiago and Chelikowsky, 2006).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from falqon.fp8 import largest
from falqon.kernels import wide
from falqon.recipe import MeldRecipe

EXACT_UP_TO = 3
"""Smaller side of a matrix, in columns of its sketch, up to which it is not sketched."""

_DEGREE = 4  # products of one polynomial; its bound is then known better
_GROWTH = 1e5  # of the largest value over the bound: float32 still holds the others beside it
_STEEP = 1e-3  # square of the last value over that of the first; bfloat16 does not tell below


def truncated_svd(matrix: Tensor, recipe: MeldRecipe, seed: int) -> tuple[Tensor, Tensor]:
    """Leading singular values and right singular vectors of a matrix.

    `randomized` sketches where the smaller side is longer than `EXACT_UP_TO` times the sketch,
    `rank + oversampling` columns. Below that the eigenvectors of a Gram matrix take about as long,
    and are exact; where these would be inexact the SVD is the full one.

    Args:
        matrix: float32 [out, in].
        recipe: method and its settings.
        seed: of the sketch; the same seed gives the same bits on one kind of device.

    Returns:
        Singular values [q] and V^T [q, in] with q = min(rank, out, in).
    """
    rank = min(recipe.rank, *matrix.shape)
    if recipe.svd == "full":
        return full_svd(matrix, rank)
    columns = rank + recipe.oversampling
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
    tall = matrix.shape[0] >= matrix.shape[1]
    basis = _leading_space(matrix if tall else matrix.t(), columns, iterations, seed)
    if tall:
        values, right = _exact_svd(matrix @ basis, rank)
        return values, right @ basis.t()
    return _exact_svd(basis.t() @ matrix, rank)


def _size(matrix: Tensor) -> Tensor:
    """Power of two around the largest value: divided by it, no square overflows or vanishes."""
    return torch.exp2(torch.frexp(largest(matrix)).exponent.clamp(-100, 100).to(matrix.dtype))


def _products_in(device: torch.device) -> torch.dtype:
    """In what the device multiplies fastest, of what is accurate enough to find a space."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and not wide.WIDENS
    return torch.bfloat16 if fast else torch.float32


def _leading_space(matrix: Tensor, columns: int, iterations: int, seed: int) -> Tensor:
    """Orthonormal columns [n, columns] close to the leading right singular vectors.

    Args:
        matrix: float32 [m, n], m >= n.
        columns, iterations, seed: see `sketched_svd`.
    """
    size = _size(matrix)
    factor = matrix.to(_products_in(matrix.device), copy=True).div_(size)
    generator = torch.Generator(matrix.device).manual_seed(seed)
    start = torch.randn(len(matrix), columns, generator=generator, device=matrix.device)
    basis = torch.linalg.qr((factor.t() @ start.to(factor.dtype)).float()).Q
    # A product with `factor^T factor` at once is worth it where it replaces many by its parts.
    square = factor.t() @ factor if len(basis) <= iterations * columns else None

    def image_of(block: Tensor) -> Tensor:
        block = block.to(factor.dtype)
        return (factor.t() @ (factor @ block) if square is None else square @ block).float()

    while iterations > 0:
        image = image_of(basis)
        squares, turn = torch.linalg.eigh(basis.t() @ image)
        if squares[0] < _STEEP * squares[-1] and factor.dtype != torch.float32:
            factor, square = matrix / size, None
            continue
        # What is below the smallest of as many squares as there are columns is not looked for.
        bound = max(float(squares[0]), 1e-6)
        highest = max(2 * float(squares[-1]) / bound - 1, 1 + 1e-6)
        # T_k(x) = cosh(k arccosh x)
        degree = max(1, min(iterations, _DEGREE, int(math.acosh(_GROWTH) / math.acosh(highest))))
        before = basis @ turn
        block = (image @ turn).mul_(2 / bound).sub_(before)
        for _ in range(degree - 1):
            # T_k = 2 (2 / bound M^T M - 1) T_(k-1) - T_(k-2)
            after = image_of(block).mul_(4 / bound).sub_(block, alpha=2).sub_(before)
            before, block = block, after
        basis = torch.linalg.qr(block / block.norm(dim=0)).Q
        iterations -= degree
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

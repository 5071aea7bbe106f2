"""Which rows an update policy writes, and their pending changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from falqon.linear import MeldedLinear
from falqon.parallel import selection
from falqon.parallel.layers import ShardedLayer
from falqon.recipe import UpdateRecipe
from falqon.rows import RowState, select_rows


def choose(recipe: UpdateRecipe, state: RowState) -> tuple[Tensor | None, Tensor]:
    """Rows of a layer whose B is all here; rows of B that are not finite are cleared first.

    Returns:
        Rows, int64 [k] or None for all, and their pending change as a B, float32 [k, r].
    """
    layer = state.layer
    drop_diverged(layer.B)
    pending = layer.pending()
    if recipe.threshold:
        enough = state.expected_flips(pending) >= recipe.threshold
        pending = torch.where(enough[:, None], pending, 0.0)
    if sum(_counts(recipe, layer)) >= layer.out_features:
        return None, pending
    rows = _best(recipe, state, _score(recipe, state, pending), lambda: (pending != 0).any(dim=1))
    return rows, pending[rows]


def choose_cut(recipe: UpdateRecipe, states: list[RowState]) -> dict[int, tuple[Tensor, Tensor]]:
    """As `choose`, of layers that are cut up, where L1 norms are all that it takes.

    B stays where it is: norms and the chosen rows are exchanged, of all layers at once. Where more
    than half of the rows are chosen, that would be too much to hold.

    Returns:
        By id of the state; those that are left out have to be opened and given to `choose`.
    """
    if recipe.select != "l1" or recipe.threshold or recipe.unselected == "clear":
        return {}
    cut: list[RowState] = []
    layers: list[ShardedLayer] = []
    for state in states:
        layer = state.layer
        if (
            isinstance(layer, ShardedLayer)
            and 2 * sum(_counts(recipe, layer)) <= layer.out_features
        ):
            cut.append(state)
            layers.append(layer)
            drop_diverged(state.own_b)
    if not cut:
        return {}
    norms = selection.norms(layers)
    rows = [_best(recipe, s, n, partial(torch.gt, n, 0)) for s, n in zip(cut, norms, strict=True)]
    changes = selection.pending_rows(layers, rows)
    return {id(s): (k, b) for s, k, b in zip(cut, rows, changes, strict=True)}


def drop_diverged(b: Tensor) -> None:
    """Clear rows of B that are not finite: they cannot be written, and would act for good."""
    finite = torch.isfinite(b.sum(dim=1, keepdim=True))
    if b.is_cpu and bool(finite.all()):  # on a GPU looking would wait
        return
    b.copy_(torch.where(finite, b, 0.0))


def _counts(recipe: UpdateRecipe, layer: MeldedLinear | ShardedLayer) -> tuple[int, int]:
    """How many rows to write for their score, and how many more for their age."""
    extra = 0
    if recipe.max_age is not None:
        extra = -(-layer.out_features // (recipe.max_age // recipe.every))
    return recipe.rows_of(layer.out_features, layer.rank), extra


def _score(recipe: UpdateRecipe, state: RowState, pending: Tensor) -> Tensor:
    if recipe.select == "l1":  # so that its order does not decide about rows
        return pending.abs().sum(dim=1, dtype=torch.float64).float()
    if recipe.select == "norm":
        return state.squares(pending)
    return state.expected_flips(pending)


def _best(
    recipe: UpdateRecipe, state: RowState, score: Tensor, waiting: Callable[[], Tensor]
) -> Tensor:
    count, extra = _counts(recipe, state.layer)
    since = None
    if extra:  # a row that nothing is pending for does not wait for its turn
        since = torch.where(waiting(), state.last_written, torch.iinfo(torch.int32).max)
    return select_rows(score, count, since, extra)

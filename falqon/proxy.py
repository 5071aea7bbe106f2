"""The proxy update: rows of B A go into the FP8 codes after an optimizer step (paper sec. 4.3).

What the presets differ in is in `falqon.recipe.UpdateRecipe`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from falqon.kernels import RowUpdate, RowUpdateCounts
from falqon.linear import MeldedLinear
from falqon.recipe import UpdateRecipe


@dataclass(frozen=True)
class UpdateStatistics:
    """What one update did over all layers.

    Attributes:
        rows_written: rows with a change that was not zero.
        codes_flipped: FP8 codes that changed.
        codes_flipped_share: of all backbone codes.
        realised_ratio: length of the landed change along the wanted one, over the length of the
            wanted one: 1 if nothing is lost in rounding, 0 if nothing lands. Wanted is all that
            left B: rows that were cleared without being written count as lost.
        saturated_share: share of the written rows' codes at the largest magnitude.
    """

    rows_written: int
    codes_flipped: int
    codes_flipped_share: float
    realised_ratio: float
    saturated_share: float


def select_rows(proxy: Tensor, count: int) -> Tensor:
    """The rows with the largest change, by L1 norm (paper sec. 4.3; the released code's |.|).

    Ties go to the lower row, so that the choice is the same on every device.

    Args:
        proxy: B, float32 [out, r].
        count: k, at most `out`.

    Returns:
        int64 [k] row numbers.
    """
    if count >= proxy.shape[0]:
        return torch.arange(proxy.shape[0], device=proxy.device)
    score = proxy.abs().sum(dim=1)
    # NaN sorts first otherwise and would crowd out rows that can be written.
    score = torch.where(torch.isfinite(score), score, torch.full_like(score, -1.0))
    return torch.sort(score, descending=True, stable=True).indices[:count]


class ProxyUpdate:
    """Applies an `UpdateRecipe` to melded layers.

    Args:
        layers: by full name; their order numbers them for stochastic rounding.
        recipe: the policy.
    """

    def __init__(self, layers: dict[str, MeldedLinear], recipe: UpdateRecipe) -> None:
        self.layers = layers
        self.recipe = recipe
        self.row_update = RowUpdate(recipe.rounding)
        self._counts: list[Tensor] = []

    @torch.no_grad()
    def step(self, number: int, only: set[int] | None = None) -> None:
        """Write the selected rows of every layer and clear them in B.

        Args:
            number: of the optimizer step, from 0: a counter of the stochastic rounding.
            only: ids of the B to consider (those of one optimizer), all if None.
        """
        counts, lost = [], []
        for index, layer in enumerate(self.layers.values()):
            if only is not None and id(layer.B) not in only:
                continue
            rows = select_rows(layer.B, self.recipe.rows_of(layer.out_features, layer.rank))
            counts.append(self._write(layer, rows, number, index))
            if self.recipe.unselected == "clear":
                lost.append(_squared_change(layer))
                layer.B.zero_()
        self._collect(counts, lost)

    @torch.no_grad()
    def flush(self, number: int) -> None:
        """Write every pending row, whatever the policy selects: afterwards B is zero."""
        counts = [
            self._write(layer, torch.arange(layer.out_features, device=layer.B.device), number, i)
            for i, layer in enumerate(self.layers.values())
        ]
        self._collect(counts, [])

    def _write(self, layer: MeldedLinear, rows: Tensor, number: int, index: int) -> RowUpdateCounts:
        key = (self.recipe.seed, number, index)
        counts: RowUpdateCounts = self.row_update(
            layer.codes, layer.scale, rows, layer.B[rows], key
        )
        layer.B[rows] = 0.0
        return counts

    def _collect(self, counts: list[RowUpdateCounts], lost: list[Tensor]) -> None:
        self._counts = []
        if not counts:
            return
        columns = [
            torch.stack([value.double() for value in column])
            for column in zip(*counts, strict=True)
        ]
        sums = torch.stack([column.sum() for column in columns])
        lost_sum = torch.stack(lost).sum() if lost else sums.new_zeros(())
        self._counts = [*sums, lost_sum]

    def statistics(self) -> UpdateStatistics | None:
        """What the last `step` or `flush` did; waits for the device. None before the first."""
        if not self._counts:
            return None
        sums = torch.stack(self._counts).tolist()
        written, written_codes, flipped, saturated, projection, wanted, lost = sums
        codes = sum(layer.out_features * layer.in_features for layer in self.layers.values())
        return UpdateStatistics(
            rows_written=int(written),
            codes_flipped=int(flipped),
            codes_flipped_share=flipped / codes,
            realised_ratio=projection / (wanted + lost) if wanted + lost > 0 else 0.0,
            saturated_share=saturated / written_codes if written_codes else 0.0,
        )


def _squared_change(layer: MeldedLinear) -> Tensor:
    """Squared norm of B A, through the r x r matrix A A^T; float64 scalar."""
    adapter = layer.dequantized_adapter()
    return ((layer.B @ (adapter @ adapter.t())) * layer.B).sum(dtype=torch.float64)

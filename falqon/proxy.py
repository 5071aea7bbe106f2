"""The proxy update: rows of B A go into the FP8 codes after an optimizer step (paper sec. 4.3).

What the presets differ in is in `falqon.recipe.UpdateRecipe`, what they mean in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from falqon.checkpoint.hashing import hash_tensors
from falqon.errors import InputError
from falqon.kernels import Origin, RowUpdate, RowUpdateCounts
from falqon.linear import MeldedLinear
from falqon.recipe import UpdateRecipe


@dataclass(frozen=True)
class UpdateStatistics:
    """What the last write did over all layers.

    Attributes:
        rows_written: rows with a change that was not zero.
        codes_flipped: FP8 codes that changed.
        codes_flipped_share: of all backbone codes.
        realised_ratio: length of the landed change along the wanted one, over the length of the
            wanted one: 1 if nothing is lost in rounding, 0 if nothing lands. Wanted is all that
            left B: rows that were cleared without being written count as lost.
        saturated_share: share of the written rows' codes at the largest magnitude.
        pending_norm: Frobenius norm of what is still in B, as a change of the weights.
        staleness: optimizer steps since a row was last written, mean over the rows with a pending
            change.
    """

    rows_written: int
    codes_flipped: int
    codes_flipped_share: float
    realised_ratio: float
    saturated_share: float
    pending_norm: float
    staleness: float


def select_rows(score: Tensor, count: int, first: Tensor | None = None, extra: int = 0) -> Tensor:
    """The rows with the largest score, after those that have waited longest.

    Ties go to the lower row, so that the choice is the same on every device.

    Args:
        score: float32 [out]; rows whose score is not finite come last.
        count: rows to take by score.
        first: int [out], the step in which each row was last written.
        extra: rows to take before those, the longest unwritten ones.

    Returns:
        int64 row numbers, at most `out`.
    """
    if count + extra >= len(score):
        return torch.arange(len(score), device=score.device)
    # NaN sorts first otherwise and would crowd out rows that can be written.
    score = torch.where(torch.isfinite(score), score, torch.full_like(score, -1.0))
    if first is None or not extra:
        return torch.sort(score, descending=True, stable=True).indices[:count]
    oldest = torch.sort(first, stable=True).indices[:extra]
    score = score.index_fill(0, oldest, -2.0)
    return torch.cat([oldest, torch.sort(score, descending=True, stable=True).indices[:count]])


_LARGEST = 1e30
"""Of a B that can be written: B A stays finite with any A in FP8."""


class _LayerState:
    """What the update keeps about one layer beside its parameters.

    Attributes:
        last_written: int32 [out] on the layer's device: number of the step that last wrote a row,
            -1 if none has.
        original: what rows are derived from, in host memory: uint8 or floating [out, in].
        applied: float32 [out, r] in host memory: all of B that has been written so far.
    """

    def __init__(self, layer: MeldedLinear, recipe: UpdateRecipe, weight: Tensor | None) -> None:
        out, device = layer.out_features, layer.codes.device
        self.layer = layer
        self.last_written = torch.full((out,), -1, dtype=torch.int32, device=device)
        self.original = self.applied = None
        if recipe.keeps_originals:
            pin = device.type == "cuda"
            if recipe.written == "codes":
                keep = layer.codes.detach()[:out].to("cpu", copy=True)
            else:
                assert weight is not None
                keep = weight.cpu()  # nobody else holds it, so no copy
            self.original = keep.pin_memory() if pin else keep
            self.applied = torch.zeros(out, layer.rank, pin_memory=pin)
        self.forget()

    def forget(self) -> None:
        """Drop what is derived from the codes, after these were loaded from a checkpoint."""
        self._gram: Tensor | None = None
        self._gram_inverse: Tensor | None = None
        self._binades: Tensor | None = None

    @property
    def gram(self) -> Tensor:
        """A A^T in weight units, float32 [r, r]."""
        if self._gram is None:
            adapter = self.layer.dequantized_adapter()
            self._gram = adapter @ adapter.t()
        return self._gram

    @property
    def gram_inverse(self) -> Tensor:
        """Pseudo-inverse of A A^T in units of codes, float32 [r, r]."""
        if self._gram_inverse is None:
            gram = self.gram.double() * self.layer.scale.detach().double().square()
            self._gram_inverse = torch.linalg.pinv(gram, hermitian=True).float()
        return self._gram_inverse

    def squares(self, pending: Tensor) -> Tensor:
        """Squared norm of each row of B A, through A A^T; float32 [out]."""
        return ((pending @ self.gram) * pending).sum(dim=1)

    def expected_flips(self, pending: Tensor) -> Tensor:
        """Share of each row's codes that its pending change is expected to flip, float32 [out].

        Weights are taken to lie anywhere between two codes and the changes of a row to be normal.
        A change d then flips a code whose distance to the next is u with probability
        min(1, |d| / u), on average `erfc(x) + (1 - exp(-x^2)) / (x sqrt(pi))`, x = u / (sd sqrt 2).
        """
        if self._binades is None:
            self._binades = binades(self.layer.codes[: self.layer.out_features])
        layer = self.layer
        deviation = (self.squares(pending).clamp(min=0) / layer.in_features).sqrt()
        steps = _STEPS.to(deviation.device) / layer.scale.detach()
        x = steps / (deviation[:, None] * 2**0.5)
        share = torch.erfc(x) + (1 - (-x.square()).exp()) / (x * torch.pi**0.5)
        # Without a change x is infinite, and the share 0.
        return (share * self._binades).sum(dim=1)

    def wrote(self, rows: Tensor | None) -> None:
        """Look again at rows whose codes may have changed."""
        if self._binades is None:
            return
        codes = self.layer.codes[: self.layer.out_features]
        if rows is None:
            self._binades = None
        else:
            self._binades[rows] = binades(codes[rows])


_STEPS = torch.tensor([2.0 ** (max(exponent, 1) - 10) for exponent in range(16)])
"""Distance of neighbouring E4M3 values by exponent field, in units of codes."""


def binades(codes: Tensor) -> Tensor:
    """Share of each row's codes by exponent field, which tells the distance to the next code.

    Args:
        codes: uint8 [k, in].

    Returns:
        float32 [k, 16].
    """
    exponent = ((codes >> 3) & 15).long()
    counts = torch.zeros(len(codes), 16, device=codes.device)
    ones = torch.ones((), device=codes.device).expand(exponent.shape)
    return counts.scatter_add_(1, exponent, ones) / codes.shape[1]


class ProxyUpdate:
    """Applies an `UpdateRecipe` to melded layers.

    Args:
        layers: by full name; their order numbers them for stochastic rounding.
        recipe: the policy.
        weights: original weights [out, in] by the same names, for `written: weights`; kept in host
            memory as they are.

    Raises:
        InputError: if the policy needs original weights that are not there.
    """

    def __init__(
        self,
        layers: dict[str, MeldedLinear],
        recipe: UpdateRecipe,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layers = layers
        self.recipe = recipe
        missing = [name for name in layers if name not in (weights or {})]
        if recipe.written == "weights" and missing:
            raise InputError(
                f"the update preset {recipe.preset!r} derives rows from the original weights, and "
                f"those of {missing[0]} are not there: the model was melded before. Use 'anchored' "
                "(original codes) or 'written: codes', or start from a model that is not melded."
            )
        exact = [name for name, layer in layers.items() if layer.codes.dtype != torch.uint8]
        if exact and (recipe.select == "flips" or recipe.threshold):
            raise InputError(
                "select 'flips' and threshold count FP8 codes that flip, and there are none with "
                "the recipe 'none': leave them out."
            )
        self.row_update = RowUpdate(recipe.rounding)
        self.states = {
            name: _LayerState(layer, recipe, (weights or {}).get(name))
            for name, layer in layers.items()
        }
        for layer in layers.values():
            layer.live = recipe.live
        self._number = 0
        self._counts: list[Tensor] = []
        # Squared norms and products of wanted and landed change since the start, [layers].
        self._landed = torch.zeros(len(layers), dtype=torch.float64)
        self._wanted = torch.zeros(len(layers), dtype=torch.float64)
        self._originals_hash: str | None = None

    @torch.no_grad()
    def step(self, number: int, only: set[int] | None = None) -> None:
        """Write the rows that the policy selects in every layer.

        Args:
            number: of the optimizer step, from 0: a counter of the stochastic rounding.
            only: ids of the B to consider (those of one optimizer), all if None.
        """
        self._number = number
        if (number + 1) % self.recipe.every:
            return
        counts: list[RowUpdateCounts] = []
        lost: list[Tensor] = []
        written: list[int] = []
        for index, (name, layer) in enumerate(self.layers.items()):
            if only is not None and id(layer.B) not in only:
                continue
            state = self.states[name]
            rows, change = self._select(layer, state)
            counts.append(self._write(layer, state, rows, change, number, index))
            written.append(index)
            if self.recipe.unselected == "clear" and rows is not None:
                others = layer.pending().index_fill(0, rows, 0.0)
                lost.append(state.squares(others).sum(dtype=torch.float64))
                left = layer.B[rows].clone()
                layer.B.zero_()
                layer.B[rows] = left
            elif self.recipe.unselected == "clear":
                lost.append(torch.zeros((), dtype=torch.float64, device=layer.B.device))
        self._collect(counts, lost, written)

    @torch.no_grad()
    def flush(self, number: int) -> None:
        """Write every pending row, whatever the policy selects: afterwards B is zero.

        What `project` would keep of a row is dropped: nothing of it could be served.
        """
        counts = []
        for index, (name, layer) in enumerate(self.layers.items()):
            state = self.states[name]
            counts.append(self._write(layer, state, None, layer.pending(), number, index, True))
        self._collect(counts, [], list(range(len(counts))))

    def is_pending(self) -> bool:
        """Some row has a change that is not written; waits for the device."""
        return any(bool(layer.B.any()) for layer in self.layers.values())

    def _select(self, layer: MeldedLinear, state: _LayerState) -> tuple[Tensor | None, Tensor]:
        """Rows to write, int64 [k] or None for all, and their pending change as a B [k, r]."""
        recipe, out = self.recipe, layer.out_features
        count = recipe.rows_of(out, layer.rank)
        extra = 0
        if recipe.max_age is not None:
            extra = -(-out // (recipe.max_age // recipe.every))
        pending = layer.pending()
        if recipe.threshold:
            enough = state.expected_flips(pending) >= recipe.threshold
            pending = torch.where(enough[:, None], pending, 0.0)
        if count + extra >= out:
            return None, pending
        # A row that nothing is pending for does not wait for its turn.
        waiting = (pending != 0).any(dim=1)
        since = torch.where(waiting, state.last_written, torch.iinfo(torch.int32).max)
        rows = select_rows(self._score(state, pending), count, since, extra)
        return rows, pending[rows]

    def _score(self, state: _LayerState, pending: Tensor) -> Tensor:
        if self.recipe.select == "l1":
            return pending.abs().sum(dim=1)
        if self.recipe.select == "norm":
            return state.squares(pending)
        return state.expected_flips(pending)

    def _write(
        self,
        layer: MeldedLinear,
        state: _LayerState,
        rows: Tensor | None,
        change: Tensor,
        number: int,
        index: int,
        last: bool = False,
    ) -> RowUpdateCounts:
        """Write rows (None: all); those whose change is zero stay as they are, in B as well."""
        if rows is None:
            where: Tensor | slice = slice(None)
            on_host = where
        else:
            where, on_host = rows, rows.cpu()
        held = (change != 0).any(dim=1)  # NaN counts as a change: it must leave B
        origin = None
        if state.original is not None and state.applied is not None:
            # What would overflow in B A is not written, and must not stay in the sum for good.
            usable = (change.abs().amax(dim=1, keepdim=True) < _LARGEST).expand_as(change)
            change = torch.where(usable, change, torch.nan)
            total = state.applied[on_host] + torch.where(usable, change, 0.0).cpu()
            state.applied[on_host] = total
            device = change.device
            origin = Origin(state.original[on_host].to(device), total.to(device))
        project = self.recipe.written == "project" and not last
        counts, kept = self.row_update(
            layer.codes,
            layer.scale,
            rows,
            change,
            (self.recipe.seed, number, index),
            origin,
            state.gram_inverse if project else None,
        )
        left = torch.zeros_like(change) if kept is None else kept / layer.scaling
        layer.B[where] = torch.where(held[:, None], left, layer.B[where])
        state.last_written[where] = torch.where(held, number, state.last_written[where])
        state.wrote(rows)
        return counts

    def _collect(
        self, counts: list[RowUpdateCounts], lost: list[Tensor], written: list[int]
    ) -> None:
        self._counts = []
        if not counts:
            return
        columns = [
            torch.stack([value.double() for value in column])
            for column in zip(*counts, strict=True)
        ]
        lost_by_layer = torch.stack(lost) if lost else torch.zeros_like(columns[-1])
        self._counts = [*(column.sum() for column in columns), lost_by_layer.sum()]
        if self._landed.device != columns[0].device:
            self._landed = self._landed.to(columns[0].device)
            self._wanted = self._wanted.to(columns[0].device)
        self._landed[written] += columns[4]
        self._wanted[written] += columns[5] + lost_by_layer

    def statistics(self) -> UpdateStatistics | None:
        """What the last write did; waits for the device. None before the first."""
        if not self._counts:
            return None
        pending = []
        for name, layer in self.layers.items():
            state, change = self.states[name], layer.pending()
            waiting = (change != 0).any(dim=1)
            age = (self._number - state.last_written) * waiting
            left = state.squares(change).sum(dtype=torch.float64)
            pending.append(torch.stack([left, age.sum().double(), waiting.sum().double()]))
        sums = torch.cat([torch.stack(self._counts), torch.stack(pending).sum(dim=0)]).tolist()
        written, written_codes, flipped, saturated, projection, wanted, lost, *sums = sums
        squared, age, waiting = sums
        codes = sum(layer.out_features * layer.in_features for layer in self.layers.values())
        return UpdateStatistics(
            rows_written=int(written),
            codes_flipped=int(flipped),
            codes_flipped_share=flipped / codes,
            realised_ratio=projection / (wanted + lost) if wanted + lost > 0 else 0.0,
            saturated_share=saturated / written_codes if written_codes else 0.0,
            pending_norm=squared**0.5,
            staleness=age / waiting if waiting else 0.0,
        )

    def lengths_by_layer(self) -> dict[str, tuple[float, float]]:
        """Wanted and landed change of each layer over all writes since the start of training.

        Wanted is the root of the summed squares of the writes' wanted changes, landed what came of
        it along them: equal if nothing is lost in rounding. Waits for the device.
        """
        wanted = self._wanted.sqrt()
        landed = torch.where(wanted > 0, self._landed / wanted, 0.0)
        pairs = zip(wanted.tolist(), landed.tolist(), strict=True)
        return dict(zip(self.layers, pairs, strict=True))

    # -- state --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What a resumed training needs beside codes and B; tensors and plain values."""
        state: dict[str, Any] = {
            "last_written": {name: s.last_written for name, s in self.states.items()},
            "landed": self._landed,
            "wanted": self._wanted,
        }
        if self.recipe.keeps_originals:
            state["applied"] = {name: s.applied for name, s in self.states.items()}
            state["originals"] = self._hash_originals()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            InputError: if rows would be derived from other originals than in the checkpoint.
        """
        if state.get("originals", "") != self._hash_originals():
            raise InputError(
                "the model that was loaded is not the one this checkpoint was trained from: its "
                f"weights have the hash {self._hash_originals()[:12]}, the checkpoint's "
                f"{state.get('originals', 'none')[:12]}. Give the same model (and revision)."
            )
        for name, own in self.states.items():
            own.forget()
            own.last_written.copy_(state["last_written"][name])
            if own.applied is not None:
                own.applied.copy_(state["applied"][name])
        self._landed = state["landed"].clone()
        self._wanted = state["wanted"].clone()

    def _hash_originals(self) -> str:
        """SHA-256 over the originals, which never change; empty if there are none."""
        if not self.recipe.keeps_originals:
            return ""
        if self._originals_hash is None:
            originals = {n: s.original for n, s in self.states.items() if s.original is not None}
            self._originals_hash = hash_tensors(originals)
        return self._originals_hash

"""The proxy update: rows of B A go into the FP8 codes after an optimizer step (paper sec. 4.3).

What the presets differ in is in `falqon.recipe.UpdateRecipe`, what they mean in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from falqon.choice import choose, choose_cut, drop_diverged
from falqon.errors import InputError
from falqon.kernels import (
    Compensation,
    Origin,
    RowUpdate,
    RowUpdateCounts,
    RowWrite,
    compensation,
)
from falqon.kernels.native import proxy as native
from falqon.kernels.operands import are_consecutive
from falqon.kernels.row_update import LARGEST
from falqon.linear import MeldedLinear, has_hooks
from falqon.moments import InputMoments
from falqon.parallel.layers import ShardedLayer
from falqon.parallel.writes import part_write
from falqon.recipe import UpdateRecipe
from falqon.rows import RowState


@dataclass(frozen=True)
class UpdateStatistics:
    """What the last write did over all layers.

    Attributes:
        rows_written: rows with a change that was not zero (all rows of a compensated flush).
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


class _Write(NamedTuple):
    """A layer's rows on their way into its codes.

    Attributes:
        layer, state: what they are of.
        held: bool [k], rows with something to write.
        rows: int64 [k], or None for all.
        write: for the kernel: of a layer that is cut up, what this rank holds of these rows.
        written: of a layer that is cut up, how many rows all ranks write, int64.
    """

    layer: MeldedLinear | ShardedLayer
    state: RowState
    held: Tensor
    rows: Tensor | None
    write: RowWrite
    written: Tensor | None = None


def _columns(counts: list[RowUpdateCounts]) -> list[Tensor]:
    """By field, float64 [layers] each."""
    return [torch.stack([x.double() for x in column]) for column in zip(*counts, strict=True)]


class ProxyUpdate:
    """Applies an `UpdateRecipe` to melded layers.

    Args:
        layers: by full name; their order numbers them for stochastic rounding.
        recipe: the policy.
        weights: original weights [out, in] by the same names, for `written: weights`. They are
            taken out of it, and kept in host memory.
        pin: lock what is kept for CUDA into memory, so that rows get to the device faster.

    Raises:
        InputError: if the policy needs original weights that are not there.
    """

    def __init__(
        self,
        layers: dict[str, MeldedLinear],
        recipe: UpdateRecipe,
        weights: MutableMapping[str, Tensor] | None = None,
        pin: bool = True,
    ) -> None:
        weights = {} if weights is None else weights
        self.layers = layers
        self.recipe = recipe
        missing = [name for name in layers if name not in weights]
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
        # Without FP8 rounding there is nothing to compensate.
        self._compensates = recipe.flush_rounding == "compensated" and len(exact) < len(layers)
        self.row_update = RowUpdate(recipe.rounding)
        self.states = {
            name: RowState(layer, recipe, weights.pop(name, None), pin)
            for name, layer in layers.items()
        }
        for layer in layers.values():
            layer.live = recipe.live
        self._checked = False
        self.is_sharded = False
        self._is_closed = False  # nothing was trained since the last flush
        self._counts: list[Tensor] = []
        # Squared norms and products of wanted and landed change since the start, [layers].
        self._landed = torch.zeros(len(layers), dtype=torch.float64, device="cpu")
        self._wanted = torch.zeros(len(layers), dtype=torch.float64, device="cpu")

    def shard(self, views: Mapping[str, ShardedLayer]) -> None:
        """Go on with layers that were cut up over ranks.

        Args:
            views: of all layers, by name.

        Raises:
            InputError: for a policy that needs whole rows.
        """
        if views and self.recipe.written == "project":
            raise InputError(
                "the update policy projects what rounding left of a row onto A (written: project, "
                "the preset 'feedback'), which takes whole rows, and the codes are sharded: use "
                "another policy, or a strategy that does not shard (ddp)."
            )
        for name, view in views.items():
            self.states[name].shard(view)
        self.is_sharded = bool(views)

    @torch.inference_mode(False)  # what is made here lives on; an inference tensor could not
    @torch.no_grad()
    def step(self, number: int, only: set[int] | None = None) -> None:
        """Write the rows that the policy selects in every layer.

        Args:
            number: of the optimizer step, from 0: a counter of the stochastic rounding.
            only: ids of the B to consider (those of one optimizer), all if None.

        Raises:
            InputError: if the layers' codes are not those of the originals, see `load_state_dict`.
        """
        self._check()
        self._is_closed = False
        due: list[tuple[int, RowState]] = []
        for index, (name, melded) in enumerate(self.layers.items()):
            if only is not None and id(melded.B) not in only:
                continue
            state = self.states[name]
            state.steps += 1
            if state.steps % self.recipe.every == 0:
                state.follow()
                due.append((index, state))
        if due and self._is_one_call([state for _, state in due]):
            done = native.update([self._row_choice(state) for _, state in due])
            self._collect(list(done.unbind(dim=1)), [], [index for index, _ in due])
        else:
            self._step_by_layer(due, number)

    def _is_one_call(self, states: list[RowState]) -> bool:
        """Whether the compiled function takes all of it."""
        recipe = self.recipe
        usual = recipe.select == "l1" and recipe.unselected == "keep" and not recipe.threshold
        if not usual or recipe.max_age is not None or recipe.rounding != "nearest":
            return False
        # Whoever replaced a step, or looks at one, wants it to be called.
        if type(self.row_update) is not RowUpdate or has_hooks(self.row_update):
            return False
        return recipe.written != "project" and self._are_taken(states)

    def _are_taken(self, states: list[RowState]) -> bool:
        """Whether the compiled functions take the layers."""
        if self.is_sharded:
            return False
        layers = [state.layer for state in states]
        originals = [state.original for state in states]
        return all(
            native.takes_layer(layer.B, layer.codes, layer.scale, original)
            for layer, original in zip(layers, originals, strict=True)
        )

    def _row_choice(self, state: RowState) -> native.Proxy:
        layer = state.layer
        return native.Proxy(
            layer.B,
            layer.codes,
            layer.scale,
            self.recipe.rows_of(layer.out_features, layer.rank),
            layer.lora_scaling,
            state.steps - 1,
            state.original,
            state.applied,
            state.last_written,
            state.touched,
        )

    def _step_by_layer(self, due: list[tuple[int, RowState]], number: int) -> None:
        clears = self.recipe.unselected == "clear"
        project = self.recipe.written == "project"
        lost: list[Tensor] = []
        written: list[int] = []
        chosen = choose_cut(self.recipe, [state for _, state in due])

        def writes() -> Iterator[_Write]:
            for index, state in due:
                layer = state.layer
                rows: Tensor | None
                if id(state) in chosen:
                    rows, change = chosen[id(state)]
                else:
                    state.open()
                    rows, change = choose(self.recipe, state)
                write = self._prepare(layer, state, rows, change, index, project)
                if clears:  # what is written was copied, and leaves B afterwards
                    lost.append(self._clear(layer, state, rows))
                written.append(index)
                yield write

        counts = self._write(writes(), number)
        self._collect(_columns(counts), lost, written)

    @torch.inference_mode(False)
    @torch.no_grad()
    def flush(self, number: int, calibrate: Callable[[], None] | None = None) -> None:
        """Write every pending row, whatever the policy selects: afterwards B is zero.

        What `project` would keep of a row is dropped: nothing of it could be served. With
        `flush_rounding: compensated` all rows are written, those with nothing pending as well, and
        `calibrate` is run once for every `calibration_memory` bytes of second moments, each time
        with the layers that were measured before already written.

        Args:
            number: of the optimizer step, as in `step`.
            calibrate: runs the model on some training data, for `flush_rounding: compensated`.

        Raises:
            InputError: as `step` does, and if `calibrate` is missing.
        """
        self._check()
        compensated = self._compensates
        for state in self.states.values():  # before the model is run with them
            drop_diverged(state.own_b)
        counts: list[RowUpdateCounts] = []
        for group in self._groups() if compensated else [list(self.layers)]:
            moments = self._measure(group, calibrate) if compensated else None
            counts += self._write(self._flush_writes(group, len(counts), moments), number)
            del moments  # before the next group's are made
        self._is_closed = True
        self._collect(_columns(counts), [], list(range(len(counts))), partial=not compensated)

    def _flush_writes(
        self, group: list[str], first: int, moments: InputMoments | None
    ) -> Iterator[_Write]:
        prepared: dict[str, Compensation] = {}
        for index, name in enumerate(group, first):
            state = self.states[name]
            layer = state.layer
            state.follow()
            state.open()
            given = None
            if moments is not None:
                owner = moments.owner(name)
                if owner not in prepared:
                    prepared = {owner: compensation(moments.moment(name))}
                given = prepared[owner]
            yield self._prepare(layer, state, None, layer.pending(), index, False, given)

    def _groups(self) -> Iterator[list[str]]:
        """Layers in their order, by how many second moments may be in memory at once."""
        group: list[str] = []
        held = 0
        for name in self.layers:
            size = 4 * self.states[name].layer.in_features ** 2
            if group and held + size > self.recipe.calibration_memory:
                yield group
                group, held = [], 0
            group.append(name)
            held += size
        yield group

    def _measure(self, group: list[str], calibrate: Callable[[], None] | None) -> InputMoments:
        if calibrate is None:
            raise InputError(
                "flush_rounding 'compensated' looks at the layers' inputs: give flush a function "
                "that runs the model on some training data, or set flush_rounding to 'same'."
            )
        with InputMoments({name: self.layers[name] for name in group}) as moments:
            calibrate()
        moments.broadcast()
        return moments

    def is_pending(self) -> bool:
        """What is learned is not all in the codes yet, as `flush` would write it.

        Waits for the device.
        """
        is_open = self._compensates and not self._is_closed
        if is_open and any(state.steps for state in self.states.values()):
            return True
        held = torch.stack([state.own_b.any() for state in self.states.values()]).any()
        return bool(self._over_ranks(held.float()[None])[0])

    def _check(self) -> None:
        """Once: codes that were loaded without the update's own state would be overwritten."""
        if self._checked:
            return
        other = [name for name, state in self.states.items() if not state.is_consistent()]
        if other:
            raise InputError(
                f"the codes of {other[0]} are not those of the original weights, and it is not "
                "recorded what was written: load the update's state_dict together with the model's."
            )
        self._checked = True

    def _clear(
        self, layer: MeldedLinear | ShardedLayer, state: RowState, rows: Tensor | None
    ) -> Tensor:
        """Clear the rows that were not selected; squared norm of what is lost, float64."""
        if rows is None:
            return torch.zeros((), dtype=torch.float64, device=layer.B.device)
        lost = state.squares(layer.pending().index_fill(0, rows, 0.0)).sum(dtype=torch.float64)
        kept = layer.B[rows]
        layer.B.zero_()
        layer.B[rows] = kept
        return lost

    def _prepare(
        self,
        layer: MeldedLinear | ShardedLayer,
        state: RowState,
        rows: Tensor | None,
        change: Tensor,
        index: int,
        project: bool,
        compensation: Compensation | None = None,
    ) -> _Write:
        """What to write (rows None: all), with the sum of changes updated where there is one."""
        held = (change != 0).any(dim=1)  # NaN counts as a change: it must leave B
        total = None
        on_host: slice | Tensor = slice(None)
        if state.original is not None and rows is not None:
            on_host = rows.cpu()  # waits for the device: the originals are in host memory
        if state.original is not None and state.applied is not None:
            # What would overflow in B A is not written, and must not stay in the sum for good.
            usable = (change.abs().sum(dim=1, keepdim=True) < LARGEST).expand_as(change)
            change = torch.where(usable, change, torch.nan)
            total = state.applied[on_host] + torch.where(usable, change, 0.0).cpu()
            state.applied[on_host] = total
        if isinstance(layer, ShardedLayer):
            part, written = part_write(
                layer, state.original, rows, change, index, total, compensation
            )
            return _Write(layer, state, held, rows, part, written)
        origin = None
        if state.original is not None and total is not None:
            device = change.device
            origin = Origin(state.original[on_host].to(device), total.to(device))
        inverse = state.gram_inverse if project else None
        write = RowWrite(
            layer.codes, layer.scale, rows, change, index, origin, inverse, compensation
        )
        return _Write(layer, state, held, rows, write)

    def _write(self, writes: Iterable[_Write], number: int) -> list[RowUpdateCounts]:
        """Write rows; those whose change is zero stay as they are, in B as well.

        With a compensation their codes are written too. Layers of a group, whose codes lie one
        behind the other, are written together; no others, so that no more of their originals than
        that are on the device.
        """
        counts: list[RowUpdateCounts] = []
        batch: list[_Write] = []
        for write in writes:
            if batch and not are_consecutive([batch[-1].layer.codes, write.layer.codes]):
                counts += self._write_batch(batch, number)
                batch = []
            batch.append(write)
        return counts + self._write_batch(batch, number)

    def _write_batch(self, batch: list[_Write], number: int) -> list[RowUpdateCounts]:
        results = self.row_update([w.write for w in batch], self.recipe.seed, number)
        counts = [
            c if w.written is None else c._replace(written=w.written)
            for w, (c, _) in zip(batch, results, strict=True)
        ]
        for (layer, state, held, rows, write, _), (_, kept) in zip(batch, results, strict=True):
            where = slice(None) if rows is None else rows
            left = torch.zeros(len(held), layer.rank, device=held.device)
            if kept is not None:
                left = kept / layer.lora_scaling
            if isinstance(layer, ShardedLayer) and write.compensation is not None:
                layer.keep(write.codes)
            if isinstance(layer, ShardedLayer):
                layer.replace_rows(rows, held, left)
            else:
                layer.B[where] = torch.where(held[:, None], left, layer.B[where])
            state.last_written[where] = torch.where(
                held, state.steps - 1, state.last_written[where]
            )
            # A compensation writes rows that nothing is pending for, too.
            state.touched[where] |= held | (write.compensation is not None)
            state.wrote(rows)
            state.close()
        return counts

    def _collect(
        self,
        columns: list[Tensor],
        lost: list[Tensor],
        written: list[int],
        partial: bool = True,
    ) -> None:
        """Add up what was written; `partial`: where layers are cut up, by this rank.

        `columns`: a field of `RowUpdateCounts` each, float64 [layers].
        """
        if not columns:
            return
        if self.is_sharded and partial:
            columns[1:] = self._over_ranks(torch.stack(columns[1:])).unbind()
        lost_by_layer = torch.stack(lost) if lost else torch.zeros_like(columns[-1])
        self._counts = [*(column.sum() for column in columns), lost_by_layer.sum()]
        if self._landed.device != columns[0].device:
            self._landed = self._landed.to(columns[0].device)
            self._wanted = self._wanted.to(columns[0].device)
        self._landed[written] += columns[4]
        self._wanted[written] += columns[5] + lost_by_layer

    def _over_ranks(self, sums: Tensor) -> Tensor:
        """Add up, in place, over the ranks that hold other parts of the layers."""
        first = next(iter(self.states.values())).layer
        if isinstance(first, ShardedLayer):
            first.sum(sums)
        return sums

    def statistics(self) -> UpdateStatistics | None:
        """What the last write did; waits for the device. None before the first step."""
        if not any(state.steps for state in self.states.values()) and not self._counts:
            return None
        pending = self._over_ranks(self._pending_sums().sum(dim=0))
        counts = torch.stack(self._counts) if self._counts else pending.new_zeros(7)
        sums = torch.cat([counts, pending]).tolist()
        written, written_codes, flipped, saturated, projection, wanted, lost, *sums = sums
        squared, age, waiting = sums
        whole = [state.layer for state in self.states.values()]
        codes = sum(layer.out_features * layer.in_features for layer in whole)
        return UpdateStatistics(
            rows_written=int(written),
            codes_flipped=int(flipped),
            codes_flipped_share=flipped / codes,
            realised_ratio=projection / (wanted + lost) if wanted + lost > 0 else 0.0,
            saturated_share=saturated / written_codes if written_codes else 0.0,
            pending_norm=squared**0.5,
            staleness=age / waiting if waiting else 0.0,
        )

    def _pending_sums(self) -> Tensor:
        """Of each layer, see `RowState.pending_sums`."""
        states = list(self.states.values())
        if not self._are_taken(states):
            return torch.stack([state.pending_sums() for state in states])
        layers = []
        for state in states:
            b, factor = state.layer.B, state.layer.lora_scaling
            state.follow()
            layers.append(
                native.Pending(b, state.gram, factor, state.steps - 1, state.last_written)
            )
        return native.pending_sums(layers)

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
            "steps": {name: s.steps for name, s in self.states.items()},
            "last_written": {name: s.last_written for name, s in self.states.items()},
            "landed": self._landed,
            "wanted": self._wanted,
            "closed": self._is_closed,
        }
        if self.recipe.keeps_originals:
            state["applied"] = {name: s.applied for name, s in self.states.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        It belongs to codes and B of the same moment, and to the same originals.
        """
        for name, own in self.states.items():
            own.forget()
            own.steps = state["steps"][name]
            own.last_written.copy_(state["last_written"][name])
            if own.applied is not None:
                own.applied.copy_(state["applied"][name])
        self._landed = state["landed"].clone()
        self._wanted = state["wanted"].clone()
        self._checked, self._is_closed = True, state.get("closed", False)

    def originals(self) -> dict[str, Tensor]:
        """What rows are derived from, by layer, in host memory; empty if they are not."""
        return {n: s.original for n, s in self.states.items() if s.original is not None}

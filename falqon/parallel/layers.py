"""What the proxy update sees of a melded layer of which this rank holds a part.

A layer can be cut in two ways, also in both at once. FSDP2 cuts the codes by columns: every rank
has all rows, those of A too, for its columns, so that a row of B A is written without asking
anybody. Tensor parallelism cuts a column-parallel layer by rows, all of A with every part, and a
row-parallel layer by columns. B is small: it is gathered for an update, on which all ranks then
decide alike, and each rank keeps its rows of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.tensor import DTensor

from falqon.errors import InputError
from falqon.fp8 import E4M3, dequantize
from falqon.linear import MeldedLinear
from falqon.parallel.slices import bounds, is_cut


@dataclass(frozen=True)
class TensorPart:
    """Which part of a layer tensor parallelism left here; the layer's `tensor_part`.

    Attributes:
        by_rows: cut by rows of the weight (column-parallel), else by columns (row-parallel).
        group: the ranks that share the layer.
        index, count: this part, and how many there are.
    """

    by_rows: bool
    group: Any
    index: int
    count: int


def tensor_part(layer: MeldedLinear) -> TensorPart | None:
    """How tensor parallelism cut a layer; None if it did not."""
    part: TensorPart | None = getattr(layer, "tensor_part", None)
    return part


def whole_input(layer: MeldedLinear, x: Tensor) -> Tensor:
    """A layer's input [..., in] with all its features, where tensor parallelism cut them up."""
    part = tensor_part(layer)
    if part is None or part.by_rows:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(part.count)]
    dist.all_gather(parts, x.contiguous(), group=part.group)
    return torch.cat(parts, dim=-1)


def is_part(layer: MeldedLinear) -> bool:
    """Whether this rank holds a part of the layer only."""
    return is_cut(layer.codes) or tensor_part(layer) is not None


class ShardedLayer:
    """The whole layer's sizes and B, and this rank's codes.

    Attributes:
        layer: what the model runs.
        out_features, in_features, rank, lora_scaling: of the whole layer.
        rows, columns: first and last-but-one of the backbone's that this rank holds.
    """

    def __init__(self, layer: MeldedLinear) -> None:
        self.layer = layer
        self.rank, self.lora_scaling = layer.rank, layer.lora_scaling
        self.part = tensor_part(layer)
        self.out_features, self.in_features = layer.out_features, layer.in_features
        first_row = first_column = 0
        if self.part is not None and self.part.by_rows:
            first_row = self.part.index * layer.out_features
            self.out_features *= self.part.count
        elif self.part is not None:
            first_column = self.part.index * layer.in_features
            self.in_features *= self.part.count
        codes: Tensor = layer.codes
        start, end = (0, codes.shape[1])
        if isinstance(codes, DTensor) and is_cut(codes):
            if bounds(codes, 0) != (0, len(codes)):
                raise InputError(
                    "codes are cut up by rows, which parts them from their A: shard uint8 "
                    "parameters on dimension 1 (falqon.parallel.sharding.shard does)."
                )
            start, end = bounds(codes, 1)
        self.rows = (first_row, first_row + layer.out_features)
        self.columns = (first_column + start, first_column + end)
        self._whole_b: Tensor | None = None

    # -- what a MeldedLinear has as well ------------------------------------------------------

    @property
    def codes(self) -> Tensor:
        """This rank's: [rows + r, columns], to be written to."""
        codes: Tensor = self.layer.codes.detach()
        return codes.to_local() if isinstance(codes, DTensor) else codes

    @property
    def scale(self) -> Tensor:
        """float32 [1]."""
        scale: Tensor = self.layer.scale.detach()
        return scale.full_tensor() if isinstance(scale, DTensor) else scale

    @property
    def B(self) -> Tensor:
        """All of it, float32 [out, r], while it is open."""
        assert self._whole_b is not None
        return self._whole_b

    def pending(self) -> Tensor:
        """As `MeldedLinear.pending`; gathered if it is not open."""
        whole = self._gather_b() if self._whole_b is None else self._whole_b
        return whole * self.lora_scaling

    def dequantized_adapter(self) -> Tensor:
        """As `MeldedLinear.dequantized_adapter`: all columns; gathered."""
        own = self.codes[len(self.codes) - self.rank :]
        whole = own.new_zeros(self.rank, self.in_features)
        if self.part is None or not self.part.by_rows or self.part.index == 0:
            whole[:, slice(*self.columns)] = own
        self.sum(whole)
        if whole.dtype != torch.uint8:
            return whole
        return dequantize(whole, self.scale, E4M3, torch.float32)

    # -- B ------------------------------------------------------------------------------------

    def open(self) -> None:
        """Gather B."""
        self._whole_b = self._gather_b()

    def close(self) -> None:
        """Keep this rank's rows of what B has become, if it is open."""
        if self._whole_b is None:
            return
        start, own = self.own_b()
        own.copy_(self._whole_b[start : start + len(own)])
        self._whole_b = None

    def own_b(self) -> tuple[int, Tensor]:
        """Number of the first row of B that this rank holds, and those rows, to be written to."""
        own, start = self.layer.B.detach(), self.rows[0]
        if isinstance(own, DTensor):
            return start + bounds(own, 0)[0], own.to_local()
        return start, own

    def own_rows(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows, int64 [k]: which B has here, bool [k], and their places in `own_b`, int64."""
        start, own = self.own_b()
        here = (rows >= start) & (rows < start + len(own))
        return here, rows[here] - start

    @property
    def gives_b(self) -> bool:
        """Whether this rank's rows of B count where ranks put theirs together."""
        return self.part is None or self.part.by_rows or self.part.index == 0

    def replace_rows(self, rows: Tensor | None, held: Tensor, values: Tensor) -> None:
        """Write rows of B, open or not.

        Args:
            rows: int64 [k], or None for all.
            held: bool [k], which of them to replace.
            values: float32 [k, r].
        """
        b, where = self._whole_b, slice(None) if rows is None else rows
        if b is None:
            assert rows is not None
            here, where = self.own_rows(rows)
            _, b = self.own_b()
            held, values = held[here], values[here]
        b[where] = torch.where(held[:, None], values, b[where])

    def _gather_b(self) -> Tensor:
        return self.gather_rows(self.layer.B.detach())

    def gather_rows(self, part: Tensor) -> Tensor:
        """All of what is cut up as B is (or a bias); a copy even where nothing is missing."""
        whole = part.full_tensor() if isinstance(part, DTensor) else part.clone()
        if self.part is not None and self.part.by_rows:
            parts = [torch.empty_like(whole) for _ in range(self.part.count)]
            dist.all_gather(parts, whole.contiguous(), group=self.part.group)
            whole = torch.cat(parts)
        return whole

    # -- parts and wholes ---------------------------------------------------------------------

    def sum(self, tensor: Tensor) -> None:
        """Add up, in place, over the ranks that hold other parts."""
        codes = self.layer.codes
        if isinstance(codes, DTensor) and is_cut(codes):
            dist.all_reduce(tensor, group=codes.device_mesh.get_group())
        if self.part is not None:
            dist.all_reduce(tensor, group=self.part.group)

    def part_of(self, original: Tensor) -> Tensor:
        """This rank's part [rows, columns] of a weight [out, in]; a view."""
        return original[slice(*self.rows), slice(*self.columns)]

    def gather(self, part: Tensor) -> Tensor:
        """All of a weight, [out, in] or [out + r, in], of which every rank has a part."""
        held = self.rows[1] - self.rows[0]
        whole = part.new_zeros(self.out_features + len(part) - held, self.in_features)
        columns = slice(*self.columns)
        whole[slice(*self.rows), columns] = part[:held]
        if self.part is None or not self.part.by_rows or self.part.index == 0:
            whole[self.out_features :, columns] = part[held:]
        self.sum(whole)
        return whole

    def cut_codes(self, whole: Tensor) -> Tensor:
        """This rank's part of all codes [out + r, in]."""
        columns = slice(*self.columns)
        backbone = self.part_of(whole[: self.out_features])
        if self.rows == (0, self.out_features):
            return whole[:, columns]
        return torch.cat([backbone, whole[self.out_features :, columns]])

    def keep(self, whole: Tensor) -> None:
        """Take this rank's part of all codes [out + r, in]."""
        held = self.rows[1] - self.rows[0]
        self.codes[:held] = self.part_of(whole[: self.out_features])

    def local_rows(self, rows: Tensor | None) -> tuple[Tensor | slice, Tensor | None]:
        """Of rows to write: which this rank has, and their numbers here.

        Args:
            rows: int64 [k] of the whole layer, or None for all.

        Returns:
            Index into the k rows; int64 [m], or None for all that are here.
        """
        if rows is None:
            return slice(*self.rows), None
        here = (rows >= self.rows[0]) & (rows < self.rows[1])
        return here, rows[here] - self.rows[0]

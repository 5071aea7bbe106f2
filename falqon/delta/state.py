"""A trained model as its base and what was changed: tensors are made when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from falqon.checkpoint.inspect import MeldedLayer
from falqon.delta.base import Base
from falqon.delta.codec import Change, apply


class ChangedState(Mapping[str, Tensor]):
    """Tensors by name, as a checkpoint with all weights has them.

    Args:
        layers: the melded layers by full name.
        scales: of these, float32 [1].
        own: tensors that are not of the base.
        base: all else.

    Attributes:
        has_adapters: codes are those of the backbone and of A behind it, not the backbone's alone.
    """

    has_adapters = False

    def __init__(
        self,
        layers: Mapping[str, MeldedLayer],
        scales: Mapping[str, Tensor],
        own: Mapping[str, Tensor],
        base: Base,
    ) -> None:
        self.layers, self.scales, self.own, self.base = layers, scales, own, base

    def __getitem__(self, name: str) -> Tensor:
        fqn, _, part = name.rpartition(".")
        if fqn in self.layers and part == "codes":
            layer = self.layers[fqn]
            return self.changed(fqn, self.base.backbone(layer, self.scales[fqn]))
        if fqn in self.layers and part == "scale":
            return self.scales[fqn]
        if name in self.own:
            return self.own[name]
        if name not in self.shapes:
            raise KeyError(name)
        return self.base.other(name)

    def changed(self, fqn: str, backbone: Tensor) -> Tensor:
        """Codes of a layer with the changes in them, not in place.

        Args:
            fqn: the layer.
            backbone: its codes in the base, without A.
        """
        raise NotImplementedError

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, without making any."""
        weights = {f"{fqn}.weight" for fqn in self.layers}
        found = {n: shape for n, shape in self.base.shapes.items() if n not in weights}
        found |= {name: tuple(tensor.shape) for name, tensor in self.own.items()}
        for fqn, layer in self.layers.items():
            rows = layer.out_features + (layer.rank if self.has_adapters else 0)
            found[f"{fqn}.codes"] = (rows, layer.in_features)
            found[f"{fqn}.scale"] = (1,)
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class CheckpointState(ChangedState):
    """Of a small checkpoint, see `falqon.checkpoint.changes`.

    Args:
        changes: the checkpoint's `FalqonChanges`.
        layers, scales, own, base: as above.
    """

    has_adapters = True

    def __init__(self, changes: Mapping[str, Any], *args: Any) -> None:
        super().__init__(*args)
        self.changes = changes

    def changed(self, fqn: str, backbone: Tensor) -> Tensor:
        """See above."""
        rank, stored = self.layers[fqn].rank, self.changes["codes"][fqn]
        codes = torch.cat([backbone, stored[-rank:]])
        codes[self.changes["rows"][fqn][:-rank].long()] = stored[:-rank]
        return codes


class DeltaState(ChangedState):
    """Of a delta.

    Args:
        changes: by layer.
        layers, scales, own, base: as above.
    """

    def __init__(self, changes: Mapping[str, Change], *args: Any) -> None:
        super().__init__(*args)
        self.changes = changes

    def changed(self, fqn: str, backbone: Tensor) -> Tensor:
        """See above."""
        codes = backbone.clone(memory_format=torch.contiguous_format)
        apply(codes, self.changes[fqn])
        return codes

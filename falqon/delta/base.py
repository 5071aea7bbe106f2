"""The melded model that a training started from, read again one tensor at a time.

Codes of the backbone follow from the original weights and the recorded scale, so no SVD is needed;
what is read is compared with the hashes that the training recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from falqon.checkpoint.base import BaseHash, frozen_hash, layer_hash
from falqon.checkpoint.inspect import MeldedLayer
from falqon.errors import InputError
from falqon.fp8 import E4M3, quantize
from falqon.premeld.directory import DTYPES, open_melded
from falqon.premeld.source import open_source
from falqon.pretrained import resolve
from falqon.recipe import Fp8Recipe


@dataclass(frozen=True)
class Base:
    """A melded model that has not been trained.

    Attributes:
        name: model name or directory.
        shapes: of all but the melded layers' weights, by full name.
        expected: hashes that it has to have; None if they are not known.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    expected: BaseHash | None
    _read: Callable[[str], Tensor] = field(repr=False)
    _backbone: Callable[[MeldedLayer, Tensor], Tensor] = field(repr=False)

    def backbone(self, layer: MeldedLayer, scale: Tensor) -> Tensor:
        """Codes of a melded layer without A, uint8 [out, in].

        Args:
            layer: which.
            scale: float32 [1], as the training had it.

        Raises:
            InputError: another model, naming both hashes.
        """
        codes = self._backbone(layer, scale)
        if codes.shape != (layer.out_features, layer.in_features):
            raise InputError(
                f"{self.name} is another model: {layer.fqn} has the shape {tuple(codes.shape)} "
                f"there instead of {(layer.out_features, layer.in_features)}."
            )
        if self.expected is not None:
            found = layer_hash(codes, scale)
            self._compare(layer.fqn, found, self.expected.layers.get(layer.fqn), self.expected)
        return codes

    def other(self, name: str) -> Tensor:
        """A tensor that is no melded layer's.

        Raises:
            InputError: another model, naming both hashes.
        """
        tensor = self._read(name)
        if self.expected is not None and name in self.expected.frozen:  # a buffer is not
            found = frozen_hash(tensor)
            self._compare(name, found, self.expected.frozen[name], self.expected)
        return tensor

    def _compare(self, name: str, found: str, expected: str | None, base: BaseHash) -> None:
        if found != expected:
            raise InputError(
                f"{self.name} is not the base of this training (SHA-256 {base.sha256[:16]}): "
                f"{name} has the hash {found[:16]} there and had {(expected or 'none')[:16]}. Name "
                "the model (and revision) that the training started from."
            )


def open_base(
    name: str, revision: str | None, settings: Mapping[str, Any], expected: BaseHash | None
) -> Base:
    """Open the base of a training.

    Args:
        name: the model, see `falqon.pretrained`, or a directory of `falqon meld`.
        revision: branch, tag or commit on the hub.
        settings: of the method, as the precision plugin saved them.
        expected: hashes that the base has to have.

    Raises:
        InputError: it cannot be found or read, or is damaged.
    """
    fp8 = Fp8Recipe(**settings["recipe"])
    directory = open_melded(resolve(name).path)
    if directory is not None:
        tensors = directory.tensors()
        read = _reader(name, tensors.__getitem__)
        shapes = {
            key: tuple(tensor.shape)
            for key, tensor in tensors.items()
            if key.rpartition(".")[0] not in directory.layers or key.endswith(".bias")
        }

        def stored(layer: MeldedLayer, scale: Tensor) -> Tensor:
            return read(f"{layer.fqn}.codes")[: layer.out_features]

        return Base(name, shapes, expected, read, stored)
    dtype = DTYPES[settings["dtype"]]
    source = open_source(name, dtype, revision)
    original = _reader(name, source.read)

    def converted(key: str) -> Tensor:
        tensor = original(key)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def melded(layer: MeldedLayer, scale: Tensor) -> Tensor:
        weight = converted(f"{layer.fqn}.weight").to(torch.float32)
        if fp8.emulate == "none":
            return weight
        return quantize(weight, E4M3, rounding=fp8.weight_scale_rounding, scale=scale)[0]

    entries = {key: tuple(tensor.shape) for key, tensor in source.entries()}
    return Base(name, entries, expected, converted, melded)


def _reader(model: str, read: Callable[[str], Tensor]) -> Callable[[str], Tensor]:
    def checked(name: str) -> Tensor:
        try:
            return read(name)
        except KeyError as error:
            raise InputError(
                f"{model} has no tensor {name}: it is another model than the training started "
                "from. Name that one."
            ) from error

    return checked

"""What a training started from, as hashes: the melded codes and all that is frozen.

A is not among it: another machine's SVD may give other bits, and nothing that is stored as a change
against the base needs it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from falqon.checkpoint.hashing import hash_tensors
from falqon.linear import MeldedLinear


@dataclass(frozen=True)
class BaseHash:
    """SHA-256 of every part of a melded model that has not been trained.

    Attributes:
        layers: of codes and scale of each melded layer, see `layer_hash`, by full name.
        frozen: of every other frozen parameter, tied ones once, by full name.
    """

    layers: dict[str, str]
    frozen: dict[str, str]

    @property
    def sha256(self) -> str:
        """Of all of it."""
        parts = sorted({**self.layers, **self.frozen}.items())
        lines = [f"{name} {value}\n" for name, value in parts]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def plain(self) -> dict[str, Any]:
        """As a checkpoint or manifest holds it."""
        return {"sha256": self.sha256, "layers": dict(self.layers), "frozen": dict(self.frozen)}

    @classmethod
    def read(cls, plain: Any) -> BaseHash | None:
        """From what `plain` gave; None if it is not that."""
        if not isinstance(plain, Mapping):
            return None
        layers, frozen = plain.get("layers"), plain.get("frozen")
        if not isinstance(layers, Mapping) or not isinstance(frozen, Mapping):
            return None
        base = cls(dict(layers), dict(frozen))
        return base if base.sha256 == plain.get("sha256") else None

    def difference(self, other: BaseHash) -> str:
        """Name of a part that differs; empty if none does."""
        ours, theirs = {**self.layers, **self.frozen}, {**other.layers, **other.frozen}
        names = sorted(ours.keys() | theirs.keys())
        return next((name for name in names if ours.get(name) != theirs.get(name)), "")


def layer_hash(backbone: Tensor, scale: Tensor) -> str:
    """SHA-256 of a melded layer's backbone.

    Args:
        backbone: its codes without A, uint8 (with `emulate: none` float32) [out, in].
        scale: float32 [1].
    """
    return hash_tensors({"codes": backbone, "scale": scale})


def frozen_hash(tensor: Tensor) -> str:
    """SHA-256 of a frozen parameter."""
    return hash_tensors({"": tensor})


def hash_base(module: nn.Module, layers: Mapping[str, MeldedLinear]) -> BaseHash:
    """Hash a melded model, which must not have been trained yet.

    Args:
        module: the model.
        layers: its melded layers by full name.
    """
    frozen = dict(frozen_parameters(module, layers))
    with ThreadPoolExecutor(4) as threads:  # hashing lets other threads run
        hashes = threads.map(
            lambda layer: layer_hash(layer.codes.detach()[: layer.out_features], layer.scale),
            layers.values(),
        )
        rest = threads.map(frozen_hash, frozen.values())
        return BaseHash(
            dict(zip(layers, hashes, strict=True)), dict(zip(frozen, rest, strict=True))
        )


def frozen_parameters(
    module: nn.Module, layers: Mapping[str, MeldedLinear], remove_duplicate: bool = True
) -> Iterable[tuple[str, nn.Parameter]]:
    """Parameters that are frozen, but for codes and scales; biases of melded layers are among them.

    Args:
        module: the model.
        layers: its melded layers by full name.
        remove_duplicate: give tied parameters once, not under each name.
    """
    melded = {id(p) for layer in layers.values() for p in (layer.codes, layer.scale, layer.B)}
    for name, parameter in module.named_parameters(remove_duplicate=remove_duplicate):
        if not parameter.requires_grad and id(parameter) not in melded:
            yield name, parameter

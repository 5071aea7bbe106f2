"""Deltas in a melded model in memory: put in, taken out, one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakIdKeyDictionary

from falqon.checkpoint.base import layer_hash
from falqon.checkpoint.changes import shared_prefix
from falqon.delta.codec import Change, apply
from falqon.delta.directory import Delta, open_delta
from falqon.errors import InputError
from falqon.linear import MeldedLinear
from falqon.meld import melded_layers


@dataclass(frozen=True)
class _Loaded:
    """What is in a model now. The differences, still compressed, are enough to take it out."""

    delta: Delta
    changes: dict[str, Change]


# By a model's first melded layer: a model may be within another module.
_LOADED: WeakIdKeyDictionary = WeakIdKeyDictionary()


@torch.no_grad()
def load_delta(model: nn.Module, path: str | Path | None) -> dict[str, Any] | None:
    """Put a delta into a melded model, in place of the one that is in it.

    The codes are then those that were trained, bit for bit: every layer is compared with the hashes
    of the base before the change and with those of the trained model after it. The base is not read
    again; what a delta changed is taken back by its differences.

    Args:
        model: melded, for example by `falqon.meld`, with nothing pending; changed in place.
        path: a directory that `falqon export --format delta` wrote; None takes out what is in.

    Returns:
        The delta's manifest, None without a delta.

    Raises:
        InputError: the delta is damaged, or belongs to another base: both hashes are named, and the
            model stays as it was, with the delta that was in it. So it does if its codes were
            changed since that was loaded.
    """
    if path is None:
        unload_delta(model)
        return None
    delta = open_delta(path)
    changes = delta.changes()
    layers = _layers(model, delta)
    first = next(iter(layers.values()))
    loaded: _Loaded | None = _LOADED.get(first)
    if loaded is not None:
        if loaded.delta.base.sha256 != delta.base.sha256:
            raise InputError(
                f"{delta.path} belongs to a base with the hash {delta.base.sha256[:16]}; the model "
                f"holds a delta of one with {loaded.delta.base.sha256[:16]}. Load it into a model "
                "that was melded from its own base."
            )
        _check_nothing_pending(layers)
        _take_out(layers, loaded)  # leaves the base, of which the hashes are the same
    else:
        _check_nothing_pending(layers)
        _check_base(layers, delta)
    try:
        _put(layers, changes, delta)
    except BaseException:
        if loaded is not None:
            _put(layers, loaded.changes, loaded.delta)
        raise
    _LOADED[first] = _Loaded(delta, changes)
    return dict(delta.manifest)


@torch.no_grad()
def unload_delta(model: nn.Module) -> None:
    """Take the delta that `load_delta` put into a model out again; without one nothing happens.

    Args:
        model: its codes are then those of the base, bit for bit, which their hashes are to show.

    Raises:
        InputError: the codes were changed since the delta was loaded, by training for example, so
            that no base is left without it. The model stays as it was.
    """
    first = next(iter(melded_layers(model).values()), None)
    loaded: _Loaded | None = _LOADED.get(first) if first is not None else None
    if loaded is not None:
        _take_out(_layers(model, loaded.delta), loaded)
        del _LOADED[first]


def _put(layers: dict[str, MeldedLinear], changes: dict[str, Change], delta: Delta) -> None:
    """Change codes of the base to those that were trained, in all layers or in none."""
    done = []
    try:
        for name, layer in layers.items():
            apply(_backbone(layer), changes[name])
            done.append(name)
            if _hash(layer) != delta.results[name]:
                raise ValueError("it does not become what was trained")
    except BaseException as error:
        for other in done:
            apply(_backbone(layers[other]), changes[other], undo=True)
        if isinstance(error, ValueError):
            raise InputError(
                f"{delta.path}: layer {name}: {error}. Export the delta again."
            ) from error
        raise


def _take_out(layers: dict[str, MeldedLinear], loaded: _Loaded) -> None:
    """Change codes back to those of the base, in all layers or in none."""
    done = []
    try:
        for name, layer in layers.items():
            apply(_backbone(layer), loaded.changes[name], undo=True)
            done.append(name)
            if _hash(layer) != loaded.delta.base.layers[name]:
                raise InputError(
                    f"{name} was changed, by training for example, since {loaded.delta.path} was "
                    "loaded: without that delta it would not be the base. The model is as it was, "
                    "with the delta in it; meld the base again to load another."
                )
    except BaseException:
        for other in done:
            apply(_backbone(layers[other]), loaded.changes[other])
        raise


def _hash(layer: MeldedLinear) -> str:
    return layer_hash(_backbone(layer), layer.scale.detach())


def _backbone(layer: MeldedLinear) -> torch.Tensor:
    # Not .data: writing has to count as one, for those who keep copies of the codes.
    return layer.codes.detach()[: layer.out_features]


def _layers(model: nn.Module, delta: Delta) -> dict[str, MeldedLinear]:
    """The model's layers by the delta's names; the model may be within a LightningModule."""
    found = melded_layers(model)
    prefix = shared_prefix(found, delta.layers)
    if prefix is None or len(found) != len(delta.layers):
        raise InputError(
            f"{delta.path} is of a model with {len(delta.layers)} melded layers, such as "
            f"{next(iter(delta.layers))}, and this model has {len(found)}: meld the model that it "
            "was trained from, with the same layers."
        )
    layers = {name: found[prefix + name] for name in delta.layers}
    for name, layer in layers.items():
        expected = (delta.layers[name].out_features, delta.layers[name].in_features)
        if isinstance(layer.codes, DTensor) or layer.codes.is_meta:
            raise InputError(f"the codes of {name} are sharded or have no data: load them first.")
        if (layer.out_features, layer.in_features) != expected or layer.codes.dtype != torch.uint8:
            raise InputError(
                f"{delta.path} is of another model: {name} has FP8 codes of shape {expected} there."
            )
    return layers


def _check_nothing_pending(layers: dict[str, MeldedLinear]) -> None:
    for name, layer in layers.items():
        if bool(layer.B.any()):
            raise InputError(
                f"{name} holds changes that are not in its codes yet (B is not zero): a delta is "
                "of codes. Flush them first, or meld the model again."
            )


def _check_base(layers: dict[str, MeldedLinear], delta: Delta) -> None:
    for name, layer in layers.items():
        found = _hash(layer)
        if found != delta.base.layers[name]:
            raise InputError(
                f"{delta.path} belongs to another base (SHA-256 {delta.base.sha256[:16]}): {name} "
                f"has the hash {found[:16]} in this model and {delta.base.layers[name][:16]} in "
                "that. Meld the model that the delta was trained from, with its settings."
            )

"""Small checkpoints: what training changed, instead of the whole model.

Beside B and the optimizer a checkpoint then holds the rows of codes that were ever written, and A.
All else is in the base, which is there again when a run is resumed; its hash is in the checkpoint.
Rows are stored as they are: comparing or compressing them would make the training wait.

    checkpoint["FalqonChanges"] = {
        "version": 1,
        "shapes": {fqn: [out, in, r]},
        "scales": float32 [layers],
        "frozen": 28000000,                    # parameters that are left out
        "rows": {fqn: int32 [k]},              # of the merged codes; those of A come last
        "codes": {fqn: uint8 [k, in]},
    }

`state_dict` keeps what is not listed there and not frozen. `applied` of the update policy has the
rows of `rows` that are not A's; the others of it are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from falqon.checkpoint.base import BaseHash, frozen_parameters
from falqon.checkpoint.io import CheckpointError
from falqon.linear import MeldedLinear
from falqon.parallel.layers import ShardedLayer
from falqon.parallel.wholes import whole_tensor
from falqon.rows import RowState

KEY = "FalqonChanges"
VERSION = 1
_PLUGIN = "FalqonPrecision"


def is_small(checkpoint: Mapping[str, Any]) -> bool:
    """Whether a checkpoint holds changes, and not all weights."""
    return KEY in checkpoint


def shared_prefix(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """What all of `wanted` have in front of them among `names`; None if that is nothing."""
    there, wanted = set(names), list(wanted)
    candidates = [name.removesuffix(wanted[0]) for name in there if name.endswith(wanted[0])]
    for prefix in sorted(candidates, key=len):
        if all(prefix + name in there for name in wanted):
            return prefix
    return None


@torch.no_grad()
def pack(
    checkpoint: dict[str, Any],
    module: nn.Module,
    layers: Mapping[str, MeldedLinear],
    states: Mapping[str, RowState],
) -> bool:
    """Leave out of a checkpoint what the base has; copies no more than the changed rows.

    Args:
        checkpoint: what Lightning collected; changed in place.
        module: the model, with names as in `layers`.
        layers: its melded layers.
        states: which of their rows were written.

    Returns:
        Whether it was done: not for sharded weights, nor without the plugin's state.
    """
    state, plugin = checkpoint["state_dict"], checkpoint.get(_PLUGIN)
    if plugin is None or _are_sharded(states):
        return False
    prefix = shared_prefix(state, [f"{name}.codes" for name in layers])
    if prefix is None:
        return False
    rows: dict[str, Tensor] = {}
    codes: dict[str, Tensor] = {}
    applied = plugin["proxy"].get("applied")
    if applied is not None:
        applied = plugin["proxy"]["applied"] = dict(applied)
    for name, layer in layers.items():
        written = states[name].touched.nonzero()[:, 0]
        adapter = torch.arange(layer.out_features, len(layer.codes), device=written.device)
        chosen = torch.cat([written, adapter])
        codes[name] = layer.codes.detach()[chosen.to(layer.codes.device)].cpu()
        rows[name] = chosen.int().cpu()
        if applied is not None:
            applied[name] = applied[name][written.cpu()]
        del state[f"{prefix}{name}.codes"], state[f"{prefix}{name}.scale"]
    for name, _ in frozen_parameters(module, layers, remove_duplicate=False):
        state.pop(prefix + name, None)
    checkpoint[KEY] = {
        "version": VERSION,
        "shapes": {n: [m.out_features, m.in_features, m.rank] for n, m in layers.items()},
        "scales": torch.cat([layer.scale.detach().cpu() for layer in layers.values()]),
        "frozen": sum(p.numel() for _, p in frozen_parameters(module, layers)),
        "rows": rows,
        "codes": codes,
    }
    return True


@torch.no_grad()
def unpack(
    checkpoint: dict[str, Any],
    module: nn.Module,
    layers: Mapping[str, MeldedLinear],
    states: Mapping[str, RowState],
    base: BaseHash | None,
    where: str,
) -> None:
    """Put a checkpoint's changes into the model, and make its `state_dict` whole again.

    A checkpoint with all weights stays as it is; what it changes is noted in `states` all the same.

    Args:
        checkpoint: as it was read; changed in place.
        module: the whole LightningModule, as it starts: its weights are the base.
        layers, states: see `pack`.
        base: hashes of the base as it is here.
        where: how to name the checkpoint.

    Raises:
        CheckpointError: it is of another base, or does not fit together.
    """
    if not is_small(checkpoint):
        if not _are_sharded(states):  # whose checkpoints hold all weights
            _note(checkpoint, layers, states)
        return
    changes = checkpoint[KEY]
    _check(changes, {name: state.layer for name, state in states.items()}, where)
    if base is None:
        raise CheckpointError(
            f"{where} holds changes only, and the model that they belong to was not hashed before "
            "its weights were sharded: call FalqonPrecision.remember_base in configure_model."
        )
    _check_base(checkpoint, base, where)
    state = checkpoint["state_dict"]
    # Sharded weights get their parts when this is loaded; others are written now.
    sharded = _are_sharded(states)
    if sharded:
        for name, tensor in module.state_dict().items():
            if name not in state:
                state[name] = whole_tensor(module, name, tensor).cpu()
    prefix = shared_prefix(state, [f"{name}.codes" for name in layers]) or ""
    applied = checkpoint[_PLUGIN]["proxy"].get("applied", {})
    for name, layer in layers.items():
        rows = changes["rows"][name].long()
        codes = state[f"{prefix}{name}.codes"] if sharded else layer.codes
        codes[rows.to(codes.device)] = changes["codes"][name].to(codes.device)
        written = rows[: -layer.rank]
        states[name].touch(written)
        if name in applied:
            whole = torch.zeros(states[name].layer.out_features, layer.rank)
            whole[written] = applied[name]
            applied[name] = whole
    for name, tensor in module.state_dict().items():
        state.setdefault(name, tensor)  # of the base, or of the codes that were written just now


def _are_sharded(states: Mapping[str, RowState]) -> bool:
    return any(isinstance(state.layer, ShardedLayer) for state in states.values())


def _note(
    checkpoint: Mapping[str, Any],
    layers: Mapping[str, MeldedLinear],
    states: Mapping[str, RowState],
) -> None:
    """Mark the rows that a checkpoint with all weights has other than the base.

    And those that were written without a code that flipped: what was written is part of the state.
    """
    for name, total in checkpoint[_PLUGIN]["proxy"].get("applied", {}).items():
        states[name].touch((total != 0).any(dim=1).nonzero()[:, 0])
    state = checkpoint["state_dict"]
    prefix = shared_prefix(state, [f"{name}.codes" for name in layers])
    for name, layer in layers.items() if prefix is not None else ():
        there = state[f"{prefix}{name}.codes"]
        codes = layer.codes.detach()
        if there.shape != codes.shape:
            continue
        differs = there.to(codes.device) != codes
        states[name].touch(differs[: layer.out_features].any(dim=1).nonzero()[:, 0])


def _check(changes: Any, layers: Mapping[str, MeldedLinear | ShardedLayer], where: str) -> None:
    if changes.get("version") != VERSION:
        raise CheckpointError(
            f"{where} holds changes of version {changes.get('version')}, this release reads "
            f"version {VERSION}: use the release that wrote it."
        )
    expected = {n: [m.out_features, m.in_features, m.rank] for n, m in layers.items()}
    for name in sorted(expected.keys() | changes["shapes"].keys()):
        found = changes["shapes"].get(name)
        if found != expected.get(name):
            raise CheckpointError(
                f"{where} belongs to another model: the melded layer {name} has the shape "
                f"{found} there and {expected.get(name)} here (out, in, rank)."
            )
    check_rows(changes, where)


def check_rows(changes: Mapping[str, Any], where: str) -> None:
    """Refuse changes whose rows and codes do not fit their layers.

    Raises:
        CheckpointError: naming the layer.
    """
    for name, (out, columns, rank) in changes["shapes"].items():
        rows, codes = changes["rows"].get(name), changes["codes"].get(name)
        fits = rows is not None and codes is not None and codes.shape == (len(rows), columns)
        if not fits or len(rows) < rank or not 0 <= int(rows.min()) <= int(rows.max()) < out + rank:
            raise CheckpointError(
                f"{where}: the changed rows of layer {name} do not fit its shape {out} x {columns}."
                " Use another checkpoint of the run."
            )


def _check_base(checkpoint: Mapping[str, Any], base: BaseHash, where: str) -> None:
    recorded = BaseHash.read(checkpoint[_PLUGIN].get("base"))
    if recorded is None:
        raise CheckpointError(f"{where} does not say which base its changes belong to.")
    different = base.difference(recorded)
    if different:
        raise CheckpointError(
            f"the model that was loaded is not the one this checkpoint was trained from: {where} "
            f"holds changes against weights with the hash {recorded.sha256[:12]}, and those here "
            f"have {base.sha256[:12]} ({different} is the first that differs). Give the same model "
            "(and revision)."
        )

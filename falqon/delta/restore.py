"""`falqon apply`: from a delta and its base to the trained model, byte for byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from falqon.checkpoint.base import layer_hash
from falqon.delta.base import Base, open_base
from falqon.delta.directory import Delta, open_delta
from falqon.delta.state import DeltaState
from falqon.errors import InputError
from falqon.export.directory import DEFAULT_SHARD, check_free, parse_size
from falqon.export.model import write_model
from falqon.export.source import Trained
from falqon.export.tensors import Format


def apply_delta(
    path: str | Path,
    output: str | Path,
    format: Format = "compressed-tensors",
    *,
    base: str | None = None,
    revision: str | None = None,
    shard_size: str = DEFAULT_SHARD,
) -> dict[str, Any]:
    """Write the trained model that a delta belongs to: the bytes of its export.

    Args:
        path: The delta.
        output: The new directory.
        format: `compressed-tensors` or `bf16`.
        base: The model that was trained, or a directory of `falqon meld` with it; None for what the
            delta says.
        revision: Of `base` on the hub; None for what the delta says.
        shard_size: Largest weight file, such as `5GB`.

    Returns:
        As `falqon.export.export_model` does.

    Raises:
        InputError: The delta is damaged, the base is another one, or the output is taken or cannot
            be written.
    """
    limit = parse_size(shard_size)
    check_free(output)
    delta = open_delta(path)
    model = delta.manifest["model"]
    revision = revision or (None if base else model["revision"])
    opened = open_base(base or model["name"], revision, delta.manifest["settings"], delta.base)
    trained = Trained(
        file=delta.path,
        step=delta.manifest["global_step"],
        settings=delta.manifest["settings"],
        origin={
            "model_name": model["name"],
            "revision": model["revision"],
            "prompt": model.get("prompt"),
        },
        base=delta.base,
        losses=delta.manifest["losses"],
        data=delta.manifest["data"],
        training_sha256=delta.manifest["training_sha256"],
        state=_Verified(delta, opened),
        layers=delta.layers,
    )
    name = base or model["name"]
    return write_model(
        trained, name, revision, output, format, limit, (model["name"], model["hub"])
    )


class _Verified(DeltaState):
    """Compares what comes out with the hash of what was trained."""

    def __init__(self, delta: Delta, base: Base) -> None:
        super().__init__(delta.changes(), delta.layers, delta.scales, {}, base)
        self._delta = delta

    def changed(self, fqn: str, backbone: Tensor) -> Tensor:
        """See `DeltaState`."""
        try:
            codes = super().changed(fqn, backbone)
        except ValueError as error:
            raise InputError(f"{self._delta.path}: layer {fqn}: {error}.") from error
        if layer_hash(codes, self.scales[fqn]) != self._delta.results[fqn]:
            raise InputError(
                f"{self._delta.path}: layer {fqn} does not become what was trained. Export the "
                "delta again."
            )
        return codes

"""A directory with a delta: its format, and what is checked before it is used.

- `falqon-delta.json`: the base it belongs to (hash of every part), the model and settings from
  which that is made again, hashes of the layers with the change in them, and of the files.
- `delta-*.safetensors`: `<fqn>.places` and `<fqn>.differences`, see `falqon.delta.codec`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from falqon.checkpoint.base import BaseHash
from falqon.checkpoint.inspect import MeldedLayer
from falqon.delta.codec import Change
from falqon.errors import InputError
from falqon.export.source import check_scale
from falqon.manifest import check_files, read_manifest

MANIFEST = "falqon-delta.json"
FORMAT = "falqon-delta"
VERSION = 1
STEM = "delta"
_REMEDY = "Copy the delta again, or export it again (falqon export --format delta)."


@dataclass(frozen=True)
class Delta:
    """A delta, its files compared with their hashes.

    Attributes:
        path: The directory.
        manifest: What `falqon-delta.json` holds.
        base: Hashes of the melded model it belongs to.
        layers: The melded layers by full name.
        scales: Of these, float32 [1].
        results: SHA-256 of these with the change in them, see `falqon.checkpoint.base.layer_hash`.
    """

    path: Path
    manifest: dict[str, Any]
    base: BaseHash
    layers: dict[str, MeldedLayer]
    scales: dict[str, torch.Tensor]
    results: dict[str, str]

    def changes(self) -> dict[str, Change]:
        """The changes by layer, still compressed.

        Raises:
            InputError: A layer's is missing.
        """
        streams: dict[str, bytes] = {}
        for name in self.manifest["files"]:
            if not name.endswith(".safetensors"):
                continue
            try:
                with safe_open(self.path / name, framework="pt") as file:
                    for key in file.keys():  # noqa: SIM118
                        streams[key] = file.get_tensor(key).numpy().tobytes()
            except (SafetensorError, OSError) as error:
                what = f"{self.path / name} cannot be read ({error})"
                raise InputError(f"{what}. {_REMEDY}") from error
        found = {}
        for fqn, layer in self.manifest["layers"].items():
            parts = [streams.get(f"{fqn}.{part}") for part in ("places", "differences")]
            if parts[0] is None or parts[1] is None:
                raise InputError(f"{self.path} has no change of layer {fqn}. {_REMEDY}")
            found[fqn] = Change(layer["by"], parts[0], parts[1], layer["codes"], layer["rows"])
        return found


def is_delta(path: str | Path) -> bool:
    """Whether a directory holds a delta."""
    return (Path(path).expanduser() / MANIFEST).is_file()


def open_delta(path: str | Path) -> Delta:
    """Read a delta's manifest, and compare all files with it.

    Args:
        path: The directory.

    Raises:
        InputError: It is no delta, or is damaged, or holds a scale that is none.
    """
    path = Path(path).expanduser()
    if not is_delta(path):
        raise InputError(
            f"{path} is no delta: it has no {MANIFEST}. Give a directory that falqon export "
            "--format delta wrote."
        )
    manifest = read_manifest(path / MANIFEST, FORMAT, VERSION, _REMEDY)
    check_files(path, manifest["files"], _REMEDY)
    base = BaseHash.read(manifest["base"])
    if base is None:
        raise InputError(f"{path / MANIFEST} does not say what it belongs to. {_REMEDY}")
    rank = manifest["settings"]["rank"]
    layers, scales = {}, {}
    for fqn, layer in manifest["layers"].items():
        layers[fqn] = MeldedLayer(fqn, layer["out"], layer["in"], rank)
        scales[fqn] = torch.tensor([layer["scale"]], dtype=torch.float32)
        check_scale(path / MANIFEST, fqn, scales[fqn])
    results = {fqn: layer["sha256"] for fqn, layer in manifest["layers"].items()}
    return Delta(path, manifest, base, layers, scales, results)

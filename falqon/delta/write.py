"""`falqon export --format delta`: from a trained model to what it changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from falqon.checkpoint.base import BaseHash, frozen_hash, layer_hash
from falqon.delta.base import Base, open_base
from falqon.delta.codec import encode
from falqon.delta.directory import FORMAT, MANIFEST, STEM, VERSION
from falqon.delta.state import ChangedState
from falqon.errors import InputError
from falqon.export.directory import new_directory
from falqon.export.source import Trained
from falqon.export.tensors import refuse_nan
from falqon.manifest import hash_files, write_manifest
from falqon.premeld.source import original_of
from falqon.pretrained import resolve
from falqon.version import __version__


def write_delta(
    trained: Trained, name: str, revision: str | None, output: str | Path, limit: int
) -> dict[str, Any]:
    """Write what a training changed, one layer at a time.

    Args:
        trained: What was trained.
        name, revision: The model it started from, or a directory of `falqon meld`.
        output: The new directory.
        limit: Bytes of data in a file, roughly.

    Returns:
        Plain values, ready for JSON: `output`, `checkpoint`, `bytes` (of all files), `codes` and
        `codes_changed` (numbers), `format` (`delta`), and the manifest's other entries.

    Raises:
        InputError: The model is another than what the training started from, something that should
            be frozen was changed, there are no FP8 codes, or the output cannot be written.
    """
    if trained.settings["recipe"]["emulate"] == "none":
        raise InputError(
            f"{trained.file} was trained with the recipe 'none', without FP8: it has no codes that "
            "a delta could hold. Use --format bf16."
        )
    state = trained.state
    if isinstance(state, ChangedState):
        base = state.base
    else:
        base = open_base(name, revision, trained.settings, trained.base)
    frozen = _frozen(trained, base)
    original, at = original_of(name, revision)
    with new_directory(output) as directory:
        writer = _Writer(directory, limit)
        hashes: dict[str, str] = {}
        layers = {}
        for fqn in trained.layers:
            hashes[fqn], layers[fqn] = _layer(trained, base, fqn, writer)
        writer.flush()
        files = hash_files(directory)
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "falqon": __version__,
            "torch": torch.__version__,
            "base": BaseHash(hashes, frozen).plain(),
            "model": {
                "name": original,
                "revision": at,
                "hub": not resolve(original).is_local,
                "prompt": trained.origin.get("prompt"),
            },
            "settings": trained.settings,
            "global_step": trained.step,
            "losses": trained.losses,
            "data": trained.data,
            "training_sha256": trained.training_sha256,
            "layers": layers,
            "files": files,
        }
        write_manifest(directory / MANIFEST, manifest)
        size = sum(file.stat().st_size for file in directory.iterdir())
    return {
        **manifest,
        "output": str(output),
        "checkpoint": str(trained.file),
        "format": "delta",
        "bytes": size,
        "codes": sum(layer["out"] * layer["in"] for layer in layers.values()),
        "codes_changed": sum(layer["codes"] for layer in layers.values()),
    }


def _layer(trained: Trained, base: Base, fqn: str, writer: _Writer) -> tuple[str, dict[str, Any]]:
    """Write one layer's change; hash of its base, and what the manifest says about it."""
    layer, scale = trained.layers[fqn], trained.state[f"{fqn}.scale"]
    before = base.backbone(layer, scale).contiguous()
    state = trained.state
    name = f"{fqn}.codes"
    # So that the base is not read once more.
    merged = state.changed(fqn, before) if isinstance(state, ChangedState) else state[name]
    after = merged[: layer.out_features]
    refuse_nan(trained.file, name, after)
    change = encode(before, after)
    writer.put(fqn, change.places, change.differences)
    return layer_hash(before, scale), {
        "out": layer.out_features,
        "in": layer.in_features,
        "scale": float(scale),
        "by": change.by,
        "codes": change.codes,
        "rows": change.rows,
        "bytes": change.nbytes,
        "sha256": layer_hash(after, scale),
    }


def _frozen(trained: Trained, base: Base) -> dict[str, str]:
    """Hashes of all that is not melded, which has to be that of the base."""
    weights = {f"{fqn}.weight" for fqn in trained.layers}
    hashes = {}
    for name in base.shapes:
        if name in weights:
            continue
        tensor = base.other(name)
        if trained.base is None or name in trained.base.frozen:
            hashes[name] = frozen_hash(tensor)
        if isinstance(trained.state, ChangedState) and name not in trained.state.own:
            continue
        ours = trained.state.get(name)
        if ours is None or ours.dtype != tensor.dtype or not torch.equal(ours, tensor):
            raise InputError(
                f"{trained.file}: {name} is not that of {base.name}, and a delta holds changes of "
                "FP8 codes only. Name the model that the training started from with --model, or "
                "export the whole model."
            )
    return hashes


@dataclass
class _Writer:
    """Files of compressed changes; no more than one file's worth of them is in memory."""

    directory: Path
    limit: int
    tensors: dict[str, Tensor] = field(default_factory=dict)
    number: int = 0

    def put(self, fqn: str, places: bytes, differences: bytes) -> None:
        for part, data in (("places", places), ("differences", differences)):
            self.tensors[f"{fqn}.{part}"] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if sum(tensor.nbytes for tensor in self.tensors.values()) >= self.limit:
            self.flush()

    def flush(self) -> None:
        if self.tensors:
            self.number += 1
            name = f"{STEM}-{self.number:05}.safetensors"
            save_file(self.tensors, self.directory / name)
            self.tensors = {}


def format_report(report: Mapping[str, Any]) -> str:
    """Lay out the result of `write_delta` for a terminal, without a line end after the last."""
    rows = {
        "exported": f"{report['checkpoint']} (step {report['global_step']})",
        "as": f"delta, {report['bytes']:,} bytes",
        "to": report["output"],
        "base": f"{report['model']['name']}, SHA-256 {report['base']['sha256']}",
        "codes changed": f"{report['codes_changed']:,} of {report['codes']:,} "
        f"({report['codes_changed'] / report['codes']:.2%}) in {len(report['layers'])} layers",
        "training SHA-256": report["training_sha256"],
    }
    lines = [f"{label:<16} {value}" for label, value in rows.items()]
    lines += [f"  {file['sha256']}  {name}" for name, file in report["files"].items()]
    return "\n".join(lines)

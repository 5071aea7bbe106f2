"""`falqon meld`: meld a model once, layer by layer, into a directory to train from."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from falqon.checkpoint.hashing import hash_tensors
from falqon.checkpoint.io import TEMPORARY_SUFFIX
from falqon.errors import InputError
from falqon.fp8 import all_finite
from falqon.kernels import devices
from falqon.manifest import describe, seal
from falqon.meld import meld_linear, plan
from falqon.premeld.directory import (
    DTYPES,
    FORMAT,
    MANIFEST,
    ORIGINALS,
    VERSION,
    WEIGHTS,
    settings_of,
)
from falqon.premeld.shards import ShardWriter, Spec
from falqon.premeld.source import WeightSource, open_source
from falqon.pretrained import PACKAGE_PREFIX, resolve
from falqon.recipe import Fp8Recipe, MeldRecipe, as_plain
from falqon.version import __version__

Progress = Callable[[str, int, int, float], None]


def premeld(
    model: str,
    output: str | Path,
    fp8: Fp8Recipe | None = None,
    melding: MeldRecipe | None = None,
    *,
    dtype: str = "bf16",
    keep_weights: bool = False,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    shard_bytes: int = 4 * 2**30,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Meld a model into a directory, holding one layer of it at a time.

    The bytes are those of loading the model in `dtype` and melding it in memory, on the same kind
    of device. The directory gets its name when all is written; after an error there is none.

    Args:
        model: model name, see `falqon.pretrained`.
        output: directory to make; it may be there if it is empty.
        fp8, melding: settings, the defaults if None.
        dtype: `bf16` or `fp32`: of the weights before they are melded, and of all else.
        keep_weights: store the original weights in `dtype` as well.
        device: where to compute.
        revision: branch, tag or commit on the hub.
        shard_bytes: largest file, but for tensors that are larger.
        progress: called with a layer's name, its number from 1, how many there are, and an
            estimate of the seconds left.

    Returns:
        The manifest, with `path`, `tokenizer` (whether the source has one) and `whole` (why it had
        to be loaded as a whole, or None).

    Raises:
        InputError: if the source or a setting cannot be used, or the disk is full.
    """
    fp8, melding = fp8 or Fp8Recipe(), melding or MeldRecipe()
    if dtype not in DTYPES:
        raise InputError(f"dtype is {dtype!r}; choose {' or '.join(DTYPES)}.")
    devices.check(torch.device(device))
    output = Path(output).expanduser()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise InputError(f"the output {output} exists already; give another, or remove it first.")
    started = time.perf_counter()
    source = open_source(model, DTYPES[dtype], revision)
    names, skipped = plan(source.model, melding)
    with _staging(output) as staging:
        job = _Job(source, fp8, melding, DTYPES[dtype], torch.device(device), progress, names)
        job.run(staging, keep_weights, shard_bytes)
        has_tokenizer = source.save_settings(staging, DTYPES[dtype])
        written = [file for file in staging.iterdir() if file.name not in job.files]
        settings = {file.name: describe(file) for file in sorted(written)}
        content = {
            "format": FORMAT,
            "version": VERSION,
            "falqon": __version__,
            "torch": torch.__version__,
            "source": {
                "name": _lasting_name(model),
                "revision": revision,
                "sha256": job.source_hash(),
            },
            "settings": settings_of(fp8, melding, dtype),
            "meld": as_plain(melding),
            "recipe": as_plain(fp8),
            "originals": keep_weights,
            "layers": job.layers,
            "skipped": skipped,
            "bytes_before": job.bytes_before,
            "bytes_after": job.bytes_after,
            "seconds": round(time.perf_counter() - started, 3),
            "files": {**settings, **job.files},
            "tensors": job.tensors,
        }
        manifest = seal(content)
        _write_synced(staging / MANIFEST, json.dumps(manifest, indent=1))
    return {"path": str(output), "tokenizer": has_tokenizer, "whole": source.whole, **manifest}


def _lasting_name(model: str) -> str:
    """A name that means the same in any directory."""
    is_path = resolve(model).is_local and not model.startswith(PACKAGE_PREFIX)
    return str(Path(model).expanduser().absolute()) if is_path else model


@dataclass
class _Job:
    """The walk over a model's tensors; what the manifest says about them is collected."""

    source: WeightSource
    fp8: Fp8Recipe
    melding: MeldRecipe
    dtype: torch.dtype
    device: torch.device
    progress: Progress | None
    names: list[str]
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    files: dict[str, dict[str, int | str]] = field(default_factory=dict)
    tensors: dict[str, dict[str, str]] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    _hashes: dict[str, str] = field(default_factory=dict)

    def run(self, directory: Path, keep_weights: bool, limit: int) -> None:
        entries = dict(self.source.entries())
        melded = {f"{name}.weight": name for name in self.names}
        total = sum(entries[key].numel() for key in melded)
        weights = ShardWriter(directory, WEIGHTS, self._specs(entries, melded), limit)
        kept = {key: Spec(self.dtype, tuple(entries[key].shape)) for key in melded}
        originals = ShardWriter(directory, ORIGINALS, kept if keep_weights else {}, limit)
        started, done = time.perf_counter(), 0
        with contextlib.closing(weights), contextlib.closing(originals):
            for key, entry in entries.items():
                tensor = self._read(key, entry)
                if key not in melded:
                    weights.put(key, tensor)
                    continue
                codes, scale = self._meld(melded[key], tensor)
                weights.put(f"{melded[key]}.codes", codes)
                weights.put(f"{melded[key]}.scale", scale)
                if keep_weights:
                    originals.put(key, tensor)
                done += tensor.numel()
                if self.progress is not None:
                    left = (time.perf_counter() - started) * (total - done) / done
                    self.progress(melded[key], len(self.layers), len(melded), left)
            for writer in (weights, originals):
                writer.finish()
                self.files |= writer.files
                self.tensors |= writer.tensors

    def source_hash(self) -> str:
        """SHA-256 over the tensors as they are stored, whatever files they are in."""
        text = "".join(f"{name} {digest}\n" for name, digest in sorted(self._hashes.items()))
        return hashlib.sha256(text.encode()).hexdigest()

    def _specs(self, entries: dict[str, Tensor], melded: dict[str, str]) -> dict[str, Spec]:
        exact = self.fp8.emulate == "none"
        specs = {}
        for key, entry in entries.items():
            shape = tuple(entry.shape)
            if key in melded:
                rows = (shape[0] + self.melding.rank, shape[1])
                kind = torch.float32 if exact else torch.uint8
                specs[f"{melded[key]}.codes"] = Spec(kind, rows)
                specs[f"{melded[key]}.scale"] = Spec(torch.float32, (1,))
            else:
                specs[key] = Spec(self.dtype if entry.is_floating_point() else entry.dtype, shape)
        return specs

    def _read(self, key: str, entry: Tensor) -> Tensor:
        tensor = self.source.read(key)
        file = self.source.file_of(key)
        if tensor.shape != entry.shape:
            raise InputError(
                f"{file}: the tensor {key} has shape {tuple(tensor.shape)}, and config.json asks "
                f"for {tuple(entry.shape)}. Use weights that belong to the config."
            )
        self._hashes[key] = hash_tensors({key: tensor})
        if not entry.is_floating_point():
            return tensor
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise InputError(
                f"{file}: the tensor {key} is stored as {tensor.dtype}; FP8 codes are made from "
                "16-bit weights. Name the unquantised original."
            )
        if not all_finite(tensor):
            raise InputError(
                f"{file}: the tensor {key} holds NaN or infinity; the file is damaged or was saved "
                "from a diverged run. Use another checkpoint."
            )
        return tensor.to(self.dtype)

    def _meld(self, name: str, weight: Tensor) -> tuple[Tensor, Tensor]:
        out_features, in_features = weight.shape
        linear = nn.Linear(in_features, out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        started = time.perf_counter()
        layer, captured = meld_linear(linear, self.fp8, self.melding, name=name, device=self.device)
        codes, scale = layer.codes.detach().cpu(), layer.scale.detach().cpu()
        self.layers[name] = {
            "out": out_features,
            "in": in_features,
            "captured": captured,
            "seconds": round(time.perf_counter() - started, 3),
        }
        self.bytes_before += weight.nbytes
        self.bytes_after += codes.nbytes + scale.nbytes
        return codes, scale


@contextlib.contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A directory that takes the output's place if, and only if, all went well."""
    staging = output.parent / f".{output.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(output)
        staging.mkdir()
        with _locked(staging):
            yield staging
            os.replace(staging, output)
    except OSError as error:
        free = "unknown"
        with contextlib.suppress(OSError):
            free = str(shutil.disk_usage(staging).free)
        raise InputError(
            f"the output {output} cannot be written: {error.strerror or error} ({free} bytes free "
            "on its file system; nothing was left behind). Free space, or give another directory."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock, which the system lets go when the process ends, however it does.

    Raises:
        BlockingIOError: if another process holds it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _remove_leftovers(output: Path) -> None:
    """Delete what killed processes left of the same output; what is being written is locked."""
    for leftover in output.parent.glob(f".{glob.escape(output.name)}.*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(BlockingIOError), _locked(leftover):
            shutil.rmtree(leftover)


def _write_synced(file: Path, text: str) -> None:
    with open(file, "x", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


def format_report(report: dict[str, Any]) -> str:
    """Lay out the result of `premeld` for a terminal, without a line end after the last line."""
    layers = report["layers"].values()
    captured = sum(layer["captured"] for layer in layers) / len(layers)
    seconds = sum(layer["seconds"] for layer in layers)
    size = sum(file["bytes"] for file in report["files"].values())
    before, after = (report[key] / 2**20 for key in ("bytes_before", "bytes_after"))
    lines = [
        f"melded {len(layers)} linear layers of {report['source']['name']} into {report['path']}",
        f"their weights: {before:.1f} MiB, now {after:.1f} MiB; all files {size / 2**20:.1f} MiB",
        f"captured energy: {captured:.1%} on average, by layer in {MANIFEST}",
        f"time: {report['seconds']:.1f} s, of which {seconds:.1f} s to quantise and decompose",
        f"original weights: {'kept' if report['originals'] else 'not kept (--keep-weights)'}",
    ]
    lines += [f"left alone: {name} ({reason})" for name, reason in report["skipped"].items()]
    if report["whole"] is not None:
        lines.append(f"the whole model was in memory: {report['whole']}")
    if not report["tokenizer"]:
        lines.append("the source has no tokenizer: name one in the data module's settings")
    return "\n".join(lines)

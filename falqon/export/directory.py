"""A directory that appears whole or not at all, and the weight files in it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from falqon.checkpoint import TEMPORARY_SUFFIX
from falqon.errors import InputError
from falqon.export.tensors import Entry
from falqon.manifest import check_files, read_manifest
from falqon.premeld.shards import ShardWriter

MANIFEST = "falqon-export.json"
FORMAT = "falqon-export"
VERSION = 1
DEFAULT_SHARD = "5GB"
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9}


def check_free(target: str | Path) -> None:
    """Refuse a target that is neither new nor an empty directory.

    Raises:
        InputError: It is taken.
    """
    target = Path(target).absolute()
    if target.is_dir():
        if any(target.iterdir()):
            raise InputError(f"output {target} is not empty. Give a new directory.")
    elif target.exists() or target.is_symlink():
        raise InputError(f"output {target} is a file. Give a new directory.")


@contextlib.contextmanager
def new_directory(target: str | Path) -> Iterator[Path]:
    """A temporary directory beside the target that takes its place if all goes well.

    After an error it is removed. A process that is killed leaves it, under a hidden name that ends
    in `.falqon-partial`.

    Args:
        target: Must not exist, or be an empty directory. Its parents are made.

    Raises:
        InputError: The target is taken, or cannot be written.
    """
    check_free(target)
    target = Path(target).absolute()
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            file.chmod(temporary.stat().st_mode & 0o666)  # some libraries: for the owner only
            _sync(file)
        _sync(temporary)
        temporary.rename(target)
        _sync(target.parent)
    except InputError:
        raise
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"output {target} cannot be written: {error}. Nothing was left there; free space or "
            "give another directory."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if path.is_file():  # of directories some file systems cannot, and that is no error
            raise
    finally:
        os.close(descriptor)


def parse_size(text: str) -> int:
    """Bytes of a size such as `5GB` or `200MB`.

    Raises:
        InputError: It is not a positive number with B, KB, MB or GB.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?B)", text.strip().upper())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise InputError(f"shard size {text!r}: write a number with B, KB, MB or GB, as in 5GB.")
    return size


def write_weights(
    entries: Iterable[Entry], directory: Path, limit: int
) -> dict[str, dict[str, int | str]]:
    """Write tensors as safetensors, one at a time.

    One file is `model.safetensors`. Several are numbered, with `model.safetensors.index.json`.

    Args:
        entries: The tensors, in the order of the files.
        directory: Where to.
        limit: Bytes of tensors in a file; a larger tensor has a file of its own.

    Returns:
        Bytes and SHA-256 of every weight file.
    """
    entries = list(entries)
    specs = {entry.name: entry.spec for entry in entries}
    writer = ShardWriter(directory, "model", specs, limit, alone="model.safetensors")
    with contextlib.closing(writer):
        for entry in entries:
            writer.put(entry.name, entry.make())
        writer.finish()
    if len(writer.files) > 1:
        size = sum(spec.nbytes for spec in specs.values())
        places = {name: tensor["file"] for name, tensor in writer.tensors.items()}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        path = directory / "model.safetensors.index.json"
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return writer.files


def open_export(path: str | Path) -> dict[str, Any] | None:
    """The manifest of a directory that `falqon export` wrote, its files compared with it.

    Args:
        path: The directory.

    Returns:
        The manifest; None for another directory, or an export of before there were manifests.

    Raises:
        InputError: Naming the file that is missing or damaged.
    """
    path = Path(path).expanduser()
    if not (path / MANIFEST).is_file():
        return None
    remedy = "Copy the directory again, or export again (falqon export)."
    manifest = read_manifest(path / MANIFEST, FORMAT, VERSION, remedy)
    check_files(path, manifest["files"], remedy)
    return manifest

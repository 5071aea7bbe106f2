"""Checkpoints of which every rank writes its part: a directory, by torch.distributed.checkpoint.

Beside the tensors' files lie `meta.pt`, which holds all else that Lightning collected, and
`falqon-checkpoint.json` with the SHA-256 of every file: torch itself checks none. A directory has
another, hidden name until it is complete. Reading runs no code: of the pickled table of contents
only the classes that describe tensors are let in.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    Metadata,
    StorageMeta,
    TensorStorageMetadata,
)

from falqon.checkpoint.errors import CheckpointError
from falqon.errors import InputError
from falqon.manifest import check_files, hash_files, read_manifest, write_manifest

META = "meta.pt"
MANIFEST = "falqon-checkpoint.json"
FORMAT = "falqon-sharded-checkpoint"
VERSION = 1
_TABLE = ".metadata"
_REMEDY = "Copy the directory again, or use another checkpoint of the run."
_NAMED = {
    "torch.distributed.checkpoint.metadata": {
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "pathlib": {"Path", "PosixPath"},
}


class _Unpickler(pickle.Unpickler):
    """Lets in what describes tensors, and nothing that does anything."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _NAMED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not let in")


class _Reader(dcp.FileSystemReader):
    """Reads the table of contents without running code from it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / _TABLE).open("rb") as file:
            table: Metadata = _Unpickler(file).load()
        if table.storage_meta is None:
            table.storage_meta = StorageMeta()
        table.storage_meta.load_id = self.load_id
        return table


def is_sharded(path: str | Path) -> bool:
    """Whether a path is a directory that holds a sharded checkpoint."""
    # Either: of a damaged one the other is to be missed by its name.
    return any((Path(path) / name).is_file() for name in (_TABLE, MANIFEST))


def write_meta(directory: Path, meta: Mapping[str, Any]) -> None:
    """Write what a checkpoint holds beside tensors, with `optimizer_skeletons`."""
    with (directory / META).open("xb") as file:
        torch.save(meta, file)
        file.flush()
        os.fsync(file.fileno())


def write_seal(directory: Path, known: Mapping[str, dict[str, int | str]] | None = None) -> None:
    """Write the manifest of a directory in which all else has been written.

    Args:
        directory: It.
        known: Bytes and SHA-256 of files that need not be read again, by name.
    """
    content = {"format": FORMAT, "version": VERSION, "files": hash_files(directory, known)}
    write_manifest(directory / MANIFEST, content)
    with (directory / MANIFEST).open("rb") as file:
        os.fsync(file.fileno())


def check_sharded(path: str | Path, only: str | None = None, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a sharded checkpoint with its manifest.

    Args:
        path: The directory.
        only: The one file to compare; None for all.
        part, parts: Compare this part of them, of so many: ranks share the work.

    Raises:
        CheckpointError: Naming the file that is missing or damaged.
    """
    path = Path(path)
    if not (path / MANIFEST).is_file():
        raise CheckpointError(
            f"{path} has no {MANIFEST}, with which its other files are compared. {_REMEDY}"
        )
    try:
        files = read_manifest(path / MANIFEST, FORMAT, VERSION, _REMEDY)["files"]
        names = sorted(files)[part::parts] if only is None else [only]
        check_files(path, {name: files[name] for name in names}, _REMEDY)
    except InputError as error:
        raise CheckpointError(str(error)) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {_REMEDY}") from error


def read_meta(path: str | Path) -> dict[str, Any]:
    """What a sharded checkpoint holds beside tensors.

    Raises:
        CheckpointError: if it is incomplete, damaged, or something else.
    """
    check_sharded(path, META)
    file = Path(path) / META
    try:
        meta: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        skeletons = meta["optimizer_skeletons"]
        assert isinstance(skeletons, list)
    except (OSError, RuntimeError, KeyError, AssertionError, pickle.UnpicklingError) as error:
        text = str(error).strip().split("\n", maxsplit=1)[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as a sharded checkpoint of falqon: {META} "
            f"({type(error).__name__}: {text}). Use another checkpoint of the run."
        ) from error
    return meta


def shapes(path: str | Path) -> dict[str, Tensor]:
    """Tensors without data, by key: shapes and dtypes of what a sharded checkpoint holds.

    Raises:
        CheckpointError: as `read_meta` does.
    """
    check_sharded(path, _TABLE)
    try:
        table = _Reader(path).read_metadata()
    except (OSError, EOFError, AttributeError, ValueError, pickle.UnpicklingError) as error:
        text = str(error).strip().split("\n", maxsplit=1)[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as a sharded checkpoint ({type(error).__name__}: {text}). "
            "Use another checkpoint of the run."
        ) from error
    found = {}
    for key, entry in table.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{path} was not written by falqon: {key} is not a tensor.")
        found[key] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
    return found


def load_tensors(path: str | Path, into: dict[str, Tensor], alone: bool = False) -> None:
    """Fill tensors, each with the part that it is of the one saved under its key.

    Args:
        path: of the checkpoint, which `check_sharded` found undamaged: hashing is as much work as
            reading, and this is called once for the model and once for every optimizer.
        into: tensors and DTensors by key.
        alone: this process reads for itself, whether or not there are others.

    Raises:
        CheckpointError: if a file cannot be read, or has no such tensors.
    """
    try:
        dcp.load(into, storage_reader=_Reader(path), planner=DefaultLoadPlanner(), no_dist=alone)
    except (dcp.api.CheckpointException, OSError, RuntimeError, KeyError, ValueError) as error:
        text = str(error).strip().split("\n", maxsplit=1)[0][:200]
        raise CheckpointError(
            f"{path} cannot be read as a sharded checkpoint ({type(error).__name__}: {text}). "
            "Use another checkpoint of the run."
        ) from error


def read_sharded(path: str | Path) -> dict[str, Any]:
    """All of a sharded checkpoint in memory, as if it had been saved in one file.

    Raises:
        CheckpointError: if it is incomplete or damaged.
    """
    check_sharded(path)
    meta = read_meta(path)
    tensors = {key: torch.empty_like(t, device="cpu") for key, t in shapes(path).items()}
    load_tensors(path, tensors, alone=True)
    checkpoint = {k: v for k, v in meta.items() if k != "optimizer_skeletons"}
    checkpoint["state_dict"] = {
        k.removeprefix("model/"): t for k, t in tensors.items() if k.startswith("model/")
    }
    checkpoint["optimizer_states"] = [
        fill_optimizer(number, skeleton, tensors)
        for number, skeleton in enumerate(meta["optimizer_skeletons"])
    ]
    return checkpoint


def split_optimizer(
    number: int, state: Mapping[str, Any], names: list[str], is_part: Any
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An optimizer's state without its large tensors, and these by key.

    Args:
        number: of the optimizer.
        state: its `state_dict`, with parameters by number.
        names: their names, in that order.
        is_part: says of a tensor whether it is one of those that ranks have parts of.

    Returns:
        Skeleton: the state with None in place of tensors, and `names`; tensors by key.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[int, dict[str, Any]] = {}
    for index, entry in state["state"].items():
        entries[index] = dict(entry)
        for key, value in entry.items():
            if isinstance(value, Tensor) and is_part(value):
                tensors[f"optimizer/{number}/{names[index]}/{key}"] = value
                entries[index][key] = None
    skeleton = {"state": entries, "param_groups": state["param_groups"], "names": names}
    return skeleton, tensors


def fill_optimizer(
    number: int, skeleton: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The state that `split_optimizer` was given, with these tensors."""
    names = skeleton["names"]
    state = {
        index: {
            key: tensors[f"optimizer/{number}/{names[index]}/{key}"] if value is None else value
            for key, value in entry.items()
        }
        for index, entry in skeleton["state"].items()
    }
    return {"state": state, "param_groups": skeleton["param_groups"]}


def replace_directory(temporary: Path, target: Path) -> None:
    """Give a complete directory its name; what had it is there until then.

    Between two renames, a moment, the target has its old content under a hidden name beside it:
    a directory cannot take another one's place in one step. `recover` finds it.
    """
    old = target.with_name(f".{target.name}.old")
    if old.exists():
        shutil.rmtree(old) if old.is_dir() else old.unlink()
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    if old.is_dir():
        shutil.rmtree(old)
    elif old.exists():
        old.unlink()


def recover(target: Path) -> None:
    """Give a checkpoint its name back, if a process was killed between two renames."""
    old = target.with_name(f".{target.name}.old")
    if not target.exists() and old.exists():
        with contextlib.suppress(OSError):  # another rank was faster
            old.rename(target)

"""Checkpoint files that are either whole or not there.

A checkpoint is streamed to a temporary file beside its target, forced to the disk, and renamed
over the target. A full disk, a crash or a kill at any moment leaves the previous file as it was.
Reading never runs code from a file (`weights_only=True`), and checks the file's SHA-256 first (in
files of older releases the zip checksums): torch itself loads a file with flipped bits without a
word.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any, cast

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from falqon.checkpoint.errors import CheckpointError
from falqon.checkpoint.seal import REPLACED, Seal, check_seal
from falqon.checkpoint.sharded import (
    is_sharded,
    read_meta,
    read_sharded,
    recover,
    replace_directory,
)

# In a run's directory: the state to resume from, and the weights with everything pending written.
LAST = Path("checkpoints") / "last.ckpt"
SERVED = Path("served.ckpt")
# Hidden, and never ".ckpt": nothing that lists checkpoints may take a half-written file for one.
TEMPORARY_SUFFIX = ".falqon-partial"
_STARTED = time.time()
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, struct.error, NotImplementedError)
_READ_ERRORS = (OSError, RuntimeError, ValueError, KeyError, EOFError, AttributeError, TypeError)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin with atomic, streamed writes and safe reads.

    Local files only. For remote URLs (`s3://...`) the parent's behaviour stays, except that
    reading keeps `weights_only=True`.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint; the file at `path` is the old one until the new one is complete.

        Args:
            checkpoint: What Lightning collected.
            path: Target file or fsspec URL.
            storage_options: Not supported, as in the parent.

        Raises:
            CheckpointError: The file cannot be written, because the disk is full, for example.
            TypeError: `storage_options` was given.
        """
        local = _local_path(path)
        if local is None or storage_options is not None:
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(local.parent)
        except OSError as error:
            raise _cannot_write(local, 0, error) from error
        with _replacing(local) as file:
            torch.save(checkpoint, cast(IO[bytes], file))
            file.seal()

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint.

        Args:
            path: Checkpoint file or fsspec URL.
            map_location: Where tensors go, as in `torch.load`.
            weights_only: Ignored: it is always True. A checkpoint that needs False holds objects
                that run code when they are loaded.

        Returns:
            The checkpoint.

        Raises:
            CheckpointError: There is no such file, or it is truncated, damaged, or no checkpoint.
        """
        local = _local_path(path)
        if local is not None:
            return read_checkpoint(local, map_location)
        try:
            loaded = super().load_checkpoint(path, map_location, weights_only=True)
        except (*_READ_ERRORS, UnpicklingError) as error:
            raise _cannot_read(path, error) from error
        return _require_checkpoint(path, loaded)


def read_checkpoint(
    path: str | Path, map_location: Any = "cpu", *, mmap: bool = False
) -> dict[str, Any]:
    """Read a local Lightning checkpoint without running code from it.

    Args:
        path: The file, or the directory of a sharded checkpoint, which is read as a whole.
        map_location: Where tensors go, as in `torch.load`.
        mmap: Map the file instead of copying it: tensors that are not used are not read again.

    Returns:
        The checkpoint, with at least the key `state_dict`.

    Raises:
        CheckpointError: There is no such file, or it is truncated, damaged, or no checkpoint.
    """
    file = Path(path)
    recover(file)
    if is_sharded(file):
        return read_sharded(file)
    if file.is_dir():
        raise CheckpointError(
            f"checkpoint {file} is a directory without a checkpoint in it. Give a .ckpt file, or a "
            "directory that a run with falqon.ShardedStrategy wrote."
        )
    if not file.is_file():
        others = sorted(other.name for other in file.parent.glob("*.ckpt"))
        there = f"; {file.parent} holds {', '.join(others)}" if others else ""
        raise CheckpointError(f"checkpoint {file} does not exist{there}. Check the path.")
    _check_content(file)
    try:
        loaded = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except (*_READ_ERRORS, UnpicklingError) as error:
        raise _cannot_read(file, error) from error
    return _require_checkpoint(file, loaded)


def read_header(path: str | Path) -> dict[str, Any]:
    """What a checkpoint holds beside large tensors; of one in a file also these, not read yet.

    Raises:
        CheckpointError: as `read_checkpoint` does.
    """
    recover(Path(path))
    return read_meta(path) if is_sharded(path) else read_checkpoint(path, mmap=True)


def _local_path(path: str | Path) -> Path | None:
    filesystem, plain = url_to_fs(str(path))
    return Path(plain) if isinstance(filesystem, LocalFileSystem) else None


class _WatchedFile:
    """A file to write that remembers its error: torch's zip writer replaces it by its own."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._seal = Seal()
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        self._seal.update(data)
        self._write(data)
        return len(data)

    def seal(self) -> None:
        """Add the hash of all that was written."""
        self._file.seek(-REPLACED, os.SEEK_END)
        self._write(self._seal.comment())

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:  # near a full disk the system takes a part first, and fails at the next
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Nothing is held back."""


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[_WatchedFile]:
    """A file to write that takes the target's place if, and only if, all went well."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    watched: _WatchedFile | None = None
    written = 0
    try:
        # Unbuffered, so that closing after an error has nothing left to write, and to fail at.
        with open(temporary, "xb", buffering=0) as file:
            watched = _WatchedFile(file)
            try:
                yield watched
                os.fsync(file.fileno())
            finally:
                written = os.fstat(file.fileno()).st_size
        if is_sharded(target):  # a file cannot take a directory's place in one step
            replace_directory(temporary, target)
        else:
            os.replace(temporary, target)
        _sync_directory(target.parent)
    except (OSError, RuntimeError) as error:
        if watched is not None and watched.error is not None:
            raise _cannot_write(target, written, watched.error) from error
        if isinstance(error, OSError):
            raise _cannot_write(target, written, error) from error
        raise  # not a matter of the disk
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    # Without this a power cut may undo the rename. Not every file system can; that is no error.
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(directory: Path) -> None:
    """Delete what killed processes left. A file in use has been written to since we started."""
    for leftover in directory.glob(f".*{TEMPORARY_SUFFIX}"):
        with contextlib.suppress(OSError):
            if leftover.stat().st_mtime >= _STARTED:
                continue
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _check_content(file: Path) -> None:
    wrong = check_seal(file)
    if wrong is None:
        return
    size = file.stat().st_size
    try:
        with zipfile.ZipFile(file) as archive:
            part = archive.testzip()
    except (*_READ_ERRORS, *_ZIP_ERRORS) as error:
        raise CheckpointError(
            f"{file} ({size} bytes) cannot be read as a checkpoint: it is truncated, damaged, or "
            f"something else ({error}). Use another checkpoint of the run."
        ) from error
    if part is not None:
        wrong = f"the checksum of its part {part!r} is wrong"
    if wrong:
        raise CheckpointError(
            f"{file} ({size} bytes) cannot be read as a checkpoint, it is damaged: {wrong}. Use "
            "another checkpoint of the run."
        )


def _require_checkpoint(path: str | Path, loaded: Any) -> dict[str, Any]:
    if not isinstance(loaded, dict) or "state_dict" not in loaded:
        kind = f"a dict with {sorted(map(str, loaded))[:5]}" if isinstance(loaded, dict) else ""
        raise CheckpointError(
            f"{path} is not a Lightning checkpoint: it holds {kind or type(loaded).__name__}, not "
            "a dict with 'state_dict'. Give a .ckpt file from a run's checkpoints directory."
        )
    return loaded


def _cannot_read(path: str | Path, error: BaseException) -> CheckpointError:
    refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
    if refused:
        return CheckpointError(
            f"{path} holds a Python object ({refused[1]}) that is not loaded, since doing so could "
            "run code. Checkpoints of falqon hold tensors and plain values only: use one of those."
        )
    text = str(error).strip().split("\n", maxsplit=1)[0][:200]
    return CheckpointError(
        f"{path} cannot be read as a checkpoint ({type(error).__name__}: {text}). "
        "Use another checkpoint of the run."
    )


def _cannot_write(target: Path, written: int, error: OSError) -> CheckpointError:
    directory = target.parent
    while not directory.exists() and directory != directory.parent:
        directory = directory.parent
    free = "unknown"
    with contextlib.suppress(OSError):
        free = str(shutil.disk_usage(directory).free)
    kept = "the previous file is intact" if target.is_file() else "nothing was left behind"
    return CheckpointError(
        f"checkpoint {target} cannot be written: {error.strerror or error} ({written} bytes "
        f"written, {free} bytes free on its file system; {kept}). Free space, keep fewer "
        "checkpoints (save_top_k), or set another directory, then resume from the last checkpoint."
    )

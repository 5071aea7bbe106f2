"""Safetensors files written one tensor at a time, without holding what goes into them.

`safetensors.save_file` takes all tensors of a file at once. Here dtypes and shapes are given first,
so that the header and every tensor's place are known; then tensors come one by one, in any order.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import torch
from torch import Tensor

from falqon.checkpoint.io import TEMPORARY_SUFFIX
from falqon.manifest import describe

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.bool: "BOOL",
}


class Spec(NamedTuple):
    """Dtype and shape of a tensor that is going to be written."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


class ShardWriter:
    """Several safetensors files `STEM-00001-of-00003.safetensors` in one directory.

    A file has a temporary name until all of its tensors are written and are on the disk.

    Args:
        directory: where they go.
        stem: first part of their names.
        specs: all tensors, in the order in which they roughly come: neighbours share a file.
        limit: bytes of data from which on the next file is begun; a larger tensor has its own.
        alone: name of the file if there is only one; numbered like the others if None.

    Attributes:
        files: bytes and SHA-256 of every complete file, by name.
        tensors: `file` and `sha256` (of its data) of every tensor, by its name.
    """

    def __init__(
        self,
        directory: Path,
        stem: str,
        specs: Mapping[str, Spec],
        limit: int = 4 * 2**30,
        alone: str | None = None,
    ) -> None:
        parts = list(_split(specs, limit))
        self.files: dict[str, dict[str, int | str]] = {}
        self.tensors: dict[str, dict[str, str]] = {}
        self._shards: dict[str, _Shard] = {}
        for number, part in enumerate(parts, 1):
            name = f"{stem}-{number:05}-of-{len(parts):05}.safetensors"
            if alone is not None and len(parts) == 1:
                name = alone
            shard = _Shard(directory / name, part)
            self._shards |= dict.fromkeys(part, shard)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor, from whatever device it is on.

        Raises:
            ValueError: if it is not what was announced, or was written before.
            OSError: if the disk does not take it.
        """
        shard = self._shards.pop(name, None)
        if shard is None or Spec(tensor.dtype, tuple(tensor.shape)) != shard.specs[name]:
            raise ValueError(f"{name} was not announced, with this dtype and shape, or is written")
        self.tensors[name] = {"file": shard.path.name, "sha256": shard.put(name, tensor)}
        if not shard.waiting:
            self.files[shard.path.name] = shard.finish()

    def finish(self) -> None:
        """Make sure that all is written.

        Raises:
            ValueError: naming a tensor that is not.
        """
        if self._shards:
            raise ValueError(f"{next(iter(self._shards))} was announced and not written")

    def close(self) -> None:
        """Close what is open; files that are not complete keep their temporary name."""
        for shard in self._shards.values():
            shard.close()


class _Shard:
    """One file; see `ShardWriter`."""

    def __init__(self, path: Path, specs: dict[str, Spec]) -> None:
        self.path, self.specs, self.waiting = path, specs, set(specs)
        self._temporary = path.with_name(f".{path.name}{TEMPORARY_SUFFIX}")
        self._file: IO[bytes] | None = None
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        # Wide dtypes first: readers see every tensor at a multiple of its item's size.
        for name in sorted(specs, key=lambda n: -specs[n].dtype.itemsize):
            spec, start = specs[name], end
            end += spec.nbytes
            self._offsets[name] = start
            header[name] = {
                "dtype": _DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, end],
            }
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        self._head = len(text).to_bytes(8, "little") + text

    def put(self, name: str, tensor: Tensor) -> str:
        if self._file is None:
            # Unbuffered, so that closing after an error has nothing left to write, and to fail at.
            self._file = open(self._temporary, "xb", buffering=0)  # noqa: SIM115
            _write_all(self._file, self._head)
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        self._file.seek(len(self._head) + self._offsets[name])
        _write_all(self._file, raw.data)
        self.waiting.discard(name)
        return hashlib.sha256(raw.data).hexdigest()

    def finish(self) -> dict[str, int | str]:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self.close()
        found = describe(self._temporary)
        os.replace(self._temporary, self.path)
        return found

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _write_all(file: IO[bytes], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while (
        rest
    ):  # one call of the system writes 2 GiB at most, and less when the disk is nearly full
        rest = rest[file.write(rest) :]


def _split(specs: Mapping[str, Spec], limit: int) -> Iterator[dict[str, Spec]]:
    part: dict[str, Spec] = {}
    held = 0
    for name, spec in specs.items():
        if part and held + spec.nbytes > limit:
            yield part
            part, held = {}, 0
        part[name] = spec
        held += spec.nbytes
    if part:
        yield part

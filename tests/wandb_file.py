"""Reads the file that an offline W&B run leaves."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

# The module picks its generated code by protobuf's version, out of the type checker's sight.
Record: Any = vars(wandb_internal_pb2)["Record"]


def records(directory: Path) -> list[Any]:
    """Records of a .wandb file, when it is complete: another process writes it, a little later."""
    for _ in range(300):
        found = [record for file in directory.glob("*.wandb") for record in _parse(file)]
        if any(record.HasField("exit") for record in found):
            return found
        time.sleep(0.1)
    raise TimeoutError(f"{directory} has no complete .wandb file after 30 s")


def _parse(file: Path) -> Iterator[Any]:
    """LevelDB's log framing around wandb's protobuf."""
    data = file.read_bytes()
    place, parts = 7, b""  # a file header of 7 bytes, then blocks of 32 KiB
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""

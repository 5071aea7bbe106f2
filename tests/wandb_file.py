"""Reads the file that an offline W&B run leaves."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

# The module picks its generated code by protobuf's version, out of the type checker's sight.
Record: Any = vars(wandb_internal_pb2)["Record"]


def records(directory: Path) -> Iterator[Any]:
    """Records of a .wandb file: LevelDB's log framing around wandb's protobuf."""
    (file,) = directory.glob("*.wandb")
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

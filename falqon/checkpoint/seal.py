"""A SHA-256 at the end of a checkpoint file, over every byte before it.

torch writes zip archives; their checksums cover the data of the parts, and neither names nor what
lies between. The seal is the archive's comment, `falqon-sha256:` and 64 hexadecimal digits, so that
torch and every other reader of zip files read a sealed file as before.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

_PREFIX = b"falqon-sha256:"
_DIGITS = 64
_COMMENT = len(_PREFIX) + _DIGITS
REPLACED = 2
_END = 22  # bytes of the record that ends an archive; its last two are the comment's length
_SIGNATURE = b"PK\x05\x06"


class Seal:
    """Hash of what is being written, the archive's last record left open.

    Give `update` all that is written, in order; `comment` is then what the file has to end with.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._last = b""

    def update(self, data: bytes | memoryview) -> None:
        """Take in what was written."""
        if len(data) < _END:
            data = self._last + bytes(data)
        else:
            self._digest.update(self._last)
        self._last = bytes(data[-_END:])
        self._digest.update(data[:-_END])

    def comment(self) -> bytes:
        """The archive's comment with its length, to be written over the last `REPLACED` bytes.

        Raises:
            ValueError: What was written does not end as an archive without a comment.
        """
        if self._last[:4] != _SIGNATURE or self._last[-REPLACED:] != b"\0\0":
            raise ValueError("this is no zip archive without a comment")
        comment = _COMMENT.to_bytes(REPLACED, "little") + _PREFIX
        self._digest.update(self._last[:-REPLACED] + comment)
        return comment + self._digest.hexdigest().encode()


def check_seal(path: Path) -> str | None:
    """Compare a file with its seal.

    Returns:
        What is wrong with the file, None if it is as it was written; empty for an archive without
        a comment, as torch and older releases write it: that one cannot be checked.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if _ends_at(file, size - _END, 0):
            return ""
        start = size - _END - _COMMENT
        if not _ends_at(file, start, _COMMENT) or file.read(len(_PREFIX)) != _PREFIX:
            return "it is truncated, damaged, or something else"
        expected = file.read(_DIGITS)
        file.seek(0)
        left = size - _DIGITS
        while left and (block := file.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    if digest.hexdigest().encode() != expected:
        return "its content has another SHA-256 than when it was written"
    return None


def _ends_at(file: BinaryIO, place: int, comment: int) -> bool:
    """Whether an archive's last record is at a place, with a comment of this length behind it."""
    if place < 0:
        return False
    file.seek(place)
    record = file.read(_END)
    return record[:4] == _SIGNATURE and record[-2:] == comment.to_bytes(2, "little")

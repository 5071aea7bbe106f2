"""Text files that are either whole or not there."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from falqon.checkpoint.io import TEMPORARY_SUFFIX
from falqon.errors import InputError


def write_text(path: str | Path, text: str) -> None:
    """Write a file under another name, then rename it: a reader sees the old one or the new one.

    Args:
        path: The file; its directory is made.
        text: All of it.

    Raises:
        InputError: It cannot be written; what was there is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(
            f"output {path} cannot be written: {error.strerror or error}. Free space or give "
            "another file."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Refuse an output file that could not be written, before the work for it is done.

    Raises:
        InputError: It is a directory, or its directory cannot be made or written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"output {path} is a directory. Give the name of a file.")
    directory = path.absolute().parent
    while not directory.exists():
        directory = directory.parent
    if not directory.is_dir() or not os.access(directory, os.W_OK | os.X_OK):
        raise InputError(f"output {path} cannot be written: {directory} is not writable.")

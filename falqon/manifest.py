"""Manifests: JSON files that say what a directory holds, and carry their own SHA-256."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from falqon.errors import InputError


def describe(file: Path) -> dict[str, int | str]:
    """Bytes and SHA-256 of a file."""
    with open(file, "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def seal(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with `sha256` of all the rest of it, whatever the order of its keys."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return {**content, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def hash_files(
    directory: Path, known: Mapping[str, dict[str, int | str]] | None = None
) -> dict[str, dict[str, int | str]]:
    """Bytes and SHA-256 of every file in a directory, by name.

    Args:
        directory: It.
        known: Files that need not be read again.
    """
    known = known or {}
    return {p.name: known.get(p.name) or describe(p) for p in sorted(directory.iterdir())}


def write_manifest(path: Path, content: Mapping[str, Any]) -> None:
    """Write a manifest with its own SHA-256."""
    path.write_text(json.dumps(seal(content), indent=1) + "\n", encoding="utf-8")


def read_manifest(file: Path, format: str, version: int, remedy: str) -> dict[str, Any]:
    """Read a manifest and compare it with its own hash.

    Args:
        file: it.
        format, version: what its keys of these names have to be.
        remedy: what to do about a damaged one, as a sentence.

    Raises:
        InputError: it cannot be read, is damaged, or of another version.
    """
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = (manifest["format"], manifest["version"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}".split("\n", maxsplit=1)[0][:200]
        raise InputError(f"{file} cannot be read ({reason}). {remedy}") from error
    # Manifests of before had no hash: these are of another version, and not damaged.
    sealed = "sha256" in manifest or found == (format, version)
    if sealed and seal(manifest)["sha256"] != manifest.get("sha256"):
        raise InputError(f"{file} is damaged: it does not have the SHA-256 it names. {remedy}")
    if found != (format, version):
        raise InputError(
            f"{file} is {found[0]} version {found[1]}; this release reads {format} version "
            f"{version}. Use the release that wrote it."
        )
    return dict(manifest)


def check_files(directory: Path, files: Mapping[str, Mapping[str, Any]], remedy: str) -> None:
    """Compare files with what a manifest says about them.

    Args:
        directory: where they are.
        files: `bytes` and `sha256` by name.
        remedy: what to do about a damaged one, as a sentence.

    Raises:
        InputError: naming the first that is missing or another.
    """
    for name, expected in files.items():
        file = directory / name
        if not file.is_file():
            raise InputError(f"{file} is missing. {remedy}")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise InputError(
                f"{file} is damaged: it has {size} bytes instead of {expected['bytes']}. {remedy}"
            )
        if describe(file) != expected:
            raise InputError(
                f"{file} is damaged: it has another SHA-256 than when it was written. {remedy}"
            )

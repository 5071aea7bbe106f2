"""Prompts from a file or from standard input."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falqon.errors import InputError


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        text: The user's words.
        context: An input that they are about; often empty.
        reference: An answer to compare with, if there is one.
    """

    text: str
    context: str = ""
    reference: str | None = None


def read_prompts(path: str | Path) -> list[Prompt]:
    """Read prompts from a file.

    Args:
        path: A .jsonl file, one object a line with `prompt`, or with `instruction` and perhaps
            `input`, and perhaps a `reference` or `output`; any other file is text with one prompt a
            line. Blank lines are left out.

    Raises:
        InputError: It cannot be read, a line is no such object, or there is no prompt in it.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"prompts file {path} cannot be read: {reason}. Check it.") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl":
        prompts = [_from_json(line, f"{path}, line {number}") for number, line in lines]
    else:
        prompts = [Prompt(line.strip()) for _, line in lines]
    if not prompts:
        raise InputError(f"prompts file {path} has no prompt. Write one a line.")
    return prompts


def _from_json(line: str, where: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}). Write one object a line.") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: not an object. Write {{'prompt': ...}}, one a line.")
    key = "prompt" if "prompt" in row else "instruction"
    context, reference = row.get("input") or "", row.get("reference", row.get("output"))
    if not isinstance(row.get(key), str) or not row[key].strip():
        raise InputError(f"{where}: has no text in 'prompt' or 'instruction'.")
    if not isinstance(context, str) or not isinstance(reference, str | None):
        raise InputError(f"{where}: 'input' and 'reference' or 'output' must be text.")
    return Prompt(row[key], context, reference)

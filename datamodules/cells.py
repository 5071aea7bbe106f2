"""Checks on single cells and columns of a row, with errors that name the row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from falqon.errors import InputError


def text_cell(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in one cell.

    Args:
        row: Mapping from column to cell.
        column: Column to read; a missing one is an error.
        where: Name of the row for the error message.

    Raises:
        InputError: If the cell is missing, null, not a string, or not valid Unicode.
    """
    if column not in row:
        require_columns(row, (column,), where)
    value = row[column]
    if not isinstance(value, str):
        kind = "null" if value is None else f"of type {type(value).__name__}"
        raise InputError(
            f"{where}: {column!r} is {kind}, expected a string; fix or remove the row."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: {column!r} holds half of a surrogate pair at character {error.start}, which "
            "is not valid Unicode; fix or remove the row."
        ) from error
    return value


def require_columns(row: Mapping[str, Any], columns: Iterable[str], where: str) -> None:
    """Raises an InputError if a row lacks one of the columns; names those it has."""
    missing = [column for column in columns if column not in row]
    if missing:
        raise InputError(
            f"{where}: missing column {', '.join(map(repr, missing))}; the columns present are "
            f"{', '.join(map(repr, row)) or 'none'}. Rename the columns of the file."
        )


def flag_cell(row: Mapping[str, Any], column: str, where: str) -> bool | None:
    """A true/false cell, also written as text (CSV); None if missing, null or empty.

    Raises:
        InputError: If the cell is something else.
    """
    value = row.get(column)
    if value is None or value == "":
        return None
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("true", "1"):
        return True
    if word in ("false", "0"):
        return False
    raise InputError(f"{where}: {column!r} is {value!r}, expected true or false.")


def rank_cell(row: Mapping[str, Any], where: str) -> float:
    """The `rank` cell, 0 for the best; infinity if missing, null or empty.

    Raises:
        InputError: If the cell is no number.
    """
    value = row.get("rank")
    if value is None or value == "":
        return float("inf")
    try:
        rank = float(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: 'rank' is {value!r}, expected a number.") from error
    return float("inf") if math.isnan(rank) else rank

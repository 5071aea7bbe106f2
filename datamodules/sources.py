"""Rows from a local file or a hub dataset, each with a name for error messages."""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from falqon.errors import InputError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".csv", ".parquet")
"""File types that can be read, by the end of the file's name."""

_HUB_ID = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?::(?P<split>[\w.-]+))?")
_CSV_FIELD_LIMIT = 2**31 - 1  # the csv module refuses cells above 128 KiB unless told otherwise


@dataclass(frozen=True)
class Rows:
    """Rows of one source.

    Attributes:
        source: File path or hub id, as the user gave it.
        rows: One mapping from column to cell a row.
        numbers: Row number of every row, from 1: the line for JSON lines, the data row otherwise.
    """

    source: str
    rows: list[dict[str, Any]]
    numbers: Sequence[int]

    def where(self, index: int) -> str:
        """Name of one row for an error message, as in `train.jsonl, row 17`."""
        return f"{self.source}, row {self.numbers[index]}"


def is_local(path: str) -> bool:
    """Whether a path means a local file, there or not, and not a dataset id on the hub."""
    if path.lower().endswith(SUFFIXES) or Path(path).expanduser().exists():
        return True
    if path.startswith(("/", ".", "~")) or "\\" in path or path.count("/") > 1:
        return True
    return "/" in path and Path(path).parent.is_dir()


def check_source(path: str, key: str) -> None:
    """Checks, without reading a local file, that a source can be read; fetches a hub dataset.

    Args:
        path: Local file or hub id.
        key: Name of the setting that holds the path, for the error message.

    Raises:
        InputError: If the file is not there, is a directory or has an unknown suffix, if the id
            has no valid form, or if the hub does not give the dataset.
    """
    if not is_local(path):
        _load_hub(path, key)
        return
    file = Path(path).expanduser()
    if not file.exists():
        raise InputError(
            f"{key}: file not found: {path} (looked in {Path.cwd()}). Give the path of a "
            f"{', '.join(SUFFIXES)} file or a hub dataset id such as tatsu-lab/alpaca."
        )
    if file.is_dir():
        raise InputError(f"{key}: {path} is a directory; name one file in it ({_types()}).")
    if not path.lower().endswith(SUFFIXES):
        raise InputError(f"{key}: {path} has an unknown file type; use one of {_types()}.")


def read_rows(path: str, key: str = "train_path") -> Rows:
    """Reads all rows of a local file or of a hub dataset.

    Args:
        path: A `.json` (a list of objects, or {"data": [...]}), `.jsonl`, `.csv` or `.parquet`
            file, or a hub id with an optional split, as in `OpenAssistant/oasst1:validation`
            (split `train` if left out).
        key: Name of the setting that holds the path, for error messages.

    Returns:
        The rows, in the order of the source; at least one.

    Raises:
        InputError: If the source cannot be read or holds no rows; names the file and row.
    """
    if not is_local(path):
        rows = _load_hub(path, key).to_list()
        table = Rows(path, rows, range(1, len(rows) + 1))
    else:
        check_source(path, key)
        table = _read_file(path)
    if not table.rows:
        raise InputError(f"{key}: {path} holds no rows.")
    return table


def _types() -> str:
    return ", ".join(SUFFIXES)


def _read_file(path: str) -> Rows:
    lower = path.lower()
    file = Path(path).expanduser()
    try:
        if lower.endswith(".parquet"):
            return _read_parquet(file, path)
        with _open_text(file) as stream:
            if lower.endswith(".csv"):
                return _read_csv(stream, path)
            if lower.endswith((".jsonl", ".jsonl.gz")):
                return _read_jsonl(stream, path)
            return _read_json(stream, path)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); save the file as UTF-8.") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _open_text(file: Path) -> IO[str]:
    # utf-8-sig takes files with and without a byte order mark; the csv module wants newline="".
    if file.name.lower().endswith(".gz"):
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _read_jsonl(stream: IO[str], path: str) -> Rows:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, row {number}: not valid JSON: {error}") from error
        rows.append(_object(row, path, number))
        numbers.append(number)
    return Rows(path, rows, numbers)


def _read_json(stream: IO[str], path: str) -> Rows:
    try:
        content = json.load(stream)
    except json.JSONDecodeError as error:
        hint = " If it holds one object a line, name it .jsonl." if "Extra" in error.msg else ""
        raise InputError(f"{path}: not valid JSON: {error}.{hint}") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise InputError(f'{path}: expected a list of objects or {{"data": [...]}}.')
    rows = [_object(row, path, number) for number, row in enumerate(content, start=1)]
    return Rows(path, rows, range(1, len(rows) + 1))


def _object(row: Any, path: str, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(
            f"{path}, row {number}: expected an object with named columns, "
            f"found {type(row).__name__}."
        )
    return row


def _read_csv(stream: IO[str], path: str) -> Rows:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    reader = csv.reader(stream, strict=True)
    rows = list(_csv_rows(reader, path))
    return Rows(path, rows, range(1, len(rows) + 1))


def _csv_rows(reader: Iterator[list[str]], path: str) -> Iterator[dict[str, Any]]:
    number = 0
    header: list[str] | None = None
    try:
        for cells in reader:
            if not cells:
                continue
            if header is None:
                header = cells
                if len(set(header)) != len(header):
                    raise InputError(f"{path}: two columns have the same name: {header}.")
                continue
            number += 1
            if len(cells) != len(header):
                raise InputError(
                    f"{path}, row {number}: {len(cells)} cells, but the header names "
                    f"{len(header)} columns; quote cells that hold commas or line breaks."
                )
            yield dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: not valid CSV: {error}") from error


def _read_parquet(file: Path, path: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from error
    return Rows(path, rows, range(1, len(rows) + 1))


def _load_hub(path: str, key: str) -> Any:
    """A `datasets.Dataset` from the hub or from its local cache."""
    match = _HUB_ID.fullmatch(path)
    if match is None:
        raise InputError(
            f"{key}: {path!r} is neither a local file ({_types()}) nor a hub dataset id "
            "(owner/name, or owner/name:split)."
        )
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    split = match["split"] or "train"
    remedy = "Check the id and the network, or give a local file instead."
    try:
        return datasets.load_dataset(match["id"], split=split)
    except DatasetNotFoundError as error:
        raise InputError(f"{key}: the hub has no dataset {match['id']!r}. {remedy}") from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"{key}: hub dataset {match['id']!r}, split {split!r}, could not be loaded: {error} "
            f"{remedy}"
        ) from error

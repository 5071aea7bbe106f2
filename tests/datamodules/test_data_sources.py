"""Reading rows: every format, and an error that names file and row for every mistake."""

from __future__ import annotations

import csv
import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from datamodules.sources import check_source, is_local, read_rows
from falqon.errors import InputError

ROWS = [
    {"instruction": 'Say "hi", twice', "input": "", "output": "hi\nhi"},
    {"instruction": "Caf\u00e9?", "input": "x", "output": "Oui."},
]


def test_all_formats_give_the_same_rows(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(row) for row in ROWS)  # with a blank line
    (tmp_path / "a.json").write_text(json.dumps(ROWS), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    (tmp_path / "c.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "f.jsonl").write_text(lines, encoding="utf-8-sig")  # byte order mark
    with (tmp_path / "e.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "g.parquet")
    for name in ("a.json", "b.json", "c.jsonl", "d.jsonl.gz", "e.csv", "f.jsonl", "g.parquet"):
        table = read_rows(str(tmp_path / name))
        assert table.rows == ROWS, name
        assert table.where(0).endswith(f"{name}, row 1")


def test_row_numbers_of_json_lines_are_line_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"x": 1}\n\n{"x": 2}\n')
    assert read_rows(str(path)).where(1) == f"{path}, row 3"


def test_a_csv_cell_may_be_large(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("output\n" + "x" * 200_000 + "\n")
    assert len(read_rows(str(path)).rows[0]["output"]) == 200_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', "a.jsonl, row 2: not valid JSON"),
        ("a.jsonl", b'{"x": 1}\n[1]\n', "a.jsonl, row 2: expected an object"),
        ("a.json", b'{"x": 1}\n{"x": 2}', "name it .jsonl"),
        ("a.json", b'[{"x": 1}, 3]', "a.json, row 2: expected an object"),
        ("a.json", b'{"rows": []}', "expected a list of objects"),
        ("a.json", b"[]", "holds no rows"),
        ("a.jsonl", b"\n", "holds no rows"),
        ("a.csv", b"x,y\n", "holds no rows"),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", "a.csv, row 2: 3 cells, but the header names 2"),
        ("a.csv", b'x,y\n1,2\n1,"2\n', "a.csv, row 2: not valid CSV"),
        ("a.csv", b"x,x\n1,2\n", "two columns have the same name"),
        ("a.jsonl", b'{"x": "\xff"}\n', "not UTF-8"),
        ("a.jsonl.gz", b"not gzip", "cannot be read"),
        ("a.parquet", b"not parquet", "not a readable Parquet file"),
        ("a.txt", b"x", "unknown file type"),
    ],
)
def test_an_unusable_file_is_explained(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    "path", ["missing.json", "/no/where/data", "./missing", "a/b/c", "~/missing.csv"]
)
def test_what_looks_local_but_is_missing_is_no_hub_request(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match="val_path: file not found"):
        read_rows(path, "val_path")


def test_a_missing_file_in_a_folder_that_exists_is_local(tmp_path: Path) -> None:
    assert is_local(f"{tmp_path}/missing")


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is a directory; name one file"):
        check_source(str(tmp_path), "train_path")


def test_a_hub_id_with_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_rows("tatsu-lab/alpaca").rows == ROWS
    assert read_rows("OpenAssistant/oasst1:validation").rows == ROWS
    assert asked == [("tatsu-lab/alpaca", "train"), ("OpenAssistant/oasst1", "validation")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("no route"), "train_path: hub dataset 'no/such'.*no route.*local file"),
        (datasets.exceptions.DatasetNotFoundError("x"), "the hub has no dataset 'no/such'"),
        (ValueError('Unknown split "train"'), "split 'train', could not be loaded"),
    ],
)
def test_hub_errors_are_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    start = time.monotonic()
    with pytest.raises(InputError, match=message):
        read_rows("no/such")
    assert time.monotonic() - start < 1


def test_a_name_of_no_valid_form_is_explained() -> None:
    with pytest.raises(InputError, match="neither a local file"):
        read_rows("not a name!")

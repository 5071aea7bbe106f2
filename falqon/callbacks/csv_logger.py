"""Metrics as a CSV file that is complete at any moment.

Lightning's own CSVLogger keeps rows in memory, and empties an existing file. Here every row is on
its way to the disk before training goes on, so a killed run has lost none, and an existing file is
only ever added to.
"""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from falqon.errors import InputError

FILE_NAME = "metrics.csv"
_FIRST = ("step", "epoch")


class MetricsCSV(Logger):
    """Writes `<save_dir>/metrics.csv`: columns step, epoch, then metrics as they first appear.

    Each call of `log_metrics` makes one row; training and validation metrics of one step are two
    rows with the same step, and what a call did not log stays empty. A metric that is new widens
    the header by rewriting the file under another name and renaming it. Numbers are written so
    that reading gives the same double; `nan`, `inf` and `-inf` as such. Only rank zero writes.

    `step` is what Lightning passes: optimizer steps finished before the one that is logged, so the
    first row has step 0.

    A file that exists is continued: `archive_previous_run` is what sets an earlier run aside, and
    `resume_at` what takes a resumed run back to its checkpoint.

    Args:
        save_dir: Directory of the run; made at the first row.
    """

    def __init__(self, save_dir: str | Path) -> None:
        super().__init__()
        self._save_dir = os.fspath(save_dir)
        self._columns: list[str] | None = None  # None until the file has been looked at
        self._last: dict[str, str] | None = None

    @property
    def name(self) -> str:
        """Empty: the file lies in `save_dir` itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty: the file lies in `save_dir` itself."""
        return ""

    @property
    def save_dir(self) -> str:
        """Directory of the run."""
        return self._save_dir

    @property
    def root_dir(self) -> str:
        """Directory of the run."""
        return self._save_dir

    @property
    def log_dir(self) -> str:
        """Directory of the run."""
        return self._save_dir

    @property
    def path(self) -> Path:
        """The CSV file."""
        return Path(self._save_dir) / FILE_NAME

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the run's settings are in its config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row, unless it is the one that was just written: whoever needs a row on the
        disk early may log it before Lightning does.

        Args:
            metrics: Numbers, or tensors of one element, by name.
            step: Step of the row, empty if None.

        Raises:
            InputError: The file cannot be written, or is not a metrics file.
        """
        row = {name: _text(value) for name, value in metrics.items()}
        row["step"] = "" if step is None else str(int(step))
        if row == self._last:
            return
        with _named(self.path):
            columns = self._open()
            new = [name for name in row if name not in columns]
            if new:
                columns = columns + new
                _replace(self.path, columns, _read(self.path)[1])
                self._columns = columns
            _append(self.path, _line([row.get(name, "") for name in columns]))
        self._last = row

    @rank_zero_only
    def resume_at(self, step: int) -> None:
        """Continue an earlier file from a checkpoint: drop the rows that will be logged again.

        Args:
            step: The checkpoint's `global_step`: so many optimizer steps are done, and the next
                row has this step. Rows of this step and later are dropped, all others kept.

        Raises:
            InputError: The file cannot be written, or is not a metrics file.
        """
        self._last = None
        with _named(self.path):
            if not self.path.is_file():
                return
            self._columns, rows = _read(self.path)
            kept = [row for row in rows if not row["step"] or int(row["step"]) < step]
            _replace(self.path, self._columns, kept)

    def _open(self) -> list[str]:
        """Columns of the file, which exists, ends with a whole row, and can be appended to."""
        if self._columns is None or not self.path.is_file():
            if self.path.is_file():
                columns, rows = _read(self.path)
                if not self.path.read_bytes().endswith(b"\n"):  # killed while a row was written
                    _replace(self.path, columns, rows)
            else:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                columns = list(_FIRST)
                _replace(self.path, columns, [])
            self._columns = columns
        return self._columns


def _text(value: Any) -> str:
    if hasattr(value, "item"):  # a tensor or a numpy scalar
        value = value.item()
    return repr(value) if isinstance(value, float) else str(value)


def _line(fields: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(fields)
    return text.getvalue().encode()


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows; a last row without its line end is not there yet, and is left out."""
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(io.StringIO(text[: text.rfind("\n") + 1], newline="")))
    columns = lines[0] if lines else list(_FIRST)
    if tuple(columns[:2]) != _FIRST:
        raise InputError(
            f"{path} is not a metrics file of falqon: its columns begin with {columns[:2]}, not "
            f"{list(_FIRST)}. Move it away or set another run directory."
        )
    try:
        rows = [dict(zip(columns, line, strict=True)) for line in lines[1:]]
        for row in rows:
            int(row["step"] or 0)
    except ValueError as error:
        raise InputError(
            f"{path} is damaged: a row does not fit its columns ({error}). Repair or move it away."
        ) from error
    return columns, rows


def _append(path: Path, line: bytes) -> None:
    # Unbuffered: the row is the system's before training goes on, whatever becomes of the process.
    with open(path, "ab", buffering=0) as file:
        whole = file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            file.truncate(whole)  # half a row would garble the next one
            raise


def _replace(path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
    """Write the whole file under another name, then rename it: a reader sees old or new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    lines = [_line(columns), *(_line([row.get(name, "") for name in columns]) for row in rows)]
    try:
        with open(temporary, "wb") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Free space or set another run directory; the rows written so far are intact."
        ) from error

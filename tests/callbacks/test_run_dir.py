"""A run's directory: earlier runs are set aside whole, and nothing else is touched."""

from __future__ import annotations

from pathlib import Path

import pytest

from falqon.callbacks import archive_previous_run
from falqon.errors import InputError

FILES = [
    "checkpoints/last.ckpt",
    "config.yaml",
    "metrics.csv",
    "predictions.jsonl",
    "summary.json",
]


def make_run(root: Path, mark: str) -> None:
    (root / "checkpoints").mkdir(parents=True)
    (root / "wandb" / "offline-run-1").mkdir(parents=True)
    for name in FILES:
        (root / name).write_text(mark)


def files(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): path.read_text() for path in root.rglob("*") if path.is_file()
    }


def test_a_new_or_empty_directory_has_nothing_to_move(tmp_path: Path) -> None:
    assert archive_previous_run(tmp_path / "new") is None
    assert archive_previous_run(tmp_path) is None
    assert list(tmp_path.iterdir()) == []


def test_runs_are_numbered_and_kept_whole(tmp_path: Path) -> None:
    for number, mark in enumerate(("first", "second", "third"), start=1):
        make_run(tmp_path, mark)
        target = archive_previous_run(str(tmp_path))
        assert target == tmp_path / "previous" / str(number)
        assert sorted(files(target)) == FILES
        assert set(files(target).values()) == {mark}
        assert (target / "wandb" / "offline-run-1").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["previous"]
    assert set(files(tmp_path / "previous" / "1").values()) == {"first"}


def test_what_is_not_of_a_run_stays(tmp_path: Path) -> None:
    make_run(tmp_path, "run")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "plot.png").write_text("mine")
    (tmp_path / "export").mkdir()
    (tmp_path / "previous" / "best of all").mkdir(parents=True)
    target = archive_previous_run(tmp_path)
    assert target == tmp_path / "previous" / "1"
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["export", "notes.txt", "plot.png", "previous"]


def test_numbers_count_on_from_the_largest(tmp_path: Path) -> None:
    (tmp_path / "previous" / "9").mkdir(parents=True)
    (tmp_path / "metrics.csv").write_text("")
    assert archive_previous_run(tmp_path) == tmp_path / "previous" / "10"


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        archive_previous_run(tmp_path / "file")
    (tmp_path / "metrics.csv").write_text("kept")
    (tmp_path / "previous").write_text("")
    with pytest.raises(InputError, match=r"cannot be moved to .*previous"):
        archive_previous_run(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == "kept"

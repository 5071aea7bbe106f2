"""The questions that ship with the project: whole, distinct, balanced, and installed with it."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

from falqon.evaluation.mini import DIRECTORY, read

ROOT = Path(__file__).parents[2]


def test_questions() -> None:
    test, dev = read("test"), read("dev")
    assert len(test) >= 60
    assert len(dev) == 5
    for row in [*test, *dev]:
        assert set(row) == {"question", "subject", "choices", "answer"}
        assert len(row["choices"]) == 4
        assert len({choice.strip().lower() for choice in row["choices"]}) == 4
        assert row["answer"] in range(4)
        assert row["question"].strip().endswith(("?", "."))
        assert all(text.isascii() for text in (row["question"], *row["choices"]))
    questions = [row["question"].strip().lower() for row in [*test, *dev]]
    assert len(set(questions)) == len(questions)
    letters = Counter(row["answer"] for row in test)
    assert max(letters.values()) - min(letters.values()) <= 1
    subjects = Counter(row["subject"] for row in test)
    assert len(subjects) >= 6
    assert min(subjects.values()) >= 5
    assert {row["subject"] for row in dev} <= subjects.keys()


def test_the_right_answer_cannot_be_told_by_its_length() -> None:
    longest = [
        max(range(4), key=lambda i: len(row["choices"][i])) == row["answer"] for row in read("test")
    ]
    assert sum(longest) / len(longest) < 0.5


def test_the_files_are_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["falqon"]
    installed = {file for pattern in patterns for file in (ROOT / "falqon").glob(pattern)}
    assert {file for file in DIRECTORY.iterdir() if file.is_file()} <= installed

"""The task that ships with the project: general knowledge with four choices, for any machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DIRECTORY = Path(__file__).parent / "data"
NAME = "falqon_mini"


def read(split: str) -> list[dict[str, Any]]:
    """The questions of a split, `test` or `dev`, as MMLU has them.

    Returns:
        `question`, `subject`, `choices` (four) and `answer` (index of the right one) of each.
    """
    text = (DIRECTORY / f"{NAME}_{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def load(**_: Any) -> dict[str, Any]:
    """The task's datasets by split, as lm-eval asks for them (`custom_dataset`)."""
    from datasets import Dataset

    return {split: Dataset.from_list(read(split)) for split in ("test", "dev")}

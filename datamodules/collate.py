"""From rows to batches of tensors.

Shapes: b rows, s tokens of the longest row, rounded up to a multiple. All tensors are int64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from datamodules.encoding import Document

IGNORE_INDEX = -100
"""Label of tokens that are not supervised."""


class PromptRow(NamedTuple):
    """One prompt to generate from.

    Attributes:
        row: Index of the row in the validation set.
        tokens: Token ids of the prompt, [n] int32.
        question: The prompt as a reader would read it.
        reference: The response of the dataset.
    """

    row: int
    tokens: npt.NDArray[np.int32]
    question: str
    reference: str


@dataclass(frozen=True)
class PadCollator:
    """One example a row, padded on the right.

    Attributes:
        pad_id: Token id put after the end of a row.
        multiple: The padded length is a multiple of this.
    """

    pad_id: int
    multiple: int

    def __call__(self, rows: Sequence[Sequence[Document]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            rows: b rows of one document each.

        Returns:
            input_ids, labels (not shifted, -100 where not supervised) and attention_mask,
            each [b, s].
        """
        width = _round_up(max(len(row[0][0]) for row in rows), self.multiple)
        batch = _blank(len(rows), width, self.pad_id)
        attention = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            tokens, supervised = row[0]
            n = len(tokens)
            batch["input_ids"][i, :n] = tokens
            batch["labels"][i, :n] = np.where(supervised, tokens, IGNORE_INDEX)
            attention[i, :n] = 1
        return _tensors({**batch, "attention_mask": attention})


@dataclass(frozen=True)
class PackCollator:
    """Several examples a row, told apart by position_ids that restart at 0.

    There is no attention_mask: without one, transformers builds a causal mask, block-diagonal
    over the documents from position_ids, as long as no cache is used (`use_cache=False`) and the
    attention is sdpa, eager or flex. Its flash attention looks at position_ids only in batches of
    one row. The padding at the end of a row is a document of its own.

    Attributes:
        pad_id: Token id put after the end of a row.
        multiple: The padded length is a multiple of this.
    """

    pad_id: int
    multiple: int

    def __call__(self, rows: Sequence[Sequence[Document]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            rows: b rows of documents.

        Returns:
            input_ids, labels (not shifted, -100 where not supervised and on the first token of
            each document) and position_ids, each [b, s].
        """
        longest = max(sum(len(tokens) for tokens, _ in row) for row in rows)
        width = _round_up(longest, self.multiple)
        batch = _blank(len(rows), width, self.pad_id)
        positions = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            start = 0
            for tokens, supervised in row:
                part = slice(start, start + len(tokens))
                batch["input_ids"][i, part] = tokens
                batch["labels"][i, part] = np.where(supervised, tokens, IGNORE_INDEX)
                batch["labels"][i, start] = IGNORE_INDEX
                positions[i, part] = np.arange(len(tokens))
                start = part.stop
            positions[i, start:] = np.arange(width - start)
        return _tensors({**batch, "position_ids": positions})


@dataclass(frozen=True)
class PromptCollator:
    """Prompts without response, padded on the left so that generation starts at the same column.

    Attributes:
        pad_id: Token id put before the start of a row.
        multiple: The padded length is a multiple of this.
    """

    pad_id: int
    multiple: int

    def __call__(self, rows: Sequence[PromptRow]) -> dict[str, Any]:
        """Makes a batch.

        Args:
            rows: b prompts.

        Returns:
            input_ids and attention_mask, each [b, s]; prompt_text and reference, lists of b
            strings; row, a list of b row indices.
        """
        width = _round_up(max(len(row.tokens) for row in rows), self.multiple)
        ids = np.full((len(rows), width), self.pad_id, dtype=np.int64)
        attention = np.zeros((len(rows), width), dtype=np.int64)
        for i, row in enumerate(rows):
            ids[i, width - len(row.tokens) :] = row.tokens
            attention[i, width - len(row.tokens) :] = 1
        return {
            **_tensors({"input_ids": ids, "attention_mask": attention}),
            "prompt_text": [row.question for row in rows],
            "reference": [row.reference for row in rows],
            "row": [row.row for row in rows],
        }


def _round_up(length: int, multiple: int) -> int:
    return math.ceil(length / multiple) * multiple


def _blank(rows: int, width: int, pad_id: int) -> dict[str, npt.NDArray[np.int64]]:
    return {
        "input_ids": np.full((rows, width), pad_id, dtype=np.int64),
        "labels": np.full((rows, width), IGNORE_INDEX, dtype=np.int64),
    }


def _tensors(arrays: dict[str, npt.NDArray[np.int64]]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}

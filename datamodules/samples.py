"""Training examples as text, with what is learned marked."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from datamodules.encoding import Document

OPEN, CLOSE = ">>>", "<<<"
"""Marks around supervised text."""


def marked_sample(tokenizer: Any, document: Document, title: str) -> str:
    """Decodes the tokens of an example, special tokens included.

    Args:
        tokenizer: The tokenizer the example was made with.
        document: Token ids and mask of the example.
        title: What to call it in the first line.

    Returns:
        A line with the counts, then the text, with supervised stretches between `>>>` and `<<<`.
    """
    tokens, supervised = document
    parts: list[str] = []
    for learned, group in groupby(zip(tokens.tolist(), supervised.tolist(), strict=True), _flag):
        text = tokenizer.decode([token for token, _ in group], skip_special_tokens=False)
        parts.append(f"{OPEN}{text}{CLOSE}" if learned else text)
    return (
        f"--- {title}: {len(tokens)} tokens, {int(supervised.sum())} supervised "
        f"(between {OPEN} and {CLOSE})\n{''.join(parts)}\n---"
    )


def _flag(pair: tuple[int, bool]) -> bool:
    return pair[1]

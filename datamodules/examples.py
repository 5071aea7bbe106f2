"""One training example, whatever dataset it comes from, and the split into train and validation."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from falqon.errors import InputError


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation that alternates between user and assistant and ends with the assistant.

    Attributes:
        turns: User, assistant, user, assistant, ...: an even number of texts, at least two.
        context: Input that goes with the first user turn (Alpaca's `input` column), or "".
        where: Where the example was read, for error messages.
    """

    turns: tuple[str, ...]
    context: str = ""
    where: str = ""

    @property
    def key(self) -> str:
        """What must not be in both splits: the first prompt. One key is one tree in OASST1."""
        return f"{self.turns[0].strip()}\0{self.context.strip()}"


def split_examples(
    examples: Sequence[Example], val_fraction: float, seed: int, source: str
) -> tuple[list[Example], list[Example]]:
    """Splits examples into train and validation, the same way on every machine and rank.

    Examples with the same first prompt stay together. Groups are ordered by a hash of the seed and
    that prompt, and the first of them are the validation set, so the split depends neither on the
    order of the rows nor on a random generator.

    Args:
        examples: All examples.
        val_fraction: Share of examples for validation, 0 <= val_fraction < 1.
        seed: Chooses the split.
        source: File or hub id, for the error message.

    Returns:
        Train and validation examples, each in the order given. Both hold at least one example,
        unless val_fraction is 0: then validation is empty.

    Raises:
        InputError: If all examples share one prompt, so that no split is possible.
    """
    if val_fraction == 0:
        return list(examples), []
    groups: dict[str, int] = defaultdict(int)
    for example in examples:
        groups[example.key] += 1
    if len(groups) < 2:
        raise InputError(
            f"{source}: {len(examples)} example(s) with one and the same prompt cannot be split "
            "into train and validation; give val_path, or val_fraction: 0 to go without."
        )
    ordered = sorted(groups, key=lambda key: (_digest(seed, key), key))
    wanted = round(val_fraction * len(examples))
    held_out: set[str] = set()
    count = 0
    for key in ordered[:-1]:
        if held_out and count + groups[key] > wanted:
            break
        held_out.add(key)
        count += groups[key]
    train = [example for example in examples if example.key not in held_out]
    val = [example for example in examples if example.key in held_out]
    return train, val


def _digest(seed: int, key: str) -> bytes:
    return hashlib.blake2b(
        f"{seed}\0{key}".encode("utf-8", "surrogatepass"), digest_size=16
    ).digest()

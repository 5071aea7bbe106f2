"""From text to token ids, a mask of supervised tokens, and a fixed maximum length.

Shapes: n tokens of one example; [total] are all tokens of a split, one example after another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from datamodules.examples import Example
from datamodules.prompts import PromptStyle, Rendered
from falqon.errors import InputError
from falqon.prompts import adds_bos

Document: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]
"""Token ids [n] int32 and which of them are supervised [n] bool."""

Offsets: TypeAlias = Sequence[tuple[int, int]]
"""First character of each token and the one after its last."""

TokensAndEnds: TypeAlias = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]
"""Token ids [n] int32 and where in the text each token ends [n] int64."""

_CHUNK = 1024  # examples tokenised at once: enough for the tokenizer's threads, little memory
_PROMPT_SHARE = 4  # a response never pushes more than 3/4 of the room away from its prompt


@dataclass(frozen=True)
class TokenRows:
    """Token ids of all examples of a split, in three arrays.

    Attributes:
        tokens: Token ids, [total] int32.
        supervised: Whether a token is learned, [total] bool; False for each first token.
        offsets: Where examples start and end, [examples + 1] int64.
    """

    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]

    @classmethod
    def from_documents(cls, documents: Sequence[Document]) -> TokenRows:
        """Joins examples."""
        lengths = [len(tokens) for tokens, _ in documents]
        empty: Document = (np.zeros(0, np.int32), np.zeros(0, np.bool_))
        parts = [*documents, empty]
        return cls(
            tokens=np.concatenate([tokens for tokens, _ in parts]).astype(np.int32),
            supervised=np.concatenate([supervised for _, supervised in parts]).astype(np.bool_),
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Document:
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.supervised[part]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of every example, [examples] int64."""
        return np.diff(self.offsets)

    def digest(self) -> str:
        """Hash of the token ids, the mask and the boundaries, as hexadecimal digits."""
        state = hashlib.sha256()
        for array, kind in ((self.tokens, "<i4"), (self.supervised, "|b1"), (self.offsets, "<i8")):
            state.update(np.ascontiguousarray(array, dtype=kind).tobytes())
        return state.hexdigest()


@dataclass(frozen=True)
class EncodingCounts:
    """What became of the examples of a split.

    Attributes:
        rows: Examples encoded.
        skipped_blank: Examples left out because a response is blank.
        skipped_unsupervised: Examples left out because no supervised token was left.
        truncated: Encoded examples that were cut to the maximum length.
        tokens: Tokens of the encoded examples.
        supervised_tokens: Those of them that are learned.
    """

    rows: int
    skipped_blank: int
    skipped_unsupervised: int
    truncated: int
    tokens: int
    supervised_tokens: int

    @property
    def skipped(self) -> int:
        """Examples left out, for whatever reason."""
        return self.skipped_blank + self.skipped_unsupervised

    def __str__(self) -> str:
        return (
            f"{self.rows} examples, {self.tokens} tokens, {self.supervised_tokens} of them "
            f"supervised; {self.truncated} truncated; skipped: {self.skipped_blank} with a blank "
            f"response, {self.skipped_unsupervised} with nothing supervised"
        )


@dataclass(frozen=True)
class Encoded:
    """A split as tokens.

    Attributes:
        rows: Token ids and masks.
        kept: For every row, the index of its example.
        counts: What became of the examples.
    """

    rows: TokenRows
    kept: list[int]
    counts: EncodingCounts


def truncate(
    tokens: npt.NDArray[np.int32],
    supervised: npt.NDArray[np.bool_],
    max_length: int,
    head: int,
    bos: int,
) -> Document:
    """Cuts an example to max_length tokens so that the response stays.

    The first response comes first: the prompt before it shrinks to make room, but not below a
    quarter of max_length. It loses the tokens between its head (BOS, system prompt, header of the
    first user turn) and its end, so the words nearest to the response stay; a head above half of
    what is left of the prompt is cut down to the BOS. What then still does not fit is cut off at
    the end, end-of-turn token included; trailing tokens that are not supervised go with it.

    Args:
        tokens: Token ids, [n] int32.
        supervised: Mask, [n] bool, with at least one True.
        max_length: Room, at least 1.
        head: Number of tokens before the first user's words.
        bos: Number of BOS tokens in front, 0 or 1.

    Returns:
        At most max_length token ids and their mask; unchanged if they fit.
    """
    if len(tokens) <= max_length:
        return tokens, supervised
    prompt = int(np.argmax(supervised))
    response = int(np.argmin(np.append(supervised[prompt:], False)))
    kept = min(prompt, max(max_length - response, min(prompt, max_length // _PROMPT_SHARE)))
    front = _head_within(kept, head, bos)
    index = np.concatenate(
        [
            np.arange(front if kept < prompt else 0),
            np.arange(prompt - kept + front if kept < prompt else 0, prompt),
            np.arange(prompt, min(len(tokens), prompt + max_length - kept)),
        ]
    )
    mask = supervised[index]
    last = int(np.flatnonzero(mask)[-1]) + 1
    return tokens[index[:last]], mask[:last]


def _head_within(room: int, head: int, bos: int) -> int:
    return head if head <= room // 2 else min(bos, room)


class Encoder:
    """Tokenises rendered examples.

    Args:
        tokenizer: A fast Hugging Face tokenizer.
        style: Prompt style.
        max_length: Maximum number of tokens of an example.

    Raises:
        InputError: If the tokenizer is not a fast one.
    """

    def __init__(self, tokenizer: Any, style: PromptStyle, max_length: int) -> None:
        if not tokenizer.is_fast:
            raise InputError(
                f"tokenizer_name: {tokenizer.name_or_path!r} gives no character offsets, which are "
                "needed to mark the responses; use a fast tokenizer (one with a tokenizer.json)."
            )
        self.tokenizer = tokenizer
        self.style = style
        self.max_length = max_length
        self.bos = [tokenizer.bos_token_id] if style.adds_bos and adds_bos(tokenizer) else []

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Tokenises, masks and truncates examples.

        Args:
            examples: Examples of a split.

        Returns:
            The tokens, which examples they belong to, and the counts. May be empty.
        """
        documents: list[Document] = []
        kept: list[int] = []
        unsupervised = truncated = 0
        numbered = ((i, e) for i, e in enumerate(examples) if all(map(str.strip, e.turns[1::2])))
        rendered_total = 0
        for chunk in iter(lambda: list(islice(numbered, _CHUNK)), []):
            rendered = [self.style.render(example) for _, example in chunk]
            rendered_total += len(rendered)
            results = self._documents(rendered)
            for (index, _), (document, cut) in zip(chunk, results, strict=True):
                if document is None:
                    unsupervised += 1
                    continue
                truncated += cut
                kept.append(index)
                documents.append(document)
        rows = TokenRows.from_documents(documents)
        counts = EncodingCounts(
            rows=len(rows),
            skipped_blank=len(examples) - rendered_total,
            skipped_unsupervised=unsupervised,
            truncated=truncated,
            tokens=len(rows.tokens),
            supervised_tokens=int(rows.supervised.sum()),
        )
        return Encoded(rows, kept, counts)

    def encode_prompts(self, rendered: Sequence[Rendered]) -> list[npt.NDArray[np.int32]]:
        """Tokenises prompts, without responses, to generate from.

        Args:
            rendered: Rendered examples.

        Returns:
            Token ids of each prompt, [n] int32. A prompt above the maximum length loses the tokens
            after its head, as in `truncate`.
        """
        prompts: list[npt.NDArray[np.int32]] = []
        texts = [item.prompt for item in rendered]
        # Earlier responses in a prompt have the tokens that they have in training.
        cuts = [
            [start for start, _ in item.spans[:-1]] if item.text.startswith(item.prompt) else []
            for item in rendered
        ]
        for item, (tokens, ends) in zip(rendered, self._tokenize(texts, cuts), strict=True):
            if len(tokens) > self.max_length:
                head = _head_tokens(ends, item)
                front = _head_within(self.max_length, head, self._bos_count(tokens))
                tail = self.max_length - front
                tokens = np.concatenate([tokens[:front], tokens[len(tokens) - tail :]])
            prompts.append(tokens)
        return prompts

    def _documents(self, rendered: Sequence[Rendered]) -> Iterator[tuple[Document | None, bool]]:
        """A document for each text, None if nothing in it is supervised; whether it was cut."""
        texts = [item.text for item in rendered]
        cuts = [[start for start, _ in item.spans] for item in rendered]
        for item, (tokens, ends) in zip(rendered, self._tokenize(texts, cuts), strict=True):
            supervised = _mask(ends, item.spans)
            supervised[:1] = False  # nothing comes before the first token to predict it from
            if not supervised.any():
                yield None, False
                continue
            head, bos = _head_tokens(ends, item), self._bos_count(tokens)
            short, mask = truncate(tokens, supervised, self.max_length, head, bos)
            mask = mask.copy()
            mask[:1] = False
            yield (short, mask) if mask.any() else None, len(short) < len(tokens)

    def _tokenize(
        self, texts: Sequence[str], cuts: Sequence[Sequence[int]]
    ) -> Iterator[TokensAndEnds]:
        """Token ids with BOS and the character at which each token ends.

        A text is tokenised in one piece, unless a token would reach across one of its cuts (as a
        line break that ends a prompt and white space that starts a response may): then the prompt
        would have other tokens than it has when the model generates, so the pieces between the cuts
        are tokenised alone.
        """
        for text, places, (ids, offsets) in zip(texts, cuts, self._call(texts), strict=True):
            ends = _ends(offsets)
            if any(_reaches_across(place, offsets, ends) for place in places):
                bounds = [0, *places, len(text)]
                pieces = self._call([text[a:b] for a, b in pairwise(bounds)])
                ids = [token for part, _ in pieces for token in part]
                parts = [_ends(part) + a for (_, part), a in zip(pieces, bounds, strict=False)]
                ends = np.concatenate(parts)
            tokens = np.array(self.bos + ids, dtype=np.int32)
            yield tokens, np.concatenate([np.zeros(len(self.bos), np.int64), ends])

    def _call(self, texts: Sequence[str]) -> list[tuple[list[int], Offsets]]:
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(zip(encoded["input_ids"], encoded["offset_mapping"], strict=True))

    def _bos_count(self, tokens: npt.NDArray[np.int32]) -> int:
        """1 if the first token is a BOS, also one written by a chat template.

        A "BOS" that comes again heads a turn (ChatML's `<|im_start|>`), not worth keeping.
        """
        found = tokens == self.tokenizer.bos_token_id
        return int(bool(found[:1].any()) and int(found.sum()) == 1)


def _head_tokens(ends: npt.NDArray[np.int64], item: Rendered) -> int:
    return int(np.searchsorted(ends, item.head, side="right"))


def _ends(offsets: Offsets) -> npt.NDArray[np.int64]:
    ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
    return np.maximum.accumulate(ends)


def _reaches_across(place: int, offsets: Offsets, ends: npt.NDArray[np.int64]) -> bool:
    first = int(np.searchsorted(ends, place, side="right"))
    return first < len(offsets) and offsets[first][0] < place


def _mask(ends: npt.NDArray[np.int64], spans: Iterable[tuple[int, int]]) -> npt.NDArray[np.bool_]:
    """Tokens that end within a span; only ends are used, since starts may leave out white space."""
    mask = np.zeros(len(ends), dtype=np.bool_)
    for start, stop in spans:
        first, last = np.searchsorted(ends, [start, stop], side="right")
        mask[first:last] = True
    return mask

"""Perplexity of a model on a text file.

Shapes: n tokens of a document t_0 .. t_{n-1}, W window, S stride.

Every token but a document's first is predicted exactly once, from at most W - 1 tokens before it.
The first window is t_0 .. t_{W-1} and predicts all but its first; every later one ends S tokens
further on, is W tokens long, and predicts its last S: each from at least W - S tokens. With a BOS
in front, t_0 is the BOS, so every token of the text is predicted.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from falqon.errors import InputError
from falqon.evaluation.harness import with_bos
from falqon.generation.answers import evaluating

_CHUNK = 512  # positions whose logits are in float32 at a time
_LONGEST = 2048  # default window of models that could take more


@dataclass(frozen=True)
class TextFile:
    """A file to measure perplexity on.

    Attributes:
        path: It.
        documents: Its texts.
        sha256: Of its bytes.
    """

    path: str
    documents: tuple[str, ...]
    sha256: str

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all documents."""
        return sum(len(text.encode()) for text in self.documents)


class Window(NamedTuple):
    """Tokens to run through the model.

    Attributes:
        tokens: Their ids.
        predicted: How many at the end are predicted.
    """

    tokens: tuple[int, ...]
    predicted: int


def read_text(path: str | Path, column: str = "text") -> TextFile:
    """Read a file: a .jsonl has one document a line, any other file is one document.

    Args:
        path: The file, UTF-8.
        column: Key of the text in a line of JSON.

    Raises:
        InputError: It cannot be read, a line has no such text, or there is no text in it.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise InputError(f"text file {path} cannot be read: {reason}. Check it.") from error
    documents = [text]
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)
        documents = [_text(line, column, f"{path}, line {n}") for n, line in lines if line.strip()]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise InputError(f"text file {path} has no text in it.")
    return TextFile(str(path), tuple(documents), hashlib.sha256(data).hexdigest())


def _text(line: str, column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where}: not JSON ({error}). Write one object a line.") from error
    if not isinstance(row, dict) or not isinstance(row.get(column), str):
        there = f"; it has {', '.join(map(repr, row))}" if isinstance(row, dict) else ""
        raise InputError(f"{where}: no text in {column!r}{there}. Name another --text-column.")
    return str(row[column])


def windows(tokens: Sequence[int], window: int, stride: int) -> list[Window]:
    """Cut a document into windows; see the module's text.

    Args:
        tokens: n token ids.
        window: W, at least 2.
        stride: S, at least 1 and below W.
    """
    first = tokens[:window]
    found = [Window(tuple(first), len(first) - 1)] if len(first) > 1 else []
    done = window
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        found.append(Window(tuple(tokens[max(0, end - window) : end]), end - done))
        done = end
    return found


def choose_windows(limit: int | None, window: int | None, stride: int | None) -> tuple[int, int]:
    """Window and stride for a model: its longest context up to 2,048 tokens, and half of it.

    Args:
        limit: Longest context of the model; None if it is not known.
        window, stride: What was asked for, None for the default.

    Raises:
        InputError: They do not fit each other or the model.
    """
    limit = limit or _LONGEST
    chosen = min(limit, _LONGEST) if window is None else window
    if not 2 <= chosen <= limit:
        raise InputError(f"window is {chosen}; this model takes 2 to {limit} tokens.")
    step = max(1, chosen // 2) if stride is None else stride
    if not 1 <= step < chosen:
        raise InputError(f"stride is {step}; it must be at least 1 and below the window, {chosen}.")
    return chosen, step


@torch.inference_mode()
def measure_perplexity(
    model: PreTrainedModel,
    tokenizer: Any,
    text: TextFile,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    add_bos: bool | None = None,
) -> dict[str, Any]:
    """Measure a model's perplexity on a file.

    Batches hold windows of equal shape, without padding.

    Args:
        model: On the device where it is to run.
        tokenizer: The model's.
        text: The file.
        window: W; the model's longest context up to 2,048 if None.
        stride: S; half of the window if None.
        batch_size: Windows at once.
        add_bos: Put a BOS in front of every document; None for what the tokenizer does.

    Returns:
        Plain values: `loss` (nats a token), `perplexity`, `bits_per_byte` (of the UTF-8 text, which
        models with different tokenizers can be compared by), `tokens` (that were predicted),
        `bytes`, `documents`, `window`, `stride`, `add_bos` and `sha256` of the file.

    Raises:
        InputError: The window does not fit, or no token is predicted.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    window, stride = choose_windows(limit, window, stride)
    tokenizer, bos = with_bos(tokenizer, add_bos)
    groups: dict[tuple[int, int], list[Window]] = defaultdict(list)
    for document in text.documents:
        ids = tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
        for part in windows([tokenizer.bos_token_id] * bos + ids, window, stride):
            groups[len(part.tokens), part.predicted].append(part)
    count = sum(predicted * len(parts) for (_, predicted), parts in groups.items())
    if not count:
        raise InputError(f"{text.path}: no document has two tokens, so nothing is predicted.")
    total = 0.0
    with evaluating(model):
        for (_, predicted), parts in groups.items():
            for start in range(0, len(parts), batch_size):
                batch = torch.tensor([part.tokens for part in parts[start : start + batch_size]])
                total += float(summed_loss(model, batch.to(model.device), predicted))
    loss = total / count
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": total / math.log(2) / text.bytes,
        "tokens": count,
        "bytes": text.bytes,
        "documents": len(text.documents),
        "window": window,
        "stride": stride,
        "add_bos": bos,
        "sha256": text.sha256,
    }


def summed_loss(model: PreTrainedModel, tokens: Tensor, predicted: int) -> Tensor:
    """Summed cross entropy of the last tokens of some windows, in float32, added up in float64.

    Args:
        model: A causal LM.
        tokens: int64 [b, s].
        predicted: How many at the end of each row are predicted, at most s - 1.
    """

    def select(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0][:, -predicted - 1 : -1], *args[1:])

    head: Any = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(select)  # logits of nothing else: they are large
    try:
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    pairs = zip(
        logits.flatten(0, 1).split(_CHUNK),
        tokens[:, -predicted:].flatten().split(_CHUNK),
        strict=True,
    )
    losses = [functional.cross_entropy(p.float(), t, reduction="sum").double() for p, t in pairs]
    return torch.stack(losses).sum()

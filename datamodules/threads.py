"""OpenAssistant conversations (OASST1) in any of their published shapes, as threads."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from datamodules.cells import flag_cell, rank_cell, require_columns, text_cell
from datamodules.examples import Example
from datamodules.sources import Rows
from falqon.errors import InputError
from falqon.prompts import ASSISTANT, HUMAN

_EXPORTED = "ready_for_export"
_ROLES = {"prompter": "user", "user": "user", "assistant": "assistant"}
_HEADER = re.compile(rf"{re.escape(HUMAN)}|{re.escape(ASSISTANT)}")


@dataclass(frozen=True)
class ThreadOptions:
    """Which messages become threads.

    Attributes:
        threads: `best`: one thread a tree, following the best-ranked reply; `all`: every path from
            the root to a last assistant reply.
        lang: Language code that every message must have, as `en`; None takes all.
        include_synthetic: Whether messages written by a model are taken.
    """

    threads: Literal["best", "all"] = "best"
    lang: str | None = None
    include_synthetic: bool = False


@dataclass(slots=True)
class _Message:
    identity: str
    role: str
    text: str
    rank: float
    usable: bool
    where: str
    replies: list[_Message] = field(default_factory=list)


def read_threads(table: Rows, options: ThreadOptions) -> list[Example]:
    """Turns rows into conversations.

    The shape is taken from the first row: tree files (`prompt` with nested `replies`), message
    rows (`message_id`, `parent_id`, `role`, `text`, ...), or the `text` column of
    openassistant-guanaco. Trees that are not ready for export are left out; so are messages that
    are deleted, rejected in review, synthetic, empty or of another language, with all replies to
    them.

    Args:
        table: Rows of one source.
        options: Which messages become threads.

    Returns:
        Conversations that start with the user, alternate, and end with the assistant, in the order
        of the source.

    Raises:
        InputError: If the shape is unknown, a cell is unusable, or no thread is left.
    """
    first = table.rows[0]
    if isinstance(first.get("prompt"), dict):
        examples = _from_roots(_tree_roots(table, options), options)
    elif "message_id" in first and "role" in first:
        examples = _from_roots(_message_roots(table, options), options)
    elif isinstance(first.get("text"), str) and HUMAN in first["text"]:
        examples = _from_guanaco(table, options)
    else:
        raise InputError(
            f"{table.where(0)}: not an OASST1 shape that is known; columns: {', '.join(first)}. "
            "Accepted: tree files ({message_tree_id, tree_state, prompt: {text, role, replies}}), "
            "message rows (message_id, parent_id, text, role, ...), or openassistant-guanaco "
            f"(a text column of {HUMAN!r} and {ASSISTANT!r} turns)."
        )
    if not examples:
        raise InputError(
            f"{table.source}: none of the {len(table.rows)} rows gives a thread with an answer. "
            f"Check tree_state, lang ({options.lang!r}) and include_synthetic "
            f"({options.include_synthetic})."
        )
    return examples


def _tree_roots(table: Rows, options: ThreadOptions) -> Iterator[_Message]:
    for index, row in enumerate(table.rows):
        where = table.where(index)
        require_columns(row, ("prompt",), where)
        if row.get("tree_state", _EXPORTED) != _EXPORTED:
            continue
        root: _Message | None = None
        pending: list[tuple[Any, _Message | None]] = [(row["prompt"], None)]
        while pending:
            node, parent = pending.pop()
            if not isinstance(node, dict):
                raise InputError(
                    f"{where}: a message is of type {type(node).__name__}, not an object."
                )
            message = _message(node, where, options)
            if parent is None:
                root = message
            else:
                parent.replies.append(message)
            replies = node.get("replies") or []
            if not isinstance(replies, list):
                raise InputError(f"{where}: 'replies' is no list.")
            pending.extend((reply, message) for reply in reversed(replies))
        assert root is not None
        yield root


def _message_roots(table: Rows, options: ThreadOptions) -> Iterator[_Message]:
    messages: dict[str, _Message] = {}
    children: dict[str, list[_Message]] = defaultdict(list)
    roots: list[_Message] = []
    for index, row in enumerate(table.rows):
        where = table.where(index)
        identity = text_cell(row, "message_id", where)
        require_columns(row, ("parent_id",), where)
        if identity in messages:
            raise InputError(f"{where}: message_id {identity!r} occurs a second time.")
        message = _message(row, where, options)
        if row.get("tree_state", _EXPORTED) != _EXPORTED:
            message.usable = False
        messages[identity] = message
        if row["parent_id"] in (None, ""):
            roots.append(message)
        else:
            children[text_cell(row, "parent_id", where)].append(message)
    # Replies may stand before their parents; those without a parent in the file are unreachable.
    for parent, replies in children.items():
        if parent in messages:
            messages[parent].replies = replies
    yield from roots


def _message(cells: dict[str, Any], where: str, options: ThreadOptions) -> _Message:
    role = text_cell(cells, "role", where)
    if role not in _ROLES:
        raise InputError(f"{where}: role {role!r} is unknown; expected {' or '.join(_ROLES)}.")
    text = text_cell(cells, "text", where)
    usable = (
        bool(text.strip())
        and not flag_cell(cells, "deleted", where)
        and flag_cell(cells, "review_result", where) is not False
        and (options.include_synthetic or not flag_cell(cells, "synthetic", where))
        and (options.lang is None or cells.get("lang") == options.lang)
    )
    identity = str(cells.get("message_id") or text)
    return _Message(identity, _ROLES[role], text.strip(), rank_cell(cells, where), usable, where)


def _from_roots(roots: Iterator[_Message], options: ThreadOptions) -> list[Example]:
    examples: list[Example] = []
    for root in roots:
        if not root.usable or root.role != "user":
            continue
        for path in _paths(root, best_only=options.threads == "best"):
            turns = tuple(message.text for message in path)
            examples.append(Example(turns=turns, where=root.where))
    return examples


def _paths(root: _Message, best_only: bool) -> Iterator[list[_Message]]:
    """Paths from a root to a last assistant message, the best-ranked first."""
    pending = [[root]]
    while pending:
        path = pending.pop()
        replies = _usable_replies(path[-1])
        if not replies:
            if path[-1].role == "assistant":
                yield path
                if best_only:
                    return
            continue
        taken = replies[:1] if best_only else replies
        pending.extend([*path, reply] for reply in reversed(taken))


def _usable_replies(message: _Message) -> list[_Message]:
    """Replies that can be part of a thread, best rank first.

    A user's message counts only if somebody answered it, so that every path ends in an answer.
    """
    answer = message.role == "user"
    wanted = "assistant" if answer else "user"
    replies = [reply for reply in message.replies if reply.usable and reply.role == wanted]
    if not answer:
        replies = [reply for reply in replies if _usable_replies(reply)]
    return sorted(replies, key=lambda reply: (reply.rank, reply.identity))


def _from_guanaco(table: Rows, options: ThreadOptions) -> list[Example]:
    if options.lang is not None:
        raise InputError(
            f"{table.source}: openassistant-guanaco text names no language; leave lang unset "
            f"(it is {options.lang!r})."
        )
    examples: list[Example] = []
    for index, row in enumerate(table.rows):
        where = table.where(index)
        turns = _guanaco_turns(text_cell(row, "text", where), where)
        if len(turns) > 1:
            examples.append(Example(turns=tuple(turns), where=where))
    return examples


def _guanaco_turns(text: str, where: str) -> list[str]:
    """Turns of one text, cut after the last answer; a header out of turn is part of the text."""
    if not text.lstrip().startswith(HUMAN):
        raise InputError(f"{where}: 'text' does not start with {HUMAN!r}.")
    starts: list[re.Match[str]] = []
    for match in _HEADER.finditer(text):
        if match.group() == (ASSISTANT if len(starts) % 2 else HUMAN):
            starts.append(match)
    ends = [*(match.start() for match in starts[1:]), len(text)]
    turns = [text[match.end() : end].strip() for match, end in zip(starts, ends, strict=True)]
    blank = next((i for i, turn in enumerate(turns) if not turn), len(turns))
    return turns[: blank - blank % 2]

"""OASST1 in its three shapes, the filters, and splits by tree."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from datamodules.examples import Example, split_examples
from datamodules.sources import Rows
from datamodules.threads import ThreadOptions, read_threads
from falqon.errors import InputError

Node = Callable[..., dict[str, Any]]
BEST = [
    ("Why is the sky blue?", "Air scatters blue light.", "And at dusk?", "Red is left over."),
    ("Two plus two?", "Four."),
    ("Wie spaet?", "Acht."),
]


def threads(rows: list[dict[str, Any]], **options: Any) -> list[tuple[str, ...]]:
    table = Rows("f", rows, range(1, len(rows) + 1))
    return [example.turns for example in read_threads(table, ThreadOptions(**options))]


def tree(root: dict[str, Any]) -> dict[str, Any]:
    return {"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": root}


def test_trees_messages_and_guanaco_give_the_same_best_threads(
    trees: list[dict[str, Any]],
    message_rows: list[dict[str, Any]],
    guanaco_rows: list[dict[str, Any]],
) -> None:
    assert threads(trees) == BEST
    assert sorted(threads(message_rows)) == sorted(BEST)  # rows are in another order
    assert threads(guanaco_rows) == BEST


def test_message_rows_with_cells_as_text(message_rows: list[dict[str, Any]]) -> None:
    """A CSV file has no types: booleans, ranks and nulls come as text."""
    rows = [{k: "" if v is None else str(v) for k, v in row.items()} for row in message_rows]
    assert sorted(threads(rows)) == sorted(BEST)


def test_all_threads_end_in_an_answer_and_come_once(
    trees: list[dict[str, Any]], message_rows: list[dict[str, Any]]
) -> None:
    paths = threads(trees, threads="all")
    assert paths == [
        BEST[0],
        ("Why is the sky blue?", "Magic."),
        ("Why is the sky blue?", "No rank, so last."),
        *BEST[1:],
    ]
    assert sorted(threads(message_rows, threads="all")) == sorted(paths)


def test_lang_filter(trees: list[dict[str, Any]], guanaco_rows: list[dict[str, Any]]) -> None:
    assert threads(trees, lang="en") == BEST[:2]
    assert threads(trees, lang="de") == BEST[2:]
    with pytest.raises(InputError, match="none of the 4 rows.*lang \\('fr'\\)"):
        threads(trees, lang="fr")
    with pytest.raises(InputError, match="names no language"):
        threads(guanaco_rows, lang="en")


@pytest.mark.parametrize(
    "flaw", [{"deleted": True}, {"review_result": False}, {"synthetic": True}, {"text": "  "}]
)
def test_unusable_messages_go_with_their_replies(node: Node, flaw: dict[str, Any]) -> None:
    follow = node("q2", "prompter", "More?", [node("r2", "assistant", "No.")])
    bad = node("bad", "assistant", "Bad.", [follow], rank=0)
    bad.update(flaw)
    root = node("q", "prompter", "Q?", [bad, node("good", "assistant", "Good.", rank=1)])
    assert threads([tree(root)], threads="all") == [("Q?", "Good.")]


def test_synthetic_messages_on_request(node: Node) -> None:
    root = node("q", "prompter", "Q?", [node("r", "assistant", "A.", synthetic=True)])
    assert threads([tree(root)], include_synthetic=True) == [("Q?", "A.")]


def test_equal_ranks_are_ordered_by_id(node: Node) -> None:
    replies = [node(i, "assistant", f"from {i}") for i in ("z", "m", "a")]
    for order in (replies, replies[::-1]):
        assert threads([tree(node("q", "prompter", "Q?", order))]) == [("Q?", "from a")]


def test_a_reply_in_the_same_role_is_left_out(node: Node) -> None:
    root = node("q", "prompter", "Q?", [node("q2", "prompter", "Hello?")])
    root["replies"].append(node("r", "assistant", "A.", [node("r2", "assistant", "B.")]))
    assert threads([tree(root)], threads="all") == [("Q?", "A.")]


def test_a_deep_tree_needs_no_recursion(node: Node) -> None:
    """Deeper than Python's recursion limit."""
    item = node("end", "assistant", "end")
    for i in range(3000):
        role = "assistant" if i % 2 else "prompter"
        item = node(f"m{i}", role, f"text {i}", [item])
    root = item if item["role"] == "prompter" else node("root", "prompter", "root", [item])
    assert len(threads([tree(root)])[0]) >= 3000


@pytest.mark.parametrize(
    ("text", "turns"),
    [
        ("### Human: a### Assistant: b### Human: c", [("a", "b")]),
        ("### Human: a ### Human: b### Assistant: c", [("a ### Human: b", "c")]),
        ("### Human: a\n### Assistant: b\n", [("a", "b")]),
        ("### Human: a### Assistant: b### Human: c### Assistant:", [("a", "b")]),
    ],
)
def test_guanaco_turns(text: str, turns: list[tuple[str, ...]]) -> None:
    assert threads([{"text": text}]) == turns


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"a": 1}, "f, row 1: not an OASST1 shape.*columns: a.*tree files.*message rows.*guanaco"),
        ({"text": "### Assistant: first ### Human: x"}, "does not start with"),
        ({"text": "### Human: alone"}, "none of the 1 rows"),
        ({"prompt": {"role": "king", "text": "x"}}, "role 'king' is unknown"),
        ({"prompt": {"role": "prompter", "text": None}}, "'text' is null"),
        (
            {"prompt": {"role": "prompter", "text": "x", "replies": ["y"]}},
            "is of type str, not an object",
        ),
        ({"prompt": {"role": "prompter", "text": "x", "rank": "best"}}, "'rank' is 'best'"),
        (
            {"prompt": {"role": "prompter", "text": "x", "deleted": "maybe"}},
            "expected true or false",
        ),
        ({"message_id": "1", "role": "prompter", "text": "x"}, "missing column 'parent_id'"),
    ],
)
def test_unusable_rows_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        threads([row])


def test_a_message_id_that_comes_twice_is_an_error() -> None:
    row = {"message_id": "1", "parent_id": None, "role": "prompter", "text": "x"}
    with pytest.raises(InputError, match="f, row 2: message_id '1' occurs a second time"):
        threads([row, row])


def many_trees(node: Node, count: int) -> list[dict[str, Any]]:
    return [
        tree(
            node(
                f"q{i}",
                "prompter",
                f"Question {i}?",
                [node(f"r{i}.{j}", "assistant", f"Answer {i}.{j}", rank=j) for j in range(3)],
            )
        )
        for i in range(count)
    ]


def test_no_tree_is_in_both_splits(node: Node) -> None:
    rows = many_trees(node, 30)
    table = Rows("f", rows, range(1, 31))
    examples = read_threads(table, ThreadOptions(threads="all"))
    train, val = split_examples(examples, 0.2, 0, "f")
    assert len(examples) == 90 and len(val) == 18
    assert not {e.turns[0] for e in train} & {e.turns[0] for e in val}
    assert sorted(e.turns for e in train + val) == sorted(e.turns for e in examples)


def test_the_split_does_not_depend_on_row_order_but_on_the_seed() -> None:
    examples = [Example((f"q{i}", "a")) for i in range(50)]
    held = [e.turns for e in split_examples(examples, 0.1, 0, "f")[1]]
    assert len(held) == 5
    backwards = [e.turns for e in split_examples(examples[::-1], 0.1, 0, "f")[1]]
    assert sorted(backwards) == sorted(held)
    assert [e.turns for e in split_examples(examples, 0.1, 1, "f")[1]] != held
    # Golden: the same on every machine.
    assert [question for question, _ in held] == ["q2", "q27", "q29", "q33", "q37"]


def test_small_and_impossible_splits() -> None:
    pair = [Example(("a", "x")), Example(("b", "y"))]
    assert [len(part) for part in split_examples(pair, 0.01, 0, "f")] == [1, 1]
    assert [len(part) for part in split_examples(pair, 0.99, 0, "f")] == [1, 1]
    assert [len(part) for part in split_examples(pair, 0.0, 0, "f")] == [2, 0]
    with pytest.raises(InputError, match="f: 2 example.* cannot be split.*val_path"):
        split_examples([pair[0], pair[0]], 0.5, 0, "f")

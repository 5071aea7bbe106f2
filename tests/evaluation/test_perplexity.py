"""Perplexity on a file, against a computation by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from falqon.cli import main
from falqon.errors import InputError
from falqon.evaluation.perplexity import Window, measure_perplexity, read_text, windows

TEXT = "Why is the sky blue? Air scatters blue light most. And at dusk red is left over. " * 3


def test_every_token_but_the_first_is_predicted_once() -> None:
    tokens = list(range(23))
    for window in (2, 3, 7, 22, 23, 40):
        for stride in range(1, window):
            found = windows(tokens, window, stride)
            predicted = [t for part in found for t in part.tokens[-part.predicted :]]
            assert predicted == tokens[1:]
            for part in found:
                first = part.tokens[0]
                assert list(part.tokens) == tokens[first : first + len(part.tokens)]
                assert len(part.tokens) <= window
                assert 1 <= part.predicted < len(part.tokens)
            assert all(len(part.tokens) == min(window, 23) for part in found)
            assert all(part.predicted <= stride for part in found[1:])
    assert windows([5], 8, 4) == windows([], 8, 4) == []
    assert windows([5, 6], 8, 4) == [Window((5, 6), 1)]


@pytest.mark.parametrize("add_bos", [None, True, False])
@pytest.mark.parametrize("tokenizer_adds", [True, False])
def test_by_hand(
    tiny_llama: LlamaForCausalLM,
    make_tokenizer: Callable,
    tmp_path: Path,
    add_bos: bool | None,
    tokenizer_adds: bool,
) -> None:
    tokenizer = make_tokenizer(tokenizer_adds)
    file = tmp_path / "text.jsonl"
    documents = [TEXT, "Four.", TEXT[7:90]]
    file.write_text("\n".join(json.dumps({"body": text}) for text in documents))
    found = measure_perplexity(
        tiny_llama,
        tokenizer,
        read_text(file, "body"),
        window=16,
        stride=5,
        batch_size=3,
        add_bos=add_bos,
    )
    bos = tokenizer_adds if add_bos is None else add_bos
    losses: list[float] = []
    for text in documents:
        ids = [1] * bos + tokenizer(text, add_special_tokens=False)["input_ids"]
        for i in range(1, len(ids)):
            # The end of the window that predicts token i, and what it sees of the past.
            end = 16 if i < 16 else 16 + 5 * math.ceil((i - 15) / 5)
            start = max(0, min(end, len(ids)) - 16)
            with torch.no_grad():
                logits = tiny_llama(torch.tensor([ids[start:i]])).logits[0, -1].double()
            losses.append(float(logits.logsumexp(0) - logits[ids[i]]))
    assert found["tokens"] == len(losses)
    assert found["add_bos"] is bos
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    size = sum(len(text.encode()) for text in documents)
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / size, rel=1e-5)
    assert (
        tokenizer.backend_tokenizer.to_str()
        == make_tokenizer(tokenizer_adds).backend_tokenizer.to_str()
    )


@pytest.mark.parametrize(
    ("content", "flags", "expected"),
    [
        (None, [], "cannot be read"),
        ("", [], "has no text"),
        ('{"body": "a"}\n', [], "no text in 'text'; it has 'body'"),
        ("[", [], "line 1: not JSON"),
        ('{"text": "Why is it?"}\n', ["--window", "1000"], "this model takes 2 to 256"),
        ('{"text": "Why is it?"}\n', ["--window", "8", "--stride", "8"], "stride is 8"),
    ],
)
def test_mistakes(
    content: str | None,
    flags: list[str],
    expected: str,
    tokenizer_dir: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "text.jsonl"
    if content is not None:
        file.write_text(content)
    command = ["evaluate", tokenizer_dir, "--perplexity", str(file), "--device", "cpu", *flags]
    capsys.readouterr()
    assert main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert expected in captured.err


def test_a_document_of_one_token_predicts_nothing(
    tiny_llama: LlamaForCausalLM, make_tokenizer: Callable, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="nothing is predicted"):
        measure_perplexity(tiny_llama, make_tokenizer(), read_text(tmp_path / "a.txt"))

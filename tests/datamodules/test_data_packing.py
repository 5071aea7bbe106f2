"""Packed rows: documents do not see each other, and batches have the shapes agreed on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from datamodules.collate import IGNORE_INDEX, PackCollator, PadCollator, PromptCollator, PromptRow
from datamodules.encoding import Document, TokenRows
from datamodules.packing import PADDING_ROW, DocumentRows, pack


def document(length: int, seed: int = 0) -> Document:
    generator = np.random.default_rng([seed, length])
    tokens = generator.integers(5, 200, length).astype(np.int32)
    mask = np.arange(length) >= length // 2
    mask[:1] = False
    return tokens, mask


def test_every_example_is_packed_once_and_rows_are_full() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 500)
    bins = pack(lengths, 64, seed=0)
    assert sorted(i for members in bins for i in members) == list(range(500))
    assert all(lengths[members].sum() <= 64 for members in bins)
    # Examples above half a row need one each; with the short ones beside them little is left over.
    assert len(bins) <= max((lengths > 32).sum(), np.ceil(lengths.sum() / 64)) * 1.02
    assert bins == pack(lengths, 64, seed=0) != pack(lengths, 64, seed=1)


def test_packed_batch() -> None:
    first, second, third = document(5), document(3), document(9)
    batch = PackCollator(pad_id=0, multiple=4)([[first, second], [third]])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert all(t.shape == (2, 12) and t.dtype == torch.int64 for t in batch.values())
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert batch["position_ids"][1].tolist() == [*range(9), 0, 1, 2]
    assert batch["input_ids"][0, :8].tolist() == [*first[0].tolist(), *second[0].tolist()]
    assert batch["input_ids"][0, 8:].tolist() == [0] * 4
    expected = np.where(np.concatenate([first[1], second[1]]), batch["input_ids"][0, :8], -100)
    assert batch["labels"][0, :8].tolist() == expected.tolist()
    assert (batch["labels"][0, 8:] == IGNORE_INDEX).all()


def test_the_first_token_of_a_document_is_never_a_label() -> None:
    learned = (np.array([7, 8], np.int32), np.array([True, True]))
    labels = PackCollator(pad_id=0, multiple=1)([[learned, learned]])["labels"]
    assert labels.tolist() == [[-100, 8, -100, 8]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[5, 9, 1, 1, 7], [23], [16, 16]])
def test_packed_logits_and_loss_equal_those_of_separate_documents(
    tiny_llama: Any, lengths: list[int], attention: str
) -> None:
    documents = [document(n, seed) for seed, n in enumerate(lengths)]
    packed = PackCollator(pad_id=0, multiple=16)([documents, documents[::-1]])
    tiny_llama.set_attn_implementation(attention)
    with torch.no_grad():
        logits = tiny_llama(**{k: v for k, v in packed.items() if k != "labels"}).logits
        assert torch.isfinite(logits).all()
        for row, order in enumerate((documents, documents[::-1])):
            start = 0
            for tokens, _ in order:
                alone = tiny_llama(torch.from_numpy(tokens).long()[None]).logits[0]
                part = logits[row, start : start + len(tokens)]
                # float32 with sums in another order
                torch.testing.assert_close(part, alone, atol=1e-5, rtol=1e-5)
                start += len(tokens)
        padded = PadCollator(pad_id=0, multiple=16)([[d] for d in documents])
        separate = tiny_llama(**padded)
        one = {k: v[:1] for k, v in packed.items()}
        torch.testing.assert_close(tiny_llama(**one).loss, separate.loss)
    tiny_llama.set_attn_implementation("sdpa")


def test_documents_must_not_be_seen_as_one(tiny_llama: Any) -> None:
    """Without position_ids the second document sees the first: the test above is not vacuous."""
    documents = [document(5), document(9)]
    packed = PackCollator(pad_id=0, multiple=1)([documents])
    with torch.no_grad():
        apart = tiny_llama(packed["input_ids"], position_ids=packed["position_ids"]).logits
        together = tiny_llama(packed["input_ids"]).logits
    assert (apart[0, 5:] - together[0, 5:]).abs().max() > 1e-3


def test_padded_batch() -> None:
    first, second = document(5), document(17)
    batch = PadCollator(pad_id=3, multiple=16)([[first], [second]])
    assert set(batch) == {"input_ids", "labels", "attention_mask"}
    assert all(t.shape == (2, 32) and t.dtype == torch.int64 for t in batch.values())
    assert batch["attention_mask"].sum(1).tolist() == [5, 17]
    assert batch["attention_mask"][0, :5].all()  # padding is on the right
    assert (batch["input_ids"][0, 5:] == 3).all() and (batch["labels"][0, 5:] == -100).all()
    kept = batch["labels"] != IGNORE_INDEX
    assert (batch["labels"][kept] == batch["input_ids"][kept]).all()  # not shifted
    assert kept.sum().item() == first[1].sum() + second[1].sum()


def test_a_pad_token_that_is_also_learned_is_masked_by_length() -> None:
    """The pad token may be the EOS token, which is supervised at the end of a response."""
    row = (np.array([9, 8, 2], np.int32), np.array([False, True, True]))
    labels = PadCollator(pad_id=2, multiple=8)([[row]])["labels"]
    assert labels.tolist() == [[-100, 8, 2, -100, -100, -100, -100, -100]]


def test_prompt_batch_is_padded_on_the_left() -> None:
    rows = [
        PromptRow(4, np.array([5, 6], np.int32), "short?", "yes"),
        PromptRow(0, np.array([5, 6, 7, 8, 9], np.int32), "longer?", "no"),
    ]
    batch = PromptCollator(pad_id=1, multiple=4)(rows)
    assert batch["input_ids"].tolist() == [[1] * 6 + [5, 6], [1] * 3 + [5, 6, 7, 8, 9]]
    assert batch["attention_mask"].tolist() == [[0] * 6 + [1, 1], [0] * 3 + [1] * 5]
    assert batch["prompt_text"] == ["short?", "longer?"]
    assert batch["reference"] == ["yes", "no"] and batch["row"] == [4, 0]


@pytest.mark.parametrize("bins", [None, [[1, 0]]])
def test_a_padding_row_has_tokens_but_no_labels(bins: list[list[int]] | None) -> None:
    rows = DocumentRows(TokenRows.from_documents([document(4), document(6)]), bins)
    documents = rows[PADDING_ROW]
    assert [len(tokens) for tokens, _ in documents] == [len(tokens) for tokens, _ in rows[0]]
    assert not any(mask.any() for _, mask in documents)
    assert any(mask.any() for _, mask in rows[0])


def test_token_rows_digest_sees_tokens_masks_and_boundaries() -> None:
    one, two = document(4), document(6)
    base = TokenRows.from_documents([one, two]).digest()
    assert base == TokenRows.from_documents([one, two]).digest()
    joined = (np.concatenate([one[0], two[0]]), np.concatenate([one[1], two[1]]))
    unmasked = (two[0], np.zeros_like(two[1]))
    others = [[two, one], [one, unmasked], [joined]]
    assert base not in {TokenRows.from_documents(other).digest() for other in others}

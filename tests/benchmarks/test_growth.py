"""benchmarks.growth: what it measures, on a stack of the smallest size."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.growth import main

SHAPE = {"length": 8, "hidden": 32, "intermediate": 64, "heads": 2, "kv-heads": 1, "repeats": 2}
SMALL = [*(f"--{k}={v}" for k, v in SHAPE.items()), "--layers", "1", "2", "--ranks", "4"]


def test_steps_are_measured_by_tokens_layers_and_rank(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", *SMALL, "--tokens", "8", "16"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    factors = [[cell.strip() for cell in row] for row in rows]
    assert [row[:4] for row in factors] == [
        ["tokens", "8", "2", "4"],
        ["tokens", "16", "2", "4"],
        ["layers", "16", "1", "4"],
        ["layers", "16", "2", "4"],
        ["rank", "16", "2", "4"],
    ]
    assert all(float(row[4]) > 0 for row in factors)
    assert [row[7] for row in factors] == ["1.00", "2.00", "1.00", "2.00", "1.00"]


def test_rows_that_do_not_come_out_even_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["steps", *SMALL, "--tokens", "12"]) == 2
    assert "multiples of --length, 8" in capsys.readouterr().err


def test_start_names_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert main(["start", "--model", str(tmp_path), "--rank", "4"]) == 0
    assert re.match(r"load .* s, meld .* s, first .* s, all ", capsys.readouterr().out)


def test_decompositions_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["svd", "--sizes", "96x120", "8x20", "--rank", "4"]) == 0
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0].strip() for row in rows] == ["96x120", "8x20"]
    assert all(0.99 < float(row[5]) < 1 + 1e-4 for row in rows)  # the full one is the best there is


@pytest.mark.parametrize("size", ["96", "96x", "0x8", "8x8x8", "axb"])
def test_sizes_that_are_none_are_refused(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["svd", "--sizes", size])
    assert f"{size!r} is not OUTxIN" in capsys.readouterr().err

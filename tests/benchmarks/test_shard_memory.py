"""benchmarks.shard_memory: what one rank holds, on a stack of the smallest size."""

from __future__ import annotations

import pytest

from benchmarks.shard_memory import main


def test_one_rank_holds_all(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    held = []
    for layers in ("1", "2"):
        assert main(["--layers", layers, "--hidden", "64", "--rank", "4", "--steps", "2"]) == 0
        ranks, *cells = (cell.strip() for cell in capsys.readouterr().out.split("|")[1:-1])
        assert ranks == "1"
        held.append([float(cell) for cell in cells])
    (one, best, worst, layer), (two, *_) = held
    # The embedding is next to nothing; B's gradient and moments are in `one`, not in `layer`.
    assert two == pytest.approx(2 * one, abs=0.11) and one >= layer > 0
    assert worst >= best > 0

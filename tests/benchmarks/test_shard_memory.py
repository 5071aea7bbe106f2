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


@pytest.mark.parametrize("options", [(), ("--checkpointing",)])
def test_cutting_up_leaves_a_part_and_costs_a_layer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    """With N ranks a step's peak is 1/N of what is at rest, and at most one layer more."""
    monkeypatch.delenv("RANK", raising=False)
    rows = {}
    for ranks in (1, 2, 4):
        shape = ["--layers", "4", "--hidden", "512", "--steps", "2", "--ranks", str(ranks)]
        assert main([*shape, *options]) == 0
        cells = (float(cell) for cell in capsys.readouterr().out.split("|")[1:-1])
        number, *rows[ranks] = cells
        assert number == ranks
    rest, best, worst, layer = rows[1]
    assert best == worst
    for ranks in (2, 4):
        part, least, most, _ = rows[ranks]
        assert part == pytest.approx(rest / ranks, abs=0.11)
        assert least == most and best < most <= best + layer + 0.05  # printed to 0.1 MiB

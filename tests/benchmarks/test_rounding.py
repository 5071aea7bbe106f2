"""benchmarks.rounding on a tiny model."""

from __future__ import annotations

import pytest

from benchmarks.rounding import WAYS, main


def test_ways_of_rounding(
    tokenizer_dir: str, alpaca_file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        *("--model", tokenizer_dir, "--data", alpaca_file, "--rank", "4", "--steps", "4"),
        *("--batch-size", "4", "--max-length", "128", "--val-rows", "4", "--rate", "0.01"),
        *("--device", "cpu"),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    lines = out.strip().splitlines()[-len(WAYS) :]
    cells = {}
    for line in lines:
        way, *numbers = (cell.strip() for cell in line.split("|")[1:-1])
        cells[way] = [float(number.rstrip("%")) for number in numbers]
    assert tuple(cells) == WAYS
    landed, in_a, weights, outputs, flipped, loss, divergence = zip(*cells.values(), strict=True)
    assert all(0 < share < 2 for share in landed)
    nearest, stochastic, codes, compensated, with_a, both = range(6)
    # Each way is best at what it makes small, and rounding at random costs the most.
    assert weights[nearest] == min(weights) and weights[stochastic] > weights[nearest]
    assert outputs[compensated] == min(outputs)
    assert in_a[with_a] == min(in_a)
    assert in_a[both] < in_a[nearest] and outputs[both] < outputs[nearest]
    assert all(share > 0 for share in flipped) and all(number >= 0 for number in divergence)
    assert max(loss) - min(loss) < 0.5
    assert landed[codes] != landed[nearest]

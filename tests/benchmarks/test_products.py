"""The benchmark of products beside torch's."""

from __future__ import annotations

import pytest

from benchmarks.products import main
from falqon.kernels.native import build, products

SMALL = [
    "--tokens",
    "64",
    "--length",
    "32",
    "--rank",
    "8",
    "--hidden",
    "64",
    "--intermediate",
    "96",
    "--heads",
    "2",
    "--kv-heads",
    "1",
    "--vocabulary",
    "128",
    "--repeats",
    "1",
]


@pytest.mark.skipif(
    build.compiler() is None or not products.present(),
    reason="the processor has no AVX2, or there is no compiler",
)
def test_both_ways_are_timed(capsys: pytest.CaptureFixture[str]) -> None:
    present = products.present
    assert main(SMALL) == 0
    _, _, *rows = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    names = ["q, k, v", "o", "gate, up", "down", "attention", "output embedding"]
    assert [row[0] for row in cells] == names
    assert all(len(row) == 9 and float(row[4]) > 0 and float(row[5]) > 0 for row in cells)
    assert products.present is present


def test_without_the_instructions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(products, "present", lambda: False)
    assert main(SMALL) == 2
    assert "none of AMX" in capsys.readouterr().err

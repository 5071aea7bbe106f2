"""The table of memory and traffic by strategy."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.device_memory import Setting, count, meta_model
from falqon.meld import melded_layers

PAGE = Path(__file__).parents[2] / "docs" / "multi_gpu.md"


def test_the_page_has_what_the_modules_give() -> None:
    rows = {
        name: count("7B", Setting(name, data, tensor), rank=64, tokens=2048, every=8)
        for name, data, tensor in (("ddp", 8, 1), ("fsdp2", 8, 1), ("tp", 1, 8))
    }
    text = PAGE.read_text()
    for name, row in rows.items():
        parts = (row.codes, row.trained, row.other, row.gathered, row.activations, row.total)
        cells = " | ".join(f"{part / 2**30:.2f}" for part in (*parts, row.flush))
        assert f"| 7B | {name} | 8 | {cells} | {row.wire / 2**20:,.0f} |" in text
    ddp, fsdp, tensor = rows.values()
    layers = melded_layers(meta_model("7B", 64)).values()
    assert ddp.codes == sum(layer.codes.numel() for layer in layers)
    assert ddp.trained == sum(layer.B.numel() for layer in layers) * 16
    assert (fsdp.codes, fsdp.trained) == (ddp.codes / 8, ddp.trained / 8)
    assert ddp.codes / 8 < tensor.codes < ddp.codes / 7  # A is with every part of some layers
    # Only gradients of B travel in DDP, twice 7/8 of them; FSDP2 sends all weights twice.
    assert ddp.wire == pytest.approx(2 * 7 / 8 * ddp.trained / 4)
    assert fsdp.wire > 2 * 7 / 8 * ddp.codes

"""`python -m benchmarks.adapter_path`: FP8 against 16 bits on the LoRA path."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks import adapter_path


def test_it_times_every_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokens=32", "--inputs=64", "--outputs=48", "--repeats=2", "--device=cpu"]
    assert adapter_path.main([*flags, "--ranks", "16", "32", f"--output={tmp_path}"]) == 0
    with (tmp_path / "adapter_path.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["rank"]) for row in rows] == [16, 32]
    for row in rows:
        assert float(row["quantising_s"]) > 0 and float(row["fp8_p80_s"]) > 0
        ratio = float(row["fp8_s"]) / float(row["bf16_s"])
        assert float(row["fp8_to_bf16"]) == pytest.approx(ratio)
    assert "FP8 / bf16" in capsys.readouterr().out
    assert (tmp_path / "adapter_path.png").stat().st_size > 1000


def test_both_paths_are_the_gradients_of_autograd() -> None:
    path = adapter_path.build(16, 32, 64, 48, torch.device("cpu"))
    x, A, B = (t.float().requires_grad_() for t in (path.x, path.A, path.B))
    output = x @ A.T @ B.T
    output.backward(path.g.float())
    expected = (output, x.grad, A.grad, B.grad)
    for exact, half, low in zip(expected, path.in_bf16(), path.in_fp8(), strict=True):
        assert exact is not None
        assert (half.float() - exact).norm() < 0.01 * exact.norm()
        assert 0.01 * exact.norm() < (low.float() - exact).norm() < 0.15 * exact.norm()


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    path = adapter_path.build(16, 32, 64, 48, torch.device("cpu"))
    adapter_path.check(path)
    right = path.in_fp8()
    monkeypatch.setattr(path, "in_fp8", lambda: (*right[:3], torch.zeros_like(right[3])))
    with pytest.raises(RuntimeError, match="dB of the FP8 path is off"):
        adapter_path.check(path)


def test_sizes_that_fp8_cannot_have(capsys: pytest.CaptureFixture[str]) -> None:
    assert adapter_path.main(["--ranks", "24", "--device=cpu"]) == 2
    assert "multiples of 16" in capsys.readouterr().err

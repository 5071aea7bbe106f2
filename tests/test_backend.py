"""Choosing between implementations, and the vendor's matmul."""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch

from falqon.errors import InputError
from falqon.fp8 import E4M3, E5M2, decode, encode
from falqon.kernels import backend
from falqon.kernels.backend import Choices
from falqon.kernels.scaled_matmul import vendor_matmul
from tests.policies import random


class Candidates:
    """Implementations with known times, and how often each was measured."""

    def __init__(self, **times: float | Exception) -> None:
        self.times = times
        self.measured: list[str] = []

    def runs(self) -> dict[str, Any]:
        return {name: lambda name=name: name for name in self.times}

    def measure(self, run: Any) -> float:
        name = run()
        self.measured.append(name)
        value = self.times[name]
        if isinstance(value, Exception):
            raise value
        return value


def test_the_fastest_is_chosen_once_and_kept(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "new" / "gpu.json"
    candidates = Candidates(triton=2.0, vendor=1.0)
    choices = Choices(path)
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert choices.get("a", candidates.runs(), candidates.measure) == "vendor"
    assert candidates.measured == ["triton", "vendor"]
    assert sum("vendor" in record.message for record in caplog.records) == 1
    assert json.loads(path.read_text()) == {"a": "vendor"}
    again = Candidates(triton=1.0, vendor=2.0)
    assert Choices(path).get("a", again.runs(), again.measure) == "vendor"
    assert again.measured == []
    assert Choices(path).get("b", again.runs(), again.measure) == "triton"
    assert json.loads(path.read_text()) == {"a": "vendor", "b": "triton"}
    assert {p.name for p in path.parent.iterdir()} == {"gpu.json", "gpu.lock"}


def test_one_that_fails_is_out_of_question(tmp_path: Path) -> None:
    candidates = Candidates(triton=2.0, vendor=RuntimeError("not on this device\nat all"))
    choices = Choices(tmp_path / "gpu.json")
    assert choices.get("a", candidates.runs(), candidates.measure) == "triton"
    broken = Candidates(vendor=RuntimeError("broken"))
    with pytest.raises(RuntimeError, match="broken"):
        choices.get("b", broken.runs(), broken.measure)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": "another"}'])
def test_a_damaged_file_costs_a_measurement(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    candidates = Candidates(triton=1.0, vendor=2.0)
    assert Choices(path).get("a", candidates.runs(), candidates.measure) == "triton"


def test_a_directory_that_cannot_be_written_costs_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file" / "gpu.json")
    candidates = Candidates(triton=1.0, vendor=2.0)
    assert choices.get("a", candidates.runs(), candidates.measure) == "triton"
    assert "cannot be" in caplog.text


def _measure_slowly(path: Path, barrier: Any, results: Any) -> None:
    import time

    def measure(run: Any) -> float:
        results.put("measured")
        time.sleep(0.3)
        return float(run())

    barrier.wait()
    Choices(path).get("a", {"triton": lambda: 1.0, "vendor": lambda: 2.0}, measure)


def test_processes_measure_once_between_them(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2), context.Queue()
    arguments = (tmp_path / "gpu.json", barrier, results)
    processes = [context.Process(target=_measure_slowly, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert [results.get(timeout=5) for _ in range(2)] == ["measured"] * 2
    assert results.empty()


def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    assert backend.wanted() == "auto"
    monkeypatch.setenv(backend.VARIABLE, "triton")
    assert backend.wanted() == "triton"
    monkeypatch.setenv(backend.VARIABLE, "cublas")
    with pytest.raises(
        InputError, match="FALQON_MATMUL is 'cublas'; choose auto, triton or vendor"
    ):
        backend.wanted()


def test_where_choices_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path))
    assert backend.cache_directory() == tmp_path
    monkeypatch.delenv("FALQON_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert backend.cache_directory() == tmp_path / "falqon"


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("outs", [(48,), (32, 16, 16)])
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
def test_vendor_matmul(outs: tuple[int, ...], per_token: bool, fmt: Any) -> None:
    tokens, features, rank = 17, 32, 16
    left = encode(random(tokens, features, seed=1), fmt)
    right = encode(random(sum(outs) + rank * len(outs), features, seed=2), E4M3)
    left_scale = 2.0 ** torch.arange(tokens).remainder(3)[:, None] if per_token else torch.ones(1)
    right_scale = 2.0 ** torch.arange(len(outs), dtype=torch.float32)
    segments: list[tuple[int, int, int, int]] = []
    row = column = 0
    for number, out in enumerate(outs):
        segments += [(row, out, column, 0), (row + out, rank, number * rank, 1)]
        row, column = row + out + rank, column + out
    bias = random(sum(outs)).bfloat16() if per_token else None
    out, adapter = vendor_matmul(
        left, left_scale, fmt.name, right, right_scale, tuple(segments), torch.bfloat16, bias
    )
    exact = decode(left, fmt) @ decode(right, E4M3).t() / left_scale
    for number, (first, rows, column, other) in enumerate(segments):
        expected = exact[:, first : first + rows] / right_scale[number // 2]
        if bias is not None and not other:
            expected = expected + bias[column : column + rows]
        ours = (adapter if other else out)[:, column : column + rows]
        torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2)
    assert adapter.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
    plain, nothing = vendor_matmul(
        left,
        left_scale,
        fmt.name,
        right,
        right_scale[:1],
        ((0, len(right), 0, 0),),
        torch.bfloat16,
        None,
    )
    assert plain.shape == (tokens, len(right)) and nothing.shape == (tokens, 0)

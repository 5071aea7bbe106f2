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
from falqon.kernels.scaled_matmul import ADAPTER, vendor_matmul
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


def _measure_at_the_same_time(path: Path, barrier: Any, results: Any, mine: str) -> None:
    def measure(run: Any) -> float:
        barrier.wait()  # nobody gets past here while another process holds a lock
        return 0.0 if run() == mine else 1.0

    candidates = {name: (lambda name=name: name) for name in ("triton", "vendor")}
    results.put(Choices(path).get("a", candidates, measure))


def test_processes_that_measure_at_the_same_time_agree(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(2, timeout=60), context.Queue()
    processes = [
        context.Process(
            target=_measure_at_the_same_time, args=(tmp_path / "gpu.json", barrier, results, mine)
        )
        for mine in ("triton", "vendor")
    ]
    for process in processes:
        process.start()
    found = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(found) == 1
    assert json.loads((tmp_path / "gpu.json").read_text()) == {"a": found.pop()}


def test_without_a_file_each_shape_is_measured_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    choices = Choices(tmp_path / "file" / "gpu.json")
    candidates = Candidates(triton=1.0, vendor=2.0)
    for key in ("a", "b", "a", "b"):
        choices.get(key, candidates.runs(), candidates.measure)
    assert len(candidates.measured) == 4


def test_too_little_memory_at_the_moment_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    candidates = Candidates(triton=2.0, vendor=torch.OutOfMemoryError("full"))
    assert Choices(path).get("a", candidates.runs(), candidates.measure) == "triton"
    again = Candidates(triton=2.0, vendor=1.0)
    assert Choices(path).get("a", again.runs(), again.measure) == "vendor"


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
    row = 0
    for number, out in enumerate(outs):
        segments += [(row, out, 0, number), (row + out, rank, number * rank, ADAPTER)]
        row += out + rank
    bias = random(sum(outs)).bfloat16() if per_token else None
    found, adapter = vendor_matmul(
        left, left_scale, fmt.name, right, right_scale, tuple(segments), torch.bfloat16, bias
    )
    exact = decode(left, fmt) @ decode(right, E4M3).t() / left_scale
    biases = [None] * len(outs) if bias is None else list(bias.split(list(outs)))
    for number, (first, rows, column, to) in enumerate(segments):
        expected = exact[:, first : first + rows] / right_scale[number // 2]
        given = None if to == ADAPTER else biases[to]
        if given is not None:
            expected = expected + given
        ours = adapter[:, column : column + rows] if to == ADAPTER else found[to]
        torch.testing.assert_close(ours.float(), expected, rtol=2e-2, atol=2e-2)
    storages = {x.untyped_storage().data_ptr() for x in (*found, adapter)}
    assert len(storages) == len(outs) + 1
    assert all(x.is_contiguous() for x in (*found, adapter))
    rows = 2.0 ** torch.arange(len(right)).remainder(3)
    (row_scaled, *_), _ = vendor_matmul(
        left, left_scale, fmt.name, right, rows, tuple(segments), torch.bfloat16, None
    )
    expected = exact[:, : outs[0]] / rows[: outs[0]]
    torch.testing.assert_close(row_scaled.float(), expected, rtol=2e-2, atol=2e-2)
    (plain,), nothing = vendor_matmul(
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


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("outs", [(48,), (32, 16)])
def test_vendor_matmul_adds_to_what_is_there(outs: tuple[int, ...], biased: bool) -> None:
    """The memory of `onto` has all of the result: nobody looks at what is returned."""
    tokens, features, rank = 17, 32, 16
    left = encode(random(tokens, features, seed=1), E4M3)
    right = encode(random(sum(outs) + rank * len(outs), features, seed=2), E4M3)
    segments: list[tuple[int, int, int, int]] = []
    row = 0
    for number, out in enumerate(outs):
        segments += [(row, out, 0, number), (row + out, 0, number * rank, ADAPTER)]
        row += out + rank
    bias = random(sum(outs), seed=3).bfloat16() if biased else None
    onto = [random(tokens, out, seed=4 + n).bfloat16() for n, out in enumerate(outs)]
    before = [x.float() for x in onto]
    one, scales = torch.ones(1), torch.ones(len(outs))
    vendor_matmul(left, one, "e4m3", right, scales, tuple(segments), torch.bfloat16, bias, onto)
    exact = decode(left, E4M3) @ decode(right, E4M3).t()
    for number, (begin, found) in enumerate(zip(before, onto, strict=True)):
        first, rows, *_ = segments[2 * number]
        expected = exact[:, first : first + rows] + begin
        if bias is not None:
            expected = expected + bias.split(list(outs))[number]
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)

"""benchmarks.kernels: formulas counted by hand, what is checked before it is timed, tables."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import kernel_cases, kernels
from benchmarks.devices import DEVICES
from benchmarks.kernel_cases import Case, cases
from benchmarks.kernel_checks import Rule, Setup, WrongResultError, check
from benchmarks.kernel_costs import COSTS, Layer, floor_seconds, flops, limits, moved
from benchmarks.kernel_tables import Result, Timing, measured_table

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
TINY = Layer(tokens=3, n_in=5, out=7, rank=2, rows=4)
ON_CPU = [name for name in COSTS if name not in ("dx", "transpose")]


@pytest.mark.parametrize(
    ("name", "read", "written", "count"),
    [
        # 3 x 5 values of 2 bytes; a byte for each code, four for a scale
        ("quantize_token", 30, 15 + 12, 0),
        ("quantize_tensor", 60, 15 + 4, 0),
        ("quantize_delayed", 30 + 4, 15, 0),
        ("rms_norm", 30 + 10, 15 + 12 + 12, 0),
        ("swiglu", 60, 15 + 12, 0),
        # codes 3 x 5 and 9 x 5, three scales and one; 3 x 9 results of 2 bytes
        ("melded_matmul", 15 + 45 + 16, 54, 2 * 3 * 9 * 5),
        ("dx_row_major", 21 + 35 + 16, 30, 2 * 3 * 5 * 7),
        ("transpose", 35, 35, 0),
        ("dx", 35 + 21 + 35 + 16, 35 + 30, 2 * 3 * 5 * 7),
        # 3 x 7 and 3 x 2 values of 2 bytes, 7 x 2 results of 4
        ("proxy_grad", 42 + 12, 56, 2 * 3 * 7 * 2),
        # 4 rows of codes, 2 of A, 4 x 2 of B, 4 row numbers, a scale
        ("row_update", 20 + 10 + 32 + 32 + 4, 20, 2 * 4 * 2 * 5),
        ("row_update_all", 35 + 10 + 56 + 4, 35, 2 * 7 * 2 * 5),
    ],
)
def test_bytes_and_flops_by_hand(name: str, read: int, written: int, count: int) -> None:
    ops = COSTS[name](TINY)
    assert sum(op.read for op in ops) == read
    assert sum(op.written for op in ops) == written
    assert moved(ops) == read + written
    assert flops(ops) == count


@pytest.mark.parametrize("name", ON_CPU)
def test_flops_are_those_that_torch_counts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FALQON_NATIVE", "off")  # of compiled code torch counts nothing
    case = Case(name, Layer(16, 32, 48, rank=16, rows=4))
    setup = case.build(CPU, gpu=False, compiled=False)
    assert setup is not None
    for run in (setup.ours, setup.reference):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == flops(COSTS[name](case.layer))


def test_floor_is_the_longer_of_moving_and_computing() -> None:
    device = DEVICES["H100 SXM"]
    few, many = (Layer(tokens, 4096, 4096, rank=64) for tokens in (1, 16384))
    small, large = COSTS["melded_matmul"](few), COSTS["melded_matmul"](many)
    assert floor_seconds(small, device) == moved(small) / device.bandwidth
    assert floor_seconds(large, device) == flops(large) / device.fp8_flops
    assert (limits(small, device), limits(large, device)) == ("m", "c")
    both = COSTS["dx"](many)
    apart = floor_seconds(COSTS["transpose"](many), device)
    apart += floor_seconds(COSTS["dx_row_major"](many), device)
    assert floor_seconds(both, device) == apart
    assert limits(both, device) == "m+c"


@pytest.mark.parametrize("name", ON_CPU)
def test_alternatives_agree_with_ours(name: str) -> None:
    setup = Case(name, Layer(32, 48, 64, rank=16, rows=5)).build(CPU, gpu=False, compiled=False)
    assert setup is not None
    assert check(name, setup) == {}


def _one_code_off(quantize: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        codes, scale = quantize(x, *args, **options)
        codes[-1, -1] ^= 1
        return codes, scale

    return wrong


def _nothing(mine: torch.Tensor, *_: Any) -> torch.Tensor:
    return mine


def _larger(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *arguments: function(*arguments) * 1.01


@pytest.mark.parametrize(
    ("name", "function", "wrong", "message"),
    [
        ("quantize_token", "quantize", _one_code_off(kernel_cases.quantize), "1 of 576 codes"),
        ("row_update", "row_update", _nothing, "codes differ"),
        ("row_update_all", "row_update", _nothing, "codes differ"),
        ("proxy_grad", "proxy_grad", _larger(kernel_cases.proxy_grad), "dB, needed are 50"),
    ],
)
def test_a_wrong_result_is_one_clear_error_and_no_time(
    name: str,
    function: str,
    wrong: Callable[..., Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernel_cases, function, wrong)
    given = ["--device", "cpu", "--shapes", "12,48,64", "--rank", "16", "--no-compile"]
    assert kernels.main([*given, "--only", name]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert shown.err.startswith(f"error: {name} (")
    assert message in shown.err


def _setup(result: torch.Tensor, **others: Callable[[], Any]) -> Setup:
    right = torch.ones(4, 4)
    return Setup(lambda: result, lambda: right, "product", lambda x: x, others)


def test_what_counts_as_wrong() -> None:
    for result in (torch.full((4, 4), float("nan")), torch.ones(4, 3), 0 * torch.ones(4, 4)):
        with pytest.raises(WrongResultError, match="this one does not compute"):
            check("this one", _setup(result))
    assert check("this one", _setup(torch.ones(4, 4))) == {}


def test_sums_in_another_order_may_give_neighbouring_codes() -> None:
    right = torch.full((40, 40), 0x30, dtype=torch.uint8)
    right[0, :2], right[0, 2] = torch.tensor([0x00, 0x81]), 0x80

    def outcome(rule: Rule, *codes: int) -> str:
        ours = right.clone()
        ours[0, : len(codes)] = torch.tensor(codes, dtype=torch.uint8)
        setup = Setup(lambda: ours, lambda: right, rule, lambda x: x.float())
        try:
            return str(check("sum", setup))
        except WrongResultError as error:
            return str(error)

    assert outcome("near codes", 0x80, 0x80, 0x00) == "{}"  # -0, one nearer to zero, +0
    assert "1 of 1600 codes differ, by up to 2" in outcome("near codes", 0x02)
    assert "3 of 1600 codes differ, by up to 1" in outcome("near codes", 1, 0x80, 1)
    assert "1 of 1600 codes differ, by up to 128" in outcome("same codes", 0x80)


def test_alternatives_that_fail_or_differ_are_said_not_timed() -> None:
    def fails() -> None:
        raise RuntimeError("not on this machine\nmore lines")

    setup = _setup(torch.ones(4, 4), fast=fails, other=lambda: 2 * torch.ones(4, 4))
    refused = check("this one", setup)
    assert refused == {"fast": "failed: not on this machine", "other": "other result: 0 dB"}
    second = Timing(1.0, 0.5, 2.0)
    text = measured_table([Result(Case("dx", TINY), {"ours": second}, refused)], None)
    assert "- dx (3 x 7 -> 5), fast: failed: not on this machine" in text
    assert text.splitlines()[1].split()[-3:] == ["peaks", "-", "-"]


def test_cpu_run_prints_tables_and_writes_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernels.csv"
    given = ["--device", "cpu", "--shapes", "16,32,48", "--rank", "16", "--repeats", "3"]
    assert kernels.main([*given, "--no-compile", "--csv", str(path)]) == 0
    measured, _, floors = capsys.readouterr().out.partition(kernels.MODEL)
    assert "Measured on" in measured
    assert f"torch {torch.__version__}" in measured
    for name in COSTS:
        line = next(x for x in measured.splitlines() if x.startswith(f"{name} "))
        assert ("GPU only" in line) == (name not in ON_CPU)
        assert name not in ON_CPU or re.search(r" [0-9.]+x", line)
        assert re.search(rf"^{name} .*( [0-9.]+ [mc](\+[mc])?\s*){{4}}$", floors, re.MULTILINE)
    assert "Nothing was measured" in kernels.MODEL
    assert [x.name for x in tmp_path.iterdir()] == ["kernels.csv"]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    ours = [r for r in rows if r["kind"] == "measured" and r["implementation"] == "ours"]
    assert [r["operation"] for r in ours] == ON_CPU
    assert all(float(r["p20_us"]) <= float(r["median_us"]) <= float(r["p80_us"]) for r in ours)
    model = [r for r in rows if r["kind"] == "model"]
    assert len(model) == len(COSTS) * len(DEVICES)
    assert {r["device"] for r in model} == set(DEVICES)


def test_compiled_reference_is_among_the_alternatives(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--device", "cpu", "--shapes", "16,32,48", "--rank", "16", "--repeats", "1"]
    assert kernels.main([*given, "--only", "quantize_token"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("operation "))
    header, line = lines[at : at + 2]
    assert header.split()[-2:] == ["plain", "compile"]
    assert line.count("x") == 3, "two ratios, and one in the shape"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "70b"], "--shapes is '70b'; choose 7b, 13b, smollm"),
        (["--shapes", "16,32"], "--shapes is '16,32'"),
        (["--shapes", "16,32,-4"], "--shapes is '16,32,-4'"),
        (["--shapes", "16,32,48", "--tokens", "4"], "--tokens goes with the name of a model"),
        (["--tokens", "0"], "--tokens is 0"),
        (["--shapes", "16,32,48", "--rank", "33"], "--rank is 33, more than the 32"),
        (["--shapes", "16,32,48", "--rank", "8", "--rows", "49"], "--rows is 49"),
        (["--only", "matmul"], "--only: unknown operation 'matmul'; choose of quantize_token"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--csv", "nowhere/at/all.csv"], "--csv: there is no directory nowhere/at"),
    ],
)
def test_mistakes_are_told_by_flag(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        kernels.main(["--device", "cpu", *arguments])
    assert exit_.value.code == 2
    assert f"error: {message}" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        kernels.main(["--device", "cuda"])
    assert "--device is cuda, but torch finds no CUDA device" in capsys.readouterr().err


def test_other_work_on_the_cpu_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(kernels.os, "getloadavg", lambda: (0.1, 9.0, 9.0))
    assert kernels.load() == ""
    monkeypatch.setattr(kernels.os, "getloadavg", lambda: (3.0, 0.0, 0.0))
    for threads, advised in ((1, False), (2, True)):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert "load 3.0 on 2 cores" in kernels.load()
        assert ("OMP_NUM_THREADS=1" in kernels.load()) == advised


def test_models_have_their_layers_once() -> None:
    layers = kernels.MODELS["7b"].layers(8432, 64, 10)
    shapes = [(c.name, c.shape) for c in cases(layers)]
    assert len(shapes) == len(set(shapes))
    assert [s for n, s in shapes if n == "rms_norm"] == ["8432 x 4096"]
    assert [s for n, s in shapes if n == "swiglu"] == ["8432 x 11008"]
    assert len([s for n, s in shapes if n == "melded_matmul"]) == 3
    assert [c.name for c in cases(layers, ["dx"])] == ["dx"] * 3


def test_gpu_timer_reads_milliseconds(monkeypatch: pytest.MonkeyPatch) -> None:
    testing = pytest.importorskip("triton.testing")
    asked = []

    def do_bench(run: Callable[[], Any], quantiles: tuple[float, ...]) -> list[float]:
        asked.append((run(), quantiles))
        return [2.0, 1.0, 4.0]

    monkeypatch.setattr(testing, "do_bench", do_bench)
    times = kernels.on_gpu({"ours": lambda: "ours was run", "other": lambda: "other too"})
    assert times == dict.fromkeys(("ours", "other"), Timing(0.002, 0.001, 0.004))
    assert asked == [("ours was run", (0.5, 0.2, 0.8)), ("other too", (0.5, 0.2, 0.8))]


def test_peaks_are_those_of_the_very_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(kernels.DRIVER_NAMES.values()) == set(DEVICES)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(kernels.devices, "check", lambda _: None)
    for name, peaks in (
        ("NVIDIA GeForce RTX 4090", DEVICES["RTX 4090"]),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 80GB HBM3", DEVICES["H100 SXM"]),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _, name=name: name)
        place = kernels.Place(torch.device("cuda", 0), name, peaks, gpu=True)
        assert kernels.find_device("auto") == place


def test_gpu_side_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/benchmarks/triton_interpreted_cases.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d\d passed", done.stdout)

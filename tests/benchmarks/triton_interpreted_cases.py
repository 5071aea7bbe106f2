"""The GPU side of benchmarks.kernels in Triton's interpreter: every kernel set up, run and checked.

Run by test_kernels_benchmark.py in a process of its own.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import triton.testing

from benchmarks import kernels
from benchmarks.devices import DEVICES
from benchmarks.kernel_cases import Case, Site, cases
from benchmarks.kernel_checks import Run, WrongResultError
from benchmarks.kernel_costs import COSTS, Layer, floor_seconds
from benchmarks.kernel_tables import Timing, measured_table
from benchmarks.kernels import measure
from falqon.kernels import quantize_triton, transpose_triton

CPU = torch.device("cpu")
LAYER = Layer(32, 48, 64, rank=16, rows=5)
QUANTIZERS = ("quantize_token", "quantize_tensor", "quantize_delayed", "rms_norm", "swiglu")
OTHERS = {
    **{name: ["unfused"] for name in QUANTIZERS},
    **{name: ["_scaled_mm", "bf16 mm"] for name in ("melded_matmul", "dx", "dx_row_major")},
    **{name: ["plain"] for name in ("transpose", "row_update", "row_update_all")},
    "proxy_grad": ["bf16 mm"],
}


@pytest.mark.parametrize("name", COSTS)
def test_case(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "proxy_grad":  # the interpreter multiplies bfloat16 as if its bits were integers
        bfloat16 = Site.values
        monkeypatch.setattr(Site, "values", lambda *a, **k: bfloat16(*a, **k).to(torch.float16))
    case = Case(name, LAYER)
    floor = floor_seconds(COSTS[name](LAYER), DEVICES["H100 SXM"])

    def timer(runs: Mapping[str, Run]) -> dict[str, Timing]:
        for run in runs.values():
            run()
        other = Timing(3 * floor, 3 * floor, 3 * floor)
        return dict.fromkeys(runs, other) | {"ours": Timing(2 * floor, 1.5 * floor, 4 * floor)}

    (result,) = measure([case], CPU, gpu=True, timer=timer, compiled=False)
    assert result.refused == {}
    assert list(result.times) == ["ours", *OTHERS[name]]
    line = measured_table([result], DEVICES["H100 SXM"]).splitlines()[1]
    assert line.split("  ")[0] == name
    assert " 50%" in line
    assert line.count("1.50x") == len(OTHERS[name])


def test_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def do_bench(run: Run, quantiles: tuple[float, ...]) -> list[float]:
        run()
        return [0.001 * (1 + q) for q in quantiles]

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    place = kernels.Place(CPU, "NVIDIA B200", DEVICES["B200"], gpu=True)
    monkeypatch.setattr(kernels, "find_device", lambda _: place)
    path = tmp_path / "kernels.csv"
    given = ["--shapes", "32,48,64", "--rank", "16", "--rows", "5", "--no-compile"]
    only = ["--only", *(name for name in COSTS if name != "proxy_grad")]
    assert kernels.main([*given, *only, "--csv", str(path)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("Measured on NVIDIA B200, ")
    assert "triton.testing.do_bench" in shown
    assert kernels.MODEL not in shown and "GPU only" not in shown
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"measured"}
    for row in rows:
        times = [float(row[key]) for key in ("p20_us", "median_us", "p80_us")]
        assert times == [1.2, 1.5, 1.8]
        assert float(row["ratio"]) == 1
        if row["implementation"] == "ours":
            floor = 1e6 * floor_seconds(COSTS[row["operation"]](LAYER), DEVICES["B200"])
            assert float(row["of_roofline"]) == pytest.approx(floor / 1.5, abs=1e-4)


def test_no_operation_is_left_out() -> None:
    assert [case.name for case in cases([LAYER])] == list(COSTS) == list(dict.fromkeys(COSTS))
    assert set(OTHERS) == set(COSTS)


@pytest.mark.parametrize(
    ("module", "function", "name"),
    [
        (quantize_triton, "quantize_triton", "quantize_token"),
        (transpose_triton, "transpose_triton", "transpose"),
    ],
)
def test_a_wrong_kernel_gives_no_time(
    module: object, function: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(module, function)

    def wrong(*arguments: object) -> object:
        result = right(*arguments)
        (result if isinstance(result, torch.Tensor) else result[0])[0, 0] += 1
        return result

    def never(_: Mapping[str, Run]) -> dict[str, Timing]:
        raise AssertionError("a wrong result was timed")

    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(WrongResultError, match=rf"{name} .* 1 of \d+ codes differ"):
        list(measure([Case(name, LAYER)], CPU, gpu=True, timer=never, compiled=False))

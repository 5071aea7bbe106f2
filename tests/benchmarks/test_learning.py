"""benchmarks.learning on a tiny model: what it runs, writes, goes on from and refuses."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks.learning import Study, main, parse_method
from falqon.errors import InputError
from falqon.precision import FalqonPrecision


@pytest.fixture
def arguments(tokenizer_dir: str, alpaca_file: str, tmp_path: Path) -> list[str]:
    return [
        *("--model", tokenizer_dir, "--data", alpaca_file, "--output", str(tmp_path / "study")),
        *("--rank", "4", "--steps", "4", "--eval-every", "2", "--batch-size", "4"),
        *("--max-length", "128", "--val-rows", "4", "--rates", "0.003", "0.01"),
        *("--lora-rates", "0.01", "--seeds", "0", "1", "--device", "cpu"),
    ]


def test_study_runs_writes_and_goes_on(
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = ["lora", "live", "paper:rows=all,closing=1"]
    assert main([*arguments, "--methods", *methods]) == 0
    root = tmp_path / "study"
    with (root / "runs.csv").open(newline="") as file:
        runs = list(csv.DictReader(file))
    # LoRA has one rate; of two rates the better one is run with the second seed as well.
    assert [r["method"] for r in runs] == ["lora"] * 2 + ["live"] * 3 + [methods[2]] * 3
    for run in runs:
        losses = json.loads(run["losses"])
        assert list(losses) == ["0", "2", "4"]
        assert float(run["final"]) == pytest.approx(losses["4"], abs=1e-5)
        assert losses["4"] < losses["0"]
    falqon = [r for r in runs if r["method"] != "lora"]
    assert all(float(r["codes_changed"]) > 0 for r in falqon)
    live = {r["rate"]: float(r["final"]) for r in falqon[:2]}
    assert falqon[2]["rate"] == min(live, key=live.__getitem__)
    assert (root / "learning.png").read_bytes()[:4] == b"\x89PNG"
    shown = capsys.readouterr().out
    assert (root / "table.md").read_text() in shown

    def never(*_: object) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(Study, "run", never)
    assert main([*arguments, "--methods", *methods]) == 0
    with pytest.raises(SystemExit):
        main([*arguments, "--methods", *methods, "--steps", "5"])
    assert "study with other settings" in capsys.readouterr().err
    table = (root / "runs.csv").read_text()
    (root / "runs.csv").write_text(table.replace("final_16bit_inputs,", "", 1))
    with pytest.raises(SystemExit):
        main([*arguments, "--methods", *methods])
    assert "other columns" in capsys.readouterr().err


def test_measuring_does_not_disturb_the_training(arguments: list[str], tmp_path: Path) -> None:
    finals = []
    for name, every in (("often", "1"), ("seldom", "4")):
        output = str(tmp_path / name)
        given = [*arguments, "--output", output, "--eval-every", every, "--seeds", "0"]
        main([*given, "--methods", "live:rows=2", "--rates", "0.01"])
        with (tmp_path / name / "runs.csv").open(newline="") as file:
            finals.append([r["final"] for r in csv.DictReader(file)])
    assert finals[0] == finals[1]


def test_methods_are_read_from_text() -> None:
    rates, lora = (1e-3,), (2e-3,)
    method = parse_method("live:rows=all,every=4,adapter=kaiming,closing=5", rates, lora)
    assert method.policy == {"preset": "live", "rows": "all", "every": 4}
    assert (method.plugin, method.closing, method.rates) == ({"adapter": "kaiming"}, 5, rates)
    assert parse_method("lora", rates, lora).policy is None
    FalqonPrecision(update=method.policy, **method.plugin)
    for text, message in (
        ("best", "unknown method 'best'"),
        ("live:speed=3", "speed"),
        ("live:every=0", "every is 0"),
    ):
        with pytest.raises(InputError, match=message):
            parse_method(text, rates, lora)

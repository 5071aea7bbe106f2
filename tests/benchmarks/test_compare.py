"""`python -m benchmarks.compare`: two methods on a tiny model, and what it refuses."""

from __future__ import annotations

import csv
import json
from argparse import Namespace
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from benchmarks import compare, compare_report
from benchmarks.compare_breakdown import PARTS, breakdown, part_of
from benchmarks.compare_probe import Probe, fingerprints
from benchmarks.paper import PAPER
from lit_modules.methods import LoRA
from tests.method_checks import prepared


def arguments(tokenizer_dir: str, alpaca_file: str, output: Path, *more: str) -> list[str]:
    return [
        f"--model={tokenizer_dir}", f"--train={alpaca_file}", f"--output={output}",
        "--steps=8", "--eval-every=4", "--warmup=2", "--timed-steps=3", "--batch-size=4",
        "--max-length=64", "--rank=4", "--threads=1", "--accelerator=cpu", *more,
    ]  # fmt: skip


def test_two_methods_side_by_side(
    tokenizer_dir: str, alpaca_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps of each in turn, of which the first is not timed."""
    flags = arguments(tokenizer_dir, alpaca_file, tmp_path, "--methods=lora,falqon")
    assert compare.main([*flags, "--repeats=1", "--turns=3", "--paper", "--floor"]) == 0
    out = capsys.readouterr().out
    assert "x LoRA" in out and "x QLoRA" in out.split("The paper's numbers")[1]
    with (tmp_path / "compare.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"lora", "falqon"}
    for row in rows.values():
        assert int(row["timed_steps"]) == 4  # 2, 4, 5 and 7
        assert float(row["step_p20_s"]) <= float(row["step_s"]) <= float(row["step_p80_s"])
        assert float(row["val_loss"]) < float(row["val_loss_start"])
        assert int(row["peak_rss_bytes"]) > 2**27 and int(row["checkpoint_bytes"]) > 2**12
        assert 0 <= float(row["padding_share"]) < 1
        assert 0 < float(row["of_floor"]) < 1  # a tiny model: next to nothing of it is matmuls
    # B is [out, 4] in both, A [4, in] is trained by LoRA alone: 2 layers of widths 32 and 64.
    sides = [(32, 32), (16, 32), (16, 32), (32, 32), (64, 32), (64, 32), (32, 64)]
    assert int(rows["falqon"]["trainable_parameters"]) == 2 * 4 * sum(o for o, _ in sides)
    assert int(rows["lora"]["trainable_parameters"]) == 2 * 4 * sum(o + i for o, i in sides)
    assert float(rows["lora"]["speed_to_lora"]) == 1.0
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["hardware"]["cpu"]["cores"] >= 1 and record["libraries"]["torch"]
    falqon, lora = record["rounds"]["falqon"], record["rounds"]["lora"]
    assert falqon[0]["describe"]["settings"]["rank"] == lora[0]["describe"]["settings"]["rank"] == 4
    assert [s["tokens"] for s in falqon[0]["steps"]] == [s["tokens"] for s in lora[0]["steps"]]
    assert [v["step"] for v in lora[0]["validations"]][:3] == [0, 4, 8]
    spans = sorted(
        (step["start"], step["start"] + step["seconds"], number)
        for number, of in enumerate((lora, falqon))
        for step in of[0]["steps"]
    )
    assert [number for *_, number in spans] == [0, 0, 0, 1, 1, 1] * 2 + [0, 0, 1, 1]
    assert all(end <= start for (_, end, _), (start, *_) in pairwise(spans))
    parts = compare_report.breakdown(falqon)
    assert set(parts) == set(PARTS) and parts["matmul"] > 0
    assert parts["update"] > compare_report.breakdown(lora)["update"]
    assert [step["profiled"] for step in lora[0]["steps"]] == [False, True] + [False] * 6
    # Nothing but the step itself is profiled.
    assert all((step["of_floor"] is None) == step["profiled"] for step in lora[0]["steps"])
    for name in ("step_time", "loss", "breakdown"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    assert not list(tmp_path.rglob("*.ckpt"))


def test_mistakes_are_told_at_once(
    tokenizer_dir: str, alpaca_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for methods, message in (
        ("lora,nothing", "no method 'nothing'; choose from"),
        ("lora,lora", "names lora twice"),
        ("lora:compiled,lora:compiled", "names lora:compiled twice"),
        ("lora:padded", "without --packing lora runs on padded batches anyway"),
        ("lora:padd", "lora:padd has an unknown variant; choose from padded, compiled"),
        (",", "--methods is empty"),
    ):
        flags = arguments(tokenizer_dir, alpaca_file, tmp_path, f"--methods={methods}")
        assert compare.main(flags) == 2
        assert message in capsys.readouterr().err
    flags = arguments(tokenizer_dir, alpaca_file, tmp_path, "--methods=lora", "--warmup=8")
    assert compare.main(flags) == 2
    assert "leaves nothing to time" in capsys.readouterr().err
    assert set(compare.find_overlays("all")) >= {"falqon", "lora", "qlora", "full"}


def test_the_floor_is_the_cpus(
    alpaca_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    flags = arguments("model", alpaca_file, tmp_path, "--methods=lora", "--floor")
    assert compare.main([*flags, "--accelerator=auto"]) == 2
    assert "--floor measures the CPU's matmuls: add --accelerator cpu" in capsys.readouterr().err


def test_variants_of_a_method(
    tokenizer_dir: str, alpaca_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Compiling takes a minute; that it is asked for shows in what the run says of itself.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    flags = arguments(
        tokenizer_dir, alpaca_file, tmp_path, "--methods=lora,lora:padded,lora:compiled"
    )
    assert compare.main([*flags, "--repeats=1", "--packing", "--max-length=256"]) == 0
    with (tmp_path / "compare.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    packed, padded = rows["lora"], rows["lora:padded"]
    assert float(packed["tokens_per_step"]) > 1.5 * float(padded["tokens_per_step"])
    for row in rows.values():
        assert float(row["between_s"]) > 0
        assert 0 < float(row["end_to_end_tokens_per_s"]) < float(row["tokens_per_s"])
    settings = yaml.safe_load((tmp_path / "runs/lora-padded/0/run/config.yaml").read_text())
    data = settings["data"]["init_args"]
    assert data["group_by_length"] and not data["packing"]
    described = json.loads((tmp_path / "compare.json").read_text())["rounds"]
    assert described["lora:compiled"][0]["describe"]["compile"] == "decoder layers"
    assert described["lora"][0]["describe"]["compile"] == "no"


def test_ratios_where_batches_differ() -> None:
    def steps(seconds: float, tokens: int, positions: int) -> list[dict[str, Any]]:
        return [
            {**s, "seconds": seconds * (1 + i), "tokens": tokens, "positions": positions}
            for i, s in enumerate(result()["steps"])
        ]

    rounds = {
        "falqon": [result(steps=steps(1.0, 200, 200))],
        "qlora:padded": [result(steps=steps(2.0, 100, 160))],
    }
    rows = {r["method"]: r for r in compare_report.rows(rounds, Namespace(warmup=2, turns=0))}
    assert rows["falqon"]["speed_to_qlora"] == 4.0
    assert rows["qlora:padded"]["speed_to_qlora"] == 1.0
    assert rows["falqon"]["speed_to_lora"] is None


def validations(*points: tuple[int, float], pace: float = 2.0) -> list[dict[str, float]]:
    return [{"step": step, "seconds": step * pace, "loss": loss} for step, loss in points]


def result(**changes: Any) -> dict[str, Any]:
    losses = [
        {"step": s, "seconds": s * 2.0, "loss": x} for s, x in ((0, 3.0), (5, 2.5), (10, 2.0))
    ]
    return {
        "steps": [
            {
                "seconds": 1.0 + i % 2,
                "tokens": 80,
                "positions": 100,
                "profiled": False,
                "between": 0.5 if i else None,
            }
            for i in range(10)
        ],
        "validations": losses,
        "no_gradient": [],
        "unchanged": [],
        "peak_rss_bytes": 1,
        "device_bytes": None,
        "trainable": 7,
        "checkpoint_bytes": 8,
        "lr": 0.1,
        "breakdown": {},
        **changes,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"no_gradient": ["a.weight", "b.weight"]}, "a.weight and 1 more parameters"),
        ({"unchanged": ["model.layer"]}, "changed nothing in model.layer"),
        ({"validations": []}, "not measured"),
        (
            {"validations": validations((0, 2.0), (5, 2.0))},
            "did not fall: from 2.0000 to 2.0000",
        ),
        (
            {"validations": validations((0, 2.0), (5, float("nan")))},
            "did not fall",
        ),
    ],
)  # fmt: skip
def test_a_method_that_does_not_train_is_refused(
    changes: dict[str, Any], reason: str | None
) -> None:
    refusal = compare.reason_to_refuse(result(**changes))
    assert refusal is None if reason is None else reason in str(refusal)


def test_a_crash_is_reported(
    tokenizer_dir: str, alpaca_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = compare.parse(arguments(tokenizer_dir, alpaca_file, tmp_path, "--methods=lora"))
    crash = tmp_path / "python"
    crash.write_text("#!/bin/sh\necho work\necho out of memory >&2\nexit 3\n")
    crash.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(crash))
    for turns in (0, 1):
        args.turns = turns
        ((name, told),) = compare.train(args, {"lora": compare.OVERLAYS / "lora.yaml"}, 0)
        assert name == "lora" and told["error"].startswith("out of memory (see ")
    assert Path(told["error"].split("see ")[1].rstrip(")")).is_file()


def test_steps_in_turn(
    alpaca_file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = arguments("model", alpaca_file, tmp_path, "--methods=lora")
    assert [compare.parse([*flags, *more]).turns for more in ([], ["--turns"], ["--turns=4"])] == [
        0,
        1,
        4,
    ]
    steps = [{"profiled": False, "after_others": step % 2 == 0} for step in range(5)]
    kept = {turns: compare_report.timed([{"steps": steps}], 1, turns) for turns in (0, 1, 2)}
    assert [[step for _, step in kept[turns]] for turns in kept] == [
        [1, 2, 3, 4],
        [1, 2, 3, 4],
        [1, 3],
    ]
    assert compare.main([*flags, "--turns=7", "--warmup=7"]) == 2
    assert (
        "--steps 8 leaves nothing to time after --warmup 7 and the first of each 7"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        compare.parse([*flags, "--turns=-1"])
    assert "--turns must not be negative" in capsys.readouterr().err


def test_rounds_and_a_refused_method_is_left_out(
    alpaca_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int, int]] = []

    def train(
        args: Namespace, overlays: dict[str, Path], number: int
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        config = compare.base_config(args, tmp_path, number)
        probe = config["trainer"]["callbacks"][0]["init_args"]
        for name in overlays:
            seen.append((name, config["trainer"]["max_steps"], probe.get("profile_from")))
            yield name, result(unchanged=["x"]) if name == "qlora" else result()

    monkeypatch.setattr(compare, "train", train)
    flags = arguments("model", alpaca_file, tmp_path, "--methods=lora,qlora,falqon")
    assert compare.main([*flags, "--repeats=3"]) == 1
    full = [("lora", 8, None), ("qlora", 8, None), ("falqon", 8, None)]
    short = [("lora", 13, 5), ("falqon", 13, 5), ("lora", 5, None), ("falqon", 5, None)]
    assert seen == full + short
    with (tmp_path / "compare.csv").open() as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["lora", "falqon"]
    assert list(json.loads((tmp_path / "compare.json").read_text())["refused"]) == ["qlora"]


def test_the_probe_sees_what_does_not_change(tiny_llama: Any) -> None:
    method = LoRA(rank=4)
    model = prepared(method, tiny_llama)
    module = SimpleNamespace(method=method, model=model)
    probe = Probe()
    probe._before = fingerprints(method, model)
    names = list(method.trainable(model))
    owners = {name.rpartition(".")[0] for name in names}
    assert set(probe.unchanged(module)) == owners  # type: ignore[arg-type]
    with torch.no_grad():
        method.trainable(model)[names[0]].flatten()[:2] += torch.tensor([1e-3, -1e-3])
    assert set(probe.unchanged(module)) == owners - {names[0].rpartition(".")[0]}  # type: ignore[arg-type]


def test_numbers_of_the_table() -> None:
    slow = [{**step, "seconds": 3 * step["seconds"]} for step in result()["steps"]]
    rounds = {
        "lora": [result()],
        "qlora": [
            result(
                steps=slow,
                validations=validations((0, 3.0), (5, 2.4), (10, 1.9), pace=6.0),
            )
        ],
    }
    rows = {r["method"]: r for r in compare_report.rows(rounds, Namespace(warmup=2, turns=0))}
    assert list(rows) == ["lora", "qlora"]
    assert rows["lora"]["step_s"] == 1.5 and rows["qlora"]["step_s"] == 4.5
    assert rows["lora"]["speed_to_qlora"] == 3.0 and rows["qlora"]["speed_to_lora"] == 1 / 3
    assert rows["lora"]["tokens_per_s"] == pytest.approx(8 * 80 / 12)
    assert rows["lora"]["padding_share"] == pytest.approx(0.2)
    assert rows["lora"]["between_s"] == 0.5
    assert rows["lora"]["end_to_end_tokens_per_s"] == pytest.approx(8 * 80 / 16)
    # LoRA is done after 20 s; QLoRA is then two thirds of the way from 3.0 to its loss at 30 s.
    assert rows["lora"]["equal_time_s"] == 20.0
    assert rows["lora"]["val_loss_equal_time"] == rows["lora"]["val_loss"] == 2.0
    assert rows["qlora"]["val_loss_equal_time"] == pytest.approx(3.0 - 0.6 * 2 / 3)
    text = compare_report.paper_table(list(rows.values()))
    line = next(line for line in text.splitlines() if line.startswith("qlora"))
    assert "5.45" in line and "9.37" in line and "4.500" in line
    assert all(name in text for name in PAPER)
    table = compare_report.table(list(rows.values()))
    assert "GPU GiB" not in table and "of floor" not in table and "1.500" in table


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("aten::mm", "matmul"),
        ("aten::addmm", "matmul"),
        ("mkldnn::_linear_pointwise", "matmul"),
        ("aten::_to_copy", "casts"),
        ("aten::copy_", "casts"),
        ("bitsandbytes::dequantize_4bit", "casts"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::_log_softmax_backward_data", "loss"),
        ("aten::nll_loss_forward", "loss"),
        ("aten::_softmax", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::mul", "other"),
        ("aten::embedding", "other"),
        ("aten::embedding_dense_backward", "other"),
        ("falqon::dense_grad", "matmul"),
    ],
)
def test_operations_are_put_where_they_belong(name: str, part: str) -> None:
    assert part_of(name) == part


def test_what_runs_within_the_update_counts_as_update() -> None:
    def event(name: str, cpu: float, parent: Any = None, device: float = 0.0) -> Any:
        return SimpleNamespace(
            name=name,
            self_cpu_time_total=cpu,
            self_device_time_total=device,
            cpu_parent=parent,
        )

    update = event("falqon::update", 1e6)
    events = [update, event("aten::mm", 2e6, update), event("aten::mm", 4e6)]
    parts = breakdown(events)
    assert (parts["update"], parts["matmul"]) == (3.0, 4.0)
    on_gpu = breakdown([*events, event("aten::mm", 0.0, None, 5e6)])
    assert (on_gpu["update"], on_gpu["matmul"]) == (0.0, 5.0)

"""What a comparison found, as a table, CSV, JSON and plots."""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.compare_breakdown import PARTS
from benchmarks.kernel_tables import as_table
from benchmarks.paper import PAPER

Row = dict[str, Any]
Rounds = dict[str, list[dict[str, Any]]]

COLUMNS = (
    "method", "step_s", "step_p20_s", "step_p80_s", "tokens_per_s", "between_s",
    "end_to_end_tokens_per_s", "speed_to_qlora", "speed_to_lora", "of_floor", "peak_rss_bytes",
    "device_bytes", "trainable_parameters", "checkpoint_bytes", "val_loss_start", "val_loss",
    "val_loss_equal_time", "equal_time_s", "training_s", "tokens_per_step", "padding_share",
    "timed_steps", "lr",
)  # fmt: skip
_LIBRARIES = ("torch", "transformers", "lightning", "peft", "bitsandbytes", "torchao")


def versions() -> dict[str, str | None]:
    """Versions of the libraries that methods come from; None if one is not installed."""

    def get(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {name: get(name) for name in _LIBRARIES}


# -- numbers ------------------------------------------------------------------------------------


def timed(
    rounds: list[dict[str, Any]], warmup: int, turns: int = 0
) -> dict[tuple[int, int], dict[str, float]]:
    """The timed steps of all rounds, by number of round and step: see `benchmarks.compare`."""
    return {
        (number, step): entry
        for number, result in enumerate(rounds)
        for step, entry in enumerate(result["steps"])
        if step >= warmup and not entry["profiled"] and not (turns > 1 and entry["after_others"])
    }


def speed_to(ours: dict[Any, dict[str, float]], other: dict[Any, dict[str, float]]) -> float:
    """How many times faster: the median over steps on the same batch in the same round.

    Where the batches are others (packed and padded ones), what counts is tokens/s in that step.
    """
    both = [(ours[key], other[key]) for key in ours.keys() & other.keys()]
    return statistics.median(
        (b["seconds"] / a["seconds"]) * (a["tokens"] / b["tokens"]) for a, b in both
    )


def base_of(name: str, steps: dict[str, Any]) -> Any:
    """The steps of a method that others are compared with, or else of a variant of it."""
    return next((s for n, s in steps.items() if n.partition(":")[0] == name), None)


def rate(steps: dict[Any, dict[str, float]], between: float = 0.0) -> float:
    """Tokens a second, padding not counted; `between` are seconds that pass between steps."""
    seconds = sum(entry["seconds"] + between for entry in steps.values())
    return sum(entry["tokens"] for entry in steps.values()) / seconds


def curve(result: dict[str, Any]) -> list[tuple[int, float, float]]:
    """Step, seconds of training and held-out loss; the last one is of the weights as served."""
    points: dict[int, tuple[float, float]] = {}
    for entry in result["validations"]:
        points[entry["step"]] = (entry["seconds"], entry["loss"])
    return [(step, *points[step]) for step in sorted(points)]


def loss_at(result: dict[str, Any], seconds: float) -> float:
    """Held-out loss after so many seconds of training, on a line between validations."""
    points = curve(result)
    for (_, before, high), (_, after, low) in pairwise(points):
        if before <= seconds <= after:
            share = (seconds - before) / (after - before) if after > before else 1.0
            return high + share * (low - high)
    return points[-1][2]


def rows(rounds: Rounds, args: argparse.Namespace) -> list[Row]:
    """A row a method, fastest first."""
    steps = {name: timed(results, args.warmup, args.turns) for name, results in rounds.items()}
    ends = [curve(results[0])[-1][1] for results in rounds.values()]
    equal = min(ends, default=0.0)
    lora, qlora = (steps.get(n) or base_of(n, steps) for n in ("lora", "qlora"))
    found = []
    for name, results in rounds.items():
        full, own = results[0], steps[name]
        seconds = [entry["seconds"] for entry in own.values()]
        tokens = sum(entry["tokens"] for entry in own.values())
        positions = sum(entry["positions"] for entry in own.values())
        points = curve(full)
        waits = [entry["between"] for entry in own.values() if entry.get("between") is not None]
        between = statistics.fmean(waits) if waits else 0.0
        shares = [entry["of_floor"] for entry in own.values() if entry.get("of_floor") is not None]
        row = {
            "method": name,
            "step_s": statistics.median(seconds),
            "step_p20_s": _percentile(seconds, 20),
            "step_p80_s": _percentile(seconds, 80),
            "tokens_per_s": rate(own),
            "between_s": between,
            "end_to_end_tokens_per_s": rate(own, between),
            "speed_to_qlora": None if qlora is None else speed_to(own, qlora),
            "speed_to_lora": None if lora is None else speed_to(own, lora),
            "of_floor": statistics.median(shares) if shares else None,
            "peak_rss_bytes": max(result["peak_rss_bytes"] for result in results),
            "device_bytes": full["device_bytes"],
            "trainable_parameters": full["trainable"],
            "checkpoint_bytes": full["checkpoint_bytes"],
            "val_loss_start": points[0][2],
            "val_loss": points[-1][2],
            "val_loss_equal_time": loss_at(full, equal),
            "equal_time_s": equal,
            "training_s": points[-1][1],
            "tokens_per_step": tokens / len(own),
            "padding_share": 1 - tokens / positions,
            "timed_steps": len(own),
            "lr": full["lr"],
        }
        found.append(row)
    return sorted(found, key=lambda row: row["step_s"])


def _percentile(values: list[float], percent: int) -> float:
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


# -- text ---------------------------------------------------------------------------------------

_SHOWN: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("method", "method", str),
    ("step s", "step_s", lambda x: f"{x:.3f}"),
    ("p20", "step_p20_s", lambda x: f"{x:.3f}"),
    ("p80", "step_p80_s", lambda x: f"{x:.3f}"),
    ("tokens/s", "tokens_per_s", lambda x: f"{x:,.0f}"),
    ("end to end", "end_to_end_tokens_per_s", lambda x: f"{x:,.0f}"),
    ("x QLoRA", "speed_to_qlora", lambda x: f"{x:.2f}"),
    ("x LoRA", "speed_to_lora", lambda x: f"{x:.2f}"),
    ("of floor", "of_floor", lambda x: f"{x:.2f}"),
    ("RSS GiB", "peak_rss_bytes", lambda x: f"{x / 2**30:.2f}"),
    ("GPU GiB", "device_bytes", lambda x: f"{x / 2**30:.2f}"),
    ("trained", "trainable_parameters", lambda x: f"{x:,}"),
    ("ckpt MiB", "checkpoint_bytes", lambda x: f"{x / 2**20:.1f}"),
    ("loss before", "val_loss_start", lambda x: f"{x:.4f}"),
    ("after", "val_loss", lambda x: f"{x:.4f}"),
    ("at equal time", "val_loss_equal_time", lambda x: f"{x:.4f}"),
)


def table(found: list[Row]) -> str:
    """For the terminal; columns that no method has a number for are left out."""
    shown = [c for c in _SHOWN if any(row[c[1]] is not None for row in found)] or [_SHOWN[0]]
    lines = [
        ["" if row[key] is None else show(row[key]) for _, key, show in shown] for row in found
    ]
    return as_table([title for title, _, _ in shown], lines)


def paper_table(found: list[Row]) -> str:
    """This run beside the paper's: another device, model and batch, so compare ratios."""
    header = ["method", "paper", "7B s/step", "x QLoRA", "13B s/step", "MMLU Alpaca", "OASST1"]
    header += ["here s/step", "x QLoRA", "loss"]
    ours = {row["method"]: row for row in found}
    lines = []
    for name in [n for n in PAPER if n in ours] + [n for n in PAPER if n not in ours]:
        paper, row = PAPER[name], ours.get(name)
        there = [
            name,
            paper.name,
            f"{paper.step_7b:.2f}",
            f"{PAPER['qlora'].step_7b / paper.step_7b:.2f}",
            "OOM" if paper.step_13b is None else f"{paper.step_13b:.2f}",
            f"{paper.mmlu_alpaca:.4f}",
            f"{paper.mmlu_oasst1:.4f}",
        ]
        here = ["", "", ""]
        if row is not None:
            ratio = row["speed_to_qlora"]
            here = [
                f"{row['step_s']:.3f}",
                "" if ratio is None else f"{ratio:.2f}",
                f"{row['val_loss']:.4f}",
            ]
        lines.append(there + here)
    return "The paper's numbers (RTX 4090, batch 16, rank 64) beside this run's:\n" + as_table(
        header, lines
    )


# -- files --------------------------------------------------------------------------------------


def write(record: dict[str, Any], output: Path) -> None:
    """Write `compare.csv`, `compare.json` and the plots."""
    with (output / "compare.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(record["rows"])
    (output / "compare.json").write_text(json.dumps(record, indent=1) + "\n")
    found = record["rows"]
    if found:
        full = {row["method"]: record["rounds"][row["method"]][0] for row in found}
        plot_times(found, output / "step_time.png")
        plot_losses(full, output / "loss.png")
        parts = {name: breakdown(record["rounds"][name]) for name in full}
        plot_breakdown(parts, output / "breakdown.png")


def plot_times(found: list[Row], path: Path) -> None:
    """Median step time with its 20th to 80th percentile, a bar a method (the paper's Fig. 3)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.4 * len(found)), layout="constrained")
    axes = figure.subplots()
    names = [row["method"] for row in found]
    values = [row["step_s"] for row in found]
    spread = [
        [row["step_s"] - row["step_p20_s"] for row in found],
        [row["step_p80_s"] - row["step_s"] for row in found],
    ]
    colours = ["tab:orange" if name == "falqon" else "tab:blue" for name in names]
    axes.barh(names, values, xerr=spread, color=colours, ecolor="gray")
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step (median; bars to the 20th and 80th percentile)")
    figure.savefig(path, dpi=120)


def plot_losses(full: dict[str, dict[str, Any]], path: Path) -> None:
    """Held-out loss against steps, and against seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for name, result in full.items():
        points = curve(result)
        left.plot([p[0] for p in points], [p[2] for p in points], marker=".", label=name)
        right.plot([p[1] for p in points], [p[2] for p in points], marker=".", label=name)
    left.set_xlabel("optimizer steps")
    right.set_xlabel("seconds of training")
    left.set_ylabel("held-out loss, nats a token")
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def breakdown(rounds: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds by part, mean of the steps that were profiled, in whichever round these were."""
    return next((dict(r["breakdown"]) for r in rounds if r.get("breakdown")), {})


def plot_breakdown(parts: dict[str, dict[str, float]], path: Path) -> None:
    """Seconds of a step by part, a bar a method (the paper's Fig. 4)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.4 + 0.4 * len(parts)), layout="constrained")
    axes = figure.subplots()
    names = list(parts)
    start = [0.0] * len(names)
    for part in PARTS:
        values = [parts[name].get(part, 0.0) for name in names]
        axes.barh(names, values, left=start, label=part)
        start = [a + b for a, b in zip(start, values, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds a step, by the profiler (which slows it down)")
    axes.legend(fontsize="small", ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, dpi=120)

"""Results of an evaluation: one JSON object, one table, and flat metrics for loggers."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from falqon.version import __version__

# Task, few-shot examples, metric, then a column a model and the difference.
_Row = tuple[str, str, str, list[str]]


def versions() -> dict[str, str]:
    """Versions of what results depend on."""
    found = {"python": platform.python_version(), "falqon": __version__}
    for package in ("torch", "transformers", "tokenizers", "lm_eval", "datasets"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def metrics(result: Mapping[str, Any], prefix: str = "eval") -> dict[str, float]:
    """A model's results as `eval/<task>/<metric>`, for loggers.

    Args:
        result: One entry of `results`.
        prefix: What the names begin with.
    """
    flat = {
        f"{prefix}/{task}/{metric}": value
        for task, found in result.get("tasks", {}).items()
        for metric, value in found["metrics"].items()
    }
    if result.get("average") is not None:
        flat[f"{prefix}/commonsense_average/acc"] = result["average"]
    for name in ("loss", "perplexity", "bits_per_byte"):
        if result.get("perplexity"):
            flat[f"{prefix}/text/{name}"] = result["perplexity"][name]
    return flat


def format_table(report: Mapping[str, Any]) -> str:
    """The results side by side, base first, without a line end after the last."""
    results: Mapping[str, Any] = report["results"]
    columns = [name for name in ("base", "model") if name in results]
    rows = [
        *_task_rows(report["tasks"], [results[name] for name in columns]),
        *_text_rows([results[name] for name in columns]),
    ]
    head = ["task", "n-shot", "metric", *columns, *(["difference"] if len(columns) > 1 else [])]
    table = [head, *([task, shots, metric, *cells] for task, shots, metric, cells in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([*_heads(report, columns), "", *lines])


def _heads(report: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    lines = []
    for name in columns:
        about = report[name]
        step = f", step {about['step']}" if about["step"] is not None else ""
        where = about["file"] if about["kind"] == "checkpoint" else about["name"]
        lines.append(f"{name:<8} {where} ({about['weights']}{step})")
    settings, result = report["settings"], report["results"][columns[-1]]
    done = [f"BOS {'added' if result['add_bos'] else 'not added'}"]
    if report["tasks"]:
        limit = settings["limit"]
        done.append("all questions" if limit is None else f"limit {limit:g}")
        done.append(f"chat template {'on' if settings['chat_template'] else 'off'}")
    if result.get("perplexity"):
        text = result["perplexity"]
        done.append(f"window {text['window']}, stride {text['stride']}")
    return [*lines, f"{'settings':<8} {', '.join(done)}"]


def _task_rows(names: Sequence[str], results: Sequence[Mapping[str, Any]]) -> list[_Row]:
    rows: list[_Row] = []
    for name in names:
        found = [result["tasks"][name] for result in results]
        shots = "-" if found[0]["n_shot"] is None else str(found[0]["n_shot"])
        for metric in found[0]["metrics"]:
            values = [f["metrics"][metric] for f in found]
            errors = [f["stderr"].get(metric) for f in found]
            cells = [
                f"{value:.4f}" + (f" +-{error:.4f}" if error is not None else "")
                for value, error in zip(values, errors, strict=True)
            ]
            rows.append((name, shots, metric, cells + _difference(values)))
    averages = [result.get("average") for result in results]
    if averages and None not in averages:
        values = [float(a) for a in averages if a is not None]
        cells = [f"{value:.4f}" for value in values]
        rows.append(("commonsense average", "", "acc", cells + _difference(values)))
    return rows


def _text_rows(results: Sequence[Mapping[str, Any]]) -> list[_Row]:
    if not results[0].get("perplexity"):
        return []
    rows: list[_Row] = []
    for name in ("loss", "perplexity", "bits_per_byte"):
        values = [result["perplexity"][name] for result in results]
        cells = [f"{value:.4f}" for value in values]
        rows.append(("text", "", name, cells + _difference(values)))
    return rows


def _difference(values: Sequence[float]) -> list[str]:
    return [f"{values[1] - values[0]:+.4f}"] if len(values) > 1 else []

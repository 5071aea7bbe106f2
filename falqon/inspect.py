"""What a file or directory of FALQON holds, whichever kind it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from falqon.checkpoint import inspect as checkpoint
from falqon.delta.directory import is_delta, open_delta
from falqon.export.directory import open_export
from falqon.premeld.directory import open_melded


def inspect(path: str | Path) -> dict[str, Any]:
    """Describe a checkpoint, or a directory that `falqon meld` or `falqon export` wrote.

    Everything is compared with the hashes that were written with it.

    Args:
        path: A checkpoint file, the directory of a run, or one of those.

    Returns:
        Plain values, ready for JSON. For a checkpoint see
        `falqon.checkpoint.inspect.inspect_checkpoint`. For a directory `path`, `kind` (`melded`,
        `delta`, `export`), `bytes` of its files, and what its manifest says.

    Raises:
        InputError: It is damaged, and where; or nothing of FALQON.
    """
    path = Path(path).expanduser()
    if is_delta(path):
        delta = open_delta(path)
        delta.changes()
        return _describe(path, "delta", delta.manifest)
    melded = open_melded(path)
    if melded is not None:
        melded.check()
        return _describe(path, "melded", melded.manifest)
    exported = open_export(path)
    if exported is not None:
        return _describe(path, "export", exported)
    return checkpoint.inspect_checkpoint(path)


def _describe(path: Path, kind: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    size = sum(file["bytes"] for file in manifest["files"].values())
    return {"path": str(path), "kind": kind, "bytes": size, **manifest}


def format_report(report: Mapping[str, Any]) -> str:
    """Lay out the result of `inspect` for a terminal, without a line end after the last."""
    if "kind" not in report:
        return checkpoint.format_report(report)
    lines = [f"{label:<16}  {value}" for label, value in _rows(report)]
    lines.append("settings" if "settings" in report else "files")
    if "settings" in report:
        lines += [f"  {key:<30} {value}" for key, value in _flat(report["settings"])]
        lines.append("files")
    lines += [f"  {file['sha256']}  {name}" for name, file in report["files"].items()]
    return "\n".join(lines)


def _rows(report: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "directory", report["path"]
    yield "kind", report["kind"] if report["kind"] != "export" else f"export ({report['as']})"
    yield "bytes", f"{report['bytes']:,}"
    if report["kind"] == "melded":
        source = report["source"]
        yield "source", f"{source['name']}, SHA-256 {source['sha256']}"
        yield "melded layers", len(report["layers"])
        yield "originals", "kept" if report["originals"] else "not kept"
        return
    model = report["model"]
    yield "model", model["name"] if isinstance(model, Mapping) else model
    yield "global step", report["global_step"]
    if report["kind"] == "delta":
        layers = report["layers"].values()
        codes = sum(layer["out"] * layer["in"] for layer in layers)
        changed = sum(layer["codes"] for layer in layers)
        yield "base SHA-256", report["base"]["sha256"]
        yield "melded layers", len(layers)
        yield "codes changed", f"{changed:,} of {codes:,} ({changed / codes:.2%})"
    else:
        yield "melded layers", report["melded_layers"]
        yield "other layers", ", ".join(report["ignore"]) or "none"
    yield "training SHA-256", report["training_sha256"]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value

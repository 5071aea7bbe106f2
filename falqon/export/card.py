"""The model card of an export: how the model came about, and the hashes of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from falqon.errors import InputError
from falqon.export.source import Trained
from falqon.version import __version__

_LOSSES = {
    "val_loss_base": "untuned base",
    "val_loss_before": "before training, as melded",
    "val_loss_after": "after training, of these weights",
}


def model_card(report: dict[str, Any], trained: Trained, base: str | None) -> str:
    """Text of README.md.

    Args:
        report: Of the export, without `output`.
        trained: The checkpoint.
        base: Hub id of the model that was trained, None if it is not from a hub.
    """
    settings = trained.settings
    header: dict[str, Any] = {"library_name": "transformers", "tags": ["falqon", "fp8"]}
    if base:
        header["base_model"] = base
    weights = (
        "linear layers are FP8 (E4M3, compressed-tensors, one scale a row, dynamic scales of "
        "activations per token), all else is bf16. Linear layers not in FP8:"
        f" {', '.join(f'`{name}`' for name in report['ignore']) or 'none'}."
        if report["format"] == "compressed-tensors"
        else f"all of it is bf16, the {report['melded_layers']} melded linear layers too."
    )
    parts = [
        f"---\n{yaml.safe_dump(header, sort_keys=False)}---",
        "# Fine-tuned with FALQON",
        f"Trained from `{report['model']}` for {report['global_step']} optimizer steps with FALQON "
        f"(LoRA melded into an FP8 backbone, arXiv:2510.24061), update preset "
        f"`{settings['update']}`, rank {settings['rank']}. The weights hold everything that was "
        f"learned by then: {weights}",
        _rounded(report),
        "## Losses",
        _losses(trained),
        "## Method",
        _block(settings),
        "## Data",
        _data(trained),
        "## Hashes",
        f"Training state (`falqon inspect`): `{report['training_sha256']}`. Written by falqon "
        f"{__version__}. SHA-256 of the files:",
        "\n".join(f"    {f['sha256']}  {name}" for name, f in report["files"].items()),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _rounded(report: dict[str, Any]) -> str:
    count = len(report["rounded"])
    if not count:
        return "Every value is that of the checkpoint."
    return (
        f"{count} tensors hold values that bf16 does not (`{report['rounded'][0]}` is the first): "
        "they were rounded."
    )


def _losses(trained: Trained) -> str:
    """Of the run's summary, if that is of the same step."""
    path = trained.run / "summary.json" if trained.run else None
    if path is None or not path.is_file():
        return "Not recorded beside the checkpoint."
    summary = _read(path)
    if summary.get("steps") != trained.step:
        return f"Not recorded for step {trained.step}."
    rows = [
        f"| {title} | {summary[key]:.4f} |"
        for key, title in _LOSSES.items()
        if summary.get(key) is not None
    ]
    return "\n".join(["| validation loss | |", "|---|---|", *rows]) if rows else "Not measured."


def _data(trained: Trained) -> str:
    if trained.run is None:
        return "Not recorded beside the checkpoint."
    data = _read(trained.run / "config.yaml").get("data")
    return _block(data) if data else "Not recorded beside the checkpoint."


def _read(path: Path) -> dict[str, Any]:
    """A mapping in YAML, which JSON is too."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise InputError(f"{path} cannot be read ({reason}). Repair it or move it away.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no mapping. Repair it or move it away.")
    return content


def _block(settings: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"

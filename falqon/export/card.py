"""The model card of an export: how the model came about, and the hashes of its files."""

from __future__ import annotations

from typing import Any

import yaml

from falqon.export.source import LOSSES, Trained
from falqon.version import __version__


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
        _losses(trained.losses),
        "## Method",
        _block(settings),
        "## Data",
        _block(trained.data) if trained.data else "Not recorded beside the checkpoint.",
        "## Hashes",
        f"Training state, as `falqon inspect RUN/served.ckpt` shows it: "
        f"`{report['training_sha256']}`. Written by falqon {__version__}. SHA-256 of the files:",
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


def _losses(losses: dict[str, float] | str) -> str:
    if isinstance(losses, str):
        return losses
    rows = [f"| {LOSSES[key]} | {value:.4f} |" for key, value in losses.items()]
    return "\n".join(["| validation loss | |", "|---|---|", *rows])


def _block(settings: dict[str, Any]) -> str:
    return f"```yaml\n{yaml.safe_dump(settings, sort_keys=False)}```"

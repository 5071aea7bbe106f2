"""What is exported: a checkpoint, read, checked, and with nothing pending."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from falqon.checkpoint import LAST, SERVED, CheckpointError, read_checkpoint, read_header
from falqon.checkpoint.inspect import (
    PLUGIN_KEY,
    MeldedLayer,
    find_melded_layers,
    locate_checkpoint,
)
from falqon.precision import STATE_VERSION

_MODEL_PREFIX = "model."


@dataclass(frozen=True)
class Trained:
    """A checkpoint whose codes are all that was learned.

    Attributes:
        file: It.
        checkpoint: Its content, mapped from the file.
        state: Tensors by their names in the Hugging Face model; layer `X` has `X.codes`
            [out + r, in], `X.scale` [1] and `X.B` [out, r] instead of `X.weight`.
        layers: The melded layers by full name.
    """

    file: Path
    checkpoint: Mapping[str, Any]
    state: Mapping[str, Tensor]
    layers: Mapping[str, MeldedLayer]

    @property
    def step(self) -> int:
        """Optimizer steps of the training."""
        return int(self.checkpoint["global_step"])

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of the method, as the precision plugin saved them."""
        return dict(self.checkpoint[PLUGIN_KEY]["settings"])

    @property
    def origin(self) -> Mapping[str, Any]:
        """Where the model came from: `model_name`, `revision`; empty if it is not recorded."""
        return dict(self.checkpoint.get("LitCausalLM") or {})

    @property
    def run(self) -> Path | None:
        """The run's directory, if the file still is in one."""
        for directory in self.file.resolve().parents[:2]:
            if (directory / "config.yaml").is_file():
                return directory
        return None


def read_trained(path: str | Path) -> Trained:
    """Read a checkpoint for export.

    Args:
        path: A checkpoint file, or a run's directory: its served.ckpt, or its last checkpoint if
            there is none.

    Raises:
        CheckpointError: The file cannot be read, was not made by FALQON, does not fit together,
            has a scale that is no scale, or has changes that are not in the codes yet.
    """
    file = _locate(Path(path))
    checkpoint = read_checkpoint(file, mmap=True)
    plugin = checkpoint.get(PLUGIN_KEY)
    if not isinstance(plugin, Mapping):
        raise CheckpointError(
            f"{file} is not a FALQON checkpoint: it has no {PLUGIN_KEY!r} entry. It is one of a "
            "run with another method; give one of a FALQON run."
        )
    if plugin.get("version") != STATE_VERSION or not isinstance(plugin.get("settings"), Mapping):
        raise CheckpointError(
            f"{file} has plugin state version {plugin.get('version')}, this release reads version "
            f"{STATE_VERSION}: use the release that wrote it."
        )
    state = {
        name.removeprefix(_MODEL_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if isinstance(value, Tensor)
    }
    layers = {layer.fqn: layer for layer in find_melded_layers(state, file)}
    if not layers:
        raise CheckpointError(f"{file} has no melded layer. Use another checkpoint of the run.")
    trained = Trained(file, checkpoint, state, layers)
    for fqn in layers:
        _check_layer(trained, fqn)
    _refuse_pending(trained, plugin)
    return trained


def _locate(path: Path) -> Path:
    served = path / SERVED
    if not served.exists():
        return locate_checkpoint(path)
    if (path / LAST).exists():
        steps = [read_header(f).get("global_step") for f in (served, path / LAST)]
        if steps[0] != steps[1]:
            raise CheckpointError(
                f"{served} is of step {steps[0]} and {path / LAST} of step {steps[1]}: the run "
                "went on and has not ended. Let it end (fit with --ckpt_path last), or name the "
                "file that you want."
            )
    return served


def _check_layer(trained: Trained, fqn: str) -> None:
    codes, scale = trained.state[f"{fqn}.codes"], trained.state[f"{fqn}.scale"]
    if scale.shape != (1,) or scale.dtype != torch.float32:
        raise CheckpointError(
            f"{trained.file}: {fqn}.scale is {scale.dtype} {tuple(scale.shape)}, not one float32. "
            "Use another checkpoint of the run."
        )
    value = float(scale)
    if not 0 < value < float("inf") or not 0 < 1 / value < float("inf"):
        raise CheckpointError(
            f"{trained.file}: {fqn}.scale is {value}, which is no scale: the file is damaged or "
            "the training diverged. Use an earlier checkpoint of the run."
        )
    expected = torch.float32 if trained.settings["recipe"]["emulate"] == "none" else torch.uint8
    if codes.dtype != expected:
        raise CheckpointError(
            f"{trained.file}: {fqn}.codes is {codes.dtype}, and the recipe makes {expected}. "
            "Use another checkpoint of the run."
        )


def _refuse_pending(trained: Trained, plugin: Mapping[str, Any]) -> None:
    """Refuse what would differ from the model that was validated at the end of the run."""
    rows = sum(int((trained.state[f"{fqn}.B"] != 0).any(dim=1).sum()) for fqn in trained.layers)
    reasons = [f"{rows} rows of B hold changes"] if rows else []
    if _needs_compensation(trained, plugin):
        reasons.append("the codes have not been rounded with a look at training data")
    if not reasons:
        return
    run = trained.run
    config = run / "config.yaml" if run else "RUN/config.yaml"
    there = f" Export {run / SERVED}, or" if run and (run / SERVED).exists() else " To"
    raise CheckpointError(
        f"{trained.file} (step {trained.step}) is not what would be served: "
        f"{' and '.join(reasons)} that only the end of a run writes.{there} write them now: "
        f"python train.py fit --config {config} --ckpt_path {trained.file} --trainer.max_steps "
        f"{trained.step} --trainer.default_root_dir NEW_DIRECTORY, then falqon export "
        "NEW_DIRECTORY."
    )


def _needs_compensation(trained: Trained, plugin: Mapping[str, Any]) -> bool:
    policy, proxy = trained.settings["policy"], plugin.get("proxy") or {}
    if policy["flush_rounding"] != "compensated" or proxy.get("closed", False):
        return False
    if trained.settings["recipe"]["emulate"] == "none":
        return False
    return any((proxy.get("steps") or {}).values())

"""What is exported: a checkpoint, read, checked, and with nothing pending."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from falqon.checkpoint import (
    LAST,
    SERVED,
    CheckpointError,
    read_checkpoint,
    read_header,
    training_hash,
)
from falqon.checkpoint import changes as changes_module
from falqon.checkpoint.base import BaseHash
from falqon.checkpoint.inspect import (
    PLUGIN_KEY,
    MeldedLayer,
    checkpoint_layers,
    locate_checkpoint,
    model_state,
)
from falqon.delta.base import open_base
from falqon.delta.state import ChangedState, CheckpointState
from falqon.errors import InputError
from falqon.precision import READS_VERSIONS

LOSSES = {
    "val_loss_base": "untuned base",
    "val_loss_before": "before training, as melded",
    "val_loss_after": "after training, of these weights",
}
"""What a run's summary has, with what it is."""


@dataclass(frozen=True)
class Trained:
    """A trained model whose codes are all that was learned.

    Attributes:
        file: Where it was read.
        step: Optimizer steps of the training.
        settings: Of the method, as the precision plugin saved them.
        origin: Where the model came from: `model_name`, `revision`; empty if it is not recorded.
        base: Hashes of what it was trained from; None if an older release wrote it.
        losses: Of the run, by their keys in `LOSSES`; or why there are none.
        data: Settings of its data; empty if they are not recorded.
        training_sha256: Of the checkpoint, see `falqon.checkpoint.training_hash`.
        state: Tensors by their names in the Hugging Face model; layer `X` has `X.codes`
            [out (+ r), in], `X.scale` [1] and maybe `X.B` [out, r] instead of `X.weight`.
        layers: The melded layers by full name.
        scaling: State of delayed scaling; empty without it.
    """

    file: Path
    step: int
    settings: dict[str, Any]
    origin: Mapping[str, Any]
    base: BaseHash | None
    losses: dict[str, float] | str
    data: dict[str, Any]
    training_sha256: str
    state: Mapping[str, Tensor]
    layers: Mapping[str, MeldedLayer]
    scaling: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of all tensors in `state`, without making any."""
        if isinstance(self.state, ChangedState):
            return self.state.shapes
        return {name: tuple(tensor.shape) for name, tensor in self.state.items()}


def read_trained(
    path: str | Path,
    model: str | None = None,
    revision: str | None = None,
    *,
    pending: bool = False,
) -> Trained:
    """Read a checkpoint for export, or for use.

    Args:
        path: A checkpoint file, or a run's directory: its served.ckpt, or its last checkpoint if
            there is none.
        model, revision: Where the model is that it was trained from, which checkpoints with
            changes only are read against; None for what the checkpoint says.
        pending: Take a checkpoint with changes that are not in the codes yet.

    Raises:
        CheckpointError: The file cannot be read, was not made by FALQON, does not fit together,
            has a scale that is no scale, or has changes that are not in the codes yet.
        InputError: It holds changes, and the model that they belong to is not there.
    """
    file = _locate(Path(path))
    checkpoint = read_checkpoint(file, mmap=True)
    plugin = checkpoint.get(PLUGIN_KEY)
    if not isinstance(plugin, Mapping):
        raise CheckpointError(
            f"{file} is not a FALQON checkpoint: it has no {PLUGIN_KEY!r} entry. It is one of a "
            "run with another method; give one of a FALQON run."
        )
    if plugin.get("version") not in READS_VERSIONS or not isinstance(
        plugin.get("settings"), Mapping
    ):
        raise CheckpointError(
            f"{file} has plugin state version {plugin.get('version')}, this release reads versions "
            f"{READS_VERSIONS}: use the release that wrote it."
        )
    own = model_state(checkpoint)
    layers = {layer.fqn: layer for layer in checkpoint_layers(checkpoint, own, file)}
    if not layers:
        raise CheckpointError(f"{file} has no melded layer. Use another checkpoint of the run.")
    settings, run = dict(plugin["settings"]), _run_of(file)
    changes = checkpoint.get(changes_module.KEY)
    if changes is None:
        scales = {fqn: own[f"{fqn}.scale"] for fqn in layers}
        codes = {fqn: own[f"{fqn}.codes"] for fqn in layers}
    else:
        scales = dict(zip(layers, changes["scales"].split(1), strict=True))
        codes = changes["codes"]
    for fqn in layers:
        _check_layer(file, fqn, codes[fqn], scales[fqn], settings)
    if not pending:
        _refuse_pending(checkpoint, file, own, list(layers), run)
    origin = dict(checkpoint.get("LitCausalLM") or {})
    base = BaseHash.read(plugin.get("base"))
    state: Mapping[str, Tensor] = own
    if changes is not None:
        name, revision = origin_of(file, origin, model, revision)
        opened = open_base(name, revision, settings, base)
        state = CheckpointState(changes, layers, scales, own, opened)
    step = int(checkpoint["global_step"])
    return Trained(
        file=file,
        step=step,
        settings=settings,
        origin=origin,
        base=base,
        losses=_losses(run, step),
        data=dict(_read(run / "config.yaml").get("data") or {}) if run else {},
        training_sha256=training_hash(checkpoint),
        state=state,
        layers=layers,
        scaling=dict(plugin.get("scaling") or {}),
    )


def origin_of(
    file: Path, origin: Mapping[str, Any], model: str | None, revision: str | None
) -> tuple[str, str | None]:
    """Model and revision that were trained, given or recorded.

    Raises:
        InputError: Neither is.
    """
    name = model or origin.get("model_name")
    if not name:
        raise InputError(f"{file} does not say which model was trained. Name it with --model.")
    return name, revision or (None if model else origin.get("revision"))


def _run_of(file: Path) -> Path | None:
    """The run's directory, if the file still is in one."""
    for directory in file.resolve().parents[:2]:
        if (directory / "config.yaml").is_file():
            return directory
    return None


def _losses(run: Path | None, step: int) -> dict[str, float] | str:
    """Of the run's summary, if that is of the same step."""
    path = run / "summary.json" if run else None
    if path is None or not path.is_file():
        return "Not recorded beside the checkpoint."
    summary = _read(path)
    if summary.get("steps") != step:
        return f"Not recorded for step {step}."
    found = {key: float(summary[key]) for key in LOSSES if summary.get(key) is not None}
    return found or "Not measured."


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


def check_scale(file: Path, fqn: str, scale: Tensor) -> None:
    """Refuse a scale that is none.

    Raises:
        CheckpointError: It is not one positive, finite float32.
    """
    if scale.shape != (1,) or scale.dtype != torch.float32:
        raise CheckpointError(
            f"{file}: {fqn}.scale is {scale.dtype} {tuple(scale.shape)}, not one float32. "
            "Use another checkpoint of the run."
        )
    value = float(scale)
    if not 0 < value < float("inf") or not 0 < 1 / value < float("inf"):
        raise CheckpointError(
            f"{file}: {fqn}.scale is {value}, which is no scale: the file is damaged or "
            "the training diverged. Use an earlier checkpoint of the run."
        )


def _check_layer(
    file: Path, fqn: str, codes: Tensor, scale: Tensor, settings: Mapping[str, Any]
) -> None:
    check_scale(file, fqn, scale)
    expected = torch.float32 if settings["recipe"]["emulate"] == "none" else torch.uint8
    if codes.dtype != expected:
        raise CheckpointError(
            f"{file}: {fqn}.codes is {codes.dtype}, and the recipe makes {expected}. "
            "Use another checkpoint of the run."
        )


def _refuse_pending(
    checkpoint: Mapping[str, Any],
    file: Path,
    state: Mapping[str, Tensor],
    layers: list[str],
    run: Path | None,
) -> None:
    """Refuse what would differ from the model that was validated at the end of the run."""
    rows = sum(int((state[f"{fqn}.B"] != 0).any(dim=1).sum()) for fqn in layers)
    reasons = [f"{rows} rows of B hold changes"] if rows else []
    if _needs_compensation(checkpoint[PLUGIN_KEY]):
        reasons.append("the codes have not been rounded with a look at training data")
    if not reasons:
        return
    step = checkpoint["global_step"]
    config = run / "config.yaml" if run else "RUN/config.yaml"
    there = f" Export {run / SERVED}, or" if run and (run / SERVED).exists() else " To"
    raise CheckpointError(
        f"{file} (step {step}) is not what would be served: "
        f"{' and '.join(reasons)} that only the end of a run writes.{there} write them now: "
        f"python train.py fit --config {config} --ckpt_path {file} --trainer.max_steps "
        f"{step} --trainer.default_root_dir NEW_DIRECTORY, then falqon export "
        "NEW_DIRECTORY. (falqon generate and evaluate take it as it is with --as-trained.)"
    )


def _needs_compensation(plugin: Mapping[str, Any]) -> bool:
    settings, proxy = plugin["settings"], plugin.get("proxy") or {}
    if settings["policy"]["flush_rounding"] != "compensated" or proxy.get("closed", False):
        return False
    if settings["recipe"]["emulate"] == "none":
        return False
    return any((proxy.get("steps") or {}).values())

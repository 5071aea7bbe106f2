"""What a FALQON checkpoint holds: read, checked against its own shapes, summarised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from falqon.checkpoint import changes as changes_module
from falqon.checkpoint.base import BaseHash
from falqon.checkpoint.hashing import training_hash
from falqon.checkpoint.io import LAST, CheckpointError, read_checkpoint
from falqon.checkpoint.sharded import is_sharded

METHOD = "FALQON"
PLUGIN_KEY = "FalqonPrecision"
_MODEL_PREFIX = "model."


@dataclass(frozen=True)
class MeldedLayer:
    """Shape of one melded linear layer.

    Attributes:
        fqn: Full name in the model.
        out_features: Rows of the backbone.
        in_features: Columns of the backbone.
        rank: Rows of A, stacked under the backbone, and columns of B.
    """

    fqn: str
    out_features: int
    in_features: int
    rank: int


def locate_checkpoint(path: str | Path) -> Path:
    """Find the checkpoint file that a path means.

    Args:
        path: A checkpoint file, or the directory of a run.

    Returns:
        The file; for a run's directory its `checkpoints/last.ckpt`.

    Raises:
        CheckpointError: The directory has no such file.
    """
    path = Path(path)
    if not path.is_dir() or is_sharded(path):
        return path
    if (path / LAST).exists():
        return path / LAST
    others = sorted(str(file.relative_to(path)) for file in path.rglob("*.ckpt"))
    there = (
        f" It holds {', '.join(others[:5])}: name one." if others else " It holds no .ckpt file."
    )
    raise CheckpointError(f"{path} is a directory without {LAST}.{there}")


def inspect_checkpoint(path: str | Path) -> dict[str, Any]:
    """Describe a FALQON checkpoint.

    Args:
        path: A checkpoint file, or the directory of a run (then its `checkpoints/last.ckpt`).

    Returns:
        Plain values only, ready for JSON: `path`, `method`, `holds` (`all weights`, or
        `changes` against a base), `base_sha256` (None if it is not known), `global_step`,
        `epoch`, `settings` (as the precision plugin saved them), `melded` (groups of equal
        layers: `count`, `out`,
        `in`, `rank`), `not_melded` (name to reason), `parameters` (numbers by kind), `bytes` (by
        kind), `file_bytes`, `pending_rows` (rows of B whose
        change is not in the codes yet) and `training_sha256`.

    Raises:
        CheckpointError: The file cannot be read, was not made by FALQON, or its tensors do not
            fit together.
    """
    file = locate_checkpoint(path)
    checkpoint = read_checkpoint(file, mmap=True)
    plugin = checkpoint.get(PLUGIN_KEY)
    if not isinstance(plugin, Mapping):
        raise CheckpointError(
            f"{file} is not a FALQON checkpoint: it has no {PLUGIN_KEY!r} entry. It is a "
            "checkpoint of Lightning, of a run with another method; give one of a FALQON run."
        )
    state = model_state(checkpoint)
    layers = checkpoint_layers(checkpoint, state, file)
    base = BaseHash.read(plugin.get("base"))
    groups = Counter((layer.out_features, layer.in_features, layer.rank) for layer in layers)
    return {
        "path": str(file),
        "method": METHOD,
        "holds": "changes" if changes_module.is_small(checkpoint) else "all weights",
        "base_sha256": base.sha256 if base else None,
        "global_step": checkpoint.get("global_step"),
        "epoch": checkpoint.get("epoch"),
        "settings": _plain(plugin.get("settings", {})),
        "melded": [
            {"count": count, "out": rows, "in": columns, "rank": rank}
            for (rows, columns, rank), count in sorted(groups.items())
        ],
        "not_melded": _plain(plugin.get("skipped", {})),
        "parameters": _count_parameters(state, layers, checkpoint),
        "bytes": _count_bytes(state, layers, checkpoint),
        "file_bytes": sum(f.stat().st_size for f in (file.rglob("*") if file.is_dir() else [file])),
        "pending_rows": sum(
            int((state[f"{layer.fqn}.B"] != 0).any(dim=1).sum()) for layer in layers
        ),
        "training_sha256": training_hash(checkpoint),
    }


def model_state(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors of a checkpoint by their names in the Hugging Face model."""
    return {
        name.removeprefix(_MODEL_PREFIX): value
        for name, value in checkpoint["state_dict"].items()
        if isinstance(value, Tensor)
    }


def checkpoint_layers(
    checkpoint: Mapping[str, Any], state: Mapping[str, Tensor], file: str | Path
) -> list[MeldedLayer]:
    """Melded layers of a checkpoint, with all weights or with changes only.

    Args:
        checkpoint: It.
        state: What `model_state` gives.
        file: Where it comes from, for the error.

    Raises:
        CheckpointError: A layer lacks a tensor, or shapes disagree.
    """
    if not changes_module.is_small(checkpoint):
        return find_melded_layers(state, file)
    changes = checkpoint[changes_module.KEY]
    changes_module.check_rows(changes, str(file))
    layers = [MeldedLayer(fqn, *shape) for fqn, shape in changes["shapes"].items()]
    for layer in layers:
        proxy = state.get(f"{layer.fqn}.B")
        if proxy is None or proxy.shape != (layer.out_features, layer.rank):
            raise CheckpointError(
                f"{file}: the melded layer {layer.fqn} has no {layer.fqn}.B of its shape. The "
                "checkpoint is incomplete; use another one of the run."
            )
    return layers


def find_melded_layers(state: Mapping[str, Tensor], file: str | Path) -> list[MeldedLayer]:
    """Melded layers of a state dict, each checked to be whole.

    Args:
        state: Tensors by name. Layer `X` owns `X.codes` [out + r, in], `X.scale` and
            `X.B` [out, r].
        file: Where they come from, for the error.

    Returns:
        The layers, in the order of `state`.

    Raises:
        CheckpointError: A layer lacks a tensor, or their shapes disagree.
    """
    layers = []
    for name, codes in state.items():
        if not name.endswith(".codes"):
            continue
        fqn = name.removesuffix(".codes")
        proxy, scale = state.get(f"{fqn}.B"), state.get(f"{fqn}.scale")
        if proxy is None or scale is None:
            part = "B" if proxy is None else "scale"
            raise CheckpointError(
                f"{file}: the melded layer {fqn} has codes but no {fqn}.{part}. The checkpoint is "
                "incomplete; use another one of the run."
            )
        if codes.dim() != 2 or proxy.dim() != 2 or codes.shape[0] != sum(proxy.shape):
            raise CheckpointError(
                f"{file}: the shapes of layer {fqn} disagree: codes {tuple(codes.shape)} should "
                f"have out + rank rows for B {tuple(proxy.shape)} (out, rank). "
                "Use another checkpoint of the run."
            )
        layers.append(MeldedLayer(fqn, proxy.shape[0], codes.shape[1], proxy.shape[1]))
    return layers


def _kinds(layers: list[MeldedLayer]) -> dict[str, str]:
    parts = (("codes", "codes"), ("scale", "scales"), ("B", "B"))
    return {f"{layer.fqn}.{part}": kind for layer in layers for part, kind in parts}


def _count_parameters(
    state: Mapping[str, Tensor], layers: list[MeldedLayer], checkpoint: Mapping[str, Any]
) -> dict[str, int]:
    kinds = _kinds(layers)
    melded = sum(layer.out_features * layer.in_features for layer in layers)
    other = sum(t.numel() for name, t in _distinct(state) if name not in kinds)
    other += checkpoint.get(changes_module.KEY, {}).get("frozen", 0)
    return {
        "model": melded + other,
        "melded_backbone": melded,
        "other": other,
        "adapter_A": sum(layer.rank * layer.in_features for layer in layers),
        "trainable_B": sum(layer.out_features * layer.rank for layer in layers),
    }


def _count_bytes(
    state: Mapping[str, Tensor], layers: list[MeldedLayer], checkpoint: Mapping[str, Any]
) -> dict[str, int]:
    kinds = _kinds(layers)
    names = ("codes", "scales", "B", "other_weights", "optimizer_state", "update_state")
    sizes = dict.fromkeys(names, 0)
    for name, tensor in _distinct(state):
        sizes[kinds.get(name, "other_weights")] += tensor.nbytes
    sizes["optimizer_state"] = sum(
        tensor.nbytes for tensor in _tensors(checkpoint.get("optimizer_states"))
    )
    changes = checkpoint.get(changes_module.KEY, {})
    sizes["codes"] += sum(tensor.nbytes for tensor in _tensors(changes.get("codes")))
    sizes["update_state"] += sum(tensor.nbytes for tensor in _tensors(changes.get("rows")))
    sizes["scales"] += sum(tensor.nbytes for tensor in _tensors(changes.get("scales")))
    policy = checkpoint[PLUGIN_KEY].get("proxy")
    sizes["update_state"] += sum(tensor.nbytes for tensor in _tensors(policy))
    return sizes


def _distinct(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor once: tied weights have two names and one memory, in the file too."""
    seen = set()
    for name, tensor in state.items():
        key = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape)
        if tensor.numel() and key in seen:
            continue
        seen.add(key)
        yield name, tensor


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def _plain(value: Any) -> Any:
    """A value as JSON can hold it; what JSON does not know becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def format_report(report: Mapping[str, Any]) -> str:
    """Lay out the result of `inspect_checkpoint` for a terminal.

    Args:
        report: What `inspect_checkpoint` returned.

    Returns:
        Lines of text, without a line end after the last.
    """
    lines = [
        _row("checkpoint", report["path"]),
        _row("method", report["method"]),
        _row("holds", report["holds"]),
        _row("base SHA-256", report["base_sha256"] or "not recorded"),
        _row("global step", report["global_step"]),
        _row("epoch", report["epoch"]),
        "settings",
        *_settings(report["settings"]),
        _row("melded layers", sum(group["count"] for group in report["melded"])),
    ]
    for group in report["melded"]:
        shape = f"{group['out']} x {group['in']}, rank {group['rank']}"
        lines.append(f"  {group['count']:>4} of out x in = {shape}")
    lines.append(_row("not melded", len(report["not_melded"])))
    lines += [f"  {fqn}: {reason}" for fqn, reason in report["not_melded"].items()]
    lines.append("parameters")
    lines += [f"  {kind:<18} {number:>16,}" for kind, number in report["parameters"].items()]
    lines.append("bytes")
    lines += [f"  {kind:<18} {number:>16,}" for kind, number in report["bytes"].items()]
    lines.append(f"  {'file':<18} {report['file_bytes']:>16,}")
    lines.append(_row("pending rows", report["pending_rows"]))
    lines.append(_row("training SHA-256", report["training_sha256"]))
    return "\n".join(lines)


def _row(label: str, value: Any) -> str:
    return f"{label:<16}  {value}"


def _settings(settings: Any, prefix: str = "") -> Iterator[str]:
    """One line a setting; nested ones as `recipe.name`."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"  {prefix + key:<30} {value}"

"""Checkpoints of methods other than FALQON: small, and checked before anything is loaded.

A checkpoint holds what training changes (`Method.state`). Everything else is made from the base
model again, quantised weights too, and a SHA-256 over it tells whether that gave the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from falqon.checkpoint.hashing import hash_tensors
from falqon.errors import InputError
from falqon.parallel.wholes import whole_shape
from lit_modules.methods.base import Method

PREFIX = "model."  # LitCausalLM keeps the model as `self.model`


def check_prepared(method: Method, model: nn.Module) -> None:
    """Refuse a prepared model in which something else is trainable than the method says.

    Raises:
        InputError: if nothing is trainable, or the two sets differ.
    """
    trainable = method.trainable(model)
    if not trainable:
        raise InputError(
            f"the method {method.name} found no layer to train in {type(model).__name__}: it has "
            "no plain nn.Linear beside the output embedding. Choose another method or model."
        )
    differ = {n for n, p in model.named_parameters() if p.requires_grad} ^ trainable.keys()
    if differ:
        raise InputError(
            f"the method {method.name} says it trains other parameters than those that require a "
            f"gradient: {sorted(differ)[0]} and {len(differ) - 1} more. Correct its prepare or "
            "trainable."
        )


def frozen_hash(method: Method, model: nn.Module) -> str:
    """SHA-256 of every tensor of the state dict that training does not change."""
    changing = {t.data_ptr() for t in method.state(model).values()}
    return hash_tensors(
        {
            name: value
            for name, value in model.state_dict().items()
            if isinstance(value, Tensor) and value.data_ptr() not in changing
        }
    )


def shrink(method: Method, model: nn.Module, checkpoint: dict[str, Any], frozen: str) -> None:
    """Leave in a checkpoint's state dict only what training changes, and say what it belongs to."""
    state = method.state(model)
    checkpoint["state_dict"] = {PREFIX + name: value for name, value in state.items()}
    checkpoint["method"] = {
        "name": method.name,
        "settings": method.settings(),
        "frozen_sha256": frozen,
    }


def check(method: Method, model: nn.Module, checkpoint: dict[str, Any], where: str) -> None:
    """Refuse a checkpoint of another method, other settings, or another model's tensors.

    Raises:
        InputError: naming what differs.
    """
    record = checkpoint.get("method")
    if record is None:
        raise InputError(
            f"{where} says nothing of its method, so it is none that {method.name} wrote: start a "
            "new run without ckpt_path."
        )
    if record["name"] != method.name:
        raise InputError(
            f"{where} was trained with the method {record['name']}, and the configuration says "
            f"{method.name}: set model.init_args.method to that of the run's config.yaml."
        )
    theirs, ours = record["settings"], method.settings()
    differing = [
        f"{key} (checkpoint {theirs.get(key)!r}, configuration {ours.get(key)!r})"
        for key in sorted(theirs.keys() | ours.keys())
        if theirs.get(key) != ours.get(key)
    ]
    if differing:
        raise InputError(
            f"{where} was made with other settings of {method.name}: {'; '.join(differing)}. Give "
            "these as the checkpoint has them, or start a new run without ckpt_path."
        )
    expected = {PREFIX + name: tuple(t.shape) for name, t in method.state(model).items()}
    found = {name: tuple(t.shape) for name, t in checkpoint["state_dict"].items()}
    if expected != found:
        names = sorted(expected.keys() | found.keys())
        name = next(n for n in names if expected.get(n) != found.get(n))
        raise InputError(
            f"{where} belongs to another model: {name} has shape {found.get(name)} there and "
            f"{expected.get(name)} here."
        )


def check_frozen(frozen: str, checkpoint: dict[str, Any], where: str) -> None:
    """Refuse a checkpoint whose frozen weights are not those that were made here.

    Raises:
        InputError: if the hashes differ.
    """
    theirs = checkpoint["method"]["frozen_sha256"]
    if theirs != frozen:
        raise InputError(
            f"{where} was trained on other frozen weights than were made from the model here: "
            f"their hash is {theirs[:12]}, here {frozen[:12]}. Give the same model (and revision), "
            "and the versions of the libraries that quantised it."
        )


def check_shapes(
    module: nn.Module, model_name: str, checkpoint: Mapping[str, Any], where: str
) -> None:
    """Refuse a checkpoint of a model with other tensors.

    Args:
        module: What is going to be loaded; tensors that are cut up count as whole.
        model_name: Of its model, for the message.
        checkpoint: As read, with all of its tensors.
        where: What it is, for the message.

    Raises:
        InputError: naming the first tensor that differs, and both shapes.
    """
    expected = {name: whole_shape(module, name, p) for name, p in module.state_dict().items()}
    found = {name: tuple(p.shape) for name, p in checkpoint["state_dict"].items()}
    if expected == found:
        return
    names = sorted(expected.keys() | found.keys())
    name = next(n for n in names if expected.get(n) != found.get(n))
    raise InputError(
        f"{where} belongs to another model than {model_name}: {name} has shape "
        f"{found.get(name)} there and {expected.get(name)} here."
    )

"""Tensors of an export: what there will be, made one at a time when it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping

from falqon.checkpoint import CheckpointError
from falqon.errors import InputError
from falqon.export.source import Trained
from falqon.fp8 import E4M3, all_finite, dequantize
from falqon.premeld.shards import Spec

Format = Literal["compressed-tensors", "bf16"]
"""Of the directories that other tools load."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the exported model.

    Attributes:
        name: In the Hugging Face model.
        spec: Dtype and shape.
        make: The tensor, contiguous, on the CPU.
    """

    name: str
    spec: Spec
    make: Callable[[], Tensor]


class Tensors:
    """The tensors of a trained model in one of the formats.

    Args:
        trained: The checkpoint.
        outline: The Hugging Face model without data, for its names, shapes and ties.
        format: `compressed-tensors` stores melded layers as `weight` float8_e4m3fn [out, in] and
            `weight_scale` float32 [out, 1], value = code * weight_scale; `bf16` stores their
            values. Everything else is bfloat16, a melded output embedding too: SGLang reads its
            codes as values, without the scale (sgl-project/sglang#34904).

    Attributes:
        ignore: Full names of the linear layers that are not stored as codes, or with `bf16` were
            not melded.
        rounded: Names of tensors, of those made so far, that bfloat16 does not hold exactly.

    Raises:
        InputError: The checkpoint is of another model, or of one that this cannot write.
    """

    def __init__(self, trained: Trained, outline: PreTrainedModel, format: Format) -> None:
        self.trained, self.format = trained, format
        if format == "compressed-tensors" and trained.settings["recipe"]["emulate"] == "none":
            raise InputError(
                f"{trained.file} was trained with the recipe 'none', without FP8: it has no codes "
                "to export. Use --format bf16."
            )
        if get_model_conversion_mapping(outline, add_legacy=False):
            raise InputError(
                f"models of type {outline.config.model_type} have other weights in files than in "
                "memory (fused experts, for example); these are not exported yet."
            )
        linear = {n: m for n, m in outline.named_modules() if isinstance(m, nn.Linear)}
        head = outline.get_output_embeddings() if format == "compressed-tensors" else None
        melded = [name for name in linear if name in trained.layers]
        coded = [name for name in melded if linear[name] is not head]
        self.ignore = [name for name in linear if name not in coded]
        self.rounded: list[str] = []
        ties = _ties(outline)
        _check_names(trained, outline, ties)
        self._outline = outline.state_dict()
        self._names = [name for name in self._outline if name not in ties]

    def __iter__(self) -> Iterator[Entry]:
        for name in self._names:
            fqn = name.removesuffix(".weight")
            if fqn not in self.trained.layers or fqn == name:
                expected = self._outline[name]
                dtype = torch.bfloat16 if expected.is_floating_point() else expected.dtype
                yield Entry(name, Spec(dtype, tuple(expected.shape)), partial(self._other, name))
                continue
            layer = self.trained.layers[fqn]
            shape = (layer.out_features, layer.in_features)
            if self.format == "bf16" or fqn in self.ignore:
                yield Entry(name, Spec(torch.bfloat16, shape), partial(self._values, fqn))
            else:
                yield Entry(name, Spec(torch.float8_e4m3fn, shape), partial(self._codes, fqn))
                scale = Spec(torch.float32, (layer.out_features, 1))
                yield Entry(f"{fqn}.weight_scale", scale, partial(self._scale, fqn))

    def _codes(self, fqn: str) -> Tensor:
        """The backbone's codes, float8_e4m3fn [out, in]: the checkpoint's bytes."""
        layer = self.trained.layers[fqn]
        codes = self.trained.state[f"{fqn}.codes"][: layer.out_features]
        refuse_nan(self.trained.file, f"{fqn}.codes", codes)
        return codes.contiguous().view(torch.float8_e4m3fn)

    def _scale(self, fqn: str) -> Tensor:
        """What codes are multiplied by, float32 [out, 1], the same for all rows."""
        rows = self.trained.layers[fqn].out_features
        return self.trained.state[f"{fqn}.scale"].reciprocal().repeat(rows)[:, None]

    def _values(self, fqn: str) -> Tensor:
        """The backbone's values, bfloat16 [out, in]."""
        layer = self.trained.layers[fqn]
        codes = self.trained.state[f"{fqn}.codes"][: layer.out_features]
        if codes.dtype == torch.uint8:
            codes = dequantize(self._codes(fqn), self.trained.state[f"{fqn}.scale"], E4M3)
        return self._bf16(f"{fqn}.weight", codes)

    def _other(self, name: str) -> Tensor:
        return self._bf16(name, self.trained.state[name])

    def _bf16(self, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor.contiguous()
        if not all_finite(tensor):
            raise _not_finite(self.trained.file, name)
        stored = tensor.to(torch.bfloat16)
        if stored.dtype != tensor.dtype and not torch.equal(stored.to(tensor.dtype), tensor):
            self.rounded.append(name)
        return stored.contiguous()


def refuse_nan(file: Path, name: str, codes: Tensor) -> None:
    """Refuse E4M3 codes of NaN.

    Raises:
        CheckpointError: There is one.
    """
    if bool(((codes & 0x7F) == 0x7F).any()):
        raise _not_finite(file, name)


def _not_finite(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {name} holds NaN or infinity: the file is damaged or the training diverged. Use "
        "an earlier checkpoint of the run."
    )


def quantization_config(ignore: list[str], inputs: bool = True) -> dict[str, Any]:
    """The entry `quantization_config` of config.json that says how the codes are to be read.

    Args:
        ignore: Full names of the linear layers that are not in FP8.
        inputs: Inputs are to be rounded to FP8, as they were in training.
    """
    fp8 = {"num_bits": 8, "type": "float", "symmetric": True}
    rounded = {**fp8, "strategy": "token", "dynamic": True} if inputs else None
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**fp8, "strategy": "channel", "dynamic": False},
                "input_activations": rounded,
                "output_activations": None,
            }
        },
    }


def _ties(outline: PreTrainedModel) -> dict[str, str]:
    """Names of parameters that are others' under a second name, with the first."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in outline.named_parameters(remove_duplicate=False):
        owner = first.setdefault(id(parameter), name)
        if owner != name:
            ties[name] = owner
    return ties


def _check_names(trained: Trained, outline: PreTrainedModel, ties: dict[str, str]) -> None:
    found = {}
    for name, shape in trained.shapes.items():
        fqn, _, part = name.rpartition(".")
        if fqn not in trained.layers or part == "bias":
            found[name] = shape
        elif part == "codes":
            layer = trained.layers[fqn]
            found[f"{fqn}.weight"] = (layer.out_features, layer.in_features)
    for name, owner in ties.items():  # a base knows tied weights by one name
        if name not in found and owner in found and name not in trained.state:
            found[name] = found[owner]
    expected = {name: tuple(tensor.shape) for name, tensor in outline.state_dict().items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"{trained.file} belongs to another model than {outline.name_or_path!r}: {name} "
                f"has shape {found.get(name)} there and {expected.get(name)} here. Name the model "
                "that was trained with --model."
            )
    for name, owner in ties.items():
        if name in trained.state and not torch.equal(trained.state[name], trained.state[owner]):
            raise InputError(
                f"{trained.file}: {name} is tied to {owner} in {outline.name_or_path!r} and "
                "differs from it here. Name the model that was trained with --model."
            )

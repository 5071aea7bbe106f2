"""From a directory with a melded model to the model, without a second copy of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from falqon.errors import InputError
from falqon.linear import MeldedLinear
from falqon.premeld.directory import MeldedDirectory
from falqon.pretrained import ModelSource, check_complete, load_config, one_error, resolve
from falqon.recipe import Fp8Recipe, MeldRecipe


def load_melded(
    directory: MeldedDirectory,
    fp8: Fp8Recipe,
    melding: MeldRecipe,
    *,
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Build the model with its melded layers in place.

    The codes are mapped from their files, or go to the device layer by layer; all else is mapped,
    on the CPU. Freezing and grouping are left to `falqon.meld.meld`, which takes melded layers as
    they are.

    Args:
        directory: as `falqon.premeld.open_melded` gives it.
        fp8, melding: settings to run with; those that decide bytes are those of the directory.
        device: of the melded layers; CPU if None.
        attn_implementation: what transformers is to compute attention with.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: if the directory is damaged, or the model cannot be built.
    """
    source = resolve(str(directory.path))
    config = load_config(source.name)
    shapes = {name: (layer["out"], layer["in"]) for name, layer in directory.layers.items()}
    return build_melded(
        source,
        config,
        directory.tensors(),
        shapes,
        fp8,
        melding,
        dtype=directory.dtype,
        device=device,
        attn_implementation=attn_implementation,
    )


def build_melded(
    source: ModelSource,
    config: PreTrainedConfig,
    tensors: dict[str, Tensor],
    layers: Mapping[str, tuple[int, int]],
    fp8: Fp8Recipe,
    melding: MeldRecipe,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
) -> PreTrainedModel:
    """Build a model from tensors of which some are melded.

    Args:
        source: of the model's configuration and generation settings, named in errors.
        config: of the model.
        tensors: by name in the model; layer `X` has `X.codes` [out + r, in] and `X.scale` [1]
            instead of `X.weight`. These two are taken out.
        layers: `out` and `in` of the melded layers, by full name.
        fp8, melding: settings to run with.
        dtype: of everything that is not melded.
        device: of the melded layers; CPU if None.
        attn_implementation: what transformers is to compute attention with.

    Returns:
        The model in evaluation mode.

    Raises:
        InputError: if the model cannot be built, or the tensors are not those of such a model.
    """
    # Without memory behind it: transformers builds the layer, and then it is replaced.
    nothing = torch.zeros(1, dtype=dtype, device="cpu")
    state = {n: t for n, t in tensors.items() if not n.endswith((".codes", ".scale"))}
    for name, shape in layers.items():
        state[f"{name}.weight"] = nothing.expand(*shape)
    with one_error(source, None):
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config))
        with torch.device("cpu"):
            loaded = kind.from_pretrained(
                None,
                config=config,
                state_dict=state,
                dtype=dtype,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # so that the report names them
            )
    model, report = loaded
    check_complete(source, model, report)
    if report["unexpected_keys"]:
        raise InputError(
            f"model_name {source.name!r}: a {kind.__name__} of its configuration has no "
            f"{min(report['unexpected_keys'])}, which is among the weights. Name the model that "
            "they are of."
        )
    if source.is_local and (Path(source.path) / "generation_config.json").is_file():
        with one_error(source, None, "generation config"):
            model.generation_config = GenerationConfig.from_pretrained(source.path)
    target = torch.device("cpu" if device is None else device)
    for name in layers:
        codes, scale = tensors.pop(f"{name}.codes"), tensors.pop(f"{name}.scale")
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        melded = _make(linear, codes.to(target), scale.to(target), fp8, melding)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, melded)
    return model


def _make(
    linear: nn.Linear, codes: Tensor, scale: Tensor, fp8: Fp8Recipe, melding: MeldRecipe
) -> MeldedLinear:
    with torch.device("meta"):
        layer = MeldedLinear(
            linear.in_features,
            linear.out_features,
            melding.rank,
            bias=linear.bias is not None,
            recipe=fp8,
            lora_scaling=melding.lora_scaling,
        )
    layer.codes = nn.Parameter(codes, requires_grad=False)
    layer.scale = nn.Parameter(scale, requires_grad=False)
    layer.B = nn.Parameter(torch.zeros(layer.B.shape, device=codes.device))
    if linear.bias is not None:
        layer.bias = nn.Parameter(linear.bias.detach().to(codes.device), requires_grad=False)
    layer.train(linear.training)
    return layer

"""From what a user names - a run, a checkpoint, a directory, a hub id - to a model to use.

Opening finds out what it is and refuses what cannot be used; loading makes the model. In between
whoever has more to check can do so without gigabytes in memory.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from falqon.checkpoint import LAST, SERVED
from falqon.delta.directory import MANIFEST
from falqon.errors import InputError
from falqon.export.source import Trained, read_trained
from falqon.meld import melded_layers
from falqon.premeld.directory import DTYPES, MeldedDirectory, open_melded
from falqon.premeld.load import build_melded, load_melded
from falqon.premeld.source import original_of
from falqon.pretrained import (
    ModelSource,
    check_complete,
    check_export,
    load_config,
    load_model,
    load_tokenizer,
    one_error,
    refuse_quantized,
    resolve,
)
from falqon.recipe import Fp8Recipe, MeldRecipe, UpdateRecipe
from falqon.scaling import DelayedScaling

Kind = Literal["checkpoint", "exported", "melded", "model"]


@dataclass(frozen=True)
class Description:
    """What a model is, in plain values.

    Attributes:
        name: As the user gave it.
        kind: `checkpoint` (of a FALQON run), `exported` (FP8, compressed-tensors), `melded` (by
            `falqon meld`, untrained) or `model` (16-bit weights).
        file: The checkpoint or directory that was read; None for a hub id.
        weights: What the linear layers hold.
        base: Name of the untuned model, if it is known.
        base_revision: Of it, on the hub.
        prompt: Prompt format of the training, if it is recorded.
        step: Optimizer steps of the training.
        sha256: If it was asked for: of the training state, as `falqon inspect` shows it, or of
            the weight files of a directory.
        commit: Of a hub id.
    """

    name: str
    kind: Kind
    file: str | None
    weights: str
    base: str | None = None
    base_revision: str | None = None
    prompt: str | None = None
    step: int | None = None
    sha256: str | None = None
    commit: str | None = None

    def plain(self) -> dict[str, Any]:
        """The attributes, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Opened:
    """A model that was found and can be loaded.

    Attributes:
        description: What it is.
        source: Where its configuration and tokenizer are.
        revision: Of the source, on the hub.
        trust_remote_code: Run code that comes with it.
    """

    description: Description
    source: ModelSource
    revision: str | None
    trust_remote_code: bool
    _load: Callable[[torch.device], PreTrainedModel]

    def load(self, device: torch.device | str = "cpu") -> PreTrainedModel:
        """The model, frozen, in evaluation mode, on a device.

        Raises:
            InputError: If its files are damaged or do not fit together.
        """
        target = torch.device(device)
        model: Any = self._load(target)
        model.requires_grad_(False)
        moved: PreTrainedModel = model.to(target)
        return moved.eval()

    def longest_context(self) -> int | None:
        """Tokens that the model has positions for; None if its configuration does not say."""
        config = load_config(
            self.source.name, trust_remote_code=self.trust_remote_code, revision=self.revision
        )
        return getattr(config, "max_position_embeddings", None)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer.

        Raises:
            InputError: If it has none that can be read.
        """
        return load_tokenizer(
            self.source.name, self.revision, trust_remote_code=self.trust_remote_code
        )


def open_model(
    name: str,
    *,
    revision: str | None = None,
    as_trained: bool = False,
    base: str | None = None,
    hashed: bool = False,
    trust_remote_code: bool = False,
    attn_implementation: str = "sdpa",
) -> Opened:
    """Find out what a name means and whether it can be used.

    Args:
        name: The directory of a run (its served.ckpt, or the last checkpoint), a .ckpt file, a
            directory of `falqon export` or `falqon meld`, or what `falqon.pretrained.resolve`
            takes.
        revision: Branch, tag or commit on the hub.
        as_trained: Take a checkpoint with pending changes, and compute as validation within the
            training does: they act if the update policy is `live`, else they do not yet.
        base: Where the model that was trained is now; None for what the checkpoint says.
        hashed: Hash the weights, which reads all of them.
        trust_remote_code: Run code that comes with the model. Only for sources you trust.
        attn_implementation: What transformers is to compute attention with.

    Raises:
        InputError: Nothing of that name can be found, read or used.
    """
    path = Path(name).expanduser()
    if path.suffix == ".ckpt" or (path / SERVED).exists() or (path / LAST).exists():
        trained = read_trained(path, base, revision, pending=as_trained)
        opened = _open_trained(
            name, trained, base, revision, trust_remote_code, attn_implementation
        )
        digest = trained.training_sha256 if hashed else None
        return replace(opened, description=replace(opened.description, sha256=digest))
    if (path / MANIFEST).is_file():
        raise InputError(
            f"{name} is a delta: make the model with falqon apply {name} --output DIR, or put it "
            "into its base with falqon.load_delta."
        )
    source = resolve(name)
    if source.is_local and (directory := open_melded(source.path)) is not None:
        opened = _open_melded(name, source, directory, attn_implementation)
    else:
        config = load_config(name, trust_remote_code=trust_remote_code, revision=revision)
        if _quant_method(config) == "compressed-tensors":
            opened = _open_exported(name, source, config, base, revision, attn_implementation)
        else:
            refuse_quantized(source, config)
            opened = _open_plain(
                name, source, config, base, revision, trust_remote_code, attn_implementation
            )
    digest = _hash_weights(source) if hashed else None
    return replace(opened, description=replace(opened.description, sha256=digest))


def _open_plain(
    name: str,
    source: ModelSource,
    config: Any,
    base: str | None,
    revision: str | None,
    trust_remote_code: bool,
    attn_implementation: str,
) -> Opened:
    description = Description(
        name=name,
        kind="model",
        file=source.path if source.is_local else None,
        weights="bf16",
        base=base or _recorded(config, "base"),
        prompt=_recorded(config, "prompt"),
        commit=getattr(config, "_commit_hash", None),
    )

    def load(device: torch.device) -> PreTrainedModel:
        return load_model(
            name,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            revision=revision,
        )

    return Opened(description, source, revision, trust_remote_code, load)


def _recorded(config: Any, key: str) -> str | None:
    """What an export wrote into its configuration: `prompt` (format) and `base` (model)."""
    recorded = getattr(config, "falqon", None)
    value = recorded.get(key) if isinstance(recorded, Mapping) else None
    return value if isinstance(value, str) else None


def _hash_weights(source: ModelSource) -> str | None:
    """SHA-256 of names and SHA-256 of the weight files; None on the hub."""
    if not source.is_local:
        return None
    root = Path(source.path)
    files = [root / source.gguf_file] if source.gguf_file else sorted(root.glob("*.safetensors"))
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{digest}  {path.name}\n".encode())
    return total.hexdigest()


def _quant_method(config: Any) -> str | None:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    return (stored if isinstance(stored, dict) else vars(stored)).get("quant_method")


# -- a run ----------------------------------------------------------------------------------------


def _open_trained(
    name: str,
    trained: Trained,
    base: str | None,
    revision: str | None,
    trust_remote_code: bool,
    attn_implementation: str,
) -> Opened:
    origin = trained.origin
    outline = base or origin.get("model_name")
    if not outline:
        raise InputError(
            f"{trained.file} does not say which model was trained. Name it with --base."
        )
    revision = revision or (None if base else origin.get("revision"))
    source = resolve(outline)
    untuned = original_of(outline, revision)
    description = Description(
        name=name,
        kind="checkpoint",
        file=str(trained.file),
        weights="melded FP32" if trained.settings["recipe"]["emulate"] == "none" else "melded FP8",
        base=untuned[0],
        base_revision=untuned[1],
        prompt=origin.get("prompt"),
        step=trained.step,
    )

    def load(device: torch.device) -> PreTrainedModel:
        return _build(trained, source, revision, trust_remote_code, device, attn_implementation)

    return Opened(description, source, revision, trust_remote_code, load)


def _from_plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def _build(
    trained: Trained,
    source: ModelSource,
    revision: str | None,
    trust_remote_code: bool,
    device: torch.device,
    attn_implementation: str,
) -> PreTrainedModel:
    """The model of a checkpoint, as validation of the run computes it."""
    settings = trained.settings
    fp8 = Fp8Recipe(**_from_plain(settings["recipe"]))
    melding = MeldRecipe(rank=settings["rank"], **_from_plain(settings["meld"]))
    config = load_config(source.name, trust_remote_code=trust_remote_code, revision=revision)
    shapes = {n: (layer.out_features, layer.in_features) for n, layer in trained.layers.items()}
    proxies = {n: trained.state[f"{n}.B"] for n in trained.layers}
    model = build_melded(
        source,
        config,
        {n: t for n, t in trained.state.items() if n.removesuffix(".B") not in proxies},
        shapes,
        fp8,
        melding,
        dtype=DTYPES[settings["dtype"]],
        device=device,
        attn_implementation=attn_implementation,
    )
    live = UpdateRecipe(**_policy(settings)).live
    for name, layer in melded_layers(model).items():
        layer.B.data.copy_(proxies[name])
        layer.live = live
    _finish(model, melding)
    if trained.scaling:
        DelayedScaling(model, fp8.amax_history).load_state_dict(dict(trained.scaling))
    return model


def _policy(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the update policy, which a checkpoint keeps in two places."""
    fields = {"preset": settings["update"]}
    fields |= {key: settings[key] for key in ("rows", "rounding", "seed")}
    return fields | _from_plain(settings["policy"])


def _finish(model: PreTrainedModel, melding: MeldRecipe) -> None:
    if melding.groups:
        from falqon.blocks import group_blocks

        group_blocks(model)


# -- directories ----------------------------------------------------------------------------------


def _open_melded(
    name: str, source: ModelSource, directory: MeldedDirectory, attn_implementation: str
) -> Opened:
    settings, origin = directory.manifest["settings"], directory.manifest["source"]
    fp8 = Fp8Recipe(
        weight_scale_rounding=settings["recipe.weight_scale_rounding"],
        emulate=settings["recipe.emulate"],
    )
    names = ("rank", "include", "exclude", "output_embedding", "adapter", "svd", "seed")
    melding = MeldRecipe(**_from_plain({key: settings[key] for key in names}))
    description = Description(
        name=name,
        kind="melded",
        file=source.path,
        weights="melded FP8, untrained",
        base=origin["name"],
        base_revision=origin["revision"],
    )

    def load(device: torch.device) -> PreTrainedModel:
        model = load_melded(
            directory, fp8, melding, device=device, attn_implementation=attn_implementation
        )
        _finish(model, melding)
        return model

    return Opened(description, source, None, False, load)


def _open_exported(
    name: str,
    source: ModelSource,
    config: Any,
    base: str | None,
    revision: str | None,
    attn_implementation: str,
) -> Opened:
    check_export(source)
    if importlib.util.find_spec("compressed_tensors") is None:
        raise InputError(
            f"{name} is stored as compressed-tensors, and the package that reads it is missing: "
            "pip install compressed-tensors."
        )
    description = Description(
        name=name,
        kind="exported",
        file=source.path if source.is_local else None,
        weights="FP8, compressed-tensors",
        base=base or _recorded(config, "base"),
        prompt=_recorded(config, "prompt"),
        commit=getattr(config, "_commit_hash", None),
    )

    def load(device: torch.device) -> PreTrainedModel:
        with one_error(source, revision), torch.device("cpu"):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source.path,
                dtype=torch.bfloat16,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                use_safetensors=True,
                **({} if revision is None else {"revision": revision}),
            )
        model, report = loaded
        check_complete(source, model, report)
        return model

    return Opened(description, source, revision, False, load)

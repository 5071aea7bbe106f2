"""From a checkpoint to a directory that stands alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, get_args

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from falqon.errors import InputError
from falqon.export.card import model_card
from falqon.export.directory import (
    DEFAULT_SHARD,
    FORMAT,
    MANIFEST,
    VERSION,
    check_free,
    new_directory,
    parse_size,
    write_weights,
)
from falqon.export.source import Trained, origin_of, read_trained
from falqon.export.tensors import Format, Tensors, quantization_config
from falqon.manifest import describe, hash_files, write_manifest
from falqon.premeld.source import original_of
from falqon.pretrained import PACKAGE_PREFIX, load_config, load_tokenizer, resolve
from falqon.version import __version__

ExportFormat = Format | Literal["delta"]
FORMATS: tuple[str, ...] = (*get_args(Format), "delta")


def export_model(
    path: str | Path,
    output: str | Path,
    format: ExportFormat = "compressed-tensors",
    *,
    model: str | None = None,
    revision: str | None = None,
    shard_size: str = DEFAULT_SHARD,
) -> dict[str, Any]:
    """Write a trained model as a directory that transformers, vLLM and SGLang can load.

    The weights are those of the checkpoint, which must have nothing pending. The model they were
    trained from is needed for its configuration and tokenizer; its weights are needed for a delta,
    and for checkpoints that hold changes only.

    Args:
        path: A FALQON checkpoint, or the directory of a run.
        output: The new directory.
        format: `compressed-tensors` (the FP8 codes), `bf16` (their values), or `delta` (what was
            changed against the melded model, see `falqon.delta`).
        model: Where the trained model came from, see `falqon.pretrained.resolve`; None for what
            the checkpoint says.
        revision: Of `model` on the hub; None for what the checkpoint says.
        shard_size: Largest weight file, such as `5GB`.

    Returns:
        Plain values, ready for JSON: `output`, `format`, `checkpoint`, `global_step`, `model`,
        `melded_layers`, `ignore` (linear layers not stored as codes; with `bf16` those that were
        not melded), `rounded` (tensors that
        bfloat16 does not hold exactly), `bytes`, `files` (bytes and SHA-256 of each) and
        `training_sha256`. For a delta see `falqon.delta.write.write_delta`.

    Raises:
        InputError: The checkpoint cannot be used (see `falqon.export.source.read_trained`), its
            model is not known or another one, or the output is taken or cannot be written.
    """
    if format not in FORMATS:
        raise InputError(f"format is {format!r}; choose one of {', '.join(FORMATS)}.")
    limit = parse_size(shard_size)
    check_free(output)  # before gigabytes are read, and again when they are written
    trained = read_trained(path, model, revision)
    name, revision = origin_of(trained.file, trained.origin, model, revision)
    if format == "delta":
        from falqon.delta.write import write_delta

        return write_delta(trained, name, revision, output, limit)
    return write_model(trained, name, revision, output, format, limit)


def write_model(
    trained: Trained,
    name: str,
    revision: str | None,
    output: str | Path,
    format: Format,
    limit: int,
    recorded: tuple[str, bool] | None = None,
) -> dict[str, Any]:
    """Write a trained model in one of the formats that other tools load.

    Args:
        trained: It.
        name, revision: Where the model that was trained is.
        output, format: As in `export_model`.
        limit: Bytes of tensors in a weight file.
        recorded: What the card names instead of `name`, and whether that is a hub id.

    Returns:
        As `export_model` does.

    Raises:
        InputError: See there.
    """
    original, _ = original_of(name, revision)
    shown, is_hub = recorded or (original, not resolve(original).is_local)
    outline = _outline(name, revision)
    tokenizer = load_tokenizer(name, revision)
    tensors = Tensors(trained, outline, format)
    with new_directory(output) as directory:
        weights = write_weights(tensors, directory, limit)
        # Whether the hub could be asked does not belong into what is written.
        tokenizer.init_kwargs.pop("local_files_only", None)
        tokenizer.save_pretrained(directory)
        generation = directory / "generation_config.json"
        _generation(name, revision, outline, tokenizer).to_json_file(generation)
        if format == "compressed-tensors":
            rounded = trained.settings["recipe"]["emulate"] == "fp8"
            outline.config.quantization_config = quantization_config(tensors.ignore, rounded)
        outline.config.falqon = _origin(trained, shown, is_hub)
        outline.config.save_pretrained(directory)
        report = _report(trained, shown, tensors, hash_files(directory, weights))
        card = directory / "README.md"
        base = shown if is_hub else None
        card.write_text(model_card(report, trained, base), encoding="utf-8")
        manifest = {key: value for key, value in report.items() if key not in ("checkpoint",)}
        manifest |= {"format": FORMAT, "version": VERSION, "as": format, "falqon": __version__}
        files = {**report["files"], card.name: describe(card)}
        write_manifest(directory / MANIFEST, {**manifest, "files": files})
    return {"output": str(output), **report}


def _origin(trained: Trained, name: str, is_hub: bool) -> dict[str, str]:
    """What whoever uses the export wants to know: the prompt format, and a base to compare with.

    A local path means nothing where the export goes, so it is left out.
    """
    found = {"prompt": trained.origin.get("prompt")}
    if name.startswith(PACKAGE_PREFIX) or is_hub:
        found["base"] = name
    return {key: value for key, value in found.items() if isinstance(value, str)}


def _report(
    trained: Trained, name: str, tensors: Tensors, files: dict[str, dict[str, int | str]]
) -> dict[str, Any]:
    return {
        "format": tensors.format,
        "checkpoint": str(trained.file),
        "global_step": trained.step,
        "model": name,
        "melded_layers": len(trained.layers),
        "ignore": tensors.ignore,
        "rounded": tensors.rounded,
        "bytes": sum(int(file["bytes"]) for file in files.values()),
        "files": files,
        "training_sha256": trained.training_sha256,
    }


def _outline(name: str, revision: str | None) -> PreTrainedModel:
    """The model without data, for names, shapes and ties; its config ready to be written."""
    try:
        config = load_config(name, revision=revision)
    except InputError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise InputError(
            f"model {name!r} needs Python code of its own, which an export would have to carry: "
            "that is not supported."
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"model {name!r} is stored quantised: name the model that was trained.")
    try:
        with torch.device("meta"):
            outline = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        text = str(error).strip().split("\n", maxsplit=1)[0]
        raise InputError(f"model {name!r} cannot be built as a causal LM: {text}") from error
    outline.config.dtype = torch.bfloat16
    outline.config.architectures = [type(outline).__name__]  # GGUF does not name it
    outline.name_or_path = name
    return outline


def _generation(
    name: str, revision: str | None, outline: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> GenerationConfig:
    """The model's own generation settings; without any, those that its config implies."""
    source = resolve(name)
    try:
        where: dict[str, Any] = {} if revision is None else {"revision": revision}
        settings = GenerationConfig.from_pretrained(source.path, **where)
    except OSError:
        settings = outline.generation_config or GenerationConfig()
    if settings.eos_token_id is None:
        settings.eos_token_id = tokenizer.eos_token_id
    return settings


def format_report(report: dict[str, Any]) -> str:
    """Lay out the result of `export_model` for a terminal, without a line end after the last."""
    if report["format"] == "delta":
        from falqon.delta.write import format_report as format_delta

        return format_delta(report)
    lines = [
        f"{'exported':<16} {report['checkpoint']} (step {report['global_step']})",
        f"{'as':<16} {report['format']}, {report['bytes']:,} bytes",
        f"{'to':<16} {report['output']}",
        f"{'melded layers':<16} {report['melded_layers']}",
        f"{'other layers':<16} {', '.join(report['ignore']) or 'none'}",
        f"{'training SHA-256':<16} {report['training_sha256']}",
    ]
    if report["rounded"]:
        count, first = len(report["rounded"]), report["rounded"][0]
        lines.append(f"{'rounded to bf16':<16} {count} tensors that it does not hold ({first} ...)")
    lines += [f"  {file['sha256']}  {name}" for name, file in report["files"].items()]
    return "\n".join(lines)

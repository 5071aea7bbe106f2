"""Where the weights to meld come from: safetensors files, read one tensor at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from falqon.errors import InputError
from falqon.premeld.directory import is_melded, open_melded
from falqon.pretrained import (
    ModelSource,
    check_export,
    load_config,
    load_model,
    load_tokenizer,
    one_error,
    refuse_quantized,
    resolve,
)

_TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
    "*.model",
)
_HUB_FILES = ("*.json", "model*.safetensors", *_TOKENIZER_FILES)


@dataclass(frozen=True)
class WeightSource:
    """A model's weights, one at a time.

    Attributes:
        model: has the model's structure; its tensors may be on the meta device.
        read: a tensor by name, as it is stored.
        file_of: which file a tensor is in.
        whole: why the whole model had to be loaded; None if it is read from its files.
        directory: where its other files are; None if it has none (GGUF).
        tokenizer_of: model name to load a tokenizer of, where there are no files to copy.
    """

    model: PreTrainedModel
    read: Callable[[str], Tensor]
    file_of: Callable[[str], str]
    whole: str | None
    directory: Path | None
    tokenizer_of: str

    def entries(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the model (perhaps without data), tied ones once."""
        seen: set[int] = set()
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor

    def save_settings(self, target: Path, dtype: torch.dtype) -> bool:
        """Write config, generation config and tokenizer; False if there is no tokenizer."""
        config = self.model.config
        config.dtype = dtype
        if not config.architectures:
            config.architectures = [type(self.model).__name__]
        config.save_pretrained(target)
        if self.directory is None:
            if self.model.generation_config is not None:
                self.model.generation_config.save_pretrained(target)
            load_tokenizer(self.tokenizer_of).save_pretrained(target)
            return True
        copied = {
            file
            for pattern in ("generation_config.json", *_TOKENIZER_FILES)
            for file in self.directory.glob(pattern)
            if file.is_file()
        }
        for file in sorted(copied):
            shutil.copyfile(file, target / file.name)
        return any(file.name != "generation_config.json" for file in copied)


def open_source(name: str, dtype: torch.dtype, revision: str | None = None) -> WeightSource:
    """Open a model for reading one tensor at a time.

    Args:
        name: model name, see `falqon.pretrained`. GGUF, and models whose files have other names or
            shapes than transformers gives their weights, are loaded as a whole.
        dtype: to load those in.
        revision: branch, tag or commit on the hub.

    Raises:
        InputError: if the model cannot be found or read, is stored quantised or melded already, or
            lacks a tensor.
    """
    source = resolve(name)
    if is_melded(source.path):
        raise InputError(f"{name} is melded already; name the model that it was melded from.")
    if source.gguf_file is not None:
        reason = "GGUF is dequantised as a whole"
        return _load_whole(source, None, dtype, revision, reason)
    config = load_config(name, revision=revision)
    refuse_quantized(source, config)
    check_export(source)
    directory = Path(source.path) if source.is_local else _download(source, revision)
    with one_error(source, revision), torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    stored = _stored_tensors(directory)
    names: dict[int, list[str]] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(key)
    where = {
        aliases[0]: next((a for a in aliases if a in stored), None) for aliases in names.values()
    }
    missing = [key for key, found in where.items() if found is None]
    known = {alias for aliases in names.values() for alias in aliases}
    if missing and any(not n.endswith("rotary_emb.inv_freq") for n in stored.keys() - known):
        reason = "its files name tensors in another way than transformers does"
        return _load_whole(source, directory, dtype, revision, reason)
    if missing:
        raise InputError(
            f"{_expected_file(directory, missing[0])} lacks the tensor {missing[0]} (and "
            f"{len(missing) - 1} more are missing): the files do not match config.json. Download "
            "the model again."
        )
    found = {key: alias for key, alias in where.items() if alias is not None}
    reader = _Reader(found, stored)
    for aliases in names.values():
        reader.check_tied([alias for alias in aliases if alias in stored])
    return WeightSource(model, reader.read, reader.file_of, None, directory, name)


class _Reader:
    """Reads tensors into memory of their own, so that no file stays mapped."""

    def __init__(self, names: dict[str, str], files: dict[str, Path]) -> None:
        self._names, self._files = names, files

    def read(self, name: str) -> Tensor:
        return self._read(self._names[name])

    def file_of(self, name: str) -> str:
        return str(self._files[self._names[name]])

    def check_tied(self, aliases: list[str]) -> None:
        """Tied weights may be stored several times, but have to be equal."""
        for other in aliases[1:]:
            if not torch.equal(self._read(aliases[0]), self._read(other)):
                raise InputError(
                    f"{self._files[other]}: {other} differs from {aliases[0]}, but config.json "
                    "says that they are tied. Set tie_word_embeddings to false there."
                )

    def _read(self, name: str) -> Tensor:
        file = self._files[name]
        try:
            with safe_open(file, framework="pt", device="cpu", backend="pread") as opened:
                tensor: Tensor = opened.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: the tensor {name} cannot be read ({error}). Download the file again."
            ) from error
        return tensor


def _load_whole(
    source: ModelSource,
    directory: Path | None,
    dtype: torch.dtype,
    revision: str | None,
    reason: str,
) -> WeightSource:
    model = load_model(source.name, dtype=dtype, revision=revision)
    tensors = model.state_dict()
    file = str(Path(source.path) / (source.gguf_file or ""))
    return WeightSource(
        model, tensors.__getitem__, lambda name: file, reason, directory, source.name
    )


def _stored_tensors(directory: Path) -> dict[str, Path]:
    """File of every tensor, from the files that transformers reads; these were checked before."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        files = [single]
    elif index.is_file():
        files = sorted(directory / file for file in set(_weight_map(index).values()))
    else:
        raise InputError(f"{directory} has neither {single.name} nor {index.name}.")
    found: dict[str, Path] = {}
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _weight_map(index: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    return found


def _expected_file(directory: Path, tensor: str) -> Path:
    """The file that should hold a tensor, or the directory if nothing says which."""
    if (directory / "model.safetensors").is_file():
        return directory / "model.safetensors"
    file = _weight_map(directory / "model.safetensors.index.json").get(tensor)
    return directory / file if file else directory


def _download(source: ModelSource, revision: str | None) -> Path:
    with one_error(source, revision):
        path = snapshot_download(source.path, revision=revision, allow_patterns=list(_HUB_FILES))
    resolve(path)  # looks for missing and damaged files
    return Path(path)


def original_of(name: str, revision: str | None) -> tuple[str, str | None]:
    """The model that a name stands for: of a directory with a melded one, what was melded.

    Args:
        name: a model, see `falqon.pretrained.resolve`, or a directory of `falqon meld`.
        revision: of a model on the hub.

    Raises:
        InputError: as `open_melded` does.
    """
    melded = open_melded(resolve(name).path)
    if melded is None:
        return name, revision
    return melded.manifest["source"]["name"], melded.manifest["source"]["revision"]

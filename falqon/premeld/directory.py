"""A directory with a melded model: its format, and what is checked before it is used.

- `falqon.json`: settings, source, layers, sizes and hashes; written last.
- `melded-*.safetensors`: `<fqn>.codes` and `<fqn>.scale` of melded layers, and all else the model
  has, under its own names.
- `originals-*.safetensors` if they were kept: `<fqn>.weight` of melded layers.
- `config.json`, `generation_config.json` and the tokenizer's files, as of any model.

No weight file has a name that transformers looks for: it cannot take one for a plain model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from falqon.errors import InputError
from falqon.manifest import check_files, describe, read_manifest
from falqon.meld import MeldedInfo, MeldReport
from falqon.recipe import Fp8Recipe, MeldRecipe, UpdateRecipe, as_plain

MANIFEST = "falqon.json"
FORMAT = "falqon-melded"
VERSION = 4
WEIGHTS, ORIGINALS = "melded", "originals"
_KEYS = {"settings", "layers", "skipped", "bytes_before", "bytes_after"}
_KEYS |= {"originals", "files", "tensors"}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def settings_of(fp8: Fp8Recipe, melding: MeldRecipe, dtype: str) -> dict[str, Any]:
    """The settings that decide the stored bytes, named as `FalqonPrecision` names them.

    The others (how activations and gradients are rounded, `lora_alpha`, `groups`) act at run time,
    so one directory serves them all.
    """
    plain = as_plain(melding)
    names = ("rank", "include", "exclude", "output_embedding", "adapter", "svd", "seed")
    return {name: plain[name] for name in names} | {
        "dtype": dtype,
        "recipe.weight_scale_rounding": fp8.weight_scale_rounding,
        "recipe.emulate": "none" if fp8.emulate == "none" else "fp8",  # how weights are stored
    }


@dataclass(frozen=True)
class MeldedDirectory:
    """A directory that `falqon meld` wrote, with its manifest read.

    Attributes:
        path: the directory.
        manifest: what `falqon.json` holds.
    """

    path: Path
    manifest: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        """Of everything that is not melded, and of the original weights."""
        return DTYPES[self.manifest["settings"]["dtype"]]

    @property
    def layers(self) -> dict[str, dict[str, Any]]:
        """`out`, `in`, `captured` and `seconds` of every melded layer, by full name."""
        layers: dict[str, dict[str, Any]] = self.manifest["layers"]
        return layers

    def report(self) -> MeldReport:
        """What melding did, as `falqon.meld.meld` reports it."""
        return MeldReport(
            converted={
                name: MeldedInfo(layer["out"], layer["in"], layer["captured"])
                for name, layer in self.layers.items()
            },
            skipped=dict(self.manifest["skipped"]),
            adapter=self.manifest["settings"]["adapter"],
            bytes_before=self.manifest["bytes_before"],
            bytes_after=self.manifest["bytes_after"],
        )

    def check_settings(self, fp8: Fp8Recipe, melding: MeldRecipe, dtype: str) -> None:
        """Refuse settings other than those it was melded with.

        Raises:
            InputError: naming every one that differs.
        """
        theirs, ours = self.manifest["settings"], settings_of(fp8, melding, dtype)
        differing = [
            f"{key} (directory {theirs.get(key)!r}, configuration {value!r})"
            for key, value in ours.items()
            if theirs.get(key) != value
        ]
        if differing:
            raise InputError(
                f"{self.path} was melded with other settings: {'; '.join(differing)}. Give these "
                "as the directory has them, or meld the model again with yours (falqon meld)."
            )

    def tensors(self) -> dict[str, Tensor]:
        """All but the originals, by name; see `_map`."""
        return self._map(WEIGHTS)

    def originals(self, update: UpdateRecipe) -> dict[str, Tensor]:
        """Original weights [out, in] by the name of their layer, mapped from their files.

        Args:
            update: the policy; empty unless it derives rows from them.

        Raises:
            InputError: if the policy needs them and the directory has none, and as `tensors` does.
        """
        if update.written != "weights":
            return {}
        if not self.manifest["originals"]:
            raise InputError(
                f"the update preset {update.preset!r} derives rows from the original weights, "
                f"which {self.path} does not hold. Meld the model again with --keep-weights, or "
                "use a policy that does without: update 'anchored' (original codes), 'feedback' or "
                "'paper'."
            )
        found = self._map(ORIGINALS)
        return {name.removesuffix(".weight"): tensor for name, tensor in found.items()}

    def check(self) -> None:
        """Compare all files with their hashes, the originals too.

        Raises:
            InputError: naming the file, and the tensor where one is at fault.
        """
        for part in (WEIGHTS, ORIGINALS):
            self._map(part)

    def _map(self, part: str) -> dict[str, Tensor]:
        """Tensors of the files with some stem, checked against their hashes.

        They are private maps of the files: a page is read when it is used, and copied only when it
        is written.

        Raises:
            InputError: naming the file, and the tensor where one is at fault.
        """
        found: dict[str, Tensor] = {}
        for name in self.manifest["files"]:
            if name.startswith(part):
                found |= self._map_file(name)
        return found

    def _map_file(self, name: str) -> dict[str, Tensor]:
        file, expected = self.path / name, self.manifest["files"][name]
        if not file.is_file():
            raise self._damaged(name, "the file is missing")
        try:
            with safe_open(file, framework="pt") as opened:
                found = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            size = f"it has {file.stat().st_size} bytes instead of {expected['bytes']}"
            raise self._damaged(name, f"{size} ({error})") from error
        hashes = {
            key: tensor["sha256"]
            for key, tensor in self.manifest["tensors"].items()
            if tensor["file"] == name
        }
        missing = [key for key in hashes if key not in found]
        if missing:
            raise self._damaged(name, f"the tensor {missing[0]} is missing")
        if describe(file) != expected:
            wrong = [key for key, tensor in found.items() if _sha256(tensor) != hashes.get(key)]
            what = f"the data of {wrong[0]} have" if wrong else "its header has"
            raise self._damaged(name, f"{what} another SHA-256 than when they were written")
        return found

    def _damaged(self, name: str, what: str) -> InputError:
        return InputError(
            f"{self.path / name} is damaged: {what}. Copy the directory again, or meld the model "
            "again (falqon meld)."
        )


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def is_melded(path: str | Path) -> bool:
    """Whether a directory is one that `falqon meld` wrote."""
    return (Path(path).expanduser() / MANIFEST).is_file()


def open_melded(path: str | Path) -> MeldedDirectory | None:
    """Read the manifest of a directory with a melded model; None if it is none.

    Args:
        path: the directory, or anything else that a model name was resolved to.

    Raises:
        InputError: if the manifest cannot be read or is damaged, or another file
            that is not a weight file is not as it was written.
    """
    path = Path(path).expanduser()
    if not is_melded(path):
        return None
    remedy = "Copy the directory again, or meld the model again (falqon meld)."
    manifest = read_manifest(path / MANIFEST, FORMAT, VERSION, remedy)
    missing = _KEYS - manifest.keys()
    if missing:
        raise InputError(f"{path / MANIFEST} has no {min(missing)!r}. {remedy}")
    directory = MeldedDirectory(path, manifest)
    small = {n: f for n, f in manifest["files"].items() if not n.endswith(".safetensors")}
    check_files(path, small, remedy)
    return directory

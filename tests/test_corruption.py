"""Five hundred random corruptions of what is written: none of them loads without a word."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import checkpoint as dcp
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from falqon import FalqonPrecision, InputError
from falqon.checkpoint import AtomicCheckpointIO, CheckpointError, hash_tensors, read_checkpoint
from falqon.checkpoint.sharded import read_meta, shapes, split_optimizer, write_meta, write_seal
from falqon.delta.directory import open_delta
from falqon.export import export_model
from falqon.export.directory import open_export
from falqon.premeld.directory import open_melded
from falqon.premeld.run import premeld
from falqon.pretrained import load_model

NUMBER = 500


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A checkpoint of each kind, a melded directory, a delta and two exports of one tiny model."""
    root = tmp_path_factory.mktemp("written")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    model = load_model(str(root / "base"))
    plugin = FalqonPrecision(rank=4, update="paper", rows="all")
    plugin.convert(model)
    plugin.remember_base()
    with torch.no_grad():
        for layer in plugin.layers.values():
            layer.B.copy_(torch.randn_like(layer.B) * 0.1)
    plugin.flush()
    for kind in ("complete", "small"):
        content: dict[str, Any] = {
            "epoch": 0,
            "global_step": 7,
            "state_dict": {f"model.{n}": t for n, t in model.state_dict().items()},
            "FalqonPrecision": plugin.state_dict(),
            "LitCausalLM": {"model_name": str(root / "base"), "revision": None},
        }
        if kind == "small":
            plugin.pack_checkpoint(content)
        else:
            write_sharded(content, root / "sharded")
        AtomicCheckpointIO().save_checkpoint(content, root / kind / "a.ckpt")
    premeld(str(root / "base"), root / "melded", plugin.fp8, plugin.melding, keep_weights=True)
    export_model(root / "small" / "a.ckpt", root / "delta", "delta")
    export_model(root / "small" / "a.ckpt", root / "fp8", shard_size="10KB")
    export_model(root / "small" / "a.ckpt", root / "bf16", "bf16")
    shutil.rmtree(root / "base")
    return root


def write_sharded(content: dict[str, Any], directory: Path) -> None:
    """What ShardedStrategy writes, by one process."""
    directory.mkdir()
    meta = {k: v for k, v in content.items() if k != "state_dict"}
    state = {"state": {0: {"step": 7, "exp_avg": torch.ones(3, 4)}}, "param_groups": [{"lr": 0.1}]}
    skeleton, tensors = split_optimizer(0, state, ["B"], torch.is_tensor)
    tensors |= {f"model/{name}": tensor for name, tensor in content["state_dict"].items()}
    write_meta(directory, meta | {"optimizer_skeletons": [skeleton]})
    writer = dcp.FileSystemWriter(directory, sync_files=True)
    dcp.save(tensors, storage_writer=writer, no_dist=True)
    write_seal(directory)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by their path; tensors by their hash."""
    if isinstance(tree, dict):
        found: dict[str, Any] = {}
        for key, value in tree.items():
            found |= flatten(value, f"{prefix}/{key}")
        return found
    if isinstance(tree, list):
        return flatten(dict(enumerate(tree)), prefix)
    return {prefix: hash_tensors({"": tree}) if isinstance(tree, Tensor) else tree}


def of_checkpoint(path: Path) -> Any:
    return flatten(read_checkpoint(path / "a.ckpt"))


def of_sharded(path: Path) -> Any:
    return flatten(read_checkpoint(path))


def of_melded(path: Path) -> Any:
    directory = open_melded(path)
    assert directory is not None
    directory.check()
    return directory.manifest, flatten(directory.tensors())


def of_delta(path: Path) -> Any:
    delta = open_delta(path)
    return delta.manifest, delta.changes()


def of_export(path: Path) -> Any:
    manifest = open_export(path)
    return manifest, {n: (path / n).read_bytes() for n in manifest["files"]} if manifest else None


LOADERS: dict[str, Callable[[Path], Any]] = {
    "complete": of_checkpoint,
    "small": of_checkpoint,
    "sharded": of_sharded,
    "melded": of_melded,
    "delta": of_delta,
    "fp8": of_export,
    "bf16": of_export,
}


def corrupt(file: Path, chance: random.Random) -> str:
    """Damage one file; what was done."""
    data = bytearray(file.read_bytes())
    kind = chance.choice(["flip", "flip", "flips", "truncate", "delete", "cut", "swap", "zero"])
    place = chance.randrange(len(data))
    if chance.random() < 0.3:  # headers and ends are small, and matter most
        place = chance.choice([place % min(len(data), 64), len(data) - 1 - place % 100])
        place = max(place, 0)
    if kind == "delete":
        file.unlink()
        return kind
    if kind == "flip":
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "flips":
        for _ in range(chance.randint(2, 40)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    elif kind == "truncate":
        del data[place:]
    elif kind == "cut":
        del data[place : place + chance.randint(1, 64)]
    elif kind == "swap":
        other = chance.randrange(len(data))
        data[place], data[other] = data[other], data[place]
    else:
        data[place : place + 16] = bytes(len(data[place : place + 16]))
    file.write_bytes(data)
    return f"{kind} at {place} of {file.name}"


@pytest.mark.parametrize("kind", LOADERS)
def test_no_corruption_loads_silently(written: Path, tmp_path: Path, kind: str) -> None:
    load, source = LOADERS[kind], written / kind
    expected = load(source)
    files = sorted(source.iterdir())
    equal = 0
    for number in range(-(-NUMBER // len(LOADERS))):
        chance = random.Random(f"{kind} {number}")
        copy = tmp_path / "copy"
        copy.mkdir()
        victim = chance.choice(files)
        for file in files:
            if file != victim:
                (copy / file.name).hardlink_to(file)
        damaged = copy / victim.name
        damaged.write_bytes(victim.read_bytes())
        what = corrupt(damaged, chance)
        if damaged.exists() and damaged.read_bytes() == victim.read_bytes():
            what += ", which changed nothing"
        try:
            found = load(copy)
        except InputError as error:
            text = str(error)
            assert damaged.name in text or str(copy) in text, (what, text)
            assert "\n" not in text and len(text) < 1000, (what, text)
        except AssertionError:
            # No manifest, no directory of ours: nothing is loaded.
            assert what == "delete", what
        else:
            # An export without its manifest is a model as any other tool writes it.
            manifest_gone = what == "delete" and found[0] is None
            assert manifest_gone or found == expected, what
            equal += 1
        shutil.rmtree(copy)
    assert equal <= 8, f"{equal} corruptions were not noticed, if harmless"


# -- checkpoints in parts -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["falqon-checkpoint.json", ".metadata", "meta.pt", "__0_0.distcp"])
def test_a_missing_part_is_named(written: Path, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(written / "sharded", copy)
    assert read_checkpoint(copy)["global_step"] == 7
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=rf"copy.*{name}.* use another checkpoint"):
        read_checkpoint(copy)


def test_headers_alone_are_checked(written: Path, tmp_path: Path) -> None:
    for name, read in (("meta.pt", read_meta), (".metadata", shapes)):
        copy = tmp_path / name
        shutil.copytree(written / "sharded", copy)
        data = bytearray((copy / name).read_bytes())
        data[len(data) // 2] ^= 1
        (copy / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            read(copy)


# -- scales, and what was written before --------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_a_scale_that_is_none(written: Path, tmp_path: Path, value: float) -> None:
    from falqon.delta import directory
    from falqon.manifest import read_manifest, write_manifest

    copy = tmp_path / "delta"
    shutil.copytree(written / "delta", copy)
    file = copy / directory.MANIFEST
    manifest = read_manifest(file, directory.FORMAT, directory.VERSION, "")
    manifest["layers"]["model.layers.0.mlp.up_proj"]["scale"] = value
    write_manifest(file, manifest)
    with pytest.raises(InputError, match=r"up_proj\.scale is .*, which is no scale"):
        open_delta(copy)


def test_a_checkpoint_without_a_seal_is_read(written: Path, tmp_path: Path) -> None:
    # As older releases wrote them: only the checksums of the archive's parts.
    file = tmp_path / "old.ckpt"
    expected = read_checkpoint(written / "complete" / "a.ckpt")
    torch.save(expected, file)
    assert flatten(read_checkpoint(file)) == flatten(expected)
    data = bytearray(file.read_bytes())
    data[data.find(b"FalqonPrecision") + 40] ^= 4
    file.write_bytes(data)
    with pytest.raises(InputError, match=r"old\.ckpt .* checksum of its part"):
        read_checkpoint(file)

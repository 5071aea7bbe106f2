"""`falqon meld` and what it wrote, damaged: one error with file and tensor, and nothing left."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM

from falqon.cli import main
from falqon.errors import InputError
from falqon.manifest import seal
from falqon.premeld.directory import open_melded
from falqon.premeld.run import premeld
from falqon.premeld.shards import ShardWriter
from falqon.pretrained import load_model
from falqon.recipe import update_recipe
from tests.melding import MELDING, SINGLE, make, meld_command


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("source"))


# ------------------------------------------------------------- damage


def error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    last = captured.err.splitlines()[-1]
    assert last.startswith("falqon: error: ")
    return last


def damage(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "tensor", "message"),
    [
        (lambda t: t[UP][3, 5].fill_(torch.nan), UP, "holds NaN or infinity"),
        (lambda t: t[NORM][3].fill_(torch.inf), NORM, "holds NaN or infinity"),
        (lambda t: t.pop(UP), UP, "lacks the tensor"),
        (lambda t: t.update({UP: t[UP][1:].clone()}), UP, r"has shape \(47, 32\)"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), UP, "stored as .*float8"),
    ],
    ids=["nan", "inf in a norm", "missing", "shape", "dtype"],
)
@pytest.mark.parametrize("shard", ["5GB", "12KB"], ids=["single", "shards"])
def test_damaged_source(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], object],
    tensor: str,
    message: str,
    shard: str,
) -> None:
    path = make(tmp_path / "source", shard)
    for file in path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            if tensor in opened.keys():  # noqa: SIM118
                holder = file
    damage(holder, change)
    text = error(meld_command(path, tmp_path / "out"), capsys)
    assert str(holder) in text
    assert tensor in text
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(text)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("kept", [-10, 100])
def test_truncated_source(tmp_path: Path, capsys: pytest.CaptureFixture[str], kept: int) -> None:
    path = make(tmp_path / "source", "12KB")
    file = sorted(path.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:kept])
    assert str(file) in error(meld_command(path, tmp_path / "out"), capsys)
    assert [file.name for file in tmp_path.iterdir()] == ["source"]


def test_tied_weights_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make(tmp_path / "source", tie_word_embeddings=False)
    config = path / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": True}))
    text = error(meld_command(path, tmp_path / "out"), capsys)
    assert "lm_head.weight" in text and SINGLE in text and "tie_word_embeddings" in text


def test_a_full_disk_leaves_nothing(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: ShardWriter, name: str, tensor: Tensor) -> None:
        if name.startswith("model.layers.1"):
            raise OSError(28, "No space left on device")
        write(self, name, tensor)

    write = ShardWriter.put
    monkeypatch.setattr(ShardWriter, "put", full)
    text = error(meld_command(source, tmp_path / "out"), capsys)
    assert "No space left on device" in text and str(tmp_path / "out") in text
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(source: Path, tmp_path: Path) -> None:
    left, used, other = (
        tmp_path / f".{name}.0123.falqon-partial" for name in ("out", "out.x", "another")
    )
    for directory in (left, used, other):
        directory.mkdir()
        (directory / "part").write_bytes(b"codes")
    used = used.rename(tmp_path / ".out.4567.falqon-partial")
    descriptor = os.open(used, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)  # another process at work
    premeld(str(source), tmp_path / "out", melding=MELDING)
    os.close(descriptor)
    assert {file.name for file in tmp_path.iterdir()} == {"out", used.name, other.name}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "33"], "rank 33 is larger than the 32 input features"),
        (["--recipe", "fp4"], "unknown FP8 recipe 'fp4'"),
        (["--recipe", "{1"], "is not JSON"),
        (["--include", "nothing"], "no layer of LlamaForCausalLM can be melded"),
        (["--device", "abacus"], "is no device here; there is cpu"),
        (["--device", "cuda:99"], "is no device here; there is cpu"),
        (["--revision", "main"], "Remove revision"),
    ],
)
def test_mistakes(
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert message in error(meld_command(source, tmp_path / "out", *flags), capsys)
    assert list(tmp_path.iterdir()) == []


def test_outputs_are_not_overwritten(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(meld_command(source, tmp_path / "out")) == 0
    capsys.readouterr()
    assert "exists already" in error(meld_command(source, tmp_path / "out"), capsys)
    assert "is melded already" in error(meld_command(tmp_path / "out", tmp_path / "new"), capsys)
    (tmp_path / "empty").mkdir()
    assert main(meld_command(source, tmp_path / "empty")) == 0
    assert open_melded(tmp_path / "empty") is not None


# ------------------------------------------------------------- a damaged directory


@pytest.fixture
def melded(source: Path, tmp_path: Path) -> Path:
    premeld(str(source), tmp_path / "out", melding=MELDING, keep_weights=True, shard_bytes=8000)
    return tmp_path / "out"


def first_with(path: Path, tensor: str) -> Path:
    manifest = json.loads((path / "falqon.json").read_text())
    return path / str(manifest["tensors"][tensor]["file"])


@pytest.mark.parametrize("tensor", ["model.layers.1.mlp.up_proj.codes", UP], ids=["codes", "kept"])
def test_flipped_bits_and_missing_tensors_are_named(melded: Path, tensor: str) -> None:
    directory = open_melded(melded)
    assert directory is not None

    def read() -> None:
        directory.tensors()
        directory.originals(update_recipe("compensated"))

    read()
    file = first_with(melded, tensor)
    data = file.read_bytes()
    with safe_open(file, framework="pt") as opened:
        part = opened.get_tensor(tensor).view(torch.uint8).numpy().tobytes()
    at = data.index(part) + len(part) // 2
    file.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(InputError, match=f"{file.name} is damaged: the data of {tensor} "):
        read()
    damage(file, lambda tensors: tensors.pop(tensor))
    with pytest.raises(InputError, match=f"{file.name} is damaged: the tensor {tensor} is missing"):
        read()
    file.write_bytes(data[:-9])
    with pytest.raises(InputError, match=f"{file.name} is damaged: it has {len(data) - 9} bytes "):
        read()
    file.unlink()
    with pytest.raises(InputError, match=f"{file.name} is damaged: the file is missing"):
        read()


def test_changed_config_and_manifest(melded: Path) -> None:
    config = melded / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert config.read_text() != text
    with pytest.raises(InputError, match=r"config\.json is damaged"):
        open_melded(melded)
    config.write_text(text)
    assert open_melded(melded) is not None
    manifest = melded / "falqon.json"
    text = manifest.read_text()
    content = json.loads(text)
    manifest.write_text(json.dumps(seal(content | {"version": 9})))
    with pytest.raises(InputError, match="version 9; this release reads"):
        open_melded(melded)
    before = {key: value for key, value in content.items() if key != "sha256"}
    manifest.write_text(json.dumps(before | {"version": 1}))
    with pytest.raises(InputError, match="version 1; this release reads"):
        open_melded(melded)
    manifest.write_text(json.dumps(content | {"bytes_after": 1}))
    with pytest.raises(InputError, match=r"falqon\.json is damaged"):
        open_melded(melded)
    del content["tensors"]
    manifest.write_text(json.dumps(seal(content)))
    with pytest.raises(InputError, match=r"falqon\.json has no 'tensors'"):
        open_melded(melded)
    manifest.write_text(text[:100])
    with pytest.raises(InputError, match=r"falqon\.json cannot be read"):
        open_melded(melded)


def test_it_is_no_plain_model(melded: Path) -> None:
    with pytest.raises(InputError, match="holds a melded model"):
        load_model(str(melded))
    with pytest.raises(OSError, match="no file named"):  # not random weights with a warning
        LlamaForCausalLM.from_pretrained(melded)

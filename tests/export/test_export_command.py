"""`falqon export`: its files, what is left when it fails, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_cases import Case
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from falqon import melded_layers
from falqon.checkpoint import AtomicCheckpointIO, read_checkpoint, training_hash
from falqon.cli import main
from falqon.export import export_model
from falqon.premeld import shards

ROOT = Path(__file__).parents[2]
Q = "model.layers.0.self_attn.q_proj"


def error(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("falqon: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_json_and_text(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, out = train("tied"), tmp_path / "new" / "out"
    capsys.readouterr()
    assert main(["export", str(case.file), "--output", str(out), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["output"] == str(out)
    assert report["format"] == "compressed-tensors"
    assert report["ignore"] == ["lm_head"]
    assert report["training_sha256"] == training_hash(case.content)
    names = {path.name for path in out.iterdir()}
    assert names == {*report["files"], "README.md", "falqon-export.json"}
    assert {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
    } <= names
    modes = {path.stat().st_mode for path in out.iterdir()}
    assert modes == {case.file.stat().st_mode}  # readable for whom the umask says
    sizes = {path.name: path.stat().st_size for path in out.iterdir()}
    others = sizes["README.md"] + sizes["falqon-export.json"]
    assert report["bytes"] == sum(sizes.values()) - others
    assert main(["export", str(case.file), "--output", str(tmp_path / "b"), "--format=bf16"]) == 0
    printed = capsys.readouterr().out
    for part in ("bf16", str(tmp_path / "b"), "lm_head", training_hash(case.content), "step 7"):
        assert part in printed


def test_hashes_in_the_card_are_those_of_the_files(
    train: Callable[..., Case], tmp_path: Path
) -> None:
    case, out = train("qwen2"), tmp_path / "out"
    export_model(case.file, out, shard_size="60KB")
    card = (out / "README.md").read_text()
    found = dict(re.findall(r"^    ([0-9a-f]{64})  (\S+)$", card, re.MULTILINE))
    actual = {
        hashlib.sha256(path.read_bytes()).hexdigest(): path.name
        for path in out.iterdir()
        if path.name not in ("README.md", "falqon-export.json")
    }
    assert found == actual
    assert len([name for name in found.values() if name.endswith(".safetensors")]) > 1
    for part in ("preset `paper`", "rank 4", training_hash(case.content), "Not recorded"):
        assert part in card


def test_shards(train: Callable[..., Case], tmp_path: Path) -> None:
    case = train("tied")
    export_model(case.file, tmp_path / "one", "bf16")
    export_model(case.file, tmp_path / "many", "bf16", shard_size="30KB")
    assert not (tmp_path / "one" / "model.safetensors.index.json").exists()
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("many/*.safetensors"))
    assert {path.name for path in files} == set(index["weight_map"].values())
    total = 0
    for number, path in enumerate(files, 1):
        assert path.name == f"model-{number:05}-of-{len(files):05}.safetensors"
        with safe_open(path, framework="pt") as shard:
            names = list(shard.keys())
            sizes = [shard.get_tensor(name).nbytes for name in names]
        assert all(index["weight_map"][name] == path.name for name in names)
        assert sum(sizes) <= 30_000 or len(sizes) == 1
        total += sum(sizes)
    assert index["metadata"]["total_size"] == total
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("one", "many"))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, many.state_dict()[name])


# -- a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize("update", ["paper", "compensated"])
def test_a_run_is_exported_as_it_was_validated(
    cli: Callable,
    tiny_run: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    update: str,
) -> None:
    config = tiny_run(update=update)
    config["checkpoint"] = {"every_n_train_steps": 3, "save_top_k": -1}
    fit = cli("fit", config)
    root = Path(config["trainer"]["default_root_dir"])
    capsys.readouterr()
    assert main(["export", str(root), "--output", str(tmp_path / "out"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["checkpoint"] == str(root / "served.ckpt")
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        for name, layer in melded_layers(fit.model.model).items():
            stored = file.get_tensor(f"{name}.weight").view(torch.uint8)
            assert torch.equal(stored, layer.codes[: layer.out_features])
    card = (tmp_path / "out" / "README.md").read_text()
    summary = json.loads((root / "summary.json").read_text())
    assert f"{summary['val_loss_after']:.4f}" in card
    assert config["data"]["init_args"]["train_path"] in card

    # A checkpoint within the run has changes pending; what the refusal says to do works.
    (middle,) = (root / "checkpoints").glob("*step=3.ckpt")
    said = error(capsys, middle, "--output", tmp_path / "no")
    assert "rows of B" in said and str(root / "served.ckpt") in said
    flags = re.search(r"(--ckpt_path \S+) (--trainer.max_steps \d+)", said)
    assert flags is not None
    new = f"--trainer.default_root_dir={tmp_path / 'new'}"
    given = [flag.replace(" ", "=") for flag in flags.groups()]
    cli("fit", config, *given, new)
    made = export_model(tmp_path / "new", tmp_path / "middle")
    assert made["global_step"] == 3
    assert made["files"]["model.safetensors"] != report["files"]["model.safetensors"]

    (tmp_path / "new" / "config.yaml").write_text("- : [")
    assert "config.yaml cannot be read" in error(
        capsys, tmp_path / "new", "--output", tmp_path / "no"
    )

    (tmp_path / "sharded" / "served.ckpt").mkdir(parents=True)
    assert "without a checkpoint" in error(
        capsys, tmp_path / "sharded", "--output", tmp_path / "no"
    )

    # A run that went on after it had ended is not exported with the weights of before.
    cli("fit", config, "--ckpt_path=last", "--trainer.max_steps=7")
    os.replace(tmp_path / "new" / "served.ckpt", root / "served.ckpt")
    said = error(capsys, root, "--output", tmp_path / "no")
    assert "is of step 3" in said and "of step 7" in said
    assert not (tmp_path / "no").exists()


# -- failures -----------------------------------------------------------------------------------


def test_a_failure_in_the_middle_leaves_nothing(
    train: Callable[..., Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = train("llama")
    before = sorted(path.name for path in tmp_path.iterdir())
    finish, written = shards._Shard.finish, []

    def fail(self: Any) -> Any:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(self.path)
        return finish(self)

    monkeypatch.setattr(shards._Shard, "finish", fail)
    out = tmp_path / "out"
    said = error(capsys, case.file, "--output", out, "--shard-size", "30KB")
    assert "No space left on device" in said and str(out) in said
    assert len(written) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_kill_in_the_middle_leaves_nothing_that_looks_complete(
    train: Callable[..., Case], tmp_path: Path
) -> None:
    case = train("llama")
    script = (
        "import os, signal, sys\n"
        "from falqon.premeld import shards\n"
        "from falqon.cli import main\n"
        "finish, written = shards._Shard.finish, []\n"
        "def kill(self):\n"
        "    finish(self)\n"
        "    written.append(self.path)\n"
        "    if len(written) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards._Shard.finish = kill\n"
        "main(sys.argv[1:])\n"
    )
    out = tmp_path / "out"
    arguments = ["export", str(case.file), "--output", str(out), "--shard-size", "30KB"]
    command = [sys.executable, "-c", script, *arguments]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not out.exists()
    (left,) = tmp_path.glob(".out.*")
    assert left.name.endswith(".falqon-partial")
    assert len(list(left.glob("[!.]*.safetensors"))) == 2
    assert not (left / "config.json").exists()
    assert main(arguments) == 0
    assert (out / "config.json").is_file() and (out / "README.md").is_file()


def test_an_output_that_is_taken(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, out = train("llama"), tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    assert "is not empty" in error(capsys, case.file, "--output", out)
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    assert "is a file" in error(capsys, case.file, "--output", out / "mine.txt")
    said = error(capsys, case.file, "--output", out / "mine.txt" / "below")
    assert "cannot be written" in said
    (out / "mine.txt").unlink()
    assert main(["export", str(case.file), "--output", str(out)]) == 0  # an empty one is filled


# -- refusals -----------------------------------------------------------------------------------


def spoil(key: str, value: float, index: int = 0) -> Callable[[Case], None]:
    def change(case: Case) -> None:
        tensor = case.content["state_dict"][f"model.{key}"] = case.content["state_dict"][
            f"model.{key}"
        ].clone()
        tensor.reshape(-1)[index] = value

    return change


def drop(key: str) -> Callable[[Case], None]:
    return lambda case: case.content["state_dict"].pop(f"model.{key}")


def settle(**changes: Any) -> Callable[[Case], None]:
    return lambda case: case.content["FalqonPrecision"].update(changes)


def wide(case: Case) -> None:
    case.content["state_dict"][f"model.{Q}.scale"] = torch.ones(64)


def untied(case: Case) -> None:
    spoil("lm_head.weight", 3.0)(case)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoil(f"{Q}.scale", float("nan")), (f"{Q}.scale is nan", "earlier checkpoint")),
        (spoil(f"{Q}.scale", 0.0), (f"{Q}.scale is 0.0",)),
        (spoil(f"{Q}.scale", -1.0), (f"{Q}.scale is -1.0",)),
        (wide, (f"{Q}.scale is torch.float32 (64,)",)),
        (spoil(f"{Q}.codes", 0xFF, 70), (f"{Q}.codes holds NaN",)),
        (spoil("model.norm.weight", float("inf")), ("model.norm.weight holds NaN or infinity",)),
        (spoil(f"{Q}.B", 0.5), ("1 rows of B", "step 7", "falqon export")),
        (spoil(f"{Q}.B", float("nan")), ("1 rows of B",)),
        (drop(f"{Q}.B"), (f"no {Q}.B",)),
        (drop("model.norm.weight"), ("model.norm.weight", "--model")),
        (untied, ("lm_head.weight is tied to model.embed_tokens.weight",)),
        (settle(version=1), ("state version 1",)),
        (lambda case: case.content.pop("FalqonPrecision"), ("not a FALQON checkpoint",)),
        (lambda case: case.content.pop("LitCausalLM"), ("which model", "--model")),
        (lambda case: case.content["LitCausalLM"].update(model_name="./gone"), ("./gone",)),
    ],
)
def test_bad_checkpoints(
    train: Callable[..., Case],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Case], None],
    says: tuple[str, ...],
) -> None:
    case = train("tied")
    change(case)
    case.save()
    said = error(capsys, case.file, "--output", tmp_path / "out")
    for part in says:
        assert part in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "trained.ckpt"]


def test_codes_that_were_not_rounded_for_their_inputs(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = train("llama")
    settings = case.content["FalqonPrecision"]["settings"]
    settings["policy"]["flush_rounding"] = "compensated"
    proxy = case.content["FalqonPrecision"]["proxy"]
    proxy["steps"] = dict.fromkeys(proxy["steps"], 7)
    proxy["closed"] = False
    case.save()
    said = error(capsys, case.file, "--output", tmp_path / "out")
    assert "look at training data" in said and "rows of B" not in said
    proxy["closed"] = True
    case.save()
    assert main(["export", str(case.file), "--output", str(tmp_path / "out")]) == 0


def test_damaged_files(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = train("llama")
    content = bytearray(case.file.read_bytes())
    case.file.write_bytes(content[:-100])
    assert "trained.ckpt" in error(capsys, case.file, "--output", tmp_path / "out")
    content[len(content) // 2] ^= 1
    case.file.write_bytes(content)
    assert "is damaged" in error(capsys, case.file, "--output", tmp_path / "out")
    assert "does not exist" in error(capsys, tmp_path / "no.ckpt", "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_model_can_have_moved(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, out = train("llama"), tmp_path / "out"
    moved = tmp_path / "moved"
    Path(case.base).rename(moved)
    assert case.base in error(capsys, case.file, "--output", out)
    assert main(["export", str(case.file), "--output", str(out), "--model", str(moved)]) == 0
    other = json.loads((moved / "config.json").read_text()) | {"intermediate_size": 80}
    (moved / "config.json").write_text(json.dumps(other))
    said = error(capsys, case.file, "--output", tmp_path / "b", "--model", moved)
    assert "down_proj.weight" in said and "another model" in said


def test_a_model_with_code_of_its_own(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = train("llama")
    path = Path(case.base) / "config.json"
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    said = error(capsys, case.file, "--output", tmp_path / "out")
    assert "Python code of its own" in said and "not supported" in said


def test_arguments(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, out = train("llama", recipe="none"), tmp_path / "out"
    assert "recipe 'none'" in error(capsys, case.file, "--output", out)
    for size in ("5", "0GB", "five GB", "-1GB"):
        said = error(capsys, case.file, "--output", out, f"--shard-size={size}")
        assert f"shard size {size!r}" in said
    with pytest.raises(SystemExit) as caught:
        main(["export", str(case.file), "--output", str(out), "--format", "gguf"])
    assert caught.value.code == 2
    with pytest.raises(SystemExit) as caught:
        main(["export", "--help"])
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    for part in ("--format", "--output", "--shard-size", "5GB", "served.ckpt", "docs/serving.md"):
        assert part in printed


def test_reading_runs_no_code_from_the_file(
    train: Callable[..., Case], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = train("llama")
    case.content["hyper_parameters"] = Path("an object")
    AtomicCheckpointIO().save_checkpoint(case.content, case.file)
    assert "is not loaded" in error(capsys, case.file, "--output", tmp_path / "out")
    with pytest.raises(ValueError, match="is not loaded"):
        read_checkpoint(case.file)

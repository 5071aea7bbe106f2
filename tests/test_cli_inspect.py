"""`falqon inspect`: what it reports, as text and as JSON, and how it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from falqon.checkpoint import AtomicCheckpointIO, training_hash
from falqon.cli import main

RANK = 4
SHAPES = {"layers.0.q": (32, 16), "layers.0.k": (8, 16), "layers.1.q": (32, 16)}


def falqon_checkpoint(emulate: bool = False) -> dict[str, Any]:
    """A checkpoint as the precision plugin and Lightning write it."""
    state: dict[str, Any] = {}
    moments: dict[int, Any] = {}
    for index, (fqn, (out, columns)) in enumerate(SHAPES.items()):
        dtype = torch.float32 if emulate else torch.uint8
        state[f"model.{fqn}.codes"] = torch.ones(out + RANK, columns, dtype=dtype)
        state[f"model.{fqn}.scale"] = torch.ones(1)
        state[f"model.{fqn}.B"] = torch.zeros(out, RANK)
        moments[index] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(out, RANK)}
    state["model.layers.0.k.bias"] = torch.zeros(8, dtype=torch.bfloat16)
    state["model.embed.weight"] = torch.zeros(50, 16, dtype=torch.bfloat16)
    state["model.lm_head.weight"] = state["model.embed.weight"]  # tied
    return {
        "epoch": 1,
        "global_step": 42,
        "state_dict": state,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]}],
        "FalqonPrecision": {
            "version": 1,
            "settings": {
                "rank": RANK,
                "update": "anchored",
                "rows": None,
                "recipe": {"activations": "per_token", "emulate": "fp8"},
            },
            "skipped": {"lm_head": "not divisible by 16"},
        },
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(falqon_checkpoint(), path)
    return path


def report(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main(["inspect", str(path), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    loaded = json.loads(captured.out)
    assert isinstance(loaded, dict)
    return loaded


def error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("falqon: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(file, capsys)
    backbone = 2 * 32 * 16 + 8 * 16
    assert found == {
        "path": str(file),
        "method": "FALQON",
        "holds": "all weights",
        "base_sha256": None,
        "global_step": 42,
        "epoch": 1,
        "settings": falqon_checkpoint()["FalqonPrecision"]["settings"],
        "melded": [
            {"count": 1, "out": 8, "in": 16, "rank": RANK},
            {"count": 2, "out": 32, "in": 16, "rank": RANK},
        ],
        "not_melded": {"lm_head": "not divisible by 16"},
        "parameters": {
            "model": backbone + 50 * 16 + 8,  # tied weights count once
            "melded_backbone": backbone,
            "other": 50 * 16 + 8,
            "adapter_A": 3 * RANK * 16,
            "trainable_B": (32 + 8 + 32) * RANK,
        },
        "bytes": {
            "codes": backbone + 3 * RANK * 16,
            "scales": 3 * 4,
            "B": (32 + 8 + 32) * RANK * 4,
            "other_weights": (50 * 16 + 8) * 2,
            "optimizer_state": (32 + 8 + 32) * RANK * 4 + 3 * 4,
            "update_state": 0,
        },
        "pending_rows": 0,
        "file_bytes": file.stat().st_size,
        "training_sha256": training_hash(falqon_checkpoint()),
    }


def test_text(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(file)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for expected in (
        ["method", "FALQON"],
        ["global", "step", "42"],
        ["epoch", "1"],
        ["rank", "4"],
        ["update", "anchored"],
        ["rows", "None"],
        ["recipe.activations", "per_token"],
        ["melded", "layers", "3"],
        ["2", "of", "out", "x", "in", "=", "32", "x", "16,", "rank", "4"],
        ["lm_head:", "not", "divisible", "by", "16"],
        ["codes", "1,344"],
        ["training", "SHA-256", training_hash(falqon_checkpoint())],
    ):
        assert expected in lines


def test_a_run_directory_means_its_last_checkpoint(
    file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = file.parents[1]
    assert report(run, capsys)["path"] == str(file)
    file.rename(file.with_name("epoch=1.ckpt"))
    assert "checkpoints/epoch=1.ckpt: name one" in error(["inspect", str(run)], capsys)
    file.with_name("epoch=1.ckpt").unlink()
    assert "holds no .ckpt file" in error(["inspect", str(run)], capsys)


def test_codes_in_high_precision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(falqon_checkpoint(emulate=True), path)
    found = report(path, capsys)
    assert found["bytes"]["codes"] == 4 * 1344
    assert found["parameters"]["melded_backbone"] == 1152


def test_weights_only_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = falqon_checkpoint()
    del checkpoint["optimizer_states"]
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert report(path, capsys)["bytes"]["optimizer_state"] == 0


def test_another_methods_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"w": torch.ones(1)}}, path)
    assert "is not a FALQON checkpoint" in error(["inspect", str(path)], capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no B", "layers.0.k has codes but no layers.0.k.B"),
        ("no scale", "layers.0.k has codes but no layers.0.k.scale"),
        ("rows", "shapes of layer layers.0.k disagree"),
    ],
)
def test_layers_that_do_not_fit(
    change: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = falqon_checkpoint()
    state = checkpoint["state_dict"]
    if change == "rows":
        state["model.layers.0.k.B"] = torch.zeros(9, RANK)
    else:
        del state[f"model.layers.0.k.{change.removeprefix('no ')}"]
    path = tmp_path / "a.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint, path)
    assert message in error(["inspect", str(path)], capsys)


def test_files_that_cannot_be_read(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "does not exist" in error(["inspect", str(tmp_path / "no.ckpt")], capsys)
    file.write_bytes(file.read_bytes()[:-100])
    assert "last.ckpt" in error(["inspect", str(file), "--json"], capsys)


@pytest.mark.parametrize("arguments", [[], ["inspect"], ["nothing"], ["inspect", "a", "--what"]])
def test_arguments_that_do_not_parse(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage: falqon" in capsys.readouterr().err


def test_help_names_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    assert "inspect" in capsys.readouterr().out

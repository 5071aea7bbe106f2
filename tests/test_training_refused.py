"""train.py refuses what it cannot use: one clear error, before any long work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file


def refusal(
    cli: Callable, config: dict[str, Any], capsys: pytest.CaptureFixture[str], *flags: str
) -> str:
    """What `fit` prints on stderr when it refuses."""
    with pytest.raises(SystemExit) as error:
        cli("fit", config, *flags)
    assert error.value.code == 2
    return str(capsys.readouterr().err)


def damaged_model(
    source: str, target: Path, change: Callable[[dict[str, torch.Tensor]], None]
) -> str:
    shutil.copytree(source, target)
    weights = load_file(target / "model.safetensors")
    change(weights)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"plugin.update": "best"}, ("preset 'best'", "paper", "released")),
        ({"plugin.rank": 0}, ("rank is 0",)),
        ({"plugin.rank": 4096}, ("rank 4096", "input features")),
        ({"plugin.rows": 0}, ("rows is 0",)),
        ({"plugin.rows": 65}, ("rows is 65", "at most 64")),
        ({"plugin.recipe": "fp4"}, ("recipe 'fp4'", "default")),
        ({"plugin.recipe": {"scaling": "delayed"}}, ("per_tensor",)),
        ({"data.train_path": "missing.json"}, ("missing.json",)),
        ({"model.model_name": "./no/such/model"}, ("no/such/model",)),
        ({"trainer.strategy": "deepspeed"}, ("DeepSpeed", "ddp")),
        ({"ckpt_path": "missing.ckpt"}, ("missing.ckpt", "ckpt_path")),
        ({"checkpoint.every_n_train_steps": 0}, ("checkpoint.every_n_train_steps is 0",)),
        (
            {"data.packing": True, "model.attn_implementation": "flash_attention_2"},
            ("flash_attention_2", "packed", "batch_size"),
        ),
    ],
)
def test_bad_settings_give_one_clear_error(
    cli: Callable,
    tiny_run: Callable,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, Any],
    says: tuple[str, ...],
) -> None:
    config = tiny_run()
    places = {
        "plugin": config["trainer"]["plugins"][0]["init_args"],
        "data": config["data"]["init_args"],
        "model": config["model"]["init_args"],
        "trainer": config["trainer"],
        "checkpoint": config["checkpoint"],
    }
    for key, value in change.items():
        place, _, name = key.rpartition(".")
        places.get(place, config)[name] = value
    printed = refusal(cli, config, capsys)
    for part in says:
        assert part in printed
    assert "Traceback" not in printed
    assert not (Path(config["trainer"]["default_root_dir"]) / "checkpoints").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"instruction": "a", "output": "b"}\n{"instruction": ', ("row 2",)),
        ('{"instruction": "a", "answer": "b"}\n', ("output", "answer")),
        ("", ("rows.jsonl",)),
        ('{"instruction": "a", "output": " "}\n', ("rows.jsonl",)),
    ],
)
def test_bad_data_gives_one_clear_error(
    cli: Callable,
    tiny_run: Callable,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
    says: tuple[str, ...],
) -> None:
    config = tiny_run()
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    config["data"]["init_args"]["train_path"] = str(path)
    printed = refusal(cli, config, capsys)
    for part in says:
        assert part in printed


def test_nan_weights_and_pickles_are_refused(
    cli: Callable,
    tiny_run: Callable,
    tmp_path: Path,
    tokenizer_dir: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_run()
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):

        def spoil(weights: dict[str, torch.Tensor], name: str = name) -> None:
            weights[name].flatten()[5] = float("nan")

        damaged = damaged_model(tokenizer_dir, tmp_path / name, spoil)
        config["model"]["init_args"]["model_name"] = damaged
        assert name in refusal(cli, config, capsys)
    pickled = tmp_path / "pickled"
    shutil.copytree(tokenizer_dir, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    config["model"]["init_args"]["model_name"] = str(pickled)
    assert "pytorch_model.bin" in refusal(cli, config, capsys)


def test_a_checkpoint_of_another_recipe_is_refused(
    cli: Callable, tiny_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_run()
    cli("fit", config, "--trainer.max_steps=2")
    for key, value in (("rank", 8), ("recipe", "paper"), ("update", "released")):
        other = tiny_run(**{key: value})
        assert key in refusal(cli, other, capsys, "--ckpt_path=last")

"""Update policies through train.py: resume, what a run serves, what its files say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from falqon.checkpoint import read_checkpoint
from falqon.checkpoint.inspect import inspect_checkpoint
from falqon.fp8 import E4M3, encode
from falqon.recipe import PRESETS
from tests.test_training import Config, digest, rows, set_root

POLICIES: dict[str, str | dict[str, Any]] = {
    "feedback": "feedback",
    "live": "live",
    "compensated": {"preset": "compensated", "every": 2, "calibration_memory": 1},
    "live on codes, every 3": {"preset": "live", "written": "codes", "every": 3},
    "flips, aged": {"preset": "feedback", "select": "flips", "max_age": 5, "rows": 2},
    "threshold": {"preset": "live", "rows": "all", "threshold": 0.05, "rounding": "stochastic"},
}


@pytest.mark.parametrize("policy", POLICIES)
def test_a_cut_run_ends_as_one_that_was_not(
    cli: Callable, tiny_run: Callable, tmp_path: Path, policy: str
) -> None:
    config = tiny_run(update=POLICIES[policy], rows=None)
    config["trainer"]["max_steps"] = 7
    config["trainer"]["limit_val_batches"] = 1
    config["report"]["sample_answer"] = False
    straight = set_root(config, tmp_path / "straight")
    cli("fit", config)
    resumed = set_root(config, tmp_path / "resumed")
    cli("fit", config, "--trainer.max_steps=4")  # ends with a flush, which its checkpoint is before
    middle = digest(resumed)
    cli("fit", config, f"--ckpt_path={resumed}/checkpoints/last.ckpt")
    assert digest(resumed) == digest(straight) != middle
    summaries = [json.loads((r / "summary.json").read_text()) for r in (straight, resumed)]
    assert summaries[0]["val_loss_after"] == summaries[1]["val_loss_after"]


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_at_the_end_is_that_of_the_flushed_weights(
    cli: Callable, tiny_run: Callable, preset: str
) -> None:
    # Few rows, so that something is pending at the end; `released` would lose nearly all of it.
    config = tiny_run(update=preset, rows="rank" if preset == "released" else 2)
    config["report"]["sample_answer"] = False
    fit = cli("fit", config)
    root = Path(config["trainer"]["default_root_dir"])
    plugin = fit.trainer.precision_plugin
    assert not plugin.is_pending()
    summary = json.loads((root / "summary.json").read_text())
    assert summary["val_loss_after"] < summary["val_loss_before"] - 0.01
    last = [float(r["val/loss"]) for r in rows(root) if r["val/loss"]][-1]
    assert summary["val_loss_after"] == pytest.approx(last)
    checkpoint = root / "checkpoints" / "last.ckpt"
    pending = inspect_checkpoint(checkpoint)["pending_rows"]
    assert (pending == 0) == (preset == "released")  # the checkpoint is to be resumed from
    # Another process that only evaluates comes to the same weights and so to the same loss.
    served = {name: layer.codes.clone() for name, layer in plugin.layers.items()}
    validate = cli("validate", config, f"--ckpt_path={checkpoint}")
    layers = validate.trainer.precision_plugin.layers
    assert all(torch.equal(layers[name].codes, codes) for name, codes in served.items())
    assert float(validate.trainer.callback_metrics["val/loss"]) == summary["val_loss_after"]
    if preset in ("master", "live"):
        state = read_checkpoint(checkpoint)
        weights = load_file(Path(config["model"]["init_args"]["model_name"]) / "model.safetensors")
        name = "model.layers.1.mlp.down_proj"
        layer = plugin.layers[name]
        applied = state["FalqonPrecision"]["proxy"]["applied"][name]
        total = state["state_dict"][f"model.{name}.B"].clone()
        total[state["FalqonChanges"]["rows"][name][: len(applied)].long()] += applied
        target = weights[f"{name}.weight"].bfloat16().float() + total @ layer.dequantized_adapter()
        expected = encode(target * layer.scale, E4M3)
        # To the last bit but for ties that float32 sums in another order decide otherwise.
        assert (expected != served[name][: layer.out_features]).float().mean() < 1e-3


def test_plot_and_metrics_of_the_update(cli: Callable, tiny_run: Callable) -> None:
    config = tiny_run(update="live", rows=1)
    cli("fit", config)
    root = Path(config["trainer"]["default_root_dir"])
    trained = [r for r in rows(root) if r["train/loss"]]
    assert float(trained[-1]["falqon/pending_norm"]) > 0
    assert float(trained[-1]["falqon/staleness"]) > 1
    assert (root / "landed.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("preset", ["anchored", "master"])
def test_a_checkpoint_of_another_model_is_refused(
    cli: Callable, tiny_run: Callable, capsys: pytest.CaptureFixture[str], preset: str
) -> None:
    config: Config = tiny_run(update=preset)
    cli("fit", config, "--trainer.max_steps=2")
    file = Path(config["model"]["init_args"]["model_name"]) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] += 1.0
    save_file(tensors, file, {"format": "pt"})
    last = Path(config["trainer"]["default_root_dir"]) / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit) as stopped:
        cli("fit", config, f"--ckpt_path={last}")
    assert stopped.value.code == 2
    assert "not the one this checkpoint was trained from" in capsys.readouterr().err


def test_mistakes_in_the_policy_are_one_sentence(
    cli: Callable, tiny_run: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli("fit", tiny_run(update="best"))
    assert "choose one of anchored, compensated, feedback" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli("fit", tiny_run(update={"preset": "live", "speed": 3}))
    assert "unknown key 'speed' in the update policy" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PagedAdamW32bit", "AdamW8bit"])
def test_optimizers_of_bitsandbytes_train_and_resume(
    cli: Callable, tiny_run: Callable, tmp_path: Path, name: str
) -> None:
    pytest.importorskip("bitsandbytes")
    config = tiny_run()
    config["model"]["init_args"]["optimizer"]["class_path"] = f"bitsandbytes.optim.{name}"
    config["trainer"]["limit_val_batches"] = 1
    config["report"]["sample_answer"] = False
    straight = set_root(config, tmp_path / "straight")
    cli("fit", config)
    resumed = set_root(config, tmp_path / "resumed")
    cli("fit", config, "--trainer.max_steps=4")
    cli("fit", config, f"--ckpt_path={resumed}/checkpoints/last.ckpt")
    assert digest(resumed) == digest(straight)
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["val_loss_after"] < summary["val_loss_before"]

"""Small checkpoints: what is in them, that they resume, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from falqon.checkpoint import read_checkpoint
from falqon.cli import main
from falqon.meld import melded_layers


def run_of(config: dict[str, Any]) -> Path:
    return Path(config["trainer"]["default_root_dir"])


def test_it_holds_what_was_changed(cli: Callable, tiny_run: Callable) -> None:
    config = tiny_run(update={"preset": "compensated", "every": 2}, rows=3)
    config["trainer"]["limit_val_batches"] = 0
    config["report"]["sample_answer"] = False
    fit = cli("fit", config, "--trainer.max_steps=4")
    file = run_of(config) / "checkpoints" / "last.ckpt"
    checkpoint = read_checkpoint(file)
    layers = melded_layers(fit.model.model)
    # B is all that is left of the model's state: no embedding, no norm, no codes.
    assert set(checkpoint["state_dict"]) == {f"model.{name}.B" for name in layers}
    changes, applied = (
        checkpoint["FalqonChanges"],
        checkpoint["FalqonPrecision"]["proxy"]["applied"],
    )
    for name, layer in layers.items():
        rows, codes = changes["rows"][name], changes["codes"][name]
        assert codes.shape == (len(rows), layer.in_features)
        written = len(rows) - layer.rank
        assert 0 < written <= 2 * 3  # two writes of three rows
        assert applied[name].shape == (written, layer.rank)
        assert rows[written:].tolist() == list(range(layer.out_features, len(layer.codes)))
    complete = read_checkpoint(run_of(config) / "served.ckpt")
    assert "FalqonChanges" not in complete
    assert "model.model.embed_tokens.weight" in complete["state_dict"]
    # Its size: B and two moments, the rows, and what every file has.
    proxies = sum(layer.B.numel() for layer in layers.values())
    held = sum(t.nbytes for t in [*changes["codes"].values(), *applied.values()])
    assert file.stat().st_size < 12 * proxies + held + 60_000


def test_all_weights_on_request_and_from_these_on(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    # Saved complete, resumed from that with small ones, and the other way round: the same weights.
    config = tiny_run(update="live", rows=2)
    config["trainer"]["limit_val_batches"] = 0
    config["report"]["sample_answer"] = False
    served = []
    for name, kinds in {"a": ("true", "false"), "b": ("false", "true"), "c": ("false",)}.items():
        config["trainer"]["default_root_dir"] = str(tmp_path / name)
        for number, kind in enumerate(kinds):
            steps = 3 if number + 1 < len(kinds) else 6
            flags = ["--ckpt_path=last"] if number else []
            flags += [f"--trainer.max_steps={steps}", f"--checkpoint.complete={kind}"]
            cli("fit", config, *flags)
            last = read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")
            assert ("FalqonChanges" in last) == (kind == "false")
        served.append(read_checkpoint(tmp_path / name / "served.ckpt")["state_dict"])
    for state in served[1:]:
        assert all(torch.equal(state[key], value) for key, value in served[0].items())


def test_another_base_is_refused(
    cli: Callable, tiny_run: Callable, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tiny_run()  # a policy without originals, which would notice by themselves
    config["trainer"]["limit_val_batches"] = 0
    config["report"]["sample_answer"] = False
    cli("fit", config, "--trainer.max_steps=2")
    assert main(["inspect", str(run_of(config))]) == 0
    assert "changes" in capsys.readouterr().out
    file = Path(config["model"]["init_args"]["model_name"]) / "model.safetensors"
    before = file.read_bytes()
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][0, 0] += 1.0  # not even melded
    save_file(tensors, file, {"format": "pt"})
    try:
        with pytest.raises(SystemExit) as stopped:
            cli("fit", config, "--ckpt_path=last", "--trainer.max_steps=3")
    finally:
        file.write_bytes(before)
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert "not the one this checkpoint was trained from" in said
    assert "model.embed_tokens.weight" in said

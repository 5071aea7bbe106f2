"""A model from whatever names it: the numbers are those of the model in memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from falqon import Fp8Recipe, InputError, MeldRecipe, melded_layers
from falqon.checkpoint import AtomicCheckpointIO, read_checkpoint, training_hash
from falqon.export import export_model
from falqon.loading import open_model
from falqon.premeld.run import premeld

IDS = torch.arange(5, 45).reshape(2, 20)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "plugin",
    [
        {"update": "compensated"},
        {"update": "paper", "recipe": {"base": "paper", "scaling": "delayed", "amax_history": 2}},
        {"update": "paper", "recipe": "none", "dtype": "fp32", "groups": False},
    ],
    ids=["compensated", "delayed", "exact"],
)
def test_a_run_gives_the_logits_of_the_model_in_memory(
    cli: Callable, tiny_run: Callable, plugin: dict
) -> None:
    config = tiny_run(**plugin)
    fit = cli("fit", config)
    trained = fit.model.model.eval()
    opened = open_model(config["trainer"]["default_root_dir"], hashed=True)
    loaded = opened.load()
    assert torch.equal(logits(loaded), logits(trained))
    assert type(loaded.model.layers[0]) is type(trained.model.layers[0])  # grouped alike
    found = opened.description
    assert (found.kind, found.step, found.prompt) == ("checkpoint", 6, "alpaca")
    assert found.base == config["model"]["init_args"]["model_name"]
    assert Path(found.file).name == "served.ckpt"
    assert found.sha256 == training_hash(read_checkpoint(found.file))
    json.dumps(found.plain())
    assert not any(p.requires_grad for p in loaded.parameters())
    base = open_model(found.base).load()
    assert not torch.equal(logits(base).float(), logits(loaded).float())


def test_pending_changes_are_refused_or_computed_as_in_training(
    cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    config = tiny_run(update={"preset": "live", "every": 100})
    cli("fit", config)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(InputError, match="is not what would be served"):
        open_model(str(last))
    live = open_model(str(last), as_trained=True).load()
    assert all(layer.live for layer in melded_layers(live).values())
    with_pending = logits(live)
    for layer in melded_layers(live).values():
        assert layer.B.any()
        layer.live = False
    assert not torch.equal(logits(live), with_pending)


def test_directories(cli: Callable, tiny_run: Callable, tmp_path: Path, tokenizer_dir: str) -> None:
    pytest.importorskip("compressed_tensors")
    config = tiny_run()
    fit = cli("fit", config)
    root = Path(config["trainer"]["default_root_dir"])
    for form in ("compressed-tensors", "bf16"):
        export_model(root, tmp_path / form, form)
    opened = open_model(str(tmp_path / "compressed-tensors"))
    assert (opened.description.kind, opened.description.prompt) == ("exported", "alpaca")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "compressed-tensors").eval()
    assert torch.equal(logits(opened.load()), logits(plain))
    bf16 = open_model(str(tmp_path / "bf16"))
    assert (bf16.description.kind, bf16.description.prompt) == ("model", "alpaca")
    name, layer = next(iter(melded_layers(fit.model.model).items()))
    stored = bf16.load().get_submodule(name).weight.float()
    assert torch.equal(stored, layer.dequantized_weight())
    premeld(tokenizer_dir, tmp_path / "melded", Fp8Recipe(), MeldRecipe(rank=4))
    melded = open_model(str(tmp_path / "melded"))
    assert (melded.description.kind, melded.description.base) == ("melded", tokenizer_dir)
    assert len(melded_layers(melded.load())) == 14


def test_wrong_names_and_models_are_refused(
    cli: Callable, tiny_run: Callable, tmp_path: Path, tokenizer_dir: str
) -> None:
    with pytest.raises(InputError, match=r"no file or directory './nothing'"):
        open_model("./nothing")
    with pytest.raises(InputError, match="gone.ckpt does not exist"):
        open_model(str(tmp_path / "gone.ckpt"))
    cli("fit", tiny_run())
    served = tmp_path / "run" / "served.ckpt"
    checkpoint = read_checkpoint(served)
    for name in [n for n in checkpoint["state_dict"] if ".layers.1." in n]:
        del checkpoint["state_dict"][name]
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "half.ckpt")
    with pytest.raises(InputError, match="are missing from its files"):
        open_model(str(tmp_path / "half.ckpt")).load()
    small = json.loads((Path(tokenizer_dir) / "config.json").read_text()) | {"num_hidden_layers": 1}
    (tmp_path / "small").mkdir()
    for file in Path(tokenizer_dir).iterdir():
        (tmp_path / "small" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "small" / "config.json").write_text(json.dumps(small))
    with pytest.raises(InputError, match=r"has no model\.layers\.1\..*among the weights"):
        open_model(str(served), base=str(tmp_path / "small")).load()

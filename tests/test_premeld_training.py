"""Training from a directory of `falqon meld`: the run is the one from the original model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from falqon.checkpoint import read_checkpoint, training_hash
from falqon.cli import main as falqon_command
from falqon.errors import InputError
from falqon.precision import FalqonPrecision
from falqon.premeld.directory import open_melded
from falqon.premeld.load import load_melded
from falqon.premeld.run import premeld
from falqon.recipe import Fp8Recipe, MeldRecipe, fp8_recipe
from falqon.training import FalqonCLI

RANK = 4
Run = Callable[..., dict[str, Any]]
Cli = Callable[..., FalqonCLI]


@pytest.fixture
def melded(tokenizer_dir: str, tmp_path: Path) -> str:
    path = tmp_path / "melded"
    premeld(tokenizer_dir, path, melding=MeldRecipe(rank=RANK), keep_weights=True)
    return str(path)


def use(config: dict[str, Any], model: str) -> dict[str, Any]:
    config["model"]["init_args"]["model_name"] = model
    return config


def hash_of(run: Path) -> str:
    return training_hash(read_checkpoint(run / "checkpoints" / "last.ckpt"))


@pytest.mark.parametrize("preset", ["compensated", "paper", "anchored"])
def test_the_run_is_the_same(
    tiny_run: Run, cli: Cli, melded: str, tmp_path: Path, preset: str
) -> None:
    hashes = []
    for name in ("original", "melded"):
        config = tiny_run(update=preset)
        if name == "melded":
            use(config, melded)
        config["trainer"]["default_root_dir"] = str(tmp_path / name)
        cli("fit", config)
        hashes.append(hash_of(tmp_path / name))
    assert hashes[0] == hashes[1]
    # The directory is as it was: what is trained is a private copy of its pages.
    directory = open_melded(melded)
    assert directory is not None and directory.tensors()


def test_it_resumes_and_predicts(tiny_run: Run, cli: Cli, melded: str, tmp_path: Path) -> None:
    config = use(tiny_run(update="compensated"), melded)
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    cli("fit", config, "--trainer.default_root_dir", whole)
    cli("fit", config, "--trainer.default_root_dir", parts, "--trainer.max_steps", "3")
    cli("fit", config, "--trainer.default_root_dir", parts, "--ckpt_path", "last")
    assert hash_of(Path(whole)) == hash_of(Path(parts))
    cli("predict", config, "--trainer.default_root_dir", whole, "--ckpt_path", "last")
    assert (Path(whole) / "predictions.jsonl").read_text().count("\n") == 8


def test_the_run_can_be_exported(
    tiny_run: Run, cli: Cli, melded: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    exported = {}
    for name, model in (("melded", melded), ("original", tokenizer_dir)):
        config = use(tiny_run(), model)
        config["trainer"]["default_root_dir"] = str(tmp_path / name)
        cli("fit", config)
        directory = tmp_path / f"{name}-fp8"
        assert falqon_command(["export", str(tmp_path / name), "--output", str(directory)]) == 0
        exported[name] = load_file(directory / "model.safetensors")
        assert (directory / "tokenizer_config.json").is_file()
    assert exported["melded"].keys() == exported["original"].keys()
    for name, tensor in exported["original"].items():
        assert torch.equal(exported["melded"][name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.fixture
def refused(cli: Cli, capsys: pytest.CaptureFixture[str]) -> Callable[[dict[str, Any]], str]:
    """Runs a configuration that ends with one line on stderr and status 2."""

    def run(config: dict[str, Any]) -> str:
        with pytest.raises(SystemExit) as caught:
            cli("fit", config)
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_other_settings_are_named(
    tiny_run: Run, refused: Callable[[dict[str, Any]], str], melded: str
) -> None:
    text = refused(use(tiny_run(rank=8, seed=5, adapter="kaiming", dtype="fp32"), melded))
    for part in (
        "rank (directory 4, configuration 8)",
        "seed (directory 0, configuration 5)",
        "adapter (directory 'svd_weight', configuration 'kaiming')",
        "dtype (directory 'bf16', configuration 'fp32')",
    ):
        assert part in text
    assert "svd (" not in text and "include" not in text


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"recipe": "paper"}, "recipe.weight_scale_rounding"),
        ({"recipe": "none"}, "recipe.emulate"),
        ({"include": ["*mlp*"]}, "include"),
        ({"exclude": ["*mlp*"]}, "exclude"),
        ({"output_embedding": True}, "output_embedding"),
        ({"svd": "full"}, "svd"),
    ],
)
def test_every_setting_is_compared(melded: str, settings: dict[str, Any], key: str) -> None:
    plugin = FalqonPrecision(rank=RANK, **settings)
    directory = open_melded(melded)
    assert directory is not None
    with pytest.raises(InputError, match=rf"settings: {key} \(directory [^;]*\. Give these"):
        directory.check_settings(plugin.fp8, plugin.melding, plugin.dtype_name)
    model = load_melded(directory, Fp8Recipe(), MeldRecipe(rank=RANK))
    with pytest.raises(InputError, match=f"settings: {key}"):
        plugin.convert(model, premelded=directory)


def test_settings_of_the_run_are_free(melded: str) -> None:
    """They decide no stored byte, and act in the layers that are built."""
    recipe = {"activations": "per_tensor", "gradients": "per_tensor", "scaling": "delayed"}
    plugin = FalqonPrecision(
        rank=RANK,
        recipe=recipe,
        lora_alpha=16,
        groups=False,
        update={"preset": "compensated", "seed": 7},
    )
    directory = open_melded(melded)
    assert directory is not None
    model = load_melded(directory, plugin.fp8, plugin.melding)
    plugin.convert(model, premelded=directory)
    layer = plugin.layers["model.layers.0.mlp.up_proj"]
    assert layer.recipe == fp8_recipe(recipe)
    assert layer.lora_scaling == 16 / RANK
    assert plugin.report is not None and not plugin.report.grouped


def test_no_second_copy(melded: str) -> None:
    """Nothing of the weights is copied until it is written; grouped codes are laid together."""
    plugin = FalqonPrecision(rank=RANK, groups=False)
    directory = open_melded(melded)
    assert directory is not None
    originals = directory.originals(plugin.update)
    model = load_melded(directory, plugin.fp8, plugin.melding)
    plugin.convert(model, premelded=directory)
    maps = Path("/proc/self/maps")
    if not maps.is_file():
        pytest.skip("reads /proc")
    spans = [
        (int(low, 16), int(high, 16))
        for line in maps.read_text().splitlines()
        if "/melded/" in line
        for low, high in [line.split()[0].split("-")]
    ]

    def is_mapped(tensor: torch.Tensor) -> bool:
        return any(low <= tensor.data_ptr() < high for low, high in spans)

    assert plugin.proxy_update is not None
    kept = plugin.proxy_update.originals()
    assert originals.keys() == kept.keys() and all(map(is_mapped, kept.values()))
    assert all(is_mapped(layer.codes) for layer in plugin.layers.values())
    assert is_mapped(model.model.embed_tokens.weight) and is_mapped(model.lm_head.weight)
    assert not is_mapped(next(iter(plugin.layers.values())).B)


def test_what_it_does_not_hold(
    tiny_run: Run, refused: Callable[[dict[str, Any]], str], melded: str
) -> None:
    config = use(tiny_run(), melded)
    settings = config["model"]["init_args"]
    settings["compare_with_base"] = True
    assert "compare_with_base measures the model before" in refused(config)
    settings["compare_with_base"] = False
    config["trainer"]["plugins"] = []
    settings["method"] = {"class_path": "lit_modules.methods.FullFinetune"}
    assert "holds a melded model (falqon meld), not its 16-bit weights" in refused(config)


def test_without_originals_the_default_policy_says_so(
    tiny_run: Run,
    refused: Callable[[dict[str, Any]], str],
    tokenizer_dir: str,
    tmp_path: Path,
) -> None:
    premeld(tokenizer_dir, tmp_path / "out", melding=MeldRecipe(rank=RANK))
    text = refused(use(tiny_run(update="compensated"), str(tmp_path / "out")))
    assert "--keep-weights" in text and "'anchored'" in text

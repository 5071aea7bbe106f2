"""Every YAML in configs/ is parsed and its classes are made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from falqon import FalqonPrecision, ShardedStrategy
from falqon.training import FalqonCLI, run

ROOT = Path(__file__).parents[1]
BASE = "smollm2_alpaca.yaml"
OVERLAYS = {"ddp": DDPStrategy, "fsdp2": ShardedStrategy, "tp": ShardedStrategy}
EVERY = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in EVERY if path.stem not in OVERLAYS]
METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


@pytest.fixture
def instantiate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Everything that `fit` makes before it would train."""

    def make(path: Path, *flags: str) -> FalqonCLI:
        monkeypatch.setattr("sys.argv", ["train.py"])
        monkeypatch.setattr(Trainer, "fit", lambda *args, **kwargs: None)
        monkeypatch.setattr(FalqonCLI, "after_fit", lambda self: None)
        flags = (*flags, f"--trainer.default_root_dir={tmp_path}", "--wandb.mode=disabled")
        return run(["fit", f"--config={path}", *flags])

    return make


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_config_can_be_instantiated(path: Path, instantiate) -> None:
    cli = instantiate(path, "--trainer.accelerator=cpu")
    assert isinstance(cli.trainer.precision_plugin, FalqonPrecision)
    assert cli.trainer.max_steps > 0
    assert cli.datamodule.tokenizer_name == cli.model.model_name
    optimizer = cli.model.optimizer([cli_parameter()])
    cli.model.lr_scheduler(optimizer)
    assert optimizer.param_groups[0]["lr"] > 0


@pytest.mark.parametrize("path", METHODS, ids=lambda p: p.stem)
def test_method_can_be_instantiated(path: Path, instantiate) -> None:
    first = ROOT / "configs" / ("llama7b_alpaca.yaml" if path.stem == "lora" else BASE)
    cli = instantiate(first, f"--config={path}", "--trainer.accelerator=cpu")
    other_settings = {"falqon_paper": "falqon"}
    assert cli.model.method.name == other_settings.get(path.stem, path.stem)
    if path.stem == "falqon_paper":
        plugin = cli.trainer.precision_plugin
        assert (plugin.update.preset, plugin.update.rows) == ("paper", 10)
        assert plugin.melding.adapter == "svd_error"
    cli.model.method.check(cli.trainer)  # method and plugin go together
    optimizer = cli.model.optimizer([cli_parameter()])
    given = yaml.safe_load(path.read_text())["model"]["init_args"]["optimizer"]
    assert type(optimizer).__name__ == given["class_path"].rpartition(".")[2]
    assert optimizer.param_groups[0]["lr"] == given["init_args"]["lr"]


@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("name", ["quickstart", "llama7b_alpaca"])
def test_overlay_changes_where_it_runs(name: str, overlay: str, instantiate) -> None:
    configs = ROOT / "configs"
    cli = instantiate(
        configs / f"{name}.yaml", f"--config={configs / overlay}.yaml", "--trainer.accelerator=cpu"
    )
    assert type(cli.trainer.strategy) is OVERLAYS[overlay]
    alone = instantiate(configs / f"{name}.yaml", "--trainer.accelerator=cpu")
    assert cli.trainer.max_steps == alone.trainer.max_steps
    rates = []
    for made in (cli, alone):
        optimizer = made.model.optimizer([cli_parameter()])
        rates.append(optimizer.param_groups[0]["lr"])
        if made is cli and overlay != "ddp":
            assert type(optimizer) is torch.optim.AdamW
            assert not made.model.compare_with_base
            sizes = (optimizer.param_groups[0]["weight_decay"], optimizer.param_groups[0]["betas"])
            assert sizes == (0.0, (0.9, 0.999))
    assert rates[0] == rates[1]


def test_every_configuration_is_tested() -> None:
    assert {path.stem for path in EVERY} == {path.stem for path in CONFIGS} | OVERLAYS.keys()


def cli_parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    "path", [p for p in CONFIGS if p.stem.startswith("llama")], ids=lambda p: p.stem
)
def test_llama_configs_have_the_papers_settings(path: Path, instantiate) -> None:
    cli = instantiate(path, "--trainer.accelerator=cpu")
    plugin = cli.trainer.precision_plugin
    assert (plugin.melding.rank, plugin.update.rows, plugin.update.preset) == (64, 10, "paper")
    assert cli.datamodule.batch_size * cli.trainer.accumulate_grad_batches == 16
    assert cli.trainer.max_steps == 1875
    assert cli.trainer.gradient_clip_val == 0.3
    optimizer = cli.model.optimizer([cli_parameter()])
    assert type(optimizer).__name__ == "PagedAdamW32bit"
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (2e-4, 0.0)


def test_defaults_of_the_module_are_those_documented(instantiate) -> None:
    # llama configs say it themselves; here nothing is said.
    cli = instantiate(ROOT / "tests" / "data" / "minimal.yaml")
    optimizer = cli.model.optimizer([cli_parameter()])
    group = optimizer.param_groups[0]
    assert type(optimizer).__name__ == "AdamW"
    assert (group["lr"], group["betas"], group["weight_decay"]) == (2e-4, (0.9, 0.999), 0.0)
    assert group["fused"]
    scheduler = cli.model.lr_scheduler(optimizer)
    scheduler.set_total_steps(100)
    rates = [scheduler.get_last_lr()[0]]
    for _ in range(5):
        optimizer.step()
        scheduler.step()
        rates.append(scheduler.get_last_lr()[0])
    assert rates == pytest.approx([0.5e-4, 1e-4, 1.5e-4, 2e-4, 2e-4, 2e-4])


def test_configs_name_no_host() -> None:
    for path in [*EVERY, *METHODS]:
        assert not re.search(r"https?://", path.read_text())

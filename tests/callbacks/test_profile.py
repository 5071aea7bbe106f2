"""Where a step's time goes."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from falqon.callbacks.profile import CATEGORIES, StepProfile, breakdown
from falqon.errors import InputError
from falqon.precision import FalqonPrecision


class Small(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 32))

    def configure_model(self) -> None:
        plugin = self.trainer.precision_plugin
        assert isinstance(plugin, FalqonPrecision)
        plugin.convert(self)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(parameters, lr=1e-3, fused=True)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return self.net(batch[0]).float().square().mean()


def train(path: Path, profile: StepProfile, **options: Any) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=5,
        plugins=[FalqonPrecision(rank=8, update="paper")],
        callbacks=[profile],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=path,
        **options,
    )
    data = TensorDataset(torch.randn(80, 32, dtype=torch.bfloat16))
    trainer.fit(Small(), DataLoader(data, batch_size=4))


@pytest.mark.parametrize(("step", "accumulate"), [(0, 1), (2, 1), (1, 3)])
def test_one_step(
    step: int, accumulate: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    profile = StepProfile(step)
    train(tmp_path, profile, accumulate_grad_batches=accumulate)
    trace = json.loads(gzip.decompress((tmp_path / "profile.json.gz").read_bytes()))
    names = [event["name"] for event in trace["traceEvents"] if "name" in event]
    assert names.count("falqon::update") == 1
    text = capsys.readouterr().out
    assert f"Step {step}, CPU operations" in text
    for category in ("matmul", "decode and quantise", "optimizer", "update"):
        assert profile.seconds[category] > 0
        assert f"  {category}" in text
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json.gz"]


def test_run_that_is_too_short(tmp_path: Path) -> None:
    profile = StepProfile(50)
    train(tmp_path, profile)
    assert profile.seconds == {}
    assert not torch.autograd._profiler_enabled()


def test_wrong_step() -> None:
    with pytest.raises(InputError, match=r"step is -1"):
        StepProfile(-1)


@pytest.fixture
def event() -> Callable[..., Any]:
    def make(name: str, parent: Any = None) -> Any:
        return SimpleNamespace(name=name, cpu_parent=parent, self_cpu_time_total=1e6)

    return make


def test_categories(event: Callable[..., Any]) -> None:
    attention = event("_Attention")
    loss = event("autograd::engine::evaluate_function: _LinearCrossEntropyBackward")
    matmul = event("aten::mm", event("_MeldedFunction"))
    events = [
        attention,
        event("aten::bmm", attention),
        event("aten::mm", event("aten::matmul", loss)),
        matmul,
        event("aten::copy_", matmul),
        event("falqon::decode", event("_MeldedFunction", event("Optimizer.step#AdamW.step"))),
        event("falqon::rms_norm"),
        event("aten::_fused_adamw_"),
        event("aten::mm", event("falqon::update")),
        event("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__"),
        event("aten::add"),
    ]
    seconds = breakdown(events)
    assert tuple(seconds) == CATEGORIES
    assert seconds.pop("matmul") == seconds.pop("attention") == 2.0
    assert set(seconds.values()) == {1.0}

"""What a training step asks the device for, and would have to wait for: one thing, at its start."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from falqon import FalqonPrecision
from falqon.errors import InputError
from lit_modules.divergence import DivergenceGuard
from lit_modules.passes import calibrate

WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_consecutive", "aten::repeat_interleave", "aten::bincount",
}  # fmt: skip
"""Operations whose result's value or shape the host has to know: on a GPU it waits for them."""
READS = ("tolist", "cpu", "numpy", "item")
"""Methods that bring a tensor to the host, which on a CPU dispatch nothing."""
OURS = ("/falqon/", "/lit_modules/", "/lightning/pytorch/trainer/")
SEEN: list[Counter[tuple[str, str]]] = []


def caller(parts: tuple[str, ...] = (*OURS, "/transformers/")) -> str | None:
    """File and function of the innermost frame from one of some packages."""
    for frame in reversed(traceback.extract_stack()):
        if any(part in frame.filename for part in parts):
            return f"{Path(frame.filename).name}:{frame.name}"
    return None


class Watching(TorchDispatchMode):
    def __init__(self, seen: Counter[tuple[str, str]]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        masked = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITS or masked:
            self.seen[name, caller() or "?"] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watching() -> Iterator[Counter[tuple[str, str]]]:
    """Counts what would wait: operations, reads by the host, and tensors made on the host."""
    seen: Counter[tuple[str, str]] = Counter()
    kept: list[tuple[Any, str, Any]] = [(Tensor, name, getattr(Tensor, name)) for name in READS]
    kept.append((torch, "tensor", torch.tensor))
    for owner, name, function in kept:

        def counted(*args: Any, _name: str = name, _function: Any = function, **more: Any) -> Any:
            where = caller(OURS)
            if where is not None:
                seen[_name, where] += 1
            return _function(*args, **more)

        setattr(owner, name, counted)
    try:
        with Watching(seen):
            yield seen
    finally:
        for owner, name, function in kept:
            setattr(owner, name, function)


class WatchSteps(Callback):
    """From before a batch's step until all that comes after it, but for later callbacks."""

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.context = watching()
        self.seen = self.context.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.context.__exit__(None, None, None)
        SEEN.append(self.seen)


def test_the_watch_sees_what_it_is_there_for() -> None:
    x = torch.arange(4.0)
    with watching() as seen:
        float(x.sum())
        x[x > 1] = 0
        x[x > 1]
    names = {name for name, _ in seen}
    assert names == {"aten::_local_scalar_dense", "aten::index_put_", "aten::index"}
    guard = DivergenceGuard()
    guard.watch(x[0], x[0], 1)
    with watching() as seen:
        guard.check()
    assert seen == {("tolist", "divergence.py:check"): 1}


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("update", ["compensated", "live"])
def test_a_step_waits_once_at_its_start(
    cli: Callable,
    tiny_run: Callable,
    packing: bool,
    update: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FALQON_NATIVE", "off")  # the loss as on a GPU
    SEEN.clear()
    config = tiny_run(update={"preset": update, "every": 6}, rows=None)
    config["trainer"] |= {"log_every_n_steps": 5, "val_check_interval": 6}
    config["trainer"]["callbacks"] = [{"class_path": f"{__name__}.WatchSteps"}]
    config["trainer"]["enable_progress_bar"] = True
    config["data"]["init_args"]["packing"] = packing
    config["checkpoint"]["every_n_train_steps"] = 6
    cli("fit", config)
    assert len(SEEN) == 6
    for seen in SEEN[1:4]:  # nothing is written or logged in these
        own = {key: n for key, n in seen.items() if "masking_utils.py" not in key[1]}
        assert own == {
            ("aten::nonzero", "loss.py:supervised_loss"): 1,  # which positions are supervised
            ("tolist", "divergence.py:check"): 1,  # of the step before, copied long ago
        }
        assert sum(seen.values()) - sum(own.values()) <= 2  # transformers' mask


def test_a_diverged_step_is_told_by_the_next_and_ever_after() -> None:
    guard = DivergenceGuard()
    guard.check()
    guard.watch(torch.tensor(1.0), torch.tensor(2.0), 6)
    guard.check()
    guard.watch(torch.tensor(float("nan")), torch.tensor(2.5), 7)
    for _ in range(2):
        with pytest.raises(InputError, match=r"not finite at step 7 \(loss 2.5\): the training"):
            guard.check()


@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_is_saved_of_a_diverged_training(
    cli: Callable,
    tiny_run: Callable,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    steps: int,
) -> None:
    config = tiny_run(recipe="none", dtype="fp32", rows="all")
    config["model"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.SGD",
        "init_args": {"lr": 1e30},
    }
    config["model"]["init_args"]["lr_scheduler"] = {
        "class_path": "lit_modules.WarmupConstant",
        "init_args": {"warmup": 0.0},
    }
    config["trainer"]["callbacks"] = [
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"save_on_exception": True, "dirpath": str(tmp_path / "kept")},
        }
    ]
    steps += 1
    config["trainer"] |= {"max_steps": steps, "val_check_interval": 1}
    config["report"]["sample_answer"] = False
    config["checkpoint"]["every_n_train_steps"] = steps
    with pytest.raises(SystemExit):
        cli("fit", config)
    assert "the gradient is not finite at step" in capsys.readouterr().err
    # After one step the weights are huge, and their gradient is yet to come.
    assert {path.name for path in (tmp_path / "kept").rglob("*.ckpt")} == {"epoch=0-step=1.ckpt"}
    assert not list((tmp_path / "run" / "checkpoints").glob("*.ckpt"))


def test_calibration_runs_where_the_weights_are() -> None:
    seen: list[Tensor] = []

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

        def forward(self, input_ids: Tensor, use_cache: bool) -> None:
            seen.append(input_ids)

    rows = SimpleNamespace(calibration_rows=lambda count: [torch.arange(3)] * count)
    # After `fit` the device of the strategy is still the GPU, and the model is on the CPU.
    strategy = SimpleNamespace(root_device=torch.device("meta"))
    trainer: Any = SimpleNamespace(datamodule=rows, strategy=strategy)
    plugin = FalqonPrecision(rank=2)
    calibrate(Model(), plugin, trainer)
    assert len(seen) == plugin.update.calibration_rows
    assert {tokens.device.type for tokens in seen} == {"cpu"}

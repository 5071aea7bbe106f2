"""A training step asks the device for nothing that it would have to wait for, but for one thing."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._python_dispatch import TorchDispatchMode

from falqon.errors import InputError
from lit_modules.divergence import DivergenceGuard

WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal",
    "aten::_unique2", "aten::unique_consecutive",
}  # fmt: skip
"""Operations whose result's value or shape the host has to know: on a GPU it waits for them."""
SEEN: list[Counter[tuple[str, str]]] = []


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name
        masked = name == "aten::index" and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in WAITS or masked:
            frames = traceback.extract_stack()
            parts = ("/falqon/", "/lit_modules/", "/transformers/", "/lightning/")
            where = next(
                (f.filename for f in reversed(frames) if any(p in f.filename for p in parts)), "?"
            )
            self.seen[name, where.rsplit("/", 1)[-1]] += 1
        return func(*args, **(kwargs or {}))


class WatchSteps(Callback):
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.mode = Watching()
        self.mode.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.mode.__exit__(None, None, None)
        SEEN.append(self.mode.seen)


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
    config["data"]["init_args"]["packing"] = packing
    cli("fit", config)
    assert len(SEEN) == 6
    for seen in SEEN[1:4]:  # rows are written in the last one: by one kernel, which needs a GPU
        own = {key: n for key, n in seen.items() if key[1] != "masking_utils.py"}
        assert own == {("aten::nonzero", "loss.py"): 1}  # which positions are supervised
        assert sum(seen.values()) - sum(own.values()) <= 2  # transformers' mask


def test_a_diverged_step_is_told_by_the_next() -> None:
    guard = DivergenceGuard()
    guard.check()
    guard.watch(torch.tensor(1.0), torch.tensor(2.0), 6)
    guard.check()
    guard.watch(torch.tensor(float("nan")), torch.tensor(2.5), 7)
    with pytest.raises(InputError, match=r"not finite at step 7 \(loss 2.5\): the training has"):
        guard.check()
    guard.check()  # told once

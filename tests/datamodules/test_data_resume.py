"""A run that stops and resumes sees the batches of a run that did not stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import AlpacaDataModule
from falqon.errors import InputError


class Recorder(LightningModule):
    """Notes which batches it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[tuple[int, ...]] = []

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"]
        self.seen.append((int(ids.sum()), *ids.shape, int(batch["labels"].sum())))
        return self.weight.sum() * 0.1

    def validation_step(self, batch: dict[str, torch.Tensor]) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def data(alpaca_file: str, tokenizer_dir: str, **options: Any) -> AlpacaDataModule:
    """Training data of 7 batches: 28 rows, 4 a batch."""
    settings = {"batch_size": 4, "limit_train_rows": 28, **options}
    return AlpacaDataModule(train_path=alpaca_file, tokenizer_name=tokenizer_dir, **settings)


def trainer(directory: Path, max_steps: int, save_every: int = 0, **options: Any) -> Trainer:
    callbacks = []
    if save_every:
        callbacks.append(
            ModelCheckpoint(
                directory, filename="{step}", every_n_train_steps=save_every, save_top_k=-1
            )
        )
    return Trainer(
        max_steps=max_steps,
        accelerator="cpu",
        logger=False,
        callbacks=callbacks,  # type: ignore[arg-type]
        enable_checkpointing=bool(save_every),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


@pytest.mark.filterwarnings("error:.*dataloader is not resumable")
@pytest.mark.parametrize(
    ("stop", "workers", "packing"),
    [
        (3, 0, False),  # within the first epoch
        (7, 0, False),  # at its end
        (10, 0, False),
        (10, 2, False),  # workers have prepared batches ahead
        (14, 0, False),
        (10, 0, True),
    ],
)
def test_resumed_run_sees_the_same_batches(
    alpaca_file: str, tokenizer_dir: str, tmp_path: Path, stop: int, workers: int, packing: bool
) -> None:
    # Rows are packed into fewer, so they get smaller batches.
    options = {"num_workers": workers, "packing": packing, "max_length": 96}
    if packing:
        options["batch_size"] = 2
    straight = Recorder()
    trainer(tmp_path, 20).fit(straight, data(alpaca_file, tokenizer_dir, **options))
    assert len(straight.seen) == 20

    first, second = Recorder(), Recorder()
    module = data(alpaca_file, tokenizer_dir, **options)
    trainer(tmp_path, stop, save_every=stop).fit(first, module)
    resumed = trainer(tmp_path, 20)
    resumed.fit(
        second,
        data(alpaca_file, tokenizer_dir, **options),
        ckpt_path=str(tmp_path / f"step={stop}.ckpt"),
        weights_only=True,
    )
    assert first.seen + second.seen == straight.seen
    assert resumed.global_step == 20


def test_epochs_have_orders_of_their_own(
    alpaca_file: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    model = Recorder()
    trainer(tmp_path, 14).fit(model, data(alpaca_file, tokenizer_dir))
    assert len(set(model.seen[:7])) == 7
    assert model.seen[:7] != model.seen[7:]


def test_overfitting_repeats_the_same_batch(
    alpaca_file: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    model = Recorder()
    module = data(alpaca_file, tokenizer_dir)
    trainer(tmp_path, 3, overfit_batches=1, limit_val_batches=0).fit(model, module)
    assert len(model.seen) == 3 and len(set(model.seen)) == 1


def test_resume_after_a_checkpoint_at_a_validation_within_the_epoch(
    alpaca_file: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    straight, first, second = Recorder(), Recorder(), Recorder()
    options = {"val_check_interval": 3}
    trainer(tmp_path, 12, **options).fit(straight, data(alpaca_file, tokenizer_dir))
    saving = trainer(tmp_path, 10, **options)
    saving.callbacks.append(  # type: ignore[attr-defined]
        ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, save_on_train_epoch_end=False)
    )
    saving.fit(first, data(alpaca_file, tokenizer_dir))
    trainer(tmp_path, 12, **options).fit(
        second, data(alpaca_file, tokenizer_dir), ckpt_path=str(tmp_path / "step=10.ckpt")
    )
    assert first.seen[:10] + second.seen == straight.seen


def test_resume_of_a_run_counted_in_epochs_with_accumulation(
    alpaca_file: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    straight, first, second = Recorder(), Recorder(), Recorder()
    options = {"max_epochs": 3, "accumulate_grad_batches": 2}
    trainer(tmp_path, -1, **options).fit(straight, data(alpaca_file, tokenizer_dir))
    assert len(straight.seen) == 21
    # 4 steps an epoch: the fifth ends after batch 2 of the second epoch.
    stopping = {**options, "max_steps": 5}
    trainer(tmp_path, save_every=5, **stopping).fit(first, data(alpaca_file, tokenizer_dir))
    trainer(tmp_path, -1, **options).fit(
        second, data(alpaca_file, tokenizer_dir), ckpt_path=str(tmp_path / "step=5.ckpt")
    )
    assert len(first.seen) == 9
    assert first.seen + second.seen == straight.seen


def test_limited_batches_resume_across_epochs(
    alpaca_file: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    """The Trainer leaves an epoch early; the next one starts from its own first batch."""
    straight, first, second = Recorder(), Recorder(), Recorder()
    options = {"limit_train_batches": 5}
    trainer(tmp_path, 12, **options).fit(straight, data(alpaca_file, tokenizer_dir))
    trainer(tmp_path, 5, save_every=5, **options).fit(first, data(alpaca_file, tokenizer_dir))
    trainer(tmp_path, 12, **options).fit(
        second, data(alpaca_file, tokenizer_dir), ckpt_path=str(tmp_path / "step=5.ckpt")
    )
    assert first.seen + second.seen == straight.seen


def test_resuming_with_other_data_is_an_error(
    alpaca_file: str, tokenizer_dir: str, tmp_path: Path
) -> None:
    trainer(tmp_path, 3, save_every=3).fit(Recorder(), data(alpaca_file, tokenizer_dir))
    other = data(alpaca_file, tokenizer_dir, batch_size=2)
    with pytest.raises(InputError, match=r"batch_size x devices \(4 there, 2 here\)"):
        trainer(tmp_path, 6).fit(Recorder(), other, ckpt_path=str(tmp_path / "step=3.ckpt"))


# --- the loader alone -------------------------------------------------------------------------


def sums(batches: Any) -> list[int]:
    return [int(batch["input_ids"].sum()) for batch in batches]


@pytest.fixture
def module(alpaca_file: str, tokenizer_dir: str) -> AlpacaDataModule:
    result = data(alpaca_file, tokenizer_dir)
    result.setup("fit")
    return result


def test_state_is_plain_and_counts_batches_handed_out(module: AlpacaDataModule) -> None:
    loader = module.train_dataloader()
    assert loader.state_dict()["batches"] == 0
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    state = loader.state_dict()
    assert (state["epoch"], state["batches"]) == (0, 3)
    assert all(type(value) in (str, int, bool) for value in state["fingerprint"].values())
    loader.batch_sampler.set_epoch(1)
    assert (loader.state_dict()["epoch"], loader.state_dict()["batches"]) == (1, 0)


def test_loading_continues_once_and_keeps_the_length(module: AlpacaDataModule) -> None:
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(2)
    everything = sums(loader)
    other = module.train_dataloader()
    state = {"epoch": 2, "batches": 4, "fingerprint": dict(loader.fingerprint)}
    other.load_state_dict(state)
    assert len(other) == 7
    assert other.state_dict() == state
    assert sums(other) == everything[4:]
    assert sums(other) == everything  # the epoch again, from its start


def test_a_position_of_another_epoch_is_not_used(module: AlpacaDataModule) -> None:
    loader = module.train_dataloader()
    loader.load_state_dict({"epoch": 0, "batches": 7, "fingerprint": dict(loader.fingerprint)})
    loader.batch_sampler.set_epoch(1)
    assert len(sums(loader)) == 7


def test_iterating_does_not_touch_the_global_random_state(module: AlpacaDataModule) -> None:
    before = torch.get_rng_state()
    sums(module.train_dataloader())
    sums(module.val_dataloader())
    assert torch.equal(before, torch.get_rng_state())

"""DDP: the same bits on all ranks, few bytes between them, and a look at whether that holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from falqon.callbacks.rank_checksum import RankChecksum, checksum
from falqon.checkpoint import read_checkpoint, training_hash
from falqon.errors import InputError
from falqon.parallel.strategies import prepare, refuse


def test_three_ranks_accumulate_and_resume(jobs: Callable, tiny_run: Callable) -> None:
    three = jobs(3)
    live = {"preset": "compensated", "every": 2}
    config = tiny_run(update=live, rounding="stochastic")
    # 32 rows in batches of 3 x 2 x 2: the last of an epoch is short in batches and rows.
    config["data"]["init_args"]["batch_size"] = 2
    config["trainer"] |= {"accumulate_grad_batches": 2, "max_steps": 4, "limit_val_batches": 0}
    three.add("straight", config)
    three.add("broken", config, "--trainer.max_steps=2")
    three.add("resumed", config, "--ckpt_path=last", into="broken")
    # Two ranks save in parts, three go on: steps of the same six rows, and the same bits.
    exact = tiny_run(update=live)
    exact["model"]["init_args"]["exact_sums"] = True
    exact["trainer"] |= {"max_steps": 4, "limit_val_batches": 0}
    exact["checkpoint"]["complete"] = True
    exact["data"]["init_args"]["batch_size"] = 3
    exact["trainer"]["strategy"] = "fsdp2"
    two = jobs(2)
    two.add("two", exact, "--trainer.max_steps=3")
    two.run()
    exact["data"]["init_args"]["batch_size"] = 2
    exact["trainer"]["strategy"] = "ddp"
    three.add("whole", exact)
    three.add("more", exact, f"--ckpt_path={two.directory('two') / 'checkpoints' / 'last.ckpt'}")
    three.run()
    notes = three.notes("straight")
    assert len(notes[0]["hashes"]) == 8
    assert len(set(notes[0]["hashes"])) == 5  # what it starts from, and four steps
    for name in ("straight", "broken", "resumed"):
        ranks = three.notes(name)
        assert ranks[0]["hashes"] == ranks[1]["hashes"] == ranks[2]["hashes"], name
    hashes = [
        training_hash(read_checkpoint(three.directory(name) / "checkpoints" / "last.ckpt"))
        for name in ("straight", "broken", "whole", "more")
    ]
    assert hashes[0] == hashes[1] and hashes[2] == hashes[3]
    assert len(three.notes("more")[0]["hashes"]) == 1


@pytest.mark.parametrize(
    "name",
    [
        "fsdp",
        "fsdp_cpu_offload",
        "deepspeed_stage_2",
        "xla",
        "xla_fsdp",
        "ddp_spawn",
        "ddp_notebook",
    ]
    + [
        f"lightning.pytorch.strategies.{c}Strategy"
        for c in ("FSDP", "DeepSpeed", "XLA", "XLAFSDP", "ModelParallel")
    ],
)
def test_strategies_that_cannot_work(name: str) -> None:
    with pytest.raises(InputError, match=r"Use ddp .*ShardedStrategy"):
        refuse(name)


@pytest.mark.parametrize("name", ["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp2"])
def test_strategies_that_work(name: str) -> None:
    refuse(name)


def test_ddp_sends_no_buffers_unless_told_to() -> None:
    strategy = DDPStrategy()
    prepare(strategy)
    assert strategy._ddp_kwargs["forward_sync_buffers"] is False
    told = DDPStrategy(forward_sync_buffers=True)
    prepare(told)
    assert told._ddp_kwargs["forward_sync_buffers"] is True


def test_checksum_sees_bits_and_places() -> None:
    for shape in ((5, 7), (64,), (3,)):
        tensor = torch.randint(0, 256, shape, dtype=torch.uint8)
        before = checksum(tensor)
        flat = tensor.view(-1)
        for place in range(len(flat)):
            for bit in (1, 128):
                flat[place] ^= bit
                assert checksum(tensor) != before
                flat[place] ^= bit
        assert checksum(tensor) == before
    words = torch.arange(4, dtype=torch.int64)
    assert checksum(words) != checksum(words.flip(0))


def test_checksum_interval_is_checked() -> None:
    with pytest.raises(InputError, match=r"rank_checksum\.every_n_steps"):
        RankChecksum(-1)

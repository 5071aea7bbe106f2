"""DDP: the same bits on all ranks, few bytes between them, and a look at whether that holds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from falqon.callbacks.rank_checksum import RankChecksum, checksum
from falqon.checkpoint import hash_tensors, read_checkpoint, training_hash
from falqon.errors import InputError
from falqon.parallel.strategies import prepare, refuse


def test_two_ranks(jobs: Callable, tiny_run: Callable, cli: Callable, tmp_path: Path) -> None:
    two = jobs(2)
    config = tiny_run(update="anchored")
    config["data"]["init_args"] |= {"batch_size": 2, "group_by_length": False}
    two.add("watched", config, "--trainer.max_steps=3", watch=2)
    name = "model.layers.1.mlp.up_proj"
    two.add(
        "corrupted",
        config,
        "--rank_checksum.every_n_steps=2",
        "--trainer.max_steps=4",
        corrupt={"rank": 1, "layer": name, "step": 2},
    )
    exact = tiny_run(recipe="paper")  # one scale a tensor: of a row, not of a batch
    exact["model"]["init_args"]["exact_sums"] = True
    exact["data"]["init_args"] |= {"batch_size": 2, "group_by_length": False}
    exact["trainer"] |= {"max_steps": 3, "limit_val_batches": 0}
    two.add("exact", exact)
    two.run()

    # Bytes: B's gradients, and what is logged; no parameter, and nothing is broadcast.
    for note in two.notes("watched"):
        assert len(set(note["hashes"])) == 3
        assert {kind for kind, _ in note["sent"]} <= {"all_reduce", "barrier"}
        sizes = sorted(size for kind, size in note["sent"] if kind == "all_reduce")
        state = read_checkpoint(two.directory("watched") / "checkpoints" / "last.ckpt")
        trained = sum(t.numel() for n, t in state["state_dict"].items() if n.endswith(".B"))
        assert sizes[-1] == trained  # one bucket
        assert sum(sizes[:-1]) <= 4  # sums of loss and tokens
    first, second = two.notes("watched")
    assert first["hashes"] == second["hashes"]

    # A flipped bit on rank 1 stops both ranks, with its layer named.
    for note in two.notes("corrupted"):
        assert note["exit"] == 2
        assert f"after step 4: {name}.codes on rank 1 is not that of rank 0" in note["error"]
    assert "differ after step 4" in two.output
    assert two.output.count("differ after step 4") == 1  # one message for all ranks

    # Two ranks with two rows each, one with four, one that accumulates two batches of two.
    def alone(directory: str, batch_size: int, accumulate: int) -> str:
        exact["trainer"] |= {
            "default_root_dir": str(tmp_path / directory),
            "devices": 1,
            "strategy": "auto",
            "accumulate_grad_batches": accumulate,
        }
        exact["data"]["init_args"]["batch_size"] = batch_size
        model = cli("fit", exact).model
        return hash_tensors({n: p.detach() for n, p in model.named_parameters()})

    ranks = {note["hash"] for note in two.notes("exact")}
    assert ranks == {alone("four", 4, 1)} == {alone("accumulated", 2, 2)}
    exact["model"]["init_args"]["exact_sums"] = False
    assert ranks != {alone("usual", 4, 1)}  # else the test would show nothing


def test_three_ranks_accumulate_and_resume(jobs: Callable, tiny_run: Callable) -> None:
    three = jobs(3)
    live = {"preset": "compensated", "every": 2}
    config = tiny_run(update=live, rounding="stochastic")
    # 32 rows in batches of 3 x 2 x 2: the last of an epoch is short in batches and rows.
    config["data"]["init_args"]["batch_size"] = 2
    config["trainer"]["accumulate_grad_batches"] = 2
    three.add("straight", config)
    three.add("broken", config, "--trainer.max_steps=3")
    three.add("resumed", config, "--ckpt_path=last", into="broken")
    three.run()
    notes = three.notes("straight")
    assert len(notes[0]["hashes"]) == 12
    assert len(set(notes[0]["hashes"])) == 7  # what it starts from, and six steps
    for name in ("straight", "broken", "resumed"):
        ranks = three.notes(name)
        assert ranks[0]["hashes"] == ranks[1]["hashes"] == ranks[2]["hashes"], name
    hashes = [
        training_hash(read_checkpoint(three.directory(name) / "checkpoints" / "last.ckpt"))
        for name in ("straight", "broken")
    ]
    assert hashes[0] == hashes[1]


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
        f"lightning.pytorch.strategies.{c}Strategy" for c in ("FSDP", "DeepSpeed", "XLA", "XLAFSDP")
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

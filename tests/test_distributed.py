"""Two processes: the same bits on both ranks and in two runs, and exact resume."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from falqon.checkpoint import read_checkpoint, training_hash
from falqon.premeld.run import premeld
from falqon.recipe import MeldRecipe

ROOT = Path(__file__).parents[1]

# Both ranks hash what they hold at the end of training; the launcher of ddp starts this file again.
SCRIPT = """
import os, sys
from pathlib import Path
from falqon.checkpoint import hash_tensors
from falqon.training import run
cli = run()
tensors = {n: p.detach() for n, p in cli.model.named_parameters()}
rank = os.environ.get("LOCAL_RANK", "0")
Path(os.environ["HASHES"], f"rank{rank}").write_text(hash_tensors(tensors))
"""


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., tuple[list[str], str]]:
    """Trains in two processes; returns each rank's hash and that of the checkpoint."""
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)

    def go(config: dict, name: str, *flags: str) -> tuple[list[str], str]:
        root = tmp_path / name
        root.mkdir(exist_ok=True)
        config["trainer"] |= {"default_root_dir": str(root), "devices": 2, "strategy": "ddp"}
        config["data"]["init_args"]["batch_size"] = 2
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        environment = os.environ | {
            "HASHES": str(root),
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        result = subprocess.run(
            [sys.executable, str(script), "fit", "--config", str(path), *flags],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        hashes = [(root / f"rank{rank}").read_text() for rank in (0, 1)]
        return hashes, training_hash(read_checkpoint(root / "checkpoints" / "last.ckpt"))

    return go


def test_two_ranks_agree_repeat_and_resume(
    train: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    delayed = {"base": "paper", "scaling": "delayed", "amax_history": 2}
    live = {"preset": "compensated", "every": 2}
    config = tiny_run(update=live, rounding="stochastic", recipe=delayed)
    ranks, straight = train(config, "straight")
    assert ranks[0] == ranks[1]
    train(config, "again", "--trainer.max_steps=3")
    ranks, resumed = train(config, "again", "--ckpt_path=last")
    assert ranks[0] == ranks[1]
    assert resumed == straight
    state = read_checkpoint(tmp_path / "straight" / "served.ckpt")["state_dict"]
    assert not any(bool(t.any()) for name, t in state.items() if name.endswith(".B"))

    def losses(name: str) -> list[str]:
        with (tmp_path / name / "metrics.csv").open() as file:
            return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]

    assert losses("again") == losses("straight")
    assert len(losses("straight")) == 6


def test_two_devices_give_the_loss_of_one(
    train: Callable, cli: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    # The same rows a step, split over two ranks with different numbers of supervised tokens.
    config = tiny_run(recipe="none", dtype="fp32")
    config["data"]["init_args"]["group_by_length"] = False
    train(config, "two", "--trainer.max_steps=4")
    config["data"]["init_args"]["batch_size"] = 4
    config["trainer"] |= {
        "default_root_dir": str(tmp_path / "one"),
        "devices": 1,
        "strategy": "auto",
    }
    cli("fit", config, "--trainer.max_steps=4")

    def column(name: str, key: str) -> list[float]:
        with (tmp_path / name / "metrics.csv").open() as file:
            return [float(row[key]) for row in csv.DictReader(file) if row[key]]

    for key in ("train/loss", "grad_norm", "val/loss"):
        assert column("two", key) == pytest.approx(column("one", key), rel=1e-3), key


# Sharded codes are not where a group laid them, and change place with every gather.
SHARDED = """
import copy
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from transformers import LlamaConfig, LlamaForCausalLM
from falqon.meld import meld, melded_layers
from falqon.recipe import MeldRecipe

dist.init_process_group("gloo")
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=61, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, attn_implementation="sdpa",
)
model = LlamaForCausalLM(config)
assert len(meld(model, None, MeldRecipe(rank=4)).grouped) == 4
whole = copy.deepcopy(model)
place = lambda p: Shard(1) if p.dtype == torch.uint8 else Shard(0)
for part in (*model.model.layers, model):
    fully_shard(part, shard_placement_fn=place)
ids = torch.randint(0, 61, (2, 9))
for step in range(2):
    ours, wanted = model(ids).logits, whole(ids).logits
    assert torch.equal(ours, wanted)
    ours.square().mean().backward()
    wanted.square().mean().backward()
    for layer, other in zip(melded_layers(model).values(), melded_layers(whole).values()):
        assert isinstance(layer.codes, DTensor)
        # Every rank has the same batch, so the mean over ranks is what one process has.
        torch.testing.assert_close(layer.B.grad.full_tensor(), other.B.grad, rtol=1e-5, atol=1e-8)
        layer.B.grad = other.B.grad = None
        layer.codes.to_local().bitwise_xor_(0x80)
        other.codes.data.bitwise_xor_(0x80)
dist.barrier()
dist.destroy_process_group()
"""


def test_groups_of_sharded_codes(tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            script,
        ],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_melded_directory_trains_as_its_source(
    train: Callable, tiny_run: Callable, tmp_path: Path
) -> None:
    config = tiny_run()
    model = config["model"]["init_args"]
    _, expected = train(config, "source")
    rank = config["trainer"]["plugins"][0]["init_args"]["rank"]
    premeld(model["model_name"], tmp_path / "melded", melding=MeldRecipe(rank=rank))
    model["model_name"] = str(tmp_path / "melded")
    ranks, found = train(config, "run")
    assert ranks[0] == ranks[1]
    assert found == expected

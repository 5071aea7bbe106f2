"""What a rank does in tests with several processes: runs of `train.py`, one after the other.

Started by torchrun with a JSON file of jobs: configuration, flags, and where to note what is held
at the end of it. One start of the processes serves many jobs.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from falqon.callbacks.rank_checksum import RankChecksum
from falqon.checkpoint import hash_tensors
from falqon.precision import FalqonPrecision
from falqon.training import FalqonCLI, run


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, whatever this rank has of it."""
    return tensor.detach().full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


class Recorder(Callback):
    """Notes a hash of all weights after every step, and the collectives of one batch."""

    def __init__(self, watched_batch: int | None) -> None:
        self.hashes: list[str] = []
        self.watched_batch = watched_batch
        self.sent: list[tuple[str, int]] = []  # operation and number of elements

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == self.watched_batch:
            self.profiler = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profiler.__enter__()

    def on_train_batch_end(
        self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, index: int
    ) -> None:
        if index == self.watched_batch:
            self.profiler.__exit__(None, None, None)
            for event in self.profiler.events():
                if event.name.startswith("gloo:"):
                    sizes = [math.prod(shape) for shape in event.input_shapes]
                    self.sent.append((event.name.removeprefix("gloo:"), sum(sizes)))
        self.hashes.append(hash_tensors({n: whole(p) for n, p in module.named_parameters()}))


class Corruptor(Callback):
    """Flips one bit of one layer's codes on one rank."""

    def __init__(self, rank: int, layer: str, step: int) -> None:
        self.rank, self.layer, self.step = rank, layer, step

    def on_before_optimizer_step(self, trainer: Any, module: nn.Module, *args: Any) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step:
            plugin = trainer.precision_plugin
            assert isinstance(plugin, FalqonPrecision)
            plugin.layers[self.layer].codes.data[3, 5] ^= 4


def copy_damaged(source: str, target: str, name: str) -> None:
    """Copy a checkpoint in parts with one bit of one file flipped."""
    if int(os.environ["RANK"]) == 0:
        shutil.copytree(source, target)
        data = bytearray(Path(target, name).read_bytes())
        data[len(data) // 2] ^= 1
        Path(target, name).write_bytes(data)
    torch.distributed.barrier()


def go(job: dict[str, Any]) -> None:
    rank = int(os.environ["RANK"])
    if "damaged" in job:
        copy_damaged(**job["damaged"])
    recorder = Recorder(job.get("watch"))
    callbacks: list[Callback] = [recorder]
    if "corrupt" in job:
        callbacks.append(Corruptor(**job["corrupt"]))
    note: dict[str, Any] = {}
    original = FalqonCLI.instantiate_trainer

    def instantiate(self: FalqonCLI, **kwargs: Any) -> Any:
        trainer = original(self, **kwargs)
        trainer.callbacks += callbacks  # after those of the configuration
        trainer.callbacks.sort(key=lambda c: isinstance(c, RankChecksum))
        return trainer

    FalqonCLI.instantiate_trainer = instantiate  # type: ignore[method-assign]
    try:
        cli = run(["fit", "--config", job["config"], *job.get("flags", [])])
        held = {n: whole(p) for n, p in cli.model.named_parameters()}
        note["hash"] = hash_tensors(held)
        bar = cli.trainer.progress_bar_callback
        note["progress_bar"] = bar is not None and bar.is_enabled
        note["bytes_held"] = sum(
            (p.to_local() if isinstance(p, DTensor) else p).nbytes for p in cli.model.parameters()
        )
        note["bytes_whole"] = sum(p.nbytes for p in held.values())
    except SystemExit as error:
        note["exit"] = error.code
        note["error"] = str(error.__context__)
    finally:
        FalqonCLI.instantiate_trainer = original  # type: ignore[method-assign]
    note |= {"hashes": recorder.hashes, "sent": recorder.sent}
    Path(job["notes"], f"rank{rank}.json").write_text(json.dumps(note))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for one in json.loads(Path(sys.argv[1]).read_text()):
        go(one)

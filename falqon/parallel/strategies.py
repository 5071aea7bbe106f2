"""Which of Lightning's strategies FALQON runs with, and what it needs of them."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import distributed as dist

from falqon.errors import InputError

_USE = "Use ddp (every device holds the model), or falqon.ShardedStrategy (FSDP2, tensor parallel)."
_REASONS = {
    "deepspeed": "DeepSpeed replaces the optimizer step and the precision plugin, so FALQON's "
    "weights would never be updated.",
    "fsdp": "FSDP1 takes neither integer parameters, which FP8 codes are, nor a precision plugin "
    "that is not its own.",
    "xla": "XLA devices have no FP8 codes that an update could write in place.",
    "plain": "its checkpoints are written over the last one, go by other names of optimizer "
    "states, and know nothing of how melded layers are cut up; ShardedStrategy is this strategy "
    "with checkpoints that do.",
    "spawn": "processes that are spawned or forked train a copy of the model, and what they learn "
    "does not come back.",
}


def refuse(name: str) -> None:
    """Refuse a strategy that cannot work, by what a configuration calls it.

    Args:
        name: short name (`fsdp`) or the path of a class.

    Raises:
        InputError: naming what to use instead.
    """
    last = name.rpartition(".")[2].lower().removesuffix("strategy")
    kind = None
    if last.startswith("deepspeed"):
        kind = "deepspeed"
    elif "xla" in last or last == "tpu":
        kind = "xla"
    elif last.startswith("fsdp") and last != "fsdp2":
        kind = "fsdp"
    elif last == "modelparallel":
        kind = "plain"
    elif last in ("ddp_spawn", "ddp_fork", "ddp_notebook") or last.startswith(
        ("ddp_spawn_", "ddp_fork_", "ddp_notebook_")
    ):
        kind = "spawn"
    if kind is not None:
        raise InputError(f"trainer.strategy {name}: {_REASONS[kind]} {_USE}")


def prepare(strategy: Strategy) -> None:
    """Refuse a strategy that cannot work; see to it that the others send no more than they must.

    DDP sends all buffers of a model round before every forward pass, unless it is told not to. What
    a model computes with in FP8 training are parameters, so nothing is lost.

    Args:
        strategy: of the Trainer, before it is set up.

    Raises:
        InputError: as `refuse` does.
    """
    refuse(type(strategy).__name__)
    if isinstance(strategy, DDPStrategy) and "broadcast_buffers" not in strategy._ddp_kwargs:
        strategy._ddp_kwargs.setdefault("forward_sync_buffers", False)


def is_sharding(strategy: Strategy) -> bool:
    """Whether parameters are cut up over devices."""
    return isinstance(strategy, ModelParallelStrategy)


def data_parallel_size(trainer: Trainer) -> int:
    """Number of ranks with different rows; those of one tensor-parallel group share theirs."""
    if trainer.world_size == 1:
        return 1
    return int((trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"])


def data_parallel_group(trainer: Trainer) -> Any:
    """The ranks that have different rows, to reduce over; None for all."""
    strategy = trainer.strategy
    if not isinstance(strategy, ModelParallelStrategy):
        return None
    return strategy.device_mesh["data_parallel"].get_group()


def in_many(group: Any = None) -> bool:
    """Whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1

"""Which of Lightning's strategies FALQON runs with, and what it needs of them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import Tensor
from torch import distributed as dist

from falqon.errors import InputError

_USE = "Use ddp (every device holds the model), or falqon.ShardedStrategy (FSDP2, tensor parallel)."
_REASONS = {
    "deepspeed": "DeepSpeed replaces the optimizer step and the precision plugin, so FALQON's "
    "weights would never be updated.",
    "fsdp": "FSDP1 takes neither integer parameters, which FP8 codes are, nor a precision plugin "
    "that is not its own.",
    "xla": "XLA devices have no FP8 codes that an update could write in place.",
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
    if isinstance(strategy, DDPStrategy):
        strategy._ddp_kwargs.setdefault("broadcast_buffers", False)


def is_sharding(strategy: Strategy) -> bool:
    """Whether parameters are cut up over devices."""
    return isinstance(strategy, ModelParallelStrategy)


def data_parallel_size(trainer: Trainer) -> int:
    """Number of ranks with different rows; those of one tensor-parallel group share theirs."""
    if trainer.world_size == 1:
        return 1
    return int((trainer.distributed_sampler_kwargs or {"num_replicas": 1})["num_replicas"])


def in_many(group: Any = None) -> bool:
    """Whether there are other ranks to talk to."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


@torch.no_grad()
def total_norm(gradients: list[Tensor]) -> Tensor:
    """Euclidean norm of gradients, float32 scalar on their device, the same for all shardings.

    Squares are summed in float64 and over ranks, and the root is rounded to float32 at the end:
    the order of summation, which depends on how a tensor is cut up, is below what that keeps, but
    for sums within 1e-15 of the middle between two float32 numbers.

    Args:
        gradients: whole tensors, or DTensors that are cut up on one mesh.
    """
    if not gradients:
        return torch.zeros(())
    from torch.distributed.tensor import DTensor, Shard

    whole = [g for g in gradients if not isinstance(g, DTensor)]
    cut = [g for g in gradients if isinstance(g, DTensor)]
    local = [g.to_local() for g in cut]
    device = (whole or local)[0].device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensors, group in ((whole, None), (local, cut[0].device_mesh.get_group() if cut else None)):
        squares = [g.double().square().sum() for g in tensors if g.numel()]
        part = torch.stack(squares).sum() if squares else torch.zeros_like(total)
        if group is not None and any(isinstance(p, Shard) for p in cut[0].placements):
            dist.all_reduce(part, group=group)
        total += part
    return total.sqrt().float()

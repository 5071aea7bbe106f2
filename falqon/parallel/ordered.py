"""Gradients of DDP, added in the order of ranks."""

# Without postponed annotations: DDP looks at those of a hook.

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


def ordered_mean(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A DDP communication hook: the mean over ranks, every element added up in the same order.

    An all-reduce adds in an order that depends on where an element lies in its bucket, and DDP lays
    its buckets anew after the first step: with three ranks or more a resumed run would differ in
    last bits. Here each rank gets one part of the bucket from all, adds these up by rank, and sends
    the result round: as many bytes as a ring all-reduce sends.
    """
    count = dist.get_world_size(group)
    flat = bucket.buffer()
    size = -(-flat.numel() // count)
    sent = torch.nn.functional.pad(flat, (0, size * count - flat.numel()))
    parts = torch.empty_like(sent)
    dist.all_to_all_single(parts, sent, group=group)
    rows = parts.view(count, size)
    total = rows[0].clone()
    for row in rows[1:]:
        total += row
    total /= count
    dist.all_gather_into_tensor(sent, total, group=group)
    flat.copy_(sent[: flat.numel()])
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(flat)
    return future


def order_gradients(model: nn.Module) -> None:
    """Register `ordered_mean` with a model that DDP wraps, unless it has a hook already.

    Two numbers have the same sum in any order, so with two ranks DDP's own way stays.
    """
    if not isinstance(model, DistributedDataParallel) or model._comm_hooks:
        return
    if dist.get_world_size(model.process_group) > 2:
        model.register_comm_hook(model.process_group, ordered_mean)

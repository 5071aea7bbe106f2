"""Cut a melded model up with FSDP2: layer by layer, codes by columns."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard

from falqon.blocks import GroupedDecoderLayer, GroupedMlp
from falqon.errors import InputError
from falqon.meld import melded_layers
from falqon.parallel.tensor import tensor_parallel


def placement(parameter: nn.Parameter) -> Shard:
    """How to cut a parameter up: codes by columns, all else by rows.

    With its columns of all rows, those of A too, a rank can write rows of B A on its own.
    """
    return Shard(1) if parameter.dtype == torch.uint8 else Shard(0)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks that are gathered part by part: the elements of the longest `nn.ModuleList`.

    Raises:
        InputError: if the model has none.
    """
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise InputError(
            f"{type(model).__name__} has no list of layers to shard one by one; use ddp."
        )
    return max(lists, key=len)


def check_divisible(model: nn.Module, count: int) -> None:
    """Refuse codes whose columns cannot be shared out evenly.

    Raises:
        InputError: naming the layer, its number of columns, and numbers of devices that would do.
    """
    for name, layer in melded_layers(model).items():
        columns = layer.codes.shape[1]
        if columns % count:
            fitting = [str(n) for n in range(2, 2 * count + 1) if columns % n == 0]
            raise InputError(
                f"{name} has {columns} input features, which {count} devices cannot share evenly: "
                f"use {' or '.join(fitting) or 'one'} of them, exclude that layer, or use ddp."
            )
        if layer.codes.dtype != torch.uint8:
            raise InputError(
                "the recipe 'none' keeps weights in float32, which are not cut up by columns: use "
                "an FP8 recipe, or ddp."
            )


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Cut a melded model up, in place; done already, nothing happens.

    A parameter is moved to the mesh's device only to be cut up, one decoder layer at a time: of a
    model on the CPU no device ever holds more than its share and a layer. The `units` of layers
    are gathered one after the other: while one runs, the next is on its way.

    Args:
        model: after melding.
        mesh: one-dimensional.

    Raises:
        InputError: as `check_divisible` and `decoder_layers` do.
    """
    if isinstance(model, FSDPModule):
        return
    check_divisible(model, mesh.size())
    device = (
        torch.device(mesh.device_type, torch.cuda.current_device())
        if (mesh.device_type == "cuda")
        else torch.device(mesh.device_type)
    )
    parts = [unit for block in decoder_layers(model) for unit in units(block)]
    # Every rank needs all of a scale, which is one number, and norms are not worth an exchange.
    cut = {p for part in parts for p in part.parameters()}
    whole = {layer.scale for layer in melded_layers(model).values()}
    whole |= {p for block in decoder_layers(model) for p in block.parameters() if p not in cut}
    for parameter in whole:
        assert not parameter.requires_grad
        parameter.data = parameter.data.to(device)
    options: dict[str, Any] = {
        "mesh": mesh,
        "reshard_after_forward": True,
        "shard_placement_fn": placement,
        "ignored_params": whole,
    }
    for part in reversed(parts):  # what is inside another first
        fully_shard(part, **options)
    for part, following in pairwise(parts):
        assert isinstance(part, FSDPModule) and isinstance(following, FSDPModule)
        part.set_modules_to_forward_prefetch([following])
        following.set_modules_to_backward_prefetch([part])
    fully_shard(model, **options)
    for part in parts:  # else what came is kept until the next comes, beside what it was copied to
        assert isinstance(part, FSDPModule)
        part._set_unshard_async_op(True)
    # Our attention and MLP give views, and decoder layers do not write into them.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDP(Grouped|Melded)")


def units(block: nn.Module) -> list[nn.Module]:
    """What of a decoder layer is gathered at a time, in the order in which it runs.

    Of those whose order is known: attention; gate and up, which run together; down. Others whole:
    parts that run side by side, or that a norm behind them starts to compute again, would be
    gathered too often or have their gradients summed in another order than without shards.
    """
    if not isinstance(block, GroupedDecoderLayer):
        return [block]
    found = [block.self_attn, block.mlp]
    if isinstance(block.mlp, GroupedMlp):
        found.append(block.mlp.down_proj)
    return found


def parallelize(model: nn.Module, strategy: Strategy) -> None:
    """Cut a melded model up as a strategy says, in place.

    Args:
        model: after melding.
        strategy: of the Trainer, whose processes have found each other.

    Raises:
        InputError: as `shard` does.
    """
    assert isinstance(strategy, ModelParallelStrategy)
    mesh = strategy.device_mesh
    tensor_parallel(model, mesh["tensor_parallel"].get_group())
    if mesh["data_parallel"].size() > 1:
        shard(model, mesh["data_parallel"])

"""From this rank's part of a parameter to all of it, and back."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from falqon.linear import MeldedLinear
from falqon.parallel.layers import ShardedLayer, tensor_part
from falqon.parallel.slices import local_part


def _layer_of(module: nn.Module, name: str) -> MeldedLinear | None:
    """The layer cut up by tensor parallelism that a parameter is of."""
    owner = module.get_submodule(name.rpartition(".")[0])
    is_ours = isinstance(owner, MeldedLinear) and tensor_part(owner) is not None
    return owner if is_ours and isinstance(owner, MeldedLinear) else None


def whole_shape(module: nn.Module, name: str, tensor: Tensor) -> tuple[int, ...]:
    """Shape of all of a tensor.

    Args:
        module: that has it.
        name: its name there.
        tensor: what this rank has of it, or a DTensor.
    """
    layer = _layer_of(module, name)
    if layer is None:
        return tuple(tensor.shape)
    view, kind = ShardedLayer(layer), name.rpartition(".")[2]
    if kind == "codes":
        return view.out_features + view.rank, view.in_features
    if kind == "scale":
        return tuple(tensor.shape)
    return (view.out_features, *tensor.shape[1:])


def whole_tensor(module: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """All of a tensor, gathered; all ranks have to call it.

    Args:
        module, name: as in `whole_shape`.
        tensor: the parameter, or an optimizer's tensor of its shape.
    """
    layer = _layer_of(module, name)
    if layer is None:
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    view, kind = ShardedLayer(layer), name.rpartition(".")[2]
    if kind == "scale":
        return tensor
    if kind == "codes":
        return view.gather(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
    return view.gather_rows(tensor)


def part_of(module: nn.Module, name: str, whole: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor.

    Args:
        module, name: as in `whole_shape`.
        whole: all of it.
        like: what this rank has of it, or a DTensor.
    """
    layer = _layer_of(module, name)
    kind = name.rpartition(".")[2]
    if layer is not None and kind == "codes":
        return ShardedLayer(layer).cut_codes(whole)
    if layer is not None and kind != "scale":
        whole = whole[slice(*ShardedLayer(layer).rows)]
    return local_part(whole, like) if isinstance(like, DTensor) else whole

"""Which layers a method changes, and swapping them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.meld import targets
from falqon.recipe import MeldRecipe
from falqon.svd import one_thread, truncated_svd


def target_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the output embedding, by full name: those that FALQON melds.

    Raises:
        InputError: if there is none.
    """
    linears = targets(model, MeldRecipe())
    if not linears:
        raise InputError(
            f"{type(model).__name__} has no plain nn.Linear beside its output embedding, so no "
            "adapter can be put anywhere; choose another model."
        )
    return linears


def swap_linears(
    model: nn.Module, make: Callable[[str, nn.Linear], nn.Module]
) -> dict[str, nn.Module]:
    """Replace every target layer, one by one, so that one layer at a time is there twice.

    Args:
        model: Changed in place.
        make: From a layer's full name and the layer to what replaces it.

    Returns:
        The new layers by full name.
    """
    made: dict[str, nn.Module] = {}
    for name in list(target_linears(model)):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        made[name] = make(name, linear)
        model.set_submodule(name, made[name])
    return made


def check_rank(model: nn.Module, rank: int) -> None:
    """Refuse a rank that no adapter can have.

    Raises:
        InputError: naming the layer that is too small for it.
    """
    if rank < 1:
        raise InputError(f"method.rank is {rank}; it must be at least 1.")
    for name, linear in target_linears(model).items():
        most = min(linear.in_features, linear.out_features)
        if rank > most:
            raise InputError(
                f"method.rank is {rank}, but {name} is {linear.out_features} x "
                f"{linear.in_features}: use at most {most}."
            )


def plain_linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A frozen nn.Linear that holds these tensors themselves.

    Args:
        weight: [out, in].
        bias: [out], or None.
    """
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return linear


def low_rank(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor]:
    """The best product of rank r to a matrix, its singular values shared evenly.

    Args:
        matrix: float32 [out, in].
        rank: r, at most min(out, in).
        seed: Of the randomised SVD.

    Returns:
        B [out, r] = U sqrt(S) and A [r, in] = sqrt(S) V^T.
    """
    values, right = truncated_svd(matrix, MeldRecipe(rank=rank), seed)
    roots = values.sqrt()
    with one_thread():  # the same bits whatever the number of threads
        left = matrix @ right.T / roots.clamp_min(torch.finfo(roots.dtype).tiny)
    return left, roots[:, None] * right

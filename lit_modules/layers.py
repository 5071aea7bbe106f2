"""How decoder layers run in training: with what they keep for the backward pass, and compiled."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from falqon.errors import InputError
from falqon.kernels.native.build import compiler


def arrange(
    model: PreTrainedModel, recomputed: bool, activation_gib: float | None, compiled: bool
) -> bool:
    """Set up how a model's decoder layers run: see the arguments of `LitCausalLM`.

    Returns:
        Whether they are compiled.

    Raises:
        InputError: if the model has no layers for which that could be done.
    """
    if recomputed:
        recompute(model)
    if activation_gib is not None:
        ActivationBudget(model, int(activation_gib * 2**30))
    return compiled and compile_layers(model)


def layers_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The decoder layers, which transformers can recompute.

    Raises:
        InputError: if the model has none.
    """
    found = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not found:
        raise InputError(
            f"{type(model).__name__} has no layers that transformers can recompute or that could "
            "be compiled one by one: leave activation_gib and compile_layers unset."
        )
    return found


def recompute(model: PreTrainedModel) -> None:
    """Let every decoder layer keep nothing but its input, and run again in the backward pass."""
    new = hasattr(model, "activation_checkpointing_enable")  # not in all versions of transformers
    enable = model.activation_checkpointing_enable if new else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class ActivationBudget:
    """Recompute as many decoder layers as it takes to keep to a number of bytes, and no more.

    In every training step the first layer keeps what it needs for the backward pass, which is
    counted; as many of the last layers as the budget has room for do the same, and those between
    run again in the backward pass, when the last ones have given theirs back. So of n layers of b
    bytes with inputs of i bytes, `max(1, min(n, (budget - n i) // b))` keep theirs. What is kept
    at a time is at most the budget, or two layers and the inputs if it is smaller than that. The
    numbers of a training do not depend on it. What a library keeps without autograd's knowledge is
    not counted (bitsandbytes' LLM.int8 does).

    Args:
        model: Its decoder layers are changed: hooks, and the flag that transformers looks at.
        budget: Bytes that decoder layers may keep, their inputs included.

    Raises:
        InputError: if the model has no such layers, or if they are not all alike: the first one
            would not speak for the others.
    """

    def __init__(self, model: PreTrainedModel, budget: int) -> None:
        self.layers = layers_of(model)
        kinds = {tuple((n, p.shape) for n, p in m.named_parameters()) for m in self.layers}
        if len(kinds) > 1:
            raise InputError(
                f"the layers of {type(model).__name__} are not all alike, so that activation_gib "
                "cannot count one for all: use gradient_checkpointing instead."
            )
        self.budget = budget
        self.kept = len(self.layers)
        """How many layers kept theirs in the last step."""
        self.layer_bytes = 0
        """What one of them kept in it."""
        recompute(model)
        self._count = _Count()
        self.layers[0].register_forward_pre_hook(self._before)
        self.layers[0].register_forward_hook(self._after, always_call=True)

    def _before(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if not (layer.training and torch.is_grad_enabled()):
            return
        self.layers[0].gradient_checkpointing = False
        self._count.start(layer)

    def _after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._count.running:
            return
        self.layer_bytes = max(1, self._count.stop())
        hidden: Tensor = args[0]
        room = self.budget - len(self.layers) * hidden.numel() * hidden.element_size()
        self.kept = max(1, min(len(self.layers), room // self.layer_bytes))
        between = len(self.layers) - self.kept
        for number, other in enumerate(self.layers):
            other.gradient_checkpointing = 1 <= number <= between


class _Count:
    """Counts the bytes that autograd keeps of a layer, each storage once, without its weights."""

    def __init__(self) -> None:
        self.hooks: saved_tensors_hooks | None = None
        self._own: set[int] = set()
        self._packed: list[weakref.ref[Tensor]] = []

    @property
    def running(self) -> bool:
        return self.hooks is not None

    def start(self, layer: nn.Module) -> None:
        if self.running:  # the layer was interrupted, from the keyboard perhaps
            self.stop()
        tensors = [*layer.parameters(), *layer.buffers()]
        self._own = {t.untyped_storage().data_ptr() for t in tensors}
        self.hooks = saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def stop(self) -> int:
        assert self.hooks is not None
        self.hooks.__exit__()
        self.hooks = None
        kept = [tensor.untyped_storage() for ref in self._packed if (tensor := ref()) is not None]
        self._packed.clear()
        sizes = {storage.data_ptr(): storage.nbytes() for storage in kept}
        return sum(size for place, size in sizes.items() if place not in self._own)

    def _pack(self, tensor: Tensor) -> Tensor:
        packed = tensor.detach()  # itself, an output would keep its own graph alive
        self._packed.append(weakref.ref(packed))
        return packed


def compile_layers(model: nn.Module) -> bool:
    """Compile the decoder layers for training: once for all that are alike, when they first run.

    In evaluation mode they run as they are, for prompts and answers come in ever new lengths.

    Returns:
        Whether it was done: without a C++ compiler, which `torch.compile` needs, they run as they
        are, with a warning.

    Raises:
        InputError: if the model has no such layers.
    """
    layers = layers_of(model)
    if compiler() is None:
        rank_zero_warn("There is no C++ compiler: compile_layers has no effect. Install g++.")
        return False
    kinds = {kind: _compiled(kind) for kind in {type(layer) for layer in layers}}
    for layer in layers:
        layer.__class__ = kinds[type(layer)]
    return True


def _compiled(kind: type[GradientCheckpointingLayer]) -> type[GradientCheckpointingLayer]:
    """A class like `kind` whose forward is compiled; recomputing and hooks stay outside of it."""
    eager: Callable[..., Any] = kind.forward
    compiled: Callable[..., Any] = torch.compile(eager)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (compiled if self.training else eager)(self, *args, **kwargs)

    return type(f"Compiled{kind.__name__}", (kind,), {"forward": forward})

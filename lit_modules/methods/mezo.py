"""MeZO: training with two forward passes a step and no backward pass (arXiv:2305.17333)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from lit_modules.methods.quantised import LoraOnFrozen

Trains = Literal["lora", "full"]
_PRIME = 1_000_003


class MeZO(LoraOnFrozen):
    """Zeroth-order SGD: a step along a random direction, as far as two losses say.

    SPSA (paper's definition 1): `g = (L(w + eps z) - L(w - eps z)) / (2 eps)` with z from N(0, 1),
    and the gradient estimate is `g z`. z is drawn from its seed again each time it is needed (Alg.
    1), one parameter at a time, and the weights are moved in place; no activation is kept. The
    estimate is given to the optimizer as the parameters' gradient, so that takes the room of what
    is trained once, and any optimizer works; the paper's is plain SGD.

    Settings: what is trained is float32; with `full` all of the model, computing in bfloat16.

    Args:
        trains: `lora`, adapters on bfloat16 weights, or `full`, every parameter.
        rank: r of the adapters.
        alpha: Their product B A is multiplied by alpha / r.
        epsilon: eps. Losses come from bfloat16 arithmetic, so it must not be too small.
        seed: Of the directions; with it and the step they are always the same.

    Raises:
        InputError: for a value out of range.
    """

    name = "mezo"

    def __init__(
        self,
        trains: Trains = "lora",
        rank: int = 64,
        alpha: float = 16.0,
        epsilon: float = 1e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(rank, alpha)
        if trains not in get_args(Trains):
            raise InputError(f"method.trains is {trains!r}; choose lora or full.")
        if epsilon <= 0:
            raise InputError(f"method.epsilon is {epsilon}; it must be above 0.")
        self.trains, self.epsilon, self.seed = trains, epsilon, seed
        self.autocast = trains == "full"
        self.dtype = torch.float32 if trains == "full" else torch.bfloat16
        self._step, self._micro = -1, 0
        self._projected = torch.zeros(())

    def check(self, trainer: Trainer) -> None:
        """As `Method.check`; refuses several devices, whose losses nothing would add up.

        Raises:
            InputError: saying so.
        """
        super().check(trainer)
        if trainer.world_size > 1:
            raise InputError(
                "the method mezo has no backward pass, in which ddp adds up gradients: set "
                "trainer.devices to 1."
            )

    def convert(self, name: str, linear: nn.Linear) -> nn.Linear:
        """The layer itself, frozen."""
        return linear

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Put the adapters in, or let everything train."""
        return model.requires_grad_(True) if self.trains == "full" else super().prepare(model)

    def before_step(self, model: nn.Module, step: int) -> None:
        """Number the micro-batch: each has a direction of its own."""
        self._micro = self._micro + 1 if step == self._step else 0
        self._step = step

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Mean of the losses at `w + eps z` and `w - eps z`; keeps g for `backward`."""
        with torch.no_grad():
            self._move(model, self.epsilon)
            plus, tokens = super().loss(model, batch)
            self._move(model, -2 * self.epsilon)
            minus, _ = super().loss(model, batch)
            self._move(model, self.epsilon)
        self._projected = (plus - minus) / (2 * self.epsilon)
        return (plus + minus) / 2, tokens

    def backward(self, model: nn.Module, loss: Tensor) -> bool:
        """Add `g z` to the gradients; there is nothing for autograd to do."""
        for parameter, direction in self._directions(model):
            estimate = direction.mul_(self._projected)
            if parameter.grad is None:
                parameter.grad = estimate
            else:
                parameter.grad.add_(estimate)
        return True

    @torch.no_grad()
    def _move(self, model: nn.Module, distance: float) -> None:
        for parameter, direction in self._directions(model):
            parameter.add_(direction, alpha=distance)

    def _directions(self, model: nn.Module) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every trained parameter with its part of this micro-batch's z."""
        parameters = list(self.trainable(model).values())
        generator = torch.Generator(parameters[0].device)
        key = (self.seed * _PRIME + self._step) * _PRIME + self._micro
        generator.manual_seed(key % (1 << 63))
        for parameter in parameters:
            like: Any = {"device": parameter.device, "dtype": parameter.dtype}
            yield parameter, torch.randn(parameter.shape, generator=generator, **like)

    def merge(self, model: nn.Module) -> nn.Module:
        """`W + alpha / r B A`, or the model itself."""
        return model if self.trains == "full" else super().merge(model)

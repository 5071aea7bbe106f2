"""What a training method is: the one interface of FALQON and of everything it is compared with.

`LitCausalLM` calls a method in this order: `check`, `prepare` on the loaded model, then for every
optimizer step `before_step` and `loss` on each micro-batch, `backward`, `scale_gradients`, the
optimizer, `after_step`. A method that is in none of the libraries is a file with one subclass:
arguments that `__init__` keeps under their own names, and `prepare`.
"""

from __future__ import annotations

import abc
import inspect
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from falqon.precision import FalqonPrecision
from lit_modules.loss import supervised_loss

Weights = Literal["bf16", "fp32"]
DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Method(abc.ABC):
    """A way to train a causal LM.

    Attributes:
        name: Short name, that of its file in `configs/methods`.
        dtype: Of the weights that `prepare` gets, and of what it does not convert.
        autocast: Compute in bfloat16 under `torch.autocast`: then trainable parameters may be
            float32, and matmuls are in 16 bits all the same.
        device: Where the model is going to be trained; set before `prepare`.
        compiles: What `describe` says about `torch.compile`, unless layers are compiled.
        compiled: Whether decoder layers are; set after `prepare`.
    """

    name: str
    dtype: torch.dtype = torch.bfloat16
    autocast: bool = True
    compiles: str = "no"
    compiled: bool = False
    device: torch.device = torch.device("cpu")

    # -- setting up ---------------------------------------------------------------------------

    def check(self, trainer: Trainer) -> None:
        """Refuse a Trainer that would not train with this method.

        Raises:
            InputError: for FALQON's plugin, a precision (the method decides it), or a strategy that
                shards or replaces the optimizer step.
        """
        if isinstance(trainer.precision_plugin, FalqonPrecision):
            raise InputError(
                f"model.init_args.method is {self.name}, and trainer.plugins has FalqonPrecision, "
                "which melds the model for FALQON: set trainer.plugins to [] (the overlays in "
                "configs/methods do), or leave the method out."
            )
        if str(trainer.precision) != "32-true":
            raise InputError(
                f"trainer.precision is {trainer.precision}, but the method {self.name} decides the "
                "precision of what it computes: leave trainer.precision out."
            )
        if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise InputError(
                f"the method {self.name} trains on one device or with ddp, not with "
                f"{type(trainer.strategy).__name__}: set trainer.strategy to ddp."
            )

    @abc.abstractmethod
    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Make a loaded model trainable by this method, in place or wrapped.

        Deterministic: a resumed run prepares the base again and loads only what was trained.

        Args:
            model: On the CPU, its parameters in `dtype`. Large layers are best converted one by one
                on `self.device`.

        Returns:
            The model to train; exactly what is to be trained requires a gradient.
        """

    def trainable(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """What is trained, by name within the prepared model."""
        return {n: p for n, p in model.named_parameters() if p.requires_grad}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """What a checkpoint has to hold, by name in `model.state_dict()`: what training changes.

        Everything else comes from the base model again. Override it if `after_step` changes more
        than the trainable parameters.
        """
        return {name: p.detach() for name, p in self.trainable(model).items()}

    # -- training -----------------------------------------------------------------------------

    def compute(self) -> AbstractContextManager[Any]:
        """Context that every forward pass runs in."""
        if self.autocast:
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def before_step(self, model: nn.Module, step: int) -> None:  # noqa: B027
        """Called before every micro-batch with the number of optimizer steps done.

        What is drawn here has to depend on the seed and `step` alone, so that it resumes exactly.
        """

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Summed loss of a micro-batch's supervised tokens in training, and their number."""
        with self.compute():
            return supervised_loss(model, batch)

    def backward(self, model: nn.Module, loss: Tensor) -> bool:
        """Replace the backward pass of a micro-batch.

        Args:
            model: The prepared model.
            loss: What `loss` gave, times accumulated batches and ranks.

        Returns:
            Whether it did; False leaves it to autograd.
        """
        return False

    def scale_gradients(self, parameters: list[nn.Parameter], factor: Tensor) -> None:
        """Turn gradients of summed losses into those of the mean over the step's tokens.

        Args:
            parameters: All that are optimized; gradients are changed in place.
            factor: float32 scalar, one over the number of supervised tokens.
        """
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def after_step(self, model: nn.Module, step: int) -> None:  # noqa: B027
        """Called after each optimizer step with its number, from 0; before the scheduler's."""

    # -- after training -----------------------------------------------------------------------

    @abc.abstractmethod
    def merge(self, model: nn.Module) -> nn.Module:
        """A plain model that computes the trained function.

        Args:
            model: The prepared and trained model; it may be used up.

        Raises:
            InputError: where there is none.
        """

    def settings(self) -> dict[str, Any]:
        """The arguments of `__init__` with their values: what a resumed run has to match."""
        names = list(inspect.signature(type(self).__init__).parameters)[1:]
        return {name: getattr(self, name) for name in names if hasattr(self, name)}

    def describe(self) -> dict[str, Any]:
        """Name, settings, and what the method is run with; plain containers."""
        return {
            "name": self.name,
            "settings": self.settings(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "weights": str(self.dtype).removeprefix("torch."),
            "compute": "bfloat16 autocast" if self.autocast else "dtype of the weights",
            "optimizer": "the configuration's; overlays give fused AdamW",
            "compile": "decoder layers" if self.compiled else self.compiles,
        }

"""FALQON: what the precision plugin does, as a method like the others."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor, nn
from transformers import PreTrainedModel

from falqon.errors import InputError
from falqon.meld import melded_layers
from falqon.precision import FalqonPrecision
from lit_modules.methods.base import Method
from lit_modules.methods.layers import plain_linear


class Falqon(Method):
    """FP8 training with melded adapters (arXiv:2510.24061); the default.

    All its settings are those of `falqon.FalqonPrecision` in `trainer.plugins`, which does the
    melding, the update of the FP8 weights after each step, and the checkpoints.
    """

    name = "falqon"
    autocast = False
    compiles = "compiles without a graph break; off"

    def __init__(self) -> None:
        self.plugin: FalqonPrecision | None = None

    def check(self, trainer: Trainer) -> None:
        """Refuse a Trainer without FALQON's plugin.

        Raises:
            InputError: saying what to add.
        """
        plugin = trainer.precision_plugin
        if not isinstance(plugin, FalqonPrecision):
            raise InputError(
                "FALQON is trained with falqon.FalqonPrecision in trainer.plugins, and it is not "
                "there: add it, or choose another model.init_args.method, such as "
                "lit_modules.methods.LoRA or FullFinetune."
            )
        self.plugin = plugin
        self.dtype = plugin.dtype

    def prepare(self, model: PreTrainedModel) -> nn.Module:
        """Meld every linear layer into FP8; a melded model is left as it is."""
        assert self.plugin is not None
        return self.plugin.convert(model, device=self.device)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The whole state dict: training writes codes."""
        return dict(model.state_dict())

    def merge(self, model: nn.Module) -> nn.Module:
        """Replace melded layers by plain ones that hold what the FP8 codes say.

        Inputs are then no longer rounded to FP8: that is the served function only on a server
        without FP8 units.

        Raises:
            InputError: with changes that are not in the codes yet.
        """
        if self.plugin is not None and self.plugin.is_pending():
            raise InputError(
                "there are changes that are not in the FP8 codes yet: call LitCausalLM.flush first."
            )
        for name, layer in melded_layers(model).items():
            weight = layer.dequantized_weight(self.dtype)
            model.set_submodule(name, plain_linear(weight, layer.bias))
        return model

    def describe(self) -> dict[str, Any]:
        """As `Method.describe`, with the plugin's settings."""
        settings = self.plugin.settings() if self.plugin else {}
        return super().describe() | {"settings": settings}

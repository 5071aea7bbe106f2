"""FALQON: LoRA fine-tuning melded into an FP8 backbone (arXiv:2510.24061)."""

from falqon.delta.load import load_delta, unload_delta
from falqon.errors import InputError
from falqon.linear import MeldedLinear
from falqon.meld import MeldReport, meld, meld_linear, melded_layers
from falqon.parallel.sharded_strategy import ShardedStrategy
from falqon.precision import FalqonPrecision
from falqon.proxy import ProxyUpdate, UpdateStatistics
from falqon.recipe import (
    PRESETS,
    RECIPES,
    Fp8Recipe,
    MeldRecipe,
    UpdateRecipe,
    fp8_recipe,
    update_recipe,
)
from falqon.version import __version__

__all__ = [
    "PRESETS",
    "RECIPES",
    "FalqonPrecision",
    "Fp8Recipe",
    "InputError",
    "MeldRecipe",
    "MeldReport",
    "MeldedLinear",
    "ProxyUpdate",
    "ShardedStrategy",
    "UpdateRecipe",
    "UpdateStatistics",
    "__version__",
    "fp8_recipe",
    "load_delta",
    "meld",
    "meld_linear",
    "melded_layers",
    "unload_delta",
    "update_recipe",
]

"""Small melded models and what an optimizer would do to them, for tests of update policies."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3, decode, encode
from falqon.linear import MeldedLinear
from falqon.meld import meld, melded_layers
from falqon.proxy import ProxyUpdate
from falqon.recipe import Fp8Recipe, MeldRecipe, update_recipe

RANK = 4
LIVE_FEEDBACK = {"preset": "feedback", "live": True}
UNROUNDED_SCALE = Fp8Recipe(weight_scale_rounding="none")
SCALES = pytest.mark.parametrize("fp8", [Fp8Recipe(), UNROUNDED_SCALE], ids=["pow2", "any scale"])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(
    fp8: Fp8Recipe | None = None, **melding: Any
) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The model and its original weights."""
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.GELU(), nn.Linear(40, 16, bias=False))
    for seed, layer in enumerate((model[0], model[2])):
        layer.weight.data = random(*layer.weight.shape, seed=seed) / layer.in_features**0.5
    weights: dict[str, Tensor] = {}
    # The changes of these tests are of a size for the paper's A, which is short.
    recipe = MeldRecipe(rank=RANK, **{"adapter": "svd_error", **melding})
    meld(model, fp8, recipe, keep=weights.setdefault)
    return model, weights


def make(
    update: str | dict[str, Any], fp8: Fp8Recipe | None = None, **changes: Any
) -> tuple[list[MeldedLinear], ProxyUpdate]:
    model, weights = make_model(fp8)
    layers = melded_layers(model)
    return list(layers.values()), ProxyUpdate(layers, update_recipe(update, **changes), weights)


def by_hand(
    weight: list[list[float]], adapter: list[list[float]], scale: float = 4.0
) -> MeldedLinear:
    """A layer with these values times the scale, all of which must be exact in E4M3."""
    codes = encode(torch.tensor(weight + adapter), E4M3)
    assert decode(codes, E4M3).tolist() == weight + adapter
    layer = MeldedLinear(len(weight[0]), len(weight), len(adapter))
    layer.codes.data, layer.scale.data = codes, torch.tensor([scale])
    return layer


def add(layers: list[MeldedLinear], step: int, size: float = 0.05) -> list[Tensor]:
    """What an optimizer would do in one step; the sizes of rows differ, and change by step."""
    deltas = []
    for number, layer in enumerate(layers):
        seed = 100 * step + 10 * number
        rows = random(layer.out_features, 1, seed=seed + 1).exp()
        deltas.append(size * rows * random(*layer.B.shape, seed=seed + 2))
        layer.B.data += deltas[-1]
    return deltas


def written_rows(update: ProxyUpdate, name: str, step: int) -> Tensor:
    return (update.states[name].last_written == step).nonzero()[:, 0]


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)

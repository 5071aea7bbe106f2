"""Where A comes from, and what melding hands over and scales."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.fp8 import E4M3, decode, dequantize, quantize
from falqon.meld import meld, meld_linear, meld_weight, melded_layers
from falqon.recipe import RECIPES, Fp8Recipe, MeldRecipe, ScaleRounding
from tests.test_meld import Head

FP8 = Fp8Recipe()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- where A comes from -------------------------------------------------------------------------


def outstanding(out: int, features: int, rank: int) -> Tensor:
    """A weight whose leading directions stand out: they are well-defined then."""
    left, _ = torch.linalg.qr(random(out, rank, seed=1))
    right, _ = torch.linalg.qr(random(features, rank, seed=2))
    sizes = torch.linspace(6.0, 3.0, rank)
    return (left * sizes) @ right.t() + 0.5 * random(out, features, seed=3) / out**0.5


@pytest.mark.parametrize("svd", ["full", "randomized"])
@pytest.mark.parametrize("size", [1.0, 1e-3, 1e4])
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
def test_adapter_from_the_weight_spans_its_leading_directions(
    svd: Any, size: float, rounding: ScaleRounding
) -> None:
    weight = size * outstanding(96, 128, 4)
    fp8 = Fp8Recipe(weight_scale_rounding=rounding)
    recipe = MeldRecipe(rank=4, adapter="svd_weight", svd=svd)
    codes, scale, captured = meld_weight(weight, fp8, recipe)
    _, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    adapter = dequantize(codes[96:], scale, E4M3).double()
    basis, _ = torch.linalg.qr(adapter.t())
    assert torch.linalg.svdvals(right[:4] @ basis).min() > 0.99  # cosines of the angles
    share = values[:4].square().sum() / values.square().sum()
    assert captured == pytest.approx(float(share), rel=1e-3)
    # Each row has the length sqrt(S), all of them together scaled where FP8 does not allow it.
    lengths = adapter.norm(dim=1) / values[:4].sqrt()
    assert lengths.max() < 1.02 * lengths.min()
    largest, limit = adapter.abs().max(), weight.abs().max()
    wanted = largest / lengths.mean()
    assert largest == pytest.approx(float(wanted.clamp(limit / 256, limit)), rel=0.07)
    assert ((codes[96:] & 0x7F) <= 0x7E).all()


@pytest.mark.parametrize("adapter", ["svd_weight", "kaiming"])
@pytest.mark.parametrize("size", [1.0, 1e-3])
def test_another_adapter_does_not_touch_the_weight(adapter: Any, size: float) -> None:
    weight = size * random(96, 128)
    codes, scale, _ = meld_weight(weight, FP8, MeldRecipe(rank=4, adapter=adapter))
    own, own_scale = quantize(weight, E4M3)
    assert torch.equal(scale, own_scale)  # the weight's own amax decides
    assert torch.equal(codes[:96], own)
    assert codes[96:].any(dim=1).all()
    if size == 1.0:  # else the paper's A does not fit and changes the scale
        paper = MeldRecipe(rank=4, adapter="svd_error")
        others, its_scale, _ = meld_weight(weight, FP8, paper)
        assert torch.equal(scale, its_scale)
        assert torch.equal(codes[:96], others[:96])
        assert not torch.equal(codes[96:], others[96:])


def test_random_adapter_is_that_of_lora() -> None:
    linear = nn.Linear(64, 48)
    linear.weight.data = random(48, 64)

    def adapter(seed: int = 0, name: str = "a", fp8: Fp8Recipe = FP8) -> Tensor:
        recipe = MeldRecipe(rank=16, adapter="kaiming", seed=seed)
        layer, captured = meld_linear(linear, fp8, recipe, name=name)
        assert captured == 0.0
        return layer.dequantized_adapter()

    state = torch.get_rng_state()
    exact = adapter(fp8=RECIPES["none"])
    assert torch.equal(torch.get_rng_state(), state)
    for values in (exact, adapter()):  # 1/8 is exact in E4M3, so rounding does not go beyond it
        assert values.abs().max() <= 1 / 8
        assert values.abs().max() > 0.99 / 8
        # 1024 uniform numbers: mean 0 and deviation 1 / (8 sqrt(3)), with four sigma of each.
        assert abs(float(values.mean())) < 4 * (1 / 8) / (3 * 1024) ** 0.5
        assert float(values.std()) == pytest.approx(1 / (8 * 3**0.5), rel=0.06)
    torch.manual_seed(77)
    assert torch.equal(adapter(), adapter())
    assert not torch.equal(adapter(), adapter(seed=1))
    assert not torch.equal(adapter(), adapter(name="b"))


@pytest.mark.parametrize("adapter", ["svd_weight", "kaiming"])
def test_another_adapter_of_a_zero_weight(adapter: Any) -> None:
    codes, scale, _ = meld_weight(torch.zeros(8, 12), FP8, MeldRecipe(rank=2, adapter=adapter))
    assert not codes[:8].any()
    assert scale.tolist() == [1.0]
    assert codes[8:].any() == (adapter == "kaiming")
    assert torch.isfinite(decode(codes, E4M3)).all()


@pytest.mark.parametrize("adapter", ["svd_error", "svd_weight", "kaiming"])
def test_adapter_without_rounding_is_the_same(adapter: Any) -> None:
    weight, recipe = 0.01 * random(48, 64), MeldRecipe(rank=4, adapter=adapter)
    exact, _, captured = meld_weight(weight, RECIPES["none"], recipe)
    codes, scale, same = meld_weight(weight, FP8, recipe)
    assert captured == same
    assert torch.equal(exact[:48], weight)
    assert torch.equal(quantize(exact[48:], E4M3, scale=scale)[0], codes[48:])


@pytest.mark.parametrize(("alpha", "scaling"), [(None, 1.0), (4, 1.0), (8.0, 2.0), (1, 0.25)])
def test_lora_alpha_is_the_scaling_of_every_layer(alpha: float | None, scaling: float) -> None:
    model = Head()
    meld(model, FP8, MeldRecipe(rank=4, lora_alpha=alpha))
    assert {layer.lora_scaling for layer in melded_layers(model).values()} == {scaling}
    layer, _ = meld_linear(nn.Linear(8, 8), FP8, MeldRecipe(rank=4, lora_alpha=alpha))
    layer.B.data.fill_(0.5)
    assert layer.pending().tolist() == [[0.5 * scaling] * 4] * 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapter": "svd"}, "adapter is 'svd'; choose one of svd_error, svd_weight, kaiming"),
        ({"lora_alpha": 0}, "lora_alpha is 0; it must be a positive number"),
        ({"lora_alpha": -8.0}, "lora_alpha is -8.0"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ],
)
def test_adapter_settings_that_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        MeldRecipe(**changes)


def test_original_weights_are_handed_over() -> None:
    model = Head()
    expected = {
        name: (weight, weight.clone())
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        for weight in [module.weight.detach()]
    }
    kept: dict[str, Tensor] = {}
    report = meld(model, FP8, MeldRecipe(rank=2), keep=kept.setdefault)
    assert list(kept) == list(report.converted) == list(melded_layers(model))
    for name, weight in kept.items():
        original, copied = expected[name]
        assert weight.data_ptr() == original.data_ptr()  # itself, not a copy
        assert torch.equal(weight, copied)
        assert not weight.requires_grad
    kept.clear()
    meld(model, FP8, MeldRecipe(rank=2), keep=kept.setdefault)
    assert not kept  # melded before: there are none

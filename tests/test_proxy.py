"""The proxy update: which rows, what is cleared, what is reported; it trains as LoRA-FA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from falqon.errors import InputError
from falqon.fp8 import E4M3, decode, encode
from falqon.linear import MeldedLinear
from falqon.meld import meld, melded_layers
from falqon.precision import check_rows
from falqon.proxy import ProxyUpdate
from falqon.recipe import RECIPES, MeldRecipe, UpdateRecipe, update_recipe
from falqon.rows import select_rows

RANK = 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_model(recipe: str = "default") -> nn.Sequential:
    model = nn.Sequential(nn.Linear(24, 40, bias=False), nn.GELU(), nn.Linear(40, 16, bias=False))
    for seed, layer in enumerate((model[0], model[2])):
        layer.weight.data = random(*layer.weight.shape, seed=seed) / layer.in_features**0.5
    meld(model, RECIPES[recipe], MeldRecipe(rank=RANK, adapter="svd_error"))
    return model


def make(update: UpdateRecipe) -> tuple[list[MeldedLinear], ProxyUpdate]:
    layers = melded_layers(make_model())
    return list(layers.values()), ProxyUpdate(layers, update)


def fill(layers: list[MeldedLinear], size: float = 1.0, seed: int = 10) -> list[Tensor]:
    for number, layer in enumerate(layers):
        layer.B.data = size * random(*layer.B.shape, seed=seed + number)
    return [layer.B.detach().clone() for layer in layers]


def l1(proxy: Tensor) -> Tensor:
    return proxy.abs().sum(dim=1)


def codes_of(layers: list[MeldedLinear]) -> list[Tensor]:
    return [layer.codes.detach().clone() for layer in layers]


def requantised(codes: Tensor, proxy: Tensor, rows: Tensor) -> Tensor:
    """`Q(DQ(W) + B A)` on some rows, in units of codes (the scale is a power of two: exact)."""
    result, out = codes.clone(), len(codes) - RANK
    change = proxy @ decode(codes[out:], E4M3)
    result[rows] = encode(decode(codes[:out], E4M3)[rows] + change[rows], E4M3)
    return result


# -- which rows ---------------------------------------------------------------------------------


def test_rows_with_the_largest_change_are_selected() -> None:
    proxy = torch.tensor([[1.0, -1.0], [0.0, 0.5], [-3.0, 0.0], [2.0, 0.5], [0.0, 0.0]])
    assert select_rows(l1(proxy), 1).tolist() == [2]
    assert select_rows(l1(proxy), 3).tolist() == [2, 3, 0]
    assert select_rows(l1(proxy), 5).tolist() == [0, 1, 2, 3, 4]
    assert select_rows(l1(proxy), 99).tolist() == [0, 1, 2, 3, 4]


def test_ties_go_to_the_lowest_row() -> None:
    proxy = torch.ones(1000, 2)
    proxy[500] = 2.0
    assert select_rows(l1(proxy), 4).tolist() == [500, 0, 1, 2]
    assert select_rows(torch.zeros(1000), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_rows_that_cannot_be_written_come_last(bad: float) -> None:
    proxy = torch.zeros(6, 2)
    proxy[0, 1] = bad
    proxy[4] = 1.0
    assert select_rows(l1(proxy), 5).tolist() == [4, 1, 2, 3, 5]


def test_number_of_rows_is_checked_against_the_model() -> None:
    plain = nn.Sequential(nn.Linear(4, 30), nn.Linear(30, 10))
    for module in (plain, make_model()):
        most = max(m.out_features for m in module if hasattr(m, "out_features"))
        check_rows(module, update_recipe("paper", most))
        with pytest.raises(
            InputError, match=f"rows is {most + 1}, .* has {most} rows; use at most"
        ):
            check_rows(module, update_recipe("paper", most + 1))
    for rows in ("rank", "all", 0.99):
        check_rows(plain, update_recipe("paper", rows))
    with pytest.raises(InputError, match="rows is 11, .* has 10 rows"):  # layer 0 stays as it is
        check_rows(plain, update_recipe("paper", 11), MeldRecipe(exclude=("0",)))
    check_rows(nn.Embedding(3, 3), update_recipe("paper", 10))  # melding will say what is wrong


# -- what is written and cleared ----------------------------------------------------------------


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zero_proxy_changes_nothing(preset: str, rounding: Any) -> None:
    layers, update = make(update_recipe(preset, "all", rounding=rounding))
    for layer in layers:
        layer.codes.data[: layer.out_features, ::3] = 0x80  # -0
    before = codes_of(layers)
    update.step(0)
    update.flush(1)
    assert all(torch.equal(a, b) for a, b in zip(codes_of(layers), before, strict=True))
    statistics = update.statistics()
    assert statistics is not None
    assert set(vars(statistics).values()) == {0}


@pytest.mark.parametrize("preset", ["paper", "released"])
@pytest.mark.parametrize("rows", [1, 5, 20, "rank", "all", 0.3])
def test_step_writes_selected_rows_and_clears_by_preset(
    preset: str, rows: int | float | str
) -> None:
    recipe = update_recipe(preset, rows)
    layers, update = make(recipe)
    proxies, before = fill(layers), codes_of(layers)
    update.step(0)
    written = 0
    for layer, proxy, old in zip(layers, proxies, before, strict=True):
        count = recipe.rows_of(layer.out_features, RANK)
        selected = proxy.abs().sum(dim=1).argsort(descending=True)[:count]
        expected = requantised(old, proxy, selected)
        assert torch.equal(layer.codes, expected)
        assert (expected != old)[selected].any(dim=1).all()  # not a vacuous update
        assert torch.equal(layer.codes[layer.out_features :], old[layer.out_features :])  # A
        left = proxy.clone()
        left[selected] = 0.0
        assert torch.equal(layer.B, left if preset == "paper" else torch.zeros_like(proxy))
        written += count
    statistics = update.statistics()
    assert statistics is not None
    assert statistics.rows_written == written


def test_second_step_without_new_change_changes_nothing() -> None:
    layers, update = make(update_recipe("paper", "all"))
    fill(layers)
    update.step(0)
    before = codes_of(layers)
    update.step(1)
    assert all(torch.equal(a, b) for a, b in zip(codes_of(layers), before, strict=True))
    statistics = update.statistics()
    assert statistics is not None
    assert (statistics.rows_written, statistics.codes_flipped) == (0, 0)


def test_kept_rows_accumulate_until_written() -> None:
    layers, update = make(update_recipe("paper", 1))
    layer = layers[0]
    layer.B.data.zero_()
    layer.B.data[7] = 0.3
    layer.B.data[2] = 1.0
    before = layer.codes.detach().clone()
    update.step(0)
    layer.B.data[7] += 0.3  # the next optimizer step
    proxy = layer.B.detach().clone()
    update.step(1)
    assert torch.equal(layer.codes[7], requantised(before, proxy, torch.tensor([7]))[7])
    assert not layer.B.any()


def test_flush_writes_every_pending_row() -> None:
    layers, update = make(update_recipe("paper", 1))
    fill(layers)
    update.step(0)
    pending, before = [layer.B.detach().clone() for layer in layers], codes_of(layers)
    update.flush(1)
    for layer, proxy, old in zip(layers, pending, before, strict=True):
        assert torch.equal(layer.codes, requantised(old, proxy, torch.arange(layer.out_features)))
        assert not layer.B.any()
    statistics = update.statistics()
    assert statistics is not None
    assert statistics.rows_written == 40 + 16 - 2


def test_only_the_given_proxies_are_considered() -> None:
    layers, update = make(update_recipe("paper", "all"))
    proxies, before = fill(layers), codes_of(layers)
    update.step(0, only={id(layers[1].B)})
    assert torch.equal(layers[0].codes, before[0])
    assert torch.equal(layers[0].B, proxies[0])
    assert not torch.equal(layers[1].codes, before[1])
    assert not layers[1].B.any()


def test_stochastic_update_does_not_depend_on_which_layers_are_considered() -> None:
    recipe = update_recipe("paper", "all", rounding="stochastic", seed=3)
    together, update = make(recipe)
    fill(together, 0.01)
    update.step(5)
    apart, other = make(recipe)
    fill(apart, 0.01)
    other.step(5, only={id(apart[1].B)})
    other.step(5, only={id(apart[0].B)})
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(together, apart, strict=True))
    later, third = make(recipe)
    fill(later, 0.01)
    third.step(6)
    assert not torch.equal(later[0].codes, apart[0].codes)


def test_damaged_rows_are_dropped_and_the_others_written() -> None:
    layers, update = make(update_recipe("paper", "all"))
    fill(layers)
    layers[0].B.data[3, 1] = float("nan")
    before = codes_of(layers)
    update.step(0)
    assert torch.equal(layers[0].codes[3], before[0][3])
    assert torch.isfinite(layers[0].dequantized_weight()).all()
    statistics = update.statistics()
    assert statistics is not None
    assert statistics.rows_written == 40 + 16 - 1
    assert statistics.realised_ratio > 0.9


# -- statistics ---------------------------------------------------------------------------------


def test_no_statistics_before_the_first_step() -> None:
    assert make(update_recipe("paper"))[1].statistics() is None


@pytest.mark.parametrize("preset", ["paper", "released"])
def test_statistics_equal_a_recount(preset: str) -> None:
    layers, update = make(update_recipe(preset, 6))
    proxies = fill(layers, 0.2)
    before = codes_of(layers)
    values = [layer.dequantized_weight().double() for layer in layers]
    update.step(0)
    landed_along = wanted_square = 0.0
    flipped = saturated = 0
    for layer, proxy, old, value in zip(layers, proxies, before, values, strict=True):
        rows = proxy.abs().sum(dim=1).argsort(descending=True)[:6]
        left = rows if preset == "paper" else torch.arange(layer.out_features)
        change = proxy.double() @ layer.dequantized_adapter().double()
        landed = layer.dequantized_weight().double() - value
        landed_along += float((landed * change)[rows].sum())
        wanted_square += float(change[left].square().sum())  # what left B
        flipped += int((layer.codes != old).sum())
        saturated += int((decode(layer.codes[rows], E4M3).abs() == 448).sum())
    statistics = update.statistics()
    assert statistics is not None
    assert statistics.rows_written == 12
    assert statistics.codes_flipped == flipped > 0
    assert statistics.codes_flipped_share == pytest.approx(flipped / (40 * 24 + 16 * 40))
    assert statistics.saturated_share == saturated / (6 * 24 + 6 * 40)
    assert statistics.realised_ratio == pytest.approx(landed_along / wanted_square, rel=1e-5)


def test_realised_ratio_tells_lost_from_landed() -> None:
    ratios = []
    for size in (1e-4, 0.5):
        layers, update = make(update_recipe("paper", "all"))
        fill(layers, size)
        update.step(0)
        statistics = update.statistics()
        assert statistics is not None
        ratios.append(statistics.realised_ratio)
    # The first change is far below half a step (1/32 to 1/16 of a weight) of all but the smallest
    # weights; one as large as the weights lands but for its rounding, as often up as down.
    assert 0 <= ratios[0] < 0.02
    assert abs(ratios[1] - 1) < 0.02


def test_cleared_rows_count_as_lost() -> None:
    layers, kept = make(update_recipe("paper", 2))
    fill(layers, 0.3)
    kept.step(0)
    others, cleared = make(update_recipe("released", 2))
    fill(others, 0.3)
    cleared.step(0)
    first, second = kept.statistics(), cleared.statistics()
    assert first is not None
    assert second is not None
    assert first.codes_flipped == second.codes_flipped
    assert first.realised_ratio > 0.95
    assert second.realised_ratio < 0.5  # 2 of 40 and 2 of 16 rows were written


def test_large_change_saturates() -> None:
    layers, update = make(update_recipe("paper", "all"))
    fill(layers, 1e6)
    update.step(0)
    statistics = update.statistics()
    assert statistics is not None
    assert statistics.saturated_share > 0.9
    assert all(torch.isfinite(layer.dequantized_weight()).all() for layer in layers)


# -- without rounding ---------------------------------------------------------------------------


def test_without_rounding_the_change_is_added_exactly() -> None:
    layers = melded_layers(make_model("none"))
    update = ProxyUpdate(layers, update_recipe("paper", "all"))
    proxies, before = fill(list(layers.values())), codes_of(list(layers.values()))
    update.step(0)
    for layer, proxy, old in zip(layers.values(), proxies, before, strict=True):
        out = layer.out_features
        expected = old[:out].double() + proxy.double() @ old[out:].double()
        # float32: a product of rank 4 and one addition
        torch.testing.assert_close(layer.codes[:out].double(), expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(layer.codes[out:], old[out:])
    statistics = update.statistics()
    assert statistics is not None
    assert statistics.realised_ratio == 1.0


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.3),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_without_rounding_is_lora_fa(optimizer: str) -> None:
    model = make_model("none")
    layers = list(melded_layers(model).values())
    weights = [layer.dequantized_weight() for layer in layers]
    adapters = [layer.dequantized_adapter() for layer in layers]
    proxies = [nn.Parameter(torch.zeros_like(layer.B)) for layer in layers]
    ours = OPTIMIZERS[optimizer]([layer.B for layer in layers])
    theirs = OPTIMIZERS[optimizer](proxies)
    update = ProxyUpdate(melded_layers(model), update_recipe("paper", "all"))

    def lora_fa(x: Tensor) -> Tensor:
        for number, (w, a, b) in enumerate(zip(weights, adapters, proxies, strict=True)):
            x = functional.gelu(x) if number else x
            x = x @ w.t() + (x @ a.t()) @ b.t()
        return x

    losses = []
    for step in range(20):
        x, target = random(32, 24, seed=step), random(32, 16, seed=1000)
        result, expected = model(x), lora_fa(x)
        # Both are float32 and add in another order; 1e-5 leaves 20 steps room to add that up.
        assert (result - expected).norm() <= 1e-5 * expected.norm()
        for output, opt in ((result, ours), (expected, theirs)):
            loss = (output - target).square().sum(dim=1).mean()
            losses.append(loss.item())
            opt.zero_grad()
            loss.backward()
            opt.step()
        update.step(step)
        for layer, w, a, b in zip(layers, weights, adapters, proxies, strict=True):
            effective = w + b.detach() @ a
            assert (layer.dequantized_weight() - effective).norm() <= 1e-5 * effective.norm()
            assert not layer.B.any()
            if step == 19:
                assert (b.detach() @ a).norm() > 0.01 * w.norm()  # the weights did change
    assert losses[-1] < losses[0]

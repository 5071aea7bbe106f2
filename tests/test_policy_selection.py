"""Which rows an update writes and when, what it reports, and which policies are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from falqon.errors import InputError
from falqon.meld import meld_linear, melded_layers
from falqon.proxy import ProxyUpdate
from falqon.recipe import DEFAULT_PRESET, PRESETS, RECIPES, MeldRecipe, UpdateRecipe, update_recipe
from falqon.rows import binades
from tests.policies import RANK, add, by_hand, make, make_model, random, written_rows

# -- which rows ---------------------------------------------------------------------------------


def test_norm_selects_by_the_change_of_the_weights() -> None:
    # The second row of A is 16 times as long, so a quarter of the other B changes more.
    layer = by_hand([[1.0, 2.0]] * 3, [[0.125, 0.0], [0.0, 2.0]])
    proxy = torch.tensor([[1.0, 0.0], [0.0, 0.25], [0.5, 0.0]])
    for select, expected in (("l1", 0), ("norm", 1)):
        update = ProxyUpdate({"": layer}, update_recipe("paper", 1, select=select))
        layer.B.data = proxy.clone()
        update.step(0)
        assert written_rows(update, "", 0).tolist() == [expected]


def test_norm_selects_what_the_full_product_says() -> None:
    layers, update = make("paper", rows=6, select="norm")
    add(layers, 0)
    expected = [
        (layer.B.double() @ layer.dequantized_adapter().double()).norm(dim=1).argsort()[-6:]
        for layer in layers
    ]
    update.step(0)
    for name, rows in zip(update.layers, expected, strict=True):
        assert written_rows(update, name, 0).tolist() == sorted(rows.tolist())


def test_flips_prefers_the_row_with_the_finer_grid() -> None:
    layer = by_hand([[256.0, 256.0], [16.0, -16.0], [1.0, 0.5], [1.0, 1.0]], [[1.0, 1.0]])
    for select, order in (("l1", [0, 1, 2, 3]), ("norm", [0, 1, 2, 3]), ("flips", [2, 3, 1, 0])):
        for count in (1, 2, 3):
            update = ProxyUpdate({"": layer}, update_recipe("paper", count, select=select))
            # So small that none flips: the grid stays as it is.
            layer.B.data = torch.full((4, 1), 1e-4)
            update.step(0)
            assert written_rows(update, "", 0).tolist() == sorted(order[:count])


def test_expected_flips_follow_what_is_written() -> None:
    layer = by_hand([[1.0, 1.0], [4.0, 4.0]], [[1.0, 1.0]])
    update = ProxyUpdate({"": layer}, update_recipe("paper", 1, select="flips"))
    layer.B.data = torch.tensor([[63.0], [0.0]])
    update.step(0)  # 64: now the coarser row
    layer.B.data = torch.tensor([[0.1], [0.1]])
    update.step(1)
    assert update.states[""].last_written.tolist() == [0, 1]


@pytest.mark.parametrize("select", ["l1", "norm", "flips"])
def test_ties_go_to_the_lower_row(select: str) -> None:
    layer = by_hand([[1.0, 2.0]] * 50, [[0.5, 0.5]])
    layer.B.data.fill_(0.125)
    layer.B.data[30] = 0.25
    update = ProxyUpdate({"": layer}, update_recipe("paper", 3, select=select))
    update.step(0)
    assert written_rows(update, "", 0).tolist() == [0, 1, 30]


@pytest.mark.parametrize("preset", ["paper", "feedback", "anchored"])
@pytest.mark.parametrize(("age", "every"), [(5, 1), (7, 1), (8, 2), (7, 2), (2, 2), (1, 1)])
def test_no_row_waits_longer_than_max_age(preset: str, age: int, every: int) -> None:
    layers, update = make(preset, rows=1, max_age=age, every=every)
    last = {name: torch.full((len(layer.B),), -1) for name, layer in update.layers.items()}
    for step in range(3 * age):
        add(layers, step)
        update.step(step)
        for name, seen in last.items():
            now = update.states[name].last_written
            assert (now >= seen).all()
            assert (step - now < age).all()
            last[name] = now.clone()


def test_without_max_age_rows_do_wait() -> None:
    layers, update = make("paper", rows=1)
    for step in range(15):
        add(layers, step)
        update.step(step)
    assert (update.states["0"].last_written < 0).any()


def test_rows_that_never_change_do_not_take_the_turns_of_others() -> None:
    layers, update = make("paper", rows=1, max_age=5)
    for step in range(15):
        add(layers, step)
        for layer in layers:
            layer.B.data[: layer.out_features // 2] = 0.0
        update.step(step)
    for name, layer in update.layers.items():
        changing = update.states[name].last_written[layer.out_features // 2 :]
        assert (14 - changing < 5).all()


def test_rows_by_score_come_on_top_of_rows_by_age() -> None:
    layers, update = make("paper", rows=3, max_age=10)
    add(layers, 0)
    layers[0].B.data[-3:] = 10.0
    update.step(0)
    assert written_rows(update, "0", 0).tolist() == [0, 1, 2, 3, 37, 38, 39]


def test_writes_happen_every_so_many_steps() -> None:
    layers, update = make("paper", rows="all", every=3)
    for step in range(10):
        before = [layer.codes.detach().clone() for layer in layers]
        pending = [layer.B.detach().clone() for layer in layers]
        deltas = add(layers, step)
        update.step(step)
        for layer, codes, proxy, delta in zip(layers, before, pending, deltas, strict=True):
            if step in (2, 5, 8):
                assert not torch.equal(layer.codes, codes)
                assert not layer.B.any()
            else:
                assert torch.equal(layer.codes, codes)
                assert torch.equal(layer.B, proxy + delta)
    # What a step without a write reports is the last write's.
    statistics = update.statistics()
    assert statistics is not None
    assert statistics.rows_written == 40 + 16
    assert statistics.staleness == 1.0  # number 9, written in number 8


@pytest.mark.parametrize("rows", [6, "all"])
@pytest.mark.parametrize("select", ["l1", "norm", "flips"])
def test_rows_below_the_threshold_wait(rows: int | str, select: str) -> None:
    layers, update = make("paper", rows=rows, threshold=0.2, select=select)
    layer = layers[0]
    layer.B.data = 1e-4 * random(40, RANK, seed=5)
    layer.B.data[[3, 17, 20]] = random(3, RANK, seed=6)
    before, proxy = layer.codes.detach().clone(), layer.B.detach().clone()
    update.step(0)
    large = torch.zeros(40, dtype=torch.bool)
    large[[3, 17, 20]] = True
    assert torch.equal((layer.codes[:40] != before[:40]).any(dim=1), large)
    assert torch.equal(layer.B[~large], proxy[~large])
    assert not layer.B[large].any()
    assert torch.equal(update.states["0"].last_written >= 0, large)
    # They are not lost: with enough of them the row is written.
    layer.B.data[0] = 1.0
    update.step(1)
    assert written_rows(update, "0", 1).tolist() == [0]
    update.flush(2)
    assert not layer.B.any()


# -- expected flips -----------------------------------------------------------------------------


def test_binades_are_shares_of_the_exponents() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack([every, every.flip(0), torch.full_like(every, 0x7E), every & 0x07])
    expected = torch.full((2, 16), 1 / 16)
    one_binade = torch.zeros(2, 16)
    one_binade[0, 15] = one_binade[1, 0] = 1.0
    assert torch.equal(binades(codes), torch.cat([expected, one_binade]))


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 1.0])
def test_expected_flips_are_what_nearest_rounding_flips(size: float) -> None:
    linear = nn.Linear(4096, 48, bias=False)
    linear.weight.data = random(48, 4096) / 64
    layer, _ = meld_linear(linear, recipe=MeldRecipe(rank=RANK, adapter="kaiming"))
    # The original weights are anywhere between two codes, as the estimate supposes.
    recipe = update_recipe("master", "all", select="flips")
    update = ProxyUpdate({"": layer}, recipe, {"": linear.weight.detach()})
    layer.B.data = size * random(48, RANK, seed=5)
    expected = 4096 * update.states[""].expected_flips(layer.pending())
    before = layer.codes.detach().clone()
    update.step(0)
    flips = (layer.codes != before)[:48].sum(dim=1)
    # By a tenth over all, and in each row by four standard deviations of a count on top.
    assert flips.sum() > 200
    assert abs(float(flips.sum() / expected.sum()) - 1) < 0.1
    assert ((flips - expected).abs() <= 0.1 * expected + 4 * (expected + 1).sqrt()).all()


def test_nothing_is_expected_of_no_change_and_all_of_a_huge_one() -> None:
    layers, update = make("paper", select="flips")
    layers[0].B.data[1] = 1e6
    share = update.states["0"].expected_flips(layers[0].pending())
    assert share.tolist() == [0.0, pytest.approx(1.0), *[0.0] * 38]


@pytest.mark.parametrize("change", [{"select": "flips"}, {"threshold": 0.1}])
def test_flips_are_refused_where_there_are_no_codes(change: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="there are none with the recipe 'none'"):
        make("paper", RECIPES["none"], **change)


# -- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"select": "l2"}, ["select", "l2", "l1", "norm", "flips"]),
        ({"written": "round"}, ["written", "round", "drop", "project", "codes", "weights"]),
        ({"unselected": "drop"}, ["unselected", "drop", "keep", "clear"]),
        ({"live": "yes"}, ["live", "yes"]),
        ({"every": 0}, ["every", "0", "at least 1"]),
        ({"every": 1.5}, ["every", "1.5", "whole number"]),
        ({"every": True}, ["every", "True"]),
        ({"max_age": 0}, ["max_age", "0", "at least 1"]),
        ({"max_age": 3, "every": 4}, ["max_age is 3", "every 4 steps"]),
        ({"threshold": 2}, ["threshold", "2", "0 to 1"]),
        ({"threshold": -0.1}, ["threshold", "-0.1"]),
        ({"threshold": float("nan")}, ["threshold", "nan"]),
        (
            {"threshold": 0.1, "max_age": 9},
            ["threshold", "max_age", "one of them"],
        ),
        ({"ages": 3}, ["unknown key 'ages'", "max_age"]),
        ({"preset": "papr"}, ["papr", "paper", "anchored", "live"]),
    ],
)
def test_policy_refuses(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        update_recipe(changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_policy_from_fields() -> None:
    recipe = update_recipe({"preset": "feedback", "every": 2, "rows": 7, "live": True})
    expected = UpdateRecipe(preset="feedback", rows=7, written="project", every=2, live=True)
    assert recipe == expected
    assert update_recipe({"preset": "live"}) == PRESETS["live"]
    assert update_recipe({"every": 2}) == update_recipe(DEFAULT_PRESET, every=2)
    # What is given on top wins, and only what is given.
    again = update_recipe({"preset": "feedback", "rows": 7, "seed": 1}, 9, rounding="stochastic")
    assert (again.rows, again.seed, again.rounding) == (9, 1, "stochastic")
    assert update_recipe(again, every=4).every == 4


@pytest.mark.parametrize("preset", PRESETS)
def test_layers_are_live_as_the_policy_says(preset: str) -> None:
    layers, _ = make(preset)
    assert {layer.live for layer in layers} == {preset in ("live", "compensated")}


# -- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_pending_norm_is_the_norm_of_the_pending_change(alpha: float | None) -> None:
    model, _ = make_model(lora_alpha=alpha)
    layers = melded_layers(model)
    update = ProxyUpdate(layers, update_recipe("feedback", 5))
    add(list(layers.values()), 0)
    update.step(0)
    statistics = update.statistics()
    assert statistics is not None
    squares = sum(
        float((layer.pending().double() @ layer.dequantized_adapter().double()).square().sum())
        for layer in layers.values()
    )
    assert squares > 0
    assert statistics.pending_norm == pytest.approx(squares**0.5, rel=1e-5)


def test_staleness_is_the_mean_age_of_rows_with_a_pending_change() -> None:
    layers, update = make("paper", rows=2)
    for step in range(7):
        add(layers, step)
        layers[0].B.data[:10] = 0.0
        update.step(step)
    ages = []
    for name, layer in update.layers.items():
        # -1 for never: then it is as many steps as there were.
        age = 6 - update.states[name].last_written
        ages += age[layer.B.any(dim=1)].tolist()
    assert 0 < len(ages) < 40 + 16 - 10
    assert 7 in ages
    statistics = update.statistics()
    assert statistics is not None
    assert statistics.staleness == pytest.approx(sum(ages) / len(ages))
    update.flush(7)
    after = update.statistics()
    assert after is not None
    assert (after.staleness, after.pending_norm) == (0.0, 0.0)


@pytest.mark.parametrize("preset", ["paper", "feedback", "anchored", "master", "live"])
def test_lengths_are_equal_without_rounding(preset: str) -> None:
    layers, update = make(preset, RECIPES["none"], rows=5)
    squares = [0.0, 0.0]
    for step in range(6):
        add(layers, step, 1.0)
        before = [layer.dequantized_weight().double() for layer in layers]
        update.step(step)
        for number, (layer, old) in enumerate(zip(layers, before, strict=True)):
            squares[number] += float((layer.dequantized_weight() - old).square().sum())
    lengths = update.lengths_by_layer()
    assert list(lengths) == ["0", "2"]
    for (wanted, landed), square in zip(lengths.values(), squares, strict=True):
        # Float32 additions to weights of size 1.
        assert wanted == pytest.approx(square**0.5, rel=1e-5)
        assert landed == pytest.approx(wanted, rel=1e-5)
        assert wanted > 0


def test_lengths_tell_lost_from_landed() -> None:
    for size, share in ((1e-6, 0.0), (0.1, 1.0)):
        layers, update = make("paper", rows="all")
        assert set(update.lengths_by_layer().values()) == {(0.0, 0.0)}
        for step in range(3):
            add(layers, step, size)
            update.step(step)
        for wanted, landed in update.lengths_by_layer().values():
            # A change far below half a step of all weights is lost; one of many steps lands but
            # for its rounding, as often up as down.
            assert landed / wanted == pytest.approx(share, abs=0.05)


def test_cleared_rows_are_wanted_and_do_not_land() -> None:
    layers, update = make("released", RECIPES["none"], rows=2)
    add(layers, 0)
    changes = [layer.B.detach() @ layer.dequantized_adapter() for layer in layers]
    update.step(0)
    lengths = update.lengths_by_layer()
    for (name, (wanted, landed)), change in zip(lengths.items(), changes, strict=True):
        rows = written_rows(update, name, 0)
        assert len(rows) == 2
        assert wanted == pytest.approx(float(change.norm()), rel=1e-5)
        along = float(change[rows].square().sum() / change.norm())
        assert landed == pytest.approx(along, rel=1e-5)

"""LoRA scaling of policies; what a resumed update restores, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from falqon.errors import InputError
from falqon.meld import meld_linear, melded_layers
from falqon.proxy import ProxyUpdate
from falqon.recipe import PRESETS, RECIPES, MeldRecipe, update_recipe
from tests.policies import LIVE_FEEDBACK, RANK, add, by_hand, make, make_model, random, saved

# -- LoRA scaling -------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["paper", "feedback", "anchored", LIVE_FEEDBACK])
def test_lora_alpha_scales_what_lands_and_the_gradient(policy: str | dict[str, Any]) -> None:
    single, double = make_model(lora_alpha=4.0)[0], make_model(lora_alpha=8.0)[0]
    assert (single[0].lora_scaling, double[0].lora_scaling) == (1.0, 2.0)
    updates = [ProxyUpdate(melded_layers(m), update_recipe(policy, 5)) for m in (single, double)]
    proxy, x, grad = random(40, RANK, seed=5), random(6, 24, seed=6), random(6, 40, seed=7)
    # 2 A as 1 with twice the B: powers of two, so bit for bit.
    single[0].B.data, double[0].B.data = 2 * proxy, proxy.clone()
    outputs = [model[0](x) for model in (single, double)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.backward(grad)
    assert torch.equal(double[0].B.grad, 2 * single[0].B.grad)
    before = single[0].codes.detach().clone()
    for update in updates:
        update.step(0)
    assert torch.equal(single[0].codes, double[0].codes)
    assert not torch.equal(single[0].codes, before)
    assert torch.equal(single[0].B, 2 * double[0].B)
    assert updates[0].statistics() == updates[1].statistics()


def test_lora_alpha_doubles_the_landed_change() -> None:
    changes = []
    for alpha in (None, 8.0):
        model, _ = make_model(RECIPES["none"], lora_alpha=alpha)
        update = ProxyUpdate(melded_layers(model), update_recipe("paper", "all"))
        before = model[0].dequantized_weight()
        model[0].B.data = random(40, RANK, seed=5)
        update.step(0)
        changes.append(model[0].dequantized_weight() - before)
    # Weights of size 1 in float32 were added and taken away again.
    torch.testing.assert_close(changes[1], 2 * changes[0], rtol=0, atol=1e-6)
    assert changes[0].norm() > 0.1


# -- resuming -----------------------------------------------------------------------------------


POLICIES: dict[str, dict[str, Any]] = {
    **{name: {"preset": name} for name in PRESETS},
    "flips": {"preset": "paper", "select": "flips"},
    "norm": {"preset": "anchored", "select": "norm", "every": 2},
    "threshold": {"preset": "feedback", "threshold": 0.1},
    "max_age": {"preset": "feedback", "max_age": 6},
    "live, codes": {"preset": "live", "written": "codes"},
    "live, project": LIVE_FEEDBACK,
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("policy", POLICIES)
def test_resuming_changes_no_bit(policy: str, rounding: Any) -> None:
    def start() -> tuple[nn.Sequential, ProxyUpdate]:
        model, weights = make_model()
        recipe = update_recipe(POLICIES[policy], 3, rounding=rounding, seed=2)
        return model, ProxyUpdate(melded_layers(model), recipe, weights)

    def run(model: nn.Sequential, update: ProxyUpdate, steps: range) -> None:
        for step in steps:
            add(list(update.layers.values()), step, 0.5)
            update.step(step)

    model, update = start()
    run(model, update, range(5))
    checkpoint = saved({"model": model.state_dict(), "proxy": update.state_dict()})
    run(model, update, range(5, 12))

    other, resumed = start()  # as in a run: the update is there before the codes are loaded
    other.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["proxy"])
    run(other, resumed, range(5, 12))
    for name, layer in update.layers.items():
        again = resumed.layers[name]
        assert torch.equal(again.codes, layer.codes)
        assert torch.equal(again.B, layer.B)
        ours, theirs = update.states[name], resumed.states[name]
        assert torch.equal(ours.last_written, theirs.last_written)
        if ours.applied is None:
            assert theirs.applied is None
        else:
            assert torch.equal(ours.applied, theirs.applied)
    assert resumed.statistics() == update.statistics()
    assert resumed.lengths_by_layer() == update.lengths_by_layer()
    # And what is compared is not the start.
    assert not torch.equal(other[0].codes, make_model()[0][0].codes)


def test_selection_by_flips_follows_the_codes_of_a_checkpoint() -> None:
    layer = by_hand([[1.0, 1.0], [4.0, 4.0]], [[1.0, 1.0]])
    recipe = update_recipe("paper", 1, select="flips")
    resumed = copy.deepcopy(layer)
    update, other = ProxyUpdate({"": layer}, recipe), ProxyUpdate({"": resumed}, recipe)
    layer.B.data[0] = 63.0
    update.step(0)  # 64: now the coarser row
    resumed.load_state_dict(saved(layer.state_dict()))
    other.load_state_dict(saved(update.state_dict()))
    for one, policy in ((layer, update), (resumed, other)):
        one.B.data.fill_(0.1)
        policy.step(1)
        assert policy.states[""].last_written.tolist() == [0, 1]


def test_remainder_is_that_of_the_adapter_of_a_checkpoint() -> None:
    # Another machine's SVD may give another A; the codes, A included, are the checkpoint's then.
    layer = by_hand([[8.0, 8.0]], [[1.0, 1.0]])
    other = by_hand([[8.0, 8.0]], [[2.0, 2.0]])
    recipe = update_recipe("feedback", "all")
    update, resumed = ProxyUpdate({"": layer}, recipe), ProxyUpdate({"": other}, recipe)
    other.load_state_dict(saved(layer.state_dict()))
    resumed.load_state_dict(saved(update.state_dict()))
    for one, policy in ((layer, update), (other, resumed)):
        one.B.data.fill_(0.75)
        policy.step(0)
        assert one.B.tolist() == [[-0.25]]


@pytest.mark.parametrize("preset", ["anchored", "master"])
def test_codes_without_the_record_of_how_they_came_are_refused(preset: str) -> None:
    layers, update = make(preset, rows="all")
    add(layers, 0)
    update.step(0)
    trained = saved([layer.codes.detach() for layer in layers])
    for record in (False, True):
        others, other = make(preset, rows="all")
        for layer, codes in zip(others, trained, strict=True):
            layer.codes.data.copy_(codes)
        add(others, 1)
        if record:
            other.load_state_dict(update.state_dict())
            other.step(1)
        else:
            with pytest.raises(InputError, match="codes of 0 are not .* load the update's state"):
                other.step(1)


def test_two_optimizers_write_every_so_many_of_their_own_steps() -> None:
    layers, update = make("paper", rows="all", every=2)
    for step in range(12):
        add(layers, step)
        update.step(step, only={id(layers[step % 2].B)})
    assert [update.states[name].steps for name in update.layers] == [6, 6]
    assert all(
        update.states[name].last_written.tolist() == [5] * len(layer.B)
        for name, layer in update.layers.items()
    )


def test_a_change_that_is_not_finite_leaves_b_though_it_is_not_selected() -> None:
    for preset in ("paper", "released", "live"):
        layers, update = make(preset, rows=1, every=1)
        add(layers, 0)
        layers[0].B.data[5, 1] = float("nan")
        before = layers[0].codes[5].clone()
        update.step(0)
        assert not layers[0].B[5].any()
        assert torch.equal(layers[0].codes[5], before)
        statistics = update.statistics()
        assert statistics is not None
        assert all(value == value for value in vars(statistics).values())


def test_nothing_is_made_on_the_default_device() -> None:
    linear = nn.Linear(24, 40, bias=False)
    with torch.device("meta"):
        for adapter in ("svd_error", "kaiming"):
            layer, _ = meld_linear(linear, recipe=MeldRecipe(rank=RANK, adapter=adapter))
            update = ProxyUpdate({"": layer}, update_recipe("anchored", select="flips"))
            layer.B.data += 0.1
            update.step(0)
            assert update.statistics() is not None
            assert layer.codes.device.type == "cpu"


def test_loaded_state_is_a_copy() -> None:
    layers, update = make("anchored", rows=3)
    add(layers, 0)
    update.step(0)
    state = saved(update.state_dict())
    kept = copy.deepcopy(state)
    twins = [make("anchored", rows=3) for _ in range(2)]
    for twin_layers, twin in twins:
        twin.load_state_dict(state)
        add(twin_layers, 1)
        twin.step(1)
    assert twins[0][1].lengths_by_layer() == twins[1][1].lengths_by_layer()
    assert torch.equal(state["landed"], kept["landed"])
    assert torch.equal(state["applied"]["0"], kept["applied"]["0"])


def test_original_weights_that_are_not_there() -> None:
    model, weights = make_model()
    layers = melded_layers(model)
    del weights["2"]
    for given in (None, {}, weights):
        with pytest.raises(InputError, match=r"'master' .*original weights.*'anchored'"):
            ProxyUpdate(layers, update_recipe("master"), given)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("policy", POLICIES)
def test_two_replicas_get_identical_bits(policy: str, rounding: Any) -> None:
    model, weights = make_model()
    replicas = []
    for copied in (copy.deepcopy(model), copy.deepcopy(model)):
        recipe = update_recipe(POLICIES[policy], 3, rounding=rounding)
        update = ProxyUpdate(melded_layers(copied), recipe, dict(weights))
        for step in range(8):
            add(list(update.layers.values()), step)
            update.step(step)
        replicas.append(update)
    first, second = replicas
    for name, layer in first.layers.items():
        assert torch.equal(layer.codes, second.layers[name].codes)
        assert torch.equal(layer.B, second.layers[name].B)
        assert not torch.equal(layer.codes, melded_layers(model)[name].codes)
    assert first.statistics() == second.statistics()

"""Compensated rounding: the recursion, what it gains, and the flush that uses it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.fp8 import E4M3, decode, encode
from falqon.kernels import compensation, encode_compensated
from falqon.linear import MeldedLinear
from falqon.meld import melded_layers
from falqon.moments import InputMoments
from falqon.proxy import ProxyUpdate
from falqon.recipe import PRESETS, Fp8Recipe, update_recipe
from tests.policies import add, make_model, random, saved

COMPENSATED = {"preset": "live", "rows": 3, "flush_rounding": "compensated"}


def correlated(rows: int, features: int, seed: int = 3) -> Tensor:
    return random(rows, features, seed=seed) @ random(features, features, seed=seed + 1)


def output_error(codes: Tensor, target: Tensor, moment: Tensor) -> float:
    error = (decode(codes, E4M3) - target).double()
    return float((error @ moment.double() * error).sum())


# -- the recursion ----------------------------------------------------------------------------


def by_elimination(target: Tensor, moment: Tensor, damping: float) -> Tensor:
    """The same from its definition: after each column the best correction of those to come.

    With e the column's error and F the columns to come, it is `-e H[i, F] H[F, F]^-1` (up to sign,
    the minimum of the quadratic form over F).
    """
    hessian = moment.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean())
    left, codes = target.double().clone(), torch.zeros(target.shape, dtype=torch.uint8)
    todo = torch.argsort(moment.double().diagonal(), descending=True, stable=True).tolist()
    while todo:
        column = todo.pop(0)
        codes[:, column] = encode(left[:, column].float(), E4M3)
        error = left[:, column] - decode(codes[:, column].contiguous(), E4M3).double()
        if todo:
            follow = torch.linalg.solve(hessian[todo][:, todo], hessian[todo, column])
            left[:, todo] += error[:, None] * follow
    return codes


@pytest.mark.parametrize(("rows", "features"), [(1, 1), (5, 7), (16, 33), (3, 64), (9, 100)])
def test_recursion_is_the_step_by_step_minimum(rows: int, features: int) -> None:
    target = 60 * random(rows, features)
    inputs = correlated(4 * features, features)
    moment = inputs.t() @ inputs
    codes = encode_compensated(target, compensation(moment, 0.01))
    by_hand = by_elimination(target, moment, 0.01)
    # float32 against float64: a value on a tie may go the other way, and change those after it.
    assert (codes != by_hand).float().mean() < 0.02


@pytest.mark.parametrize("kind", ["uncorrelated", "unseen"])
def test_nothing_to_compensate_is_rounding_to_nearest(kind: str) -> None:
    target = 60 * random(6, 40)
    moment = torch.diag(random(40).abs()) if kind == "uncorrelated" else torch.zeros(40, 40)
    assert torch.equal(encode_compensated(target, compensation(moment)), encode(target, E4M3))


def test_output_error_falls_and_weights_pay_for_it() -> None:
    target, inputs = 60 * random(32, 96), correlated(400, 96)
    moment = inputs.t() @ inputs
    codes, nearest = encode_compensated(target, compensation(moment)), encode(target, E4M3)
    assert output_error(codes, target, moment) < 0.5 * output_error(nearest, target, moment)
    identity = torch.eye(96)
    assert output_error(codes, target, identity) > output_error(nearest, target, identity)


def test_values_beyond_the_format_saturate_and_are_made_up_for() -> None:
    target, inputs = 300 * random(8, 32), correlated(200, 32)
    moment = inputs.t() @ inputs
    codes = encode_compensated(target, compensation(moment))
    values = decode(codes, E4M3)
    assert torch.isfinite(values).all() and (values.abs() == E4M3.max).any()
    assert output_error(codes, target, moment) < output_error(encode(target, E4M3), target, moment)


def test_rows_are_rounded_independently() -> None:
    target, inputs = 60 * random(12, 48), correlated(100, 48)
    prepared = compensation(inputs.t() @ inputs)
    together = encode_compensated(target, prepared)
    alone = torch.cat([encode_compensated(row[None], prepared) for row in target])
    # Sums of one row and of many may be taken in another order.
    assert (together != alone).float().mean() < 0.02


# -- what layers are given --------------------------------------------------------------------


class Block(nn.Module):
    """Two layers that share an input, and one behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.after = MeldedLinear(6, 4, 2), MeldedLinear(6, 4, 2), nn.Identity()
        self.last = MeldedLinear(4, 3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.one(x) + self.two(x) + x[..., :4])


def test_moments_are_sums_over_tokens_of_unit_length() -> None:
    block = Block()
    inputs = [random(2, 5, 6, seed=1), 1e3 * random(1, 3, 6, seed=2), torch.zeros(1, 2, 6)]
    with InputMoments(melded_layers(block)) as moments:
        for x in inputs:
            block(x)
    block(random(4, 6))  # after the end nothing is added
    rows = torch.cat([x.reshape(-1, 6) for x in inputs[:2]])
    rows = rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(moments.moment("one"), rows.t() @ rows, rtol=1e-5, atol=1e-5)
    assert moments.owner("two") == "one" and moments.owner("last") == "last"
    assert moments.moment("two") is moments.moment("one")
    assert float(moments.moment("last").trace()) == pytest.approx(13)  # zero rows add nothing
    assert not block.one._forward_pre_hooks


def test_a_layer_that_never_ran_has_no_moment() -> None:
    layers = melded_layers(Block())
    with InputMoments(layers) as moments:
        pass
    assert not moments.moment("last").any() and moments.moment("last").shape == (4, 4)


# -- flush ------------------------------------------------------------------------------------


def trained(policy: dict[str, Any], steps: int = 4) -> tuple[nn.Module, ProxyUpdate, Any]:
    model, weights = make_model()
    originals = {name: weight.clone() for name, weight in weights.items()}
    update = ProxyUpdate(melded_layers(model), update_recipe(policy), weights)
    for step in range(steps):
        add(list(update.layers.values()), step)
        update.step(step)
    return model, update, originals


def masters(update: ProxyUpdate, originals: dict[str, Tensor]) -> dict[str, Tensor]:
    totals = {}
    for name, layer in update.layers.items():
        applied = update.states[name].applied
        assert applied is not None
        total = applied + layer.pending()
        totals[name] = originals[name] + total @ layer.dequantized_adapter()
    return totals


def test_flush_brings_the_outputs_nearer_to_the_master_weights() -> None:
    inputs = correlated(300, 24)
    errors = {}
    for rounding in ("same", "compensated"):
        model, update, originals = trained({**COMPENSATED, "flush_rounding": rounding})
        goal = masters(update, originals)["0"]
        update.flush(4, lambda model=model: model(inputs))  # type: ignore[misc]
        layer = update.layers["0"]
        rows = inputs / inputs.norm(dim=1, keepdim=True)
        errors[rounding] = float((rows @ (layer.dequantized_weight() - goal).t()).square().sum())
        assert not update.is_pending()
        assert all(not x.B.any() for x in update.layers.values())
    assert errors["compensated"] < 0.6 * errors["same"]


def test_flush_equals_the_rounded_master_weights() -> None:
    model, update, originals = trained(COMPENSATED)
    goal, layer = masters(update, originals)["0"], update.layers["0"]
    inputs = correlated(300, 24)
    with InputMoments(update.layers) as moments:
        model(inputs)
    expected = encode_compensated(goal * layer.scale, compensation(moments.moment("0")))
    update.flush(4, lambda: model(inputs))
    # W0 + T A is summed in another order than the update does.
    differ = (expected != layer.codes[: layer.out_features]).float().mean()
    assert differ < 0.02


def test_later_layers_are_measured_behind_written_ones_if_memory_is_short() -> None:
    policy = {**COMPENSATED, "calibration_memory": 1}
    model, update, _ = trained(policy)
    seen = []
    first = update.layers["0"]

    def calibrate() -> None:
        seen.append(first.codes.clone())
        model(correlated(50, 24))

    update.flush(4, calibrate)
    assert len(seen) == 2 and not torch.equal(seen[0], seen[1])


def test_flush_happens_once_and_again_after_a_step_or_a_resume() -> None:
    model, update, _ = trained({**COMPENSATED, "rows": "all"})
    assert update.is_pending()  # nothing in B, but all codes are rounded to nearest
    state = saved({"update": update.state_dict(), "model": model.state_dict()})
    update.flush(4, lambda: model(correlated(50, 24)))
    assert not update.is_pending()
    codes = [layer.codes.clone() for layer in update.layers.values()]
    add(list(update.layers.values()), 5)
    update.step(5)
    assert update.is_pending()

    model, weights = make_model()
    again = ProxyUpdate(
        melded_layers(model), update_recipe({**COMPENSATED, "rows": "all"}), weights
    )
    assert not again.is_pending()  # not trained yet: as melded
    model.load_state_dict(state["model"])
    again.load_state_dict(state["update"])
    assert again.is_pending()
    again.flush(4, lambda: model(correlated(50, 24)))
    for layer, expected in zip(again.layers.values(), codes, strict=True):
        assert torch.equal(layer.codes, expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_flush_with_compensation(preset: str) -> None:
    changes = {"preset": preset, "flush_rounding": "compensated", "unselected": "keep"}
    model, update, _ = trained(changes)
    before = [layer.codes.clone() for layer in update.layers.values()]
    update.flush(4, lambda: model(correlated(50, 24)))
    for layer, old in zip(update.layers.values(), before, strict=True):
        out = layer.out_features
        assert not torch.equal(layer.codes[:out], old[:out])
        assert torch.equal(layer.codes[out:], old[out:])  # A
        assert ((layer.codes & 0x7F) != 0x7F).all()
        assert not layer.B.any()


def test_a_row_that_diverged_since_the_last_write_is_written_as_it_was_then() -> None:
    codes = []
    for value in (0.0, torch.inf):
        model, update, _ = trained(COMPENSATED)
        update.layers["0"].B.data[2] = value
        update.flush(4, lambda model=model: model(correlated(50, 24)))  # type: ignore[misc]
        assert not update.layers["0"].B.any()
        codes.append([layer.codes.clone() for layer in update.layers.values()])
    for one, other in zip(*codes, strict=True):
        assert torch.equal(one, other)


def test_a_state_saved_after_the_flush_is_not_flushed_again() -> None:
    model, update, _ = trained(COMPENSATED)
    update.flush(4, lambda: model(correlated(50, 24)))
    state = saved({"update": update.state_dict(), "model": model.state_dict()})
    model, weights = make_model()
    again = ProxyUpdate(melded_layers(model), update_recipe(COMPENSATED), weights)
    model.load_state_dict(state["model"])
    again.load_state_dict(state["update"])
    assert not again.is_pending()


def test_a_change_that_no_step_has_seen_is_pending() -> None:
    model, weights = make_model()
    update = ProxyUpdate(melded_layers(model), update_recipe(COMPENSATED), weights)
    update.layers["0"].B.data[3] = 0.1
    assert update.is_pending()


def test_without_rounding_there_is_nothing_to_compensate() -> None:
    model, weights = make_model(Fp8Recipe(emulate="none"))
    update = ProxyUpdate(melded_layers(model), update_recipe(COMPENSATED), weights)
    add(list(update.layers.values()), 0)
    update.step(0)
    update.flush(1)  # needs no inputs
    assert not update.is_pending()


def test_a_flush_without_inputs_says_what_to_do() -> None:
    _, update, _ = trained(COMPENSATED)
    with pytest.raises(InputError, match="flush_rounding to 'same'"):
        update.flush(4)

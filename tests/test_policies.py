"""Update policies: what is written and kept, selection, live change, resuming, statistics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from falqon.fp8 import E4M3, decode, encode
from falqon.meld import meld_linear, melded_layers
from falqon.proxy import ProxyUpdate
from falqon.recipe import RECIPES, Fp8Recipe, MeldRecipe, update_recipe
from tests.policies import (
    LIVE_FEEDBACK,
    RANK,
    SCALES,
    add,
    by_hand,
    make,
    make_model,
    random,
    written_rows,
)

# -- rows derived from their originals ----------------------------------------------------------


@SCALES
@pytest.mark.parametrize("preset", ["anchored", "master"])
@pytest.mark.parametrize("rows", ["rank", 3])
def test_derived_rows_are_the_original_and_all_of_their_change(
    fp8: Fp8Recipe, preset: str, rows: int | str
) -> None:
    model, weights = make_model(fp8)
    by_name = melded_layers(model)
    layers = list(by_name.values())
    for name, layer in by_name.items():
        weights[name][:, 0] = -0.0  # requantising would make it 0
        layer.codes.data[: layer.out_features, 0] = 0x80
    update = ProxyUpdate(by_name, update_recipe(preset, rows), dict(weights))
    originals = [layer.codes.detach().clone() for layer in layers]
    totals = [torch.zeros_like(layer.B) for layer in layers]
    plain = [torch.zeros_like(layer.B) for layer in layers]

    def check() -> None:
        for name, layer, original, total in zip(by_name, layers, originals, totals, strict=True):
            out = layer.out_features
            assert torch.equal(update.states[name].applied, total)
            start = decode(original[:out], E4M3)
            if preset == "master":
                start = weights[name] * layer.scale
            expected = encode(start + total @ decode(original[out:], E4M3), E4M3)
            touched = total.any(dim=1, keepdim=True)
            assert torch.equal(layer.codes[:out], torch.where(touched, expected, original[:out]))
            assert torch.equal(layer.codes[out:], original[out:])

    for step in range(6):
        for delta, sum_of_all in zip(add(layers, step), plain, strict=True):
            delta[::5] = 0.0  # rows that are never written
            sum_of_all += delta
        for layer, total in zip(layers, totals, strict=True):
            layer.B.data[::5] = 0.0
            picked = layer.B.abs().sum(dim=1).sort(descending=True, stable=True).indices[:RANK]
            picked = picked if rows == "rank" else picked[:3]
            total[picked] += layer.B.detach()[picked]
        update.step(step)
        check()
    for layer, total in zip(layers, totals, strict=True):
        total += layer.B.detach()
    update.flush(6)
    check()
    for layer, original, total, sum_of_all in zip(layers, originals, totals, plain, strict=True):
        assert not layer.B.any()
        # The same float32 numbers, at most six of size 1, in another grouping.
        torch.testing.assert_close(total, sum_of_all, rtol=0, atol=1e-6)
        out = layer.out_features
        assert torch.equal(layer.codes[:out:5], original[:out:5])
        assert (layer.codes[1:out:5] != original[1:out:5]).any(dim=1).all()


def test_derived_rows_without_rounding_are_the_sum_of_all_changes() -> None:
    layers, update = make("anchored", RECIPES["none"], rows=3)
    before = [layer.codes.detach().clone() for layer in layers]
    totals = [torch.zeros_like(layer.B) for layer in layers]
    for step in range(5):
        for total, delta in zip(totals, add(layers, step), strict=True):
            total += delta
        update.step(step)
    update.flush(5)
    for layer, old, total in zip(layers, before, totals, strict=True):
        out = layer.out_features
        expected = old[:out].double() + total.double() @ old[out:].double()
        # float32: five additions and a product of rank 4 on numbers of size 1
        torch.testing.assert_close(layer.codes[:out].double(), expected, rtol=0, atol=1e-5)


def test_originals_are_bytes_in_host_memory_or_the_given_weights_themselves() -> None:
    model, weights = make_model()
    layers = melded_layers(model)
    anchored = ProxyUpdate(layers, update_recipe("anchored"))
    master = ProxyUpdate(layers, update_recipe("master"), dict(weights))
    for name, layer in layers.items():
        codes, given = anchored.states[name].original, master.states[name].original
        assert codes is not None
        assert given is not None
        assert (codes.dtype, codes.device.type) == (torch.uint8, "cpu")
        assert torch.equal(codes, layer.codes[: layer.out_features])
        # Not a view of what training changes, and no copy of what it does not.
        assert codes.untyped_storage().data_ptr() != layer.codes.untyped_storage().data_ptr()
        assert codes.untyped_storage().nbytes() == layer.out_features * layer.in_features
        assert given.data_ptr() == weights[name].data_ptr()


def test_originals_are_not_kept_by_other_policies() -> None:
    for preset in ("paper", "released", "feedback"):
        _, update = make(preset)
        assert all(s.original is None and s.applied is None for s in update.states.values())


def test_damaged_change_does_not_enter_the_sum() -> None:
    layers, update = make("anchored", rows="all")
    add(layers, 0)
    layers[0].B.data[3, 1] = float("nan")
    before = layers[0].codes[3].detach().clone()
    update.step(0)
    applied = update.states["0"].applied
    assert applied is not None
    assert torch.isfinite(applied).all()
    assert not applied[3].any()
    assert torch.equal(layers[0].codes[3], before)
    assert not layers[0].B.any()
    add(layers, 1, 0.5)  # and the row is written as ever
    update.step(1)
    assert not torch.equal(layers[0].codes[3], before)


def test_change_that_overflows_does_not_damage_the_row_for_good() -> None:
    layers, update = make("anchored", rows="all")
    out = layers[0].out_features
    layers[0].codes.data[out:] = layers[0].codes.data[out : out + 1]  # so that B A adds up
    layers[0].B.data[3] = 3e38  # finite, but B A is not
    before = layers[0].codes[3].detach().clone()
    update.step(0)
    assert torch.equal(layers[0].codes[3], before)
    add(layers, 1, 0.5)
    update.step(1)
    assert not torch.equal(layers[0].codes[3], before)


# -- the remainder of a written row -------------------------------------------------------------


@SCALES
@pytest.mark.parametrize("alpha", [None, 8.0])
def test_remainder_is_the_least_squares_projection(fp8: Fp8Recipe, alpha: float | None) -> None:
    model, _ = make_model(fp8, lora_alpha=alpha)
    by_name = melded_layers(model)
    layers = list(by_name.values())
    update = ProxyUpdate(by_name, update_recipe("feedback", 5))
    for step in range(3):
        add(layers, step)
        old = [layer.codes.detach().clone() for layer in layers]
        proxies = [layer.B.detach().clone() for layer in layers]
        update.step(step)
        for name, layer, codes, proxy in zip(by_name, layers, old, proxies, strict=True):
            out, rows = layer.out_features, written_rows(update, name, step)
            assert len(rows) == 5
            adapter = decode(codes[out:], E4M3).double()
            target = decode(codes[rows], E4M3).double() + layer.lora_scaling * (
                proxy[rows].double() @ adapter
            )
            remainder = target - decode(layer.codes[rows], E4M3).double()
            expected = (
                torch.linalg.lstsq(adapter.t(), remainder.t()).solution.t() / layer.lora_scaling
            )
            assert expected.any(dim=1).all()
            # Float32 targets up to 448 are off by 2^-16 at most, remainders are of size 1 to 16;
            # the condition of A A^T, below 100 here, and of its float32 inverse come on top.
            error = (layer.B[rows].double() - expected).norm()
            assert error <= 1e-5 * expected.norm()
            others = torch.ones(out, dtype=torch.bool)
            others[rows] = False
            assert torch.equal(layer.B[others], proxy[others])


def test_remainder_across_the_rows_of_the_adapter_leaves_nothing() -> None:
    # 0.75 A: 8.75 -> 9 three times, 16.75 -> 16. What is left, (-1, -1, -1, 3) / 4, is orthogonal
    # to A. In the second row it is (-1, -1, -1, -1) / 4, along A.
    layer = by_hand([[8.0, 8.0, 8.0, 16.0], [8.0, 8.0, 8.0, 8.0]], [[1.0, 1.0, 1.0, 1.0]])
    update = ProxyUpdate({"layer": layer}, update_recipe("feedback", "all"))
    layer.B.data.fill_(0.75)
    update.step(0)
    landed = decode(layer.codes, E4M3).tolist()
    assert landed[:2] == [[9.0, 9.0, 9.0, 16.0], [9.0, 9.0, 9.0, 9.0]]
    assert layer.B.tolist() == [[0.0], [-0.25]]  # all numbers are exact in float32


def test_clearing_the_others_leaves_the_remainder_of_written_rows() -> None:
    layers, update = make({"preset": "released", "written": "project"}, rows=5)
    kept_layers, kept = make("feedback", rows=5)
    for some in (layers, kept_layers):
        add(some, 0)
    update.step(0)
    kept.step(0)
    for name, layer, other in zip(update.layers, layers, kept_layers, strict=True):
        rows = written_rows(update, name, 0)
        assert layer.B.any(dim=1).sum() == len(rows) == 5
        assert torch.equal(layer.B[rows], other.B[rows])


@pytest.mark.parametrize("policy", ["feedback", LIVE_FEEDBACK])
def test_flush_leaves_no_remainder(policy: str | dict[str, Any]) -> None:
    layers, update = make(policy, rows="all")
    add(layers, 0)
    update.step(0)
    assert all(layer.B.any(dim=1).all() for layer in layers)
    assert update.is_pending()
    update.flush(1)
    assert not any(layer.B.any() for layer in layers)
    assert not update.is_pending()


@SCALES
def test_nothing_is_lost_along_the_adapter(fp8: Fp8Recipe) -> None:
    layers, update = make("feedback", fp8, rows="all")
    start = [layer.dequantized_weight().double() for layer in layers]
    totals = [torch.zeros_like(layer.B) for layer in layers]
    for step in range(20):
        for total, delta in zip(totals, add(layers, step), strict=True):
            total += delta
        update.step(step)
    for layer, old, total in zip(layers, start, totals, strict=True):
        inverse = torch.linalg.pinv(layer.dequantized_adapter().double())
        assert (layer.dequantized_weight() - old).norm() > 0.1 * old.norm()
        landed = (layer.dequantized_weight().double() - old) @ inverse
        # What landed and what waits are what was learned, as the rows of A can tell it apart; 20
        # steps of float32 numbers.
        assert (landed + layer.B.double() - total).norm() <= 1e-5 * total.norm()
        assert (landed - total).norm() > 1e-3 * total.norm()


# -- live ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, 8.0])
def test_live_change_acts_as_a_plain_adapter(alpha: float | None) -> None:
    model, _ = make_model(RECIPES["none"], lora_alpha=alpha)
    layer = model[0]
    ProxyUpdate({"0": layer}, update_recipe(LIVE_FEEDBACK))
    assert layer.live
    layer.B.data = 0.3 * random(40, RANK, seed=5)
    x, grad = random(3, 7, 24, seed=2), random(3, 7, 40, seed=3)
    ours = x.clone().requires_grad_()
    layer(ours).backward(grad)

    theirs, proxy = x.clone().requires_grad_(), layer.B.detach().clone().requires_grad_()
    weight, adapter = layer.dequantized_weight(), layer.dequantized_adapter()
    expected = theirs @ (weight + layer.lora_scaling * proxy @ adapter).t()
    expected.backward(grad)
    # Sums of 24 to 40 float32 terms of size 1 in another order.
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.B.grad, proxy.grad, rtol=1e-5, atol=1e-5)
    layer.live = False
    assert (layer(x) - expected).norm() > 0.05 * expected.norm()  # it is no small thing


@SCALES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_change_with_fp8(fp8: Fp8Recipe, dtype: torch.dtype) -> None:
    linear = nn.Linear(256, 192, bias=False)
    linear.weight.data = random(192, 256) / 16
    layer, _ = meld_linear(linear, fp8, MeldRecipe(rank=16))
    layer.B.data = random(192, 16, seed=5)
    x = random(64, 256, seed=2).to(dtype).requires_grad_()
    grad = random(64, 192, seed=3).to(dtype)
    landed = layer(x).float()
    layer.live = True
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    change = layer.B.detach() @ layer.dequantized_adapter()
    assert change.norm() > 0.5 * linear.weight.norm()  # left out, it would leave some 6 dB
    effective = linear.weight.detach() + change
    adapter = layer.dequantized_adapter()
    plain = x.detach().float()
    for result, expected in (
        (y.float(), plain @ effective.t()),
        (y.float() - landed, plain @ change.t()),
        (x.grad.float(), grad.float() @ effective),
        (layer.B.grad, grad.float().t() @ (plain @ adapter.t())),
    ):
        assert result is not None
        noise = (result - expected).square().sum() / expected.square().sum()
        assert -10 * torch.log10(noise) > 20  # 25.5 is what the coarser format, E5M2, reaches


@SCALES
@pytest.mark.parametrize("written", ["codes", "weights"])
def test_live_and_derived_is_never_off_by_more_than_half_a_step(
    fp8: Fp8Recipe, written: str
) -> None:
    model, weights = make_model(fp8)
    by_name = melded_layers(model)
    recipe = update_recipe({"preset": "live", "written": written, "rows": 3})
    update = ProxyUpdate(by_name, recipe, dict(weights))
    starts = {name: layer.codes.detach().clone() for name, layer in by_name.items()}
    optimizer = torch.optim.SGD([layer.B for layer in by_name.values()], lr=0.5)
    learned = {name: torch.zeros_like(layer.B) for name, layer in by_name.items()}
    losses, largest = [], 0.0
    for step in range(10):
        before = {name: layer.B.detach().clone() for name, layer in by_name.items()}
        loss = (model(random(32, 24, seed=7)) - random(32, 16, seed=8)).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for name, layer in by_name.items():
            learned[name] += layer.B.detach() - before[name]
        update.step(step)
        losses.append(loss.item())
        for name, layer in by_name.items():
            out, state = layer.out_features, update.states[name]
            assert state.applied is not None
            adapter = decode(starts[name][out:], E4M3).double()
            never = state.last_written < 0
            start = decode(starts[name][:out], E4M3).double()
            if written == "weights":
                exact = (weights[name] * layer.scale).double()
                start = torch.where(never[:, None], start, exact)
            values = decode(layer.codes[:out], E4M3).double()
            target = start + state.applied.double() @ adapter
            assert target.abs().max() <= 464  # it saturates, but by half a step at most
            exponent = torch.frexp(target.abs()).exponent - 1  # zero gives -1: too large a step
            exponent = torch.where(target == 0, -6, exponent).clamp(min=-6)
            half_step = 2.0 ** (exponent - 4).double()
            # The target is a float32 number there: up to 2^-24 of 448, a few times.
            off = (values - target).abs()
            assert (off <= half_step + 1e-4).all()
            assert (off[never] == 0).all()
            assert torch.equal(layer.codes[:out][never], starts[name][:out][never])
            largest = max(largest, float((off / half_step).max()))
            # Landed and pending are all that was learned, but for the rounding of what is written.
            whole = values + layer.B.detach().double() @ adapter
            wanted = start + learned[name].double() @ adapter
            assert ((whole - wanted).abs() <= half_step + 1e-3).all()
    assert largest > 0.9  # rounding took part
    assert losses[-1] < 0.9 * losses[0]

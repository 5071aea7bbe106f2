"""Update policies: what is written and kept, selection, live change, resuming, statistics."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.fp8 import E4M3, decode, encode
from falqon.linear import MeldedLinear
from falqon.meld import meld, meld_linear, melded_layers
from falqon.proxy import ProxyUpdate
from falqon.recipe import PRESETS, RECIPES, Fp8Recipe, MeldRecipe, UpdateRecipe, update_recipe
from falqon.rows import binades

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
    meld(model, fp8, MeldRecipe(rank=RANK, **melding), keep=weights.setdefault)
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


def saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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
        for step in range(6):
            add(list(update.layers.values()), step)
            update.step(step)
        replicas.append(update)
    first, second = replicas
    for name, layer in first.layers.items():
        assert torch.equal(layer.codes, second.layers[name].codes)
        assert torch.equal(layer.B, second.layers[name].B)
        assert not torch.equal(layer.codes, melded_layers(model)[name].codes)
    assert first.statistics() == second.statistics()


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
        ({"threshold": 0.1, "max_age": 5}, ["threshold", "max_age", "one of them"]),
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
    assert update_recipe({"every": 2}) == update_recipe("live", every=2)
    # What is given on top wins, and only what is given.
    again = update_recipe({"preset": "feedback", "rows": 7, "seed": 1}, 9, rounding="stochastic")
    assert (again.rows, again.seed, again.rounding) == (9, 1, "stochastic")
    assert update_recipe(again, every=4).every == 4


@pytest.mark.parametrize("preset", PRESETS)
def test_layers_are_live_as_the_policy_says(preset: str) -> None:
    layers, _ = make(preset)
    assert {layer.live for layer in layers} == {preset == "live"}


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

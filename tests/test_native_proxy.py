"""The proxy update of all layers in one compiled call against the update layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from falqon.fp8 import E4M3, encode
from falqon.kernels.native import build, proxy
from falqon.linear import MeldedLinear
from falqon.meld import melded_layers
from falqon.proxy import ProxyUpdate
from falqon.recipe import Fp8Recipe, update_recipe
from tests.policies import SCALES, add, make, make_model

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")

POLICIES: dict[str, dict[str, Any]] = {
    "paper": {"rows": 3},
    "anchored": {},
    "master": {"rows": "all"},
    "live": {"rows": 0.3},
    "compensated": {"every": 3},
}


def harden(layers: list[MeldedLinear], step: int) -> None:
    """Rows of B that are not finite, too large, zero or as large as others."""
    b = layers[step % len(layers)].B.data
    b[1], b[4] = b[0].abs(), -b[0]
    b[2] = 0.0
    if step % 2:
        b[3, 1], b[5, 0], b[6], b[7] = torch.nan, torch.inf, 1e31, 3e38


def everything(layers: list[MeldedLinear], update: ProxyUpdate) -> list[Tensor]:
    tensors: list[Tensor] = []
    for layer, state in zip(layers, update.states.values(), strict=True):
        tensors += [layer.codes.detach(), layer.B.detach(), state.last_written, state.touched]
        if state.applied is not None:
            tensors.append(state.applied)
    return tensors


@pytest.mark.parametrize("policy", POLICIES)
@SCALES
def test_one_call_is_the_update_layer_by_layer(
    policy: str, fp8: Fp8Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    inner = proxy.update
    monkeypatch.setattr(proxy, "update", lambda layers: calls.append(len(layers)) or inner(layers))
    runs = []
    for switch in ("auto", "off"):
        monkeypatch.setenv("FALQON_NATIVE", switch)
        layers, update = make(policy, fp8, **POLICIES[policy])
        seen: list[Any] = []
        for step in range(7):
            add(layers, step)
            harden(layers, step)
            update.step(step)
            tensors = [t.clone() for t in everything(layers, update)]
            seen.append((tensors, update.statistics(), update.lengths_by_layer()))
        runs.append(seen)
    every = POLICIES[policy].get("every", 1)
    assert calls == [2] * (7 // every)
    for (ours, done, lengths), (plain, expected, plain_lengths) in zip(*runs, strict=True):
        for a, b in zip(ours, plain, strict=True):  # B may hold NaN between writes
            assert torch.equal(a.nan_to_num(nan=7e37), b.nan_to_num(nan=7e37))
        assert vars(done) == pytest.approx(vars(expected), rel=1e-5, nan_ok=True)
        for name, pair in lengths.items():
            assert pair == pytest.approx(plain_lengths[name], rel=1e-5, nan_ok=True)


@pytest.fixture
def threads() -> Iterator[None]:
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_and_threads(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows from 16-bit weights, a flush of all rows; any number of threads gives the same bits."""
    calls = []
    inner = proxy.update
    monkeypatch.setattr(proxy, "update", lambda layers: calls.append(len(layers)) or inner(layers))
    results = []
    for switch, count in (("off", 1), ("auto", 1), ("auto", 2), ("auto", 5)):
        monkeypatch.setenv("FALQON_NATIVE", switch)
        torch.set_num_threads(count)
        model, weights = make_model()
        halves = {name: w.to(dtype) for name, w in weights.items()}
        named = melded_layers(model)
        layers = list(named.values())
        for name, layer in named.items():
            scaled = halves[name].float() * layer.scale.detach()
            layer.codes.data[: layer.out_features] = encode(scaled, E4M3)
        update = ProxyUpdate(named, update_recipe("master", rows=7), halves)
        for step in range(3):
            add(layers, step)
            update.step(step)
        written = [t.clone() for t in everything(layers, update)]
        update.flush(3)
        results.append([*written, *everything(layers, update)])
    assert calls == ([2] * 9 if dtype == torch.bfloat16 else [])  # float16 goes by layer
    for others in results[1:]:
        assert all(map(torch.equal, others, results[0]))


@pytest.mark.parametrize(
    "changes",
    [
        {"select": "norm"},
        {"select": "flips"},
        {"threshold": 0.01},
        {"max_age": 4},
        {"rounding": "stochastic"},
        {"unselected": "clear"},
        {"written": "project"},
    ],
    ids=str,
)
def test_what_the_call_does_not_do_goes_by_layer(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy, "update", lambda layers: pytest.fail("was called"))
    layers, update = make("paper", **changes)
    add(layers, 0)
    update.step(0)
    assert update.statistics() is not None


def test_what_is_not_plain_goes_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """B that is no rows of float32, or a row update that somebody watches or has replaced."""
    monkeypatch.setattr(proxy, "update", lambda layers: pytest.fail("was called"))
    monkeypatch.setattr(proxy, "pending_sums", lambda layers: pytest.fail("was called"))
    layers, update = make("paper", rows=3)
    for layer in layers:
        layer.B = torch.nn.Parameter(layer.B.detach().t().contiguous().t())
    add(layers, 0)
    update.step(0)
    done = update.statistics()
    assert done is not None and done.rows_written == 6
    assert not proxy.takes_layer(
        layers[0].B.contiguous().bfloat16(), layers[0].codes, torch.ones(1)
    )
    seen = []
    layers, update = make("paper", rows=3)
    update.row_update.register_forward_hook(lambda *given: seen.append(given))
    add(layers, 0)
    update.step(0)
    assert len(seen) == len(layers)


def test_autograd_sees_what_was_written() -> None:
    layers, update = make("paper", rows=3)
    before = [(layer.B._version, layer.codes._version) for layer in layers]
    add(layers, 0)
    update.step(0)
    for layer, (b, codes) in zip(layers, before, strict=True):
        assert layer.B._version > b and layer.codes._version > codes


@pytest.mark.parametrize("rank", [1, 64, 130])
def test_pending_sums(rank: int) -> None:
    torch.manual_seed(0)
    b = torch.randn(37, rank)
    b[3] = 0.0
    root = torch.randn(rank, 2 * rank)
    written = torch.randint(-1, 5, (37,), dtype=torch.int32)
    layer = proxy.Pending(b, root @ root.t(), 0.5, 7, written)
    nothing = layer._replace(b=torch.zeros(2, rank), last_written=written[:2].clone())
    squares, age, waiting = proxy.pending_sums([layer, nothing]).unbind(dim=1)
    exact = (b.double() * 0.5 @ root.double()).square().sum()
    torch.testing.assert_close(squares, torch.stack([exact, exact * 0]), rtol=1e-5, atol=0)
    held = torch.arange(37) != 3
    assert age.tolist() == [float((7 - written)[held].sum()), 0.0]
    assert waiting.tolist() == [36.0, 0.0]

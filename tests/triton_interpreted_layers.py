"""Whole melded layers and groups by Triton kernels, interpreted, against plain torch.

What a GPU would run, from the modules down to the row update, on CPU tensors. float32 inputs, as
the interpreter cannot multiply bfloat16. Run by test_triton.py in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from falqon.fp8 import E4M3
from falqon.groups import tie
from falqon.kernels import RmsNormQuantize, SwigluQuantize, devices, transposed
from falqon.linear import MeldedLinear, apply_melded
from falqon.meld import meld_linear
from falqon.proxy import ProxyUpdate
from falqon.recipe import Fp8Recipe, MeldRecipe, fp8_recipe, update_recipe
from tests.policies import random

TOKENS, FEATURES, RANK = 20, 48, 16
RECIPES = {
    "default": Fp8Recipe(),
    "paper": fp8_recipe("paper"),
    "delayed": Fp8Recipe(activations="per_tensor", gradients="per_tensor", scaling="delayed"),
}


@pytest.fixture
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Switch between kernels and plain torch."""

    def switch(kernels: bool) -> None:
        monkeypatch.setattr(devices, "uses_kernels", lambda _: kernels)

    return switch


def layers(outs: tuple[int, ...], recipe: Fp8Recipe, live: bool = False) -> list[MeldedLinear]:
    made = []
    for number, out in enumerate(outs):
        linear = nn.Linear(FEATURES, out, bias=number == 1)
        linear.weight.data = random(out, FEATURES, seed=number)
        if linear.bias is not None:
            linear.bias.data = random(out, seed=9)
        layer, _ = meld_linear(linear, recipe, MeldRecipe(rank=RANK), name=str(number))
        layer.B.data = 0.01 * random(out, RANK, seed=20 + number)
        layer.live = live
        made.append(layer)
    return made


def step(
    modules: list[MeldedLinear], inputs: list[Tensor], source: nn.Module | None
) -> list[Tensor]:
    """Outputs, gradients of inputs, and gradients of B."""
    leaves = [x.clone().requires_grad_(x.dim() > 1) for x in inputs]
    outs = apply_melded(modules, *leaves, source=source)
    sum((out * random(*out.shape, seed=50 + n)).sum() for n, out in enumerate(outs)).backward()  # type: ignore[union-attr]
    gradients = [layer.B.grad for layer in modules]
    for layer in modules:
        layer.B.grad = None
    found = [*outs, *(x.grad for x in leaves if x.requires_grad), *gradients]
    return [tensor for tensor in found if tensor is not None]


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("outs", [(40,), (32, 17), (128, 16, 31)], ids=str)
def test_forward_and_backward(
    outs: tuple[int, ...], recipe: str, live: bool, on_kernels: Callable[[bool], None]
) -> None:
    modules = layers(outs, RECIPES[recipe], live)
    tie(modules)
    x = random(TOKENS, FEATURES, seed=7)
    results = []
    for kernels in (False, True):
        on_kernels(kernels)
        results.append(step(modules, [x], None))
    compare(*results)


def compare(expected: list[Tensor], ours: list[Tensor]) -> None:
    """float32 sums in another order, and the FP8 roundings that may tip over by that."""
    assert len(expected) == len(ours)
    for theirs, mine in zip(expected, ours, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        error = (mine - theirs).norm() / theirs.norm()
        assert error < 1e-3, error


@pytest.mark.parametrize("kind", ["norm", "swiglu"])
def test_fused_producers(kind: str, on_kernels: Callable[[bool], None]) -> None:
    modules = layers((32, 48), RECIPES["default"])
    tie(modules)
    source: nn.Module = RmsNormQuantize(1e-5, E4M3, "power_of_two")
    inputs = [random(TOKENS, FEATURES, seed=7), 1 + random(FEATURES, seed=8) / 4]
    if kind == "swiglu":
        source = SwigluQuantize(E4M3, "power_of_two")
        inputs[1] = random(TOKENS, FEATURES, seed=8)
    results = []
    for kernels in (False, True):
        on_kernels(kernels)
        results.append(step(modules, inputs, source))
    compare(*results)


POLICIES: dict[str, Any] = {
    "paper": {"preset": "paper", "rows": 8},
    "live": {"preset": "live", "rows": 8, "written": "codes"},
    "anchored": {"preset": "anchored", "rows": "all"},
    "feedback": {"preset": "feedback", "rows": 8},
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_training_writes_the_same_codes(
    policy: str, keep: bool, on_kernels: Callable[[bool], None]
) -> None:
    results = []
    for kernels in (False, True):
        on_kernels(kernels)
        modules = layers((40, 24), RECIPES["default"])
        tie(modules)
        named = {str(n): layer for n, layer in enumerate(modules)}
        update = ProxyUpdate(named, update_recipe(POLICIES[policy]))
        for layer in modules:
            layer.backbone_matmul.keep_transposed = keep
        for number in range(3):
            step(modules, [random(TOKENS, FEATURES, seed=number)], None)
            for index, layer in enumerate(modules):  # the same for both, whatever the gradients
                layer.B.data += 0.02 * random(*layer.B.shape, seed=60 + number + index)
            update.step(number)
            if kernels and keep and policy != "anchored":
                for layer in modules:
                    view = transposed.view_of(layer.codes)
                    assert view is not None
                    assert torch.equal(view, layer.codes[: layer.out_features].t())
        results.append([layer.codes.clone() for layer in modules])
    for theirs, mine in zip(*results, strict=True):
        differing = int((theirs != mine).sum())
        assert differing <= theirs.numel() // 1000, differing


def test_layers_that_ran_one_by_one_keep_copies_of_their_own(
    on_kernels: Callable[[bool], None],
) -> None:
    on_kernels(True)
    modules = layers((64, 32), RECIPES["default"])
    tie(modules)
    for layer in modules:
        layer.backbone_matmul.keep_transposed = True
        step([layer], [random(TOKENS, FEATURES, seed=1)], None)
        layer.B.data += 0.02 * random(*layer.B.shape, seed=2)
    named = {str(n): layer for n, layer in enumerate(modules)}
    update = ProxyUpdate(named, update_recipe(POLICIES["paper"]))
    before = [layer.codes.clone() for layer in modules]
    update.step(0)
    for layer, codes in zip(modules, before, strict=True):
        assert not torch.equal(layer.codes, codes)
        assert transposed.view_of(layer.codes) is None  # stale, and made anew when it is wanted


def test_outputs_may_be_changed_in_place(on_kernels: Callable[[bool], None]) -> None:
    on_kernels(True)
    modules = layers((40, 24), RECIPES["default"])
    tie(modules)
    x = random(TOKENS, FEATURES, seed=1).requires_grad_()
    first, second = apply_melded(modules, x)
    storages = {out.untyped_storage().data_ptr() for out in (first, second)}
    assert len(storages) == 2
    (first.relu_().sum() + second.add_(1.0).sum()).backward()
    assert x.grad is not None and modules[0].B.grad is not None

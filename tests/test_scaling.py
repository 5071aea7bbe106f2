"""Delayed scaling: first step dynamic, then the largest amax of the history; overflow; state."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from falqon.errors import InputError
from falqon.fp8 import E4M3, E5M2, decode
from falqon.kernels import Quantize
from falqon.meld import meld
from falqon.recipe import RECIPES, Fp8Recipe, MeldRecipe
from falqon.scaling import DelayedScaling

DELAYED = Fp8Recipe(activations="per_tensor", gradients="per_tensor", scaling="delayed")
PAPER = replace(RECIPES["paper"], scaling="delayed")


class Quantizers(nn.Module):
    def __init__(self, recipe: Fp8Recipe = DELAYED) -> None:
        super().__init__()
        rounding = recipe.scale_rounding
        self.x = Quantize(E4M3, "per_tensor", rounding, delayed=True)
        self.g = Quantize(E5M2, "per_tensor", rounding, delayed=True)
        self.plain = Quantize(E4M3)


def constant(value: float) -> Tensor:
    return torch.tensor([[value, -value / 2, 0.0]])


def feed(model: Quantizers, scaling: DelayedScaling, value: float) -> float:
    """One step with inputs of that amax; the scale that was used."""
    scale = model.x(constant(value))[1]
    scaling.advance()
    return scale.item()


def test_first_step_is_dynamic_then_history_rules() -> None:
    model = Quantizers()
    scaling = DelayedScaling(model, length=3)
    assert list(scaling.quantizers) == ["x", "g"]
    # amax 7: 448 / 7 = 64. Each later scale is 448 over the largest of the last three.
    assert [feed(model, scaling, v) for v in (7.0, 3.5, 28.0, 1.0, 1.0, 1.0, 1.0)] == [
        64.0,  # dynamic
        64.0,  # 7
        64.0,  # 7 3.5
        16.0,  # 7 3.5 28
        16.0,  # 3.5 28 1
        16.0,  # 28 1 1
        256.0,  # 1 1 1: 28 has left; 448 rounded down to a power of two
    ]
    assert scaling.history is not None
    assert scaling.history.tolist() == [[1.0] * 3, [0.0] * 3]
    assert model.g.scale is None  # never saw anything: still dynamic


def test_plain_scales_are_not_rounded() -> None:
    model = Quantizers(PAPER)
    scaling = DelayedScaling(model, length=2)
    feed(model, scaling, 3.0)
    assert feed(model, scaling, 1.0) == torch.tensor(448 / 3.0, dtype=torch.float32).item()


def test_accumulated_micro_batches_are_one_step_of_history() -> None:
    model = Quantizers()
    scaling = DelayedScaling(model, length=2)
    for value in (2.0, 14.0, 3.0):
        model.x(constant(value))
    scaling.advance()
    assert scaling.history is not None
    assert scaling.history.tolist() == [[14.0], [0.0]]


def test_overflow_saturates_and_is_counted() -> None:
    model = Quantizers()
    scaling = DelayedScaling(model, length=4)
    feed(model, scaling, 1.0)  # scale 256, so 1.75 is the largest number that fits
    x = torch.tensor([[1.75, 1.76, -5.0, float("inf"), 0.5]])
    codes, scale = model.x(x)
    assert scale.item() == 256.0
    assert (decode(codes, E4M3) / scale).tolist() == [[1.75, 1.75, -1.75, 1.75, 0.5]]
    model.x(torch.tensor([[100.0]]))
    scaling.advance()
    assert scaling.statistics()["overflowed"] == 4.0
    feed(model, scaling, 1.0)
    assert scaling.statistics()["overflowed"] == 4.0  # a total, and nothing new


@pytest.mark.parametrize("recipe", [DELAYED, PAPER], ids=["default", "paper"])
def test_a_number_as_large_as_the_history_is_no_overflow(recipe: Fp8Recipe) -> None:
    for seed in range(50):  # without rounding, amax * scale is 448 but for a float32 rounding
        model = Quantizers(recipe)
        scaling = DelayedScaling(model, length=4)
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed))
        for _ in range(3):
            model.x(x)
            scaling.advance()
        assert scaling.statistics()["overflowed"] == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_step_leaves_the_history_usable(bad: float) -> None:
    model = Quantizers()
    scaling = DelayedScaling(model, length=4)
    for value in (7.0, bad):
        feed(model, scaling, value)
    assert model.x.scale is not None
    assert model.x.scale.item() == 64.0
    assert torch.isfinite(decode(model.x(constant(3.0))[0], E4M3)).all()


def test_zero_input_stays_dynamic() -> None:
    model = Quantizers()
    scaling = DelayedScaling(model, length=4)
    feed(model, scaling, 0.0)
    assert model.x.scale is None
    assert feed(model, scaling, 7.0) == 64.0


def test_eval_mode_uses_the_scale_but_does_not_observe() -> None:
    model = Quantizers()
    scaling = DelayedScaling(model, length=2)
    feed(model, scaling, 7.0)
    model.eval()
    codes, scale = model.x(constant(1000.0))
    assert scale.item() == 64.0
    assert decode(codes, E4M3).max() == 448.0
    assert model.x.observed_amax is None
    scaling.advance()
    assert scaling.statistics()["overflowed"] == 0.0
    fresh = Quantizers().eval()
    assert fresh.x(constant(14.0))[1].item() == 32.0  # no history: dynamic


def test_nothing_seen_yet_changes_nothing() -> None:
    model = Quantizers()
    scaling = DelayedScaling(model, length=2)
    scaling.advance()
    assert scaling.history is None
    assert scaling.statistics() == {"overflowed": 0.0}
    feed(model, scaling, 7.0)
    assert scaling.statistics() == {"scale_e4m3": 64.0, "overflowed": 0.0}
    model.g(constant(7.0))
    scaling.advance()
    assert scaling.statistics()["scale_e5m2"] == 8192.0


def test_model_without_delayed_quantisers() -> None:
    scaling = DelayedScaling(nn.Sequential(Quantize(E4M3)), length=2)
    scaling.advance()
    assert scaling.statistics() == {}


def test_state_round_trip_continues_exactly() -> None:
    model, other = Quantizers(PAPER), Quantizers(PAPER)
    scaling, resumed = DelayedScaling(model, length=3), DelayedScaling(other, length=3)
    for value in (3.0, 11.0, 5.0, 0.7):
        feed(model, scaling, value)
    file = io.BytesIO()
    torch.save(scaling.state_dict(), file)
    file.seek(0)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for value in (2.0, 0.3, 9.0, 0.1, 0.1):
        assert feed(other, resumed, value) == feed(model, scaling, value)
    assert resumed.history is not None
    assert scaling.history is not None
    assert torch.equal(resumed.history, scaling.history)
    assert resumed.statistics() == scaling.statistics()


def test_state_of_other_layers_is_refused() -> None:
    scaling = DelayedScaling(nn.Sequential(Quantizers()), length=3)
    with pytest.raises(InputError, match="belong to other layers"):
        scaling.load_state_dict(DelayedScaling(Quantizers(), length=3).state_dict())


def test_in_a_melded_model() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
    meld(model, DELAYED, MeldRecipe(rank=2))
    scaling = DelayedScaling(model, length=4)
    assert list(scaling.quantizers) == [
        f"{n}.quantize_{what}" for n in (0, 2) for what in ("input", "gradient")
    ]
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dynamic = model(x)
    dynamic.sum().backward()
    scaling.advance()
    assert scaling.history is not None
    assert (scaling.history > 0).all()
    assert torch.equal(model(x), dynamic)  # the same input: the delayed scale is the dynamic one
    assert scaling.history[0].item() == x.abs().max()

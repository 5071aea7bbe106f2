"""Melding: codes and adapter of one weight, and the walk over a model."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from falqon.errors import InputError
from falqon.fp8 import E4M3, decode, dequantize, quantize
from falqon.linear import MeldedLinear
from falqon.meld import meld, meld_linear, meld_weight, melded_layers
from falqon.recipe import RECIPES, Adapter, Fp8Recipe, MeldRecipe, ScaleRounding
from tests.threads import threads

FP8 = Fp8Recipe()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_of(weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    return weight.double() - decode(codes[: len(weight)], E4M3).double() / scale.double()


# -- one weight ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("shape", [(48, 64), (64, 48), (17, 33), (5, 129), (1, 40), (40, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_the_weight_and_the_adapter_of_its_error(
    rounding: ScaleRounding, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, rank = random(*shape).to(dtype), 4
    fp8 = Fp8Recipe(weight_scale_rounding=rounding)
    codes, scale, captured = meld_weight(weight, fp8, MeldRecipe(rank=rank, adapter="svd_error"))
    assert (codes.shape, codes.dtype) == ((shape[0] + rank, shape[1]), torch.uint8)
    expected, its_scale = quantize(weight, E4M3, rounding=rounding)
    assert torch.equal(scale, its_scale)
    assert torch.equal(codes[: shape[0]], expected)  # W comes first: its own codes, bit for bit

    _, values, right = torch.linalg.svd(error_of(weight, codes, scale), full_matrices=False)
    known = min(rank, shape[0])
    adapter = values[:known].sqrt()[:, None] * right[:known]
    result = dequantize(codes[shape[0] :], scale, E4M3).double()
    # A is in E4M3 with the scale of W: half a step of its binade, or of a subnormal, off; singular
    # vectors have either sign.
    sign = (result[:known] * adapter).sum(1, keepdim=True).sign()
    half_step = torch.maximum(adapter.abs() * 2**-4, 2**-10 / scale.double())
    # Float32 singular vectors of white noise are not more exact than this.
    assert ((sign * result[:known] - adapter).abs() <= half_step + 1e-4 * adapter.abs().max()).all()
    assert (result[known:] == 0).all()  # ranks that the error does not have
    share = values[:known].square().sum() / values.square().sum()
    assert captured == pytest.approx(float(share), rel=1e-2)  # see the energy test below


@pytest.mark.parametrize("size", [1e-4, 1e-6, 1e-8])
def test_adapter_larger_than_the_weight_shares_a_scale_that_fits(size: float) -> None:
    weight = size * random(96, 64)
    codes, scale, _ = meld_weight(weight, FP8, MeldRecipe(rank=8, adapter="svd_error"))
    _, own_scale = quantize(weight, E4M3)
    assert scale < own_scale
    _, values, right = torch.linalg.svd(error_of(weight, codes, scale), full_matrices=False)
    adapter = values[:8].sqrt()[:, None] * right[:8]
    assert adapter.abs().amax() * scale <= 448
    assert ((codes[96:] & 0x7F) < 0x7E).all()
    # The weight keeps its precision: .0266 is what E4M3 costs normal numbers.
    assert error_of(weight, codes, scale).norm() / weight.double().norm() < 0.028


@pytest.mark.parametrize("shape", [(8, 12), (1, 12), (12, 1)])
def test_zero_weight(shape: tuple[int, int]) -> None:
    codes, scale, captured = meld_weight(torch.zeros(shape), FP8, MeldRecipe(rank=1))
    assert not codes.any()
    assert scale.tolist() == [1.0]
    assert captured == 1.0


def test_weight_that_is_exact_in_fp8_has_a_zero_adapter() -> None:
    codes, _, captured = meld_weight(
        2 * random(6, 8).sign(), FP8, MeldRecipe(rank=2, adapter="svd_error")
    )
    assert not codes[6:].any()
    assert captured == 1.0


def test_without_rounding_the_weight_stays_and_the_adapter_is_the_same() -> None:
    weight = random(48, 64)
    exact, one, captured = meld_weight(weight, RECIPES["none"], MeldRecipe(rank=4))
    codes, scale, same = meld_weight(weight, FP8, MeldRecipe(rank=4))
    assert (exact.dtype, one.tolist(), captured) == (torch.float32, [1.0], same)
    assert torch.equal(exact[:48], weight)
    requantised, _ = quantize(exact[48:], E4M3, scale=scale)
    assert torch.equal(requantised, codes[48:])


def test_same_seed_same_bits_and_no_random_state_touched() -> None:
    weight = random(200, 240)

    linear = nn.Linear(240, 200)
    linear.weight.data = weight

    def codes(seed: int, name: str = "a") -> Tensor:
        recipe = MeldRecipe(rank=8, oversampling=2, seed=seed)  # so small that it is sketched
        return meld_linear(linear, FP8, recipe, name=name)[0].codes

    torch.manual_seed(5)
    first = codes(0)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = codes(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert torch.equal(first[:200], codes(1)[:200])
    assert not torch.equal(first, codes(1))  # the sketch depends on the seed
    assert not torch.equal(first, codes(0, "b"))  # and on the layer


@pytest.mark.parametrize("adapter", ["svd_weight", "svd_error", "kaiming"])
def test_the_number_of_threads_changes_no_bit(adapter: Adapter) -> None:
    weight, recipe = random(700, 600), MeldRecipe(rank=16, adapter=adapter)
    with threads(1):
        codes, scale, captured = meld_weight(weight, FP8, recipe)
    with threads(3):
        others, its_scale, share = meld_weight(weight, FP8, recipe)
    assert torch.equal(codes, others) and torch.equal(scale, its_scale)
    assert captured == share


# -- one layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_meld_linear_keeps_shape_bias_and_mode(bias: bool, dtype: torch.dtype) -> None:
    linear = nn.Linear(33, 17, bias=bias, dtype=dtype).eval()
    before = linear.weight.detach().clone()
    layer, captured = meld_linear(linear, recipe=MeldRecipe(rank=4))
    assert (layer.in_features, layer.out_features, layer.rank) == (33, 17, 4)
    assert not layer.training
    assert torch.equal(linear.weight, before)
    assert 0 < captured < 1
    if layer.bias is None:
        assert not bias
    else:
        assert torch.equal(layer.bias, linear.bias)
        assert (layer.bias.dtype, layer.bias.requires_grad) == (dtype, False)
    assert layer(random(2, 33).to(dtype)).dtype == dtype


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_damaged_weight_is_refused_by_name(bad: float) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    model[1][0].weight.data[3, 3] = bad
    with pytest.raises(InputError, match=r"1\.0\.weight holds NaN or infinity"):
        meld(model, recipe=MeldRecipe(rank=2))


def test_weight_without_data_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"0\.weight has no data"):
        meld(nn.Sequential(nn.Linear(8, 8, device="meta")), recipe=MeldRecipe(rank=2))


# -- a model ------------------------------------------------------------------------------------


class Scaled(nn.Linear):
    pass


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.inner = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.ModuleList([nn.Linear(12, 8)]))
        self.special = Scaled(8, 8)
        self.B = nn.Parameter(torch.ones(3))  # no proxy buffer, though called like one
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.lm_head = nn.Linear(8, 20, bias=False)


def test_walk_and_report() -> None:
    model = Head()
    model.lm_head.weight = model.embed.weight
    report = meld(model, FP8, MeldRecipe(rank=2))
    assert list(report.converted) == ["inner.0", "inner.2.0"]
    assert report.skipped == {
        "special": "a Scaled, not a plain nn.Linear",
        "shared": "its weight is tied to again.weight",
        "lm_head": "the output embedding",
    }
    assert list(melded_layers(model)) == ["inner.0", "inner.2.0"]
    info = report.converted["inner.0"]
    assert (info.out_features, info.in_features) == (12, 8)
    assert 0 < info.captured < 1
    assert report.bytes_before == 2 * 8 * 12 * 4
    assert report.bytes_after == (12 + 2) * 8 + (8 + 2) * 12 + 2 * 4
    text = str(report)
    assert "melded 2 linear layers" in text
    assert "left alone: special (a Scaled, not a plain nn.Linear)" in text
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["inner.0.B", "inner.2.0.B"]


def test_tied_head_is_skipped_even_if_asked_for() -> None:
    model = Head()
    model.lm_head.weight = model.embed.weight
    report = meld(model, FP8, MeldRecipe(rank=2, output_embedding=True))
    assert report.skipped["lm_head"] == "its weight is tied to embed.weight"
    assert model.lm_head.weight is model.embed.weight


def test_untied_head_melds_if_asked_for() -> None:
    assert "lm_head" in meld(Head(), FP8, MeldRecipe(rank=2, output_embedding=True)).converted
    # Excluding something else does not bring it in.
    assert "lm_head" not in meld(Head(), FP8, MeldRecipe(rank=2, exclude=("inner.0",))).converted


@pytest.mark.parametrize("melds", [False, True])
def test_output_embedding_of_another_name(melds: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.embed_out = nn.Linear(8, 8), nn.Linear(8, 20)

        def get_output_embeddings(self) -> nn.Module:
            return self.embed_out

    report = meld(Model(), FP8, MeldRecipe(rank=2, output_embedding=melds))
    assert ("embed_out" in report.converted) == melds
    assert report.skipped == ({} if melds else {"embed_out": "the output embedding"})


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (("inner.*",), (), ["inner.0", "inner.2.0"]),
        (("*",), ("inner.2.*", "*head"), ["inner.0"]),
        (("*.0",), ("inner.2.0",), ["inner.0"]),
        (("lm_head", "inner.0"), (), ["inner.0", "lm_head"]),
    ],
)
def test_patterns(include: tuple[str, ...], exclude: tuple[str, ...], expected: list[str]) -> None:
    recipe = MeldRecipe(rank=2, include=include, exclude=exclude, output_embedding=True)
    report = meld(Head(), FP8, recipe)
    assert list(report.converted) == expected


def test_nothing_to_meld() -> None:
    with pytest.raises(InputError, match=r"no layer of Embedding can be melded .*no nn\.Linear"):
        meld(nn.Embedding(3, 4))
    with pytest.raises(InputError, match=r"inner\.0: not included"):
        meld(Head(), recipe=MeldRecipe(rank=2, include=("nowhere*",)))


def test_a_bare_linear_is_refused() -> None:
    with pytest.raises(InputError, match=r"falqon\.meld_linear"):
        meld(nn.Linear(8, 8))


def test_second_call_changes_nothing() -> None:
    model = Head()
    meld(model, FP8, MeldRecipe(rank=2))
    layers = melded_layers(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    report = meld(model, FP8, MeldRecipe(rank=2))
    assert not report.converted
    assert str(report) == "melded: nothing"
    assert melded_layers(model) == layers  # the same objects
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_too_large_a_rank_is_refused_before_anything_changes() -> None:
    model = nn.Sequential(nn.Linear(32, 4), nn.Linear(4, 32))
    with pytest.raises(InputError, match="rank 8 is larger than the 4 input features of 1; use at"):
        meld(model, FP8, MeldRecipe(rank=8))
    assert not melded_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    report = meld(model, FP8, MeldRecipe(rank=8, exclude=("1",)))
    assert list(report.converted) == ["0"]  # 4 rows, rank 8: the last rows of A are zero
    assert not model[0].codes[8:].any()


def test_one_layer_of_original_weights_is_alive_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(5))).bfloat16()
    originals = {str(i): weakref.ref(layer.weight) for i, layer in enumerate(model)}
    alive: list[list[str]] = []
    seen: list[tuple[str, int, int]] = []

    def progress(name: str, number: int, count: int) -> None:
        seen.append((name, number, count))
        alive.append([n for n, weight in originals.items() if weight() is not None])
        weights = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("weight"))
        codes = sum(p.nbytes for n, p in model.named_parameters() if n.endswith("codes"))
        assert weights == (5 - number) * 64 * 64 * 2
        assert codes == number * (64 + 4) * 64

    meld(model, FP8, MeldRecipe(rank=4), progress=progress)
    assert seen == [(str(i), i + 1, 5) for i in range(5)]
    # No garbage collection: an original is gone the moment its layer is melded.
    assert alive == [[str(i) for i in range(number, 5)] for number in range(1, 6)]


# -- architectures ------------------------------------------------------------------------------

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
ARCHITECTURES: dict[str, tuple[Callable[[], PreTrainedModel], int, dict[str, str]]] = {
    "llama": (
        lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)),
        14,
        {"lm_head": "the output embedding"},
    ),
    "qwen2 with bias, tied": (
        lambda: Qwen2ForCausalLM(
            Qwen2Config(**SMALL, num_key_value_heads=1, tie_word_embeddings=True)
        ),
        14,
        {"lm_head": "the output embedding"},
    ),
    "gpt_neox with fused q, k, v and bias": (
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL)),
        8,
        {"lm_head": "the output embedding"},
    ),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_architectures_meld_run_and_train(architecture: str, dtype: torch.dtype) -> None:
    make, layers, skipped = ARCHITECTURES[architecture]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    tokens = torch.arange(24).view(2, 12) % 64
    with torch.no_grad():
        before = model(tokens).logits.float()
    report = meld(model, FP8, MeldRecipe(rank=4))
    assert len(report.converted) == layers == len(melded_layers(model))
    assert report.skipped == skipped
    output = model(tokens, labels=tokens)
    difference = (output.logits.float() - before).norm() / before.norm()
    # One FP8 layer is off by .0376 (28.5 dB); the residual stream carries the rest unharmed, so a
    # model of two blocks stays within a few times that. A wrong scale or a swapped layer does not.
    assert 0 < difference < 0.1
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == name.endswith(".B")
        if parameter.grad is not None:
            assert parameter.grad.any(), name


def test_model_may_be_melded_with_another_device_and_recipe() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    meld(model, RECIPES["none"], MeldRecipe(rank=2), device="cpu")
    assert isinstance(model[0], MeldedLinear)
    assert model[0].recipe.emulate == "none"


def stack(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(40 + i, 41 + i, bias=False) for i in range(layers)))


@pytest.mark.parametrize("number", [1, 3])
def test_layers_that_are_melded_at_once_come_in_order(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, kept, workers = [], [], set()
    recipe, model = MeldRecipe(rank=4), stack(20)

    def noted(*args: Any, **given: Any) -> tuple[MeldedLinear, float]:
        workers.add(get_ident())
        return meld_linear(*args, **given)

    monkeypatch.setattr(sys.modules["falqon.meld"], "meld_linear", noted)
    with threads(number):
        meld(
            model,
            recipe=recipe,
            progress=lambda name, number, all_of_them: seen.append((name, number, all_of_them)),
            keep=lambda name, weight: kept.append((name, tuple(weight.shape))),
        )
        assert torch.get_num_threads() == number
    assert (get_ident() in workers) == (number == 1)
    assert seen == [(str(i), i + 1, 20) for i in range(20)]
    assert kept == [(str(i), (41 + i, 40 + i)) for i in range(20)]
    for (name, layer), linear in zip(melded_layers(model).items(), stack(20), strict=True):
        assert isinstance(linear, nn.Linear)
        assert torch.equal(layer.codes, meld_linear(linear, None, recipe, name=name)[0].codes)


def test_threads_are_given_back_when_melding_is_stopped() -> None:
    def full_disk(name: str, weight: Tensor) -> None:
        if name == "3":
            raise OSError("no space left")

    model = stack(20)
    with torch.no_grad():
        model[5].weight[0, 0] = torch.nan
    with threads(3):
        with pytest.raises(OSError, match="no space left"):
            meld(stack(20), recipe=MeldRecipe(rank=4), keep=full_disk)
        assert torch.get_num_threads() == 3
        with pytest.raises(InputError, match=r"5\.weight holds NaN"):
            meld(model, recipe=MeldRecipe(rank=4))
        assert torch.get_num_threads() == 3
    assert list(melded_layers(model)) == ["0", "1", "2", "3", "4"]

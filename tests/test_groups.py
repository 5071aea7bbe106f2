"""Melded layers with one input: run as a group they give what they give one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from falqon.fp8 import E4M3, E5M2, Format, decode, dequantize, quantize
from falqon.groups import apply_group, norm_quantizer, reason_against, swiglu_quantizer, tie
from falqon.kernels import (
    Quantize,
    backbone_matmul,
    joined_gradients,
    melded_matmul,
    rms_norm_grad,
    rms_norm_quantize,
    swiglu_grad,
    swiglu_quantize,
)
from falqon.kernels.operands import are_consecutive, stacked
from falqon.linear import MeldedLinear, apply_melded
from falqon.meld import meld_linear
from falqon.moments import InputMoments
from falqon.recipe import RECIPES, Fp8Recipe, MeldRecipe, ScaleRounding

TOKENS, IN, OUTS, RANK = 48, 64, (48, 16, 32), 4
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DELAYED = Fp8Recipe(activations="per_tensor", gradients="per_tensor", scaling="delayed")
KINDS: dict[str, Fp8Recipe] = {**RECIPES, "delayed": DELAYED}

# Rounding to bfloat16 or float16 leaves an error 56 or 74 dB below the values. One by one the
# input's gradient is rounded once a layer and once a sum, five times here, in the group once; live
# terms round once more each: 10 dB in all.
ONE_ROUNDING_DB = {torch.bfloat16: 56, torch.float16: 74, torch.float32: 130}
ROUNDINGS_DB = 10
# With a scale that is not a power of two, E5M2 rounds other values: 25.5 dB on either side.
OTHER_SCALE_DB = 22


def signal_to_noise(result: Tensor, reference: Tensor) -> float:
    """In dB."""
    signal, wanted = result.detach().double(), reference.detach().double()
    return float(10 * torch.log10(wanted.square().sum() / (signal - wanted).square().sum()))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_layer(
    recipe: Fp8Recipe, seed: int, bias: bool = False, rank: int = RANK, **melding: Any
) -> MeldedLinear:
    """Layers of different seeds have weights of different sizes, hence different scales."""
    linear = nn.Linear(IN, OUTS[seed % 3], bias=bias)
    linear.weight.data = random(*linear.weight.shape, seed=seed) / IN**0.5 * 3.0**seed
    if bias:
        linear.bias.data = random(OUTS[seed % 3], seed=seed + 10)
    return meld_linear(linear, recipe, MeldRecipe(rank=rank, **melding))[0]


def make(recipe: Fp8Recipe | None = None, **changes: Any) -> list[MeldedLinear]:
    return [make_layer(recipe or Fp8Recipe(), seed, **changes) for seed in range(3)]


def run(
    call: Callable[[Tensor], list[Tensor]], layers: list[MeldedLinear], x: Tensor
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Outputs, gradient of x and of every B, for fixed gradients of the outputs."""
    x = x.detach().clone().requires_grad_()
    outs = call(x)
    grads = [random(*o.shape, seed=i + 20).to(o.dtype) * 4.0**i for i, o in enumerate(outs)]
    torch.autograd.backward(outs, grads)
    assert x.grad is not None
    proxies = [layer.B.grad for layer in layers]
    for layer in layers:
        layer.B.grad = None
    return outs, x.grad, proxies


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# -- a group is its layers ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("live", [False, True])
def test_group_is_its_layers(
    kind: str, dtype: torch.dtype, is_tied: bool, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # `products` takes some of the layers, but not their group; it rounds pending changes otherwise.
    monkeypatch.setattr("falqon.kernels.native.products.takes", lambda *_: False)
    layers = make(KINDS[kind], bias=True, lora_alpha=2.0)
    for seed, layer in enumerate(layers):
        layer.B.data.copy_(random(*layer.B.shape, seed=seed) / 100)
        layer.live = live
    x = random(2, TOKENS // 2, IN, seed=5).to(dtype)
    outs, dx, proxies = run(lambda x: [layer(x) for layer in layers], layers, x)
    if kind == "delayed":
        for layer in layers:
            layer.quantize_input.observed_amax = None
    if is_tied:
        assert tie(layers)
    group_outs, group_dx, group_proxies = run(lambda x: apply_group(layers, x), layers, x)
    for one, other in zip([*outs, *proxies], [*group_outs, *group_proxies], strict=True):
        assert torch.equal(one, other)
        assert one.dtype == other.dtype
    assert group_dx.dtype == dtype
    bound = OTHER_SCALE_DB if kind == "paper" else ONE_ROUNDING_DB[dtype] - ROUNDINGS_DB
    assert signal_to_noise(group_dx, dx) > bound
    assert live == (not torch.equal(outs[0], run_dead(layers, x)))


def run_dead(layers: list[MeldedLinear], x: Tensor) -> Tensor:
    """The first layer's output without what is pending."""
    live, layers[0].live = layers[0].live, False
    out = layers[0](x)
    layers[0].live = live
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_is_nearer_to_the_exact_gradient(dtype: torch.dtype) -> None:
    layers = make()
    x = random(TOKENS, IN, seed=5)
    _, exact, _ = run(lambda x: [layer(x) for layer in layers], layers, x)
    _, dx, _ = run(lambda x: [layer(x) for layer in layers], layers, x.to(dtype))
    _, group_dx, _ = run(lambda x: apply_group(layers, x), layers, x.to(dtype))
    assert signal_to_noise(group_dx, exact) > signal_to_noise(dx, exact)


@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
def test_grouped_matmuls_are_the_single_ones(tokens: int, rounding: ScaleRounding) -> None:
    exact = rounding == "power_of_two"
    x, x_scale = quantize(random(tokens, IN), E4M3, "per_token", rounding)
    weights = [random(out + RANK, IN, seed=i) * 5.0**i for i, out in enumerate(OUTS)]
    pairs = [quantize(w, E4M3, rounding=rounding) for w in weights]
    codes, scales = [c for c, _ in pairs], [s for _, s in pairs]
    nothing = [None] * 3
    outs, adapters = melded_matmul(x, x_scale, codes, scales, nothing, RANK, torch.bfloat16, exact)
    for i in range(3):
        [out], [adapter] = melded_matmul(
            x, x_scale, codes[i : i + 1], scales[i : i + 1], [None], RANK, torch.bfloat16, exact
        )
        assert torch.equal(out, outs[i])
        assert torch.equal(adapter, adapters[i])
        assert adapters[i].untyped_storage().nbytes() == tokens * RANK * 2

    grads = [random(tokens, out, seed=i) for i, out in enumerate(OUTS)]
    joined = joined_gradients(grads, scales, exact)
    for part, grad, scale in zip(joined.split(OUTS, dim=1), grads, scales, strict=True):
        torch.testing.assert_close(part / scales[0], grad / scale, rtol=2.0**-21, atol=0)
    g, g_scale = quantize(joined, E5M2, "per_token", rounding)
    dx = backbone_matmul(g, g_scale, codes, scales[0], RANK, torch.float32, exact)
    backbones = torch.cat([decode(c[:-RANK], E4M3) for c in codes])
    wanted = dequantize(g, g_scale, E5M2).double() @ (backbones / scales[0]).double()
    assert (dx - wanted).norm() <= 2.0**-20 * wanted.norm()  # float32 sums


def test_one_quantisation_and_one_matmul_each_way() -> None:
    layers, x = make(), random(TOKENS, IN).requires_grad_()
    tie(layers)
    seen: list[str] = []
    for layer in layers:
        layer.quantize_input.register_forward_hook(lambda *_: seen.append("input"))
        layer.quantize_gradient.register_forward_hook(lambda *_: seen.append("gradient"))
    with Calls() as forward:
        outs = apply_group(layers, x)
    with Calls() as backward:
        torch.autograd.backward(outs, [torch.ones_like(o) for o in outs])
    assert seen == ["input", "gradient"]
    assert sum("aten.mm" in name for name in forward.names) == 1
    assert not any("aten.cat" in name for name in forward.names)  # tied: no copy of the codes
    assert sum("aten.mm" in name for name in backward.names) == 1 + 3  # and one for each B


def test_what_it_needs_no_gradient_for_is_not_computed() -> None:
    layers = make()
    called: list[str] = []
    layers[0].backbone_matmul.register_forward_hook(lambda *_: called.append("dx"))
    layers[1].proxy_grad.register_forward_hook(lambda *_: called.append("B1"))
    layers[1].B.requires_grad_(False)
    outs = apply_group(layers, random(3, IN))
    sum(o.sum() for o in outs).backward()
    assert called == []
    assert layers[0].B.grad is not None


def test_unused_outputs_have_no_part_in_the_gradient() -> None:
    layers, x = make(), random(TOKENS, IN)
    alone = x.clone().requires_grad_()
    layers[1](alone).sum().backward()
    together = x.clone().requires_grad_()
    apply_group(layers, together)[1].sum().backward()
    assert torch.equal(alone.grad, together.grad)


def test_wrong_width() -> None:
    with pytest.raises(ValueError, match=rf"{IN - 1} features, the layer takes {IN}"):
        apply_group(make(), torch.zeros(3, IN - 1))


def test_what_can_be_a_group() -> None:
    assert reason_against(make()) is None
    mixed = [*make()[:2], make_layer(RECIPES["paper"], 2)]
    assert reason_against(mixed) == "its layers differ in recipe, rank or input"
    assert reason_against([*make()[:2], make_layer(Fp8Recipe(), 2, rank=8)]) is not None
    assert reason_against([*make(), nn.Linear(IN, 4)]) == "not all of its layers are melded"


def test_delayed_scaling_observes_once_with_the_first_layers_quantisers() -> None:
    layers, x = make(DELAYED), random(TOKENS, IN)
    single = make(DELAYED)
    run(lambda x: [layer(x) for layer in single], single, x)
    run(lambda x: apply_group(layers, x), layers, x)
    first, *others = layers
    assert torch.equal(first.quantize_input.observed_amax, single[0].quantize_input.observed_amax)
    # In units of the first weight scale: the largest of all gradients, each times s_0 / s_i.
    wanted = max(
        float(s.quantize_gradient.observed_amax * single[0].scale / s.scale) for s in single
    )
    assert float(first.quantize_gradient.observed_amax) == wanted
    for layer in others:
        for quantizer in (layer.quantize_input, layer.quantize_gradient):
            assert isinstance(quantizer, Quantize)
            assert quantizer.observed_amax is None


# -- hooks --------------------------------------------------------------------------------------


def test_layers_with_hooks_are_called() -> None:
    layers, x = make(), random(TOKENS, IN)
    together = run(lambda x: apply_group(layers, x), layers, x)
    inputs: list[Tensor] = []
    layers[2].register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    outs, _, proxies = run(lambda x: apply_group(layers, x), layers, x)
    assert len(inputs) == 1
    assert torch.equal(inputs[0], x)
    assert all(torch.equal(a, b) for a, b in zip(outs, together[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(proxies, together[2], strict=True))


def test_moments_of_a_group() -> None:
    layers, x = make(), random(TOKENS, IN).bfloat16()
    named = {str(i): layer for i, layer in enumerate(layers)}
    with torch.no_grad(), InputMoments(named) as moments:
        apply_group(layers, x)
    with torch.no_grad(), InputMoments(named) as single:
        for layer in layers:
            layer(x)
    assert [moments.owner(name) for name in named] == ["0", "0", "0"]
    assert moments.moment("2").any()
    assert torch.equal(moments.moment("2"), single.moment("2"))


# -- the tie ------------------------------------------------------------------------------------


def codes_of(layers: list[MeldedLinear]) -> list[Tensor]:
    return [layer.codes for layer in layers]


def test_tie_keeps_parameters_and_values() -> None:
    layers = make()
    before, parameters = [c.clone() for c in codes_of(layers)], codes_of(layers)
    assert not are_consecutive(codes_of(layers))
    assert tie(layers)
    assert are_consecutive(codes_of(layers))
    assert all(a is b for a, b in zip(parameters, codes_of(layers), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, codes_of(layers), strict=True))
    place = layers[0].codes.data_ptr()
    assert tie(layers)
    assert layers[0].codes.data_ptr() == place  # a second time there is nothing to do


def test_stacked_is_a_view_of_consecutive_rows_only() -> None:
    layers = make()
    copy = stacked(codes_of(layers))
    tie(layers)
    view = stacked(codes_of(layers))
    assert torch.equal(copy, view)
    layers[1].codes.data[0, 0] = 99
    assert view[OUTS[0] + RANK, 0] == 99
    assert copy[OUTS[0] + RANK, 0] != 99
    assert not are_consecutive([layers[0].codes, layers[2].codes])
    assert not are_consecutive([layers[1].codes, layers[0].codes])
    assert not are_consecutive([layers[0].codes, layers[1].codes.view(torch.int8)])


def test_tie_leaves_alone_what_it_may_not_move() -> None:
    assert not tie([*make(), nn.Linear(2, 2)])
    assert not tie([layer.to("meta") for layer in make()])
    layers = make()

    class Shard(nn.Parameter):
        pass

    layers[1].codes = Shard(layers[1].codes.data, requires_grad=False)
    assert not tie(layers)
    outs = apply_group(layers, random(3, IN))
    assert torch.equal(outs[1], layers[1](random(3, IN)))


def test_codes_replaced_after_the_tie_are_used() -> None:
    layers, x = make(), random(3, IN)
    tie(layers)
    apply_group(layers, x)
    layers[1].codes.data = torch.zeros_like(layers[1].codes)
    assert not apply_group(layers, x)[1].any()


# -- norm and activation with the quantiser -----------------------------------------------------

SHAPES = [(1, 1), (5, 33), (16, 64), (3, 576), (0, 16)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fmt", [E4M3, E5M2], ids=lambda f: f.name)
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_and_quantise_is_one_after_the_other(
    dtype: torch.dtype, fmt: Format, rounding: ScaleRounding, shape: tuple[int, int]
) -> None:
    norm = LlamaRMSNorm(shape[1], eps=1e-5).to(dtype)
    norm.weight.data = (1 + 0.1 * random(shape[1])).to(dtype)
    x = (random(*shape, seed=1) * random(shape[0], 1, seed=2).exp()).to(dtype)
    if len(x):
        x[0] = 0
    codes, scale, inverse = rms_norm_quantize(x, norm.weight, 1e-5, fmt, rounding)
    wanted, wanted_scale = quantize(norm(x), fmt, "per_token", rounding)
    assert torch.equal(codes, wanted)
    assert torch.equal(scale, wanted_scale)
    normed, one, _ = rms_norm_quantize(x, norm.weight, 1e-5, None, rounding)
    assert torch.equal(normed, norm(x)) and one.tolist() == [1.0]
    assert (inverse.dtype, inverse.shape) == (torch.float32, (shape[0], 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm_grad_is_autograds(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    weight = (1 + 0.1 * random(shape[1])).to(dtype)
    x, grad = random(*shape, seed=1).to(dtype), random(*shape, seed=2).to(dtype)
    *_, inverse = rms_norm_quantize(x, weight, 1e-5, E4M3, "power_of_two")
    dx = rms_norm_grad(grad, x, weight, inverse)
    wide = x.double().requires_grad_()
    (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight.double()).backward(
        grad.double()
    )
    assert dx.dtype == dtype
    assert wide.grad is not None
    # A rounding to the dtype, after float32 sums over the row whose two terms may cancel.
    bound = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 2.0**-20}[dtype]
    size = (inverse.double() * grad.double().abs().amax(-1, keepdim=True)) if len(x) else 1.0
    assert ((dx.double() - wide.grad).abs() <= bound * wide.grad.abs() + 2.0**-18 * size).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ["power_of_two", "none"])
@pytest.mark.parametrize("shape", SHAPES)
def test_swiglu_and_quantise_is_one_after_the_other(
    dtype: torch.dtype, rounding: ScaleRounding, shape: tuple[int, int]
) -> None:
    gate, up = (3 * random(*shape, seed=i).to(dtype).requires_grad_() for i in (1, 2))
    product = functional.silu(gate) * up
    codes, scale = swiglu_quantize(gate, up, E4M3, rounding)
    wanted, wanted_scale = quantize(product.detach(), E4M3, "per_token", rounding)
    assert torch.equal(codes, wanted)
    assert torch.equal(scale, wanted_scale)
    values, one = swiglu_quantize(gate, up, None, rounding)
    assert torch.equal(values, product) and one.tolist() == [1.0]
    grad = random(*shape, seed=3).to(dtype)
    for ours, autograds in zip(
        swiglu_grad(grad, gate.detach(), up.detach()),
        torch.autograd.grad(product, (gate, up), grad),
        strict=True,
    ):
        assert torch.equal(ours, autograds)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", ["default", "weights"])
def test_group_behind_a_norm(dtype: torch.dtype, recipe: str) -> None:
    layers = make(RECIPES[recipe])
    norm = LlamaRMSNorm(IN, eps=1e-5).requires_grad_(False).to(dtype)
    norm.weight.data = (1 + 0.1 * random(IN)).to(dtype)
    quantizer = norm_quantizer(layers[0], 1e-5)
    assert quantizer is not None
    x = random(2, TOKENS // 2, IN, seed=5).to(dtype)
    outs, dx, proxies = run(lambda x: [layer(norm(x)) for layer in layers], layers, x)
    called: list[int] = []
    quantizer.register_forward_hook(lambda *_: called.append(1))
    together = run(lambda x: apply_group(layers, x, norm, quantizer), layers, x)
    assert called == [1]
    for one, other in zip([*outs, *proxies], [*together[0], *together[2]], strict=True):
        assert torch.equal(one, other)
    assert signal_to_noise(together[1], dx) > ONE_ROUNDING_DB[dtype] - ROUNDINGS_DB
    # A norm that is trained, observed, or of another dtype is called.
    norm.requires_grad_(True)
    apply_group(layers, x, norm, quantizer)[0].sum().backward()
    assert norm.weight.grad is not None
    assert called == [1]
    norm.requires_grad_(False).register_forward_hook(lambda *_: called.append(2))
    apply_group(layers, x, norm, quantizer)
    assert called == [1, 2]


def test_only_one_scale_a_token_is_fused() -> None:
    for recipe in (RECIPES["paper"], RECIPES["none"], DELAYED):
        layer = make_layer(recipe, 0)
        assert norm_quantizer(layer, 1e-5) is None
        assert swiglu_quantizer(layer) is None
    for recipe in (RECIPES["default"], RECIPES["weights"]):
        assert norm_quantizer(make_layer(recipe, 0), 1e-5) is not None
        assert swiglu_quantizer(make_layer(recipe, 0)) is not None


def saved_bytes(call: Callable[[], Any], parameters: list[Tensor]) -> int:
    """Bytes of distinct storages that autograd keeps, those of parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    assert result[0].requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_saved(dtype: torch.dtype) -> None:
    layers, x = make(), random(TOKENS, IN).to(dtype).requires_grad_()
    parameters = [p for layer in layers for p in layer.parameters()]
    adapters = 3 * TOKENS * RANK * dtype.itemsize
    assert saved_bytes(lambda: apply_group(layers, x), parameters) == adapters
    norm = LlamaRMSNorm(IN).requires_grad_(False).to(dtype)
    quantizer = norm_quantizer(layers[0], 1e-6)
    of_norm = TOKENS * IN * dtype.itemsize + TOKENS * 4  # its input, and 1 / rms
    assert (
        saved_bytes(lambda: apply_group(layers, x, norm, quantizer), [*parameters, norm.weight])
        == adapters + of_norm
    )
    swiglu = swiglu_quantizer(layers[0])
    gate, up = (random(TOKENS, IN, seed=i).to(dtype).requires_grad_() for i in (1, 2))
    assert (
        saved_bytes(lambda: apply_melded(layers[:1], gate, up, source=swiglu), parameters)
        == TOKENS * (RANK + 2 * IN) * dtype.itemsize
    )

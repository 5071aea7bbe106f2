"""MeldedLinear: what it computes, what it saves for backward, and what casts and loading keep."""

from __future__ import annotations

import copy
import io
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from falqon.fp8 import E4M3, E5M2, dequantize, quantize
from falqon.groups import swiglu_quantizer
from falqon.linear import MeldedLinear
from falqon.meld import meld_linear
from falqon.recipe import RECIPES, Fp8Recipe, MeldRecipe

IN, OUT, RANK, TOKENS = 256, 192, 16, 64
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DELAYED = Fp8Recipe(activations="per_tensor", gradients="per_tensor", scaling="delayed")

# Rounding normal numbers to E4M3 leaves an error of .0266 of their size: 31.5 dB below them. E5M2
# keeps one bit less: 25.5 dB. A product of two E4M3 operands carries both errors: 28.5 dB. Half a
# decibel is left for the sample; a wrong scale would cost 10 and more.
E4M3_DB, E5M2_DB, PRODUCT_DB, MARGIN_DB = 31.5, 25.5, 28.5, 0.5


def signal_to_noise(result: Tensor | None, reference: Tensor | None) -> float:
    """In dB."""
    assert result is not None
    assert reference is not None
    signal, wanted = result.detach().double(), reference.detach().double()
    return float(10 * torch.log10(wanted.square().sum() / (signal - wanted).square().sum()))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def name(recipe: str | Fp8Recipe) -> str:
    return recipe if isinstance(recipe, str) else recipe.scaling


def make_linear(bias: bool = True, in_features: int = IN, out_features: int = OUT) -> nn.Linear:
    linear = nn.Linear(in_features, out_features, bias=bias)
    linear.weight.data = random(out_features, in_features) / in_features**0.5
    if bias:
        linear.bias.data = random(out_features, seed=1)
    return linear


def make(recipe: str | Fp8Recipe = "default", bias: bool = True, rank: int = RANK) -> MeldedLinear:
    fp8 = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return meld_linear(make_linear(bias), fp8, MeldRecipe(rank=rank))[0]


def lora_fa(layer: MeldedLinear, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of x and B of a plain LoRA-FA layer with B = 0, in float32."""
    x = x.detach().float().requires_grad_()
    proxy = torch.zeros(layer.out_features, layer.rank, requires_grad=True)
    bias = None if layer.bias is None else layer.bias.detach().float()
    y = functional.linear(x, layer.dequantized_weight(), bias)
    y = y + (x @ layer.dequantized_adapter().t()) @ proxy.t()
    y.backward(grad.float())
    assert x.grad is not None
    assert proxy.grad is not None
    return y, x.grad, proxy.grad


# -- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["default", "paper"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_and_gradients_to_fp8_accuracy(recipe: str, dtype: torch.dtype) -> None:
    layer = make(recipe, bias=False)  # a bias is exact and would flatter the figures
    tokens = 16 * TOKENS  # a few directions make up most of A: a small sample says little of O_A
    x, grad = random(tokens, IN, seed=2).to(dtype), random(tokens, OUT, seed=3).to(dtype)
    x.requires_grad_()
    y = layer(x)
    y.backward(grad)
    assert x.grad is not None
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    high_precision = make_linear(bias=False)(x.detach().float())
    expected, dx, d_proxy = lora_fa(layer, x, grad)
    assert signal_to_noise(y, high_precision) > PRODUCT_DB - MARGIN_DB
    assert signal_to_noise(y, expected) > E4M3_DB - MARGIN_DB  # x is rounded, W counts as exact
    assert signal_to_noise(x.grad, dx) > E5M2_DB - MARGIN_DB
    assert layer.B.grad is not None
    assert layer.B.grad.dtype == torch.float32
    assert signal_to_noise(layer.B.grad, d_proxy) > E4M3_DB - MARGIN_DB  # O_A alone is rounded
    # The rounding is there at all: no result may be much better than FP8 can be.
    for result, reference in ((y, expected), (layer.B.grad, d_proxy)):
        assert signal_to_noise(result, reference) < E4M3_DB + 2


@pytest.mark.parametrize("recipe", ["default", "paper"])
def test_backward_is_its_formula(recipe: str) -> None:
    layer, fp8 = make(recipe, bias=False), RECIPES[recipe]
    x, grad = random(TOKENS, IN, seed=2).requires_grad_(), random(TOKENS, OUT, seed=3)
    layer(x).backward(grad)
    x_codes, x_scale = quantize(x.detach(), E4M3, fp8.activations, fp8.scale_rounding)
    g_codes, g_scale = quantize(grad, E5M2, fp8.gradients, fp8.scale_rounding)
    adapter = dequantize(x_codes, x_scale, E4M3) @ layer.dequantized_adapter().t()
    dx = dequantize(g_codes, g_scale, E5M2) @ layer.dequantized_weight()
    # Both sides add in float32, in another order: at most n 2^-24 of the sum of sizes.
    torch.testing.assert_close(x.grad, dx, rtol=0, atol=OUT * 2**-24 * 100)
    torch.testing.assert_close(layer.B.grad, grad.t() @ adapter, rtol=0, atol=IN * 2**-24 * 100)


@pytest.mark.parametrize("bias", [False, True])
def test_without_rounding_it_is_lora_fa(bias: bool) -> None:
    layer = make("none", bias)
    x, grad = random(TOKENS, IN, seed=2).requires_grad_(), random(TOKENS, OUT, seed=3)
    y = layer(x)
    y.backward(grad)
    expected, dx, d_proxy = lora_fa(layer, x, grad)
    assert torch.equal(layer.dequantized_weight(), make_linear().weight)
    for result, reference in ((y, expected), (x.grad, dx), (layer.B.grad, d_proxy)):
        assert result is not None
        assert (result - reference).norm() <= 1e-6 * reference.norm()


@pytest.mark.parametrize("native", ["auto", "off"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_alone_are_rounded(
    dtype: torch.dtype, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FALQON_NATIVE", native)
    layer = make("weights", bias=True)
    assert layer.codes.dtype == torch.uint8
    x = random(TOKENS, IN, seed=2).to(dtype).requires_grad_()
    grad = random(TOKENS, OUT, seed=3).to(dtype)
    kept = x.detach().clone(), grad.clone()
    y = layer(x)
    y.backward(grad)
    expected, dx, d_proxy = lora_fa(layer, x, grad)
    assert x.grad is not None
    # One rounding of 8, 11 or 24 bits and, of O_A, another.
    bound = {torch.bfloat16: 50, torch.float16: 68, torch.float32: 120}[dtype]
    for result, reference in ((y, expected), (x.grad, dx), (layer.B.grad, d_proxy)):
        assert result is not None
        assert signal_to_noise(result, reference) > bound
    assert torch.equal(x, kept[0]) and torch.equal(grad, kept[1])  # nothing is scaled in place


def test_pending_proxy_takes_no_part_in_forward() -> None:
    layer, x = make(), random(4, IN)
    before = layer(x)
    layer.B.data.normal_()
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_leading_dimensions_are_rows(dtype: torch.dtype) -> None:
    layer = make()
    x = random(2, 3, 5, IN).to(dtype)
    y = layer(x)
    assert y.shape == (2, 3, 5, OUT)
    flat = layer(x.view(-1, IN))
    assert torch.equal(y.view(-1, OUT), flat)
    assert torch.equal(layer(x.transpose(0, 1)), y.transpose(0, 1))  # not contiguous
    assert layer(x[0, 0, 0]).shape == (OUT,)


@pytest.mark.parametrize("shape", [(0, IN), (2, 0, IN), (0, 0, IN)])
@pytest.mark.parametrize("recipe", ["default", "paper", "weights", "none"])
def test_no_tokens(shape: tuple[int, ...], recipe: str) -> None:
    layer = make(recipe)
    x = torch.zeros(shape, requires_grad=True)
    y = layer(x)
    assert y.shape == (*shape[:-1], OUT)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape
    assert torch.equal(layer.B.grad, torch.zeros(OUT, RANK))


@pytest.mark.parametrize("shape", [(3, IN - 1), (3, IN + 1), (IN, 3)])
def test_wrong_width(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=rf"{shape[-1]} features, the layer takes {IN} .*{shape[0]}"
    ):
        make()(torch.zeros(shape))


def test_bias_gradient_if_it_is_asked_for() -> None:
    layer = make()
    assert layer.bias is not None
    layer.bias.requires_grad_()
    grad = random(TOKENS, OUT)
    layer(random(TOKENS, IN)).backward(grad)
    assert torch.equal(layer.bias.grad, grad.sum(dim=0))


@pytest.mark.parametrize(
    ("x_grad", "proxy_grad", "expected"),
    [(False, True, ["proxy"]), (True, False, ["dx"]), (True, True, ["dx", "proxy"])],
)
def test_only_gradients_asked_for_are_computed(
    x_grad: bool, proxy_grad: bool, expected: list[str]
) -> None:
    layer = make()
    layer.B.requires_grad_(proxy_grad)
    called = []
    layer.backbone_matmul.register_forward_hook(lambda *_: called.append("dx"))
    layer.proxy_grad.register_forward_hook(lambda *_: called.append("proxy"))
    layer(random(3, IN).requires_grad_(x_grad)).sum().backward()
    assert called == expected


def test_no_gradient_for_codes_and_scale() -> None:
    layer = make()
    layer(random(3, IN)).sum().backward()
    assert [n for n, p in layer.named_parameters() if p.grad is not None] == ["B"]


# -- what it saves ------------------------------------------------------------------------------


def saved_bytes(run: Callable[[], Any], modules: nn.Module) -> int:
    """Bytes of distinct storages that autograd keeps, those of parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in modules.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # the whole of it: a view keeps all
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        result = run()
    assert result.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("recipe", ["default", "paper", "none", DELAYED], ids=name)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 64])
def test_only_the_adapter_output_is_saved(
    recipe: str | Fp8Recipe, dtype: torch.dtype, tokens: int
) -> None:
    layer, x = make(recipe), random(tokens, IN).to(dtype).requires_grad_()
    assert saved_bytes(lambda: layer(x), layer) == tokens * RANK * dtype.itemsize
    linear = make_linear().to(dtype)
    assert (
        saved_bytes(lambda: linear(x), linear) == tokens * IN * dtype.itemsize
    )  # what it replaces


@pytest.mark.parametrize("recipe", ["default", "none", DELAYED], ids=name)
def test_nothing_else_holds_on_to_the_input(recipe: str | Fp8Recipe) -> None:
    layer = make(recipe)
    x = random(8, IN).requires_grad_() * 1.0  # a leaf would be held for its gradient
    reference = weakref.ref(x)
    y = layer(x)
    del x
    assert reference() is None
    y.sum().backward()


def test_output_may_be_changed_in_place() -> None:
    layer, x = make(), random(1, IN)
    y = layer(x)
    (y.mul_(2.0)).sum().backward()
    alone = make()
    alone(x).backward(torch.full((1, OUT), 2.0))
    assert torch.equal(layer.B.grad, alone.B.grad)


@pytest.mark.parametrize("native", ["auto", "off"])
def test_a_saved_input_that_is_changed_in_place_is_refused(
    native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FALQON_NATIVE", native)
    layer, gate = make(), random(8, IN).requires_grad_() * 1
    y = layer(gate, random(8, IN), source=swiglu_quantizer(layer))
    with torch.no_grad():
        gate.mul_(2.0)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


@pytest.mark.parametrize("recipe", ["default", "paper", "weights", "none"])
def test_gradient_checkpointing_changes_no_gradient(recipe: str) -> None:
    def gradients(use_checkpoint: bool) -> list[Tensor]:
        layers = nn.Sequential(make(recipe), nn.GELU(), nn.Linear(OUT, IN), make(recipe))
        layers[2].weight.data = random(IN, OUT)
        layers[2].bias.data.zero_()
        x = random(8, IN, seed=2).requires_grad_()
        y = checkpoint(layers, x, use_reentrant=False) if use_checkpoint else layers(x)
        y.square().sum().backward()
        return [x.grad, layers[0].B.grad, layers[3].B.grad]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, checkpointed)
        assert plain.any()


# -- what casts, copies and loading keep --------------------------------------------------------


def golden(dtype: torch.dtype, codes: torch.dtype = torch.uint8) -> dict[str, Any]:
    return {
        "codes": (codes, (OUT + RANK, IN), False),
        "scale": (torch.float32, (1,), False),
        "B": (torch.float32, (OUT, RANK), True),
        "bias": (dtype, (OUT,), False),
    }


def facts(layer: nn.Module) -> dict[str, Any]:
    return {n: (p.dtype, tuple(p.shape), p.requires_grad) for n, p in layer.named_parameters()}


def bits(layer: nn.Module) -> dict[str, list[int]]:
    return {
        name: parameter.detach().contiguous().view(torch.uint8).flatten().tolist()
        for name, parameter in layer.named_parameters()
        if name != "bias"
    }


@pytest.mark.parametrize("recipe", ["default", "paper", "weights", "none"])
def test_golden_parameters(recipe: str) -> None:
    codes = torch.float32 if recipe == "none" else torch.uint8
    layer = make(recipe)
    assert facts(layer) == golden(torch.float32, codes)
    assert not list(layer.buffers())
    assert list(layer.state_dict()) == ["codes", "scale", "B", "bias"]
    assert facts(make(recipe, bias=False)).keys() == {"codes", "scale", "B"}
    new = MeldedLinear(IN, OUT, RANK, bias=True, recipe=RECIPES[recipe])
    assert facts(new) == golden(torch.bfloat16, codes)
    assert new(torch.ones(2, IN)).tolist() == [[0.0] * OUT] * 2


CASTS: dict[str, tuple[Callable[[nn.Module], nn.Module], torch.dtype]] = {
    "to(bfloat16)": (lambda m: m.to(torch.bfloat16), torch.bfloat16),
    "bfloat16": (lambda m: m.bfloat16(), torch.bfloat16),
    "half": (lambda m: m.half(), torch.float16),
    "float": (lambda m: m.float(), torch.float32),
    "double": (lambda m: m.double(), torch.float64),
    "there and back": (lambda m: m.half().double().bfloat16(), torch.bfloat16),
    "to(cpu, half)": (lambda m: m.to("cpu", torch.half), torch.float16),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("recipe", ["default", "paper", "weights", "none"])
def test_casts_leave_all_but_the_bias_alone(cast: str, recipe: str) -> None:
    layer = make(recipe)
    layer.B.data.copy_(random(OUT, RANK))
    layer.B.grad = random(OUT, RANK, seed=1)
    before, gradient = bits(layer), layer.B.grad.clone()
    convert, dtype = CASTS[cast]
    model = convert(nn.Sequential(layer))
    assert facts(model[0]) == golden(dtype, layer.codes.dtype)
    assert bits(model[0]) == before
    assert model[0].B.grad.dtype == torch.float32
    assert torch.equal(model[0].B.grad, gradient)
    x = random(3, IN).to(torch.float32 if dtype == torch.float64 else dtype)
    assert torch.isfinite(model(x)).all()


@pytest.mark.parametrize("recipe", ["default", "none"])
def test_state_dict_round_trip(recipe: str) -> None:
    layer = make(recipe)
    layer.B.data.copy_(random(OUT, RANK))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = MeldedLinear(IN, OUT, RANK, True, RECIPES[recipe], dtype=torch.float32)
    assert not torch.equal(other(random(2, IN)), layer(random(2, IN)))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert bits(other) == bits(layer)
    assert torch.equal(other(random(2, IN)), layer(random(2, IN)))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float32, torch.int8])
def test_codes_of_another_dtype_are_refused(dtype: torch.dtype) -> None:
    model = nn.Sequential(make())
    before, state = bits(model[0]), model.state_dict()
    state["0.codes"] = state["0.codes"].float().clamp(max=100).to(dtype)
    with pytest.raises(ValueError, match=r"0\.codes is torch\..*uint8"):
        model.load_state_dict(state)
    assert bits(model[0]) == before


def test_codes_are_refused_where_there_is_no_rounding() -> None:
    with pytest.raises(ValueError, match=r"codes is torch\.uint8 in the state dict"):
        make("none").load_state_dict(make().state_dict())


@pytest.mark.parametrize("recipe", ["default", "none", DELAYED], ids=name)
def test_copies_are_equal_and_independent(recipe: str | Fp8Recipe) -> None:
    layer, x = make(recipe), random(4, IN)
    layer(x).sum().backward()  # a delayed quantiser has now seen something
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for other in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert facts(other) == facts(layer)
        assert bits(other) == bits(layer)
        assert torch.equal(other(x), layer(x))
        before = bits(layer)
        other.codes.data.zero_()
        other.B.data.fill_(1.0)
        assert bits(layer) == before


def test_representation_tells_the_shape() -> None:
    text = repr(make())
    for part in (f"in_features={IN}", f"out_features={OUT}", f"rank={RANK}", "codes=uint8", "e5m2"):
        assert part in text


@pytest.mark.parametrize("native", ["auto", "off"])
@pytest.mark.parametrize("recipe", ["default", "paper", "weights", "none"])
def test_a_small_pending_change_is_not_rounded_away(
    recipe: str, native: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change below half a bfloat16 step of the output, or of dL/dx, acts on average.

    Added to results that are rounded already, nearly nothing of it would.
    """
    monkeypatch.setenv("FALQON_NATIVE", native)
    layer = make(recipe, bias=False)
    x = random(16 * TOKENS, IN, seed=3).bfloat16()
    grad = random(16 * TOKENS, OUT, seed=4).bfloat16()
    adapter = layer.dequantized_adapter().double()
    b = random(OUT, RANK, seed=5)
    results = []
    wanted = [x.double() @ adapter.t() @ b.t().double(), grad.double() @ b.double() @ adapter]
    for live in (False, True):
        layer.live = live
        leaf = x.clone().requires_grad_()
        layer.B.data = b * (2e-4 / wanted[0].std().float())
        out = layer(leaf)
        out.backward(grad)
        assert leaf.grad is not None
        results.append((out.detach().double(), leaf.grad.double()))
    for without, acting, change in zip(*results, wanted, strict=True):
        change = change * (2e-4 / wanted[0].std())
        assert change.abs().mean() < without.abs().mean() * 2**-10
        landed = ((acting - without) * change).sum() / change.square().sum()
        assert 0.85 < landed < 1.15

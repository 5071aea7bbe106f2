"""torchao's FP8 training against peft and torchao put together; the FP8 of Fishman et al."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from falqon.errors import InputError
from lit_modules.loss import supervised_loss
from lit_modules.methods import Fishman, TorchaoFP8
from lit_modules.methods.fishman import Fp8Linear, smooth_quantise
from lit_modules.methods.torchao_fp8 import as_fp8
from tests.method_checks import LAYERS, prepared, some_batch, train_steps

E4M3_VALUES = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()


def nearest(x: float) -> float:
    """The nearest E4M3 value, ties to the even code."""
    code = min(range(127), key=lambda c: (abs(E4M3_VALUES[c] - abs(x)), c & 1))
    return E4M3_VALUES[code] * (-1 if x < 0 else 1)


@pytest.mark.parametrize("adapters", ["fp8", "bf16"])
def test_torchao_is_peft_and_then_converted(adapters: str, tiny_llama: LlamaForCausalLM) -> None:
    peft, float8 = pytest.importorskip("peft"), pytest.importorskip("torchao.float8")
    base = deepcopy(tiny_llama)
    method = TorchaoFP8(4, 8.0, adapters)  # type: ignore[arg-type]
    ours = prepared(method, base, torch.float32)
    for name in LAYERS:
        nn.init.normal_(ours.get_submodule(name).B, std=0.1)  # type: ignore[arg-type]
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=LAYERS)
    theirs = peft.get_peft_model(base, config)
    for name in LAYERS:
        layer = theirs.get_submodule(f"base_model.model.{name}")
        for part in "AB":
            weight = getattr(layer, f"lora_{part}")["default"].weight
            weight.data.copy_(getattr(ours.get_submodule(name), part).data)
    kinds = ("base_layer", "default") if adapters == "fp8" else ("base_layer",)
    float8.convert_to_float8_training(
        theirs,
        module_filter_fn=lambda module, name: name.endswith(kinds),
        config=float8.Float8LinearConfig(emulate=True),
    )
    batch = some_batch(base.config.vocab_size)
    losses = [supervised_loss(model, batch)[0] for model in (ours, theirs)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for name in LAYERS:
        layer = theirs.get_submodule(f"base_model.model.{name}")
        for part in "AB":
            expected = getattr(layer, f"lora_{part}")["default"].weight.grad
            gradient = getattr(ours.get_submodule(name), part).grad
            torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_torchao_quantises_with_one_scale(tiny_llama: LlamaForCausalLM) -> None:
    model = prepared(TorchaoFP8(4), tiny_llama, torch.float32)
    base = model.get_submodule(LAYERS[0]).base
    weight = base.weight[:4].contiguous()
    scale = 448.0 / weight.abs().max()
    for weights, values in zip(weight * scale, as_fp8(weight, base) * scale, strict=True):
        expected = [nearest(float(x)) for x in weights]
        torch.testing.assert_close(values, torch.tensor(expected), rtol=1e-5, atol=0)


def test_smooth_scales_are_one_a_channel() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 9) * torch.logspace(-3, 3, 9)
    x[:, 4] = 0.0
    codes, scale = smooth_quantise(x)
    for channel in range(9):
        amax = float(x[:, channel].abs().max())
        largest = 1.0 if amax == 0 else max(2.0**e for e in range(-40, 40) if amax * 2.0**e <= 448)
        assert float(scale[0, channel]) == largest
        for row in range(6):
            value = codes[row, channel].view(torch.float8_e4m3fn).float()
            assert float(value) == nearest(float(x[row, channel]) * largest)


@pytest.mark.parametrize("smooth", [False, True])
def test_fp8_forward_and_backward_written_out(smooth: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=True).requires_grad_(False)
    made = Fp8Linear(layer, "dynamic", smooth)
    x = (torch.randn(2, 5, 32) * torch.logspace(-4, 3, 32)).requires_grad_()
    grad = torch.randn(2, 5, 16) * 1e-3

    def rounded(t: torch.Tensor, kind: torch.dtype, dims: tuple[int, ...]) -> torch.Tensor:
        largest = torch.finfo(kind).max
        scale = torch.exp2(torch.floor(torch.log2(largest / t.abs().amax(dims, keepdim=True))))
        return (t * scale).clamp(-largest, largest).to(kind).float() / scale

    weight = rounded(layer.weight, torch.float8_e4m3fn, (0, 1))
    assert torch.equal(made.dequantise(torch.float32), weight)
    out = made(x)
    dims = (0, 1) if smooth else (0, 1, 2)
    values = rounded(x.detach(), torch.float8_e4m3fn, dims)
    torch.testing.assert_close(out, values @ weight.t() + layer.bias)
    out.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, rounded(grad, torch.float8_e5m2, (0, 1, 2)) @ weight)
    if smooth:  # what it is for: small channels survive beside an outlier
        alone = rounded(x.detach(), torch.float8_e4m3fn, (0, 1, 2))
        small = slice(0, 4)
        errors = [float((v - x.detach())[..., small].norm()) for v in (values, alone)]
        assert errors[0] < 0.5 * errors[1]


def test_delayed_scales_come_from_past_steps(tiny_llama: LlamaForCausalLM) -> None:
    method = Fishman(4, history=2)
    model = prepared(method, tiny_llama)
    layer = model.get_submodule(LAYERS[0]).base
    smooth = [n for n in LAYERS if model.get_submodule(n).base.smooth]
    assert smooth == [n for n in LAYERS if n.endswith("down_proj")]
    model.train()
    seen = []
    for size in (4.0, 1.0, 1.0, 1.0):
        x = torch.full((3, 32), size, dtype=torch.bfloat16)
        codes, scale = layer.quantize_input(x)
        seen.append((float(scale), float(codes[0, 0].view(torch.float8_e4m3fn).float())))
        method.after_step(model, len(seen) - 1)
    # 64 = the largest power of two with 4 * 64 <= 448; the history of two forgets the 4.
    assert seen == [(64.0, 256.0), (64.0, 64.0), (64.0, 64.0), (256.0, 256.0)]


def test_a_loaded_history_gives_the_same_scales(tiny_llama: LlamaForCausalLM) -> None:
    method, other = Fishman(4), Fishman(4)
    model, again = prepared(method, tiny_llama), prepared(other, tiny_llama)
    train_steps(method, model, 0.05, range(2))
    again.load_state_dict(method.state(model), strict=False)
    with other.compute():
        pass
    for name in LAYERS:
        ours, theirs = model.get_submodule(name).base, again.get_submodule(name).base
        for kind in ("quantize_input", "quantize_gradient"):
            scales = [getattr(layer, kind).scale for layer in (ours, theirs)]
            assert scales[0] == scales[1], name
    assert ours.quantize_gradient.scale is not None


def test_models_without_swiglu() -> None:
    config = GPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
    )
    model = GPTNeoXForCausalLM(config)
    with pytest.raises(InputError, match="set method.smooth to false"):
        Fishman(4).prepare(model)
    prepared(Fishman(4, smooth=False), model)

"""The CPU path of attention, melded layers and loss, against the plain one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from falqon.kernels.native import attention, build, ops, products
from falqon.precision import FalqonPrecision
from lit_modules import loss as loss_module
from lit_modules.loss import supervised_loss

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
BF16 = torch.bfloat16


def tables(length: int, d: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(length)[:, None] / 1e4 ** (torch.arange(0, d, 2) / d)
    both = torch.cat([angles, angles], dim=-1)[None]
    return both.cos().to(BF16), both.sin().to(BF16)


def sdpa(heads: list[Tensor], cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in heads)
    q, k = apply_rotary_pos_emb(q, k, cos, sin)
    out = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )
    return out.transpose(1, 2)


def masks(batch: int, length: int, kind: str) -> Tensor | None:
    causal = torch.ones(length, length).tril().bool()
    if kind == "causal":
        return None
    if kind == "window":
        return (causal & ~causal.tril(-20))[None, None]
    if kind == "padded":
        lengths = torch.arange(batch) * 17
        real = torch.arange(length) >= lengths[:, None]  # on the left
        return causal & real[:, None, None] | torch.eye(length).bool()
    documents = torch.sort(torch.randint(0, 5, (batch, length)), dim=1)[0]
    return (documents[:, None, :, None] == documents[:, None, None, :]) & causal


@pytest.fixture(params=[True, False], ids=["own products", "torch's"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products of our own, where the processor allows them, and with torch's."""
    if not request.param:
        monkeypatch.setattr(products, "present", lambda: False)
    elif not products.present():
        pytest.skip("the processor has no AVX2")


@pytest.mark.parametrize("kind", ["causal", "packed", "window", "padded"])
@pytest.mark.parametrize(("heads", "kv", "d"), [(6, 2, 32), (3, 3, 10)])
def test_attention(heads: int, kv: int, d: int, kind: str, units: None) -> None:
    torch.manual_seed(0)
    batch, length = 3, 150  # more than a block of queries
    shapes = [(batch, length, h, d) for h in (heads, kv, kv)]
    given = [torch.randn(shape).to(BF16).requires_grad_() for shape in shapes]
    cos, sin = tables(length, d)
    mask = masks(batch, length, kind)
    grad = torch.randn(shapes[0]).to(BF16)
    ranges = attention.ranges_of(mask, batch, length)
    assert ranges is not None
    assert attention.takes(batch, length, heads, kv, cos, sin)
    assert not attention.takes(batch, length, heads, kv, cos[0], sin[0])
    assert not attention.takes(batch, length, heads, kv, cos.repeat(2, 1, 1), sin.repeat(2, 1, 1))
    ours = attention.attend(*given, cos, sin, ranges, d**-0.5)
    exact = [x.detach().double().requires_grad_() for x in given]
    expected = sdpa(exact, cos.double(), sin.double(), mask)
    usual = sdpa(given, cos, sin, mask)
    ours_all = [ours, *torch.autograd.grad(ours, given, grad)]
    usual_all = [usual, *torch.autograd.grad(usual, given, grad)]
    exact_all = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for a, b, c in zip(ours_all, usual_all, exact_all, strict=True):
        error, others = ((x.double() - c).norm() / c.norm() for x in (a, b))
        # Scores are rounded to 16 bits: a little more than torch's kernel, 0.003 to 0.007.
        assert error < 1.6 * others
        assert error < 0.01


@pytest.mark.parametrize("d", [6, 32, 80, 128])
def test_rotation(d: int) -> None:
    cos, sin = tables(40, d)
    x = torch.randn(2, 40, 6, d).to(BF16).requires_grad_()
    expected, _ = apply_rotary_pos_emb(x.transpose(1, 2), x.transpose(1, 2), cos, sin)
    ours = ops.rotated(x.detach(), cos, sin, 2)  # [2, 2, 40, 3, d]
    assert torch.equal(ours.transpose(2, 3).flatten(1, 2), expected)
    grad = torch.randn(ours.shape).to(BF16)
    (of_x,) = torch.autograd.grad(expected, x, grad.transpose(2, 3).flatten(1, 2))
    assert torch.equal(ops.rotated_grad(grad, cos, sin), of_x)


@pytest.mark.parametrize("d", [8, 32])
def test_queries_that_see_nothing(d: int, units: None) -> None:
    mask = torch.ones(1, 1, 40, 40).tril().bool()
    mask[..., :5, :] = False
    ranges = attention.ranges_of(mask, 1, 40)
    assert ranges is not None
    heads = [torch.randn(1, 40, 2, d).to(BF16).requires_grad_() for _ in range(3)]
    out = attention.attend(*heads, *tables(40, d), ranges, 1.0)
    assert not out[:, :5].any()
    out.sum().backward()
    assert heads[0].grad is not None
    assert not heads[0].grad[:, :5].any()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in heads)


def test_masks_that_have_no_ranges() -> None:
    mask = torch.ones(2, 1, 9, 9).tril().bool()
    assert attention.ranges_of(mask.float(), 2, 9) is None
    assert attention.ranges_of(mask.expand(2, 4, 9, 9), 2, 9) is None
    mask[1, 0, 8, 4] = False
    assert attention.ranges_of(mask, 2, 9) is None
    mask[1, 0, 8, :5] = False  # the tensor of the last answer, changed
    found = attention.ranges_of(mask, 2, 9)
    assert found is not None
    assert int(found.first[1, 8]) == 5


def test_masks_in_inference_mode() -> None:
    with torch.inference_mode():
        mask = torch.ones(1, 1, 9, 9).tril().bool()
        first = attention.ranges_of(mask, 1, 9)
        mask[..., :3] = False
        second = attention.ranges_of(mask, 1, 9)
    assert first is not None and second is not None
    assert (int(first.first[0, 8]), int(second.first[0, 8])) == (0, 3)


def model(
    live: bool = True, recipe: str = "default", **changes: Any
) -> tuple[nn.Module, FalqonPrecision]:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=160,
        tie_word_embeddings=False,
        **changes,
    )
    made = LlamaForCausalLM(config)
    plugin = FalqonPrecision(
        rank=8, lora_alpha=4, update="live" if live else "paper", recipe=recipe
    )
    plugin.convert(made)
    for layer in plugin.layers.values():
        layer.B.data.normal_(std=0.01)
    return made.train(), plugin


def batch(rows: int = 3, length: int = 40) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randint(0, 160, (rows, length))
    labels = ids.clone()
    labels[:, ::3] = -100
    return {"input_ids": ids, "labels": labels}


def gradients(made: nn.Module, plugin: FalqonPrecision, given: dict[str, Tensor]) -> list[Tensor]:
    loss, count = supervised_loss(made, given)
    made.zero_grad()
    (loss / count).backward()
    return [loss.detach(), *(layer.B.grad.clone() for layer in plugin.layers.values())]  # type: ignore[union-attr]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("recipe", ["default", "weights"])
def test_layers_are_those_of_plain_torch(
    live: bool, bias: bool, recipe: str, units: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plugin = model(live, recipe, attention_bias=bias, attn_implementation="eager")
    x = torch.randn(2, 33, 64).to(BF16)
    results = []
    for native in ("off", "auto"):
        monkeypatch.setenv("FALQON_NATIVE", native)
        made.zero_grad()
        given = x.clone().requires_grad_()
        mlp = made.model.layers[0].mlp(given)  # type: ignore[union-attr, index, operator]
        heads = made.model.layers[0].self_attn.q_proj(given)  # type: ignore[union-attr, index, operator]
        (mlp.float().square().sum() + heads.float().square().sum()).backward()
        grads = [b.B.grad for b in plugin.layers.values() if b.B.grad is not None]
        assert len(grads) == 4
        results.append([mlp, heads, given.grad, *grads])
    for plain, ours in zip(*results, strict=True):
        assert plain is not None and ours is not None
        if live and products.present():  # what is pending is not rounded by itself
            apart, size = (x.float().norm(dim=-1) for x in (plain - ours, plain))
            assert apart.norm() < 0.01 * size.norm()
            assert bool((apart <= 0.1 * size).all())
        else:
            assert torch.equal(plain, ours)


def test_loss_and_gradients(units: None, monkeypatch: pytest.MonkeyPatch) -> None:
    made, plugin = model()
    ours = gradients(made, plugin, batch())
    monkeypatch.setenv("FALQON_NATIVE", "off")
    plain = gradients(made, plugin, batch())
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-3, atol=0)
    for a, b in zip(ours[1:], plain[1:], strict=True):
        assert (a - b).norm() < 0.1 * b.norm()  # FP8 rounding of gradients that differ in a bit


@pytest.mark.parametrize("rows", [20, 64])  # the last part of 64 has 14, fewer than a panel
def test_loss_in_parts(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    weight, targets = torch.randn(160, 64).to(BF16) / 8, torch.randint(160, (78,))
    hidden = torch.randn(78, 64).to(BF16).requires_grad_()
    found = []
    for size in (rows * 160 * 2, loss_module._LOGIT_BYTES):
        monkeypatch.setattr(loss_module, "_LOGIT_BYTES", size)
        summed = loss_module._LinearCrossEntropy.apply(hidden, weight, targets)
        found.append((summed.detach(), *torch.autograd.grad(summed, hidden)))
    (parts, of_parts), (whole, of_whole) = found
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=0)
    assert (of_parts - of_whole).norm() < 0.01 * of_whole.norm()


@pytest.mark.parametrize("confidence", [0.0, 0.1])
@pytest.mark.parametrize("mean", [0.0, 1.0])  # embeddings have one as large as what differs
def test_gradient_of_the_loss_is_that_of_exact_arithmetic(confidence: float, mean: float) -> None:
    """To the rounding of 16 bits, also where targets are foreseen and gradients are small."""
    torch.manual_seed(0)
    weight, targets = torch.randn(160, 64), torch.randint(160, (78,))
    hidden = (torch.randn(78, 64) / 4 + confidence * weight[targets]).to(BF16).requires_grad_()
    weight = (weight + mean * torch.randn(64)).to(BF16)
    summed = loss_module._LinearCrossEntropy.apply(hidden, weight, targets)
    (ours,) = torch.autograd.grad(summed / 7, hidden, retain_graph=True)
    assert torch.equal(torch.autograd.grad(summed / 7, hidden)[0], ours)  # leaves what is saved
    logits = (hidden @ weight.t()).detach().double()  # rounded alike
    of_logits = (logits.softmax(-1) - functional.one_hot(targets, 160)) / 7
    expected = of_logits @ weight.double()
    errors = (ours - expected).norm(dim=-1) / expected.norm(dim=-1)
    # Rounding the gradient at the target to 16 bits as well, or to its sum, is beyond these.
    assert errors.max() < 0.0036
    assert (ours - expected).norm() < 0.0026 * expected.norm()


def test_loss_needs_no_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = model()
    shapes = []
    hook = functional.linear

    def watch(x: Tensor, *args: Any) -> Tensor:
        out = hook(x, *args)
        shapes.append(out.shape)
        return out

    monkeypatch.setattr(functional, "linear", watch)
    supervised_loss(made, batch())
    assert torch.Size((3, 0, 160)) in shapes
    assert all(shape[-1] != 160 or 0 in shape for shape in shapes)


class Capped(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = torch.tanh(out.logits)
        return out


def test_loss_of_a_model_that_changes_its_logits() -> None:
    made, _ = model()
    made.__class__ = Capped
    given = batch()
    loss, _ = supervised_loss(made, given)
    logits = made(input_ids=given["input_ids"], use_cache=False).logits[:, :-1].float()
    expected = functional.cross_entropy(
        logits.flatten(0, 1), given["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    assert torch.equal(supervised_loss(made, given)[0], loss)


def test_output_embedding_that_is_trained() -> None:
    made, _ = model()
    head: Tensor = made.lm_head.weight  # type: ignore[union-attr, assignment]
    head.requires_grad_()
    loss, _ = supervised_loss(made, batch())
    loss.backward()
    assert head.grad is not None
    assert head.grad.any()

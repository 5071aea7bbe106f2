"""Decoder layers as one autograd function: the bits of their modules, and when they are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from falqon import blocks, decoder
from falqon.kernels import ProxyGrad
from falqon.kernels.native import amx
from falqon.meld import melded_layers
from falqon.precision import FalqonPrecision
from lit_modules.layers import recompute
from tests.test_blocks import make_base

pytestmark = pytest.mark.skipif(not amx.present(), reason="the processor has no AMX")
BF16 = torch.bfloat16
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def made(family: str = "llama", live: bool = True, recipe: str = "default") -> PreTrainedModel:
    model = make_base(family, **SIZES)
    plugin = FalqonPrecision(
        rank=4, lora_alpha=6, update="live" if live else "paper", recipe=recipe
    )
    plugin.convert(model, device="cpu")
    for layer in plugin.layers.values():
        layer.B.data.normal_(std=0.01)  # type: ignore[operator]
    return model.train()


def layer_of(model: PreTrainedModel) -> blocks.GroupedDecoderLayer:
    layer = model.get_submodule("model.layers.1")
    assert isinstance(layer, blocks.GroupedDecoderLayer)
    return layer


@contextmanager
def counted(whole: bool = True) -> Iterator[list[int]]:
    """How many decoder layers were run as one function; not `whole`: none may be."""
    calls: list[int] = []
    usual, parts = decoder.apply_decoder, blocks.GroupedDecoderLayer._parts

    def apply(*args: Any) -> Tensor:
        calls.append(1)
        return usual(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, "apply_decoder", apply)
        patch.setattr(blocks.GroupedDecoderLayer, "_parts", parts if whole else lambda *_: None)
        yield calls


def results(model: PreTrainedModel, **options: Any) -> list[Tensor]:
    """Output and gradients of a model whose embeddings want one, too."""
    ids = torch.arange(2 * 36).view(2, 36) % 61
    given = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=given, use_cache=False, **options).logits
    model.zero_grad()
    out.float().square().mean().backward()
    assert given.grad is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return [out.detach(), given.grad, *(p.grad.clone() for p in trained if p.grad is not None)]


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "default"), ("llama", "weights"), ("mistral", "default"), ("qwen2", "default")],
)
def test_bits_are_those_of_the_modules(family: str, recipe: str, live: bool) -> None:
    model = made(family, live, recipe).to(BF16)
    with counted() as whole:
        ours = results(model)
    with counted(whole=False) as apart:
        theirs = results(model)
    assert (len(whole), len(apart)) == (2, 0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_what_needs_no_gradient_gets_none() -> None:
    model = made().to(BF16)
    layer = layer_of(model)
    groups = ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")
    x = torch.randn(2, 36, 64).to(BF16)
    cos, sin = model.model.rotary_emb(x, torch.arange(36)[None])
    for first in range(len(groups) + 1):  # of the groups that are trained
        trained = {name for group in groups[first:] for name in group.split()}
        for name, melded in melded_layers(layer).items():
            melded.B.requires_grad_(name.rpartition(".")[2] in trained)
        grads = []
        for whole in (True, False):
            with counted(whole) as calls:
                out = layer(x, position_embeddings=(cos, sin))
            assert len(calls) == whole
            assert out.requires_grad == bool(trained)
            if trained:
                out.float().square().sum().backward()
            found = {n: m.B.grad for n, m in melded_layers(layer).items() if m.B.grad is not None}
            assert {name.rpartition(".")[2] for name in found} == trained
            grads.append(found)
            layer.zero_grad()
        assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


def test_recomputed_layers_give_the_same() -> None:
    model = made().to(BF16)
    usual = results(model)
    recompute(model)
    with counted() as calls:
        again = results(model)
    assert len(calls) == 4
    assert all(torch.equal(a, b) for a, b in zip(usual, again, strict=True))


def test_changes_before_the_backward_pass_are_noticed() -> None:
    model = made().to(BF16)
    out = model(torch.ones(1, 36, dtype=torch.int64)).logits
    with torch.no_grad():
        layer_of(model).mlp.down_proj.codes.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.float().sum().backward()


class OwnProxyGrad(ProxyGrad):
    pass


def _hook(name: str) -> Callable[[blocks.GroupedDecoderLayer], object]:
    return lambda layer: layer.get_submodule(name).register_forward_hook(lambda *_: None)


def _set(name: str, attribute: str, value: Any) -> Callable[[blocks.GroupedDecoderLayer], object]:
    return lambda layer: setattr(layer.get_submodule(name), attribute, value)


CHANGES = {
    "hook of a norm": _hook("post_attention_layernorm"),
    "hook of a layer": _hook("self_attn.o_proj"),
    "hook of a step": _hook("mlp.down_proj.melded_matmul"),
    "hook of the activation": _hook("mlp.act_fn"),
    "hook of the attention": _hook("self_attn"),
    "step of somebody else": _set("self_attn.k_proj", "proxy_grad", OwnProxyGrad()),
    "layer of somebody else": _set("mlp", "down_proj", nn.Linear(96, 64, dtype=BF16)),
    "layers that differ": _set("self_attn.v_proj", "live", False),
    "forward that is replaced": lambda layer: setattr(layer.mlp, "forward", layer.mlp.forward),
    "norm that is trained": lambda layer: layer.input_layernorm.weight.requires_grad_(),
    "bias that is trained": lambda layer: layer.self_attn.q_proj.bias.requires_grad_(),
    "proxies of another layout": lambda layer: setattr(
        layer.mlp.down_proj.B, "data", layer.mlp.down_proj.B.data.t().contiguous().t()
    ),
    "dropout": _set("self_attn", "attention_dropout", 0.1),
    "not causal": _set("self_attn", "is_causal", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_are_run_by_module(change: str) -> None:
    model = made().to(BF16)
    layer = layer_of(model)
    CHANGES[change](layer)
    with counted() as calls:
        results(model)
    assert len(calls) == 1  # the other layer


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_models_that_are_run_by_module(family: str) -> None:
    """Norms of heads, and numbers that the CPU path does not take."""
    model = made(family).to(BF16 if family == "qwen3" else torch.float32)
    with counted() as calls:
        results(model)
    assert not calls


def test_recorded_states_and_attentions() -> None:
    ids = torch.ones(1, 36, dtype=torch.int64)
    model = made().to(BF16)
    found = []
    for whole in (True, False):
        with counted(whole):
            found.append(model(ids, output_hidden_states=True).hidden_states)
    assert len(found[0]) == len(found[1]) == 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    model.set_attn_implementation("eager")
    with counted() as calls:
        assert all(a is not None for a in model(ids, output_attentions=True).attentions)
    assert not calls


def test_profiler_sees_the_parts() -> None:
    model = made().to(BF16)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=kinds) as profile, counted() as calls:
        results(model)
    assert not calls
    names = {event.key for event in profile.key_averages()}
    assert {"falqon::attention", "falqon::rms_norm", "falqon::swiglu_grad"} <= names


@pytest.mark.parametrize("count", [1, 2, 5])
def test_memory_is_enough_for_any_number_of_threads(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made().to(BF16)
    expected = results(model)
    behind, given = 4096, []

    def guarded(size: int) -> Tensor:
        given.append(torch.full((size + behind,), 1.5, dtype=BF16))
        return given[-1]

    monkeypatch.setattr(amx, "memory", guarded)
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        found = results(model)
    finally:
        torch.set_num_threads(before)
    assert len(given) == 4
    assert all((room[-behind:] == 1.5).all() for room in given)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

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
from falqon.fp8 import E4M3
from falqon.kernels import PassThrough, ProxyGrad, RmsNormQuantize
from falqon.kernels.native import products
from falqon.meld import melded_layers
from falqon.precision import FalqonPrecision
from lit_modules.layers import recompute
from tests.test_blocks import make_base
from tests.threads import threads

pytestmark = pytest.mark.skipif(not products.present(), reason="the processor has no AVX2")
BF16 = torch.bfloat16
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def made(
    family: str = "llama",
    live: bool = True,
    recipe: str = "default",
    rank: int = 4,
    **changes: int,
) -> PreTrainedModel:
    model = make_base(family, **(SIZES | changes))
    plugin = FalqonPrecision(
        rank=rank, lora_alpha=6, update="live" if live else "paper", recipe=recipe
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


def results(
    model: PreTrainedModel, rows: int = 2, length: int = 36, **options: Any
) -> list[Tensor]:
    """Output and gradients of a model whose embeddings want one, too."""
    ids = torch.arange(rows * length).view(rows, length) % 61
    given = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=given, use_cache=False, **options).logits
    model.zero_grad()
    out.float().square().mean().backward()
    assert given.grad is not None
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)
    return [out.detach(), given.grad, *(p.grad.clone() for p in trained if p.grad is not None)]


def run_as_one_and_by_module(model: PreTrainedModel, **given: Any) -> None:
    """Both layers as one function each, and none: the same bits."""
    with counted() as whole:
        ours = results(model, **given)
    with counted(whole=False) as apart:
        theirs = results(model, **given)
    assert (len(whole), len(apart)) == (2, 0)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("live", [True, False])
@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "default"), ("llama", "weights"), ("mistral", "default"), ("qwen2", "default")],
)
def test_bits_are_those_of_the_modules(family: str, recipe: str, live: bool) -> None:
    run_as_one_and_by_module(made(family, live, recipe).to(BF16))


def packed(rows: int, length: int) -> dict[str, Tensor]:
    """Two documents a row, the second of another length in each row, and positions of their own."""
    at = torch.arange(length).expand(rows, length)
    begin = torch.arange(7, 7 + 5 * rows, 5)[:, None]
    document = (at >= begin).int()
    seen = (document[:, :, None] == document[:, None]) & torch.ones(length, length).tril().bool()
    return {"attention_mask": seen[:, None], "position_ids": at - begin * document}


@pytest.mark.parametrize(
    "changes", [{"hidden_size": 2048, "rank": 40}, {"intermediate_size": 10272}], ids=str
)
def test_bits_of_layers_that_adapters_of_are_taken_in_parts(changes: dict[str, int]) -> None:
    run_as_one_and_by_module(made(**changes).to(BF16))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["packed", "padded", "many tokens"])
def test_bits_of_other_batches(kind: str) -> None:
    model = made(intermediate_size=1536 if kind == "many tokens" else 96).to(BF16)
    given: dict[str, Any] = {
        "packed": packed(2, 36),
        "many tokens": {"rows": 4, "length": 203},
    }.get(kind, {"attention_mask": (torch.arange(36) >= torch.tensor([[9], [0]])).long()})
    run_as_one_and_by_module(model, **given)


def test_training_after_inference_with_the_same_shape() -> None:
    model = made().to(BF16)
    ids = torch.arange(3 * 47).view(3, 47) % 61  # a shape that no other test has
    with torch.inference_mode(), counted() as calls:
        model(input_ids=ids, use_cache=False)
        assert len(calls) == 2
    run_as_one_and_by_module(model, rows=3, length=47)


def test_batches_of_several_sizes_in_turn() -> None:
    model = made().to(BF16)
    sizes = [(1, 40), (3, 100), (2, 36), (1, 33)]
    ours = [results(model, *size) for size in sizes]
    with counted(whole=False):
        theirs = [results(model, *size) for size in sizes]
    for a, b in zip(ours, theirs, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, "autocast"])
def test_contexts(context: Any) -> None:
    model = made().to(BF16)
    ids = torch.arange(72).view(2, 36) % 61
    outs = []
    for whole in (True, False):
        inside = torch.autocast("cpu", BF16) if context == "autocast" else context()
        with counted(whole) as calls, inside:
            outs.append(model(ids, use_cache=False).logits)
        assert len(calls) == 2 * whole
    assert torch.equal(outs[0], outs[1])


def test_output_may_be_changed_in_place() -> None:
    model = made().to(BF16)
    layer_of(model).register_forward_hook(lambda module, args, out: out.mul_(2))
    run_as_one_and_by_module(model)


def test_wrong_features_are_refused() -> None:
    layer = layer_of(made().to(BF16))
    rotation = (torch.ones(1, 36, 32, dtype=BF16),) * 2
    with pytest.raises((ValueError, RuntimeError)), counted() as calls:
        layer(torch.zeros(2, 36, 32, dtype=BF16), position_embeddings=rotation)
    assert not calls


def test_compiled_layers_are_not_run_as_one() -> None:
    model = made().to(BF16)
    layer, x = layer_of(model), torch.randn(2, 36, 64).to(BF16)
    cos, sin = model.model.rotary_emb(x, torch.arange(36)[None])
    expected = layer(x, position_embeddings=(cos, sin))
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with counted() as calls:
        found = compiled(x, position_embeddings=(cos, sin))
    assert not calls
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_what_needs_no_gradient_gets_none() -> None:
    model = made().to(BF16)
    layer = layer_of(model)
    groups = ("q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj")
    x = torch.randn(2, 36, 64).to(BF16)
    cos, sin = model.model.rotary_emb(x, torch.arange(36)[None])
    every = [groups[first:] for first in range(len(groups) + 1)]
    every += [groups[:end] for end in range(1, len(groups))] + [("k_proj", "up_proj")]
    for some in every:  # of the groups that are trained
        trained = {name for group in some for name in group.split()}
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


class OwnPassThrough(PassThrough):
    pass


class OwnNorm(RmsNormQuantize):
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
    "proxy in 16 bits": lambda layer: setattr(
        layer.mlp.down_proj.B, "data", layer.mlp.down_proj.B.data.to(BF16)
    ),
    "quantiser of somebody else": _set("self_attn.o_proj", "quantize_input", OwnPassThrough()),
    "norm of somebody else": _set("mlp", "norm_quantize", OwnNorm(1e-6, E4M3, "power_of_two")),
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
        with counted(whole) as calls:
            found.append(model(ids, output_hidden_states=True).hidden_states)
        assert not calls  # transformers looks at attentions, too
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


@pytest.mark.parametrize("sections", [False, True])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_memory_is_enough_for_any_number_of_threads(
    count: int, sections: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written behind it, or read before it is written; also in sections of rows."""
    model = made(intermediate_size=1536 if sections else 96).to(BF16)
    sizes = {"rows": 4, "length": 203} if sections else {}
    expected = results(model, **sizes)
    behind, given = 4096, []

    def guarded(size: int) -> Tensor:
        given.append(torch.full((size + behind,), torch.nan, dtype=BF16))
        given[-1][size:] = 1.5
        return given[-1]

    monkeypatch.setattr(products, "memory", guarded)
    with threads(count):
        found = results(model, **sizes)
    assert len(given) == 4
    assert all((room[-behind:] == 1.5).all() for room in given)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

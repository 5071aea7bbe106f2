"""Decoder layers with groups: what transformers' own give, under the same names."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from falqon import blocks
from falqon.blocks import Grouped, GroupedAttention, GroupedMlp, group_blocks
from falqon.errors import InputError
from falqon.kernels import wide
from falqon.kernels.native import build
from falqon.kernels.operands import are_consecutive
from falqon.linear import MeldedLinear
from falqon.meld import meld, melded_layers
from falqon.moments import InputMoments
from falqon.precision import FalqonPrecision
from falqon.recipe import RECIPES, Fp8Recipe, MeldRecipe

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"attention_bias": True}),
    "mistral": (MistralConfig, {"sliding_window": 6}),
    "qwen2": (
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
    ),
    "qwen3": (Qwen3Config, {}),
}
DELAYED = Fp8Recipe(activations="per_tensor", gradients="per_tensor", scaling="delayed")
KINDS = {**RECIPES, "delayed": DELAYED}


def make_base(family: str = "llama", **changes: Any) -> PreTrainedModel:
    config_class, own = FAMILIES[family]
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
    config = config_class(
        vocab_size=61,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=None,
        pad_token_id=0,
        **({"attn_implementation": "sdpa"} | sizes | own | changes),
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape)
            )  # norms and biases are all alike else
    return model


def make(
    family: str = "llama",
    recipe: str = "default",
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model in groups and one by one."""
    grouped, single = _melded(family, recipe, tuple(changes.items()))
    return copy.deepcopy(grouped).to(dtype), copy.deepcopy(single).to(dtype)


@functools.cache
def _melded(
    family: str, recipe: str, changes: tuple[tuple[str, Any], ...]
) -> tuple[PreTrainedModel, PreTrainedModel]:
    base = make_base(family, **dict(changes))
    models = []
    for groups in (True, False):
        model = copy.deepcopy(base)
        report = meld(model, KINDS[recipe], MeldRecipe(rank=4, groups=groups))
        assert len(report.grouped) == (4 if groups else 0)
        models.append(model)
    return models[0], models[1]


def tokens(length: int = 12) -> Tensor:
    return torch.randint(1, 61, (2, length), generator=torch.Generator().manual_seed(3))


def groups_of(model: nn.Module) -> Iterator[Grouped]:
    return (m for m in model.modules() if isinstance(m, Grouped))


def is_tied(model: nn.Module) -> bool:
    found = [are_consecutive([layer.codes for layer in g.group()]) for g in groups_of(model)]
    assert found
    return all(found)


def gradients(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(ids).logits
    logits.float().square().mean().backward()
    found = {n: layer.B.grad.clone() for n, layer in melded_layers(model).items()}
    model.zero_grad()
    return logits, found


def signal_to_noise(result: Tensor, reference: Tensor) -> float:
    """In dB."""
    signal, wanted = result.detach().double(), reference.detach().double()
    return float(10 * torch.log10(wanted.square().sum() / (signal - wanted).square().sum()))


# -- same numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", kind) for kind in KINDS] + [(f, "default") for f in ("mistral", "qwen2", "qwen3")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_is_ungrouped(family: str, recipe: str, dtype: torch.dtype) -> None:
    grouped, single = make(family, recipe, dtype)
    if dtype == torch.bfloat16:  # the last norm's gradient has a test of its own
        single.model.norm.__class__ = type(grouped.model.norm)
    logits, found = gradients(grouped, tokens())
    wanted_logits, wanted = gradients(single, tokens())
    assert torch.equal(logits, wanted_logits)
    assert found.keys() == wanted.keys()
    # Behind the last sum of gradients nothing has been rounded in another way yet.
    last = [n for n in found if "layers.1.mlp" in n]
    assert len(last) == 3
    for name in last:
        assert torch.equal(found[name], wanted[name])
        assert found[name].any()
    # Before it, sums in bfloat16 differ by their roundings, and then E5M2 codes do; scales that are
    # not powers of two round every gradient anew, 22.5 dB below it. A path back through both layers
    # has about six such roundings: 8 dB. A wrong factor would leave 6 dB and less.
    bound = 14.0 if dtype == torch.bfloat16 or recipe == "paper" else 60.0
    for name, gradient in found.items():
        assert signal_to_noise(gradient, wanted[name]) > bound, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_generation_with_a_cache(family: str, attention: str) -> None:
    grouped, single = make(family, attn_implementation=attention)
    ids = tokens(9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padded on the left
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    answer = grouped.eval().generate(ids, **arguments)
    assert torch.equal(answer, single.eval().generate(ids, **arguments))
    assert torch.equal(answer, grouped.generate(ids, use_cache=False, **arguments))
    assert len(answer[0].unique()) > 3


def test_recorded_states_and_attentions() -> None:
    grouped, single = make(attn_implementation="eager")
    wanted = single(tokens(), output_hidden_states=True, output_attentions=True)
    found = grouped(tokens(), output_hidden_states=True, output_attentions=True)
    for key, number in (("hidden_states", 3), ("attentions", 2)):
        assert len(found[key]) == number
        assert all(torch.equal(a, b) for a, b in zip(found[key], wanted[key], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_checkpointing_changes_nothing(dtype: torch.dtype) -> None:
    model, _ = make(dtype=dtype)
    model.train()
    model.config.use_cache = False  # as checkpointing does: attention with a cache is another
    logits, wanted = gradients(model, tokens())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls: list[int] = []
    model.model.layers[0].mlp.norm_quantize.register_forward_hook(lambda *_: calls.append(1))
    again, found = gradients(model, tokens())
    assert calls == [1, 1]  # in the backward pass once more
    assert torch.equal(logits, again)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_pending_changes_act_in_groups() -> None:
    grouped, single = make()
    for model in (grouped, single):
        for seed, layer in enumerate(melded_layers(model).values()):
            layer.live = True
            generator = torch.Generator().manual_seed(seed)
            layer.B.data = 0.5 * torch.randn(layer.B.shape, generator=generator)
    dead = make()[0](tokens()).logits
    logits, found = gradients(grouped, tokens())
    wanted_logits, wanted = gradients(single, tokens())
    assert torch.equal(logits, wanted_logits)
    assert not torch.equal(logits, dead)
    for name in wanted:  # float32 sums in another order; an E5M2 code in many may differ for it
        assert signal_to_noise(found[name], wanted[name]) > 60, name


def test_moments_are_those_of_single_layers() -> None:
    sums = []
    for model in make(dtype=torch.bfloat16):
        layers = melded_layers(model)
        with torch.no_grad(), InputMoments(layers) as moments:
            model(tokens())
        sums.append(({n: moments.owner(n) for n in layers}, {n: moments.moment(n) for n in layers}))
    (owners, found), (wanted_owners, wanted) = sums
    assert owners == wanted_owners
    assert len(set(owners.values())) == 2 * 4  # qkv, o, gate and up, down
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert all(moment.any() for moment in found.values())


@pytest.mark.parametrize("widens", [True, False])
def test_compiles_without_a_break(widens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FALQON_NATIVE", "off")  # what is traced is plain torch
    monkeypatch.setattr(wide, "WIDENS", widens)
    model, _ = make(dtype=torch.bfloat16)
    layer = model.model.layers[1]
    x = torch.randn(2, 5, 32).bfloat16()
    rotation = model.model.rotary_emb(x, position_ids=torch.arange(5)[None])

    def run(call: Any) -> tuple[Tensor, ...]:
        given = x.clone().requires_grad_()
        y = call(given, position_embeddings=rotation)
        y.backward(torch.ones_like(y))
        grads = [m.B.grad.clone() for m in melded_layers(layer).values()]
        layer.zero_grad()
        assert given.grad is not None
        return y.detach(), given.grad, *grads

    eager = run(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one, other in zip(run(compiled), eager, strict=True):
        assert torch.equal(one, other)
    # Codes that were moved since are not missed.
    layer.self_attn.k_proj.codes.data = torch.zeros_like(layer.self_attn.k_proj.codes)
    assert torch.equal(run(compiled)[0], run(layer)[0])
    assert not torch.equal(run(compiled)[0], eager[0])


# -- same names ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_loading(family: str) -> None:
    grouped, single = make(family)
    names = list(single.state_dict())
    assert list(grouped.state_dict()) == names
    assert [n for n, _ in grouped.named_parameters()] == [n for n, _ in single.named_parameters()]
    assert list(melded_layers(grouped)) == list(melded_layers(single))
    wanted = single(tokens()).logits
    for layer in melded_layers(single).values():
        layer.codes.data.bitwise_xor_(0x80)  # the other sign, in every place
    changed = single(tokens()).logits
    assert not torch.equal(changed, wanted)
    file = io.BytesIO()
    torch.save(single.state_dict(), file)
    file.seek(0)
    grouped.load_state_dict(torch.load(file, weights_only=True))
    assert is_tied(grouped)
    assert torch.equal(grouped(tokens()).logits, changed)
    _, fresh = make(family)
    fresh.load_state_dict(grouped.state_dict())
    assert torch.equal(fresh(tokens()).logits, changed)


def test_parameters_that_are_assigned_are_used() -> None:
    grouped, single = make()
    for layer in melded_layers(single).values():
        layer.codes.data.bitwise_xor_(0x80)
    grouped.load_state_dict(single.state_dict(), assign=True)
    assert not is_tied(grouped)
    assert torch.equal(grouped(tokens()).logits, single(tokens()).logits)
    grouped.to(torch.float32)
    assert is_tied(grouped)


def test_casts_and_copies_keep_the_tie() -> None:
    model, _ = make()
    assert is_tied(model)
    assert is_tied(model.to(torch.bfloat16))
    other = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (other, torch.load(file, weights_only=False)):
        assert is_tied(copied)
        assert torch.equal(copied(tokens()).logits, model(tokens()).logits)
    before = model(tokens()).logits
    for layer in melded_layers(other).values():
        layer.codes.data.zero_()
    assert torch.equal(model(tokens()).logits, before)
    assert not torch.equal(other(tokens()).logits, before)
    exact, _ = make(recipe="none")
    assert is_tied(exact.to(torch.bfloat16))


# -- what is swapped, and what is not -----------------------------------------------------------


def test_report_and_classes() -> None:
    model = make_base()
    report = meld(model, None, MeldRecipe(rank=4))
    assert report.grouped["model.layers.1.self_attn"] == ("q_proj", "k_proj", "v_proj")
    assert report.grouped["model.layers.0.mlp"] == ("gate_proj", "up_proj")
    assert report.not_grouped == {}
    assert "run as one: gate_proj/up_proj, q_proj/k_proj/v_proj, 4 groups" in str(report)
    layer = model.model.layers[0]
    assert isinstance(layer, LlamaDecoderLayer)
    assert isinstance(layer.self_attn, LlamaAttention)
    again = meld(model, None, MeldRecipe(rank=4))
    assert (again.grouped, again.not_grouped) == ({}, {})
    assert model.model.layers[0] is layer


def test_layers_that_are_not_all_melded() -> None:
    base, ids = make_base(), tokens()
    wanted = copy.deepcopy(base)
    exclude = ("*.k_proj", "*layers.0.mlp.down_proj")
    report = meld(base, None, MeldRecipe(rank=4, exclude=exclude))
    meld(wanted, None, MeldRecipe(rank=4, exclude=exclude, groups=False))
    assert list(report.grouped) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert report.not_grouped == {
        f"model.layers.{i}.self_attn": "not all of its layers are melded" for i in range(2)
    }
    assert "not grouped: model.layers.0.self_attn (not all" in str(report)
    assert torch.equal(base(ids).logits, wanted(ids).logits)


def test_another_activation_is_not_fused() -> None:
    grouped, single = make(hidden_act="gelu")
    mlp = grouped.model.layers[0].mlp
    assert isinstance(mlp, GroupedMlp)
    assert mlp.swiglu_quantize is None
    assert torch.equal(grouped(tokens()).logits, single(tokens()).logits)


def test_norm_and_activation_are_fused_with_one_scale_a_token_or_none() -> None:
    for recipe in KINDS:
        model, _ = make(recipe=recipe)
        for block in groups_of(model):
            fused = recipe in ("default", "weights")
            assert (block.norm_quantize is not None) == fused
            if isinstance(block, GroupedMlp):
                assert (block.swiglu_quantize is not None) == fused
    model, _ = make()
    called: list[str] = []
    layer = model.model.layers[0]
    for name, module in (
        ("norm", layer.self_attn.norm_quantize),
        ("act", layer.mlp.swiglu_quantize),
    ):
        module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(tokens())
    assert called == ["norm", "act"]


def test_hooks_see_what_they_saw() -> None:
    grouped, single = make()
    seen: dict[str, list[Tensor]] = {"grouped": [], "single": []}
    for key, model in (("grouped", grouped), ("single", single)):
        layer = model.model.layers[1]

        def note(_: nn.Module, args: Any, given: Any, key: str = key) -> None:
            seen[key].append(args[0] if args else given["hidden_states"])

        for module in (layer.self_attn, layer.mlp, layer.input_layernorm, layer.mlp.down_proj):
            module.register_forward_pre_hook(note, with_kwargs=True)
        layer.mlp.act_fn.register_forward_pre_hook(note, with_kwargs=True)
        model(tokens())
    assert len(seen["single"]) == 5
    assert all(torch.equal(a, b) for a, b in zip(*seen.values(), strict=True))


def test_layers_replaced_later_are_called() -> None:
    model, _ = make()

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    before = model(tokens()).logits
    mlp = model.model.layers[1].mlp
    mlp.up_proj = Doubled(mlp.up_proj)
    assert not torch.equal(model(tokens()).logits, before)


def test_unknown_classes_and_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(LlamaDecoderLayer):
        pass

    model = make_base()
    model.model.layers[0].__class__ = Other
    report = meld(model, None, MeldRecipe(rank=4))
    assert set(report.grouped) == {"model.layers.1.self_attn", "model.layers.1.mlp"}

    def forward(self: Any, hidden_states: Tensor, rotation: Tensor) -> None: ...

    monkeypatch.setattr(LlamaAttention, "forward", forward)
    report = meld(make_base(), None, MeldRecipe(rank=4))
    assert not report.grouped
    reason = report.not_grouped["model.layers.0"]
    assert "LlamaAttention.forward of transformers" in reason
    assert "(hidden_states, rotation)" in reason


def test_transformers_without_what_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(blocks, "group_blocks")
    model = make_base()
    report = meld(model, None, MeldRecipe(rank=4))
    assert len(report.converted) == 14
    assert "lacks what is needed" in report.not_grouped["model"]
    assert not any(isinstance(m, GroupedAttention) for m in model.modules())


def test_a_decoder_layer_alone() -> None:
    layer = make_base().model.layers[0]
    meld(layer, None, MeldRecipe(rank=4, groups=False))
    grouped, refused = group_blocks(layer)
    assert (set(grouped), refused) == ({"self_attn", "mlp"}, {})
    assert isinstance(layer.mlp, GroupedMlp)


# -- in training --------------------------------------------------------------------------------


def train(groups: bool, update: str) -> tuple[FalqonPrecision, PreTrainedModel, list[float]]:
    plugin = FalqonPrecision(rank=4, update=update, dtype="fp32", groups=groups)
    model = make_base()
    plugin.convert(model)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=0.02, eps=1e-6
    )
    losses = []
    for step in range(3):
        ids = tokens(12 + step)
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert plugin.proxy_update is not None
        plugin.proxy_update.step(step)
        losses.append(loss.item())
    return plugin, model, losses


@pytest.mark.parametrize("update", ["paper", "anchored", "compensated"])
def test_training_writes_the_same_codes(update: str) -> None:
    (plugin, model, losses), (_, single, wanted) = train(True, update), train(False, update)
    base = make_base()
    meld(base, None, MeldRecipe(rank=4))
    written = differing = total = 0
    for one, other, start in zip(
        *(melded_layers(m).values() for m in (model, single, base)), strict=True
    ):
        written += int((one.codes != start.codes).sum())
        differing += int((one.codes != other.codes).sum())
        total += one.codes.numel()
    assert written > total / 100 or update == "compensated"  # which waits eight steps
    # Gradients are equal but for float32 sums, so a code differs only if it was on the verge.
    assert differing <= total / 1000
    assert losses == pytest.approx(wanted, rel=1e-5)
    assert losses[0] == wanted[0]
    assert is_tied(model)
    assert plugin.report is not None
    assert len(plugin.report.grouped) == 4


def test_checkpoints_say_whether_there_were_groups() -> None:
    grouped, single = FalqonPrecision(rank=4), FalqonPrecision(rank=4, groups=False)
    assert grouped.settings()["meld"]["groups"] is True
    with pytest.raises(InputError, match=r"meld\.groups \(checkpoint True, configuration False\)"):
        single.check_settings(grouped.state_dict())
    with pytest.raises(InputError, match=r"groups is 'yes'; write true or false"):
        FalqonPrecision(groups="yes")  # type: ignore[arg-type]


def test_members_stay_layers_of_their_own() -> None:
    model, _ = make()
    layer = model.model.layers[0].self_attn.k_proj
    assert type(layer) is MeldedLinear
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), make()[1].model.layers[0].self_attn.k_proj(x))


@pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_in_one_operation(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grouped, single = make(family, dtype=torch.bfloat16)
    norm, theirs = grouped.model.norm, single.model.norm
    assert isinstance(norm, type(theirs)) and isinstance(norm, blocks.FinalRMSNorm)
    torch.manual_seed(0)
    x = torch.randn(3, 5, 32).bfloat16().requires_grad_()
    grad = torch.randn(3, 5, 32).bfloat16()
    results = []
    for module in (norm, theirs):
        module.requires_grad_(False)
        out = module(x)
        results.append((out, *torch.autograd.grad(out, x, grad)))
    (ours, of_ours), (out, of_theirs) = results
    assert type(ours.grad_fn).__name__ == "_RmsNormBackward" and torch.equal(ours, out)
    wide = x.detach().double().requires_grad_()
    exact = wide * (wide.square().mean(-1, keepdim=True) + norm.variance_epsilon).rsqrt()
    (of_exact,) = torch.autograd.grad(exact * norm.weight.double(), wide, grad.double())
    errors = [float((g - of_exact).norm() / of_exact.norm()) for g in (of_ours, of_theirs)]
    assert errors[0] < 0.002 < errors[1] < 0.01
    assert torch.equal(norm(x).mul_(2.0), out * 2.0)  # as theirs, it may be changed in place
    # Whatever it is not made for goes the usual way.
    norm.requires_grad_(True)
    assert type(norm(x).grad_fn).__name__ == "MulBackward0"
    norm.requires_grad_(False)
    assert torch.equal(norm(x.detach()), out) and not norm(x.detach()).requires_grad
    monkeypatch.setenv("FALQON_NATIVE", "off")
    assert type(norm(x).grad_fn).__name__ == "MulBackward0"
    assert all(isinstance(m, blocks.FinalRMSNorm) is (m is norm) for m in grouped.modules())

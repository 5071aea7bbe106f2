"""How decoder layers run in training: recomputed by a budget, compiled."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from falqon import ShardedStrategy
from falqon.checkpoint import read_checkpoint, training_hash
from falqon.errors import InputError
from falqon.precision import FalqonPrecision
from lit_modules import LitCausalLM, layers
from lit_modules.layers import ActivationBudget, compile_layers, layers_of, recompute

COUNT = 6
TOKENS = torch.arange(24).reshape(2, 12)
INPUTS = COUNT * 24 * 32 * 2
"""Bytes of the layers' inputs."""


@pytest.fixture(scope="module")
def melded() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=COUNT,
        num_attention_heads=4,
        num_key_value_heads=2,
        dtype="bfloat16",
    )
    model = LlamaForCausalLM(config)
    FalqonPrecision(rank=4).convert(model, device="cpu")
    return model.train()


def step(model: nn.Module, tokens: Tensor = TOKENS) -> list[Tensor]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def bytes_of_a_layer(melded: LlamaForCausalLM) -> int:
    model = deepcopy(melded)
    budget = ActivationBudget(model, 2**40)
    step(model)
    return budget.layer_bytes


@pytest.mark.parametrize("room", [0, 1, 2.5, 4, COUNT, COUNT + 3])
def test_a_budget_keeps_what_fits_and_changes_nothing(
    melded: LlamaForCausalLM, room: float
) -> None:
    wanted = step(deepcopy(melded))
    each = bytes_of_a_layer(melded)
    model = deepcopy(melded)
    budget = ActivationBudget(model, INPUTS + int(room * each))
    for found, other in zip(step(model), wanted, strict=True):
        assert torch.equal(found, other)
    kept = max(1, min(COUNT, int(room)))
    assert budget.kept == kept
    again = [layer.gradient_checkpointing for layer in budget.layers]
    assert again == [False] + [True] * (COUNT - kept) + [False] * (kept - 1)


def test_the_count_is_of_what_stays_alive(melded: LlamaForCausalLM) -> None:
    """Against the tensors that hang on the graph of a layer's output."""
    layer = deepcopy(melded).model.layers[0]
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    x = torch.randn(2, 12, 32).bfloat16()
    rotation = melded.model.rotary_emb(x, position_ids=torch.arange(12)[None])
    output = layer(x, position_embeddings=rotation)
    sizes: dict[int, int] = {}
    waiting, done = [output.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in done:
            continue
        done.add(node)
        waiting += [other for other, _ in node.next_functions]
        saved = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for tensor in [*saved, *getattr(node, "saved_tensors", ())]:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                sizes[storage.data_ptr()] = storage.nbytes()
    wanted = sum(size for place, size in sizes.items() if place not in own)
    assert bytes_of_a_layer(melded) == wanted > 0


def test_a_budget_follows_the_batch_and_leaves_evaluation_alone(melded: LlamaForCausalLM) -> None:
    model = deepcopy(melded)
    budget = ActivationBudget(model, INPUTS + 3 * bytes_of_a_layer(melded))
    step(model)
    assert budget.kept == 3
    step(model, TOKENS[:1, :6])
    assert budget.kept == COUNT
    model.eval()
    with torch.no_grad():
        model(input_ids=TOKENS.repeat(4, 1))
    assert budget.kept == COUNT
    model.train()
    step(model)
    assert budget.kept == 3


@pytest.mark.parametrize("how", ["kept", "recomputed", "budget"])
def test_layers_are_compiled_once_for_all(
    melded: LlamaForCausalLM, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FALQON_NATIVE", "off")  # what is traced is plain torch
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend="aot_eager"))
    wanted = step(deepcopy(melded))
    torch._dynamo.reset()
    counters.clear()
    model = deepcopy(melded)
    names = list(model.state_dict())
    if how == "recomputed":
        recompute(model)
    if how == "budget":
        ActivationBudget(model, INPUTS + 2 * bytes_of_a_layer(melded))
    assert compile_layers(model)
    assert list(model.state_dict()) == names
    for found, other in zip(step(model), wanted, strict=True):
        assert torch.equal(found, other)
    # The first layer's input needs no gradient, and with a budget it is not run again.
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    before = counters["stats"]["unique_graphs"]
    step(model)
    model.eval()
    with torch.no_grad():
        model(input_ids=TOKENS[:, :5])
    assert counters["stats"]["unique_graphs"] == before
    assert not counters["graph_break"]


def test_without_a_compiler_layers_stay_as_they_are(
    melded: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "compiler", lambda: None)
    model = deepcopy(melded)
    kinds = [type(layer) for layer in layers_of(model)]
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler"):
        assert not compile_layers(model)
    assert [type(layer) for layer in layers_of(model)] == kinds


def test_layers_that_differ_have_no_budget(melded: LlamaForCausalLM) -> None:
    model = deepcopy(melded)
    model.model.layers[2].mlp.more = nn.Parameter(torch.zeros(1))
    with pytest.raises(InputError, match="the layers of LlamaForCausalLM are not all alike"):
        ActivationBudget(model, 2**30)


def test_an_interrupted_layer_leaves_no_count_behind(melded: LlamaForCausalLM) -> None:
    model = deepcopy(melded)
    budget = ActivationBudget(model, 2**40)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = budget.layers[0].mlp.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        step(model)
    handle.remove()
    step(model)
    assert not budget._count.running and not budget._count._packed
    packed: list[Tensor] = []
    budget._count._pack = packed.append  # type: ignore[method-assign, assignment]
    torch.ones(2, requires_grad=True).exp()
    assert not packed


def test_refusals(tokenizer_dir: str) -> None:
    with pytest.raises(InputError, match="Linear has no layers"):
        layers_of(nn.Linear(2, 2))
    with pytest.raises(InputError, match="activation_gib 1.0 has to be positive, and replaces"):
        LitCausalLM(tokenizer_dir, activation_gib=1.0, gradient_checkpointing=True)
    with pytest.raises(InputError, match="activation_gib 0 has to be positive"):
        LitCausalLM(tokenizer_dir, activation_gib=0)
    strategy = ShardedStrategy()
    for option in ({"activation_gib": 1.0}, {"compile_layers": True}):
        module = LitCausalLM(tokenizer_dir, **option)  # type: ignore[arg-type]
        module._trainer = SimpleNamespace(strategy=strategy)  # type: ignore[assignment]
        with pytest.raises(InputError, match="for one device or ddp"):
            module.setup("fit")


@pytest.mark.parametrize("option", [{"activation_gib": 1e-5}, {"compile_layers": True}])
def test_a_training_keeps_its_bits(
    cli: Callable,
    tiny_run: Callable,
    tmp_path: Path,
    option: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FALQON_NATIVE", "off")
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: compiled(f, backend="aot_eager"))
    torch._dynamo.reset()
    digests = []
    for name, extra in (("with", option), ("without", {})):
        config = tiny_run()
        config["model"]["init_args"] |= extra
        config["trainer"]["default_root_dir"] = str(tmp_path / name)
        cli("fit", config, "--trainer.max_steps=3")
        state = read_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt")
        digests.append(training_hash(state))
    assert digests[0] == digests[1]

"""Runs one training step of a real model on the meta device and notes what it would launch.

Linear layers and attention are stood in for by their listings (`benchmarks.step_ops`,
`benchmarks.step_fused`); everything else is the modules of transformers themselves, whose eager
kernels are recorded as they are called, and so are the bytes that are alive at every moment.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.modeling_layers import GradientCheckpointingLayer

from benchmarks import step_fused, step_ops
from benchmarks.devices import Precision
from benchmarks.step_ops import Listing, Op, Settings
from falqon.linear import MeldedLinear
from falqon.meld import melded_layers, targets
from falqon.recipe import MeldRecipe, fp8_recipe
from lit_modules.loss import _CHUNK, _summed_cross_entropy

CONFIGS: dict[str, dict[str, int]] = {
    "7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "13B": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    },
}
"""Shapes of LLaMA (Touvron et al., arXiv:2302.13971, table 2); 32,000 tokens of vocabulary."""

_GATHERS = {torch.ops.aten.embedding.default, torch.ops.aten.nll_loss_forward.default}
_PRECISION: dict[torch.dtype, Precision] = {
    torch.bfloat16: "bf16",
    torch.float16: "bf16",
    torch.float32: "fp32",
}


class Recorder(TorchDispatchMode):
    """Notes the kernels and the living bytes of what runs under it.

    Args:
        vocabulary: tensors that are so wide belong to the head and the loss.

    Attributes:
        ops: how often each ran.
        phase: of the ops to come.
        live, peak: bytes of tensors made under it that are alive, and the most there were.
    """

    active: list[Recorder] = []  # noqa: RUF012

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.ops: Counter[Op] = Counter()
        self.phase = "forward"
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __enter__(self) -> Recorder:
        Recorder.active.append(self)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Recorder.active.pop()
        super().__exit__(*error)

    def add(self, ops: tuple[Op, ...] | list[Op], forward: bool = False) -> None:
        """Note ops.

        A forward pass within the backward one is a checkpoint's. Of kernels that are not known to
        be a `forward` grad mode tells: autograd runs backward without it.
        """
        again = self.phase == "backward" and (forward or torch.is_grad_enabled())
        phase = "recompute" if again else self.phase
        for op in ops:
            self.ops[replace(op, phase=phase)] += 1

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        held = {t.untyped_storage()._cdata for t in inputs}
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in held]
        for tensor in fresh:
            self._follow(tensor)
        launches = outputs and (fresh or func._schema.is_mutable)
        if launches and not func.__name__.startswith(("empty", "new_empty", "lift_fresh")):
            self.add([self._op(func, inputs, outputs, args, kwargs, result)])
        return result

    def _follow(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def _op(
        self,
        func: Any,
        inputs: list[Tensor],
        outputs: list[Tensor],
        args: Any,
        kwargs: Any,
        result: Any,
    ) -> Op:
        read = sum(_bytes(t) for t in {id(t): t for t in inputs}.values())
        written = sum(_bytes(t) for t in outputs)
        if func in _GATHERS:
            read = written + _bytes(inputs[1])
        formula = flop_registry.get(func.overloadpacket)
        flops = formula(*args, **kwargs, out_val=result) if formula else 0
        kind = "gemm" if flops else "elementwise"
        if self.vocabulary and any(
            t.dim() > 1 and t.shape[-1] == self.vocabulary for t in inputs + outputs
        ):
            kind = "head and loss"
        precision = _PRECISION.get(outputs[0].dtype, "fp32") if flops else "fp32"
        return Op(func.__name__, kind, read, written, flops, precision)


def _bytes(tensor: Tensor) -> int:
    """Of a view that repeats elements only what is stored."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


class _Listed(torch.autograd.Function):
    """Makes and keeps what a listing says, and notes its ops."""

    @staticmethod
    def forward(ctx: Any, listing: Listing, shape: tuple[int, ...], *tensors: Tensor) -> Tensor:
        recorder, x = Recorder.active[-1], tensors[0]
        recorder.add(listing.forward, forward=True)
        _scratch(x, listing)
        out = x.new_empty(shape)
        saved = [x.new_empty(s, dtype=dtype) for s, dtype in listing.saved]
        ctx.save_for_backward(*((x,) if listing.keeps_input else ()), *saved)
        ctx.listing, ctx.like = listing, [(t.shape, t.dtype) for t in tensors]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        kept = ctx.saved_tensors  # under a checkpoint this is what computes them again
        recorder, listing = Recorder.active[-1], ctx.listing
        recorder.add(listing.backward)
        needed = ctx.needs_input_grad[2]
        if needed:
            recorder.add(listing.grad_input)
        _scratch(grad, listing)
        del kept
        grads: list[Tensor | None] = [None] * len(ctx.like)
        for i, (shape, dtype) in enumerate(ctx.like):
            # Gradients of parameters are counted with the optimizer's state.
            if needed and ctx.needs_input_grad[i + 2] and len(shape) > 2:
                grads[i] = grad.new_empty(shape, dtype=dtype)
        return None, None, *grads


def _scratch(like: Tensor, listing: Listing) -> None:
    like.new_empty(listing.scratch, dtype=torch.uint8)


class Listed(nn.Module):
    """A linear layer that only notes what it would do.

    Args:
        layer: the real layer, of which it keeps shapes and parameters.
        listing: its kernels.
    """

    def __init__(self, layer: nn.Module, listing: Listing) -> None:
        super().__init__()
        self.layer, self.listing = layer, listing

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        shape = (*x.shape[:-1], self.layer.out_features)
        return _Listed.apply(self.listing, shape, x, self.layer.B)


class FusedLayer(GradientCheckpointingLayer):
    """A decoder layer that only notes what its fused kernels would do."""

    def __init__(self, layer: nn.Module, listing: Listing) -> None:
        super().__init__()
        self.layer, self.listing = layer, listing
        self.proxy = next(p for p in layer.parameters() if p.requires_grad)

    def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
        """[b, s, h] to the same."""
        return _Listed.apply(self.listing, hidden_states.shape, hidden_states, self.proxy)


def _listed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    return _Attention.apply(query, key, value), None


class _Attention(torch.autograd.Function):
    """Flash attention by its listing: keeps q, k, v, o and the logsumexp."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, dim = query.shape
        listing = step_fused.attention(batch, tokens, heads, dim)
        Recorder.active[-1].add(listing.forward, forward=True)
        out, lse = (query.new_empty(s, dtype=dtype) for s, dtype in listing.saved)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.listing = listing
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        query, key, value, *_ = ctx.saved_tensors
        Recorder.active[-1].add(ctx.listing.grad_input)
        return tuple(torch.empty_like(t) for t in (query, key, value))


AttentionInterface.register("listed", _listed_attention)


def build(size: str, layers: int | None = None) -> LlamaForCausalLM:
    """LLaMA of one of `CONFIGS` on the meta device, bfloat16, with `layers` decoder layers."""
    shapes: dict[str, Any] = dict(CONFIGS[size])
    if layers is not None:
        shapes["num_hidden_layers"] = layers
    config = LlamaConfig(
        **shapes, vocab_size=32000, tie_word_embeddings=False, use_cache=False, dtype="bfloat16"
    )
    config._attn_implementation = "listed"
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    nn.Module.to(model, torch.bfloat16)
    return model


def meld_on_meta(model: nn.Module, rank: int, recipe: str) -> dict[str, MeldedLinear]:
    """Swap the linears that falqon melds for melded layers without data; freeze the rest."""
    for name, linear in targets(model, MeldRecipe(rank=rank)).items():
        layer = MeldedLinear(
            linear.in_features,
            linear.out_features,
            rank,
            bias=linear.bias is not None,
            recipe=fp8_recipe(recipe),
            device="meta",
        )
        model.set_submodule(name, layer)
    layers = melded_layers(model)
    proxies = {id(layer.B) for layer in layers.values()}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in proxies)
    return layers


def _loss(model: LlamaForCausalLM, tokens: Tensor, chunked: bool) -> Tensor:
    """transformers' own loss, or that of `lit_modules.loss`, in chunks and with all tokens."""
    if not chunked:
        return model(input_ids=tokens, labels=tokens).loss
    logits = model(input_ids=tokens).logits.flatten(0, 1)
    parts = zip(logits.split(_CHUNK), tokens.flatten().split(_CHUNK), strict=True)
    losses = [checkpoint(_summed_cross_entropy, *part, use_reentrant=False) for part in parts]
    return torch.stack(losses).sum()


@dataclass
class Step:
    """What one training step is made of.

    Attributes:
        ops: how often each kernel ran.
        memory: bytes by part: `weights`, `adapters`, `optimizer` (gradients and two moments),
            `activations` (alive when the forward pass ends) and `working` (what there is on top of
            them at the worst moment).
        trainable: parameters that are.
    """

    ops: Counter[Op]
    memory: dict[str, int]
    trainable: int


LINEARS: dict[str, Callable[..., Listing]] = {
    "lora": step_ops.lora,
    "qlora": step_ops.qlora,
    "torchao": step_ops.torchao,
    "torchao_dw": lambda layer, s: step_ops.torchao(layer, s, frozen_gradient=True),
}
"""Listing of one linear layer by method; FALQON's are of melded layers."""


def _prepare(model: LlamaForCausalLM, method: str, settings: Settings) -> None:
    if method in LINEARS:
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for name, linear in targets(model, MeldRecipe(rank=settings.rank)).items():
            frozen = step_ops.Frozen(linear, settings.rank, "nf4" if method == "qlora" else "bf16")
            model.set_submodule(name, Listed(frozen, LINEARS[method](frozen, settings)))
        return
    layers = meld_on_meta(model, settings.rank, "paper" if method == "paper" else "default")
    if method == "paper":
        for name, layer in layers.items():
            model.set_submodule(name, Listed(layer, step_ops.melded(layer, settings)))
        return
    for i, decoder in enumerate(model.model.layers):
        listing = step_fused.fused_layer(decoder, settings, live=method == "falqon_live")
        model.model.layers[i] = FusedLayer(decoder, listing)


def update_ops(model: nn.Module, settings: Settings, fused: bool) -> list[Op]:
    """Clipping, AdamW and, for melded layers, the row update; one kernel a tensor."""

    def update(name: str, n: int, read: int, written: int, launches: int) -> Op:
        return step_ops.elementwise(name, n, read, written, launches, kind="optimizer")

    ops = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            ops.append(update("norm and clip", parameter.numel(), 8, 4, 2))
            ops.append(update("AdamW", parameter.numel(), 16, 12, 1))
    for layer in (m for m in model.modules() if isinstance(m, MeldedLinear)):
        out, r, n_in = layer.out_features, layer.rank, layer.in_features
        k = min(settings.rows, out)
        ops.append(update("select rows", out * r, 4, 0, 3))
        read = k * n_in + r * n_in + 4 * k * r
        # Unfused: A and rows decoded, multiplied, added, cast and put back, in float32.
        extra = 0 if fused else 8 * (r * n_in + 3 * k * n_in)
        flops, launches = 2 * k * r * n_in, 1 if fused else 7
        ops.append(Op("write rows", "optimizer", read + extra, k * n_in, flops, "fp32", launches))
    return ops


def record(size: str, method: str, settings: Settings, checkpointing: bool) -> Step:
    """One training step of a method.

    All decoder layers but the first are alike (the first one's input needs no gradient), so that
    what a third layer adds to two is added once for each layer that is left.

    Args:
        size: a name in `CONFIGS`.
        method: a name in `LINEARS`, `paper`, `falqon` or `falqon_live`.
        settings: of the step.
        checkpointing: keep only each decoder layer's input and compute the rest again.
    """
    two, three = (record_layers(size, method, settings, checkpointing, n) for n in (2, 3))
    more = CONFIGS[size]["num_hidden_layers"] - 2
    ops = Counter({op: two.ops[op] + more * (n - two.ops[op]) for op, n in three.ops.items()})
    memory = {k: v + more * (three.memory[k] - v) for k, v in two.memory.items()}
    return Step(ops, memory, two.trainable + more * (three.trainable - two.trainable))


def record_layers(
    size: str, method: str, settings: Settings, checkpointing: bool, layers: int | None
) -> Step:
    """`record` of a model with so many decoder layers (None: all), each of them run."""
    model = build(size, layers)
    _prepare(model, method, settings)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": False}
        )
    fused = method.startswith("falqon")
    tokens = torch.empty(settings.batch, settings.tokens, dtype=torch.int64, device="meta")
    with Recorder(model.config.vocab_size) as recorder:
        loss = _loss(model, tokens, chunked=fused)
        held = recorder.live
        recorder.phase = "backward"
        loss.backward()
    recorder.phase = "update"
    recorder.add(update_ops(model, settings, fused))
    return Step(recorder.ops, _memory(model, settings, held, recorder.peak), _trainable(model))


def _trainable(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _memory(model: nn.Module, settings: Settings, held: int, peak: int) -> dict[str, int]:
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    if settings.cached_transpose:
        layers = (m for m in model.modules() if isinstance(m, MeldedLinear))
        weights += sum(layer.out_features * layer.in_features for layer in layers)
    adapters = 4 * _trainable(model)
    return {
        "weights": weights,
        "adapters": adapters,
        "optimizer": 3 * adapters,
        "activations": held,
        "working": peak - held,
    }

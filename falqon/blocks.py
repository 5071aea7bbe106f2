"""Decoder layers of the Llama family whose melded layers run in groups, swapped in after melding.

The norm behind the last of them is swapped, too.

The new modules take over all that the old ones hold, under the same names, so that state dicts and
checkpoints are the same. They are subclasses of the old ones' classes: what transformers finds by
class (hidden states and attentions to record) it finds still.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from transformers.activations import SiLUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama as llama
from transformers.models.mistral import modeling_mistral as mistral
from transformers.models.qwen2 import modeling_qwen2 as qwen2
from transformers.models.qwen3 import modeling_qwen3 as qwen3

from falqon import decoder
from falqon.groups import (
    apply_group,
    has_hooks,
    norm_quantizer,
    reason_against,
    swiglu_quantizer,
    tie,
)
from falqon.kernels import RmsNormQuantize, SwigluQuantize
from falqon.kernels.native import attention, ops
from falqon.linear import MeldedLinear, unsafe_view

_OTHER_ATTENTION = ("softcap", "position_bias", "output_attentions", "cache", "is_causal")
ATTENTION_GROUP = ("q_proj", "k_proj", "v_proj")
MLP_GROUP = ("gate_proj", "up_proj")

_Module = TypeVar("_Module", bound=nn.Module)


class Grouped(nn.Module):
    """A module some of whose submodules are a group.

    Attributes:
        members: names of the group's layers.
        norm_quantize: the norm before the group and the quantiser of its input in one, or None.
    """

    members: tuple[str, ...] = ()
    norm_quantize: RmsNormQuantize | None

    def group(self) -> list[nn.Module]:
        """The group's layers."""
        own = self._modules  # a look at an attribute that is a module takes ten times as long
        return [own[name] for name in self.members]  # type: ignore[misc]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Grouped:
        super()._apply(fn, recurse)
        tie(self.group())
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        tie(self.group())  # copies of parameters have memory of their own


def _takes_source(layer: nn.Module) -> bool:
    """Whether it is a melded layer as it was made, but for FSDP2, which may gather it by itself."""
    kind = type(layer)
    if isinstance(layer, FSDPModule):
        kind = kind.__bases__[-1]
    return kind is MeldedLinear and not has_hooks(layer, besides_fsdp=True)


class GroupedMlp(Grouped):
    """A gated MLP: gate and up are a group, the activation quantises the input of down.

    Attributes:
        swiglu_quantize: activation and quantiser in one, or None.
    """

    members = MLP_GROUP
    swiglu_quantize: SwigluQuantize | None
    act_fn: Any
    down_proj: Any

    def forward(self, x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """Apply the MLP.

        Args:
            x: [..., n].
            norm: to apply to `x` first.

        Returns:
            [..., n].
        """
        gate, up = apply_group(self.group(), x, norm, self.norm_quantize)
        down = self.down_proj
        if self.swiglu_quantize is None or has_hooks(self.act_fn) or not _takes_source(down):
            return down(self.act_fn(gate) * up)
        return down(gate, up, source=self.swiglu_quantize)


class GroupedAttention(Grouped):
    """Self-attention of the Llama family: q, k and v are a group.

    What a family has of its own are class attributes and `extra_arguments`.

    Attributes:
        modeling: the family's module in transformers.
    """

    members = ATTENTION_GROUP
    modeling: Any
    config: Any
    layer_idx: Any
    head_dim: Any
    scaling: Any
    attention_dropout: Any
    is_causal: Any
    o_proj: Any

    def extra_arguments(self) -> dict[str, Any]:
        """What the family gives to the attention function in addition."""
        return {}

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        norm: nn.Module | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        """Attend.

        Args:
            hidden_states: [b, s, n].
            position_embeddings: cosines and sines of the rotation, [b, s, head_dim] each.
            attention_mask: as the attention function takes it.
            past_key_values: cache of keys and values, which is updated.
            norm: to apply to `hidden_states` first.
            kwargs: for the attention function.

        Returns:
            [b, s, n], and attention weights where the attention function gives any.
        """
        leading = hidden_states.shape[:-1]
        heads = [
            out.view(*leading, -1, self.head_dim)
            for out in apply_group(self.group(), hidden_states, norm, self.norm_quantize)
        ]
        query, key, value = self.normed_heads(*heads)
        if past_key_values is None and position_embeddings is not None and len(leading) == 2:
            shape = (*leading, query.shape[2], key.shape[2])
            ranges = self.native_ranges(shape, position_embeddings, attention_mask, kwargs)
            if ranges is not None and ops.usable(query, key, value):
                cos, sin = position_embeddings
                out = attention.attend(query, key, value, cos, sin, ranges, self.scaling)
                return self.o_proj(out.reshape(*leading, -1)), None
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        query, key = self.modeling.apply_rotary_pos_emb(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, self.modeling.eager_attention_forward
        )
        out, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self.extra_arguments(),
            **kwargs,
        )
        return self.o_proj(out.reshape(*leading, -1).contiguous()), weights

    def native_ranges(
        self,
        shape: tuple[int, int, int, int],
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> attention.Ranges | None:
        """Which keys queries see, for the compiled CPU path; None if that does not apply.

        Args:
            shape: b, s, h and kv.
            rotation, mask, options: as `forward` is given them.
        """
        batch, length, _, _ = shape
        if (
            self.config._attn_implementation != "sdpa"
            or (self.training and self.attention_dropout)
            or any(options.get(name) for name in _OTHER_ATTENTION)
            or not self.is_causal
            or rotation[0].shape[-1] != self.head_dim
            or not attention.takes(*shape, *rotation)
        ):
            return None
        return attention.ranges_of(mask, batch, length)

    def normed_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """What the family does to heads [b, s, h, head_dim] before they are rotated."""
        return query, key, value


class GroupedDecoderLayer(nn.Module):
    """A decoder layer that leaves its norms to the groups behind them."""

    self_attn: Any
    mlp: Any
    input_layernorm: Any
    post_attention_layernorm: Any

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """See the class of transformers. Returns [b, s, n]."""
        if past_key_values is None and position_embeddings is not None:
            parts = self._parts(hidden_states, position_embeddings, attention_mask, kwargs)
            if parts is not None:
                return decoder.apply_decoder(parts, hidden_states, position_embeddings)
        x, given = _normed(self.input_layernorm, self.self_attn, hidden_states)
        attended, _ = self.self_attn(
            hidden_states=x,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            position_embeddings=position_embeddings,
            **given,
            **kwargs,
        )
        hidden_states = hidden_states + attended
        x, given = _normed(self.post_attention_layernorm, self.mlp, hidden_states)
        return hidden_states + self.mlp(x, **given)

    def _parts(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        options: dict[str, Any],
    ) -> decoder.Decoder | None:
        """The layer's parts if they can be run as one function, as `falqon.decoder` does."""
        own: dict[str, Any] = self._modules
        attend, mlp = own["self_attn"], own["mlp"]
        if not (isinstance(attend, GroupedAttention) and isinstance(mlp, GroupedMlp)):
            return None
        of_mlp: dict[str, Any] = mlp._modules
        norms = (own["input_layernorm"], own["post_attention_layernorm"])
        first: Any = attend._modules.get("norm_quantize")
        second: Any = of_mlp.get("norm_quantize")
        activation = of_mlp.get("swiglu_quantize")
        if (
            torch.compiler.is_compiling()
            or first is None
            or second is None
            or activation is None
            or x.dim() != 3
            or type(mlp) is not GroupedMlp
            or type(attend).forward is not GroupedAttention.forward
            or type(attend).normed_heads is not GroupedAttention.normed_heads
            or "normed_heads" in vars(attend)
        ):
            return None
        weights = (norms[0].weight, norms[1].weight)
        if weights[0].requires_grad or weights[1].requires_grad:
            return None
        groups: tuple[Any, Any, Any, Any] = (
            attend.group(),
            [attend._modules["o_proj"]],
            mlp.group(),
            [of_mlp["down_proj"]],
        )
        others = (attend, mlp, *norms, of_mlp["act_fn"], first, second, activation)
        d = attend.head_dim
        melded = decoder.melded_parts(groups, others, x, weights, d)
        if melded is None:
            return None
        heads, kv = melded.outs[0] // d, melded.outs[1] // d
        batch, length, _ = x.shape
        ranges = attend.native_ranges((batch, length, heads, kv), rotation, mask, options)
        if ranges is None:
            return None
        shape = decoder.Shape(
            melded.groups,
            melded.outs,
            melded.factors,
            (first.eps, second.eps),
            *(batch, length, heads, kv, d),
            attend.scaling,
        )
        return decoder.Decoder(shape, melded, weights, ranges)


def _normed(norm: nn.Module, block: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, nn.Module]]:
    """Input of a block behind a norm, and the norm if that is left to the block.

    A block with hooks gets the normed input, which they have always seen.
    """
    if isinstance(block, Grouped) and not has_hooks(block, besides_fsdp=True):
        return x, {"norm": norm}
    return norm(x), {}


class GroupedLlamaAttention(GroupedAttention, llama.LlamaAttention):
    """Llama's."""

    modeling = llama


class GroupedMistralAttention(GroupedAttention, mistral.MistralAttention):
    """Mistral's: a sliding window for all layers."""

    modeling = mistral

    def extra_arguments(self) -> dict[str, Any]:
        """The window."""
        return {"sliding_window": getattr(self.config, "sliding_window", None)}


class GroupedQwen2Attention(GroupedAttention, qwen2.Qwen2Attention):
    """Qwen2's: a sliding window for some layers."""

    modeling = qwen2
    sliding_window: Any

    def extra_arguments(self) -> dict[str, Any]:
        """The window."""
        return {"sliding_window": self.sliding_window}


class GroupedQwen3Attention(GroupedAttention, qwen3.Qwen3Attention):
    """Qwen3's: a sliding window for some layers, and norms of queries and keys."""

    modeling = qwen3
    q_norm: Any
    k_norm: Any
    sliding_window: Any

    def extra_arguments(self) -> dict[str, Any]:
        """The window."""
        return {"sliding_window": self.sliding_window}

    def normed_heads(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries and keys are normed, each head for itself."""
        return self.q_norm(query), self.k_norm(key), value


class GroupedLlamaDecoderLayer(GroupedDecoderLayer, llama.LlamaDecoderLayer):
    """Llama's."""


class GroupedMistralDecoderLayer(GroupedDecoderLayer, mistral.MistralDecoderLayer):
    """Mistral's."""


class GroupedQwen2DecoderLayer(GroupedDecoderLayer, qwen2.Qwen2DecoderLayer):
    """Qwen2's."""


class GroupedQwen3DecoderLayer(GroupedDecoderLayer, qwen3.Qwen3DecoderLayer):
    """Qwen3's."""


class _RmsNorm(torch.autograd.Function):
    """RMSNorm of [..., n] by the compiled CPU path; none for the weight, which is frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out, inverse_rms = ops.rms_norm_quantized(rows, weight, eps, rounded=False)
        ctx.save_for_backward(rows, weight, inverse_rms)
        return unsafe_view(out, list(x.shape))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        rows, weight, inverse_rms = ctx.saved_tensors
        out = ops.rms_norm_grad(grad.reshape(rows.shape), rows, weight, inverse_rms)
        return out.view(grad.shape), None, None


class FinalRMSNorm(nn.Module):
    """The norm behind the last decoder layer, in one operation each way in training on a CPU.

    Forward to the bit what transformers' is; the gradient is rounded once, theirs at every product.
    """

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., n] normed."""
        weight = self.weight
        in_training = hidden_states.requires_grad and not weight.requires_grad
        if not in_training or not ops.usable(hidden_states, weight):
            return super().forward(hidden_states)
        out: Tensor = _RmsNorm.apply(hidden_states, weight, self.variance_epsilon)
        return out


class FinalLlamaRMSNorm(FinalRMSNorm, llama.LlamaRMSNorm):
    """Llama's."""


class FinalMistralRMSNorm(FinalRMSNorm, mistral.MistralRMSNorm):
    """Mistral's."""


class FinalQwen2RMSNorm(FinalRMSNorm, qwen2.Qwen2RMSNorm):
    """Qwen2's."""


class FinalQwen3RMSNorm(FinalRMSNorm, qwen3.Qwen3RMSNorm):
    """Qwen3's."""


class _Family(NamedTuple):
    """Where a family's classes are in transformers, and what takes their place."""

    modeling: Any
    name: str
    attention: type[GroupedAttention]
    layer: type[GroupedDecoderLayer]
    norm: type[FinalRMSNorm]

    def original(self, part: str) -> type[nn.Module]:
        """The class of a part, such as "Model": its exact one, for a subclass may do anything."""
        kind: type[nn.Module] = getattr(self.modeling, self.name + part)
        return kind


_FAMILIES = (
    _Family(llama, "Llama", GroupedLlamaAttention, GroupedLlamaDecoderLayer, FinalLlamaRMSNorm),
    _Family(
        mistral, "Mistral", GroupedMistralAttention, GroupedMistralDecoderLayer, FinalMistralRMSNorm
    ),
    _Family(qwen2, "Qwen2", GroupedQwen2Attention, GroupedQwen2DecoderLayer, FinalQwen2RMSNorm),
    _Family(qwen3, "Qwen3", GroupedQwen3Attention, GroupedQwen3DecoderLayer, FinalQwen3RMSNorm),
)
_ARGUMENTS = {
    "Attention": "hidden_states position_embeddings attention_mask past_key_values kwargs",
    "MLP": "x",
    "DecoderLayer": "hidden_states attention_mask position_ids past_key_values use_cache "
    "position_embeddings kwargs",
}


def group_blocks(model: nn.Module) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Swap attentions and MLPs whose melded layers can be groups, and final norms, in place.

    What is swapped already, and what is of no known family, is left as it is.

    Args:
        model: after melding.

    Returns:
        Names of the layers in each new group by full name of the module that has them; reasons by
        full name of the modules of a known family that were left alone.
    """
    grouped: dict[str, tuple[str, ...]] = {}
    refused: dict[str, str] = {}
    for name, layer in list(model.named_modules()):
        whole = next((f for f in _FAMILIES if type(layer) is f.original("Model")), None)
        if whole is not None and type(layer.norm) is whole.original("RMSNorm"):
            layer.norm = _take_over(whole.norm, layer.norm)
        family = next((f for f in _FAMILIES if type(layer) is f.original("DecoderLayer")), None)
        if family is None:
            continue
        reason = _other_arguments(family)
        if reason is not None:
            refused[name] = reason
            continue
        for child, part, kind, norm in (
            ("self_attn", "Attention", family.attention, layer.input_layernorm),
            ("mlp", "MLP", GroupedMlp, layer.post_attention_layernorm),
        ):
            full = f"{name}.{child}".removeprefix(".")
            block = layer.get_submodule(child)
            members = [block.get_submodule(member) for member in kind.members]
            reason = reason_against(members)
            if type(block) is not family.original(part):
                reason = f"a {type(block).__name__}, not a {family.original(part).__name__}"
            if reason is not None:
                refused[full] = reason
                continue
            is_norm = type(norm) is family.original("RMSNorm")
            setattr(layer, child, _make(kind, block, norm if is_norm else None))
            grouped[full] = kind.members
        if name and any(isinstance(child, Grouped) for child in layer.children()):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, _take_over(family.layer, layer))
    return grouped, refused


def _make(kind: type[Grouped], block: nn.Module, norm: nn.Module | None) -> Grouped:
    new = _take_over(kind, block)
    members = new.group()
    first = members[0]
    assert isinstance(first, MeldedLinear)
    eps = None if norm is None else norm.variance_epsilon
    new.norm_quantize = norm_quantizer(first, eps) if isinstance(eps, float) else None
    if isinstance(new, GroupedMlp):
        down = new.down_proj
        is_silu = type(new.act_fn) in (nn.SiLU, SiLUActivation) and isinstance(down, MeldedLinear)
        new.swiglu_quantize = swiglu_quantizer(down) if is_silu else None
    tie(members)
    return new


def _take_over(kind: type[_Module], module: nn.Module) -> _Module:
    """A module of another class with all that a module holds, hooks included."""
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    return new


def _other_arguments(family: _Family) -> str | None:
    """Why this version of transformers is not one that these classes can stand in for."""
    for part, names in _ARGUMENTS.items():
        kind = family.original(part)
        found = [n for n in inspect.signature(kind.forward).parameters if n != "self"]
        if set(found) != set(names.split()):
            return (
                f"{kind.__name__}.forward of transformers {transformers.__version__} takes other "
                f"arguments ({', '.join(found)})"
            )
    return None

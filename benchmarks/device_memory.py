"""Memory of one device and bytes on the wire for LLaMA shapes, by strategy: counted, not measured.

    python -m benchmarks.device_memory                                # prints the table
    python -m benchmarks.device_memory --markdown docs/multi_gpu.md   # and into that page

Parameters are those of the real modules, built on the meta device and melded there. Activations are
the tensors that a real decoder layer saves, recorded at an eighth of all its sizes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from falqon.linear import MeldedLinear
from falqon.meld import meld, melded_layers, plan
from falqon.parallel.sharding import decoder_layers, placement
from falqon.parallel.tensor import BY_COLUMNS
from falqon.recipe import MeldRecipe

BEGIN = "<!-- begin: written by python -m benchmarks.device_memory --markdown -->"
END = "<!-- end -->"
SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "13B": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40,
            "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000},
}  # fmt: skip
_SMALLER = 8
_ADAM = 4 + 4 + 4  # bytes beside each of B's: gradient and two moments, FP32


@dataclass(frozen=True)
class Setting:
    """A strategy on so many devices.

    Attributes:
        name: of the strategy.
        data, tensor: ranks with different rows, and ranks that share a layer.
    """

    name: str
    data: int
    tensor: int = 1


@dataclass(frozen=True)
class Row:
    """What one device holds at the peak of a step, and sends in one; bytes."""

    codes: float
    trained: float
    other: float
    gathered: float
    activations: float
    flush: float
    wire: float

    @property
    def total(self) -> float:
        return self.codes + self.trained + self.other + self.gathered + self.activations


@lru_cache
def meta_model(size: str, rank: int) -> LlamaForCausalLM:
    """A melded model without data."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPES[size], tie_word_embeddings=False))
    names, _ = plan(model, MeldRecipe(rank=rank))
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        with torch.device("meta"):
            melded = MeldedLinear(linear.in_features, linear.out_features, rank)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, melded)
    return model.to(torch.bfloat16)


def parameter_bytes(module: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Name, parameter and bytes."""
    for name, parameter in module.named_parameters():
        yield name, parameter, parameter.numel() * parameter.element_size()


def local_share(layer_name: str, kind: str, layer: MeldedLinear, tensor: int) -> float:
    """Bytes of a layer's codes or B that one rank of a tensor-parallel group has."""
    by_columns = layer_name.endswith(BY_COLUMNS)
    if kind == "B":
        return layer.B.numel() * 4 / (1 if by_columns else tensor)
    whole = (layer.out_features + layer.rank) * layer.in_features
    if by_columns:
        return whole / tensor
    return (layer.out_features / tensor + layer.rank) * layer.in_features


@lru_cache
def saved_per_token(size: str, rank: int) -> tuple[float, float]:
    """Bytes a token that one decoder layer saves for its backward pass, and that enter it."""
    shape = {k: v // _SMALLER for k, v in SHAPES[size].items()} | {"num_hidden_layers": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa"))
    meld(model, None, MeldRecipe(rank=max(1, rank // _SMALLER)))
    model.to(torch.bfloat16)
    tokens, seen = 32, {}
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    x = torch.randn(1, tokens, shape["hidden_size"], dtype=torch.bfloat16, requires_grad=True)
    positions = model.model.rotary_emb(x, torch.arange(tokens)[None])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.model.layers[0](x, position_embeddings=positions)
    saved = sum(size for size, _ in seen.values())
    return saved / tokens * _SMALLER, SHAPES[size]["hidden_size"] * 2


def count(size: str, setting: Setting, rank: int, tokens: int, every: int) -> Row:
    """One row of the table.

    Args:
        size: of the model.
        setting: strategy and devices.
        rank: r.
        tokens: of one device's batch.
        every: steps from one write of rows to the next.
    """
    model = meta_model(size, rank)
    layers = melded_layers(model)
    cut = setting.data if setting.name.startswith("fsdp2") else 1
    own = {id(p) for layer in layers.values() for p in (layer.codes, layer.B, layer.scale)}
    codes = sum(local_share(n, "codes", m, setting.tensor) for n, m in layers.items())
    b = sum(local_share(n, "B", m, setting.tensor) for n, m in layers.items())
    other = sum(size for _, p, size in parameter_bytes(model) if id(p) not in own)
    assert all(placement(m.codes).dim == 1 for m in layers.values())
    shape = SHAPES[size]
    blocks = decoder_layers(model)
    gathered = 0.0
    if cut > 1:
        # Gate and up as they arrive: what came, sorted by columns, and as they are used. Or while
        # they run: as they are used and laid together, attention or down on its way, the gradients
        # of their B. And what is of no layer: embedding, last norm and head, which stay while the
        # step lasts.
        first = melded_layers(blocks[0])

        def held(kind: str, *ends: str) -> float:
            parts = [(n, m) for n, m in first.items() if n.endswith(ends)]
            return sum(local_share(n, kind, m, setting.tensor) for n, m in parts)

        group = held("codes", "gate_proj", "up_proj")
        group_b = held("B", "gate_proj", "up_proj")
        coming = max(
            held("codes", *ends) + held("B", *ends)
            for ends in (("down_proj",), ("q_proj", "k_proj", "v_proj", "o_proj"))
        )
        exchange = max(3 * group + 2 * group_b, 2 * group + 2 * group_b + coming)
        outside = other - sum(
            size for block in blocks for _, p, size in parameter_bytes(block) if id(p) not in own
        )
        gathered = exchange + outside
    saved, enters = saved_per_token(size, rank)
    logits = min(tokens, 512) * shape["vocab_size"] * (2 + 4 + 4)
    activations = tokens * (len(blocks) * enters + saved / setting.tensor) + logits
    largest = max(m.in_features for m in layers.values())
    flush = largest**2 * (4 + 3 * 8)  # the moments; in float64 twice factored and once inverted
    hidden, trained = shape["hidden_size"], b * (4 + _ADAM) / 4
    chosen = 4 * sum(m.out_features + min(m.out_features, rank) * rank for m in layers.values())
    wire = wire_bytes(setting, codes, b, other, chosen / every, len(blocks), hidden, rank, tokens)
    return Row(codes / cut, trained / cut, other / cut, gathered, activations, flush, wire)


def wire_bytes(
    setting: Setting,
    codes: float,
    b: float,
    other: float,
    chosen: float,
    blocks: int,
    hidden: int,
    rank: int,
    tokens: int,
) -> float:
    """Bytes that one device sends in a step of one batch, with ring algorithms.

    An all-gather or a reduce-scatter sends (N - 1) / N of the tensor, an all-reduce twice that.
    """
    share = (setting.data - 1) / setting.data
    sent = 2 * share * b
    if setting.name.startswith("fsdp2"):
        # All weights forward and backward, gradients of B; norms and chosen rows of B are summed.
        sent = share * (2 * (codes + b + other) + b + 2 * chosen)
    if setting.tensor > 1:
        # A layer: O and O_A of o and down, forward and again when it is computed again; dL/dx of
        # q/k/v and of gate/up; amax of four tensors in FP32.
        reduced = 2 * 2 * (hidden + rank) * 2 + 2 * hidden * 2 + 6 * 4
        sent += blocks * tokens * reduced * 2 * (setting.tensor - 1) / setting.tensor
    return sent


def table(args: argparse.Namespace) -> list[str]:
    """Lines of markdown."""
    settings = [
        Setting("one device", 1),
        Setting("ddp", 8),
        Setting("fsdp2", 8),
        Setting("tp", 1, 8),
        Setting("fsdp2 x tp", 4, 2),
    ]
    lines = [
        f"r = {args.rank}, {args.tokens} tokens in a device's batch (a tensor-parallel group "
        f"shares one), gradient checkpointing, AdamW, rows written every {args.every} steps. GiB; "
        "sent: MiB that one device sends in a step.",
        "",
        "| model | strategy | devices | codes | B, gradient, moments | other weights | gathered "
        "| activations | sum | at the end: compensated flush | sent |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for size in SHAPES:
        for setting in settings:
            row = count(size, setting, args.rank, args.tokens, args.every)
            parts = (row.codes, row.trained, row.other, row.gathered, row.activations, row.total)
            cells = " | ".join(f"{part / 2**30:.2f}" for part in (*parts, row.flush))
            devices = setting.data * setting.tensor
            sent = f"{row.wire / 2**20:,.0f}"
            lines.append(f"| {size} | {setting.name} | {devices} | {cells} | {sent} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    """Print the table, or put it into a page."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.device_memory")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="page with markers to fill")
    args = parser.parse_args(argv)
    lines = table(args)
    print("\n".join(lines))
    if args.markdown:
        text = args.markdown.read_text()
        before, marker, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not marker or not end:
            raise SystemExit(f"{args.markdown} lacks the lines {BEGIN} and {END}")
        page = f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}"
        args.markdown.write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())

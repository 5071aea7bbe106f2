"""One decoder layer forward and backward, its melded layers in groups and one by one.

    python -m benchmarks.groups --hidden 576 --heads 9 --kv-heads 3 --intermediate 1536 --tokens 768

Both are made from the same random weights and run in turn, so that what else the machine does falls
on both. `saved` is what autograd keeps for the backward pass, parameters left out.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from copy import deepcopy

import torch
import transformers
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaModel

from falqon.meld import meld, melded_layers
from falqon.recipe import MeldRecipe, fp8_recipe

MODES = {"one by one": False, "groups": True}


class Layer:
    """A decoder layer with an input and the gradient of its output."""

    def __init__(self, model: LlamaModel, args: argparse.Namespace) -> None:
        self.layer: nn.Module = model.layers[0]
        generator = torch.Generator().manual_seed(1)
        shape = (1, args.tokens, args.hidden)
        self.x = torch.randn(shape, generator=generator).to(model.dtype)
        self.grad = torch.randn(shape, generator=generator).to(model.dtype)
        positions = torch.arange(args.tokens)[None]
        self.rotation = model.rotary_emb(self.x, position_ids=positions)

    def forward(self) -> Tensor:
        return self.layer(self.x.requires_grad_(), position_embeddings=self.rotation)

    def seconds(self) -> tuple[float, float]:
        start = time.perf_counter()
        y = self.forward()
        middle = time.perf_counter()
        y.backward(self.grad)
        end = time.perf_counter()
        self.x.grad = None
        return middle - start, end - middle

    def saved_bytes(self) -> int:
        own = {p.untyped_storage().data_ptr() for p in self.layer.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda t: t):
            y = self.forward()
        assert y.requires_grad
        return sum(kept.values())


def make(args: argparse.Namespace) -> dict[str, Layer]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=args.hidden,
        intermediate_size=args.intermediate,
        num_hidden_layers=1,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.tokens,
        attn_implementation="sdpa",
    )
    base = LlamaModel(config)
    layers = {}
    for name, groups in MODES.items():
        model = deepcopy(base)
        meld(model, fp8_recipe(args.recipe), MeldRecipe(rank=args.rank, groups=groups))
        for layer in melded_layers(model).values():
            layer.live = args.live
        layers[name] = Layer(model.to(getattr(torch, args.dtype)), args)
    return layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=768)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--recipe", default="default")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--live", action="store_true", help="pending changes act")
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    layers = make(args)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in layers}
    for repeat in range(args.repeats + 3):
        for name, layer in layers.items():
            measured = layer.seconds()
            if repeat >= 3:  # the first ones warm up
                times[name].append(measured)
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; {vars(args)}"
    )
    columns = ("forward ms", "backward ms", "step ms", "quartiles", "saved MiB")
    print(f"{'':<12}" + "".join(f"{column:>16}" for column in columns))
    for name, pairs in times.items():
        low, step, high = statistics.quantiles((sum(pair) * 1e3 for pair in pairs), n=4)
        forward, backward = (statistics.median(column) * 1e3 for column in zip(*pairs, strict=True))
        saved = layers[name].saved_bytes() / 2**20
        print(
            f"{name:<12}{forward:>16.1f}{backward:>16.1f}{step:>16.1f}"
            f"{f'{low:.1f} - {high:.1f}':>16}{saved:>16.1f}"
        )
    ratios = [sum(g) / sum(o) for g, o in zip(times["groups"], times["one by one"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"groups / one by one, of neighbouring steps: {middle:.3f} ({low:.3f} - {high:.3f})")


if __name__ == "__main__":
    main()

"""What a CPU gains by products and attention of our own, beside those of torch.

    python -m benchmarks.products --tokens 1024 --rank 64

Shapes are those of a decoder layer (SmolLM2's unless told otherwise). Both ways take turns in one
process, several times; given are medians of wall times and their ratio. The products are what the
trainer calls: with decoding, quantising of gradients, pending changes and the gradients of B.
Those with the output embedding are logits, and the gradient that comes through it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.compare_report import versions
from falqon.kernels import wide
from falqon.kernels.native import attention, melded, products

Call = Callable[[], object]


class Group:
    """Layers with one input, with random weights, and what goes through them."""

    def __init__(self, tokens: int, columns: int, outs: list[int], rank: int) -> None:
        codes = [torch.randint(0x70, (out + rank, columns), dtype=torch.uint8) for out in outs]
        proxies = [torch.randn(out, rank) * 0.01 for out in outs]
        self.weights = (
            [nn.Parameter(c, requires_grad=False) for c in codes],
            [torch.tensor([32.0]) for _ in outs],
        )
        self.acting = (rank, proxies, [1.0] * len(outs))
        self.x = torch.randn(tokens, columns).bfloat16()
        self.grads = [torch.randn(tokens, out).bfloat16() for out in outs]
        weights, adapters = sum(outs) * columns, len(outs) * rank * columns
        self.flops = tokens * (4.0 * (weights + adapters) + 6.0 * sum(outs) * rank)

    def forward(self) -> None:
        biases = [None] * len(self.grads)
        self.adapters = melded.forward(self.x, *self.weights, biases, *self.acting)[1]

    def backward(self) -> None:
        wanted = (True, True, [True] * len(self.grads))
        melded.backward(self.grads, *self.weights, *self.acting, self.adapters, *wanted)


def groups(args: argparse.Namespace) -> Iterator[tuple[str, Group]]:
    """Those of a decoder layer, by name."""
    kv = args.hidden * args.kv_heads // args.heads
    for name, columns, outs in (
        ("q, k, v", args.hidden, [args.hidden, kv, kv]),
        ("o", args.hidden, [args.hidden]),
        ("gate, up", args.hidden, [args.intermediate] * 2),
        ("down", args.intermediate, [args.hidden]),
    ):
        yield name, Group(args.tokens, columns, outs, args.rank)


def attend(args: argparse.Namespace) -> tuple[Call, Call]:
    """Forward and backward pass of causal attention over rows of `length` tokens."""
    d = args.hidden // args.heads
    batch = args.tokens // args.length
    heads = [
        torch.randn(batch, args.length, n, d).bfloat16().requires_grad_()
        for n in (args.heads, args.kv_heads, args.kv_heads)
    ]
    cos, sin = (torch.rand(1, args.length, d).bfloat16() for _ in range(2))
    ranges = attention.ranges_of(None, batch, args.length)
    assert ranges is not None
    kept: list[Tensor] = []

    def forward() -> None:
        kept[:] = [attention.attend(*heads, cos, sin, ranges, d**-0.5)]

    def backward() -> None:
        torch.autograd.grad(kept[0], heads, kept[0].detach())

    return forward, backward


def embed(args: argparse.Namespace) -> tuple[list[Call], list[Call], float]:
    """Logits, and the gradient through the output embedding, both ways; and their FLOPs."""
    weight = torch.randn(args.vocabulary, args.hidden).bfloat16()
    x = torch.randn(args.tokens, args.hidden).bfloat16()
    grad = torch.randn(args.tokens, args.vocabulary).bfloat16()
    room = torch.empty_like(grad)
    ours: list[Call] = [
        lambda: products.dense(x, weight, room),
        lambda: products.dense_grad(grad, weight),
    ]
    theirs: list[Call] = [
        lambda: wide.product(x, weight.t(), out=room),
        lambda: wide.product(grad, weight),
    ]
    return ours, theirs, 4.0 * args.tokens * weight.numel()


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def medians(calls: list[Call], others: list[Call], repeats: int) -> list[list[float]]:
    """Median seconds of calls that take turns with others, and of these."""
    seen: list[list[list[float]]] = [[[] for _ in calls] for _ in range(2)]
    for repeat in range(repeats + 2):
        for which, some in enumerate((calls, others)):
            taken = [seconds(call) for call in some]
            if repeat >= 2:  # the first ones warm up
                for times, value in zip(seen[which], taken, strict=True):
                    times.append(value)
    return [[statistics.median(times) for times in which] for which in seen]


def by_torch(call: Call) -> Call:
    def run() -> None:
        present, products.present = products.present, lambda: False
        try:
            call()
        finally:
            products.present = present

    return run


def measure(args: argparse.Namespace) -> None:
    """Print the table."""
    print("| | forward, ms | torch | ratio | backward, ms | torch | ratio | GFLOP/s | torch |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, group in groups(args):
        passes: list[Call] = [group.forward, group.backward]
        found = medians(passes, [by_torch(call) for call in passes], args.repeats)
        print(line(name, *found, group.flops), flush=True)
    passes = list(attend(args))
    print(line("attention", *medians(passes, [by_torch(c) for c in passes], args.repeats)))
    ours, theirs, flops = embed(args)
    print(line("output embedding", *medians(ours, theirs, args.repeats), flops))


def line(name: str, ours: list[float], theirs: list[float], flops: float | None = None) -> str:
    pairs = zip(ours, theirs, strict=True)
    cells = [f"{a * 1e3:.2f} | {b * 1e3:.2f} | {b / a:.2f}" for a, b in pairs]
    rates = (
        " | "
        if flops is None
        else " | ".join(f"{flops / sum(x) / 1e9:.0f}" for x in (ours, theirs))
    )
    return f"| {name} | {' | '.join(cells)} | {rates} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for name, value in (
        ("tokens", 1024), ("length", 256), ("rank", 64), ("hidden", 576), ("intermediate", 1536),
        ("heads", 9), ("kv-heads", 3), ("vocabulary", 49152), ("repeats", 15),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args(argv)
    print(f"{versions()}, {torch.get_num_threads()} threads", file=sys.stderr)
    if not products.present():
        print(
            "products: error: there is none of AMX, AVX512 and AVX2, or no compiler.",
            file=sys.stderr,
        )
        return 2
    measure(args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

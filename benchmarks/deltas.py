"""Deltas: how large they are at the shapes of a 7B model, and how fast they are put into a model.

`python -m benchmarks.deltas sizes DELTA` takes the share of changed codes and their differences by
kind of layer from a delta of a real run, and compresses such changes at the shapes of LLaMA-7B.
`python -m benchmarks.deltas load MODEL DELTA [DELTA ...]` melds a model, and times `load_delta`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
import zstandard

from falqon import load_delta, meld, unload_delta
from falqon.delta.codec import encode
from falqon.delta.directory import Delta, open_delta
from falqon.pretrained import load_model
from falqon.recipe import Fp8Recipe, MeldRecipe

LAYERS = 32
SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 4096),
    "v_proj": (4096, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (11008, 4096),
    "up_proj": (11008, 4096),
    "down_proj": (4096, 11008),
}


@dataclass
class Kind:
    """What a run changed in one kind of layer.

    Attributes:
        codes, changed: numbers of codes, and of those that changed.
        bytes: of the compressed changes.
        differences: some of those that are not zero, uint8.
    """

    codes: int = 0
    changed: int = 0
    bytes: int = 0
    differences: list[np.ndarray] = field(default_factory=list)


def kinds(delta: Delta) -> dict[str, Kind]:
    """By the last part of a layer's name."""
    found: dict[str, Kind] = {}
    changes = delta.changes()
    for name, layer in delta.manifest["layers"].items():
        kind = found.setdefault(name.rpartition(".")[2], Kind())
        kind.codes += layer["out"] * layer["in"]
        kind.changed += layer["codes"]
        kind.bytes += layer["bytes"]
        stream = zstandard.ZstdDecompressor().decompress(changes[name].differences)
        values = np.frombuffer(stream, dtype=np.uint8)
        kind.differences.append(values[values != 0][:100_000])
    return found


def synthetic(shape: tuple[int, int], kind: Kind) -> int:
    """Bytes of a compressed change with the run's share of changed codes, and its differences."""
    generator = torch.Generator().manual_seed(0)
    pool = torch.from_numpy(np.concatenate(kind.differences))
    before = torch.zeros(shape, dtype=torch.uint8)
    where = torch.rand(shape, generator=generator) < kind.changed / kind.codes
    drawn = pool[torch.randint(0, len(pool), (int(where.sum()),), generator=generator)]
    after = before.clone()
    after[where] = drawn
    return encode(before, after).nbytes


def sizes(path: str) -> Iterator[str]:
    delta = open_delta(path)
    found = kinds(delta)
    files = sum(file["bytes"] for file in delta.manifest["files"].values())
    codes = sum(kind.codes for kind in found.values())
    yield f"{path}: {files:,} bytes for {codes:,} codes, {8 * files / codes:.3f} bits a code"
    heads = f"{'layer':<10} {'changed':>8} {'bits/code':>9} {'at 7B':>13} {'bytes':>12}"
    yield f"{heads} {'bits/code':>9}"
    total = 0
    for name, shape in SHAPES.items():
        kind = found[name]
        size = synthetic(shape, kind)
        total += size
        ours, theirs = 8 * kind.bytes / kind.codes, 8 * size / (shape[0] * shape[1])
        text = f"{shape[0]} x {shape[1]}"
        share = kind.changed / kind.codes
        yield f"{name:<10} {share:>8.2%} {ours:>9.3f} {text:>13} {size:>12,} {theirs:>9.3f}"
    weights = LAYERS * sum(out * columns for out, columns in SHAPES.values())
    yield f"7B: {LAYERS * total / 2**30:.2f} GiB, of {weights / 2**30:.2f} GiB of codes"


def load(model: str, deltas: list[str], repeats: int) -> Iterator[str]:
    settings = open_delta(deltas[0]).manifest["settings"]
    recipe = settings["meld"] | {"rank": settings["rank"]}
    loaded = load_model(model)
    start = time.perf_counter()
    meld(loaded, Fp8Recipe(**settings["recipe"]), MeldRecipe(**recipe))
    yield f"melding {model}: {time.perf_counter() - start:.2f} s"
    # On a busy machine the processor's time says more.
    for clock in (time.perf_counter, time.process_time):
        yield "seconds on the clock" if clock is time.perf_counter else "seconds of processor time"
        seconds: dict[str, list[float]] = {"first": [], "switch": [], "unload": []}
        for _ in range(repeats):
            for number, path in enumerate(deltas):
                start = clock()
                load_delta(loaded, path)
                seconds["switch" if number else "first"].append(clock() - start)
            start = clock()
            unload_delta(loaded)
            seconds["unload"].append(clock() - start)
        yield from _table(seconds)


def _table(seconds: dict[str, list[float]]) -> Iterator[str]:
    for what, times in seconds.items():
        if times:
            spread = f"{min(times):.3f} to {max(times):.3f}, {len(times)} times"
            yield f"{what:<7} median {statistics.median(times):.3f} s ({spread})"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.deltas", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("sizes")
    add.add_argument("delta")
    add = commands.add_parser("load")
    add.add_argument("model")
    add.add_argument("deltas", nargs="+")
    add.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args(argv)
    if arguments.command == "sizes":
        lines = sizes(arguments.delta)
    else:
        lines = load(arguments.model, arguments.deltas, arguments.repeats)
    for line in lines:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Deltas: how large they are at the shapes of a 7B model, and how fast they are put into a model.

`python -m benchmarks.deltas sizes DELTA` takes the share of changed codes by kind of layer from a
delta of a real run, and compresses changes with these shares at the shapes of LLaMA-7B.
`python -m benchmarks.deltas load MODEL DELTA [DELTA ...]` melds a model, and times `load_delta`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import torch

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


def shares(delta: Delta) -> dict[str, tuple[float, float]]:
    """Share of changed codes, and of rows with any, by the last part of a layer's name."""
    sums: dict[str, list[int]] = {}
    for name, layer in delta.manifest["layers"].items():
        held = sums.setdefault(name.rpartition(".")[2], [0, 0, 0, 0])
        counts = (layer["codes"], layer["out"] * layer["in"], layer["rows"], layer["out"])
        for index, count in enumerate(counts):
            held[index] += count
    return {kind: (s[0] / s[1], s[2] / s[3]) for kind, s in sums.items()}


def synthetic(shape: tuple[int, int], codes: float, rows: float) -> int:
    """Bytes of a compressed change with these shares, its codes one up or down."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randint(0, 127, shape, dtype=torch.uint8, generator=generator)
    in_row = torch.rand(shape[0], 1, generator=generator) < rows
    where = in_row & (torch.rand(shape, generator=generator) < codes / max(rows, 1e-9))
    sign = torch.randint(0, 2, shape, dtype=torch.uint8, generator=generator) * 2 - 1
    return encode(before, torch.where(where, before + sign, before)).nbytes


def sizes(path: str) -> Iterator[str]:
    delta = open_delta(path)
    found = shares(delta)
    files = sum(file["bytes"] for file in delta.manifest["files"].values())
    codes = sum(layer["out"] * layer["in"] for layer in delta.manifest["layers"].values())
    yield f"{path}: {files:,} bytes for {codes:,} codes, {8 * files / codes:.3f} bits a code"
    yield f"{'layer':<10} {'changed':>8} {'rows':>7} {'shape':>13} {'bytes':>12} {'bits/code':>9}"
    total = 0
    for kind, shape in SHAPES.items():
        changed, rows = found[kind]
        size = synthetic(shape, changed, rows)
        total += size
        bits = 8 * size / (shape[0] * shape[1])
        text = f"{shape[0]} x {shape[1]}"
        yield f"{kind:<10} {changed:>8.2%} {rows:>7.1%} {text:>13} {size:>12,} {bits:>9.3f}"
    weights = LAYERS * sum(out * columns for out, columns in SHAPES.values())
    yield f"7B: {LAYERS * total / 2**30:.2f} GiB, of {weights / 2**30:.2f} GiB of codes"


def load(model: str, deltas: list[str], repeats: int) -> Iterator[str]:
    settings = open_delta(deltas[0]).manifest["settings"]
    recipe = settings["meld"] | {"rank": settings["rank"]}
    loaded = load_model(model)
    start = time.perf_counter()
    meld(loaded, Fp8Recipe(**settings["recipe"]), MeldRecipe(**recipe))
    yield f"melding {model}: {time.perf_counter() - start:.2f} s"
    seconds: dict[str, list[float]] = {"first": [], "switch": [], "unload": []}
    for _ in range(repeats):
        for number, path in enumerate(deltas):
            start = time.perf_counter()
            load_delta(loaded, path)
            seconds["switch" if number else "first"].append(time.perf_counter() - start)
        start = time.perf_counter()
        unload_delta(loaded)
        seconds["unload"].append(time.perf_counter() - start)
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

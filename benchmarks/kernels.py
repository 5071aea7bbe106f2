"""Kernel against kernel: every operation of a melded layer beside its alternatives and its floor.

    python -m benchmarks.kernels                              # on a GPU if there is one, else CPU
    python -m benchmarks.kernels --shapes 13b --only dx dx_row_major melded_matmul
    python -m benchmarks.kernels --shapes 4096,4096,11008 --csv kernels.csv

On a GPU each Triton kernel is timed beside torch._scaled_mm, torch.compile and the separate steps,
and beside the time that the device's published peaks allow. On a CPU the reference operations,
which a CPU run uses, are timed beside plain torch. Without a GPU a table of floors for GPUs
follows, which is a model. Whatever is timed is checked first; a wrong result is an error, no time.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.devices import DEVICES, Device
from benchmarks.kernel_cases import Case, cases
from benchmarks.kernel_checks import Run, WrongResultError, check
from benchmarks.kernel_costs import COSTS, Layer, Producer
from benchmarks.kernel_tables import (
    OURS,
    Result,
    Timing,
    csv_rows,
    measured_table,
    roofline_table,
    write_csv,
)
from falqon.doctor import examine
from falqon.errors import InputError
from falqon.kernels import devices

MODEL = (
    "Floors: a model from the peaks that vendors publish (benchmarks/devices.py). Nothing was "
    "measured on these GPUs."
)
DRIVER_NAMES = {
    "NVIDIA GeForce RTX 4090": "RTX 4090",
    "NVIDIA L40S": "L40S",
    "NVIDIA H100 80GB HBM3": "H100 SXM",
    "NVIDIA B200": "B200",
}
"""Names that drivers give to the devices of `DEVICES`; others of their kind have other peaks."""


@dataclass(frozen=True)
class Model:
    """Sizes of a Llama model and the tokens of a step that goes with them."""

    hidden: int
    intermediate: int
    tokens: int

    def layers(self, tokens: int, rank: int, rows: int) -> list[Layer]:
        """Its three kinds of linear layers; a norm or a SwiGLU comes before some of them."""
        h, f = self.hidden, self.intermediate
        shapes: tuple[tuple[int, int, Producer], ...] = (
            (h, h, "rms_norm"),
            (h, f, "rms_norm"),
            (f, h, "swiglu"),
        )
        return [Layer(tokens, n_in, out, rank, rows, (before,)) for n_in, out, before in shapes]


MODELS = {
    "7b": Model(4096, 11008, 16 * 527),
    "13b": Model(5120, 13824, 16 * 527),
    "smollm": Model(576, 1536, 6 * 192),
}
"""LLaMA with the paper's batch (see `benchmarks.step_model`), SmolLM2-135M with that of
`benchmarks.learning`."""


Timer = Callable[[Mapping[str, Run]], dict[str, Timing]]


def interleaved(repeats: int) -> Timer:
    """A timer for CPUs: rounds of one call each, in an order that changes.

    So what else the machine does meets all alike, and none always follows the same other, whose
    threads and cache contents it would find.
    """
    shuffle = random.Random(0).shuffle

    def measure(runs: Mapping[str, Run]) -> dict[str, Timing]:
        names = list(runs)
        samples: dict[str, list[float]] = {name: [] for name in names}
        for _ in range(repeats):
            shuffle(names)
            for name in names:
                start = time.perf_counter()
                runs[name]()
                samples[name].append(time.perf_counter() - start)
        return {name: _timing(samples[name]) for name in runs}

    return measure


def _timing(seconds: list[float]) -> Timing:
    fifths = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else seconds
    return Timing(statistics.median(seconds), fifths[0], fifths[-1])


def on_gpu(runs: Mapping[str, Run]) -> dict[str, Timing]:
    """The timer for CUDA: `triton.testing.do_bench`, which empties the cache before each call."""
    from triton.testing import do_bench

    found = {}
    for name, run in runs.items():
        median, p20, p80 = (ms / 1e3 for ms in do_bench(run, quantiles=(0.5, 0.2, 0.8)))
        found[name] = Timing(median, p20, p80)
    return found


def measure(
    todo: list[Case], device: torch.device, gpu: bool, timer: Timer, compiled: bool = True
) -> Iterator[Result]:
    """Check and time cases, one after the other; arguments as of `Case.build`.

    Raises:
        WrongResultError: naming the first case of ours that is wrong.
    """
    for case in todo:
        setup = case.build(device, gpu, compiled)
        if setup is None:
            yield Result(case)
            continue
        refused = check(f"{case.name} ({case.shape})", setup)
        runs = {OURS: setup.ours}
        runs |= {name: run for name, run in setup.others.items() if name not in refused}
        yield Result(case, timer(runs), refused)


def parse_shapes(args: argparse.Namespace, default: str) -> list[Layer]:
    """Layers that `--shapes`, `--tokens`, `--rank` and `--rows` ask for.

    Raises:
        InputError: naming the flag.
    """
    for key in ("tokens", "rank", "rows"):
        value = getattr(args, key)
        if value is not None and value < 1:
            raise InputError(f"--{key} is {value}; it must be at least 1.")
    text = args.shapes or default
    if text in MODELS:
        model = MODELS[text]
        layers = model.layers(args.tokens or model.tokens, args.rank, args.rows)
    else:
        sizes = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
        if len(sizes) != 3 or min(sizes) < 1:
            raise InputError(
                f"--shapes is {text!r}; choose {', '.join(MODELS)}, or give three sizes as "
                "TOKENS,IN,OUT."
            )
        if args.tokens is not None:
            raise InputError(
                f"--tokens goes with the name of a model; --shapes {text} has its own."
            )
        tokens, n_in, out = sizes
        layers = [Layer(tokens, n_in, out, args.rank, args.rows)]
    narrow = min(min(x.n_in, x.out) for x in layers)
    for key in ("rank", "rows"):
        if getattr(args, key) > narrow:
            raise InputError(
                f"--{key} is {getattr(args, key)}, more than the {narrow} features of a layer."
            )
    return layers


@dataclass(frozen=True)
class Place:
    """Where things are measured.

    Attributes:
        device: of the tensors.
        name: for people.
        peaks: None if they are not known.
        gpu: Triton's kernels are what is measured.
    """

    device: torch.device
    name: str
    peaks: Device | None = None
    gpu: bool = False


def find_device(wanted: str) -> Place:
    """The device to measure on.

    Raises:
        InputError: if it is not there, or too old.
    """
    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise InputError("--device is cuda, but torch finds no CUDA device here.")
    if wanted == "cpu" or not there:
        return Place(torch.device("cpu"), examine()["cpu"]["name"])
    device = torch.device("cuda", torch.cuda.current_device())
    devices.check(device)
    name = torch.cuda.get_device_name(device)
    return Place(device, name, DEVICES.get(DRIVER_NAMES.get(name, "")), gpu=True)


def load() -> str:
    """A remark on other work that the CPU has, if it has any; it makes times of threads wait."""
    cores = os.cpu_count() or 1
    running = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if running < 0.5:
        return ""
    advice = ""
    if torch.get_num_threads() > 1:
        advice = "; threads then wait\nfor the slowest, OMP_NUM_THREADS=1 gives steadier ratios"
    return f".\nOther work is running (load {running:.1f} on {cores} cores){advice}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument(
        "--shapes",
        metavar="NAME|T,IN,OUT",
        help=f"{', '.join(MODELS)}, or tokens and features; default: 7b on a GPU and for floors,\n"
        "smollm on a CPU",
    )
    made.add_argument("--tokens", type=int, help="T of a named model; default: its paper's batch")
    made.add_argument("--rank", type=int, default=64, help="of the adapters (paper: 64)")
    made.add_argument("--rows", type=int, default=10, help="k, rows written (paper: 10)")
    made.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(COSTS)}")
    made.add_argument("--repeats", type=int, default=15, help="calls of each, on a CPU")
    made.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    made.add_argument("--csv", type=Path, metavar="FILE", help="write all numbers")
    return made


def run(args: argparse.Namespace) -> None:
    """Measure, print, write.

    Raises:
        InputError: for a mistake in the arguments, before any work.
        WrongResultError: if one of our operations is wrong.
    """
    unknown = [name for name in args.only or () if name not in COSTS]
    if unknown:
        raise InputError(f"--only: unknown operation {unknown[0]!r}; choose of {', '.join(COSTS)}.")
    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}; it must be at least 1.")
    if args.csv and not args.csv.parent.is_dir():
        raise InputError(f"--csv: there is no directory {args.csv.parent}.")
    place = find_device(args.device)
    todo = cases(parse_shapes(args, "7b" if place.gpu else "smollm"), args.only)
    modelled = [] if place.gpu else cases(parse_shapes(args, "7b"), args.only)
    how = f"{args.repeats} interleaved calls of each{load()}"
    timer = interleaved(args.repeats)
    if place.gpu:
        timer, how = on_gpu, "triton.testing.do_bench"
    results = list(measure(todo, place.device, place.gpu, timer, not args.no_compile))
    software = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(
        f"Measured on {place.name}, {software}; {how}.\n"
        "Median, 20th and 80th percentile of ours; alternatives as multiples of our median (above\n"
        "1: ours is the faster), '-': not timed, see below the table.\n"
    )
    print(measured_table(results, place.peaks))
    if modelled:
        print(f"\n{MODEL}\nMicroseconds, m: set by memory traffic, c: by arithmetic.\n")
        print(roofline_table(modelled))
    if args.csv:
        write_csv(args.csv, csv_rows(results, modelled, place.name, place.peaks))


def main(argv: list[str] | None = None) -> int:
    """Command line; 2 for a mistake in it, 1 for a wrong result."""
    made = parser()
    args = made.parse_args(argv)
    try:
        run(args)
    except InputError as error:
        made.error(str(error))
    except WrongResultError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

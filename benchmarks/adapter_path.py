"""Does FP8 pay on the LoRA path, on this device? The paper's first analysis (Fig. 1, Table 8).

    python -m benchmarks.adapter_path --output runs/adapter_path

The path of one linear layer, forward `O_A = x A^T`, `O = O_A B^T` and backward `dB = g^T O_A`,
`dO_A = g B`, `dA = dO_A^T x`, `dx = dO_A A`, in bfloat16 and in FP8. In FP8 x and g are given
quantised, since the frozen weight's matmul needs them anyway; A, B, O_A and dO_A are quantised
here, one scale a tensor (paper eq. 3), and that is timed by itself as well. Matmuls are
`torch._scaled_mm`, whose operands lie along the dimension that is summed; the copies that this
takes are part of the path. Only a device with FP8 units gains from FP8 matmuls; what quantising
adds to them shows anywhere.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_tables import Timing, as_table
from benchmarks.kernels import find_device, interleaved, load, on_gpu
from falqon.errors import InputError
from falqon.fp8 import E4M3, E5M2, Format
from falqon.kernels import Quantize

RANKS = tuple(2**n for n in range(4, 15))
COLUMNS = (
    "rank", "tokens", "in", "out", "bf16_s", "fp8_s", "quantising_s", "fp8_to_bf16",
    "bf16_p20_s", "bf16_p80_s", "fp8_p20_s", "fp8_p80_s",
)  # fmt: skip
_KINDS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


@dataclass(frozen=True)
class Codes:
    """A quantised matrix: codes in both layouts, and the reciprocal scale, float32 scalar."""

    rows: Tensor
    columns: Tensor
    unit: Tensor


def quantise(x: Tensor, fmt: Format = E4M3) -> Codes:
    """FP8 with one scale; codes [m, n], and transposed [n, m] for products over the first side."""
    codes, scale = Quantize(fmt, "per_tensor", "none")(x)
    codes = codes.view(_KINDS[fmt.name])
    transposed = codes.view(torch.uint8).t().contiguous().view(codes.dtype)
    return Codes(codes, transposed, scale.reciprocal().reshape(()))


def product(left: Tensor, left_unit: Tensor, right: Tensor, right_unit: Tensor) -> Tensor:
    """left [m, k] times right [n, k] transposed, bfloat16 [m, n]; both FP8."""
    return torch._scaled_mm(left, right.t(), left_unit, right_unit, out_dtype=torch.bfloat16)


@dataclass
class AdapterPath:
    """Operands of one layer's adapter: x [T, in], g [T, out], A [r, in], B [out, r], bfloat16."""

    x: Tensor
    g: Tensor
    A: Tensor
    B: Tensor

    def __post_init__(self) -> None:
        self.xq, self.gq = quantise(self.x), quantise(self.g, E5M2)

    def in_bf16(self) -> tuple[Tensor, ...]:
        """O, dx, dA, dB in 16 bits."""
        hidden = self.x @ self.A.t()
        back = self.g @ self.B
        return hidden @ self.B.t(), back @ self.A, back.t() @ self.x, self.g.t() @ hidden

    def in_fp8(self) -> tuple[Tensor, ...]:
        """O, dx, dA, dB in FP8."""
        xq, gq = self.xq, self.gq
        a, b = quantise(self.A), quantise(self.B)
        hidden = quantise(product(xq.rows, xq.unit, a.rows, a.unit))
        back = quantise(product(gq.rows, gq.unit, b.columns, b.unit), E5M2)
        return (
            product(hidden.rows, hidden.unit, b.rows, b.unit),
            product(back.rows, back.unit, a.columns, a.unit),
            product(back.columns, back.unit, xq.columns, xq.unit),
            product(gq.columns, gq.unit, hidden.columns, hidden.unit),
        )

    def quantising(self) -> Callable[[], Any]:
        """Only what the FP8 path quantises: A, B, O_A and dO_A."""
        hidden, back = self.x @ self.A.t(), self.g @ self.B
        return lambda: (
            quantise(self.A),
            quantise(self.B),
            quantise(hidden),
            quantise(back, E5M2),
        )


def build(rank: int, tokens: int, inputs: int, outputs: int, device: torch.device) -> AdapterPath:
    """Random operands of the size that they have in training."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(rows: int, columns: int, size: float) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device)
        return (values * size).to(torch.bfloat16)

    return AdapterPath(
        draw(tokens, inputs, 1.0),
        draw(tokens, outputs, 1e-3),
        draw(rank, inputs, inputs**-0.5),
        draw(outputs, rank, rank**-0.5),
    )


def check(path: AdapterPath) -> None:
    """The FP8 path computes what the 16-bit one does, to FP8's precision.

    Raises:
        RuntimeError: naming the result that is off.
    """
    names = ("O", "dx", "dA", "dB")
    for name, low, high in zip(names, path.in_fp8(), path.in_bf16(), strict=True):
        error = float((low.float() - high.float()).norm() / high.float().norm())
        if not error < 0.15:  # three roundings to 2 or 3 bits of mantissa
            raise RuntimeError(f"{name} of the FP8 path is off by {error:.1%}: nothing to time.")


def measure(args: argparse.Namespace, device: torch.device, gpu: bool) -> list[dict[str, Any]]:
    """A row a rank."""
    timer = on_gpu if gpu else interleaved(args.repeats)
    rows = []
    for rank in args.ranks:
        path = build(rank, args.tokens, args.inputs, args.outputs, device)
        check(path)
        runs = {"bf16": path.in_bf16, "fp8": path.in_fp8, "quantising": path.quantising()}
        times: dict[str, Timing] = timer(runs)
        bf16, fp8 = times["bf16"], times["fp8"]
        values = (
            rank, args.tokens, args.inputs, args.outputs, bf16.median, fp8.median,
            times["quantising"].median, fp8.median / bf16.median, bf16.p20, bf16.p80, fp8.p20,
            fp8.p80,
        )  # fmt: skip
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """For the terminal."""
    header = ["rank", "bf16 ms", "FP8 ms", "quantising ms", "FP8 / bf16"]
    lines = [
        [
            str(row["rank"]),
            f"{1e3 * row['bf16_s']:.3f}",
            f"{1e3 * row['fp8_s']:.3f}",
            f"{1e3 * row['quantising_s']:.3f}",
            f"{row['fp8_to_bf16']:.2f}",
        ]
        for row in rows
    ]
    return as_table(header, lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Times against the rank, both axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    ranks = [row["rank"] for row in rows]
    for key, label in (("bf16_s", "bf16"), ("fp8_s", "FP8"), ("quantising_s", "quantising alone")):
        axes.plot(ranks, [1e3 * row[key] for row in rows], marker=".", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("rank")
    axes.set_ylabel("ms, forward and backward of a layer's adapter")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapter_path",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--tokens", type=int, help="default 8192 on a GPU, 256 on a CPU")
    parser.add_argument("--inputs", type=int, default=4096)
    parser.add_argument("--outputs", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=10, help="on a CPU; a GPU has its own timer")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--output", type=Path, default=Path("runs/adapter_path"))
    args = parser.parse_args(argv)
    try:
        place = find_device(args.device)
        args.tokens = args.tokens or (8192 if place.gpu else 256)
        for name in ("ranks", "tokens", "inputs", "outputs"):
            given = getattr(args, name)
            if any(n < 16 or n % 16 for n in (given if isinstance(given, list) else [given])):
                raise InputError(f"--{name} {given}: FP8 matmuls need multiples of 16.")
    except InputError as error:
        print(f"adapter_path: error: {error}", file=sys.stderr)
        return 2
    rows = measure(args, place.device, place.gpu)
    args.output.mkdir(parents=True, exist_ok=True)
    with (args.output / "adapter_path.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, args.output / "adapter_path.png")
    print(f"{place.name}, {torch.get_num_threads()} threads, {args.tokens} tokens{load()}")
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

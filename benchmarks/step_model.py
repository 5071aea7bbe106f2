"""Predicted seconds, launches and memory of one training step, at published peaks of GPUs.

    python -m benchmarks.step_model                                   # tables to the terminal
    python -m benchmarks.step_model --markdown docs/step_model.md     # and into that page

A MODEL, NOT A MEASUREMENT, and fitted to nothing: every kernel takes the longer of the time to move
its bytes at the device's bandwidth and the time to do its FLOPs at the device's peak. So it is a
lower bound of what the assumed kernels take, and the quotient of a measured time and this one is
how far an implementation is from the machine. What is assumed is in docs/step_model.md.
"""

from __future__ import annotations

import argparse
import csv
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from benchmarks.devices import DEVICES, Device
from benchmarks.step_ops import Op, Settings, Totals, totals
from benchmarks.step_record import CONFIGS, Step, record

METHODS = {
    "lora": "LoRA bf16",
    "qlora": "QLoRA NF4",
    "torchao": "TorchAO FP8 + LoRA",
    "torchao_dw": "  with unneeded dW",
    "paper": "FALQON, as in the paper",
    "falqon": "falqon, grouped and fused",
    "falqon_live": "  with live changes",
}
"""What is modelled, and the tables' name for it."""

OOM = float("inf")
PAPER: dict[tuple[str, str], dict[str, float]] = {
    ("RTX 4090", "7B"): {"lora": 2.87, "qlora": 5.45, "torchao": 2.18, "paper": 1.80},
    ("RTX 4090", "13B"): {"qlora": 9.37, "torchao": OOM, "paper": 3.26},
    ("L40S", "7B"): {"qlora": 6.00, "torchao": 2.30, "paper": 1.72},
    ("H100 SXM", "7B"): {"qlora": 1.90, "torchao": 0.81, "paper": 0.62},
}
"""Seconds a step that arXiv:2510.24061 reports (main results and its table of other GPUs; its LoRA
is in FP16); `OOM` is out of memory."""

PUBLISHED = (
    ("FALQON (arXiv:2510.24061), LLaMA-7B", "13.6k"),
    ("NeMo, BF16 LoRA, 8B model", "12k to 14k"),
    ("NeMo, FP8 LoRA, 7B model, packed", "24.8k"),
)
"""Tokens/s on one H100, as the publishers print them."""

LAUNCH_SECONDS = 5e-6
"""What the host needs for one launch, a round figure and not a measurement: launches times this is
the time below which a step cannot come without CUDA graphs, however fast the kernels are."""

KINDS = (
    "gemm",
    "thin gemm",
    "attention",
    "elementwise",
    "quantise",
    "transpose",
    "dequantise",
    "head and loss",
    "optimizer",
)
FAR = 1.3
"""A quotient of paper and model beyond this, or below its inverse, needs a reason."""
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


@lru_cache(maxsize=128)
def step(size: str, method: str, settings: Settings, checkpointing: bool) -> Step:
    """`record`, once for each set of arguments."""
    return record(size, method, settings, checkpointing)


@dataclass(frozen=True)
class Prediction:
    """One method on one device.

    Attributes:
        checkpointing: decoder layers are computed again in the backward pass.
        totals: sums over the step's kernels.
        memory: bytes by part.
        ops: the kernels.
    """

    device: Device
    size: str
    method: str
    settings: Settings
    checkpointing: bool
    totals: Totals
    memory: dict[str, int]
    ops: Counter[Op]

    @property
    def seconds(self) -> float:
        """Of the step, at the device's peaks."""
        return sum(self.totals.seconds.values())

    @property
    def peak(self) -> int:
        """Bytes at the worst moment, without what allocator, context and libraries take."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """The peak is within the device's memory."""
        return self.peak <= self.device.memory

    @property
    def reported(self) -> float | None:
        """The paper's seconds; None if it has none."""
        return PAPER.get((self.device.name, self.size), {}).get(self.method)


def predict(
    device: Device, size: str, method: str, settings: Settings, checkpointing: str = "on"
) -> Prediction:
    """Model one step; with `auto` activations are kept if that fits the device's memory."""

    def make(again: bool) -> Prediction:
        made = step(size, method, settings, again)
        sums = totals(made.ops, device)
        return Prediction(device, size, method, settings, again, sums, made.memory, made.ops)

    if checkpointing == "auto":
        kept = make(False)
        return kept if kept.fits else make(True)
    return make(checkpointing == "on")


def _gib(number: float) -> str:
    return f"{number / 2**30:.1f}"


def _paper_cell(value: float | None) -> str:
    return "" if value is None else "OOM" if value == OOM else f"{value:.2f}"


def compare_table(device: Device, size: str, settings: Settings, checkpointing: str) -> Table:
    """Model beside paper for one device and model."""
    rows: list[tuple[str, ...]] = []
    made = {m: predict(device, size, m, settings, checkpointing) for m in METHODS}
    base = made["paper"]
    for method, p in made.items():
        measured = p.reported
        finite = measured is not None and measured != OOM
        quotient = f"{measured / p.seconds:.2f}" if finite and measured else ""
        ratio = f"{measured / base.reported:.2f}" if finite and measured and base.reported else ""
        peak = _gib(p.peak) if p.fits else f"{_gib(p.peak)} OOM"
        rows.append(
            (
                METHODS[method],
                f"{p.seconds:.2f}",
                _paper_cell(measured),
                quotient,
                f"{p.seconds / base.seconds:.2f}",
                ratio,
                peak,
                f"{p.totals.launches:,}",
                f"{p.totals.launches * LAUNCH_SECONDS:.3f}",
            )
        )
    columns = (
        "method", "model s", "paper s", "paper / model", "x FALQON, model", "x FALQON, paper",
        "peak GiB", "launches", "launch floor s",
    )  # fmt: skip
    return f"{device.name} ({_gib(device.memory)} GiB), LLaMA-{size}: seconds a step", columns, rows


def others_table(pairs: list[tuple[str, str]], settings: Settings, checkpointing: str) -> Table:
    """Devices and models that the paper has no figures of."""
    rows: list[tuple[str, ...]] = []
    for method, name in METHODS.items():
        made = (predict(DEVICES[d], s, method, settings, checkpointing) for d, s in pairs)
        rows.append((name, *(f"{p.seconds:.2f}" if p.fits else "OOM" for p in made)))
    columns = ("method", *(f"{device}, {size}" for device, size in pairs))
    return "Without figures of the paper: the model's seconds a step", columns, rows


def kinds_table(device: Device, size: str, settings: Settings, checkpointing: str) -> Table:
    """Where the model's time goes, in milliseconds."""
    rows: list[tuple[str, ...]] = []
    for method, name in METHODS.items():
        p = predict(device, size, method, settings, checkpointing)
        cells = (f"{1e3 * p.totals.seconds.get(kind, 0.0):.0f}" for kind in KINDS)
        moved, flops = p.totals.moved / 1e9, sum(p.totals.flops.values()) / 1e12
        rows.append((name, *cells, f"{moved:.0f}", f"{flops:.0f}"))
    title = f"{device.name}, LLaMA-{size}: milliseconds of the model by kind of kernel"
    return title, ("method", *KINDS, "GB moved", "TFLOP"), rows


def memory_table(size: str, settings: Settings, checkpointing: bool) -> Table:
    """Peak memory by part."""
    rows: list[tuple[str, ...]] = []
    for method, name in METHODS.items():
        memory = step(size, method, settings, checkpointing).memory
        peak = sum(memory.values())
        fits = [d.name for d in DEVICES.values() if peak <= d.memory]
        cells = (_gib(value) for value in memory.values())
        rows.append((name, *cells, _gib(peak), ", ".join(fits) or "none"))
    columns = (
        "method", "weights", "adapters", "gradients, AdamW", "activations", "working", "peak",
        "fits",
    )  # fmt: skip
    kept = "layers computed again" if checkpointing else "all activations kept"
    return f"LLaMA-{size}, {kept}: peak memory in GiB", columns, rows


def throughput_table(settings: Settings) -> Table:
    """Tokens/s on one H100, model beside published."""
    device = DEVICES["H100 SXM"]
    rows: list[tuple[str, ...]] = []
    for method, name in METHODS.items():
        cells = []
        for mode in ("on", "auto"):
            p = predict(device, "7B", method, settings, mode)
            again = ", recomputes" if mode == "auto" and p.checkpointing else ""
            cells.append(f"{settings.total / p.seconds / 1e3:.1f}k{again}")
        rows.append((f"model: {name.strip()}", *cells))
    rows += [(f"published: {name}", value, "") for name, value in PUBLISHED]
    columns = ("H100", "layers computed again", "kept where it fits")
    return "One H100 SXM, LLaMA-7B: tokens/s", columns, rows


def ladder_table(device: Device, size: str, settings: Settings) -> Table:
    """What keeps falqon from the ceiling, one kind of kernel after the other."""
    p = predict(device, size, "falqon", settings, "auto")
    first, again_name = "FP8 GEMMs of the backbone", "the same, computed again"
    parts = {first: 0.0, again_name: 0.0}
    for op, times in p.ops.items():
        name = op.kind
        if name == "gemm" and op.precision == "fp8":
            name = again_name if op.phase == "recompute" else first
        elif name == "gemm":
            name = "head and loss"
        elif op.phase == "recompute" and name != "head and loss":
            name = "other layer kernels, computed again"
        parts[name] = parts.get(name, 0.0) + times * op.seconds(device)
    order = [first, *sorted((k for k in parts if k != first), key=lambda k: -parts[k])]
    rows: list[tuple[str, ...]] = []
    total = 0.0
    for name in order:
        if parts[name] >= 5e-5:
            total += parts[name]
            share = parts[name] / p.seconds
            speed = settings.total / total / 1e3
            rows.append((name, f"{1e3 * parts[name]:.1f}", f"{share:.0%}", f"{speed:.1f}k"))
    title = f"{device.name}, LLaMA-{size}, falqon grouped and fused: from the ceiling down"
    return title, ("with", "ms", "share", "tokens/s so far"), rows


def far_table(settings: Settings, checkpointing: str) -> Table:
    """Every entry of the paper that the model misses by more than 30%, and what could be why."""
    rows: list[tuple[str, ...]] = []
    for (device, size), entries in PAPER.items():
        for method, measured in entries.items():
            p = predict(DEVICES[device], size, method, settings, checkpointing)
            quotient = measured / p.seconds
            if measured == OOM or 1 / FAR <= quotient <= FAR:
                continue
            kinds = p.totals.seconds
            top = max(kinds, key=lambda kind: kinds[kind])
            left = measured - (p.seconds - kinds["gemm"])
            floor = p.totals.launches * LAUNCH_SECONDS
            rows.append(
                (
                    f"{device}, {size}, {METHODS[method]}",
                    f"{quotient:.2f}",
                    f"{1 / quotient:.0%}",
                    f"{top} ({kinds[top] / p.seconds:.0%})",
                    f"{kinds['gemm'] / left:.0%}",
                    f"{floor / measured:.0%}",
                )
            )
    columns = (
        "entry", "paper / model", "of the model's speed", "most of the model's time",
        "GEMM rate if all else ran at peak", "launch floor / paper",
    )  # fmt: skip
    return "Paper and model more than 30% apart", columns, rows


def tables(args: argparse.Namespace, settings: Settings) -> list[Table]:
    """All tables of one call."""
    made: list[Table] = []
    for device, size in PAPER:
        if device in args.devices and size in args.sizes:
            made.append(compare_table(DEVICES[device], size, settings, args.checkpointing))
    made.append(far_table(settings, args.checkpointing))
    others = [(d, s) for d in args.devices for s in args.sizes if (d, s) not in PAPER]
    if others:
        made.append(others_table(others, settings, args.checkpointing))
    for device in args.detail:
        made.append(kinds_table(DEVICES[device], args.sizes[0], settings, args.checkpointing))
    for size in args.sizes:
        made += [memory_table(size, settings, again) for again in (True, False)]
    made.append(throughput_table(settings))
    made += [ladder_table(DEVICES[d], args.sizes[0], settings) for d in args.detail]
    return made


def as_text(table: Table) -> str:
    """Aligned columns."""
    title, columns, rows = table
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    lines = [title]
    for row in (columns, *rows):
        first, *others = (cell.ljust(w) for cell, w in zip(row, widths, strict=True))
        others = [c.strip().rjust(w) for c, w in zip(others, widths[1:], strict=True)]
        lines.append("  ".join((first, *others)).rstrip())
    return "\n".join(lines) + "\n"


def as_markdown(table: Table) -> str:
    """The same as a Markdown table under a heading."""
    title, columns, rows = table
    lines = [f"### {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


BEGIN = "<!-- begin: written by python -m benchmarks.step_model --markdown -->"
END = "<!-- end -->"


def put_between_markers(text: str, inner: str) -> str:
    """Replace what stands between the markers of a page.

    Raises:
        ValueError: if the page has no markers.
    """
    if text.count(BEGIN) != 1 or END not in text.partition(BEGIN)[2]:
        raise ValueError(f"there must be one line {BEGIN!r} and after it one {END!r}")
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n\n{inner}\n{END}{rest.partition(END)[2]}"


def write_csv(path: Path, args: argparse.Namespace, settings: Settings) -> None:
    """One row for each device, model, method and way to keep activations."""
    rows = []
    for device in args.devices:
        for size in args.sizes:
            for method in METHODS:
                for mode in ("on", "off"):
                    p = predict(DEVICES[device], size, method, settings, mode)
                    row: dict[str, object] = {
                        "device": device,
                        "model": size,
                        "method": method,
                        "checkpointing": mode,
                        "tokens": settings.total,
                        "model_s": f"{p.seconds:.5f}",
                        "paper_s": _paper_cell(p.reported) if mode == "on" else "",
                        "launches": p.totals.launches,
                        "bytes_moved": p.totals.moved,
                    }
                    row |= {f"flops_{x}": p.totals.flops.get(x, 0) for x in ("fp8", "bf16", "fp32")}
                    row |= {f"{k.replace(' ', '_')}_s": p.totals.seconds.get(k, 0) for k in KINDS}
                    row |= {f"{part}_bytes": value for part, value in p.memory.items()}
                    rows.append(row | {"peak_bytes": p.peak, "fits": p.fits})
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, Settings]:
    """Arguments and the settings in them; ends the process for a mistake in them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=16, help="rows of a step (paper: 16)")
    parser.add_argument(
        "--tokens",
        type=int,
        default=527,
        help="tokens of a row; the paper does not say. Its 13.6k tokens/s and 0.62 s a step on an\n"
        "H100 give 8,432 tokens a step, 527 in each of 16 rows",
    )
    parser.add_argument("--rank", type=int, default=64, help="of the adapters (paper: 64)")
    parser.add_argument("--rows", type=int, default=10, help="k, rows written (paper: 10)")
    parser.add_argument("--dropout", action="store_true", help="LoRA dropout is on")
    parser.add_argument(
        "--cached-transpose", action="store_true", help="keep transposed FP8 weights in memory"
    )
    parser.add_argument(
        "--checkpointing",
        choices=("on", "off", "auto"),
        default="on",
        help="compute decoder layers again in the backward pass; auto: where they do not fit",
    )
    parser.add_argument("--devices", nargs="+", choices=DEVICES, default=list(DEVICES))
    parser.add_argument("--sizes", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument(
        "--detail",
        nargs="+",
        choices=DEVICES,
        default=["RTX 4090", "H100 SXM"],
        help="devices whose time is taken apart",
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="page with markers to fill")
    args = parser.parse_args(argv)
    for key in ("batch", "tokens", "rank", "rows"):
        if getattr(args, key) < 1:
            parser.error(f"--{key} is {getattr(args, key)}; it must be at least 1")
    smallest = min(CONFIGS[size]["hidden_size"] for size in args.sizes)
    if args.rank > smallest:
        parser.error(f"--rank is {args.rank}, more than the {smallest} features of a layer")
    if args.markdown and not args.markdown.is_file():
        parser.error(f"--markdown: {args.markdown} is not a file; it needs the two marker lines")
    settings = Settings(
        args.batch, args.tokens, args.rank, args.rows, args.dropout, args.cached_transpose
    )
    return args, settings


def main(argv: list[str] | None = None) -> int:
    args, settings = parse(argv)
    made = tables(args, settings)
    print("A model at published peaks, not a measurement; nothing in it is fitted.\n")
    print("\n".join(as_text(table) for table in made))
    if args.csv:
        write_csv(args.csv, args, settings)
    if args.markdown:
        inner = "\n".join(as_markdown(table) for table in made)
        try:
            text = put_between_markers(args.markdown.read_text(), inner)
        except ValueError as error:
            raise SystemExit(f"{args.markdown}: {error}") from error
        args.markdown.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

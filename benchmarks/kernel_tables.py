"""What the kernel benchmark found, as tables for people and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks import kernel_costs
from benchmarks.devices import DEVICES, Device
from benchmarks.kernel_cases import Case
from benchmarks.kernel_costs import COSTS

OURS = "ours"


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float


@dataclass
class Result:
    """What was measured of one case.

    Attributes:
        case: the operation and its sizes.
        times: by implementation, `ours` among them; empty if there is nothing to run here.
        refused: why alternatives were not timed, by name.
    """

    case: Case
    times: dict[str, Timing] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str) -> float:
        """Time of an implementation over ours."""
        return self.times[name].median / self.times[OURS].median


def as_table(header: list[str], rows: list[list[str]]) -> str:
    """Columns one under the other; all but the first two to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def measured_table(results: list[Result], peaks: Device | None) -> str:
    """Times in microseconds, the share of the roofline, and alternatives as multiples of ours."""
    names = list(dict.fromkeys(n for r in results for n in (*r.times, *r.refused) if n != OURS))
    header = ["operation", "shape", "median us", "p20", "p80", "of roofline"]
    rows = []
    for result in results:
        row = [result.case.name, result.case.shape]
        if not result.times:
            rows.append([*row, "GPU only", *[""] * (3 + len(names))])
            continue
        ours = result.times[OURS]
        share = share_of_roofline(result, peaks)
        row += [f"{1e6 * t:.1f}" for t in (ours.median, ours.p20, ours.p80)]
        row.append("no peaks" if share is None else f"{share:.0%}")
        for name in names:
            refused = "-" if name in result.refused else ""
            row.append(f"{result.ratio(name):.2f}x" if name in result.times else refused)
        rows.append(row)
    text = as_table(header + names, rows)
    notes = [
        f"- {r.case.name} ({r.case.shape}), {name}: {reason}"
        for r in results
        for name, reason in r.refused.items()
    ]
    return "\n".join([text, *notes])


def share_of_roofline(result: Result, peaks: Device | None) -> float | None:
    """Floor over measured time; None for a device whose peaks are not known."""
    if peaks is None:
        return None
    ops = COSTS[result.case.name](result.case.layer)
    return kernel_costs.floor_seconds(ops, peaks) / result.times[OURS].median


def roofline_table(todo: list[Case]) -> str:
    """Bytes, FLOPs, and the floor in microseconds on each device with what sets it."""
    header = ["operation", "shape", "MB", "GFLOP", "FLOP/byte", *DEVICES]
    rows = []
    for case in todo:
        ops = COSTS[case.name](case.layer)
        moved, flops = kernel_costs.moved(ops), kernel_costs.flops(ops)
        row = [case.name, case.shape, f"{moved / 1e6:.3g}", f"{flops / 1e9:.3g}"]
        row.append(f"{flops / moved:.1f}" if flops else "-")
        for device in DEVICES.values():
            floor = 1e6 * kernel_costs.floor_seconds(ops, device)
            digits = 1 if floor >= 10 else 2
            row.append(f"{floor:.{digits}f} {kernel_costs.limits(ops, device):<3}")
        rows.append(row)
    return as_table(header, rows)


COLUMNS = (
    "kind", "device", "operation", "shape", "implementation", "median_us", "p20_us", "p80_us",
    "ratio", "of_roofline", "note", "bytes", "flops", "torch", "threads",
)  # fmt: skip


def csv_rows(
    results: list[Result], modelled: list[Case], device: str, peaks: Device | None
) -> Iterator[dict[str, object]]:
    """A line for each implementation measured, then one for each floor (`kind` is `model`)."""

    def common(case: Case) -> dict[str, object]:
        ops = COSTS[case.name](case.layer)
        row = {"operation": case.name, "shape": case.shape, "bytes": kernel_costs.moved(ops)}
        return row | {"flops": kernel_costs.flops(ops)}

    software = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    for result in results:
        for name in (*result.times, *result.refused):
            row = {**common(result.case), **software, "kind": "measured", "device": device}
            row |= {"implementation": name, "note": result.refused.get(name, "")}
            if name in result.times:
                t = result.times[name]
                micro = [f"{1e6 * x:.3f}" for x in (t.median, t.p20, t.p80)]
                row |= dict(zip(("median_us", "p20_us", "p80_us"), micro, strict=True))
                row["ratio"] = f"{result.ratio(name):.4f}"
            share = share_of_roofline(result, peaks) if name == OURS else None
            yield row | ({} if share is None else {"of_roofline": f"{share:.4f}"})
    for case in modelled:
        for spec in DEVICES.values():
            floor = 1e6 * kernel_costs.floor_seconds(COSTS[case.name](case.layer), spec)
            row = {**common(case), "kind": "model", "device": spec.name, "implementation": "floor"}
            yield row | {"median_us": f"{floor:.3f}"}


def write_csv(path: Path, rows: Iterator[dict[str, object]]) -> None:
    """Write under a temporary name, then rename: a file that is there is complete."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    temporary.replace(path)

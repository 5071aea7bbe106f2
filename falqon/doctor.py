"""What this machine can do, and why: the report of `falqon doctor`."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from falqon.errors import InputError
from falqon.kernels import backend, devices, wide
from falqon.kernels.native import build as native
from falqon.kernels.native import products

_PACKAGES = ("falqon", "torch", "triton", "lightning", "transformers", "datasets", "wandb")

_PRODUCTS = "Whole decoder layers run in it, their products by {unit}."


def examine() -> dict[str, Any]:
    """Gather the report.

    Returns:
        Plain values: `software` (versions by package, None if missing), `cpu`, `gpus` (a list), and
        `matmul` (what `FALQON_MATMUL` asks for).
    """
    return {
        "software": {name: _version(name) for name in _PACKAGES},
        "cpu": _cpu(),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "matmul": backend.wanted(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    has = {
        "AMX": torch.cpu._is_amx_tile_supported(),
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported(),
        "AVX512": torch.cpu._is_avx512_supported(),
        "AVX2": torch.cpu._is_avx2_supported(),
    }
    units = [name for name, there in has.items() if there]
    note = "torch's bfloat16 products are those of oneDNN."
    if wide.WIDENS:
        note = (
            "This torch has no bfloat16 products for the processor: those of melded layers, and "
            "with the C++ those of attention and of the output embedding, are computed in float32, "
            "which loses nothing; what torch multiplies itself in bfloat16 (LoRA, QLoRA) takes "
            "many times as long."
        )
    elif any(has[name] for name in ("AMX", "AVX512-BF16")):
        note = "bfloat16 products have instructions of their own."
    return {
        "name": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": units,
        "memory_gib": _memory_gib(),
        "how": f"{devices.describe(torch.device('cpu'))} {note}",
        "native": " ".join(_native()),
        "notes": list(_cpu_notes()),
    }


def _native() -> Iterator[str]:
    yield native.describe()
    unit = products.unit()
    if unit is not None:
        yield _PRODUCTS.format(unit=unit)


def _cpu_notes() -> Iterator[str]:
    """What in the environment is known to cost time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    if cores and threads > cores:
        yield f"{threads} threads share {cores} cores: set OMP_NUM_THREADS to {cores}."
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    try:
        mode = pages.read_text()
    except OSError:
        return
    if "[madvise]" in mode and os.environ.get("THP_MEM_ALLOC_ENABLE") != "1":
        yield (
            "Huge pages are given on request: THP_MEM_ALLOC_ENABLE=1, set before Python starts, "
            "makes torch ask for them."
        )


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _memory_gib() -> float | None:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) / 2**30
    except (ValueError, OSError, AttributeError):
        return None


def _gpu(index: int) -> dict[str, Any]:
    device = torch.device("cuda", index)
    properties = torch.cuda.get_device_properties(index)
    number = devices.capability(device)
    report: dict[str, Any] = {
        "name": properties.name,
        "architecture": f"sm_{number}" if number else str(getattr(properties, "gcnArchName", "")),
        "memory_gib": properties.total_memory / 2**30,
        "processors": properties.multi_processor_count,
        "fp8_units": devices.has_fp8_units(device),
        "how": devices.describe(device),
        "problem": None,
    }
    try:
        devices.check(device)
        report["choices"] = str(backend.cache_file(index))
    except InputError as error:
        report["problem"] = str(error)
    return report


def format_report(report: dict[str, Any]) -> str:
    """The report as text."""
    software = ", ".join(f"{k} {v or 'missing'}" for k, v in report["software"].items())
    lines = [software, ""]
    cpu = report["cpu"]
    memory = "" if cpu["memory_gib"] is None else f", {cpu['memory_gib']:.0f} GiB"
    units = ", ".join(cpu["instructions"]) or "none of AMX, AVX512, AVX2"
    lines += [f"cpu: {cpu['name']}, {cpu['cores']} cores, {cpu['threads']} threads{memory}"]
    lines += [f"  instructions: {units}", f"  {cpu['how']}", f"  {cpu['native']}"]
    lines += [f"  {note}" for note in cpu["notes"]]
    for number, gpu in enumerate(report["gpus"]):
        lines += [
            "",
            f"cuda:{number}: {gpu['name']}, {gpu['architecture']}, {gpu['memory_gib']:.0f} GiB, "
            f"{gpu['processors']} processors",
            f"  {gpu['how']}",
        ]
        if gpu["problem"]:
            lines.append(f"  cannot be used: {gpu['problem']}")
        else:
            lines.append(f"  matmul: {report['matmul']}; choices are kept in {gpu['choices']}")
    if not report["gpus"]:
        reason = "this torch is built without CUDA" if torch.version.cuda is None else "none found"
        if torch.version.hip is not None:
            reason = "none found"
        lines += ["", f"gpu: {reason}"]
    return "\n".join(lines)

"""Triton kernels without a GPU: run by the interpreter, and compiled for the GPUs that have FP8."""

from __future__ import annotations

import fcntl
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("triton")
from benchmarks import kernel_builds

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "kernels", ["layers", "matmul", "ops", "producers", "quantize", "row_update"]
)
def test_kernels_in_the_interpreter(kernels: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, f"tests/triton_interpreted_{kernels}.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d passed", done.stdout)


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[kernel_builds.Build, kernel_builds.Resources]]:
    """Every kernel in every configuration for every architecture.

    That takes minutes: once for all processes that tests are divided among.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return kernel_builds.compile_all()
    shared = tmp_path_factory.getbasetemp().parent
    found = shared / "kernels.json"
    with (shared / "kernels.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            made = [vars(resources) for _, resources in kernel_builds.compile_all()]
            written = shared / "kernels.writing"
            written.write_text(json.dumps(made))
            written.replace(found)
    all_builds = kernel_builds.builds_of(tuple(kernel_builds.SHARED_LIMIT))
    resources = [
        kernel_builds.Resources(
            **values | {key: Counter(values[key]) for key in ("instructions", "modified")}
        )
        for values in json.loads(found.read_text())
    ]
    return list(zip(all_builds, resources, strict=True))


def test_every_kernel_compiles_within_the_limits(
    compiled: list[tuple[kernel_builds.Build, kernel_builds.Resources]],
) -> None:
    assert {build.arch for build, _ in compiled} == set(kernel_builds.SHARED_LIMIT)
    for build, resources in compiled:
        where = f"{build.name} for sm_{build.arch}"
        # Ampere has no FP8 units and is not what the kernels are made for.
        allowed = 48 if build.arch == 80 else 0
        assert resources.stack <= allowed, f"{where} spills {resources.stack} bytes a thread"
        spills = resources.instructions["STL"] + resources.instructions["LDL"]
        assert not spills or allowed, where
        assert resources.shared <= kernel_builds.SHARED_LIMIT[build.arch] * 1024, where


def test_matmuls_run_on_the_units_they_are_meant_for(
    compiled: list[tuple[kernel_builds.Build, kernel_builds.Resources]],
) -> None:
    matrix = {"QMMA", "QGMMA", "UTCQMMA", "HMMA", "HGMMA", "UTCHMMA"}
    half = {80: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
    for build, resources in compiled:
        where = f"{build.name} for sm_{build.arch}"
        used = {name for name in matrix if resources.instructions[name]}
        if build.multiplies == "fp8":
            assert used == {kernel_builds.TENSOR_CORE[build.arch]}, where
        elif build.multiplies == "half":
            assert used <= {half[build.arch], "HMMA"} and used, where
        else:  # float32 operands would be rounded by tensor cores
            assert not used, where
            assert build.multiplies != "float32" or resources.instructions["FFMA"], where


def test_gaming_blackwell_multiplies_at_full_rate(
    compiled: list[tuple[kernel_builds.Build, kernel_builds.Resources]],
) -> None:
    for build, resources in compiled:
        if build.arch == 120 and build.multiplies == "fp8":
            plain = [n for n in resources.modified if n.startswith("QMMA.") and ".SF." not in n]
            assert not plain, build.name


def test_sums_on_hopper_leave_its_tensor_cores(
    compiled: list[tuple[kernel_builds.Build, kernel_builds.Resources]],
) -> None:
    for build, resources in compiled:
        if build.arch == 90 and build.multiplies == "fp8":
            assert resources.instructions["FADD"] >= 32, build.name


def test_values_arrive_and_leave_16_bytes_at_a_time(
    compiled: list[tuple[kernel_builds.Build, kernel_builds.Resources]],
) -> None:
    for build, resources in compiled:
        where = f"{build.name} for sm_{build.arch}"
        names = resources.modified
        if build.wide:
            assert any(n.startswith("LDG.") and ".128" in n for n in names), where
        if build.multiplies in ("fp8", "half") and "matmul" in build.name:
            regular = build.constants["ALIGNED"]
            assert not regular or any(n.startswith("STG.") and ".128" in n for n in names), where
            assert not any(n.startswith("STG.") and ".U8" in n for n in names), where
            copies = resources.instructions["UTMALDG"] + resources.instructions["LDGSTS"]
            assert copies, where


def test_descriptors_load_where_there_are_any(
    compiled: list[tuple[kernel_builds.Build, kernel_builds.Resources]],
) -> None:
    for build, resources in compiled:
        used = resources.instructions["UTMALDG"] > 0
        assert used == bool(build.constants.get("DESCRIPTORS")), build.name


def test_quantisers_cast_in_hardware(
    compiled: list[tuple[kernel_builds.Build, kernel_builds.Resources]],
) -> None:
    for build, resources in compiled:
        if build.constants.get("HARDWARE"):
            form = {4: "e4m3x2", 5: "e5m2x2"}[build.constants["FORMAT"]]
            assert f"cvt.rn.satfinite.{form}.f32" in resources.ptx, build.name


def test_table_in_the_documentation(
    compiled: list[tuple[kernel_builds.Build, kernel_builds.Resources]],
) -> None:
    assert kernel_builds.documented_table() == kernel_builds.table(compiled)

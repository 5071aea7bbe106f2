"""The C++ as it is compiled for processors that can do less than this one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from falqon.kernels.native import build, products

ROOT = Path(__file__).parents[1]
NO_AMX = "-mno-amx-tile -mno-amx-bf16"
# From the most that a processor can do to the least: flags of the compiler, and what oneDNN and
# torch are told.
FORMS = {
    "AMX": ("", {}),
    "AVX512-BF16": (NO_AMX, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}),
    "AVX512": (f"{NO_AMX} -mno-avx512bf16", {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}),
    "AVX2": (
        f"{NO_AMX} -mno-avx512f",
        {
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "ATEN_CPU_CAPABILITY": "avx2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        },
    ),
    "None": (
        f"{NO_AMX} -mno-avx2",
        {"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default"},
    ),
}
TESTS = ("test_native.py", "test_native_layers.py", "test_native_products.py", "test_decoder.py")


@pytest.mark.parametrize("form", list(FORMS)[1:])
def test_forms_of_other_processors(form: str, tmp_path: Path) -> None:
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    order = list(FORMS)
    if order.index(form) <= order.index(str(products.unit())):
        pytest.skip(f"what this processor has is {form} itself, or less")
    flags, told = FORMS[form]
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" {flags}\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        **told,
        "CXX": str(script),
        "FALQON_CACHE": str(tmp_path),
        "OMP_NUM_THREADS": "1",  # tests say where they want more
    }

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        return done.stdout

    asked = (
        "from falqon.kernels import wide; from falqon.kernels.native import ops, products; "
        "assert ops.functions(); print(products.unit(), wide.WIDENS)"
    )
    assert run("-c", asked).split() == [form, str(form in ("AVX2", "None"))]
    names = [f"tests/{name}" for name in TESTS]
    assert re.search(r"\d passed", run("-m", "pytest", "-q", "-p", "no:cacheprovider", *names))

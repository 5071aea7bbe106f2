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
FORMS = {
    "AVX512-BF16": "-mno-amx-tile -mno-amx-bf16",
    "AVX512": "-mno-amx-tile -mno-amx-bf16 -mno-avx512bf16",
    "None": "-mno-amx-tile -mno-amx-bf16 -mno-avx512f",
}
TESTS = ("test_native.py", "test_native_layers.py", "test_native_products.py", "test_decoder.py")


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_other_processors(form: str, tmp_path: Path) -> None:
    compiler = build.compiler()
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    if products.unit() in (None, form):
        pytest.skip(f"what this processor has is {form} itself, or less")
    script = tmp_path / "c++"
    script.write_text(f'#!/bin/sh\nexec "{compiler}" "$@" {FORMS[form]}\n')
    script.chmod(0o755)
    environment = {
        **os.environ,
        "CXX": str(script),
        "FALQON_CACHE": str(tmp_path),
        "OMP_NUM_THREADS": "2",  # what threads share is tested, too
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

    asked = "from falqon.kernels.native import ops, products; assert ops.functions(); "
    assert run("-c", asked + "print(products.unit())").split() == [form]
    names = [f"tests/{name}" for name in TESTS]
    assert re.search(r"\d passed", run("-m", "pytest", "-q", "-p", "no:cacheprovider", *names))

"""Triton kernels without a GPU: run by the interpreter, and compiled for the GPUs that have FP8."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
triton: Any = pytest.importorskip("triton")
SHARED_LIMIT = {89: 99, 90: 227, 100: 227, 120: 99}  # KiB a block may use, by compute capability


def test_kernels_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/triton_interpreted.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert re.search(r"\d\d passed", done.stdout)


def compiled(
    kernel: Any, signature: dict[str, str], constants: dict[str, Any], **options: Any
) -> Any:
    """Ahead-of-time compilation; pointers and sizes are multiples of 16, as they mostly are."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kinds = {**signature, **dict.fromkeys(constants, "constexpr")}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if kinds[name].startswith("*") or name in ("features", "rank", "out")
    }
    capability = options.pop("capability")
    source = ASTSource(kernel, kinds, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def cuobjdump(binary: bytes, flag: str, path: Path) -> str:
    path.write_bytes(binary)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("capability", SHARED_LIMIT)
@pytest.mark.parametrize(("origin", "stochastic"), [(0, False), (1, True), (2, False), (2, True)])
def test_row_update_compiles(
    capability: int, origin: int, stochastic: bool, tmp_path: Path
) -> None:
    from falqon.kernels import row_update_triton as module

    signature = {
        "codes": "*u8",
        "scale": "*fp32",
        "rows": "*i64",
        "change": "*fp32",
        "total": "*fp32",
        "origin": ("*fp32", "*u8", "*bf16")[origin],
        "remainder": "*fp32",
        "counted": "*i64",
        "summed": "*fp32",
        **dict.fromkeys(("count", "out", "features", "rank", "step", "layer"), "i32"),
        "limit": "fp32",
        "seed": "i64",
    }
    constants = {
        "HAS_ROWS": True,
        "ORIGIN": origin,
        "STOCHASTIC": stochastic,
        "REMAINDER": origin == 0,
        "RANK": 64,
        "CHUNK": module.CHUNK,
        "BLOCK_K": module.BLOCK_ROWS,
        "BLOCK_N": module.BLOCK_COLUMNS,
    }
    kernel = compiled(
        module.row_update_kernel,
        signature,
        constants,
        capability=capability,
        num_warps=module.WARPS,
        num_stages=module.STAGES,
        enable_fp_fusion=False,
    )
    assert kernel.metadata.shared <= SHARED_LIMIT[capability] * 1024
    usage = cuobjdump(kernel.asm["cubin"], "-res-usage", tmp_path / "kernel.cubin")
    assert re.search(r"STACK:0\b", usage), usage
    code = cuobjdump(kernel.asm["cubin"], "-sass", tmp_path / "kernel.cubin")
    assert not re.search(r"\b(STL|LDL)\b", code)  # no spills
    assert not re.search(r"[HQ]MMA", code)  # B is float32: tensor cores would round it
    assert "FFMA" in code
    if not stochastic and origin == 0:
        assert "STG.E.128" in code or "STG.E.64" in code  # codes leave several at a time

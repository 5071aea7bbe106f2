"""Triton kernels compiled for AMD GPUs, with FP8 matrix units and with those of other codes."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")
from benchmarks.kernel_builds import Build, builds

FP8 = {"gfx950": r"v_mfma_f32_\w+_f8f6f4", "gfx1201": r"v_wmma_f32_\w+_fp8_\w+"}
LANES = {"gfx950": 64, "gfx942": 64, "gfx1201": 32}


def first_of_each(has_units: bool) -> Iterator[Build]:
    """A kernel's first configuration, of the kinds that the architecture is given."""
    seen = set()
    for build in builds(89 if has_units else 80):
        kind = re.sub(r", \d+x.*", "", build.name)
        if (
            kind in seen
            or "melded_matmul, q/k/v" in build.name
            or "odd rank" in build.name
            or "features" in build.name
        ):
            continue
        seen.add(kind)
        yield build


@pytest.mark.parametrize("arch", LANES)
def test_kernels_compile_for_amd(arch: str) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    has_units = arch in FP8
    count = 0
    for build in first_of_each(has_units):
        constants = dict(build.constants)
        if "ARCH" in constants:
            constants["ARCH"] = 0
        if "HARDWARE" in constants:
            constants["HARDWARE"] = has_units
        kinds = {**build.signature, **dict.fromkeys(constants, "constexpr")}
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(build.kernel.arg_names)
            if kinds[name].startswith("*") or (kinds[name] == "i32" and name not in build.unaligned)
        }
        source = ASTSource(build.kernel, kinds, constexprs=constants, attrs=aligned)
        target = GPUTarget("hip", arch, LANES[arch])
        text = triton.compile(source, target=target, options=dict(build.options)).asm["amdgcn"]
        spilled = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
        assert spilled
        if build.multiplies != "float32":  # not what training multiplies in
            assert not any(int(n) for n in spilled), f"{build.name} for {arch}"
        if build.multiplies == "fp8":
            assert re.search(FP8[arch], text), f"{build.name} for {arch}"
        elif build.multiplies == "half":
            assert re.search(r"v_(mfma|wmma)_f32_\w+_b?f16", text), f"{build.name} for {arch}"
        count += 1
    assert count >= 10

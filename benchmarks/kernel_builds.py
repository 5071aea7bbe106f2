"""Every Triton kernel in every configuration that it is launched with, compiled without a GPU.

    python -m benchmarks.kernel_builds                # table of registers, memory, instructions
    python -m benchmarks.kernel_builds --write        # put it into docs/kernels.md

Compiles for Ampere (80), Ada (89), Hopper (90) and both kinds of Blackwell (100, 120) with the
compiler that the Triton package brings along, and reads the machine code with the disassembler next
to it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from falqon.kernels import (
    matmul_triton,
    proxy_grad_triton,
    quantize_triton,
    rms_norm_quantize_triton,
    row_update_triton,
    swiglu_quantize_triton,
    transpose_triton,
)

DOCUMENT = Path(__file__).parents[1] / "docs" / "kernels.md"
MARKS = ("<!-- kernel table: begin -->", "<!-- kernel table: end -->")
SHARED_LIMIT = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a block may use, by compute capability."""
TENSOR_CORE = {89: "QMMA", 90: "QGMMA", 100: "UTCQMMA", 120: "QMMA"}
"""Instruction of the FP8 tensor cores, by compute capability."""


@dataclass(frozen=True)
class Build:
    """A kernel as it is compiled.

    Attributes:
        name: of the kernel and its variant.
        kernel: the jitted function.
        arch: compute capability.
        signature: type of every argument that is not a constant.
        constants: by name.
        options: warps, stages and the like.
        unaligned: integer arguments that need not be multiples of 16.
        multiplies: what its matmuls run on: `fp8`, `half`, `float32`, or nothing.
        wide: values arrive 16 bytes at a time.
    """

    name: str
    kernel: Any
    arch: int
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    unaligned: tuple[str, ...] = ("count", "step", "seed", "number", "bucket")
    multiplies: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        stack: bytes of spilled registers of a thread.
        shared: bytes of shared memory of a block.
        instructions: how often each stands in the code, by name without modifiers.
        modified: the same with modifiers.
        ptx: the text before.
    """

    registers: int
    stack: int
    shared: int
    instructions: Counter[str]
    modified: Counter[str]
    ptx: str


def compile_build(build: Build) -> Resources:
    """Compile and disassemble."""
    kinds = {**build.signature, **dict.fromkeys(build.constants, "constexpr")}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(build.kernel.arg_names)
        if kinds[name].startswith("*") or (kinds[name] == "i32" and name not in build.unaligned)
    }
    source = ASTSource(build.kernel, kinds, constexprs=build.constants, attrs=aligned)
    target = GPUTarget("cuda", build.arch, 32)
    compiled = triton.compile(source, target=target, options=build.options)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        usage, code = _cuobjdump("-res-usage", path), _cuobjdump("-sass", path)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[\dT]+\s+)?([A-Z][A-Z0-9_.]*)", re.M)
    modified = Counter(line.findall(code))
    plain: Counter[str] = Counter()
    for name, number in modified.items():
        plain[name.split(".")[0]] += number
    return Resources(
        int(found[1]), int(found[2]), compiled.metadata.shared, plain, modified, compiled.asm["ptx"]
    )


def _cuobjdump(flag: str, path: Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def builds(arch: int) -> Iterator[Build]:
    """All of them for one architecture."""
    yield from _matmuls(arch)
    yield from _quantizers(arch)
    yield from _producers(arch)
    yield from _others(arch)


def _matmuls(arch: int) -> Iterator[Build]:
    sizes = ("count", "depth", "lines", "width", "adapter_columns")
    sizes += ("cut_first", "cut_second", "rank", "bucket")
    # Kinds: name, format of left, row-major weight, native, segments, sizes multiples of 16.
    kinds = [
        ("melded_matmul", "fp8e4nv", False, True, 2, True),
        ("melded_matmul, odd rank", "fp8e4nv", False, True, 2, False),
        ("melded_matmul, q/k/v", "fp8e4nv", False, True, 6, True),
        ("melded_matmul, q/k/v, odd rank", "fp8e4nv", False, True, 6, False),
        ("backbone_matmul", "fp8e5", False, True, 1, True),
        ("backbone_matmul, row-major", "fp8e5", True, True, 1, True),
        ("melded_matmul, float16", "u8", False, False, 2, True),
        ("backbone_matmul, float16, row-major", "u8", True, False, 1, True),
    ]
    for (name, left, row_major, native, segments, aligned), onto in product(kinds, (False, True)):
        # Architectures without FP8 units get 16-bit operands, and only they do.
        known = arch if native else 0
        if native != (arch > 80) or (onto and not aligned):
            continue
        name += ", onto" if onto else ""
        loads = (False, True) if native and aligned and arch >= 90 else (False,)
        for descriptors in loads:
            for config in matmul_triton.configurations(known, row_major, segments, aligned, onto):
                tile = "x".join(str(config.kwargs[f"BLOCK_{x}"]) for x in "MNK")
                shape = f"{tile}, {config.num_warps} warps, {config.num_stages} stages"
                via = ", descriptors" if descriptors else ""
                yield Build(
                    f"{name}, {shape}{via}",
                    matmul_triton.matmul_kernel,
                    arch,
                    {
                        "left": f"*{left}",
                        "right": "*fp8e4nv" if native else "*u8",
                        "left_scale": "*fp32",
                        "right_scale": "*fp32",
                        "bias": "*bf16",
                        **dict.fromkeys(("out_first", "out_second", "out_third"), "*bf16"),
                        "adapter": "*bf16",
                        "segments": "*i32",
                        **dict.fromkeys(sizes, "i32"),
                    },
                    {
                        "FORMAT": 5 if left == "fp8e5" or row_major else 4,
                        "PER_TOKEN": True,
                        "PER_ROW": False,
                        "HAS_BIAS": segments == 6,
                        "PART": matmul_triton.ONTO if onto else matmul_triton.WITH_ADAPTERS,
                        "ROW_MAJOR": row_major,
                        "NATIVE": native,
                        "DESCRIPTORS": descriptors,
                        "WHOLE": True,
                        "ALIGNED": aligned,
                        "ARCH": known,
                        "SEGMENTS": segments,
                        "PROGRAMS": 128,
                        **config.kwargs,
                    },
                    {"num_warps": config.num_warps, "num_stages": config.num_stages},
                    multiplies="fp8" if native else "half",
                    unaligned=("count", "cut_first", "cut_second", "bucket")
                    + (() if aligned else ("lines", "adapter_columns", "rank")),
                )


def _options(blocks: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    blocks = dict(blocks)
    return blocks, {"num_warps": blocks.pop("num_warps")}


def _quantizers(arch: int) -> Iterator[Build]:
    cast = {"POWER_OF_TWO": True, "HARDWARE": arch > 80}
    strided = {"count": "i32", "features": "i32", "row_stride": "i32"}
    for form, features in ((4, 4096), (4, 11008), (5, 4096), (5, 40000)):
        blocks, options = _options(quantize_triton.row_blocks(features))
        yield Build(
            f"quantize per token, {'e4m3' if form == 4 else 'e5m2'}, {features} features",
            quantize_triton.quantize_rows_kernel,
            arch,
            {"x": "*bf16", "codes": "*u8", "scale": "*fp32", **strided},
            {"column_stride": 1, "FORMAT": form, **cast, **blocks},
            options,
            wide=True,
        )
    blocks, options = _options(quantize_triton.tile_blocks(4096, False))
    yield Build(
        "amax",
        quantize_triton.amax_kernel,
        arch,
        {"x": "*bf16", "parts": "*i32", **strided},
        {"column_stride": 1, **blocks},
        options,
        wide=True,
    )
    for name, transposed, given in (
        ("quantize per tensor", False, False),
        ("quantize per tensor, transposed too", True, False),
        ("quantize with a delayed scale", False, True),
    ):
        blocks, options = _options(quantize_triton.tile_blocks(4096, transposed))
        yield Build(
            name,
            quantize_triton.cast_kernel,
            arch,
            {
                "x": "*bf16",
                "codes": "*u8",
                "transposed": "*u8",
                "scale": "*fp32",
                "parts": "*i32",
                "overflowed": "*i32",
                **strided,
                "number": "i32",
            },
            {
                "column_stride": 1,
                "FORMAT": 4,
                **cast,
                "TRANSPOSED": transposed,
                "GIVEN": given,
                "OBSERVE": given,
                "PARTS": 1 if given else quantize_triton.PARTS,
                **blocks,
            },
            options,
            wide=True,
        )


def _swiglu(
    arch: int, features: int, cast: dict[str, Any], blocks: dict[str, Any], options: dict[str, Any]
) -> Build:
    return Build(
        f"swiglu_quantize, {features} features",
        swiglu_quantize_triton.swiglu_quantize_kernel,
        arch,
        {
            "gate": "*bf16",
            "up": "*bf16",
            "codes": "*u8",
            "scale": "*fp32",
            "features": "i32",
            "gate_stride": "i32",
            "up_stride": "i32",
        },
        {**cast, **blocks},
        options,
        wide=True,
    )


def _producers(arch: int) -> Iterator[Build]:
    cast = {"FORMAT": 4, "POWER_OF_TWO": True, "HARDWARE": arch > 80}
    for features in (4096, 13824, 28672):
        blocks, options = _options(swiglu_quantize_triton.long_row_block(features))
        yield _swiglu(arch, features, cast, blocks, options)
    for features in (4096, 13824):
        blocks, options = _options(rms_norm_quantize_triton.row_block(features))
        pointers = {"x": "*bf16", "weight": "*bf16", "codes": "*u8"}
        yield Build(
            f"rms_norm_quantize, {features} features",
            rms_norm_quantize_triton.rms_norm_quantize_kernel,
            arch,
            {
                **pointers,
                "scale": "*fp32",
                "inverse_rms": "*fp32",
                "features": "i32",
                "row_stride": "i32",
                "epsilon": "fp32",
            },
            {**cast, **blocks},
            options,
            wide=True,
        )
    for features in (4096, 16384):
        blocks, options = _options(rms_norm_quantize_triton.row_block(features))
        yield Build(
            f"rms_norm_grad, {features} features",
            rms_norm_quantize_triton.rms_norm_grad_kernel,
            arch,
            {
                **dict.fromkeys(("grad", "x", "weight", "out"), "*bf16"),
                "inverse_rms": "*fp32",
                **dict.fromkeys(("features", "grad_stride", "row_stride"), "i32"),
            },
            blocks,
            options,
            wide=True,
        )
    yield Build(
        "swiglu_grad",
        swiglu_quantize_triton.swiglu_grad_kernel,
        arch,
        {
            **dict.fromkeys(("grad", "gate", "up", "grad_gate", "grad_up"), "*bf16"),
            **dict.fromkeys(("features", "grad_stride", "gate_stride", "up_stride"), "i32"),
        },
        {"BLOCK": swiglu_quantize_triton.BLOCK},
        {"num_warps": swiglu_quantize_triton.WARPS},
        wide=True,
    )


def _others(arch: int) -> Iterator[Build]:
    for dtype, rank in (("bf16", 16), ("bf16", 64), ("fp32", 64)):  # larger ranks are in blocks
        yield Build(
            f"proxy_grad, {dtype}, rank {rank}",
            proxy_grad_triton.proxy_grad_kernel,
            arch,
            {
                "grad": f"*{dtype}",
                "adapter": f"*{dtype}",
                "parts": "*fp32",
                **dict.fromkeys(
                    ("count", "features", "rank", "grad_stride", "adapter_stride"), "i32"
                ),
            },
            {
                "EXACT": dtype == "fp32",
                "TOKENS": proxy_grad_triton.TOKENS_A_PART,
                "RANK": rank,
                **proxy_grad_triton.tile(dtype == "fp32"),
            },
            {"num_warps": proxy_grad_triton.WARPS, "num_stages": proxy_grad_triton.STAGES},
            multiplies="half" if dtype == "bf16" else "float32",
        )
    yield Build(
        "transpose",
        transpose_triton.transpose_kernel,
        arch,
        {
            "codes": "*u8",
            "turned": "*u8",
            **dict.fromkeys(("count", "features", "cut_first", "cut_second", "rank"), "i32"),
        },
        {"SIDE": transpose_triton.SIDE},
        {"num_warps": transpose_triton.WARPS},
        unaligned=("cut_first", "cut_second"),
        wide=True,
    )
    for origin, stochastic in ((0, False), (1, True), (2, False), (2, True)):
        rounding = "stochastic" if stochastic else "nearest"
        yield Build(
            f"row_update, {('in place', 'from codes', 'from weights')[origin]}, {rounding}",
            row_update_triton.row_update_kernel,
            arch,
            {
                "codes": "*u8",
                "scale": "*fp32",
                "rows": "*i64",
                "change": "*fp32",
                "total": "*fp32",
                "origin": ("*fp32", "*u8", "*bf16")[origin],
                "remainder": "*fp32",
                "turned": "*u8",
                "blocks": "*i32",
                "counted": "*i64",
                "summed": "*fp32",
                **dict.fromkeys(("features", "rank", "turned_stride", "step"), "i32"),
                "limit": "fp32",
                "seed": "i64",
            },
            {
                "HAS_ROWS": True,
                "ORIGIN": origin,
                "STOCHASTIC": stochastic,
                "REMAINDER": origin == 0,
                "TURNED": origin == 1,
                "RANK": 64,
                "CHUNK": row_update_triton.CHUNK,
                "BLOCK_K": row_update_triton.BLOCK_ROWS,
                "BLOCK_N": row_update_triton.BLOCK_COLUMNS,
            },
            {
                "num_warps": row_update_triton.WARPS,
                "num_stages": row_update_triton.STAGES,
                "enable_fp_fusion": False,
            },
            multiplies="float32",
        )


def matrix_instruction(resources: Resources) -> str:
    """Names of the matmul instructions, or a dash."""
    names = ("QMMA", "QGMMA", "UTCQMMA", "HMMA", "HGMMA", "UTCHMMA")
    found = [n for n in names if resources.instructions[n]]
    return ", ".join(f"{resources.instructions[n]} {n}" for n in found) or "-"


def loads(resources: Resources) -> str:
    """How values come in: tensor descriptors, asynchronous copies, and 16-byte loads."""
    wide = sum(
        n for name, n in resources.modified.items() if name.startswith("LDG.") and ".128" in name
    )
    narrow = resources.instructions["LDG"] - wide
    kinds = {
        "UTMALDG": resources.instructions["UTMALDG"],
        "LDGSTS": resources.instructions["LDGSTS"],
        "LDG.128": wide,
        "LDG": narrow,
    }
    return ", ".join(f"{n} {name}" for name, n in kinds.items() if n) or "-"


def builds_of(archs: Sequence[int]) -> list[Build]:
    """All builds for some architectures, in the order of `compile_all`."""
    return [build for arch in archs for build in builds(arch)]


def compile_all(
    archs: Sequence[int] = tuple(SHARED_LIMIT), workers: int = 2
) -> list[tuple[Build, Resources]]:
    """Compile all builds for some architectures, in processes of their own."""
    everything = builds_of(archs)
    context = get_context("spawn")  # threads of this process must not be forked
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = [pool.submit(_compile_number, tuple(archs), n) for n in range(len(everything))]
        return [(build, job.result()) for build, job in zip(everything, jobs, strict=True)]


def _compile_number(archs: tuple[int, ...], number: int) -> Resources:
    return compile_build(builds_of(archs)[number])


def table(compiled: list[tuple[Build, Resources]]) -> str:
    """Markdown table, a line for each kernel and configuration, architectures side by side."""
    archs = list(dict.fromkeys(build.arch for build, _ in compiled))
    names = list(dict.fromkeys(build.name for build, _ in compiled))
    found = {(build.name, build.arch): resources for build, resources in compiled}
    lines = [
        f"| kernel | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        "|---" * (len(archs) + 1) + "|",
    ]
    for name in names:
        cells = []
        for arch in archs:
            r = found.get((name, arch))
            cells.append("" if r is None else _cell(r))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(r: Resources) -> str:
    parts = [f"{r.registers} reg", f"{r.shared / 1024:.0f} KiB"]
    return ", ".join([*parts, *(x for x in (matrix_instruction(r), loads(r)) if x != "-")])


def documented_table() -> str:
    """The table as it stands in the documentation."""
    return DOCUMENT.read_text().split(MARKS[0])[1].split(MARKS[1])[0].strip()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"into {DOCUMENT.name}")
    args = parser.parse_args()
    text = table(compile_all())
    if not args.write:
        print(text)
        return
    document = DOCUMENT.read_text()
    before, after = document.split(MARKS[0])[0], document.split(MARKS[1])[1]
    temporary = DOCUMENT.with_suffix(".new")
    temporary.write_text(f"{before}{MARKS[0]}\n{text}\n{MARKS[1]}{after}")
    temporary.replace(DOCUMENT)


if __name__ == "__main__":
    main()

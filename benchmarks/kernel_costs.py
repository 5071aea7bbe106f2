"""What each operation of a melded layer must move and compute: the floor a kernel is held against.

Bytes are those of the fewest passes that the operation allows, scales and row numbers included,
launch parameters and statistics not. FLOPs are those of matmuls (a multiplication and an addition
are two); arithmetic element by element is not counted, memory bounds it on every GPU in the table.

Shapes: T tokens, `in`/`out` features, r adapter rank, k written rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from benchmarks import step_ops
from benchmarks.devices import Device, Precision
from benchmarks.step_ops import Op

Producer = Literal["rms_norm", "swiglu"]


@dataclass(frozen=True)
class Layer:
    """A melded linear layer at work.

    Attributes:
        tokens: T.
        n_in, out: features.
        rank: r.
        rows: k.
        before: what may make its input, in one kernel with the quantisation.
    """

    tokens: int
    n_in: int
    out: int
    rank: int = 64
    rows: int = 10
    before: tuple[Producer, ...] = ("rms_norm", "swiglu")


def quantize_token(x: Layer) -> tuple[Op, ...]:
    """A scale for each row of [T, in]: a row fits on chip, so one read and one write."""
    return (step_ops.quantise("quantise", x.tokens, x.n_in, "per_token"),)


def quantize_tensor(x: Layer) -> tuple[Op, ...]:
    """One scale for [T, in]: the amax has to be known before the first cast, so two reads."""
    return (step_ops.quantise("quantise", x.tokens, x.n_in, "per_tensor"),)


def quantize_delayed(x: Layer) -> tuple[Op, ...]:
    """A scale known before: one read and one write."""
    elements = x.tokens * x.n_in
    return (Op("quantise", "quantise", 2 * elements + 4, elements),)


def rms_norm(x: Layer) -> tuple[Op, ...]:
    """RMSNorm and `quantize_token`; the inverse root mean squares are kept for the backward."""
    elements = x.tokens * x.n_in
    written = elements + 2 * 4 * x.tokens
    return (Op("norm and quantise", "quantise", 2 * elements + 2 * x.n_in, written),)


def swiglu(x: Layer) -> tuple[Op, ...]:
    """`silu(gate) up`, both [T, in], and `quantize_token`."""
    elements = x.tokens * x.n_in
    return (Op("swiglu and quantise", "quantise", 2 * 2 * elements, elements + 4 * x.tokens),)


def _with_scales(op: Op, tokens: int) -> Op:
    return replace(op, read=op.read + 4 * tokens + 4)


def melded_matmul(x: Layer) -> tuple[Op, ...]:
    """`[O | O_A]` in bfloat16 from codes: [T, in] by [out + r, in]."""
    op = step_ops.gemm("gemm", x.tokens, x.out + x.rank, x.n_in, "fp8")
    return (_with_scales(op, x.tokens),)


def dx_row_major(x: Layer) -> tuple[Op, ...]:
    """`dL/dx` in bfloat16 from codes: [T, out] by the backbone [out, in] as it lies."""
    return (_with_scales(step_ops.gemm("gemm", x.tokens, x.n_in, x.out, "fp8"), x.tokens),)


def transpose(x: Layer) -> tuple[Op, ...]:
    """The backbone's codes turned to [in, out]."""
    return (step_ops.transpose("transpose", x.out, x.n_in),)


def dx(x: Layer) -> tuple[Op, ...]:
    """`dL/dx` by a matmul with both operands K-major, after `transpose` is done."""
    return (*transpose(x), *dx_row_major(x))


def proxy_grad(x: Layer) -> tuple[Op, ...]:
    """`dL/dB`, float32 [out, r], from dL/dO [T, out] and O_A [T, r] in bfloat16."""
    return (step_ops.gemm("gemm", x.out, x.rank, x.tokens, "bf16", out=4),)


def row_update(x: Layer) -> tuple[Op, ...]:
    """k rows of codes read and written, A and k rows of B (float32) and row numbers read."""
    read = 8 * x.rows + _update_read(x, x.rows)
    return (_update(x, x.rows, read),)


def row_update_all(x: Layer) -> tuple[Op, ...]:
    """All rows, in their order."""
    return (_update(x, x.out, _update_read(x, x.out)),)


def _update_read(x: Layer, rows: int) -> int:
    return (rows + x.rank) * x.n_in + 4 * rows * x.rank + 4  # the scale


def _update(x: Layer, rows: int, read: int) -> Op:
    return Op("row update", "update", read, rows * x.n_in, 2 * rows * x.rank * x.n_in, "fp32")


COSTS: dict[str, Callable[[Layer], tuple[Op, ...]]] = {
    f.__name__: f
    for f in (
        quantize_token,
        quantize_tensor,
        quantize_delayed,
        rms_norm,
        swiglu,
        melded_matmul,
        dx,
        dx_row_major,
        transpose,
        proxy_grad,
        row_update,
        row_update_all,
    )
}
"""By name of the operation, as the command line takes it."""


def shape_of(name: str, x: Layer) -> str:
    """The sizes that an operation depends on, for people."""
    if name in ("quantize_token", "quantize_tensor", "quantize_delayed", "rms_norm", "swiglu"):
        return f"{x.tokens} x {x.n_in}"
    if name == "melded_matmul":
        return f"{x.tokens} x {x.n_in} -> {x.out}+{x.rank}"
    if name in ("dx", "dx_row_major"):
        return f"{x.tokens} x {x.out} -> {x.n_in}"
    if name == "transpose":
        return f"{x.out} x {x.n_in}"
    if name == "proxy_grad":
        return f"{x.tokens} x {x.out} -> {x.rank}"
    rows = x.rows if name == "row_update" else x.out
    return f"{rows} of {x.out} x {x.n_in}, r {x.rank}"


def moved(ops: tuple[Op, ...]) -> int:
    """Bytes read and written."""
    return sum(op.read + op.written for op in ops)


def flops(ops: tuple[Op, ...]) -> int:
    """FLOPs of all kernels."""
    return sum(op.flops for op in ops)


def floor_seconds(ops: tuple[Op, ...], device: Device) -> float:
    """Time at a device's published peaks, in seconds: kernels run one after the other."""
    return sum(op.seconds(device) for op in ops)


def limits(ops: tuple[Op, ...], device: Device) -> str:
    """What bounds each kernel: `m` memory, `c` arithmetic; `m+c` for two."""
    return "+".join(_limit(op, device) for op in ops)


def _limit(op: Op, device: Device) -> str:
    precision: Precision = op.precision
    moving = (op.read + op.written) / device.bandwidth
    return "m" if moving >= op.flops / device.peak(precision) else "c"

"""Triton kernels of `SwigluQuantize`: `silu(gate) up` and its quantisation in one, and back."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from falqon.fp8 import Format
from falqon.kernels.devices import LONGEST_NORMED_ROW, has_fp8_units, on_device
from falqon.kernels.triton_fp8 import encode, magnitude_bits, round_to, scale_of, widen
from falqon.recipe import ScaleRounding

BLOCK = 1024
WARPS = 4


@triton.jit
def _product(gate, up, column, features):  # type: ignore[no-untyped-def]
    """`silu(gate) up` with the roundings of the separate operations, so that codes are theirs."""
    g = widen(tl.load(gate + column, mask=column < features, other=0.0))
    u = widen(tl.load(up + column, mask=column < features, other=0.0))
    activated = round_to(tl.div_rn(g, 1.0 + tl.exp(-g)), gate.dtype.element_ty)
    return round_to(activated * u, gate.dtype.element_ty)


@triton.jit  # type: ignore[untyped-decorator]
def swiglu_quantize_kernel(  # type: ignore[no-untyped-def]
    gate,  # [count, features], row stride given
    up,  # [count, features], row stride given
    codes,  # uint8 [count, features]
    scale,  # float32 [count]
    features,
    gate_stride,
    up_stride,
    FORMAT: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    HARDWARE: tl.constexpr,
    BLOCK: tl.constexpr,
    ONCE: tl.constexpr,  # a row is one block; longer ones are read twice
):
    """One row: two reads and one write a value."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.zeros((BLOCK,), tl.int32)
    product = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, features, BLOCK):
        column = first + tl.arange(0, BLOCK)
        product = _product(gate + row * gate_stride, up + row * up_stride, column, features)
        largest = tl.maximum(largest, magnitude_bits(product))
    factor = scale_of(tl.max(largest, axis=0), FORMAT, POWER_OF_TWO)
    for first in tl.range(0, features, BLOCK):
        column = first + tl.arange(0, BLOCK)
        if not ONCE:
            product = _product(gate + row * gate_stride, up + row * up_stride, column, features)
        out = encode(product * factor, FORMAT, HARDWARE)
        tl.store(codes + row * features + column, out, mask=column < features)
    tl.store(scale + row, factor)


@triton.jit  # type: ignore[untyped-decorator]
def swiglu_grad_kernel(  # type: ignore[no-untyped-def]
    grad,  # [count, features], row stride given
    gate,  # [count, features], row stride given
    up,  # [count, features], row stride given
    grad_gate,  # [count, features]
    grad_up,  # [count, features]
    features,
    grad_stride,
    gate_stride,
    up_stride,
    BLOCK: tl.constexpr,
):
    """A block of one row of `swiglu_grad`."""
    row = tl.program_id(0).to(tl.int64)  # this axis has no limit of 65,535
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < features
    d = widen(tl.load(grad + row * grad_stride + column, mask=inside, other=0.0))
    g = widen(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0))
    u = widen(tl.load(up + row * up_stride + column, mask=inside, other=0.0))
    sigmoid = tl.div_rn(1.0, 1.0 + tl.exp(-g))
    of_up = round_to(d * round_to(g * sigmoid, gate.dtype.element_ty), gate.dtype.element_ty)
    of_silu = round_to(d * u, gate.dtype.element_ty)
    of_gate = of_silu * sigmoid * (1.0 + g * (1.0 - sigmoid))
    of_gate = round_to(of_gate, gate.dtype.element_ty)
    at = row * features + column
    tl.store(grad_up + at, of_up.to(gate.dtype.element_ty), mask=inside)
    tl.store(grad_gate + at, of_gate.to(gate.dtype.element_ty), mask=inside)


def long_row_block(features: int) -> dict[str, Any]:
    """Block that holds a row, or parts of a long one."""
    block = triton.next_power_of_2(max(features, 16))
    block = block if block <= LONGEST_NORMED_ROW else LONGEST_NORMED_ROW // 2
    warps = min(16, max(1, block // 512))
    return {"BLOCK": block, "ONCE": features <= block, "num_warps": warps}


def swiglu_quantize_triton(
    gate: Tensor, up: Tensor, fmt: Format, rounding: ScaleRounding
) -> tuple[Tensor, Tensor]:
    """`swiglu_quantize` by its kernel.

    Args:
        gate, up: [T, n], floating, one dtype; rows may be apart.
        fmt: target format.
        rounding: of the scale.

    Returns:
        codes uint8 [T, n]; scale float32 [T, 1].
    """
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    count, features = gate.shape
    codes = torch.empty(count, features, dtype=torch.uint8, device=gate.device)
    scale = torch.ones(count, 1, dtype=torch.float32, device=gate.device)
    if gate.numel():
        with on_device(gate.device):
            swiglu_quantize_kernel[(count,)](
                gate,
                up,
                codes,
                scale,
                features,
                gate.stride(0),
                up.stride(0),
                FORMAT=4 if fmt.name == "e4m3" else 5,
                POWER_OF_TWO=rounding == "power_of_two",
                HARDWARE=has_fp8_units(gate.device),
                **long_row_block(features),
            )
    return codes, scale


def swiglu_grad_triton(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_grad` by its kernel.

    Args:
        grad: gradient of `silu(gate) up`, [T, n].
        gate, up: [T, n].

    Returns:
        Gradients of gate and up, [T, n] each, in the dtype of `gate`.
    """
    grad, gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (grad, gate, up))
    count, features = gate.shape
    of_gate, of_up = (
        torch.empty(count, features, dtype=gate.dtype, device=gate.device) for _ in range(2)
    )
    if gate.numel():
        with on_device(gate.device):
            swiglu_grad_kernel[(count, triton.cdiv(features, BLOCK))](
                grad,
                gate,
                up,
                of_gate,
                of_up,
                features,
                grad.stride(0),
                gate.stride(0),
                up.stride(0),
                BLOCK=BLOCK,
                num_warps=WARPS,
            )
    return of_gate, of_up

"""FP8 arithmetic inside Triton kernels, in integers: exact, and the same on every device.

The same bits as `falqon.fp8`, also in Triton's interpreter (whose own casts to FP8 are not) and on
GPUs without FP8 units. Values are float32 blocks, codes int32 blocks in [0, 256).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode_e4m3(codes):  # type: ignore[no-untyped-def]
    """Values of E4M3 codes, float32; 0x7F and 0xFF are NaN."""
    magnitude = codes & 0x7F
    # Exponent and mantissa move to their places in float32; the bias grows by 127 - 7.
    normal = ((magnitude + (120 << 3)) << 20).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 0x7F, float("nan"), value)
    return tl.where(codes >= 0x80, -value, value)


@triton.jit
def _assemble(x, magnitude_codes):  # type: ignore[no-untyped-def]
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(x != x, 0x7F, magnitude_codes) | sign


@triton.jit
def encode_e4m3(x):  # type: ignore[no-untyped-def]
    """Round to the nearest E4M3 value, ties to even; saturate; NaN stays NaN. As `fp8.encode`."""
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2^-6 values are multiples of 2^-9, the distance of float32 values at 2^14.
    subnormal = (magnitude + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return _assemble(x, tl.where(magnitude < 0.015625, subnormal, normal))


@triton.jit
def encode_e4m3_stochastic(x, random):  # type: ignore[no-untyped-def]
    """Round up or down at random without bias, as `fp8.encode_stochastic`.

    `random` is a uint32 block; its low 20 bits are used.
    """
    noise = (random & 0xFFFFF).to(tl.int32)
    magnitude = tl.minimum(tl.abs(x), 448.0)
    normal = ((magnitude.to(tl.int32, bitcast=True) + noise) >> 20) - (120 << 3)
    small = tl.where(magnitude < 0.015625, magnitude, 0.0)
    subnormal = ((small * 536870912.0).to(tl.int32) + noise) >> 20  # 2^20 parts of a step
    codes = tl.minimum(tl.where(magnitude < 0.015625, subnormal, normal), 0x7E)
    return _assemble(x, codes)

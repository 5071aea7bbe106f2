"""FP8 arithmetic inside Triton kernels: the same bits as `falqon.fp8` on every device.

Written in integers, which is exact everywhere, also in Triton's interpreter (whose own casts to FP8
and bfloat16 are not) and on GPUs without FP8 units. With HARDWARE the cast of the GPU does the
rounding to nearest, which gives the same codes in one instruction for two of them.
Values are float32 blocks, codes int32 blocks in [0, 256). FORMAT is 4 for E4M3 and 5 for E5M2.
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


@triton.jit  # type: ignore[untyped-decorator]
def decode_half(codes, FORMAT: tl.constexpr):  # type: ignore[no-untyped-def]
    """Values of codes in float16, which holds both formats exactly; `codes` is a uint8 block."""
    wide = codes.to(tl.int16)
    if FORMAT == 5:
        return (wide << 8).to(tl.float16, bitcast=True)  # E5M2 is the upper half of float16
    sign = (wide << 8) & -32768
    magnitude = ((wide & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0  # bias 15 - 7
    magnitude = tl.where((wide & 0x7F) == 0x7F, float("nan"), magnitude).to(tl.float16)
    return (magnitude.to(tl.int16, bitcast=True) | sign).to(tl.float16, bitcast=True)


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
def encode_e5m2(x):  # type: ignore[no-untyped-def]
    """Round to the nearest E5M2 value, ties to even; saturate; NaN stays NaN. As `fp8.encode`."""
    magnitude = tl.minimum(tl.abs(x), 57344.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 0xFFFFF + ((bits >> 21) & 1)) >> 21) - (112 << 2)
    # Below 2^-14 values are multiples of 2^-16, the distance of float32 values at 2^7.
    subnormal = (magnitude + 128.0).to(tl.int32, bitcast=True) - 0x43000000
    return _assemble(x, tl.where(magnitude < 6.103515625e-05, subnormal, normal))


@triton.jit  # type: ignore[untyped-decorator]
def encode(x, FORMAT: tl.constexpr, HARDWARE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round to nearest, as `encode_e4m3` or `encode_e5m2`; uint8 block."""
    if HARDWARE:
        if FORMAT == 4:
            return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
        # Its NaN is a finite code's neighbour on some devices, and infinity must saturate.
        limited = tl.clamp(x, -57344.0, 57344.0, propagate_nan=tl.PropagateNan.ALL)
        return limited.to(tl.float8e5).to(tl.uint8, bitcast=True)
    return (encode_e4m3(x) if FORMAT == 4 else encode_e5m2(x)).to(tl.uint8)


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


@triton.jit
def widen(x):  # type: ignore[no-untyped-def]
    """float32 values of a floating block; exact also for bfloat16's subnormals when interpreted."""
    if x.dtype == tl.bfloat16:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32) << 16
        return bits.to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def magnitude_bits(x):  # type: ignore[no-untyped-def]
    """Bits of |x| as int32: in the order of the magnitudes, NaN above infinity.

    The largest of them needs no care for NaN and is the same in any order of reduction.
    """
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit  # type: ignore[untyped-decorator]
def scale_of(amax_bits, FORMAT: tl.constexpr, POWER_OF_TWO: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scale that maps an amax to the largest finite value, as `fp8.compute_scale`, float32.

    `amax_bits` is what `magnitude_bits` gives.
    """
    if POWER_OF_TWO:
        # Both formats end at 1.75 * 2^e: one more factor of two fits for a mantissa up to 1.75.
        exponent = (amax_bits >> 23) - 127
        largest: tl.constexpr = 8 if FORMAT == 4 else 15
        shift = largest - exponent - ((amax_bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        scale = ((tl.minimum(shift, 126) + 127) << 23).to(tl.float32, bitcast=True)
    else:
        # Twice rounded, as the reference does it: in float64 and to float32.
        limit: tl.constexpr = 448.0 if FORMAT == 4 else 57344.0
        amax = tl.maximum(amax_bits, 1).to(tl.float32, bitcast=True).to(tl.float64)
        wide = limit / amax
        wide = tl.minimum(tl.maximum(wide, 1.1754943508222875e-38), 8.507059173023462e37)
        scale = wide.to(tl.float32)
    usable = (amax_bits > 0) & (amax_bits < 0x7F800000)
    return tl.where(usable, scale, 1.0)


@triton.jit  # type: ignore[untyped-decorator]
def round_to(x, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round float32 to the nearest value of a narrower dtype, ties to even; float32 again."""
    if tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        return tl.where(x != x, x, rounded.to(tl.float32, bitcast=True))
    if tl.float16 == DTYPE:
        return x.to(tl.float16).to(tl.float32)
    return x

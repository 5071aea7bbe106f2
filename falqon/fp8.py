"""FP8 formats, scales and rounding in plain torch: the reference for every kernel.

Convention of the paper: `scale = max(FP8) / amax`, `codes = round(x * scale)`, `x ~ codes / scale`.
Codes are raw FP8 bytes in uint8 tensors. Shapes: T tokens (rows), n features.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from falqon.recipe import Granularity, ScaleRounding


@dataclass(frozen=True)
class Format:
    """An FP8 format.

    Attributes:
        name: `e4m3` or `e5m2`.
        dtype: torch dtype.
        max: largest finite value.
        mantissa_bits: explicit mantissa bits.
        min_exponent: exponent of the smallest normal number.
        max_code: code of `max` without its sign.
    """

    name: str
    dtype: torch.dtype
    max: float
    mantissa_bits: int
    min_exponent: int
    max_code: int


E4M3 = Format("e4m3", torch.float8_e4m3fn, 448.0, 3, -6, 0x7E)
"""4 exponent and 3 mantissa bits, no infinities: weights and activations."""
E5M2 = Format("e5m2", torch.float8_e5m2, 57344.0, 2, -14, 0x7B)
"""5 exponent and 2 mantissa bits: gradients of outputs."""

_LARGEST_SCALE = 2.0**126  # its reciprocal is the smallest normal float32
_FLOAT64_MANTISSA = (1 << 52) - 1


def compute_scale(amax: Tensor, fmt: Format, rounding: ScaleRounding = "power_of_two") -> Tensor:
    """Scale that maps `amax` to the largest finite value of the format (paper eq. 3).

    Computed in float64, so that every device gets the same bits. An amax of zero, infinity or NaN
    gives scale 1: finite values then keep their meaning and the others saturate or stay NaN.

    Args:
        amax: largest absolute value(s), any shape and floating dtype, not negative.
        fmt: target format.
        rounding: `power_of_two` rounds the scale down to a power of two, so that nothing that fits
            without rounding overflows with it; `none` keeps it.

    Returns:
        float32 scale(s) in the shape of `amax`, from 2^-126 to 2^126.
    """
    amax = amax.to(torch.float64)
    usable = torch.isfinite(amax) & (amax > 0)
    scale = fmt.max / torch.where(usable, amax, torch.ones_like(amax))
    if rounding == "power_of_two":
        # Cutting the mantissa off is exact everywhere; pow, behind torch.ldexp, need not be.
        scale = (scale.view(torch.int64) & ~_FLOAT64_MANTISSA).view(torch.float64)
    scale = scale.clamp(1.0 / _LARGEST_SCALE, _LARGEST_SCALE)
    return torch.where(usable, scale, torch.ones_like(scale)).to(torch.float32)


def largest(x: Tensor) -> Tensor:
    """Largest absolute value, in the dtype of x and, if x is contiguous, without a copy of it.

    Args:
        x: any shape, floating but not FP8, not empty.

    Returns:
        0-d tensor; NaN if any value is.
    """
    return torch.stack(x.aminmax()).abs().amax()


def all_finite(x: Tensor) -> bool:
    """Whether no value is NaN or infinite; 20 to 50 times as fast as `isfinite` of all of them."""
    if x.dtype.itemsize == 1:  # torch compares no FP8
        x = x.float()
    return x.numel() == 0 or bool(torch.isfinite(largest(x)))


def amax_of(x: Tensor, granularity: Granularity) -> Tensor:
    """Largest absolute value: float32 [1] for `per_tensor`, [T, 1] for `per_token`.

    Args:
        x: [T, n], floating. T or n may be zero (amax 0).
    """
    if x.numel() == 0:
        shape = (x.shape[0], 1) if granularity == "per_token" else (1,)
        return torch.zeros(shape, dtype=torch.float32, device=x.device)
    if granularity == "per_token":
        return x.detach().abs().amax(dim=-1, keepdim=True).to(torch.float32)
    return x.detach().abs().amax().to(torch.float32).reshape(1)


def encode(x: Tensor, fmt: Format, overwrite: bool = False) -> Tensor:
    """Round to the nearest FP8 value, ties to even; beyond the largest finite value saturate.

    Args:
        x: any shape, floating (float64 is rounded to float32 first). Infinities saturate, NaN
            stays NaN.
        overwrite: `x` may be used as scratch space.

    Returns:
        uint8 codes in the shape of `x`.
    """
    # torch casts saturate E4M3 but turn large E5M2 values into infinity, hence the clamp.
    limited = x.clamp_(-fmt.max, fmt.max) if overwrite else x.clamp(-fmt.max, fmt.max)
    return limited.to(fmt.dtype).view(torch.uint8)


def encode_stochastic(x: Tensor, fmt: Format, random_bits: Tensor) -> Tensor:
    """Round up or down at random, with probabilities that make the expectation equal to `x`.

    The 2^20 (E5M2: 2^21) positions between two neighbours of a normal number are exactly those of
    float32, so the rounding is unbiased to the last bit; below the smallest normal number what lies
    under 2^-20 of a step is cut.

    Args:
        x: any shape, floating; computed in float32. Values beyond the range saturate.
        random_bits: int64 in the shape of `x`; the low 20 (21) bits are used (see `philox`).

    Returns:
        uint8 codes in the shape of `x`.
    """
    x = x.to(torch.float32)
    dropped = 23 - fmt.mantissa_bits
    noise = random_bits & ((1 << dropped) - 1)
    magnitude = x.abs().clamp(max=fmt.max)
    # Normal numbers: add noise below the kept bits, then cut. A carry moves on into the exponent.
    bits = magnitude.view(torch.int32).to(torch.int64)
    bias_change = (127 - (1 - fmt.min_exponent)) << fmt.mantissa_bits
    normal = ((bits + noise) >> dropped) - bias_change
    # Subnormal numbers are whole multiples of one step.
    step = 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
    is_subnormal = magnitude < 2.0**fmt.min_exponent
    small = torch.where(is_subnormal, magnitude, torch.zeros_like(magnitude))
    fixed = (small.to(torch.float64) * (float(1 << dropped) / step)).to(torch.int64)
    subnormal = (fixed + noise) >> dropped
    codes = torch.where(is_subnormal, subnormal, normal).clamp(max=fmt.max_code)
    codes = torch.where(torch.isnan(x), torch.full_like(codes, 0x7F), codes)
    return (codes | (torch.signbit(x).to(torch.int64) << 7)).to(torch.uint8)


@lru_cache(maxsize=8)
def _pair_table(fmt: Format, dtype: torch.dtype) -> Tensor:
    """Two-byte lookup: entry i holds the values of codes i & 255 and i >> 8, as one integer."""
    codes = torch.arange(256, dtype=torch.uint8, device="cpu").view(fmt.dtype).to(dtype)
    pairs = torch.arange(1 << 16, device="cpu")
    both = torch.int32 if dtype == torch.bfloat16 else torch.int64
    return torch.stack([codes[pairs & 255], codes[pairs >> 8]], dim=1).view(both).flatten()


def decode(codes: Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values of FP8 codes, without scale.

    E4M3 and E5M2 values are exact in bfloat16 and float32, so a matmul of decoded operands with
    float32 accumulation has the numerics of an FP8 tensor core.

    Args:
        codes: uint8, any shape.
        dtype: floating dtype of the result.

    Returns:
        Tensor of `dtype` in the shape of `codes`.
    """
    if (
        not torch.compiler.is_compiling()  # first: what follows cannot be traced
        and dtype in (torch.bfloat16, torch.float32)
        and codes.device.type == "cpu"
        and codes.is_contiguous()
        and codes.numel() % 2 == 0
        and codes.storage_offset() % 2 == 0
        and sys.byteorder == "little"
    ):
        # torch's CPU cast decodes byte by byte; a table of pairs does it several times faster.
        index = codes.view(-1).view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
        values = torch.index_select(_pair_table(fmt, dtype), 0, index)
        return values.view(dtype).view(codes.shape)
    return codes.view(fmt.dtype).to(dtype)


def quantize(
    x: Tensor,
    fmt: Format,
    granularity: Granularity = "per_tensor",
    rounding: ScaleRounding = "power_of_two",
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantise with the scale of the tensor at hand, or with a given one (paper eq. 3).

    Args:
        x: [T, n], floating.
        fmt: target format.
        granularity: one scale for the tensor or one a row.
        rounding: of the scale.
        scale: float32 [1] or [T, 1], rounded as `rounding` says, to use instead of computing one;
            values beyond it saturate.

    Returns:
        codes uint8 [T, n]; scale float32 [1] (`per_tensor`) or [T, 1] (`per_token`).
    """
    if scale is None:
        scale = compute_scale(amax_of(x, granularity), fmt, rounding)
    if x.dtype == torch.bfloat16 and rounding == "power_of_two":
        scaled = x * scale.to(torch.bfloat16)  # exact, so the codes are the same
    else:
        scaled = x.to(torch.float32) * scale
    return encode(scaled, fmt, overwrite=True), scale


def dequantize(
    codes: Tensor, scale: Tensor, fmt: Format, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Values of FP8 codes: `decode(codes) / scale` in float32, in the shape of `codes`."""
    return (decode(codes, fmt) / scale).to(dtype)


_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF


def philox(seed: int, c0: Tensor, c1: Tensor, c2: int, c3: int) -> Tensor:
    """Counter-based random bits: Philox4x32-10 (Salmon et al., SC 2011), its first output word.

    The same bits for the same counters on every device, rank and process, in any order.

    Args:
        seed: 64-bit key.
        c0, c1: int64 counter words in [0, 2^32), broadcast against each other.
        c2, c3: further counter words.

    Returns:
        int64 tensor of the broadcast shape with values in [0, 2^32).
    """
    c0, c1 = torch.broadcast_tensors(c0, c1)
    c0, c1 = c0.to(torch.int64), c1.to(torch.int64)
    x2, x3 = torch.full_like(c0, c2 & _WORD), torch.full_like(c0, c3 & _WORD)
    key0, key1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # int64 products wrap, which leaves their 64 bits right; the shift is masked to be unsigned.
        p0, p1 = c0 * _PHILOX_MULTIPLIERS[0], x2 * _PHILOX_MULTIPLIERS[1]
        high0, low0 = (p0 >> 32) & _WORD, p0 & _WORD
        high1, low1 = (p1 >> 32) & _WORD, p1 & _WORD
        c0, c1, x2, x3 = high1 ^ c1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = (key0 + _PHILOX_WEYL[0]) & _WORD, (key1 + _PHILOX_WEYL[1]) & _WORD
    return c0

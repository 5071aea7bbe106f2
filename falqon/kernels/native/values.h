// Values in 16 and in 8 bits, a row at a time: what the compiled CPU path rounds, and how.
//
// bfloat16 values are uint16, FP8 codes uint8, scales powers of two.

#ifndef FALQON_VALUES_H
#define FALQON_VALUES_H

#include <cstdint>
#include <cstring>

#include "simd.h"

typedef uint16_t bf16;
typedef int64_t i64;

static inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
static inline float widen(bf16 x) { return from_bits(uint32_t(x) << 16); }

// Round to nearest, ties to even. NaN stays NaN as long as its lower half is empty, as it is in those
// that arithmetic makes, and makes of 16-bit values.
static inline bf16 narrow(float x) {
    uint32_t bits = to_bits(x);
    return bf16((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// exp(x) for finite x: a relative error below 2e-7; 0 below -87, infinity from 88.7 up.
static inline float exponential(float x) {
    float limited = x < -87.33654f ? -87.33654f : x;
    limited = limited > 88.722f ? 88.722f : limited;
    float n = __builtin_rintf(limited * 1.44269504088896341f);
    float r = __builtin_fmaf(n, -0.693359375f, limited);
    r = __builtin_fmaf(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = __builtin_fmaf(p, r, 1.3981999507e-3f);
    p = __builtin_fmaf(p, r, 8.3334519073e-3f);
    p = __builtin_fmaf(p, r, 4.1665795894e-2f);
    p = __builtin_fmaf(p, r, 1.6666665459e-1f);
    p = __builtin_fmaf(p, r, 5.0000001201e-1f);
    p = __builtin_fmaf(p, r * r, r) + 1.0f;
    float y = p * from_bits(uint32_t(int(n) + 126) << 23) * 2.0f;  // 2^128 is no float
    return x > 88.722f ? __builtin_inff() : y;
}

#ifdef FALQON_HAS_SIMD
// 16 values at a time: widen(), narrow() and exponential().
static inline Floats widened(Shorts x) { return floats_of(up32<16>(widen32(x))); }
static inline Floats widened(const bf16* x) { return widened(load_shorts(x)); }

// The 16 upper bits of each are those of narrow().
static inline Ints rounding(Floats x) {
    const Ints bits = bits_of(x), odd = down32<16>(bits) & splat32(1);
    return add32(bits, add32(odd, splat32(0x7FFF)));
}
static inline Shorts rounded(Floats x) { return lower16(down32<16>(rounding(x))); }

static inline Floats upper(Ints x) { return floats_of(x & splat32(int(0xFFFF0000u))); }
// The same, still as float32.
static inline Floats rounded_wide(Floats x) { return upper(rounding(x)); }

// 32 values at a time, those with even numbers in one vector and the others in another: widened, and
// narrowed again.
struct Halves {
    Floats even, odd;
    Halves(Floats even, Floats odd) : even(even), odd(odd) {}
    explicit Halves(const bf16* x) {
        const Ints bits = load(x);
        even = floats_of(up32<16>(bits)), odd = upper(bits);
    }
    void put(bf16* to) const { store(halves_of(down32<16>(rounding(even)), rounding(odd)), to); }
};

static inline void put_rounded(Floats x, bf16* to) { store(rounded(x), to); }

static inline Floats exponentials(const Floats of) {
    const float least = -87.33654f;
    const Floats x = limited(of, least, 89.0f);  // from 88.73 up the last step overflows to infinity
    const Floats n = nearest(x * splat(1.44269504088896341f));
    Floats r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    Floats p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return zero_where_below(scaled(p, n), of, splat(least));
}
#endif

// Fetch n values, which may be none: processors forgive that.
static inline void fetch(const bf16* from, i64 n) {
    for (i64 i = 0; i < n; i += 32) __builtin_prefetch(from + i);
}
static inline void fetch_to_write(const bf16* to, i64 n) {
    for (i64 i = 0; i < n; i += 32) __builtin_prefetch(to + i, 1);
}

static const i64 KEPT = 4096;  // floats that a thread keeps on its stack
static const i64 WIDEST = 16;  // of them in a vector register

// The first values of x, at most KEPT, with minus infinity behind them; how many that is.
static inline i64 padded(const bf16* x, i64 n, float* out) {
    n = n < KEPT ? n : KEPT;
    i64 count = (n + WIDEST - 1) / WIDEST * WIDEST;
    for (i64 i = n; i < count; i++) out[i] = -__builtin_inff();
#pragma omp simd
    for (i64 i = 0; i < n; i++) out[i] = widen(x[i]);
    return count;
}

struct Format {
    float max;         // largest finite value
    int dropped;       // mantissa bits of float32 that the format does not have
    float smallest;    // smallest normal number
    float step_magic;  // 1.5 * 2^23 subnormal steps: adding it rounds to a whole step
};
static const Format E4M3 = {448.0f, 20, 0.015625f, 24576.0f};
static const Format E5M2 = {57344.0f, 21, 6.103515625e-05f, 192.0f};

// The FP8 value next to x, ties to even, saturating; NaN stays NaN.
static inline float round_fp8(float x, const Format f) {
    uint32_t bits = to_bits(x), sign = bits & 0x80000000u, size = bits & 0x7FFFFFFFu;
    float limited = from_bits(size);
    limited = limited > f.max ? f.max : limited;
    uint32_t b = to_bits(limited);
    uint32_t normal = b + ((1u << (f.dropped - 1)) - 1u) + ((b >> f.dropped) & 1u);
    normal &= ~((1u << f.dropped) - 1u);
    float small = (limited + f.step_magic) - f.step_magic;
    uint32_t rounded = limited < f.smallest ? to_bits(small) : normal;
    rounded = size > 0x7F800000u ? 0x7FC00000u : rounded;
    return from_bits(rounded | sign);
}

// Scale of a row by its largest magnitude, given as bfloat16 bits: see compute_scale in fp8.py.
static inline float scale_of(uint32_t largest, float max) {
    if (largest == 0 || largest >= 0x7F80u) return 1.0f;
    double exact = double(max) / double(widen(bf16(largest)));
    uint64_t bits;
    std::memcpy(&bits, &exact, 8);
    bits &= ~((uint64_t(1) << 52) - 1);
    std::memcpy(&exact, &bits, 8);
    const double most = 8.507059173023462e+37;  // 2^126
    exact = exact > most ? most : exact;
    exact = exact < 1.0 / most ? 1.0 / most : exact;
    return float(exact);
}

// Largest magnitude of a row, as bits.
static inline uint32_t largest_of(const bf16* x, i64 n) {
    uint32_t largest = 0;
    i64 i = 0;
#ifdef FALQON_HAS_SIMD
    Ints most = splat32(0);
    for (; i + 32 <= n; i += 32) most = larger16(most, load(x + i) & splat16(0x7FFF));
    bf16 sizes[32];
    store(most, sizes);
    for (bf16 size : sizes) largest = size > largest ? size : largest;
#endif
    for (; i < n; i++) {
        uint32_t size = x[i] & 0x7FFFu;
        largest = size > largest ? size : largest;
    }
    return largest;
}

// Q(x * factor * scale) / scale / factor, where x * factor is rounded to bfloat16; `to` may be x.
static inline void round_row_simply(const bf16* x, i64 n, float scale, float factor, const Format f,
                                    bf16* to) {
    float inverse = 1.0f / scale, back = 1.0f / factor;
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        float value = widen(narrow(widen(x[i]) * factor)) * scale;
        to[i] = bf16(to_bits(round_fp8(value, f) * inverse * back) >> 16);
    }
}

#ifdef FALQON_HAS_SIMD
// The same in 16-bit integers, 32 at a time: scales are powers of two, so a mantissa is rounded
// alike whatever they are; what is subnormal in FP8 is rounded in float32. Scales and largest value
// are far from what bfloat16 cannot hold.
static inline void round_row_fast(const bf16* x, i64 n, float scale, const Format f, bf16* to) {
    const float inverse = 1.0f / scale;
    const int dropped = f.dropped - 16;
    const Ints size = splat16(0x7FFF), one = splat16(1);
    const Ints half = splat16((1 << (dropped - 1)) - 1), kept = splat16(-(1 << dropped));
    const Ints limit = splat16(int(to_bits(f.max * inverse) >> 16));
    const Ints below = splat16(int(to_bits(f.smallest * inverse) >> 16) - 1);
    const Ints infinity = splat16(0x7F80), nan = splat16(0x7FC0);
    const Floats scales = splat(scale), inverses = splat(inverse), magic = splat(f.step_magic);
    const auto whole_steps = [&](Shorts part) {
        const Floats v = widened(part) * scales;
        return lower16(down32<16>(bits_of(((v + magic) - magic) * inverses)));
    };
    for (i64 i = 0; i < n; i += 32) {
        const Ints bits = load_first16(x + i, n - i), m = bits & size;
        const Ints y = smaller16(m, limit), odd = down16(y, dropped) & one;
        Ints r = add16(add16(y, half), odd) & kept;
        // Not zero, and below the smallest normal number.
        const Which small = below16(sub16(m, one), below);
        if (any(small)) r = chosen(small, both(whole_steps(lower_half(m)), whole_steps(upper_half(m))), r);
        r = chosen(below16(infinity, m), nan, r);
        store_first16(r | without(bits, size), to + i, n - i);
    }
}
#endif

static inline void round_row(const bf16* x, i64 n, float scale, float factor, const Format f,
                             bf16* to) {
#ifdef FALQON_HAS_SIMD
    const float most = 1.2676506e30f, both = scale * factor;  // 2^100
    if (both < most && both > 1.0f / most && factor < most && factor > 1.0f / most &&
        scale < most && scale > 1.0f / most) {
        round_row_fast(x, n, both, f, to);
        return;
    }
#endif
    round_row_simply(x, n, scale, factor, f, to);
}

static inline void quantize_row(bf16* x, i64 n, const Format f) {
    round_row(x, n, scale_of(largest_of(x, n), f.max), 1.0f, f, x);
}

// The value of an E4M3 code times a power of two.
static inline bf16 decoded(uint8_t code, float factor) {
    uint32_t size = code & 0x7Fu, sign = uint32_t(code & 0x80u) << 24;
    float small = float(int(size)) * 0.001953125f;
    uint32_t bits = size < 8u ? to_bits(small) : (size << 20) + (120u << 23);
    bits = size == 0x7Fu ? 0x7FC00000u : bits;
    return bf16(to_bits(from_bits(bits | sign) * factor) >> 16);
}

// The value of an E4M3 code, and the code of an E4M3 value.
static inline float value_of(uint8_t code) {
    uint32_t size = code & 0x7Fu, sign = uint32_t(code & 0x80u) << 24;
    uint32_t bits = size < 8u ? to_bits(float(int(size)) * 0.001953125f) : (size << 20) + (120u << 23);
    bits = size == 0x7Fu ? 0x7FC00000u : bits;
    return from_bits(bits | sign);
}
static inline uint8_t code_of(float value) {
    uint32_t bits = to_bits(value), sign = bits >> 24 & 0x80u, size = bits & 0x7FFFFFFFu;
    uint32_t code = (size >> 20) - (120u << 3);
    code = size < 0x3C800000u ? uint32_t(int(from_bits(size) * 512.0f)) : code;  // below 2^-6
    code = size > 0x7F800000u ? 0x7Fu : code;
    return uint8_t(code | sign);
}

// A row of several tensors side by side, quantised with one scale for all of them. The values that
// are rounded are those times their tensor's factor, a power of two, which is taken back afterwards.
static inline void quantize_parts(i64 parts, const bf16* const* x, const i64* widths,
                                  const i64* strides, const float* factors, i64 t, const Format f,
                                  bf16* out) {
    bf16* to = out;
    uint32_t largest = 0;
    for (i64 p = 0; p < parts; p++) {
        uint32_t size = largest_of(x[p] + t * strides[p], widths[p]);
        size = narrow(widen(bf16(size)) * factors[p]);
        largest = size > largest ? size : largest;
    }
    float scale = scale_of(largest, f.max);
    for (i64 p = 0; p < parts; to += widths[p], p++)
        round_row(x[p] + t * strides[p], widths[p], scale, factors[p], f, to);
}

// A head of d values rotated: a cos + rotate_half(a) sin, products and sum rounded as torch's
// modules round them. `back`: the gradient of what is rotated.
template <bool back>
static inline void rotate(const bf16* from, const bf16* cos, const bf16* sin, i64 d, bf16* to) {
    i64 half = d / 2, i = 0;
#ifdef FALQON_HAS_SIMD
    for (; i + 16 <= half; i += 16) {
        Floats low = widened(from + i), high = widened(from + half + i);
        Floats first = widened(sin + i), second = widened(sin + half + i);
        Floats onto_low = rounded_wide(high * (back ? second : first));
        Floats onto_high = rounded_wide(low * (back ? first : second));
        low = rounded_wide(low * widened(cos + i));
        high = rounded_wide(high * widened(cos + half + i));
        put_rounded(back ? low + onto_low : low - onto_low, to + i);
        put_rounded(back ? high - onto_high : high + onto_high,
                    to + half + i);
    }
#endif
    for (; i < half; i++) {
        float low = widen(from[i]), high = widen(from[half + i]), sign = back ? 1.0f : -1.0f;
        float of_low = sign * high * widen(sin[back ? half + i : i]);
        float of_high = -sign * low * widen(sin[back ? i : half + i]);
        to[i] = narrow(widen(narrow(low * widen(cos[i]))) + widen(narrow(of_low)));
        to[half + i] = narrow(widen(narrow(high * widen(cos[half + i]))) + widen(narrow(of_high)));
    }
}

#endif

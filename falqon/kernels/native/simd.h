// Vectors of 512 bits: a register of AVX512, or two of AVX2 and FMA. The same bits from both.

#ifndef FALQON_SIMD_H
#define FALQON_SIMD_H

#include <cstdint>
#include <cstring>

#ifdef __AVX512BW__
#define FALQON_HAS_SIMD
#include <immintrin.h>

typedef __m512 Floats;   // 16 values
typedef __m512i Ints;    // 16 of 32 bits, or 32 of 16
typedef __m256i Shorts;  // 16 of 16 bits

static inline Floats splat(float x) { return _mm512_set1_ps(x); }
static inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
static inline void store(Floats x, float* to) { _mm512_storeu_ps(to, x); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats fms(Floats a, Floats b, Floats c) { return _mm512_fmsub_ps(a, b, c); }
static inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline float largest_in(Floats x) { return _mm512_reduce_max_ps(x); }
static inline float sum_in(Floats x) { return _mm512_reduce_add_ps(x); }
static inline Ints bits_of(Floats x) { return _mm512_castps_si512(x); }
static inline Floats floats_of(Ints x) { return _mm512_castsi512_ps(x); }

static inline Ints load(const void* from) { return _mm512_loadu_si512(from); }
static inline void store(Ints x, void* to) { _mm512_storeu_si512(to, x); }
static inline Ints splat32(int x) { return _mm512_set1_epi32(x); }
static inline Ints add32(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
template <int N> static inline Ints up32(Ints x) { return _mm512_slli_epi32(x, N); }
template <int N> static inline Ints down32(Ints x) { return _mm512_srli_epi32(x, N); }

static inline Shorts load_shorts(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
static inline void store(Shorts x, void* to) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }
static inline Ints widen32(Shorts x) { return _mm512_cvtepu16_epi32(x); }
// The lower 16 bits of each.
static inline Shorts lower16(Ints x) { return _mm512_cvtepi32_epi16(x); }
static inline Ints both(Shorts low, Shorts high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}
// The lower halves of some 32 bits, the upper ones of others.
static inline Ints halves_of(Ints lower, Ints upper) {
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, lower, upper);
}

static inline __mmask16 first16(int64_t n) {
    return n >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (n < 0 ? 0 : n)) - 1u);
}
// The first n values, zero behind them; none if n is not above 0.
static inline Floats load_first(const float* from, int64_t n) {
    return _mm512_maskz_loadu_ps(first16(n), from);
}
static inline void store_first(Floats x, float* to, int64_t n) { _mm512_mask_storeu_ps(to, first16(n), x); }
static inline __mmask32 first32(int64_t n) { return n >= 32 ? ~0u : n > 0 ? (1u << n) - 1u : 0u; }
static inline Ints load_first16(const void* from, int64_t n) {
    return _mm512_maskz_loadu_epi16(first32(n), from);
}
static inline void store_first16(Ints x, void* to, int64_t n) {
    _mm512_mask_storeu_epi16(to, first32(n), x);
}
// x from place `begin` up to, and without, `end`, and `other` in the other places.
static inline Floats between(int64_t begin, int64_t end, Floats x, Floats other) {
    return _mm512_mask_mov_ps(other, __mmask16(first16(end) & ~first16(begin)), x);
}
// x, but zero where `of` is `value`, or below it; where `of` is no number, x.
static inline Floats zero_where_equal(Floats x, Floats of, Floats value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(of, value, _CMP_NEQ_UQ), x);
}
static inline Floats zero_where_below(Floats x, Floats of, Floats value) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(of, value, _CMP_NLT_UQ), x);
}
// x, but `other` where x is no number.
static inline Floats where_nan(Floats x, Floats other) {
    return _mm512_mask_mov_ps(x, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), other);
}
// x limited to [low, high]; no number stays what it is.
static inline Floats limited(Floats x, float low, float high) {
    return _mm512_max_ps(splat(low), _mm512_min_ps(splat(high), x));
}
static inline Floats nearest(Floats x) { return _mm512_roundscale_ps(x, 8); }
// p times 2^n for whole n from -126 to 128.
static inline Floats scaled(Floats p, Floats n) { return _mm512_scalef_ps(p, n); }

static inline Floats gathered(const float* from, Ints at) { return _mm512_i32gather_ps(at, from, 4); }

// 32 values of 16 bits.
typedef __mmask32 Which;  // of them
static inline Ints splat16(int x) { return _mm512_set1_epi16(int16_t(x)); }
static inline Ints add16(Ints a, Ints b) { return _mm512_add_epi16(a, b); }
static inline Ints sub16(Ints a, Ints b) { return _mm512_sub_epi16(a, b); }
static inline Ints smaller16(Ints a, Ints b) { return _mm512_min_epu16(a, b); }
static inline Ints larger16(Ints a, Ints b) { return _mm512_max_epu16(a, b); }
static inline Ints down16(Ints x, int n) { return _mm512_srli_epi16(x, unsigned(n)); }
static inline Ints without(Ints x, Ints bits) { return _mm512_andnot_si512(bits, x); }
static inline Which below16(Ints a, Ints b) { return _mm512_cmplt_epu16_mask(a, b); }
static inline bool any(Which of) { return of != 0; }
static inline Ints chosen(Which of, Ints x, Ints other) { return _mm512_mask_blend_epi16(of, other, x); }
static inline Shorts lower_half(Ints x) { return _mm512_castsi512_si256(x); }
static inline Shorts upper_half(Ints x) { return _mm512_extracti64x4_epi64(x, 1); }

// 16 rows of 32-bit values become columns.
static inline void transpose(Ints* r) {
    Ints t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

// Two rows of 32 values of 16 bits as pairs, a value of each.
static inline void pairs(Ints a, Ints b, Ints* out) {
    alignas(64) static const struct Order {
        int16_t first[32], second[32];
        Order() {
            for (int16_t i = 0; i < 32; i++) {
                first[i] = int16_t(i / 2 + i % 2 * 32);
                second[i] = int16_t(first[i] + 16);
            }
        }
    } order;
    out[0] = _mm512_permutex2var_epi16(a, _mm512_load_si512(order.first), b);
    out[1] = _mm512_permutex2var_epi16(a, _mm512_load_si512(order.second), b);
}

#elif defined(__AVX2__) && defined(__FMA__)
#define FALQON_HAS_SIMD
#include <immintrin.h>

struct Floats { __m256 low, high; };
struct Ints { __m256i low, high; };
typedef __m256i Shorts;

#define FALQON_EACH(of, name, a, b) of{name((a).low, (b).low), name((a).high, (b).high)}

static inline Floats operator+(Floats a, Floats b) { return FALQON_EACH(Floats, _mm256_add_ps, a, b); }
static inline Floats operator-(Floats a, Floats b) { return FALQON_EACH(Floats, _mm256_sub_ps, a, b); }
static inline Floats operator*(Floats a, Floats b) { return FALQON_EACH(Floats, _mm256_mul_ps, a, b); }
static inline Ints operator&(Ints a, Ints b) { return FALQON_EACH(Ints, _mm256_and_si256, a, b); }
static inline Ints operator|(Ints a, Ints b) { return FALQON_EACH(Ints, _mm256_or_si256, a, b); }

static inline Floats splat(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
static inline void store(Floats x, float* to) {
    _mm256_storeu_ps(to, x.low);
    _mm256_storeu_ps(to + 8, x.high);
}
static inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
static inline Floats fms(Floats a, Floats b, Floats c) {
    return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
}
static inline Floats larger(Floats a, Floats b) { return FALQON_EACH(Floats, _mm256_max_ps, a, b); }
static inline float largest_in(Floats x) {
    __m256 y = _mm256_max_ps(x.low, x.high);
    __m128 z = _mm_max_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    z = _mm_max_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_max_ss(z, _mm_shuffle_ps(z, z, 1)));
}
static inline float sum_in(Floats x) {
    __m256 y = _mm256_add_ps(x.high, x.low);
    __m128 z = _mm_add_ps(_mm256_extractf128_ps(y, 1), _mm256_castps256_ps128(y));
    z = _mm_add_ps(z, _mm_movehl_ps(z, z));
    return _mm_cvtss_f32(_mm_add_ss(z, _mm_shuffle_ps(z, z, 1)));
}
static inline Ints bits_of(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
static inline Floats floats_of(Ints x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }

static inline Shorts load_shorts(const void* from) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}
static inline void store(Shorts x, void* to) { _mm256_storeu_si256(static_cast<__m256i*>(to), x); }
static inline Ints load(const void* from) {
    return {load_shorts(from), load_shorts(static_cast<const char*>(from) + 32)};
}
static inline void store(Ints x, void* to) {
    store(x.low, to);
    store(x.high, static_cast<char*>(to) + 32);
}
static inline Ints splat32(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline Ints add32(Ints a, Ints b) { return FALQON_EACH(Ints, _mm256_add_epi32, a, b); }
template <int N> static inline Ints up32(Ints x) {
    return {_mm256_slli_epi32(x.low, N), _mm256_slli_epi32(x.high, N)};
}
template <int N> static inline Ints down32(Ints x) {
    return {_mm256_srli_epi32(x.low, N), _mm256_srli_epi32(x.high, N)};
}
static inline Ints widen32(Shorts x) {
    return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
            _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
static inline Shorts lower16(Ints x) {
    x = x & splat32(0xFFFF);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(x.low, x.high), 0xD8);
}
static inline Ints both(Shorts low, Shorts high) { return {low, high}; }
static inline Ints halves_of(Ints lower, Ints upper) {
    return {_mm256_blend_epi16(lower.low, upper.low, 0xAA),
            _mm256_blend_epi16(lower.high, upper.high, 0xAA)};
}

static inline Floats load_first(const float* from, int64_t n) {
    if (n >= 16) return load(from);
    float values[16] = {};
    if (n > 0) std::memcpy(values, from, size_t(n) * 4);
    return load(values);
}
static inline void store_first(Floats x, float* to, int64_t n) {
    if (n >= 16) return store(x, to);
    float values[16];
    store(x, values);
    if (n > 0) std::memcpy(to, values, size_t(n) * 4);
}
static inline Ints load_first16(const void* from, int64_t n) {
    if (n >= 32) return load(from);
    uint16_t values[32] = {};
    if (n > 0) std::memcpy(values, from, size_t(n) * 2);
    return load(static_cast<const void*>(values));
}
static inline void store_first16(Ints x, void* to, int64_t n) {
    if (n >= 32) return store(x, to);
    uint16_t values[32];
    store(x, static_cast<void*>(values));
    if (n > 0) std::memcpy(to, values, size_t(n) * 2);
}
static inline Floats between(int64_t begin, int64_t end, Floats x, Floats other) {
    if (begin <= 0 && end >= 16) return x;
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i places[] = {low, _mm256_add_epi32(low, _mm256_set1_epi32(8))};
    const auto limit = [](int64_t at) { return _mm256_set1_epi32(int(at < 0 ? 0 : at > 16 ? 16 : at)); };
    const __m256i first = limit(begin), last = limit(end);
    const auto chosen = [&](__m256i place, __m256 yes, __m256 no) {
        const __m256i is_later = _mm256_cmpgt_epi32(first, place);
        const __m256i is = _mm256_andnot_si256(is_later, _mm256_cmpgt_epi32(last, place));
        return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(is));
    };
    return {chosen(places[0], x.low, other.low), chosen(places[1], x.high, other.high)};
}
template <int IS> static inline Floats kept_where(Floats x, Floats of, Floats value) {
    return {_mm256_and_ps(x.low, _mm256_cmp_ps(of.low, value.low, IS)),
            _mm256_and_ps(x.high, _mm256_cmp_ps(of.high, value.high, IS))};
}
static inline Floats zero_where_equal(Floats x, Floats of, Floats value) {
    return kept_where<_CMP_NEQ_UQ>(x, of, value);
}
static inline Floats zero_where_below(Floats x, Floats of, Floats value) {
    return kept_where<_CMP_NLT_UQ>(x, of, value);
}
static inline Floats where_nan(Floats x, Floats other) {
    return {_mm256_blendv_ps(x.low, other.low, _mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q)),
            _mm256_blendv_ps(x.high, other.high, _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q))};
}
static inline Floats limited(Floats x, float low, float high) {
    x = FALQON_EACH(Floats, _mm256_min_ps, splat(high), x);
    return FALQON_EACH(Floats, _mm256_max_ps, splat(low), x);
}
static inline Floats nearest(Floats x) { return {_mm256_round_ps(x.low, 8), _mm256_round_ps(x.high, 8)}; }
static inline Floats power_of_two(Floats n) {
    const auto power = [](__m256 n) {
        const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
    };
    return {power(n.low), power(n.high)};
}
static inline Floats scaled(Floats p, Floats n) {  // in two steps: 2^128 is no float
    const Floats half = nearest(n * splat(0.5f));
    return p * power_of_two(half) * power_of_two(n - half);
}

static inline Floats gathered(const float* from, Ints at) {
    return {_mm256_i32gather_ps(from, at.low, 4), _mm256_i32gather_ps(from, at.high, 4)};
}

typedef Ints Which;
static inline Ints splat16(int x) { return {_mm256_set1_epi16(int16_t(x)), _mm256_set1_epi16(int16_t(x))}; }
static inline Ints add16(Ints a, Ints b) { return FALQON_EACH(Ints, _mm256_add_epi16, a, b); }
static inline Ints sub16(Ints a, Ints b) { return FALQON_EACH(Ints, _mm256_sub_epi16, a, b); }
static inline Ints smaller16(Ints a, Ints b) { return FALQON_EACH(Ints, _mm256_min_epu16, a, b); }
static inline Ints larger16(Ints a, Ints b) { return FALQON_EACH(Ints, _mm256_max_epu16, a, b); }
static inline Ints down16(Ints x, int n) { return {_mm256_srli_epi16(x.low, n), _mm256_srli_epi16(x.high, n)}; }
static inline Ints without(Ints x, Ints bits) { return FALQON_EACH(Ints, _mm256_andnot_si256, bits, x); }
static inline Which below16(Ints a, Ints b) {
    const Ints most = larger16(a, b), same = FALQON_EACH(Ints, _mm256_cmpeq_epi16, most, a);
    return without(splat32(-1), same);
}
static inline bool any(Which of) {
    const __m256i some = _mm256_or_si256(of.low, of.high);
    return !_mm256_testz_si256(some, some);
}
static inline Ints chosen(Which of, Ints x, Ints other) {
    return {_mm256_blendv_epi8(other.low, x.low, of.low), _mm256_blendv_epi8(other.high, x.high, of.high)};
}
static inline Shorts lower_half(Ints x) { return x.low; }
static inline Shorts upper_half(Ints x) { return x.high; }

static inline void transpose8(__m256i* r) {
    __m256i t[8];
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        const __m256i first = r[i], second = r[i + 4];
        r[i] = _mm256_permute2x128_si256(first, second, 0x20);
        r[i + 4] = _mm256_permute2x128_si256(first, second, 0x31);
    }
}
static inline void transpose(Ints* r) {
    __m256i parts[4][8];  // upper left, lower left, upper right, lower right
    for (int i = 0; i < 8; i++) {
        parts[0][i] = r[i].low, parts[1][i] = r[i + 8].low;
        parts[2][i] = r[i].high, parts[3][i] = r[i + 8].high;
    }
    for (auto& part : parts) transpose8(part);
    for (int i = 0; i < 8; i++) r[i] = {parts[0][i], parts[1][i]}, r[i + 8] = {parts[2][i], parts[3][i]};
}

static inline Ints pairs16(__m256i a, __m256i b) {
    const __m256i low = _mm256_unpacklo_epi16(a, b), high = _mm256_unpackhi_epi16(a, b);
    return {_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31)};
}
static inline void pairs(Ints a, Ints b, Ints* out) {
    out[0] = pairs16(a.low, b.low);
    out[1] = pairs16(a.high, b.high);
}

#undef FALQON_EACH
#endif

#endif

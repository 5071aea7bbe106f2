// What the CPU path does beside matrix products, each in one pass over its rows.
//
// Compiled once by build.py with the C++ compiler of the machine; plain torch does the same where
// there is none. bfloat16 values are uint16, FP8 codes uint8, scales powers of two. Every row is
// one thread's work, so results do not depend on the number of threads. No function allocates.

#include <cstdint>
#include <cstring>

typedef uint16_t bf16;
typedef int64_t i64;

static inline float from_bits(uint32_t bits) { float x; std::memcpy(&x, &bits, 4); return x; }
static inline uint32_t to_bits(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
static inline float widen(bf16 x) { return from_bits(uint32_t(x) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
static inline bf16 narrow(float x) {
    uint32_t bits = to_bits(x);
    uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    uint32_t nan = (bits >> 16) | 0x40u;
    return bf16((bits & 0x7FFFFFFFu) > 0x7F800000u ? nan : rounded);
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

static inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

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

static inline uint32_t largest_of(const bf16* x, i64 n) {
    uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
    for (i64 i = 0; i < n; i++) {
        uint32_t size = x[i] & 0x7FFFu;
        largest = size > largest ? size : largest;
    }
    return largest;
}

// Q(x) / scale, times a factor; `to` may be x.
static inline void round_row(const bf16* x, i64 n, float scale, float factor, const Format f,
                             bf16* to) {
    float inverse = 1.0f / scale;
#pragma omp simd
    for (i64 i = 0; i < n; i++)
        to[i] = bf16(to_bits(round_fp8(widen(x[i]) * scale, f) * inverse * factor) >> 16);
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

extern "C" {

// Values of merged E4M3 codes over their scales, which are powers of two: the rows of all
// backbones, outs[l] each, then those of all adapters, rank each.
void falqon_decode(i64 layers, const uint8_t* const* codes, const float* const* scales,
                   const i64* outs, i64 rank, i64 columns, bf16* out) {
    i64 rows = 0;
    for (i64 l = 0; l < layers; l++) rows += outs[l];
#pragma omp parallel
    {
        bf16 *backbone = out, *adapter = out + rows * columns;
        for (i64 l = 0; l < layers; l++) {
            i64 first = outs[l] * columns, second = rank * columns;
            const uint8_t *of_backbone = codes[l], *of_adapter = codes[l] + first;
            float factor = 1.0f / *scales[l];
#pragma omp for simd schedule(static) nowait
            for (i64 i = 0; i < first; i++) backbone[i] = decoded(of_backbone[i], factor);
#pragma omp for simd schedule(static) nowait
            for (i64 i = 0; i < second; i++) adapter[i] = decoded(of_adapter[i], factor);
            backbone += first;
            adapter += second;
        }
    }
}

// Rows of several tensors side by side, quantised with one scale a row for all of them. The values
// that are rounded are those times their tensor's factor, which is taken back afterwards.
void falqon_quantize(i64 parts, const bf16* const* x, const i64* widths, const i64* strides,
                     const float* factors, i64 rows, i64 is_e5m2, bf16* out) {
    i64 n = 0;
    for (i64 p = 0; p < parts; p++) n += widths[p];
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        bf16* to = out + t * n;
        uint32_t largest = 0;
        for (i64 p = 0; p < parts; to += widths[p], p++) {
            const bf16* from = x[p] + t * strides[p];
            float factor = factors[p];
            if (factor != 1.0f) {
#pragma omp simd
                for (i64 i = 0; i < widths[p]; i++) to[i] = narrow(widen(from[i]) * factor);
                from = to;
            }
            uint32_t size = largest_of(from, widths[p]);
            largest = size > largest ? size : largest;
        }
        to = out + t * n;
        float scale = scale_of(largest, is_e5m2 ? E5M2.max : E4M3.max);
        for (i64 p = 0; p < parts; to += widths[p], p++) {
            const bf16* from = factors[p] == 1.0f ? x[p] + t * strides[p] : to;
            if (is_e5m2) round_row(from, widths[p], scale, 1.0f / factors[p], E5M2, to);
            else round_row(from, widths[p], scale, 1.0f / factors[p], E4M3, to);
        }
    }
}

// x / rms(x), rounded, times w, rounded, and quantised if it is to be.
void falqon_rms_norm(const bf16* x, const bf16* weight, const float* inverse_rms, i64 rows, i64 n,
                     i64 quantised, bf16* out) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        const bf16* from = x + t * n;
        bf16* to = out + t * n;
        float inverse = inverse_rms[t];
#pragma omp simd
        for (i64 i = 0; i < n; i++)
            to[i] = narrow(widen(weight[i]) * widen(narrow(widen(from[i]) * inverse)));
        if (quantised) quantize_row(to, n, E4M3);
    }
}

// (g w - x mean(g w x) / rms^2) / rms.
void falqon_rms_norm_grad(const bf16* grad, const bf16* x, const bf16* weight,
                          const float* inverse_rms, i64 rows, i64 n, bf16* out) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        const bf16 *g = grad + t * n, *from = x + t * n;
        bf16* to = out + t * n;
        float inverse = inverse_rms[t], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < n; i++) sum += widen(g[i]) * widen(weight[i]) * widen(from[i]);
        float along = sum / float(n) * (inverse * inverse);
#pragma omp simd
        for (i64 i = 0; i < n; i++)
            to[i] = narrow((widen(g[i]) * widen(weight[i]) - widen(from[i]) * along) * inverse);
    }
}

// silu(gate), rounded, times up, rounded, and quantised if it is to be.
void falqon_swiglu(const bf16* gate, const bf16* up, i64 rows, i64 n, i64 quantised, bf16* out) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        const bf16 *g = gate + t * n, *u = up + t * n;
        bf16* to = out + t * n;
#pragma omp simd
        for (i64 i = 0; i < n; i++) {
            float x = widen(g[i]);
            to[i] = narrow(widen(narrow(x / (1.0f + exponential(-x)))) * widen(u[i]));
        }
        if (quantised) quantize_row(to, n, E4M3);
    }
}

// Gradients of silu(gate) * up.
void falqon_swiglu_grad(const bf16* grad, const bf16* gate, const bf16* up, i64 count, bf16* d_gate,
                        bf16* d_up) {
#pragma omp parallel for simd schedule(static)
    for (i64 i = 0; i < count; i++) {
        float g = widen(grad[i]), x = widen(gate[i]), s = sigmoid(x);
        d_gate[i] = narrow(widen(narrow(g * widen(up[i]))) * s * (1.0f + x * (1.0f - s)));
        d_up[i] = narrow(g * widen(narrow(x * s)));
    }
}

// Cross entropy of rows of logits, which become the gradient: softmax minus one at the target.
void falqon_cross_entropy(bf16* logits, const i64* targets, i64 rows, i64 n, i64 want_grad,
                          float* losses) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        bf16* row = logits + t * n;
        float largest = -__builtin_inff(), sum = 0.0f;
#pragma omp simd reduction(max : largest)
        for (i64 i = 0; i < n; i++) largest = widen(row[i]) > largest ? widen(row[i]) : largest;
        // Parts of a row: a sum of tens of thousands of values in one go would lose digits.
        for (i64 start = 0; start < n; start += 1024) {
            i64 end = start + 1024 < n ? start + 1024 : n;
            float part = 0.0f;
#pragma omp simd reduction(+ : part)
            for (i64 i = start; i < end; i++) part += exponential(widen(row[i]) - largest);
            sum += part;
        }
        float at_target = widen(row[targets[t]]);
        float log_sum = __builtin_logf(sum);
        losses[t] = log_sum + largest - at_target;
        if (!want_grad) continue;
        float inverse = 1.0f / sum, p = exponential(at_target - largest) * inverse;
#pragma omp simd
        for (i64 i = 0; i < n; i++) row[i] = narrow(exponential(widen(row[i]) - largest) * inverse);
        row[targets[t]] = narrow(p - 1.0f);
    }
}

// Rotated heads (sign -1 turns back): [b, s, heads, d] with strides to [b, kv, s, group, d].
// forward: to = a cos + rotate_half(a) sin, products and sum rounded as torch's modules round them.
void falqon_rotate(const bf16* x, i64 row_stride, i64 head_stride, const bf16* cos, const bf16* sin,
                   i64 batch, i64 table_stride, i64 length, i64 kv, i64 group, i64 d, bf16* out) {
#pragma omp parallel for schedule(static) collapse(2)
    for (i64 b = 0; b < batch; b++)
        for (i64 s = 0; s < length; s++) {
            const bf16 *c = cos + b * table_stride + s * d, *n = sin + b * table_stride + s * d;
            for (i64 h = 0; h < kv * group; h++) {
                const bf16* from = x + (b * length + s) * row_stride + h * head_stride;
                bf16* to = out + (((b * kv + h / group) * length + s) * group + h % group) * d;
                i64 half = d / 2;
#pragma omp simd
                for (i64 i = 0; i < half; i++) {
                    float low = widen(from[i]), high = widen(from[half + i]);
                    to[i] = narrow(widen(narrow(low * widen(c[i]))) + widen(narrow(-high * widen(n[i]))));
                    to[half + i] = narrow(widen(narrow(high * widen(c[half + i]))) +
                                          widen(narrow(low * widen(n[half + i]))));
                }
            }
        }
}

// The gradient of falqon_rotate's input, [b, s, heads, d] from [b, kv, s, group, d].
void falqon_rotate_grad(const bf16* grad, const bf16* cos, const bf16* sin, i64 batch,
                        i64 table_stride, i64 length, i64 kv, i64 group, i64 d, bf16* out) {
#pragma omp parallel for schedule(static) collapse(2)
    for (i64 b = 0; b < batch; b++)
        for (i64 s = 0; s < length; s++) {
            const bf16 *c = cos + b * table_stride + s * d, *n = sin + b * table_stride + s * d;
            for (i64 h = 0; h < kv * group; h++) {
                const bf16* from = grad + (((b * kv + h / group) * length + s) * group + h % group) * d;
                bf16* to = out + ((b * length + s) * kv * group + h) * d;
                i64 half = d / 2;
#pragma omp simd
                for (i64 i = 0; i < half; i++) {
                    float low = widen(from[i]), high = widen(from[half + i]);
                    to[i] = narrow(widen(narrow(low * widen(c[i]))) +
                                   widen(narrow(high * widen(n[half + i]))));
                    to[half + i] = narrow(widen(narrow(high * widen(c[half + i]))) +
                                          widen(narrow(-low * widen(n[i]))));
                }
            }
        }
}

// Move heads between [b, s, heads, d] (rows apart) and [b, kv, s, group, d].
void falqon_regroup(const bf16* x, i64 row_stride, i64 batch, i64 length, i64 kv, i64 group, i64 d,
                    i64 back, bf16* out) {
#pragma omp parallel for schedule(static) collapse(2)
    for (i64 b = 0; b < batch; b++)
        for (i64 s = 0; s < length; s++)
            for (i64 h = 0; h < kv; h++) {
                i64 apart = (b * length + s) * row_stride + h * group * d;
                i64 together = ((b * kv + h) * length + s) * group * d;
                std::memcpy(out + (back ? apart : together), x + (back ? together : apart),
                            size_t(group * d) * 2);
            }
}

// Softmax over keys first[b, i] to last[b, i] of scores [b * kv, queries * group, keys], in place;
// `offset` is the number of the first key, `query` that of the first query.
void falqon_softmax(bf16* scores, const int32_t* first, const int32_t* last, i64 batch, i64 kv,
                    i64 length, i64 query, i64 queries, i64 group, i64 offset, i64 keys,
                    float factor) {
#pragma omp parallel for schedule(static) collapse(2)
    for (i64 m = 0; m < batch * kv; m++)
        for (i64 r = 0; r < queries * group; r++) {
            bf16* row = scores + (m * queries * group + r) * keys;
            i64 at = (m / kv) * length + query + r / group;
            i64 start = first[at] - offset, end = last[at] - offset;
            start = start < 0 ? 0 : start;
            end = end < start ? start : end;
            if (start == end) {  // a query that sees nothing, as of padding
                std::memset(row, 0, size_t(keys) * 2);
                continue;
            }
            // Whole vectors only: what is past the end is minus infinity, whose exponential is zero.
            float kept[KEPT + WIDEST];
            float largest = -__builtin_inff(), sum = 0.0f;
            for (i64 at = start; at < end; at += KEPT) {
                i64 count = padded(row + at, end - at, kept);
#pragma omp simd reduction(max : largest)
                for (i64 i = 0; i < count; i++) largest = kept[i] > largest ? kept[i] : largest;
            }
            float shift = largest * factor;
            for (i64 at = start; at < end; at += KEPT) {
                i64 count = end - start > KEPT ? padded(row + at, end - at, kept)
                                               : (end - start + WIDEST - 1) / WIDEST * WIDEST;
#pragma omp simd reduction(+ : sum)
                for (i64 i = 0; i < count; i++) {
                    kept[i] = exponential(kept[i] * factor - shift);
                    sum += kept[i];
                }
            }
            float inverse = 1.0f / sum;
            for (i64 at = start; at < end; at += KEPT) {
                i64 count = end - at < KEPT ? end - at : KEPT;
                if (end - start > KEPT) {
                    i64 wide = padded(row + at, end - at, kept);
#pragma omp simd
                    for (i64 i = 0; i < wide; i++)
                        kept[i] = exponential(kept[i] * factor - shift);
                }
#pragma omp simd
                for (i64 i = 0; i < count; i++) row[at + i] = narrow(kept[i] * inverse);
            }
            std::memset(row, 0, size_t(start) * 2);
            std::memset(row + end, 0, size_t(keys - end) * 2);
        }
}

// Gradient of the scores before their factor: p (dp - sum(p dp)) factor, into dp.
void falqon_softmax_grad(const bf16* p, bf16* dp, i64 rows, i64 keys, float factor) {
#pragma omp parallel for schedule(static)
    for (i64 r = 0; r < rows; r++) {
        const bf16* weights = p + r * keys;
        bf16* row = dp + r * keys;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < keys; i++) sum += widen(weights[i]) * widen(row[i]);
#pragma omp simd
        for (i64 i = 0; i < keys; i++)
            row[i] = narrow(widen(weights[i]) * (widen(row[i]) - sum) * factor);
    }
}
}

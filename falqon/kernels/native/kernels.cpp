// What the CPU path does beside matrix products, each in one pass over its rows.
//
// Compiled once by build.py with the C++ compiler of the machine; plain torch does the same where
// there is none. Every row is one thread's work, so results do not depend on the number of threads.
// No function allocates.

#include "rows.h"

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

// Values of E4M3 codes.
void falqon_values(const uint8_t* codes, i64 n, float* out) {
#pragma omp parallel for simd schedule(static) if (n > 1 << 17)
    for (i64 i = 0; i < n; i++) out[i] = value_of(codes[i]);
}

// Rows of several tensors side by side: see quantize_parts.
void falqon_quantize(i64 parts, const bf16* const* x, const i64* widths, const i64* strides,
                     const float* factors, i64 rows, i64 is_e5m2, bf16* out) {
    i64 n = 0;
    for (i64 p = 0; p < parts; p++) n += widths[p];
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        bf16* to = out + t * n;
        if (is_e5m2) quantize_parts(parts, x, widths, strides, factors, t, E5M2, to);
        else quantize_parts(parts, x, widths, strides, factors, t, E4M3, to);
    }
}

// Rows of norm_row; 1 / rms(x) of each is made, or used if it is given.
void falqon_rms_norm(const bf16* x, const bf16* weight, float eps, i64 given, float* inverse_rms,
                     i64 rows, i64 n, i64 quantised, bf16* out) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        if (!given) inverse_rms[t] = inverse_rms_of(x + t * n, n, eps);
        norm_row(x + t * n, weight, inverse_rms[t], n, quantised, out + t * n);
    }
}

// (g w - x mean(g w x) / rms^2) / rms, rounded; plus `onto`, if there is any, and rounded again.
void falqon_rms_norm_grad(const bf16* grad, const bf16* x, const bf16* weight,
                          const float* inverse_rms, const bf16* onto, i64 rows, i64 n, bf16* out) {
#pragma omp parallel for schedule(dynamic, 16)
    for (i64 t = 0; t < rows; t++) {
        const bf16 *g = grad + t * n, *from = x + t * n, *more = onto + t * n;
        bf16* to = out + t * n;
        float inverse = inverse_rms[t], sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < n; i++) sum += widen(g[i]) * widen(weight[i]) * widen(from[i]);
        float along = sum / float(n) * (inverse * inverse);
        i64 i = 0;
#ifdef FALQON_HAS_SIMD
        const Floats by = splat(along), over = splat(inverse);
        const auto gradient = [&](Floats g, Floats w, Floats x) { return (g * w - x * by) * over; };
        for (; i + 32 <= n; i += 32) {
            const Halves of(g + i), w(weight + i), x(from + i);
            Halves out(gradient(of.even, w.even, x.even), gradient(of.odd, w.odd, x.odd));
            if (onto) {
                const Halves there(more + i);
                out.even = rounded_wide(out.even) + there.even;
                out.odd = rounded_wide(out.odd) + there.odd;
            }
            out.put(to + i);
        }
#endif
#pragma omp simd
        for (i64 k = i; k < n; k++) {
            to[k] = narrow((widen(g[k]) * widen(weight[k]) - widen(from[k]) * along) * inverse);
            if (onto) to[k] = narrow(widen(to[k]) + widen(more[k]));
        }
    }
}

void falqon_swiglu(const bf16* gate, const bf16* up, i64 rows, i64 n, i64 quantised, bf16* out) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) swiglu_row(gate + t * n, up + t * n, n, quantised, out + t * n);
}

void falqon_swiglu_grad(const bf16* grad, const bf16* gate, const bf16* up, i64 rows, i64 n,
                        bf16* d_gate, bf16* d_up) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < rows; t++) {
        const i64 at = t * n;
        swiglu_grad_row(grad + at, gate + at, up + at, n, d_gate + at, d_up + at);
    }
}

// Cross entropy of rows of logits. With `sums` these become exp(logit - largest), and zero at the target; the
// sum of a row's exponentials, the target's included, is put there. Over it, they are the gradient but at the
// target, where it is one less than the softmax: `at_targets`.
void falqon_cross_entropy(bf16* logits, const i64* targets, i64 rows, i64 n, float* losses, float* sums,
                          float* at_targets) {
#pragma omp parallel for schedule(dynamic)
    for (i64 t = 0; t < rows; t++) {
        bf16* row = logits + t * n;
        const float at_target = widen(row[targets[t]]);
        float largest = -__builtin_inff(), sum = 0.0f;
#pragma omp simd reduction(max : largest)
        for (i64 i = 0; i < n; i++) largest = widen(row[i]) > largest ? widen(row[i]) : largest;
        // Parts of a row: a sum of tens of thousands of values in one go would lose digits.
        for (i64 start = 0; start < n; start += 1024) {
            i64 end = start + 1024 < n ? start + 1024 : n, i = start;
            float part = 0.0f;
#ifdef FALQON_HAS_SIMD
            Floats of_lanes = splat(0.0f);
            const Floats shift = splat(largest);
            for (; i + 16 <= end; i += 16) {
                const Floats e = exponentials(widened(row + i) - shift);
                of_lanes = of_lanes + e;
                if (sums) put_rounded(e, row + i);
            }
            part = sum_in(of_lanes);
#endif
#pragma omp simd reduction(+ : part)
            for (i64 k = i; k < end; k++) {
                const float e = exponential(widen(row[k]) - largest);
                part += e;
                row[k] = sums ? narrow(e) : row[k];
            }
            sum += part;
        }
        losses[t] = __builtin_logf(sum) + largest - at_target;
        if (!sums) continue;
        sums[t] = sum;
        at_targets[t] = exponential(at_target - largest) / sum - 1.0f;
        row[targets[t]] = 0;
    }
}

// Rotated heads: [b, s, heads, d] with strides to [b, kv, s, group, d].
void falqon_rotate(const bf16* x, i64 row_stride, i64 head_stride, const bf16* cos, const bf16* sin,
                   i64 batch, i64 table_stride, i64 length, i64 kv, i64 group, i64 d, bf16* out) {
#pragma omp parallel for schedule(static) collapse(2)
    for (i64 b = 0; b < batch; b++)
        for (i64 s = 0; s < length; s++) {
            const bf16 *c = cos + b * table_stride + s * d, *n = sin + b * table_stride + s * d;
            for (i64 h = 0; h < kv * group; h++) {
                const bf16* from = x + (b * length + s) * row_stride + h * head_stride;
                bf16* to = out + (((b * kv + h / group) * length + s) * group + h % group) * d;
                rotate<false>(from, c, n, d, to);
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
                rotate<true>(from, c, n, d, to);
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

// Sums of the squares of float32 values, in float64.
void falqon_square_sums(i64 count, const float* const* x, const i64* sizes, double* sums) {
#pragma omp parallel for schedule(dynamic)
    for (i64 k = 0; k < count; k++) {
        const float* from = x[k];
        double sum = 0.0;
#pragma omp simd reduction(+ : sum)
        for (i64 i = 0; i < sizes[k]; i++) sum += double(from[i]) * double(from[i]);
        sums[k] = sum;
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

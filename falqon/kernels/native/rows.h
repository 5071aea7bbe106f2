// Rows of what comes before and after matrix products.

#ifndef FALQON_ROWS_H
#define FALQON_ROWS_H

#include <cmath>

#include "values.h"

// For every bfloat16 x, sigmoid(x), and x sigmoid(x), rounded to bfloat16.
struct Silu {
    float sigmoid[65536], of[65536];
    Silu() {
        for (uint32_t i = 0; i < 65536; i++) {
            const float x = widen(bf16(i)), e = exponential(-x);
            sigmoid[i] = 1.0f / (1.0f + e);
            of[i] = widen(narrow(x / (1.0f + e)));
        }
    }
};
inline const Silu& silu() {
    static const Silu tables;  // looked up, they take half of the time
    return tables;
}

// The squares of a row, summed in the order in which torch sums rows on processors of this kind: 4 x 8
// running sums, which every 16 steps go to the next of four levels.
static float sum_of_squares(const bf16* x, i64 n) {
    const i64 lanes = 8, at_once = 4 * lanes, levels = 4, steps = n / at_once;
    float sums[levels][at_once] = {};
    for (i64 step = 0; step < steps;) {
        const bf16* from = x + step * at_once;
#pragma omp simd
        for (i64 i = 0; i < at_once; i++) sums[0][i] += widen(from[i]) * widen(from[i]);
        step++;
        for (i64 level = 1, at = step; level < levels && at % 16 == 0; level++, at /= 16)
            for (i64 i = 0; i < at_once; i++)
                sums[level][i] += sums[level - 1][i], sums[level - 1][i] = 0.0f;
    }
    for (i64 level = 1; level < levels; level++)
        for (i64 i = 0; i < at_once; i++) sums[0][i] += sums[level][i];
    i64 at = steps * at_once;
    for (; at + lanes <= n; at += lanes)
        for (i64 i = 0; i < lanes; i++) sums[0][i] += widen(x[at + i]) * widen(x[at + i]);
    for (i64 part = 1; part < 4; part++)
        for (i64 i = 0; i < lanes; i++) sums[0][i] += sums[0][part * lanes + i];
    float sum = 0.0f;
    for (; at < n; at++) sum += widen(x[at]) * widen(x[at]);
    for (i64 i = 0; i < lanes; i++) sum += sums[0][i];
    return sum;
}

static inline float inverse_rms_of(const bf16* x, i64 n, float eps) {
    return 1.0f / std::sqrt(sum_of_squares(x, n) / float(n) + eps);
}

// x / rms(x), rounded, times w, rounded, and quantised if it is to be.
static inline void norm_row(const bf16* x, const bf16* weight, float inverse_rms, i64 n,
                            bool quantised, bf16* out) {
#pragma omp simd
    for (i64 i = 0; i < n; i++)
        out[i] = narrow(widen(weight[i]) * widen(narrow(widen(x[i]) * inverse_rms)));
    if (quantised) quantize_row(out, n, E4M3);
}

#ifdef FALQON_HAS_SIMD
// What a table has for 32 values.
static inline Halves looked_up(const float* of, const bf16* x) {
    const Ints bits = load(x);
    return Halves(gathered(of, bits & splat32(0xFFFF)), gathered(of, down32<16>(bits)));
}
#endif

// silu(gate), rounded, times up, rounded, and quantised if it is to be.
static inline void swiglu_row(const bf16* gate, const bf16* up, i64 n, bool quantised, bf16* out) {
    const float* of = silu().of;
    i64 i = 0;
#ifdef FALQON_HAS_SIMD
    for (; i + 32 <= n; i += 32) {
        const Halves x = looked_up(of, gate + i), by(up + i);
        Halves(x.even * by.even, x.odd * by.odd).put(out + i);
    }
#endif
#pragma omp simd
    for (i64 k = i; k < n; k++) out[k] = narrow(of[gate[k]] * widen(up[k]));
    if (quantised) quantize_row(out, n, E4M3);
}

#ifdef FALQON_HAS_SIMD
// Gradients of silu(gate) * up, 16 at a time, before they are rounded; s is sigmoid(gate).
static inline void swiglu_grads(Floats grad, Floats gate, Floats up, Floats s, Floats* d_gate,
                                Floats* d_up) {
    const Floats one = splat(1.0f), slope = one + gate * (one - s);
    *d_gate = rounded_wide(grad * up) * s * slope;
    *d_up = grad * rounded_wide(gate * s);
}
#endif

// Gradients of silu(gate) * up.
static inline void swiglu_grad_row(const bf16* grad, const bf16* gate, const bf16* up, i64 n,
                                   bf16* d_gate, bf16* d_up) {
    const float* sigmoid = silu().sigmoid;
    i64 i = 0;
#ifdef FALQON_HAS_SIMD
    for (; i + 32 <= n; i += 32) {
        const Halves g(grad + i), x(gate + i), u(up + i);
        const Halves s = looked_up(sigmoid, gate + i);
        Floats gates[2], ups[2];
        swiglu_grads(g.even, x.even, u.even, s.even, gates, ups);
        swiglu_grads(g.odd, x.odd, u.odd, s.odd, gates + 1, ups + 1);
        Halves(gates[0], gates[1]).put(d_gate + i);
        Halves(ups[0], ups[1]).put(d_up + i);
    }
#endif
#pragma omp simd
    for (i64 k = i; k < n; k++) {
        const float g = widen(grad[k]), x = widen(gate[k]), s = sigmoid[gate[k]];
        d_gate[k] = narrow(widen(narrow(g * widen(up[k]))) * s * (1.0f + x * (1.0f - s)));
        d_up[k] = narrow(g * widen(narrow(x * s)));
    }
}

#endif

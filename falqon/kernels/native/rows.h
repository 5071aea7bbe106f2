// Rows of what comes before and after matrix products.

#ifndef FALQON_ROWS_H
#define FALQON_ROWS_H

#include <cmath>

#include "values.h"

// x sigmoid(x), rounded to bfloat16, for every bfloat16 x.
struct Silu {
    float of[65536];
    Silu() {
        for (uint32_t i = 0; i < 65536; i++) {
            float x = widen(bf16(i));
            of[i] = widen(narrow(x / (1.0f + exponential(-x))));
        }
    }
};

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

// silu(gate), rounded, times up, rounded, and quantised if it is to be.
static inline void swiglu_row(const bf16* gate, const bf16* up, i64 n, bool quantised, bf16* out) {
    static const Silu silu;  // looked up, it takes two thirds of the time
#pragma omp simd
    for (i64 i = 0; i < n; i++) out[i] = narrow(silu.of[gate[i]] * widen(up[i]));
    if (quantised) quantize_row(out, n, E4M3);
}

// Gradients of silu(gate) * up.
static inline void swiglu_grad_row(const bf16* grad, const bf16* gate, const bf16* up, i64 n,
                                   bf16* d_gate, bf16* d_up) {
#pragma omp simd
    for (i64 i = 0; i < n; i++) {
        float g = widen(grad[i]), x = widen(gate[i]), s = 1.0f / (1.0f + exponential(-x));
        d_gate[i] = narrow(widen(narrow(g * widen(up[i]))) * s * (1.0f + x * (1.0f - s)));
        d_up[i] = narrow(g * widen(narrow(x * s)));
    }
}

#endif

// The gradient that comes through the output embedding, on processors with AMX: a product that is
// summed over the whole vocabulary.
//
// Every thread has columns of its own, so that results do not depend on the number of threads.

#include "amx.h"

#ifdef FALQON_HAS_AMX

static const i64 DEEP = 256;  // rows of the matrix that are added up at a time
static const i64 ROWS = 256;  // rows of the gradient, likewise

// Columns of the widest thread's share.
static i64 widest_share(i64 in, i64 threads) { return (in / PANEL + threads - 1) / threads * PANEL; }

// Values that a thread needs for itself.
static i64 own_of_share(i64 widest, i64 tokens) {
    return DEEP * widest + ROWS * (DEEP + PANEL) + 2 * filled(tokens) * widest;
}

extern "C" {

// How many 16-bit values the `work` of falqon_amx_dense_grad has to have room for, also if fewer
// threads come than might.
i64 falqon_amx_dense_grad_work(i64 tokens, i64 in, i64 team) {
    i64 size = 0;
    for (i64 threads = 1; threads <= team; threads++)
        size = most(size, threads * own_of_share(widest_share(in, threads), tokens));
    return size;
}

// g W [tokens, in], for g [tokens, out] and W [out, in]. `team`, `work`: as in amx.cpp.
void falqon_amx_dense_grad(const bf16* grad, i64 tokens, i64 out, const bf16* weight, i64 in,
                           bf16* result, i64 team, bf16* work) {
    const i64 apart = DEEP + PANEL, whole = filled(tokens);
#pragma omp parallel num_threads(int(team))
    {
        const i64 id = omp_get_thread_num(), threads = omp_get_num_threads(), panels = in / PANEL;
        const i64 p0 = panels * id / threads, count = panels * (id + 1) / threads - p0;
        const i64 wide = count * PANEL;
        const i64 widest = widest_share(in, threads);
        bf16* right = work + id * own_of_share(widest, tokens);
        bf16* left = right + DEEP * widest;
        float* sums = reinterpret_cast<float*>(left + ROWS * apart);
        Tiles tiles;
        std::memset(sums, 0, size_t(whole * wide) * 4);
        for (i64 k = 0; k < out; k += DEEP) {
            const i64 deep = least(DEEP, out - k);
            pack_columns(Plain{weight + k * in, in, deep, in}, p0 * PANEL, deep, right, count);
            const Product of = {left, apart, right, deep};
            for (i64 m0 = 0; m0 < tokens; m0 += ROWS) {
                const i64 rows = least(ROWS, tokens - m0);
                // A copy, since rows as far apart as the vocabulary is wide meet in the cache. What
                // is behind its last row makes sums that nobody asks for.
                for (i64 m = 0; m < rows; m++)
                    std::memcpy(left + m * apart, grad + (m0 + m) * out + k, size_t(deep) * 2);
                for (i64 m = 0; m < rows; m += PANEL)
                    for (i64 p = 0; p < count; p++)
                        add_to(of, m, p, sums + (m0 + m) * wide + p * PANEL, wide);
            }
        }
        for (i64 m = 0; m < tokens; m++)
            for (i64 n = 0; n < wide; n += 16)
                put(_mm512_load_ps(sums + m * wide + n), result + m * in + p0 * PANEL + n);
    }
}
}

#endif

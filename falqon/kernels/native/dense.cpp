// The products with the output embedding: logits, and the gradient that comes through it, which is
// summed over the whole vocabulary.
//
// A result is one thread's work, and its sum runs from first to last however many are added up at a time,
// so that results do not depend on the number of threads.

#include "blocks.h"

#ifdef FALQON_HAS_BLOCKS

static const i64 ROWS = 64;   // rows of the gradient that are multiplied at a time
static const i64 EARLY = 16;  // rows of the matrix are fetched so many ahead
static const i64 SOON = 4;    // and rows of the gradient

// Rows of the matrix that are added up at a time by a thread with `wide` columns: they stay in its
// cache.
static i64 depth_of(i64 wide) { return most(256, least(1024, RIGHT / (wide * 2) / PANEL * PANEL)); }

// Columns of the widest thread's share.
static i64 widest_share(i64 in, i64 threads) { return (in / PANEL + threads - 1) / threads * PANEL; }

// Values that a thread needs for itself.
static i64 own_of_share(i64 widest, i64 tokens) {
    const i64 depth = depth_of(widest);
    return depth * widest + ROWS * (depth + PANEL) + 2 * filled(tokens) * widest;
}

extern "C" {

// How many 16-bit values the `work` of falqon_dense has to have room for.
i64 falqon_dense_work(i64 tokens, i64 in, i64 team) {
    return tokens * (in + PANEL) + team * panels_at_a_time(in) * in * PANEL;
}

// x W^T [tokens, out], for x [tokens, in] and W [out, in]; there are 32 tokens at least. `team`, `work`:
// as in groups.cpp.
void falqon_dense(const bf16* x, i64 tokens, const bf16* weight, i64 out, i64 in, bf16* result,
                  i64 team, bf16* work) {
    const i64 panels = out / PANEL, apart = in + PANEL;  // further than long: see multiply in groups.cpp
    std::unique_ptr<Turn[]> turns;
#pragma omp parallel num_threads(int(team))
    {
        const i64 id = omp_get_thread_num(), threads = omp_get_num_threads();
        const i64 together = most(1, least(panels_at_a_time(in), panels / (3 * threads)));
        bf16 *left = work, *right = left + tokens * apart + id * together * in * PANEL;
#pragma omp for schedule(static)
        for (i64 m = 0; m < tokens; m++) std::memcpy(left + m * apart, x + m * in, size_t(in) * 2);
#pragma omp single
        turns.reset(new Turn[threads]);
        Unit unit;
        Writer writer;
        const Plain rows = {weight, in, out, in};
        const Product of = {left, apart, right, in};
        const i64 pieces = (panels + together - 1) / together;
        share_out(1, pieces, turns.get(), id, threads, [&](i64, i64 piece) {
            const i64 p0 = piece * together, count = least(together, panels - p0);
            for (i64 p = 0; p < count; p++)
                pack_rows(rows, (p0 + p) * PANEL, in, right + p * in * PANEL);
            for (i64 at = 0; at < tokens; at += PANEL) {
                const i64 m = least(at, tokens - PANEL);
                for (i64 p = 0; p < count; p++)
                    writer.block(of, m, p, result + m * out + (p0 + p) * PANEL, out);
            }
        });
    }
}

// How many 16-bit values the `work` of falqon_dense_grad has to have room for, also if fewer
// threads come than might.
i64 falqon_dense_grad_work(i64 tokens, i64 in, i64 team) {
    i64 size = 0;
    for (i64 threads = 1; threads <= team; threads++)
        size = most(size, threads * own_of_share(widest_share(in, threads), tokens));
    return size;
}

// g W [tokens, in], for g [tokens, out] and W [out, in]. `team`, `work`: as in groups.cpp.
void falqon_dense_grad(const bf16* grad, i64 tokens, i64 out, const bf16* weight, i64 in,
                       bf16* result, i64 team, bf16* work) {
    const i64 whole = filled(tokens);
#pragma omp parallel num_threads(int(team))
    {
        const i64 id = omp_get_thread_num(), threads = omp_get_num_threads(), panels = in / PANEL;
        const i64 p0 = panels * id / threads, count = panels * (id + 1) / threads - p0;
        const i64 wide = count * PANEL;
        const i64 widest = widest_share(in, threads), depth = depth_of(widest);
        const i64 apart = depth + PANEL;
        bf16* right = work + id * own_of_share(widest, tokens);
        bf16* left = right + depth * widest;
        float* sums = reinterpret_cast<float*>(left + ROWS * apart);
        Unit unit;
        std::memset(sums, 0, size_t(whole * wide) * 4);
        for (i64 k = 0; k < out; k += depth) {
            const i64 deep = least(depth, out - k);
            const Plain rows = {weight + k * in, in, deep, in, EARLY};
            pack_columns(rows, p0 * PANEL, deep, right, count);
            const Product of = {left, apart, right, deep};
            for (i64 m0 = 0; m0 < tokens; m0 += ROWS) {
                const i64 here = least(ROWS, tokens - m0);
                // A copy, since rows as far apart as the vocabulary is wide meet in the cache. What
                // is behind its last row makes sums that nobody asks for.
                for (i64 m = 0; m < here; m++) {
                    const bf16* from = grad + (m0 + m) * out + k;
                    fetch(from + SOON * out, deep);
                    std::memcpy(left + m * apart, from, size_t(deep) * 2);
                }
                for (i64 m = 0; m < here; m += PANEL)
                    for (i64 p = 0; p < count; p++)
                        add_to(of, m, p, sums + (m0 + m) * wide + p * PANEL, wide);
            }
        }
        for (i64 m = 0; m < tokens; m++)
            for (i64 n = 0; n < wide; n += 16)
                put(load(sums + m * wide + n), result + m * in + p0 * PANEL + n);
    }
}
}

#endif

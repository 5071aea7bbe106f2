// Causal attention, rotary embedding included: one call a direction.
//
// Scores and probabilities are rounded to bfloat16, softmax and all sums are in float32. A query
// sees consecutive keys; panels of 32 keys that none of 32 rows sees are left out. Nothing of the
// size of the scores is kept: backward makes them again. What a head of keys gets is one
// thread's work, so that results do not depend on the number of threads.
//
// The rows of a head of keys are its queries, those of the heads that share it side by side.

#include "blocks.h"

#ifdef FALQON_HAS_BLOCKS

static const i64 CHUNK = 128;  // rows that the gradients of keys and values are summed over at a time
static const i64 EARLY = 4;    // tokens that their heads are fetched ahead

// What a row of scores sees, [start, end) of its keys: values from..to hold it.
struct Seen {
    i64 start, end, from, to;
    Seen() = default;
    Seen(i64 start, i64 end)
        : start(start), end(end), from(end > start ? start / 16 * 16 : 0),
          to(end > start ? (end + 15) / 16 * 16 : 0) {}
    // Those of 16 values from `at` on that are seen, and `none` in the other places.
    Floats of(i64 at, Floats x, Floats none) const { return between(start - at, end - at, x, none); }
};

// n values, all but those of [from, to), become zero.
static inline void clear_around(i64 from, i64 to, bf16* values, i64 n) {
    std::memset(values, 0, size_t(from) * 2);
    std::memset(values + to, 0, size_t(n - to) * 2);
}

// Rows of n values that a pass is over: nothing then waits for what has been summed over a row just
// now, and they stay in the first-level cache from one pass to the next.
static inline i64 rows_of_pass(i64 n) { return most(1, least(PANEL, KEPT / most(1, n))); }

// Values that softmax keeps, of rows of up to n: whole cache lines.
static inline i64 kept_by_softmax(i64 n) { return most(KEPT, n); }

// Softmax of factor * p over what each of `rows` rows of n values sees, in place; zero elsewhere, and
// where a row sees nothing, as that of padding. Rows are `stride` apart; `kept`: room for rows * n.
static inline void softmax(bf16* p, i64 stride, i64 n, i64 rows, const Seen* seen, float factor,
                           float* kept) {
    const Floats none = splat(-__builtin_inff()), scale = splat(factor);
    float shifts[PANEL], inverse[PANEL];
    for (i64 r = 0; r < rows; r++) {
        const bf16* scores = p + r * stride;
        Floats largest = none;
        for (i64 i = seen[r].from; i < seen[r].to; i += 16) {
            const Floats x = seen[r].of(i, widened(scores + i), none);
            store(x, kept + r * n + i);
            largest = larger(largest, x);
        }
        shifts[r] = largest_in(largest) * factor;
    }
    for (i64 r = 0; r < rows; r++) {
        const Floats shift = splat(shifts[r]);
        Floats sum = splat(0.0f);
        for (i64 i = seen[r].from; i < seen[r].to; i += 16) {
            float* at = kept + r * n + i;
            const Floats of = load(at);
            const Floats x = zero_where_equal(exponentials(fms(of, scale, shift)), of, none);
            store(x, at);
            sum = sum + x;
        }
        inverse[r] = 1.0f / sum_in(sum);
    }
    for (i64 r = 0; r < rows; r++, p += stride) {
        const Seen& of = seen[r];
        const Floats by = splat(inverse[r]);
        for (i64 i = of.from; i < of.to; i += 16)
            put(load(kept + r * n + i) * by, p + i);
        clear_around(of.from, of.to, p, n);
    }
}

// Gradients of rows of scores before their factor, p (dp - sum(p dp)) factor, into dp; passes as above.
static inline void softmax_grad(const bf16* p, bf16* dp, i64 stride, i64 n, i64 rows, float factor) {
    float along[PANEL];
    for (i64 r = 0; r < rows; r++) {
        Floats sum = splat(0.0f);
        for (i64 i = r * stride; i < r * stride + n; i += 16)
            sum = fma(widened(p + i), widened(dp + i), sum);
        along[r] = sum_in(sum);
    }
    const Floats scale = splat(factor);
    for (i64 r = 0; r < rows; r++) {
        const Floats of = splat(along[r]);
        for (i64 i = r * stride; i < r * stride + n; i += 16) {
            put(widened(p + i) * (widened(dp + i) - of) * scale, dp + i);
        }
    }
}

// Sizes, and which keys are seen.
struct Shape {
    i64 batch, length, kv, group, d;
    const int32_t *first, *last;
    i64 rows() const { return length * group; }         // of a head of keys
    i64 whole_rows() const { return filled(rows()); }   // with zeros behind them
    i64 keys() const { return filled(length); }
};

// The keys that some of the rows from `row` on see, as whole panels.
struct Span {
    i64 low, high;
    Span(const Shape& of, i64 b, i64 row, i64 count) : low(of.length), high(0) {
        i64 end = least(row + count, of.rows());
        for (i64 q = row / of.group; q * of.group < end; q++) {
            i64 from = of.first[b * of.length + q], to = of.last[b * of.length + q];
            if (to > from) low = least(low, from), high = most(high, to);
        }
        low = low / PANEL * PANEL;
        high = most(low, filled(high));
    }
};

// Probabilities of 32 rows, [32, span]: rows of queries times keys, and softmax.
static inline void probabilities(const Shape& of, i64 b, const bf16* query, const bf16* key_rows,
                                 i64 row, Span span, float factor, bf16* p, i64 stride,
                                 float* kept, float* sums) {
    const Product scores = {query, of.d, key_rows, of.d};
    for (i64 k = span.low; k < span.high; k += PANEL) {
        block(scores, row, k / PANEL, sums);
        write_rows(sums, PANEL, p + k - span.low, stride, nullptr);
    }
    Seen seen[PANEL];
    for (i64 i = 0; i < least(PANEL, of.rows() - row); i++) {
        const i64 at = b * of.length + (row + i) / of.group;
        seen[i] = Seen(of.first[at] - span.low, of.last[at] - span.low);
    }
    for (i64 i = most(0, of.rows() - row); i < PANEL; i++) seen[i] = Seen(0, 0);
    const i64 wide = span.high - span.low, rows = rows_of_pass(wide);
    for (i64 i = 0; i < PANEL; i += rows)
        softmax(p + i * stride, stride, wide, least(rows, PANEL - i), seen + i, factor, kept);
}

// [rows, d] of a head: every row one of `per_query` of a query, from [b, s, heads, d].
struct Heads {
    bf16* at;
    i64 stride, d, group;  // between tokens
    bf16* row(const Shape& of, i64 b, i64 h, i64 r) const {
        return at + (b * of.length + r / group) * stride + (h * group + r % group) * d;
    }
};

// Values that a thread of falqon_attention_grad needs for itself, see there.
static i64 own_of_gradients(i64 keys, i64 d) {
    return 3 * keys * d + 2 * CHUNK * keys + 2 * PANEL * CHUNK + 3 * CHUNK * d +
           2 * (2 * keys * d + kept_by_softmax(keys));
}

extern "C" {

// How many 16-bit values the `work` of the functions below has to have room for.
i64 falqon_attention_work(i64 batch, i64 length, i64 kv, i64 d, i64 team) {
    const i64 keys = filled(length);
    return 2 * batch * kv * keys * d + team * (keys * PANEL + 2 * kept_by_softmax(keys));
}
i64 falqon_attention_grad_work(i64 length, i64 d, i64 team) {
    return team * own_of_gradients(filled(length), d);
}

// q, k, v: [b, s, heads, d], tokens apart; kept_q, kept_k: rotated, kept_v: [b, kv, rows, d], filled
// up with zeros. out: [b, s, heads, d]. `team`, `work`: as in groups.cpp.
void falqon_attention(const bf16* q, i64 q_stride, const bf16* k, i64 k_stride, const bf16* v,
                      i64 v_stride, const bf16* cos, const bf16* sin, i64 table_stride,
                      const int32_t* first, const int32_t* last, i64 batch, i64 length, i64 kv,
                      i64 group, i64 d, float factor, bf16* kept_q, bf16* kept_k, bf16* kept_v,
                      bf16* out, i64 team, bf16* work) {
    const Shape of = {batch, length, kv, group, d, first, last};
    const i64 rows = of.whole_rows(), keys = of.keys(), heads = batch * kv;
    bf16 *key_rows = work, *value_columns = key_rows + heads * keys * d;
    bf16* scores = value_columns + heads * keys * d;
    float* kept = reinterpret_cast<float*>(scores + team * PANEL * keys);
#pragma omp parallel num_threads(int(team))
    {
        const i64 id = omp_get_thread_num();
#pragma omp for schedule(static)
        for (i64 head = 0; head < heads; head++) {
            const i64 b = head / kv, h = head % kv;
            const Heads queries = {const_cast<bf16*>(q), q_stride, d, group};
            const Heads of_keys = {const_cast<bf16*>(k), k_stride, d, 1};
            const Heads values = {const_cast<bf16*>(v), v_stride, d, 1};
            bf16 *to_q = kept_q + head * rows * d, *to_k = kept_k + head * keys * d;
            bf16* to_v = kept_v + head * keys * d;
            for (i64 r = 0; r < of.rows(); r++) {
                const i64 at = b * table_stride + r / group * d, next = r + EARLY * group;
                fetch(queries.row(of, b, h, next), d);
                fetch_to_write(to_q + next * d, d);
                rotate<false>(queries.row(of, b, h, r), cos + at, sin + at, d, to_q + r * d);
            }
            for (i64 s = 0; s < length; s++) {
                const i64 at = b * table_stride + s * d, next = s + EARLY;
                fetch(of_keys.row(of, b, h, next), d);
                fetch(values.row(of, b, h, next), d);
                fetch_to_write(to_k + next * d, d);
                fetch_to_write(to_v + next * d, d);
                rotate<false>(of_keys.row(of, b, h, s), cos + at, sin + at, d, to_k + s * d);
                std::memcpy(to_v + s * d, values.row(of, b, h, s), size_t(d) * 2);
            }
            std::memset(to_q + of.rows() * d, 0, size_t((rows - of.rows()) * d) * 2);
            std::memset(to_k + length * d, 0, size_t((keys - length) * d) * 2);
            std::memset(to_v + length * d, 0, size_t((keys - length) * d) * 2);
            const Plain of_k = {to_k, d, keys, d}, of_v = {to_v, d, keys, d};
            for (i64 s = 0; s < keys; s += PANEL)
                pack_rows(of_k, s, d, key_rows + (head * keys + s) * d);
            for (i64 c = 0; c < d; c += PANEL)
                pack_columns(of_v, c, keys, value_columns + (head * d + c) * keys);
        }
        Unit unit;
        alignas(64) float sums[PANEL * PANEL];
        bf16* p = scores + id * PANEL * keys;
#pragma omp for schedule(dynamic)
        for (i64 task = 0; task < heads * (rows / PANEL); task++) {
            const i64 head = task / (rows / PANEL), row = task % (rows / PANEL) * PANEL, b = head / kv;
            const Span span(of, b, row, PANEL);
            const i64 wide = span.high - span.low;
            probabilities(of, b, kept_q + head * rows * d, key_rows + head * keys * d, row, span,
                          factor, p, wide, kept + id * kept_by_softmax(keys), sums);
            const Heads to = {out, kv * group * d, d, group};
            for (i64 c = 0; c < d; c += PANEL) {
                const bf16* panel = value_columns + (head * d + c) * keys + span.low * PANEL;
                const Product weighted = {p, wide, panel, wide};
                block(weighted, 0, 0, sums);
                for (i64 i = 0; i < least(PANEL, of.rows() - row); i++)
                    for (i64 j = 0; j < PANEL; j += 16)
                        put(load(sums + i * PANEL + j),
                            to.row(of, b, head % kv, row + i) + c + j);
            }
        }
    }
}

// Gradients of q, k and v, [b, s, heads, d], from that of the output.
void falqon_attention_grad(const bf16* grad, i64 grad_stride, const bf16* kept_q,
                           const bf16* kept_k, const bf16* kept_v, const bf16* cos,
                           const bf16* sin, i64 table_stride, const int32_t* first,
                           const int32_t* last, i64 batch, i64 length, i64 kv, i64 group, i64 d,
                           float factor, bf16* grad_q, bf16* grad_k, bf16* grad_v,
                           i64 team, bf16* work) {
    const Shape of = {batch, length, kv, group, d, first, last};
    const i64 rows = of.whole_rows(), keys = of.keys(), heads = batch * kv;
    const i64 own = own_of_gradients(keys, d);
#pragma omp parallel num_threads(int(team))
    {
        // What a thread needs: panels of k and v, probabilities and their gradients, those of 32 keys
        // with rows for columns, gradients of the output and panels of them and of q; sums.
        bf16* key_rows = work + omp_get_thread_num() * own;
        bf16 *key_columns = key_rows + keys * d, *value_rows = key_columns + keys * d;
        bf16 *p = value_rows + keys * d, *dp = p + CHUNK * keys;
        bf16 *p_across = dp + CHUNK * keys, *dp_across = p_across + PANEL * CHUNK;
        bf16 *g = dp_across + PANEL * CHUNK, *g_columns = g + CHUNK * d;
        bf16* q_columns = g_columns + CHUNK * d;
        float* sum_k = reinterpret_cast<float*>(q_columns + CHUNK * d);
        float *sum_v = sum_k + keys * d, *kept = sum_v + keys * d;
        alignas(64) float sums[PANEL * PANEL];
        Unit unit;
#pragma omp for schedule(dynamic)
        for (i64 head = 0; head < heads; head++) {
            const i64 b = head / kv, h = head % kv;
            const bf16 *q = kept_q + head * rows * d, *k = kept_k + head * keys * d;
            const Plain of_k = {k, d, keys, d}, of_v = {kept_v + head * keys * d, d, keys, d};
            for (i64 s = 0; s < keys; s += PANEL) {
                pack_rows(of_k, s, d, key_rows + s * d);
                pack_rows(of_v, s, d, value_rows + s * d);
            }
            for (i64 c = 0; c < d; c += PANEL) pack_columns(of_k, c, keys, key_columns + c * keys);
            std::memset(sum_k, 0, size_t(2 * keys * d) * 4);
            const Heads grads = {const_cast<bf16*>(grad), grad_stride, d, group};
            const Heads to_q = {grad_q, kv * group * d, d, group};
            for (i64 start = 0; start < rows; start += CHUNK) {
                const i64 count = least(CHUNK, rows - start);
                const Span span(of, b, start, count);
                const i64 wide = span.high - span.low;
                for (i64 i = 0; i < count; i++) {
                    fetch(grads.row(of, b, h, start + i + EARLY * group), d);
                    if (start + i < of.rows())
                        std::memcpy(g + i * d, grads.row(of, b, h, start + i), size_t(d) * 2);
                    else std::memset(g + i * d, 0, size_t(d) * 2);
                }
                const Plain of_g = {g, d, count, d}, of_q = {q + start * d, d, count, d};
                for (i64 c = 0; c < d; c += PANEL) {
                    pack_columns(of_g, c, count, g_columns + c * count);
                    pack_columns(of_q, c, count, q_columns + c * count);
                }
                for (i64 m = 0; m < count; m += PANEL) {
                    bf16 *to_p = p + m * wide, *to_dp = dp + m * wide;
                    // What these rows see of what the chunk's do; the rest is zero.
                    const Span seen(of, b, start + m, PANEL);
                    const i64 some = seen.high - seen.low, before = some ? seen.low - span.low : 0;
                    for (i64 i = 0; some < wide && i < PANEL; i++) {
                        clear_around(before, before + some, to_p + i * wide, wide);
                        clear_around(before, before + some, to_dp + i * wide, wide);
                    }
                    if (!some) {
                        std::memset(g + m * d, 0, size_t(PANEL * d) * 2);
                        continue;
                    }
                    to_p += before, to_dp += before;
                    probabilities(of, b, q, key_rows, start + m, seen, factor, to_p, wide, kept, sums);
                    const Product of_p = {g, d, value_rows, d};
                    for (i64 s = seen.low; s < seen.high; s += PANEL) {
                        block(of_p, m, s / PANEL, sums);
                        write_rows(sums, PANEL, to_dp + s - seen.low, wide, nullptr);
                    }
                    const i64 together = rows_of_pass(some);
                    for (i64 i = 0; i < PANEL; i += together)
                        softmax_grad(to_p + i * wide, to_dp + i * wide, wide, some,
                                     least(together, PANEL - i), factor);
                    for (i64 c = 0; c < d; c += PANEL) {
                        const Product of_q = {to_dp, wide, key_columns + c * keys + seen.low * PANEL, some};
                        block(of_q, 0, 0, sums);
                        // The gradient is in its panels by now.
                        write_rows(sums, PANEL, g + m * d + c, d, nullptr);
                    }
                }
                for (i64 i = 0; i < least(count, of.rows() - start); i++) {
                    const i64 at = b * table_stride + (start + i) / group * d;
                    rotate<true>(g + i * d, cos + at, sin + at, d,
                                     to_q.row(of, b, h, start + i));
                }
                const Plain all_p = {p, wide, count, wide}, all_dp = {dp, wide, count, wide};
                for (i64 s = span.low; s < span.high; s += PANEL) {
                    for (i64 half = 0; half < PANEL; half += 16) {
                        const i64 from = s - span.low + half, to = half * count;
                        transpose_columns(all_p, from, count, p_across + to, count);
                        transpose_columns(all_dp, from, count, dp_across + to, count);
                    }
                    const Product of_v = {p_across, count, g_columns, count};
                    const Product of_k = {dp_across, count, q_columns, count};
                    for (i64 c = 0; c < d; c += PANEL) {
                        add_to(of_v, 0, c / PANEL, sum_v + s * d + c, d);
                        add_to(of_k, 0, c / PANEL, sum_k + s * d + c, d);
                    }
                }
            }
            const Heads to_k = {grad_k, kv * d, d, 1}, to_v = {grad_v, kv * d, d, 1};
            for (i64 s = 0; s < length; s++) {
                const i64 at = b * table_stride + s * d;
                bf16* rounded = g;
                for (i64 c = 0; c < d; c += 16) {
                    put(load(sum_k + s * d + c), rounded + c);
                    put(load(sum_v + s * d + c), to_v.row(of, b, h, s) + c);
                }
                rotate<true>(rounded, cos + at, sin + at, d, to_k.row(of, b, h, s));
            }
        }
    }
}
}

#endif

// Matrix products of melded layers: one call a group and direction.
//
// Weights are decoded from their codes straight into the panels of blocks.h. A result is one thread's
// work, so that results do not depend on the number of threads. Inner dimensions are multiples of 32
// (a rank that is none is filled up with zeros), and there are 32 tokens at least.

#include "blocks.h"
#include "functions.h"

#ifdef FALQON_HAS_BLOCKS

static const i64 TOGETHER = 6;  // panels of gradients that are read at a time, at most
static const i64 DEEP = 512;    // and tokens
static const i64 EARLY = 16;    // rows that they are fetched ahead
static const i64 DUE = 256;     // so many tokens or more are added to gradients of B at a time but for the last

static i64 parts_of(i64 all, i64 at_a_time) { return (all + at_a_time - 1) / at_a_time; }

extern "C" {

// What products are computed by: 1, AMX; 2, AVX512-BF16; 3, AVX512; 4, AVX2; 0, nothing here; -1, AMX, which
// the system does not let this process use.
i64 falqon_unit() { return unit_is_allowed() ? UNIT : -1; }

// How many 16-bit values the `work` of products has to have room for.
i64 falqon_matmul_work(i64 layers, const i64* outs, i64 in, i64 rank, i64 tokens, i64 pending,
                       i64 team) {
    const i64 wide = filled(rank), thin = layers * wide, out = sum_of(outs, layers);
    return (out + thin) * in + (pending ? out * wide : 0) +
           Sections::rows(tokens, in, team) * (in + PANEL + thin);
}
}

// O_A_i = x A_i^T, rounded, side by side, and O_i = O_A_i B_i^T + x W_i^T, rounded. With `onto` [tokens,
// out] that is added to the only layer's output, and the sum rounded. `team`: how many threads may work
// on it, whatever OpenMP would take; `work` has room for them.
void multiply(i64 layers, const Left& x, i64 tokens, i64 in, const uint8_t* const* codes,
              const float* const* scales, const i64* outs, i64 rank, const float* const* proxies,
              const float* factors, const bf16* onto, bf16* const* results, bf16* adapters, i64 team,
              bf16* work) {
    const i64 wide = filled(rank), thin = layers * wide, out = sum_of(outs, layers);
    bf16 *of_weights = work, *of_adapters = of_weights + out * in;
    bf16 *of_proxies = of_adapters + thin * in, *of_rows = of_proxies + (proxies ? out * wide : 0);
    std::unique_ptr<Turn[]> turns;
    std::atomic<i64> panels_packed{0};
#pragma omp parallel num_threads(int(team))
    {
        const i64 id = omp_get_thread_num(), threads = omp_get_num_threads();
        Ticket ticket(panels_packed);
        bf16 *weight = of_weights, *proxy = of_proxies;
        for (i64 l = 0; l < layers; l++) {
            Codes backbone(codes[l], outs[l], in, *scales[l]);
            Codes adapter(codes[l] + outs[l] * in, rank, in, *scales[l]);
            for (i64 n = 0; n < outs[l]; n += PANEL, weight += in * PANEL)
                if (ticket.is_next()) pack_rows(backbone, n, in, weight);
            for (i64 n = 0; n < wide; n += PANEL)
                if (ticket.is_next())
                    pack_rows(adapter, n, in, of_adapters + (l * wide + n) * in);
            if (!proxies) continue;
            Proxy pending = {proxies[l], rank, factors[l]};
            for (i64 n = 0; n < outs[l]; n += PANEL, proxy += wide * PANEL)
                if (ticket.is_next()) pack_rows(pending, n, wide, proxy);
        }
        const Sections rows(tokens, in, threads);
        const i64 together = panels_at_a_time(in);
        const i64 thin_rounds = parts_of(thin / PANEL, together);
        i64 wide_rounds = 0;
        for (i64 l = 0; l < layers; l++) wide_rounds += parts_of(outs[l] / PANEL, together);
#pragma omp single  // a section has a round for making its rows as well
        turns.reset(new Turn[rows.count * (1 + thin_rounds + wide_rounds) * threads]);
        Unit unit;
        Writer writer;
        // Rows are a panel further apart than long: evenly apart, they would meet in the cache.
        const i64 apart = in + PANEL;
        bf16 *made = of_rows, *inner = made + Sections::rows(tokens, in, threads) * apart;
        Turn* next = turns.get();
        for (i64 s = 0; s < rows.count; s++) {
            const i64 m0 = rows.row(s), m1 = rows.row(s + 1);
            const bf16* left = x.make ? made : x.rows + m0 * in;
            const i64 stride = x.make ? apart : in;
            const auto make = [&](i64 m) {
                for (i64 t = m; x.make && t < m + PANEL; t++)
                    x.make(x.source, m0 + t, made + t * apart);
            };
            if (thin_rounds != 1) {
                rows.share_out(s, 1, next, id, threads, [&](i64, i64 m) { make(m); });
                next += threads;
#pragma omp barrier
            }
            const Product first = {left, stride, of_adapters, in};
            rows.share_out(s, thin_rounds, next, id, threads, [&](i64 round, i64 m) {
                if (thin_rounds == 1) make(m);
                const i64 end = least((round + 1) * together, thin / PANEL);
                for (i64 p = round * together; p < end; p++)
                    writer.block(first, m, p, inner + m * thin + p * PANEL, thin);
            });
            writer.finish();
            next += thin_rounds * threads;
#pragma omp barrier
            rows.share_out(s, wide_rounds, next, id, threads, [&](i64 round, i64 m) {
                i64 l = 0, row = 0;  // of the weights that it is about
                for (i64 of; round >= (of = parts_of(outs[l] / PANEL, together)); round -= of)
                    row += outs[l++];
                const Product backbone = {left, stride, of_weights + row * in, in};
                const Product pending = {inner + l * wide, thin, of_proxies + row * wide, wide};
                const i64 end = least((round + 1) * together, outs[l] / PANEL);
                for (i64 p = round * together; p < end; p++) {
                    const i64 at = (m0 + m) * outs[l] + p * PANEL;
                    writer.block(backbone, m, p, results[l] + at, outs[l],
                                 proxies ? &pending : nullptr, onto ? onto + at : nullptr);
                }
            });
            next += wide_rounds * threads;
            writer.finish();
#pragma omp for schedule(static)
            for (i64 m = m0; m < m1; m++)
                for (i64 l = 0; l < layers; l++)
                    std::memcpy(adapters + (m * layers + l) * rank, inner + (m - m0) * thin + l * wide,
                                size_t(rank) * 2);
        }
    }
}

extern "C" {

// The same with rows that there are.
void falqon_matmul(i64 layers, const bf16* x, i64 tokens, i64 in, const uint8_t* const* codes,
                   const float* const* scales, const i64* outs, i64 rank,
                   const float* const* proxies, const float* factors, bf16* const* results,
                   bf16* adapters, i64 team, bf16* work) {
    multiply(layers, Left{x, nullptr, nullptr}, tokens, in, codes, scales, outs, rank, proxies,
             factors, nullptr, results, adapters, team, work);
}

// How many 16-bit values the `work` of falqon_matmul_grad has to have room for.
i64 falqon_matmul_grad_work(i64 layers, const i64* outs, i64 in, i64 rank, i64 tokens, i64 team) {
    const i64 wide = filled(rank), thin = layers * wide, out = sum_of(outs, layers);
    const i64 rows = Sections::rows(tokens, out, team);
    return (out + thin) * in + 3 * out * wide + thin * (filled(tokens) + PANEL) +
           (2 * rows + DUE) * (out + PANEL) + rows * thin + team * TOGETHER * PANEL * DEEP;
}

// The same with gradients that there are.
void falqon_matmul_grad(i64 layers, const bf16* const* grads, const i64* strides, i64 tokens,
                        i64 in, const uint8_t* const* codes, const float* const* scales,
                        const i64* outs, i64 rank, const float* const* proxies,
                        const float* factors, i64 rounded, const bf16* const* adapters,
                        const i64* adapter_strides, bf16* grad_input,
                        float* const* grad_proxies, i64 team, bf16* work) {
    multiply_back(layers, Gradients{grads, strides, nullptr, nullptr}, tokens, in, codes, scales,
                  outs, rank, proxies, factors, rounded, adapters, adapter_strides, grad_input,
                  grad_proxies, team, work);
}
}

// dL/dx = (g B) A + Q(g) W over all layers, if wanted, and dL/dB_i = g_i^T O_A_i, where wanted.
void multiply_back(i64 layers, const Gradients& grads, i64 tokens, i64 in, const uint8_t* const* codes,
                   const float* const* scales, const i64* outs, i64 rank, const float* const* proxies,
                   const float* factors, i64 rounded, const bf16* const* adapters,
                   const i64* adapter_strides, bf16* grad_input, float* const* grad_proxies, i64 team,
                   bf16* work) {
    const i64 wide = filled(rank), thin = layers * wide, out = sum_of(outs, layers);
    const i64 whole = filled(tokens), far = whole + PANEL;  // a panel further apart than long: see multiply
    const i64 apart = out + PANEL, most_rows = Sections::rows(tokens, out, team);
    bf16 *of_weights = work, *of_adapters = of_weights + out * in;
    bf16 *of_proxies = of_adapters + thin * in, *columns = of_proxies + out * wide;
    float* sums = reinterpret_cast<float*>(columns + thin * far);
    bf16 *left = reinterpret_cast<bf16*>(sums + out * wide), *made = left + most_rows * apart;
    bf16 *inner = made + (most_rows + DUE) * apart, *of_threads = inner + most_rows * thin;
    std::unique_ptr<Turn[]> turns;
    std::atomic<i64> panels_packed{0};
#pragma omp parallel num_threads(int(team))
    {
        const i64 id = omp_get_thread_num(), threads = omp_get_num_threads();
        Ticket ticket(panels_packed);
        if (grad_input) {
            i64 row = 0;
            for (i64 l = 0; l < layers; row += outs[l], l++) {
                Codes backbone(codes[l], outs[l], in, *scales[l]);
                Codes adapter(codes[l] + outs[l] * in, rank, in, *scales[l]);
                for (i64 n = 0; n < in; n += 2 * PANEL)  // of a row of codes, a cache line at a time
                    if (ticket.is_next()) {
                        const i64 panels = least(2, (in - n) / PANEL);
                        pack_columns(backbone, n, outs[l], of_weights + n * out + row * PANEL, panels, out);
                        if (proxies)
                            pack_columns(adapter, n, wide, of_adapters + n * thin + l * wide * PANEL, panels,
                                         thin);
                    }
                if (!proxies) continue;
                Proxy pending = {proxies[l], rank, factors[l]};
                for (i64 n = 0; n < wide; n += PANEL)
                    if (ticket.is_next())
                        pack_columns(pending, n, outs[l], of_proxies + row * wide + n * outs[l]);
            }
        }
        for (i64 l = 0; l < layers; l++) {
            if (!grad_proxies[l]) continue;
            const Plain adapter = {adapters[l], adapter_strides[l], tokens, rank, EARLY};
            for (i64 c = 0; c < wide; c += 16)
                if (ticket.is_next())
                    transpose_columns(adapter, c, whole, columns + (l * wide + c) * far, far);
        }
        const Sections rows(tokens, out, threads);
        const i64 panels_of_input = in / PANEL, at_a_time = panels_at_a_time(out);
        const i64 wide_rounds = grad_input ? parts_of(panels_of_input, at_a_time) : 0;
        i64 widest = 1;
        for (i64 l = 0; l < layers; l++) widest = most(widest, outs[l]);
        const i64 thin_together = panels_at_a_time(widest);
        const i64 thin_rounds = grad_input && proxies ? parts_of(thin / PANEL, thin_together) : 0;
        // Panels of gradients whose sums over all tokens are a piece of work.
        i64 wanted = 0, pieces = 0;
        for (i64 l = 0; l < layers; l++) wanted += grad_proxies[l] ? outs[l] / PANEL : 0;
        const i64 together = most(1, least(TOGETHER, wanted / (3 * threads)));
        const auto pieces_of = [&](i64 l) {
            return grad_proxies[l] ? parts_of(outs[l] / PANEL, together) : 0;
        };
        for (i64 l = 0; l < layers; l++) pieces += pieces_of(l);
#pragma omp single  // a section has a round for making its rows as well, and one for the pieces
        turns.reset(new Turn[rows.count * (2 + thin_rounds + wide_rounds) * threads]);
        Unit unit;
        Writer writer;
        float units[layers];  // as compilers for Linux allow
        for (i64 l = 0; l < layers; l++) units[l] = *scales[0] / *scales[l];
        bf16* panels = of_threads + id * TOGETHER * PANEL * DEEP;
        Turn* next = turns.get();
        i64 summed = 0;  // tokens that are in the sums
        for (i64 s = 0; s < rows.count; s++) {
            const i64 m0 = rows.row(s), m1 = rows.row(s + 1);
            // Where row t of a layer's gradients is; of those that are made, from the first not in the sums on.
            const auto grad_at = [&](i64 l, i64 t) {
                return grads.make ? made + (t - summed) * apart + sum_of(outs, l)
                                  : grads.rows[l] + t * grads.strides[l];
            };
            const auto stride = [&](i64 l) { return grads.make ? apart : grads.strides[l]; };
            const auto make = [&](i64 m) {
                for (i64 t = m0 + m; t < m0 + m + PANEL; t++) {
                    bf16* to = left + (t - m0) * apart;
                    if (grads.make) grads.make(grads.source, t, made + (t - summed) * apart);
                    if (!grad_input) continue;
                    const bf16* parts[layers];
                    for (i64 l = 0; l < layers; l++) parts[l] = grad_at(l, t);
                    if (rounded) quantize_parts(layers, parts, outs, outs, units, 0, E5M2, to);
                    else for (i64 l = 0; l < layers; to += outs[l], l++)
                        std::memcpy(to, parts[l], size_t(outs[l]) * 2);
                }
            };
            if (thin_rounds != 1) {
                rows.share_out(s, 1, next, id, threads, [&](i64, i64 m) { make(m); });
                next += threads;
#pragma omp barrier
            }
            if (thin_rounds) {
                rows.share_out(s, thin_rounds, next, id, threads, [&](i64 round, i64 m) {
                    if (thin_rounds == 1) make(m);
                    const i64 end = least((round + 1) * thin_together, thin / PANEL);
                    for (i64 p = round * thin_together; p < end; p++) {
                        const i64 l = p * PANEL / wide;
                        const bf16* panels = of_proxies + sum_of(outs, l) * wide;
                        const Product of = {grad_at(l, m0), stride(l), panels, outs[l]};
                        writer.block(of, m, p - l * wide / PANEL, inner + m * thin + p * PANEL, thin);
                    }
                });
                writer.finish();
                next += thin_rounds * threads;
#pragma omp barrier
            }
            const i64 due = m1 - summed >= DUE || m1 == tokens ? filled(m1) - summed : 0;
            share_out(1, due ? pieces : 0, next, id, threads, [&](i64, i64 piece) {
                i64 l = 0;
                float* total = sums;
                for (i64 of; piece >= (of = pieces_of(l)); l++) piece -= of, total += outs[l] * wide;
                const i64 begin = piece * together * PANEL;
                const i64 count = least(together, (outs[l] - begin) / PANEL);
                total += begin * wide;
                for (i64 t = summed; t < summed + due; t += DEEP) {
                    const i64 deep = least(DEEP, summed + due - t);
                    const Plain grad = {grad_at(l, t), stride(l), tokens - t, outs[l], EARLY};
                    pack_columns(grad, begin, deep, panels, count);
                    const Product of = {columns + l * wide * far + t, far, panels, deep};
                    float* at = total;
                    for (i64 p = 0; p < count; p++)
                        for (i64 r = 0; r < wide; r += PANEL, at += PANEL * PANEL) {
                            if (t) add_to(of, r, p, at, PANEL);
                            else block(of, r, p, at);
                        }
                }
                if (m1 < tokens) return;
                const float* from = total;
                for (i64 p = 0; p < count; p++) for (i64 r = 0; r < wide; r += PANEL) {
                    const i64 n = begin + p * PANEL;
                    for (i64 quarter = 0; quarter < 4; quarter++) {
                        i64 down = quarter / 2 * 16, across = quarter % 2 * 16;
                        Ints t[16];
                        for (i64 i = 0; i < 16; i++) t[i] = bits_of(load(from + (down + i) * PANEL + across));
                        transpose(t);
                        for (i64 i = 0; i < 16; i++) {
                            const Floats value = widened(narrowed(floats_of(t[i]))) * splat(factors[l]);
                            float* to = grad_proxies[l] + (n + across + i) * rank + r + down;
                            store_first(value, to, rank - r - down);
                        }
                    }
                    from += PANEL * PANEL;
                }
            });
            next += threads;
            const Product backbone = {left, apart, of_weights, out}, pending = {inner, thin, of_adapters, thin};
            rows.share_out(s, wide_rounds, next, id, threads, [&](i64 round, i64 m) {
                const i64 end = least((round + 1) * at_a_time, panels_of_input);
                for (i64 p = round * at_a_time; p < end; p++)
                    writer.block(backbone, m, p, grad_input + (m0 + m) * in + p * PANEL, in,
                                 proxies ? &pending : nullptr);
            });
            next += wide_rounds * threads;
            writer.finish();
            if (due) summed = m1;
#pragma omp barrier
        }
    }
}

#else

extern "C" i64 falqon_unit() { return 0; }

#endif

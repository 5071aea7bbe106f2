// Blocks of products of bfloat16 matrices, by AMX, AVX512-BF16 or AVX512, and the layouts that they take.
//
// The right factor comes in panels of 32 columns, one behind the other, each k / 2 rows of 32 pairs
// of values that follow each other in k. Sums run over k from first to last.

#ifndef FALQON_BLOCKS_H
#define FALQON_BLOCKS_H

#include "values.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && defined(__linux__)
#define FALQON_HAS_BLOCKS

#include <atomic>
#include <memory>

#include <immintrin.h>
#include <omp.h>

static const i64 PANEL = 32;            // columns of a panel, rows of a block, k of a tile

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 most(i64 a, i64 b) { return a > b ? a : b; }
static inline i64 filled(i64 n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Left factor [rows, k], and panels of the right one.
struct Product { const bf16* left; i64 stride; const bf16* panels; i64 k; };

// bfloat16 values of float32 ones: `narrow`, but that processors that can do it make zero of numbers below
// 2^-126, as they do in the products.
#ifdef __AVX512BF16__
static inline __m256i narrowed(__m512 x) { return __m256i(_mm512_cvtneps_pbh(x)); }
static inline __m512i narrowed(__m512 low, __m512 high) {
    return __m512i(_mm512_cvtne2ps_pbh(high, low));
}
#else
static inline __m256i narrowed(__m512 x) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);  // also one with a full lower half
    return rounded(_mm512_mask_mov_ps(x, is_nan, _mm512_set1_ps(__builtin_nanf(""))));
}
static inline __m512i narrowed(__m512 low, __m512 high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrowed(low)), narrowed(high), 1);
}
#endif

// Rows of a block's sums, rounded; with `onto` then added to that and rounded again. Rows of `to` and `onto`
// are `stride` apart.
static inline void write_rows(const float* sums, i64 count, bf16* to, i64 stride, const bf16* onto) {
    for (i64 i = 0; i < count; i++, sums += PANEL, to += stride) {
        const __m512 low = _mm512_load_ps(sums), high = _mm512_load_ps(sums + 16);
        if (!onto) {
            _mm512_storeu_si512(to, narrowed(low, high));
            continue;
        }
        put_rounded(_mm512_add_ps(widened(narrowed(low)), widened(onto)), to);
        put_rounded(_mm512_add_ps(widened(narrowed(high)), widened(onto + 16)), to + 16);
        onto += stride;
    }
}

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__)
#include "tiles.h"
#else
#include "vectors.h"
#endif

// How many rows of a left factor a thread has in its cache, and how many panels besides.
static inline i64 rows_at_a_time(i64 k) { return most(PANEL, LEFT / (k * 2) / PANEL * PANEL); }
static inline i64 panels_at_a_time(i64 k) { return most(1, RIGHT / (k * 2 * PANEL)); }

// What is taken of a thread's share of a round.
struct Turn { std::atomic<i64> taken{0}, by_others{0}; };

// Call `run(round, i)` for `count` pieces of work a round, each in one of the threads. These have a
// share of their own of each; one that is done with its shares takes the last pieces of others', for
// cores are not equally fast all the time. `turns`: rounds * threads new ones.
template <class Run>
static inline void share_out(i64 rounds, i64 count, Turn* turns, i64 id, i64 threads, Run run) {
    const auto take = [&](i64 whose, i64 round) {
        const i64 first = count * whose / threads, size = count * (whose + 1) / threads - first;
        Turn& of = turns[round * threads + whose];
        for (i64 own = 0; of.taken < size && of.taken++ < size;)
            run(round, first + (whose == id ? own++ : size - 1 - of.by_others++));
    };
    for (i64 round = 0; round < rounds; round++) take(id, round);
    for (i64 k = 1; k < threads; k++)
        for (i64 round = rounds - 1; round >= 0; round--) take((id + k) % threads, round);
}

// Pieces of work that threads come to in the same order: whether the next one is this thread's.
class Ticket {
    std::atomic<i64>& given;
    i64 mine, at = 0;
public:
    explicit Ticket(std::atomic<i64>& given) : given(given), mine(given++) {}
    bool is_next() {
        if (at++ != mine) return false;
        mine = given++;
        return true;
    }
};

// Rows of a left factor in blocks of 32, so many sections of them one after the other that the threads
// have a section's in their caches. The last block has what is left over as well.
struct Sections {
    i64 tokens, blocks, count;
    Sections(i64 tokens, i64 k, i64 threads) : tokens(tokens), blocks(tokens / PANEL) {
        const i64 at_once = threads * rows_at_a_time(k) / PANEL;
        count = (blocks + at_once - 1) / at_once;
    }
    i64 block(i64 section) const { return blocks * section / count; }
    i64 row(i64 section) const { return section == count ? tokens : block(section) * PANEL; }
    // No section has more rows, with so many threads or fewer.
    static i64 rows(i64 tokens, i64 k, i64 threads) {
        return least(threads * rows_at_a_time(k) + PANEL, filled(tokens));
    }
    // Call `run(round, m)` for a section's blocks of 32 rows from its row m on, as share_out does.
    template <class Run>
    void share_out(i64 section, i64 rounds, Turn* turns, i64 id, i64 threads, Run run) const {
        const i64 begin = block(section), end = block(section + 1);
        ::share_out(rounds, end - begin, turns, id, threads, [&](i64 round, i64 i) {
            run(round, i * PANEL);
            if (begin + i + 1 == blocks && tokens % PANEL)
                run(round, tokens - PANEL - begin * PANEL);
        });
    }
};

static inline void put(__m512 x, bf16* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrowed(x));
}

// Rows of 32-bit values become columns.
static inline void transpose(__m512i* r) {
    __m512i t[16];
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

// Two rows of 32 values as pairs, a value of each.
static inline void pairs(__m512i a, __m512i b, __m512i* out) {
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

// Rows of merged codes of one layer, decoded by a table; those from `rows` on are zero. Rows that follow
// are fetched, which may be none: processors forgive that.
struct Codes {
    static const i64 EARLY = 64;  // rows, where a few columns are read of each
    const uint8_t* codes;
    i64 rows, columns;
    __m512i table[4];
    Codes(const uint8_t* codes, i64 rows, i64 columns, float scale)
        : codes(codes), rows(rows), columns(columns) {
        alignas(64) bf16 values[128];
        for (int i = 0; i < 128; i++) values[i] = decoded(uint8_t(i), 1.0f / scale);
        for (int i = 0; i < 4; i++) table[i] = _mm512_load_si512(values + 32 * i);
    }
    __m256i bytes(i64 row, i64 column) const {
        if (row >= rows) return _mm256_setzero_si256();
        const uint8_t* at = codes + row * columns + column;
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    }
    __m512i values(__m256i bytes) const {
        __m512i code = _mm512_cvtepu8_epi16(bytes), sign = _mm512_set1_epi16(0x80);
        __m512i low = _mm512_permutex2var_epi16(table[0], code, table[1]);
        __m512i high = _mm512_permutex2var_epi16(table[2], code, table[3]);
        __mmask32 is_high = _mm512_test_epi16_mask(code, _mm512_set1_epi16(0x40));
        __m512i minus = _mm512_slli_epi16(_mm512_and_si512(code, sign), 8);
        return _mm512_or_si512(_mm512_mask_blend_epi16(is_high, low, high), minus);
    }
    void fetch(i64 row, i64 column) const {
        _mm_prefetch(reinterpret_cast<const char*>(codes + row * columns + column), _MM_HINT_T0);
    }
    __m512i load(i64 row, i64 column) const {
        fetch(row + PANEL, column);
        return values(bytes(row, column));
    }
    void load_pairs(i64 row, i64 column, __m512i* out) const {
        fetch(row + EARLY, column);
        fetch(row + EARLY + 1, column);
        __m256i a = bytes(row, column), b = bytes(row + 1, column);
        __m256i low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        out[0] = values(_mm256_permute2x128_si256(low, high, 0x20));
        out[1] = values(_mm256_permute2x128_si256(low, high, 0x31));
    }
};

// B times the LoRA scaling, rounded; columns from the rank on are zero.
struct Proxy {
    const float* at;
    i64 rank;
    float factor;
    __m512 half(i64 row, i64 column) const {
        i64 there = most(0, least(16, rank - column));
        __m512 x = _mm512_maskz_loadu_ps(__mmask16((1u << there) - 1u), at + row * rank + column);
        return _mm512_mul_ps(x, _mm512_set1_ps(factor));
    }
    __m512i load(i64 row, i64 column) const {
        return narrowed(half(row, column), half(row, column + 16));
    }
    void load_pairs(i64 row, i64 column, __m512i* out) const {
        pairs(load(row, column), load(row + 1, column), out);
    }
};

// Rows of 16-bit values; there are none from `rows` and `columns` on. Pairs of rows that come `early`
// rows later are fetched.
struct Plain {
    const bf16* at;
    i64 stride, rows, columns, early = 0;
    __m512i load(i64 row, i64 column) const {
        if (row >= rows || column >= columns) return _mm512_setzero_si512();
        i64 there = least(PANEL, columns - column);
        __mmask32 mask = __mmask32((uint64_t(1) << there) - 1u);
        return _mm512_maskz_loadu_epi16(mask, at + row * stride + column);
    }
    void load_pairs(i64 row, i64 column, __m512i* out) const {
        for (i64 i = 0; early && i < 2; i++) {
            const bf16* next = at + (row + early + i) * stride + column;
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T0);
        }
        pairs(load(row, column), load(row + 1, column), out);
    }
};

// A panel whose columns are 32 rows of the source, from `row` on, and whose k are `k` columns.
template <class Source>
static inline void pack_rows(const Source& source, i64 row, i64 k, bf16* panel) {
    for (i64 column = 0; column < k; column += PANEL)
        for (i64 half = 0; half < 2; half++) {
            __m512i r[16];
            for (i64 i = 0; i < 16; i++) r[i] = source.load(row + half * 16 + i, column);
            transpose(r);
            bf16* to = panel + column * PANEL + half * PANEL;
            for (i64 i = 0; i < 16; i++) _mm512_store_si512(to + i * 2 * PANEL, r[i]);
        }
}

// Panels whose columns are those of the source from `column` on, and whose k are `k` rows from its
// first on; `apart`: k from one to the next, if there are more there.
template <class Source>
static inline void pack_columns(const Source& source, i64 column, i64 k, bf16* panel,
                                i64 panels = 1, i64 apart = 0) {
    for (i64 row = 0; row < k; row += 2, panel += 2 * PANEL)
        for (i64 p = 0; p < panels; p++) {
            __m512i two[2];
            source.load_pairs(row, column + p * PANEL, two);
            bf16* to = panel + p * most(k, apart) * PANEL;
            _mm512_store_si512(to, two[0]);
            _mm512_store_si512(to + PANEL, two[1]);
        }
}

// 16 columns of the source, from `column` on, as rows of `k` values that are `stride` apart.
static inline void transpose_columns(const Plain& source, i64 column, i64 k, bf16* out,
                                     i64 stride) {
    for (i64 row = 0; row < k; row += PANEL) {
        __m512i r[16], two[2];
        for (i64 i = 0; i < 16; i++) {
            source.load_pairs(row + 2 * i, column, two);
            r[i] = two[0];
        }
        transpose(r);
        for (i64 i = 0; i < 16; i++) _mm512_store_si512(out + i * stride + row, r[i]);
    }
}

static i64 sum_of(const i64* values, i64 count) {
    i64 sum = 0;
    for (i64 i = 0; i < count; i++) sum += values[i];
    return sum;
}

#endif
#endif

// Blocks of products of bfloat16 matrices, by AMX, AVX512-BF16, AVX512 or AVX2, and the layouts that they
// take.
//
// The right factor comes in panels of 32 columns, one behind the other, each k / 2 rows of 32 pairs
// of values that follow each other in k. Sums run over k from first to last.

#ifndef FALQON_BLOCKS_H
#define FALQON_BLOCKS_H

#include "values.h"

#if defined(FALQON_HAS_SIMD) && defined(__linux__)
#define FALQON_HAS_BLOCKS

#include <atomic>
#include <memory>

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
static inline Shorts narrowed(Floats x) { return Shorts(_mm512_cvtneps_pbh(x)); }
static inline Ints narrowed(Floats low, Floats high) { return Ints(_mm512_cvtne2ps_pbh(high, low)); }
#else
static inline Shorts narrowed(Floats x) {
    return rounded(where_nan(x, splat(__builtin_nanf(""))));  // also one with a full lower half
}
static inline Ints narrowed(Floats low, Floats high) { return both(narrowed(low), narrowed(high)); }
#endif

// Rows of a block's sums, rounded; with `onto` then added to that and rounded again. Rows of `to` and `onto`
// are `stride` apart.
static inline void write_rows(const float* sums, i64 count, bf16* to, i64 stride, const bf16* onto) {
    for (i64 i = 0; i < count; i++, sums += PANEL, to += stride) {
        const Floats low = load(sums), high = load(sums + 16);
        if (!onto) {
            store(narrowed(low, high), to);
            continue;
        }
        put_rounded(widened(narrowed(low)) + widened(onto), to);
        put_rounded(widened(narrowed(high)) + widened(onto + 16), to + 16);
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

static inline void put(Floats x, bf16* to) { store(narrowed(x), to); }

// E4M3 codes as bfloat16 values, 32 at a time, over a power of two.
#ifdef __AVX512BW__
class Decoding {  // by a table of the codes without sign
    Ints table[4];
public:
    explicit Decoding(float scale) {
        alignas(64) bf16 values[128];
        for (int i = 0; i < 128; i++) values[i] = decoded(uint8_t(i), 1.0f / scale);
        for (int i = 0; i < 4; i++) table[i] = load(values + 32 * i);
    }
    Ints values(Shorts bytes) const {
        const Ints code = _mm512_cvtepu8_epi16(bytes);
        const Ints low = _mm512_permutex2var_epi16(table[0], code, table[1]);
        const Ints high = _mm512_permutex2var_epi16(table[2], code, table[3]);
        const __mmask32 is_high = _mm512_test_epi16_mask(code, splat16(0x40));
        const Ints minus = _mm512_slli_epi16(code & splat16(0x80), 8);
        return chosen(is_high, high, low) | minus;
    }
};
#else
class Decoding {  // exponents are moved, but for subnormal numbers and NaN, and for scales that are too far off
    float inverse;
    bool is_near;
    int moved;
    __m256i subnormal;  // values of codes 0 to 7, twice
    __m256i of(__m128i bytes) const {
        const __m256i code = _mm256_cvtepu8_epi16(bytes), mask = _mm256_set1_epi16(0x7F);
        const __m256i size = _mm256_and_si256(code, mask), minus = _mm256_andnot_si256(mask, code);
        const __m256i normal = _mm256_add_epi16(_mm256_slli_epi16(size, 4), _mm256_set1_epi16(int16_t(moved)));
        // Where the bytes of a value are: 2 size and 2 size + 1.
        const __m256i doubled = _mm256_mullo_epi16(size, _mm256_set1_epi16(0x0202));
        const __m256i at = _mm256_add_epi16(doubled, _mm256_set1_epi16(0x0100));
        const __m256i small = _mm256_shuffle_epi8(subnormal, at);
        const __m256i is_small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), size);
        const __m256i value = _mm256_blendv_epi8(normal, small, is_small);
        const __m256i nan = _mm256_set1_epi16(0x7FC0), is_nan = _mm256_cmpeq_epi16(size, mask);
        return _mm256_or_si256(_mm256_blendv_epi8(value, nan, is_nan), _mm256_slli_epi16(minus, 8));
    }
public:
    explicit Decoding(float scale) : inverse(1.0f / scale) {
        const int exponent = int(to_bits(inverse) >> 23) - 127;
        is_near = exponent > -100 && exponent < 100;
        moved = (120 + exponent) * 128;
        bf16 first[8];
        for (int i = 0; i < 8; i++) first[i] = decoded(uint8_t(i), inverse);
        subnormal = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(first)));
    }
    Ints values(Shorts bytes) const {
        if (is_near)
            return {of(_mm256_castsi256_si128(bytes)), of(_mm256_extracti128_si256(bytes, 1))};
        uint8_t codes[32];
        bf16 values[32];
        store(bytes, codes);
        for (int i = 0; i < 32; i++) values[i] = decoded(codes[i], inverse);
        return load(values);
    }
};
#endif

// Rows of merged codes of one layer, decoded; those from `rows` on are zero. Rows that follow are fetched,
// which may be none: processors forgive that.
struct Codes {
    static const i64 EARLY = 64;  // rows, where a few columns are read of each
    const uint8_t* codes;
    i64 rows, columns;
    Decoding decoding;
    Codes(const uint8_t* codes, i64 rows, i64 columns, float scale)
        : codes(codes), rows(rows), columns(columns), decoding(scale) {}
    Shorts bytes(i64 row, i64 column) const {
        return row < rows ? load_shorts(codes + row * columns + column) : _mm256_setzero_si256();
    }
    void fetch(i64 row, i64 column) const {
        _mm_prefetch(reinterpret_cast<const char*>(codes + row * columns + column), _MM_HINT_T0);
    }
    Ints load(i64 row, i64 column) const {
        fetch(row + PANEL, column);
        return decoding.values(bytes(row, column));
    }
    void load_pairs(i64 row, i64 column, Ints* out) const {
        fetch(row + EARLY, column);
        fetch(row + EARLY + 1, column);
        const Shorts a = bytes(row, column), b = bytes(row + 1, column);
        const Shorts low = _mm256_unpacklo_epi8(a, b), high = _mm256_unpackhi_epi8(a, b);
        out[0] = decoding.values(_mm256_permute2x128_si256(low, high, 0x20));
        out[1] = decoding.values(_mm256_permute2x128_si256(low, high, 0x31));
    }
};

// B times the LoRA scaling, rounded; columns from the rank on are zero.
struct Proxy {
    const float* at;
    i64 rank;
    float factor;
    Floats half(i64 row, i64 column) const {
        return load_first(at + row * rank + column, rank - column) * splat(factor);
    }
    Ints load(i64 row, i64 column) const {
        return narrowed(half(row, column), half(row, column + 16));
    }
    void load_pairs(i64 row, i64 column, Ints* out) const {
        pairs(load(row, column), load(row + 1, column), out);
    }
};

// Rows of 16-bit values; there are none from `rows` and `columns` on. Pairs of rows that come `early`
// rows later are fetched.
struct Plain {
    const bf16* at;
    i64 stride, rows, columns, early = 0;
    Ints load(i64 row, i64 column) const {
        return row < rows ? load_first16(at + row * stride + column, columns - column) : splat32(0);
    }
    void load_pairs(i64 row, i64 column, Ints* out) const {
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
            Ints r[16];
            for (i64 i = 0; i < 16; i++) r[i] = source.load(row + half * 16 + i, column);
            transpose(r);
            bf16* to = panel + column * PANEL + half * PANEL;
            for (i64 i = 0; i < 16; i++) store(r[i], to + i * 2 * PANEL);
        }
}

// Panels whose columns are those of the source from `column` on, and whose k are `k` rows from its
// first on; `apart`: k from one to the next, if there are more there.
template <class Source>
static inline void pack_columns(const Source& source, i64 column, i64 k, bf16* panel,
                                i64 panels = 1, i64 apart = 0) {
    for (i64 row = 0; row < k; row += 2, panel += 2 * PANEL)
        for (i64 p = 0; p < panels; p++) {
            Ints two[2];
            source.load_pairs(row, column + p * PANEL, two);
            bf16* to = panel + p * most(k, apart) * PANEL;
            store(two[0], to);
            store(two[1], to + PANEL);
        }
}

// 16 columns of the source, from `column` on, as rows of `k` values that are `stride` apart.
static inline void transpose_columns(const Plain& source, i64 column, i64 k, bf16* out,
                                     i64 stride) {
    for (i64 row = 0; row < k; row += PANEL) {
        Ints r[16], two[2];
        for (i64 i = 0; i < 16; i++) {
            source.load_pairs(row + 2 * i, column, two);
            r[i] = two[0];
        }
        transpose(r);
        for (i64 i = 0; i < 16; i++) store(r[i], out + i * stride + row);
    }
}

static i64 sum_of(const i64* values, i64 count) {
    i64 sum = 0;
    for (i64 i = 0; i < count; i++) sum += values[i];
    return sum;
}

#endif
#endif

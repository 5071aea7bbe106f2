// Matrix products of melded layers on processors with AMX: one call a group and direction.
//
// Weights are decoded from their codes straight into the layout that the matrix unit takes, a panel
// of 32 output columns behind the other, k / 2 rows of 32 pairs each. A result is one thread's work
// and its sum over k runs from first to last, so that results do not depend on the number of
// threads. Inner dimensions are multiples of 32 (a rank that is none is filled up with zeros), and
// there are 32 tokens at least.

#include "values.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BW__) && defined(__linux__)

#include <immintrin.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

static const i64 PANEL = 32;            // columns of a panel, rows of a block, k of a tile
static const i64 AHEAD = 4096;          // bytes that panels are fetched ahead
static const i64 LEFT = 5 << 18;        // bytes of the left factor that are multiplied with
static const i64 RIGHT = 5 << 17;       // so many of the panels at a time: both stay in the cache

static inline i64 least(i64 a, i64 b) { return a < b ? a : b; }
static inline i64 most(i64 a, i64 b) { return a > b ? a : b; }
static inline i64 filled(i64 n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Tiles 0 to 3: a block of 32 x 32 sums; 4 and 5: 32 rows of the left factor; 6 and 7: a panel.
struct Tiles {
    Tiles() {
        struct alignas(64) { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; }
            config = {1, 0, {0}, {0}, {0}};
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
        asm volatile("" : : "r"(&config) : "memory");  // the intrinsic is said to read 8 bytes only
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
};

// Left factor [rows, k], and panels of the right one.
struct Product { const bf16* left; i64 stride; const bf16* panels; i64 k; };

static inline void add_product(const Product& of, i64 row, i64 panel) {
    const bf16 *a = of.left + row * of.stride, *b = of.panels + panel * of.k * PANEL;
    i64 bytes = of.stride * 2;
    for (i64 k = 0; k < of.k; k += PANEL, b += PANEL * PANEL) {
        const char* next = reinterpret_cast<const char*>(b) + AHEAD;
        _tile_loadd(4, a + k, bytes);
        _tile_loadd(6, b, 128);
        for (int i = 0; i < 8; i++) _mm_prefetch(next + i * 64, _MM_HINT_T0);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b + PANEL, 128);
        for (int i = 8; i < 16; i++) _mm_prefetch(next + i * 64, _MM_HINT_T0);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a + 16 * of.stride + k, bytes);
        for (int i = 16; i < 24; i++) _mm_prefetch(next + i * 64, _MM_HINT_T0);
        _tile_dpbf16ps(2, 5, 6);
        for (int i = 24; i < 32; i++) _mm_prefetch(next + i * 64, _MM_HINT_T0);
        _tile_dpbf16ps(3, 5, 7);
    }
}

// The sums of a product's block, [32, 32].
static inline void block(const Product& of, i64 row, i64 panel, float* sums) {
    asm volatile("" : : : "memory");  // loads of tiles are not said to read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    add_product(of, row, panel);
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 512, 128);
    _tile_stored(3, sums + 528, 128);
}

// Call `end(row, panel)` for all blocks of rows [m0, m1) and panels [p0, p1), in an order in which
// what they need of a product stays in the cache. The last block of rows is the last 32 rows.
template <class End>
static inline void for_blocks(const Product& of, i64 m0, i64 m1, i64 p0, i64 p1, End end) {
    i64 rows = most(PANEL, LEFT / (of.k * 2) / PANEL * PANEL);
    i64 panels = most(1, RIGHT / (of.k * 2 * PANEL));
    for (i64 mb = m0; mb < m1; mb += rows)
        for (i64 pb = p0; pb < p1; pb += panels)
            for (i64 m = mb; m < least(mb + rows, m1); m += PANEL)
                for (i64 p = pb; p < least(pb + panels, p1); p++) end(least(m, m1 - PANEL), p);
}

// What a thread multiplies: a part of the rows, and of the columns where threads are many.
struct Share {
    i64 m0, m1, part, parts;
    Share(i64 tokens, i64 id, i64 threads) {
        i64 blocks = tokens / PANEL, across = least(threads, blocks), at = id % across;
        parts = threads / across, part = id / across;
        m0 = blocks * at / across * PANEL;
        m1 = at + 1 == across ? tokens : blocks * (at + 1) / across * PANEL;
        if (part >= parts) m1 = m0;
    }
    i64 from(i64 panels) const { return panels * part / parts; }
    i64 to(i64 panels) const { return panels * (part + 1) / parts; }
};

// 16 bfloat16 values of float32 ones: `narrow`.
static inline __m256i narrowed(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), high = _mm512_srli_epi32(bits, 16);
    __m512i odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF)));
    __m512i nan = _mm512_or_si512(high, _mm512_set1_epi32(0x40));
    __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(is_nan, _mm512_srli_epi32(up, 16), nan));
}

static inline __m512i both(__m256i low, __m256i high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
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

// Rows of merged codes of one layer, decoded by a table; those from `rows` on are zero.
struct Codes {
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
    __m512i load(i64 row, i64 column) const { return values(bytes(row, column)); }
    void load_pairs(i64 row, i64 column, __m512i* out) const {
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
    __m256i half(i64 row, i64 column) const {
        i64 there = most(0, least(16, rank - column));
        __m512 x = _mm512_maskz_loadu_ps(__mmask16((1u << there) - 1u), at + row * rank + column);
        return narrowed(factor == 1.0f ? x : _mm512_mul_ps(x, _mm512_set1_ps(factor)));
    }
    __m512i load(i64 row, i64 column) const { return both(half(row, column), half(row, column + 16)); }
    void load_pairs(i64 row, i64 column, __m512i* out) const {
        pairs(load(row, column), load(row + 1, column), out);
    }
};

// Rows of 16-bit values; there are none from `rows` and `columns` on.
struct Plain {
    const bf16* at;
    i64 stride, rows, columns;
    __m512i load(i64 row, i64 column) const {
        if (row >= rows || column >= columns) return _mm512_setzero_si512();
        i64 there = least(PANEL, columns - column);
        __mmask32 mask = __mmask32((uint64_t(1) << there) - 1u);
        return _mm512_maskz_loadu_epi16(mask, at + row * stride + column);
    }
    void load_pairs(i64 row, i64 column, __m512i* out) const {
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

// A panel whose columns are 32 columns of the source, and whose k are `k` rows from its first on.
template <class Source>
static inline void pack_columns(const Source& source, i64 column, i64 k, bf16* panel) {
    for (i64 row = 0; row < k; row += 2, panel += 2 * PANEL) {
        __m512i two[2];
        source.load_pairs(row, column, two);
        _mm512_store_si512(panel, two[0]);
        _mm512_store_si512(panel + PANEL, two[1]);
    }
}

// 16 columns of the source, from `column` on, as rows of `k` values.
static inline void transpose_columns(const Plain& source, i64 column, i64 k, bf16* out) {
    for (i64 row = 0; row < k; row += PANEL) {
        __m512i r[16], two[2];
        for (i64 i = 0; i < 16; i++) {
            source.load_pairs(row + 2 * i, column, two);
            r[i] = two[0];
        }
        transpose(r);
        for (i64 i = 0; i < 16; i++) _mm512_store_si512(out + i * k + row, r[i]);
    }
}

// sums + what was rounded to bfloat16 before, rounded.
static inline void write_sum(const float* sums, const float* onto, bf16* to, i64 stride) {
    for (i64 i = 0; i < PANEL; i++)
#pragma omp simd
        for (i64 j = 0; j < PANEL; j++)
            to[i * stride + j] =
                narrow(sums[i * PANEL + j] + widen(narrow(onto[i * PANEL + j])));
}

static inline void write(const float* sums, bf16* to, i64 stride) {
    for (i64 i = 0; i < PANEL; i++)
#pragma omp simd
        for (i64 j = 0; j < PANEL; j++) to[i * stride + j] = narrow(sums[i * PANEL + j]);
}

static i64 sum_of(const i64* values, i64 count) {
    i64 sum = 0;
    for (i64 i = 0; i < count; i++) sum += values[i];
    return sum;
}

extern "C" {

// Whether the processor has AMX and the system lets this process use it.
i64 falqon_amx() {
    const long ask_for = 0x1023, tile_data = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    return syscall(SYS_arch_prctl, ask_for, tile_data) == 0;
}

// O_A_i = x A_i^T, side by side, and O_i = x W_i^T + O_A_i B_i^T. `work`: see amx.py.
void falqon_amx_forward(i64 layers, const bf16* x, i64 tokens, i64 in, const uint8_t* const* codes,
                        const float* const* scales, const i64* outs, i64 rank,
                        const float* const* proxies, const float* factors, bf16* const* results,
                        bf16* adapters, bf16* work) {
    const i64 wide = filled(rank), thin = layers * wide, out = sum_of(outs, layers);
    bf16 *of_weights = work, *of_adapters = of_weights + out * in;
    bf16 *of_proxies = of_adapters + thin * in, *inner = of_proxies + (proxies ? out * wide : 0);
    if (rank == wide) inner = adapters;
#pragma omp parallel
    {
        const i64 id = omp_get_thread_num(), threads = omp_get_num_threads();
        i64 turn = 0;
        bf16 *weight = of_weights, *proxy = of_proxies;
        for (i64 l = 0; l < layers; l++) {
            Codes backbone(codes[l], outs[l], in, *scales[l]);
            Codes adapter(codes[l] + outs[l] * in, rank, in, *scales[l]);
            for (i64 n = 0; n < outs[l]; n += PANEL, weight += in * PANEL)
                if (turn++ % threads == id) pack_rows(backbone, n, in, weight);
            for (i64 n = 0; n < wide; n += PANEL)
                if (turn++ % threads == id)
                    pack_rows(adapter, n, in, of_adapters + (l * wide + n) * in);
            if (!proxies) continue;
            Proxy pending = {proxies[l], rank, factors[l]};
            for (i64 n = 0; n < outs[l]; n += PANEL, proxy += wide * PANEL)
                if (turn++ % threads == id) pack_rows(pending, n, wide, proxy);
        }
#pragma omp barrier
        Tiles tiles;
        const Share share(tokens, id, threads);
        alignas(64) float sums[PANEL * PANEL], onto[PANEL * PANEL];
        const Product first = {x, in, of_adapters, in};
        for_blocks(first, share.m0, share.m1, share.from(thin / PANEL), share.to(thin / PANEL),
                   [&](i64 m, i64 p) {
            block(first, m, p, sums);
            write(sums, inner + m * thin + p * PANEL, thin);
            if (rank == wide) return;
            i64 l = p * PANEL / wide, column = p * PANEL % wide;
            for (i64 i = 0; i < PANEL; i++)
                for (i64 j = 0; j < least(PANEL, rank - column); j++)
                    adapters[(m + i) * layers * rank + l * rank + column + j] =
                        inner[(m + i) * thin + p * PANEL + j];
        });
#pragma omp barrier
        weight = of_weights, proxy = of_proxies;
        for (i64 l = 0; l < layers; l++) {
            const Product backbone = {x, in, weight, in}, pending = {inner + l * wide, thin, proxy, wide};
            const i64 panels = outs[l] / PANEL;
            for_blocks(backbone, share.m0, share.m1, share.from(panels), share.to(panels),
                       [&](i64 m, i64 p) {
                bf16* to = results[l] + m * outs[l] + p * PANEL;
                if (proxies) block(pending, m, p, onto);
                block(backbone, m, p, sums);
                if (proxies) write_sum(sums, onto, to, outs[l]);
                else write(sums, to, outs[l]);
            });
            weight += outs[l] * in, proxy += outs[l] * wide;
        }
    }
}

// dL/dx = Q(g) W + (g B) A over all layers, if wanted, and dL/dB_i = g_i^T O_A_i, where wanted.
void falqon_amx_backward(i64 layers, const bf16* const* grads, const i64* strides, i64 tokens,
                         i64 in, const uint8_t* const* codes, const float* const* scales,
                         const i64* outs, i64 rank, const float* const* proxies, const float* factors,
                         i64 rounded, const bf16* const* adapters, const i64* adapter_strides,
                         bf16* grad_input, float* const* grad_proxies, bf16* work) {
    const i64 wide = filled(rank), thin = layers * wide, out = sum_of(outs, layers);
    const i64 whole = filled(tokens);
    bf16 *of_weights = work, *of_adapters = of_weights + out * in;
    bf16 *of_proxies = of_adapters + thin * in, *left = of_proxies + out * wide;
    bf16 *inner = left + tokens * out, *columns = inner + tokens * thin;
    bf16* own = columns + thin * whole;
#pragma omp parallel
    {
        const i64 id = omp_get_thread_num(), threads = omp_get_num_threads();
        const Share share(tokens, id, threads);
        alignas(64) float sums[PANEL * PANEL], onto[PANEL * PANEL];
        i64 turn = 0;
        if (grad_input) {
            i64 row = 0;
            for (i64 l = 0; l < layers; row += outs[l], l++) {
                Codes backbone(codes[l], outs[l], in, *scales[l]);
                Codes adapter(codes[l] + outs[l] * in, rank, in, *scales[l]);
                for (i64 n = 0; n < in; n += PANEL)
                    if (turn++ % threads == id) {
                        pack_columns(backbone, n, outs[l], of_weights + n * out + row * PANEL);
                        if (proxies)
                            pack_columns(adapter, n, wide, of_adapters + n * thin + l * wide * PANEL);
                    }
                if (!proxies) continue;
                Proxy pending = {proxies[l], rank, factors[l]};
                for (i64 n = 0; n < wide; n += PANEL)
                    if (turn++ % threads == id)
                        pack_columns(pending, n, outs[l], of_proxies + row * wide + n * outs[l]);
            }
            float units[layers];
            for (i64 l = 0; l < layers; l++) units[l] = *scales[0] / *scales[l];
#pragma omp for schedule(static)
            for (i64 t = 0; t < tokens; t++) {
                bf16* to = left + t * out;
                if (rounded) {
                    quantize_parts(layers, grads, outs, strides, units, t, E5M2, to);
                    continue;
                }
                for (i64 l = 0; l < layers; to += outs[l], l++)
                    std::memcpy(to, grads[l] + t * strides[l], size_t(outs[l]) * 2);
            }
        }
        for (i64 l = 0; l < layers; l++) {
            if (!grad_proxies[l]) continue;
            const Plain adapter = {adapters[l], adapter_strides[l], tokens, rank};
            for (i64 c = 0; c < wide; c += 16)
                if (turn++ % threads == id)
                    transpose_columns(adapter, c, whole, columns + (l * wide + c) * whole);
        }
#pragma omp barrier
        Tiles tiles;
        if (grad_input && proxies) {
            i64 row = 0;
            for (i64 l = 0; l < layers; row += outs[l], l++) {
                const Product of = {grads[l], strides[l], of_proxies + row * wide, outs[l]};
                const i64 panels = wide / PANEL;
                for_blocks(of, share.m0, share.m1, share.from(panels), share.to(panels),
                           [&](i64 m, i64 p) {
                    block(of, m, p, sums);
                    write(sums, inner + m * thin + l * wide + p * PANEL, thin);
                });
            }
        }
#pragma omp barrier
        if (grad_input) {
            const Product backbone = {left, out, of_weights, out}, pending = {inner, thin, of_adapters, thin};
            const i64 panels = in / PANEL;
            for_blocks(backbone, share.m0, share.m1, share.from(panels), share.to(panels),
                       [&](i64 m, i64 p) {
                bf16* to = grad_input + m * in + p * PANEL;
                if (proxies) block(pending, m, p, onto);
                block(backbone, m, p, sums);
                if (proxies) write_sum(sums, onto, to, in);
                else write(sums, to, in);
            });
        }
        bf16* panel = own + id * whole * PANEL;
        turn = 0;
        for (i64 l = 0; l < layers; l++) {
            if (!grad_proxies[l]) continue;
            const Plain grad = {grads[l], strides[l], tokens, outs[l]};
            for (i64 n = 0; n < outs[l]; n += PANEL) {
                if (turn++ % threads != id) continue;
                pack_columns(grad, n, whole, panel);
                const Product of = {columns + l * wide * whole, whole, panel, whole};
                for (i64 r = 0; r < wide; r += PANEL) {
                    block(of, r, 0, sums);
                    for (i64 quarter = 0; quarter < 4; quarter++) {
                        i64 down = quarter / 2 * 16, across = quarter % 2 * 16;
                        i64 there = most(0, least(16, rank - r - down));
                        __m512i t[16];
                        for (i64 i = 0; i < 16; i++)
                            t[i] = _mm512_load_si512(sums + (down + i) * PANEL + across);
                        transpose(t);
                        for (i64 i = 0; i < 16; i++) {
                            __m512i bits = _mm512_cvtepu16_epi32(narrowed(_mm512_castsi512_ps(t[i])));
                            __m512 value = _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
                            float* to = grad_proxies[l] + (n + across + i) * rank + r + down;
                            _mm512_mask_storeu_ps(to, __mmask16((1u << there) - 1u),
                                                  _mm512_mul_ps(value, _mm512_set1_ps(factors[l])));
                        }
                    }
                }
            }
        }
    }
}
}

#else

extern "C" i64 falqon_amx() { return 0; }

#endif

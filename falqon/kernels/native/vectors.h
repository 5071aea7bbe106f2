// Blocks of products by AVX512-BF16, or in float32 by AVX512 or AVX2, with the same bits but for numbers below
// 2^-126: see blocks.h, which includes this.

static inline bool unit_is_allowed() { return true; }

// What a thread multiplies with: nothing that has to be prepared.
struct Unit { Unit() {} };

// `add_rows`: sums of some rows of a block, from `row` on, rows of `sums` `stride` apart: those of `other`, if
// there is one, then those of `of`, after what `sums` has or, if they are `fresh`, nothing. In a function of
// its own, for in one with other things to do, addresses of rows would not stay in registers.

#ifdef __AVX512BW__
static const i64 LEFT = 3 << 17;   // bytes of the left factor that are multiplied with
static const i64 RIGHT = 5 << 16;  // so many of the panels at a time: both stay in the cache

static const int MOST_ROWS = 8;  // at once: their sums are in 16 registers
static inline int rows_at_once(i64) { return MOST_ROWS; }

#ifdef __AVX512BF16__
static const i64 UNIT = 2;  // what falqon_unit says

// 16 pairs of values that follow each other in k, and sums plus their products, the second one's first.
typedef __m512bh Pairs;
static inline Pairs pairs_of(Ints values) { return Pairs(values); }
static inline Floats add_products(Floats sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }
#else
static const i64 UNIT = 3;

typedef Halves Pairs;
static inline Pairs pairs_of(Ints values) { return Pairs(floats_of(up32<16>(values)), upper(values)); }
static inline Floats add_products(Floats sums, const Pairs& a, const Pairs& b) {
    return fma(a.even, b.even, fma(a.odd, b.odd, sums));
}
#endif

__attribute__((noinline)) static void add_rows(const Product& of, const Product* other, i64 row, int, i64 panel,
                                               bool fresh, float* sums, i64 stride) {
    Floats low[MOST_ROWS], high[MOST_ROWS];
#pragma GCC unroll 8
    for (int r = 0; r < MOST_ROWS; r++) {
        low[r] = fresh ? splat(0.0f) : load(sums + r * stride);
        high[r] = fresh ? splat(0.0f) : load(sums + r * stride + 16);
    }
    for (const Product* with = other ? other : &of;; with = &of) {
        const bf16* b = with->panels + panel * with->k * PANEL;
        const i64 s = with->stride * 2;
        const char* a = reinterpret_cast<const char*>(with->left + row * with->stride);
        const char *third = a + 3 * s, *sixth = a + 6 * s, *end = a + with->k * 2;
        for (; a < end; a += 4, third += 4, sixth += 4, b += 2 * PANEL) {
            const Pairs left = pairs_of(load(b)), right = pairs_of(load(b + PANEL));
            const char* const at[] = {a,         a + s,         a + 2 * s, third,
                                      a + 4 * s, third + 2 * s, sixth,     third + 4 * s};
#pragma GCC unroll 8
            for (int r = 0; r < MOST_ROWS; r++) {
                int pair;
                std::memcpy(&pair, at[r], 4);
                const Pairs x = pairs_of(splat32(pair));
                low[r] = add_products(low[r], x, left);
                high[r] = add_products(high[r], x, right);
            }
        }
        if (with == &of) break;
    }
#pragma GCC unroll 8
    for (int r = 0; r < MOST_ROWS; r++) {
        store(low[r], sums + r * stride);
        store(high[r], sums + r * stride + 16);
    }
}
#else
static const i64 UNIT = 4;
static const i64 LEFT = 3 << 15;
static const i64 RIGHT = 3 << 15;  // both in 256 KiB

static const int MOST_ROWS = 5;  // whose sums of 16 columns are in 10 of 16 registers
static inline int rows_at_once(i64 row) { return row < 20 ? 5 : 4; }

// The second values of 8 pairs, and the first ones.
static inline __m256 second_of(Shorts pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(int(0xFFFF0000u))));
}
static inline __m256 first_of(Shorts pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }

template <int ROWS>
__attribute__((noinline)) static void add_rows(const Product& of, const Product* other, i64 row, i64 panel,
                                               bool fresh, float* sums, i64 stride) {
    for (i64 column = 0; column < PANEL; column += 16, sums += 16) {
        __m256 low[ROWS], high[ROWS];
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            low[r] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + r * stride);
            high[r] = fresh ? _mm256_setzero_ps() : _mm256_loadu_ps(sums + r * stride + 8);
        }
        for (const Product* with = other ? other : &of;; with = &of) {
            const bf16* b = with->panels + panel * with->k * PANEL + 2 * column;
            const i64 s = with->stride * 2;
            const char* a = reinterpret_cast<const char*>(with->left + row * with->stride);
            const char *third = a + 3 * s, *end = a + with->k * 2;
            const auto add = [&](__m256 (*part)(Shorts)) __attribute__((always_inline)) {
                const __m256 left = part(load_shorts(b)), right = part(load_shorts(b + 16));
                const char* const at[] = {a, a + s, a + 2 * s, third, a + 4 * s};
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; r++) {
                    int pair;
                    std::memcpy(&pair, at[r], 4);
                    const __m256 x = part(_mm256_set1_epi32(pair));
                    low[r] = _mm256_fmadd_ps(x, left, low[r]);
                    high[r] = _mm256_fmadd_ps(x, right, high[r]);
                }
            };
            for (; a < end; a += 4, third += 4, b += 2 * PANEL) {
                add(second_of);
                asm("" : "+r"(a), "+r"(third), "+r"(b));  // loaded again: no register is left to keep it
                add(first_of);
            }
            if (with == &of) break;
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; r++) {
            _mm256_storeu_ps(sums + r * stride, low[r]);
            _mm256_storeu_ps(sums + r * stride + 8, high[r]);
        }
    }
}

static inline void add_rows(const Product& of, const Product* other, i64 row, int rows, i64 panel, bool fresh,
                            float* sums, i64 stride) {
    if (rows == 5) add_rows<5>(of, other, row, panel, fresh, sums, stride);
    else add_rows<4>(of, other, row, panel, fresh, sums, stride);
}
#endif

// The sums of a product's block, [32, 32].
static inline void block(const Product& of, i64 row, i64 panel, float* sums) {
    for (i64 r = 0; r < PANEL; r += rows_at_once(r))
        add_rows(of, nullptr, row + r, rows_at_once(r), panel, true, sums + r * PANEL, PANEL);
}

// A block of a product, added to sums whose rows are `stride` apart.
static inline void add_to(const Product& of, i64 row, i64 panel, float* sums, i64 stride) {
    for (i64 r = 0; r < PANEL; r += rows_at_once(r))
        add_rows(of, nullptr, row + r, rows_at_once(r), panel, false, sums + r * stride, stride);
}

// Blocks of products, rounded and written.
class Writer {
    alignas(64) float sums[MOST_ROWS * PANEL];

public:
    void finish() {}  // nothing is left to be written

    // A block of a product, rounded, or of the sum of two, `other` being summed up first. With `onto`
    // the result is rounded, added to that and rounded again. Rows of `to` and `onto` are `stride`
    // apart.
    void block(const Product& of, i64 m, i64 p, bf16* to, i64 stride,
               const Product* other = nullptr, const bf16* onto = nullptr) {
        for (i64 r = 0; r < PANEL; r += rows_at_once(r)) {
            add_rows(of, other, m + r, rows_at_once(r), p, true, sums, PANEL);
            write_rows(sums, rows_at_once(r), to + r * stride, stride, onto ? onto + r * stride : nullptr);
        }
    }
};

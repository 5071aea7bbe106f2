// Blocks of products by AVX512-BF16, or by AVX512 in float32, with the same bits but for numbers below
// 2^-126: see blocks.h, which includes this.

static const i64 LEFT = 3 << 17;   // bytes of the left factor that are multiplied with
static const i64 RIGHT = 5 << 16;  // so many of the panels at a time: both stay in the cache
static const int ROWS_AT_ONCE = 8;  // of a block: their sums are in 16 registers

#ifdef __AVX512BF16__
static const i64 UNIT = 2;  // what falqon_unit says

// 16 pairs of values that follow each other in k, and sums plus their products, the second one's first.
typedef __m512bh Pairs;
static inline Pairs pairs_of(__m512i values) { return Pairs(values); }
static inline __m512 add_products(__m512 sums, Pairs a, Pairs b) { return _mm512_dpbf16_ps(sums, a, b); }
#else
static const i64 UNIT = 3;

typedef Halves Pairs;
static inline Pairs pairs_of(__m512i values) {
    return Pairs(_mm512_castsi512_ps(_mm512_slli_epi32(values, 16)), upper(values));
}
static inline __m512 add_products(__m512 sums, const Pairs& a, const Pairs& b) {
    return _mm512_fmadd_ps(a.even, b.even, _mm512_fmadd_ps(a.odd, b.odd, sums));
}
#endif

static inline bool unit_is_allowed() { return true; }

// What a thread multiplies with: nothing that has to be prepared.
struct Unit { Unit() {} };

// Sums of 8 rows of a block, rows of `sums` `stride` apart: those of `other`, if there is one, then those of
// `of`, after what `sums` has or, if they are `fresh`, nothing. In a function of their own, for in one with
// other things to do, addresses of rows would not stay in registers.
__attribute__((noinline)) static void add_rows(const Product& of, const Product* other, i64 row, i64 panel,
                                               bool fresh, float* sums, i64 stride) {
    __m512 low[ROWS_AT_ONCE], high[ROWS_AT_ONCE];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        low[r] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * stride);
        high[r] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + r * stride + 16);
    }
    for (const Product* with = other ? other : &of;; with = &of) {
        const bf16* b = with->panels + panel * with->k * PANEL;
        const i64 s = with->stride * 2;
        const char* a = reinterpret_cast<const char*>(with->left + row * with->stride);
        const char *third = a + 3 * s, *sixth = a + 6 * s, *end = a + with->k * 2;
        for (; a < end; a += 4, third += 4, sixth += 4, b += 2 * PANEL) {
            const Pairs left = pairs_of(_mm512_load_si512(b));
            const Pairs right = pairs_of(_mm512_load_si512(b + PANEL));
            const char* const at[] = {a,         a + s,         a + 2 * s, third,
                                      a + 4 * s, third + 2 * s, sixth,     third + 4 * s};
#pragma GCC unroll 8
            for (int r = 0; r < ROWS_AT_ONCE; r++) {
                int pair;
                std::memcpy(&pair, at[r], 4);
                const Pairs x = pairs_of(_mm512_set1_epi32(pair));
                low[r] = add_products(low[r], x, left);
                high[r] = add_products(high[r], x, right);
            }
        }
        if (with == &of) break;
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS_AT_ONCE; r++) {
        _mm512_storeu_ps(sums + r * stride, low[r]);
        _mm512_storeu_ps(sums + r * stride + 16, high[r]);
    }
}

// The sums of a product's block, [32, 32].
static inline void block(const Product& of, i64 row, i64 panel, float* sums) {
    for (i64 r = 0; r < PANEL; r += ROWS_AT_ONCE)
        add_rows(of, nullptr, row + r, panel, true, sums + r * PANEL, PANEL);
}

// A block of a product, added to sums whose rows are `stride` apart.
static inline void add_to(const Product& of, i64 row, i64 panel, float* sums, i64 stride) {
    for (i64 r = 0; r < PANEL; r += ROWS_AT_ONCE)
        add_rows(of, nullptr, row + r, panel, false, sums + r * stride, stride);
}

// Blocks of products, rounded and written.
class Writer {
    alignas(64) float sums[ROWS_AT_ONCE * PANEL];

public:
    void finish() {}  // nothing is left to be written

    // A block of a product, rounded, or of the sum of two, `other` being summed up first. With `onto`
    // the result is rounded, added to that and rounded again. Rows of `to` and `onto` are `stride`
    // apart.
    void block(const Product& of, i64 m, i64 p, bf16* to, i64 stride,
               const Product* other = nullptr, const bf16* onto = nullptr) {
        for (i64 r = 0; r < PANEL; r += ROWS_AT_ONCE) {
            add_rows(of, other, m + r, p, true, sums, PANEL);
            write_rows(sums, ROWS_AT_ONCE, to + r * stride, stride, onto ? onto + r * stride : nullptr);
        }
    }
};

// Blocks of products by AMX: see blocks.h, which includes this.

#include <sys/syscall.h>
#include <unistd.h>

static const i64 AHEAD = 4096;    // bytes that panels are fetched ahead
static const i64 NEAR = 640;      // k up to which 32 rows stay in the first-level cache
static const i64 LEFT = 3 << 18;  // bytes of the left factor that are multiplied with
static const i64 RIGHT = 5 << 17;  // so many of the panels at a time: both stay in the cache

static const i64 UNIT = 1;  // what falqon_unit says

// Ask the system to let this process use the matrix unit; whether it does.
static inline bool unit_is_allowed() {
    const long ask_for = 0x1023, tile_data = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)
    return syscall(SYS_arch_prctl, ask_for, tile_data) == 0;
}

// What a thread multiplies with. Tiles 0 to 3: a block of 32 x 32 sums; 4 and 5: 32 rows of the left
// factor; 6 and 7: a panel.
struct Unit {
    Unit() {
        struct alignas(64) { uint8_t palette, start, none[14]; uint16_t bytes[16]; uint8_t rows[16]; }
            config = {1, 0, {0}, {0}, {0}};
        for (int i = 0; i < 8; i++) config.bytes[i] = 64, config.rows[i] = 16;
        asm volatile("" : : "r"(&config) : "memory");  // the intrinsic is said to read 8 bytes only
        _tile_loadconfig(&config);
    }
    ~Unit() { _tile_release(); }
};

// Between two operations on tiles: fetch 256 bytes, if wanted, and do nothing for a moment. On a core that
// others use as well (presumably its other hardware thread), tiles that are loaded and multiplied in close
// succession take up to four times as long as on one that is free; set apart from each other, less.
template <bool FETCH>
static inline void pause_with(const char* next) {
    for (int i = 0; FETCH && i < 4; i++) _mm_prefetch(next + i * 64, _MM_HINT_T0);
    asm volatile("nop; nop; nop; nop; nop; nop; nop; nop");
}

// Load a tile of a panel; if it is `PASSING`, with the hint that it will not be needed again soon.
#define FALQON_LOAD_PANEL(tile, at)                     \
    do {                                                \
        if (PASSING) _tile_stream_loadd(tile, at, 128); \
        else _tile_loadd(tile, at, 128);                \
    } while (0)

// Add a product's block to the sums; `between(step)` is called between the multiplications of each 32 k.
template <bool PASSING, bool FETCH, class Between>
static inline void add_steps(const Product& of, i64 row, i64 panel, Between between) {
    const bf16 *a = of.left + row * of.stride, *b = of.panels + panel * of.k * PANEL;
    i64 bytes = of.stride * 2;
    for (i64 k = 0; k < of.k; k += PANEL, b += PANEL * PANEL) {
        const char* next = reinterpret_cast<const char*>(b) + AHEAD;
        _tile_loadd(4, a + k, bytes);
        pause_with<FETCH>(next);
        FALQON_LOAD_PANEL(6, b);
        pause_with<FETCH>(next + 256);
        _tile_dpbf16ps(0, 4, 6);
        pause_with<FETCH>(next + 512);
        _tile_loadd(5, a + 16 * of.stride + k, bytes);
        pause_with<FETCH>(next + 768);
        between(k / PANEL);
        _tile_dpbf16ps(2, 5, 6);
        pause_with<FETCH>(next + 1024);
        FALQON_LOAD_PANEL(7, b + PANEL);
        pause_with<FETCH>(next + 1280);
        _tile_dpbf16ps(1, 4, 7);
        pause_with<FETCH>(next + 1536);
        _tile_dpbf16ps(3, 5, 7);
        pause_with<FETCH>(next + 1792);
    }
}

#undef FALQON_LOAD_PANEL

// The same, panels being fetched or not: those that pass by would drive out rows that else stay for the next.
template <bool PASSING, class Between>
static inline void add_product(const Product& of, i64 row, i64 panel, Between between) {
    if (PASSING && of.k <= NEAR) add_steps<PASSING, false>(of, row, panel, between);
    else add_steps<PASSING, true>(of, row, panel, between);
}

struct Nothing { void operator()(i64) const {} };

static inline void begin_sums() {
    asm volatile("" : : : "memory");  // loads of tiles are not said to read memory
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void store_sums(float* sums, i64 stride) {
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + 16, stride * 4);
    _tile_stored(2, sums + 16 * stride, stride * 4);
    _tile_stored(3, sums + 16 * stride + 16, stride * 4);
}

// The sums of a product's block, [32, 32].
static inline void block(const Product& of, i64 row, i64 panel, float* sums) {
    begin_sums();
    add_product<false>(of, row, panel, Nothing());
    store_sums(sums, PANEL);
}

// A block of a product, added to sums whose rows are `stride` apart.
static inline void add_to(const Product& of, i64 row, i64 panel, float* sums, i64 stride) {
    asm volatile("" : : : "memory");
    _tile_loadd(0, sums, stride * 4);
    _tile_loadd(1, sums + 16, stride * 4);
    _tile_loadd(2, sums + 16 * stride, stride * 4);
    _tile_loadd(3, sums + 16 * stride + 16, stride * 4);
    add_product<false>(of, row, panel, Nothing());
    store_sums(sums, stride);
}

// Blocks of products, rounded and written while the next one is multiplied: they go to memory that no
// cache has yet, and that would have to be waited for.
class Writer {
    alignas(64) float sums[PANEL * PANEL];
    struct { bf16* to; const bf16* onto; i64 stride, row; } last;

    void write_some(i64 count) {
        const i64 from = last.row * last.stride;
        write_rows(sums + last.row * PANEL, count, last.to + from, last.stride,
                   last.onto ? last.onto + from : nullptr);
        last.row += count;
    }

public:
    Writer() { last.row = PANEL; }
    ~Writer() { finish(); }

    void finish() { if (last.row < PANEL) write_some(PANEL - last.row); }

    // A block of a product, rounded, or of the sum of two, `other` being summed up first. With `onto`
    // the result is rounded, added to that and rounded again. Rows of `to` and `onto` are `stride`
    // apart. Until `finish`, `to` is not complete, and `onto` has to stay as it is.
    void block(const Product& of, i64 m, i64 p, bf16* to, i64 stride,
               const Product* other = nullptr, const bf16* onto = nullptr) {
        begin_sums();
        if (other) add_product<true>(*other, m, p, Nothing());
        add_product<true>(of, m, p, [&](i64 step) {
            if (last.row < PANEL) write_some(2);
            if (step >= PANEL / 2) return;
            for (i64 row = 2 * step; row < 2 * step + 2; row++) {
                __builtin_prefetch(to + row * stride, 1);
                if (onto) __builtin_prefetch(onto + row * stride);
            }
        });
        finish();  // what is there of the last one
        store_sums(sums, PANEL);
        last = {to, onto, stride, 0};
    }
};

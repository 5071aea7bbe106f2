// The proxy update: rows of a low-rank change B A are added to the values that codes stand for, rounded
// to E4M3 and written. A layer, or a block of a layer's rows, is one thread's work.

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <vector>

#include "values.h"

static const i64 STRIP = 128;        // columns that are written at a time
static const float LARGEST = 1e30f;  // as in row_update.py

extern "C" {

// Rows of one layer to write. Their values are those of their codes plus change A; or those of
// `origin`, a row each, from `from` (if that is null, its first ones), plus total A, and change A is
// what the codes at hand lack. Units are those of the codes.
struct FalqonRows {
    uint8_t* codes;  // [out + rank, in], the last being those of A
    const float* scale;
    i64 out, in, rank, count;
    const i64* rows;             // [count], distinct; null: the first ones
    const float *change, *total;  // [count, rank]; `total` is null without an origin
    const void* origin;
    i64 kind;  // what that is: 0 codes, 1 bfloat16, 2 float32 weights
    const i64* from;
};

// A layer whose rows are to be chosen, written and cleared in B. The `count` rows with the largest L1
// norms of B; among equals the lower ones.
struct FalqonProxy {
    float* b;  // [out, rank]
    uint8_t* codes;
    const float* scale;
    i64 out, in, rank, count;
    float factor;    // of B
    int32_t now;     // what `last_written` becomes
    const void* origin;
    i64 kind;
    float* applied;  // [out, rank]: sums of what was written, with an origin
    int32_t* last_written;
    uint8_t* touched;
};

// What is pending in a layer's B.
struct FalqonPending {
    const float *b, *gram;  // [out, rank], and A A^T
    i64 out, rank;
    float factor;
    int32_t now;
    const int32_t* last_written;
};
}

namespace {

inline float plus_product(float sum, float x, float y) {
#if defined(__FP_FAST_FMAF) || defined(__FMA__)  // clang defines the latter alone
    return __builtin_fmaf(x, y, sum);
#else
    return x * y + sum;
#endif
}

// A row of `rank` values times a strip of A, summed from first to last.
void multiply(const float* row, i64 rank, const float* adapter, float* out) {
#ifdef FALQON_HAS_SIMD
    Floats sums[STRIP / 16];
    for (Floats& sum : sums) sum = splat(0.0f);
    for (i64 j = 0; j < rank; j++) {
        const Floats x = splat(row[j]);
        for (i64 c = 0; c < STRIP / 16; c++) sums[c] = fma(x, load(adapter + j * STRIP + 16 * c), sums[c]);
    }
#else
    float sums[STRIP] = {};
    for (i64 j = 0; j < rank; j++) {
#pragma omp simd
        for (i64 c = 0; c < STRIP; c++) sums[c] = plus_product(sums[c], row[j], adapter[j * STRIP + c]);
    }
#endif
    std::memcpy(out, sums, sizeof sums);
}

// The values of an origin's row in units of codes.
void begin(const FalqonRows& of, i64 row, i64 column, i64 n, float* out) {
    const i64 at = row * of.in + column;
    const float scale = *of.scale;
    if (of.kind == 0) {
        const uint8_t* x = static_cast<const uint8_t*>(of.origin) + at;
#pragma omp simd
        for (i64 c = 0; c < n; c++) out[c] = value_of(x[c]);
    } else if (of.kind == 1) {
        const bf16* x = static_cast<const bf16*>(of.origin) + at;
#pragma omp simd
        for (i64 c = 0; c < n; c++) out[c] = widen(x[c]) * scale;
    } else {
        const float* x = static_cast<const float*>(of.origin) + at;
#pragma omp simd
        for (i64 c = 0; c < n; c++) out[c] = x[c] * scale;
    }
}

// What was done, summed over rows.
struct Done {
    double rows = 0, codes = 0, flipped = 0, saturated = 0, projection = 0, wanted = 0;
    void put(double scale, double* to) const {
        const double unit = scale * scale;
        const double values[6] = {rows, codes, flipped, saturated, projection / unit, wanted / unit};
        for (i64 i = 0; i < 6; i++) to[i] = values[i];
    }
};

// Write rows first..last of those. `adapter`: room for rank * STRIP.
void write(const FalqonRows& of, i64 first, i64 last, float* adapter, Done& done) {
    const uint8_t* of_adapter = of.codes + of.out * of.in;
    for (i64 column = 0; column < of.in; column += STRIP) {
        const i64 n = std::min(STRIP, of.in - column);
        for (i64 j = 0; j < of.rank; j++) {
            const uint8_t* from = of_adapter + j * of.in + column;
            float* to = adapter + j * STRIP;
#pragma omp simd
            for (i64 c = 0; c < n; c++) to[c] = value_of(from[c]);
            for (i64 c = n; c < STRIP; c++) to[c] = 0.0f;
        }
        for (i64 i = first; i < last; i++) {
            float wanted[STRIP], target[STRIP], start[STRIP];
            uint8_t* to = of.codes + (of.rows ? of.rows[i] : i) * of.in + column;
            multiply(of.change + i * of.rank, of.rank, adapter, wanted);
            if (of.total) {
                multiply(of.total + i * of.rank, of.rank, adapter, target);
                begin(of, of.from ? of.from[i] : i, column, n, start);
#pragma omp simd
                for (i64 c = 0; c < n; c++) target[c] = start[c] + target[c];
            } else {
#pragma omp simd
                for (i64 c = 0; c < n; c++) target[c] = value_of(to[c]) + wanted[c];
            }
            int flipped = 0, full = 0;
            float along = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : flipped, full, along, squares)
            for (i64 c = 0; c < n; c++) {
                const float value = round_fp8(target[c], E4M3), before = value_of(to[c]);
                const uint8_t code = code_of(value);
                flipped += code != to[c];
                full += value == E4M3.max || value == -E4M3.max;
                along += (value - before) * wanted[c];
                squares += wanted[c] * wanted[c];
                to[c] = code;
            }
            done.flipped += flipped, done.saturated += full;
            done.projection += double(along), done.wanted += double(squares);
        }
    }
    done.rows += double(last - first), done.codes += double((last - first) * of.in);
}

// The rows of a layer to look at, in their order. Those of B that are not finite are cleared.
void choose(const FalqonProxy& of, std::vector<float>& scores, std::vector<i64>& rows) {
    scores.resize(size_t(of.out));
    rows.resize(size_t(of.out));
    for (i64 row = 0; row < of.out; row++) {
        float* b = of.b + row * of.rank;
        double norm = 0.0;
        float sum = 0.0f;
#pragma omp simd reduction(+ : norm, sum)
        for (i64 j = 0; j < of.rank; j++) {
            norm += double(std::fabs(b[j] * of.factor));
            sum += b[j];
        }
        if (!std::isfinite(sum)) {
            std::fill(b, b + of.rank, 0.0f);
            norm = 0.0;
        }
        // Those that cannot be written come last.
        scores[size_t(row)] = norm <= double(FLT_MAX) ? float(norm) : -1.0f;
        rows[size_t(row)] = row;
    }
    if (of.count >= of.out) return;
    std::nth_element(rows.begin(), rows.begin() + of.count, rows.end(), [&](i64 a, i64 b) {
        const float x = scores[size_t(a)], y = scores[size_t(b)];
        return x > y || (x == y && a < b);
    });
    rows.resize(size_t(of.count));
    std::sort(rows.begin(), rows.end());
}

// What a thread needs.
struct Room {
    std::vector<float> scores, change, total, adapter;
    std::vector<i64> rows;
};

Done update(const FalqonProxy& of, Room& room) {
    choose(of, room.scores, room.rows);
    room.change.resize(room.rows.size() * size_t(of.rank));
    room.total.resize(of.origin ? room.change.size() : 0);
    room.adapter.resize(size_t(of.rank * STRIP));
    i64 count = 0;
    for (const i64 row : room.rows) {
        float *b = of.b + row * of.rank, *change = room.change.data() + count * of.rank;
        double norm = 0.0;
        bool held = false;
        for (i64 j = 0; j < of.rank; j++) {
            change[j] = b[j] * of.factor;
            norm += double(std::fabs(change[j]));
            held |= change[j] != 0.0f;  // NaN counts as a change: it must leave B
        }
        if (!held) continue;
        std::fill(b, b + of.rank, 0.0f);
        of.last_written[row] = of.now;
        of.touched[row] = 1;
        if (!(norm < double(LARGEST))) continue;
        for (i64 j = 0; of.origin && j < of.rank; j++) {
            float& all = of.applied[row * of.rank + j];
            all += change[j];
            room.total[size_t(count * of.rank + j)] = all;
        }
        room.rows[size_t(count++)] = row;
    }
    const FalqonRows written = {of.codes, of.scale, of.out, of.in, of.rank, count,
                                room.rows.data(), room.change.data(),
                                of.origin ? room.total.data() : nullptr, of.origin, of.kind,
                                room.rows.data()};
    Done done;
    write(written, 0, count, room.adapter.data(), done);
    return done;
}

}  // namespace

extern "C" {

// Write rows of one layer, `block` of them at a time; for each block what was done, [6].
void falqon_write_rows(const FalqonRows* of, i64 block, double* done) {
#pragma omp parallel
    {
        std::vector<float> adapter(size_t(of->rank * STRIP));
#pragma omp for schedule(static)
        for (i64 first = 0; first < of->count; first += block) {
            Done of_block;
            write(*of, first, std::min(of->count, first + block), adapter.data(), of_block);
            of_block.put(double(*of->scale), done + first / block * 6);
        }
    }
}

// Choose and write rows of layers; for each layer, what was done.
void falqon_proxy_update(i64 layers, const FalqonProxy* of, double* done) {
#pragma omp parallel
    {
        Room room;
#pragma omp for schedule(dynamic)
        for (i64 l = 0; l < layers; l++) update(of[l], room).put(double(*of[l].scale), done + 6 * l);
    }
}

// For each layer the squared norm of what is pending, steps that such rows have waited, and their number.
void falqon_pending_sums(i64 layers, const FalqonPending* of_layers, double* done) {
#pragma omp parallel
    {
        std::vector<float> change, gram;
#pragma omp for schedule(dynamic)
        for (i64 l = 0; l < layers; l++) {
            const FalqonPending& of = of_layers[l];
            const i64 rank = of.rank;
            change.resize(size_t(rank));
            double squares = 0.0, age = 0.0, waiting = 0.0;
            for (i64 column = 0; column < rank; column += STRIP) {
                const i64 n = std::min(STRIP, rank - column);
                gram.assign(size_t(rank * STRIP), 0.0f);
                for (i64 j = 0; j < rank; j++)
                    std::copy_n(of.gram + j * rank + column, n, gram.data() + j * STRIP);
                for (i64 row = 0; row < of.out; row++) {
                    const float* b = of.b + row * rank;
                    float *x = change.data(), y[STRIP], size = 0.0f, sum = 0.0f;
#pragma omp simd reduction(+ : size)
                    for (i64 j = 0; j < rank; j++) x[j] = b[j] * of.factor, size += std::fabs(x[j]);
                    if (size == 0.0f) continue;
                    multiply(x, rank, gram.data(), y);
#pragma omp simd reduction(+ : sum)
                    for (i64 j = 0; j < n; j++) sum += x[column + j] * y[j];
                    squares += double(sum);
                    if (column == 0) age += double(of.now - of.last_written[row]), waiting += 1.0;
                }
            }
            done[3 * l] = squares, done[3 * l + 1] = age, done[3 * l + 2] = waiting;
        }
    }
}
}

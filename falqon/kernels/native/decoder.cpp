// A decoder layer of the Llama family in one call a direction: what its modules do, in their order, with
// memory that is laid out once.

#include "blocks.h"
#include "functions.h"
#include "rows.h"

#ifdef FALQON_HAS_BLOCKS

static const i64 GROUPS = 4, LAYERS = 7;  // q/k/v, o, gate/up and down

extern "C" {

// What melded layers with one input have in common. `pending`: changes act.
struct FalqonGroup { i64 in, rank, quantised, pending; };

// Sizes of a layer and what it is made of, but for its tensors. The norms are those before q/k/v and
// gate/up.
struct FalqonDecoder {
    FalqonGroup groups[GROUPS];
    i64 outs[LAYERS];
    float factors[LAYERS];
    float eps[2];
    i64 batch, length, kv, group, d, table_stride;
    float scaling;
    i64 team;
};

// Where its tensors are; as falqon_matmul and falqon_attention take them. `biases` are null where
// there are none, and `proxies` where no change acts.
struct FalqonTensors {
    const bf16 *cos, *sin, *norms[2];
    const int32_t *first, *last;
    const uint8_t* codes[LAYERS];
    const float *scales[LAYERS], *proxies[LAYERS];
    const bf16* biases[LAYERS];
};
}

namespace {

// Parts of one piece of memory, each from a whole number of cache lines on.
struct Cut {
    bf16* at;
    i64 size = 0;
    bf16* part(i64 count) {
        bf16* begin = at ? at + size : nullptr;
        size += filled(count);
        return begin;
    }
};

struct Sizes {
    i64 tokens, hidden, heads, keys, inner;
    explicit Sizes(const FalqonDecoder& of)
        : tokens(of.batch * of.length), hidden(of.groups[0].in), heads(of.outs[0]),
          keys(of.outs[1]), inner(of.groups[3].in) {}
};

// Which of the layers a group has.
struct Members { i64 first, count; };
const Members MEMBERS[GROUPS] = {{0, 3}, {3, 1}, {4, 2}, {6, 1}};

// What backward needs of forward. Adapters' outputs of a group are side by side.
struct Kept {
    float* inverse[2];
    bf16 *adapters[GROUPS], *q, *k, *v, *middle;
    i64 size;
    Kept(const FalqonDecoder& of, bf16* memory) {
        const Sizes n(of);
        Cut cut = {memory};
        for (float*& of_norm : inverse) of_norm = reinterpret_cast<float*>(cut.part(2 * n.tokens));
        for (i64 i = 0; i < GROUPS; i++)
            adapters[i] = cut.part(n.tokens * MEMBERS[i].count * of.groups[i].rank);
        const i64 heads = of.batch * of.kv * of.d;
        q = cut.part(heads * filled(of.length * of.group));
        k = cut.part(heads * filled(of.length));
        v = cut.part(heads * filled(of.length));
        middle = cut.part(n.tokens * n.hidden);
        size = cut.size;
    }
};

// What there is by the way, before what the functions need themselves.
struct Passing {
    bf16 *q, *k, *v, *attended, *rest;
    i64 size;
    Passing(const FalqonDecoder& of, bf16* memory) {
        const Sizes n(of);
        Cut cut = {memory};
        q = cut.part(n.tokens * n.heads);
        k = cut.part(n.tokens * n.keys);
        v = cut.part(n.tokens * n.keys);
        attended = cut.part(n.tokens * n.heads);
        size = cut.size, rest = cut.part(0);
    }
};

struct PassingBack {
    bf16 *values, *normed, *middle, *attended, *q, *k, *v, *rest;
    i64 size;
    PassingBack(const FalqonDecoder& of, bf16* memory) {
        const Sizes n(of);
        Cut cut = {memory};
        values = cut.part(n.tokens * n.inner);
        normed = cut.part(n.tokens * n.hidden);
        middle = cut.part(n.tokens * n.hidden);
        attended = cut.part(n.tokens * n.heads);
        q = cut.part(n.tokens * n.heads);
        k = cut.part(n.tokens * n.keys);
        v = cut.part(n.tokens * n.keys);
        size = cut.size, rest = cut.part(0);
    }
};

// Rows [tokens, n] plus a bias, rounded, and plus other rows, rounded again, if there are any.
void add_bias(const bf16* bias, const bf16* onto, i64 tokens, i64 n, bf16* to) {
#pragma omp parallel for schedule(static)
    for (i64 t = 0; t < tokens; t++)
        for (i64 i = 0; i < n; i++) {
            const i64 at = t * n + i;
            to[at] = narrow(widen(to[at]) + widen(bias[i]));
            if (onto) to[at] = narrow(widen(to[at]) + widen(onto[at]));
        }
}

void multiply(const FalqonDecoder& of, const FalqonTensors& with, i64 group, const Left& x,
              const bf16* onto, bf16* const* results, bf16* adapters, bf16* work) {
    const FalqonGroup& by = of.groups[group];
    const i64 tokens = of.batch * of.length, at = MEMBERS[group].first, count = MEMBERS[group].count;
    const bf16* const* biases = with.biases + at;
    ::multiply(count, x, tokens, by.in, with.codes + at, with.scales + at, of.outs + at, by.rank,
               by.pending ? with.proxies + at : nullptr, of.factors + at, biases[0] ? nullptr : onto,
               results, adapters, of.team, work);
    for (i64 l = 0; l < count; l++)
        if (biases[l]) add_bias(biases[l], onto, tokens, of.outs[at + l], results[l]);
}

void multiply_back(const FalqonDecoder& of, const FalqonTensors& with, i64 group,
                   const Gradients& grads, const bf16* adapters, bf16* grad_input,
                   float* const* grad_proxies, bf16* work) {
    const FalqonGroup& by = of.groups[group];
    const i64 at = MEMBERS[group].first, count = MEMBERS[group].count;
    const bf16* parts[LAYERS];
    i64 strides[LAYERS];
    for (i64 l = 0; l < count; l++) parts[l] = adapters + l * by.rank, strides[l] = count * by.rank;
    ::multiply_back(count, grads, of.batch * of.length, by.in, with.codes + at,
                    with.scales + at, of.outs + at, by.rank, by.pending ? with.proxies + at : nullptr,
                    of.factors + at, by.quantised, parts, strides, grad_input, grad_proxies + at,
                    of.team, work);
}

const i64 EARLY = 2;  // rows that are fetched ahead

// What makes the groups' inputs, a row at a time.
struct Normed {
    const bf16 *x, *weight;
    float eps;
    float* inverse_rms;
    i64 n, quantised;
    static void make(const void* source, i64 t, bf16* to) {
        const Normed& of = *static_cast<const Normed*>(source);
        fetch(of.x + (t + EARLY) * of.n, of.n);
        const float inverse = inverse_rms_of(of.x + t * of.n, of.n, of.eps);
        of.inverse_rms[t] = inverse;
        norm_row(of.x + t * of.n, of.weight, inverse, of.n, of.quantised, to);
    }
};

struct Quantised {
    const bf16* x;
    i64 n;
    static void make(const void* source, i64 t, bf16* to) {
        const Quantised& of = *static_cast<const Quantised*>(source);
        const bf16* row = of.x + t * of.n;
        fetch(row + EARLY * of.n, of.n);
        round_row(row, of.n, scale_of(largest_of(row, of.n), E4M3.max), 1.0f, E4M3, to);
    }
};

struct Gated {
    const bf16 *gate, *up;
    i64 n, quantised;
    static void make(const void* source, i64 t, bf16* to) {
        const Gated& of = *static_cast<const Gated*>(source);
        swiglu_row(of.gate + t * of.n, of.up + t * of.n, of.n, of.quantised, to);
    }
};

// What makes the gradients of gate and up.
struct GatedBack {
    const bf16 *grad, *gate, *up;
    i64 n;
    static void make(const void* source, i64 t, bf16* to) {
        const GatedBack& of = *static_cast<const GatedBack*>(source);
        const i64 at = t * of.n;
        swiglu_grad_row(of.grad + at, of.gate + at, of.up + at, of.n, to, to + of.n);
    }
};

}  // namespace

extern "C" {

// How many 16-bit values the functions below need: as `memory`, and as `work` of each.
void falqon_decoder_sizes(const FalqonDecoder* of, i64* memory, i64* work, i64* work_back) {
    const Sizes n(*of);
    i64 most_of = falqon_attention_work(of->batch, of->length, of->kv, of->d, of->team);
    i64 most_back = falqon_attention_grad_work(of->length, of->d, of->team);
    for (i64 i = 0; i < GROUPS; i++) {
        const FalqonGroup& by = of->groups[i];
        const i64 *outs = of->outs + MEMBERS[i].first, count = MEMBERS[i].count;
        most_of = most(most_of, falqon_matmul_work(count, outs, by.in, by.rank, n.tokens, 1,
                                                   of->team));
        most_back = most(most_back, falqon_matmul_grad_work(count, outs, by.in, by.rank, n.tokens,
                                                            of->team));
    }
    *memory = Kept(*of, nullptr).size;
    *work = Passing(*of, nullptr).size + most_of;
    *work_back = PassingBack(*of, nullptr).size + most_back;
}

// A layer's output from its input, [tokens, hidden]; gate and up, [tokens, inner], and `memory` are for
// the backward pass.
void falqon_decoder(const FalqonDecoder* decoder, const FalqonTensors* tensors, const bf16* x,
                        bf16* out, bf16* gate, bf16* up, bf16* memory, bf16* work) {
    const FalqonDecoder& of = *decoder;
    const FalqonTensors& with = *tensors;
    const Sizes n(of);
    const Kept kept(of, memory);
    const Passing by_the_way(of, work);
    bf16 *rest = by_the_way.rest, *attended = by_the_way.attended;
    const FalqonGroup* groups = of.groups;
    const Normed first = {x, with.norms[0], of.eps[0], kept.inverse[0], n.hidden, groups[0].quantised};
    bf16* const heads[] = {by_the_way.q, by_the_way.k, by_the_way.v};
    multiply(of, with, 0, {nullptr, Normed::make, &first}, nullptr, heads, kept.adapters[0], rest);
    falqon_attention(heads[0], n.heads, heads[1], n.keys, heads[2], n.keys, with.cos, with.sin,
                     of.table_stride, with.first, with.last, of.batch, of.length, of.kv, of.group,
                     of.d, of.scaling, kept.q, kept.k, kept.v, attended, of.team, rest);
    const Quantised rounded = {attended, n.heads};
    const Left plain = {attended, nullptr, nullptr}, fp8 = {nullptr, Quantised::make, &rounded};
    multiply(of, with, 1, groups[1].quantised ? fp8 : plain, x, &kept.middle, kept.adapters[1],
             rest);
    const Normed second = {kept.middle,     with.norms[1], of.eps[1],
                           kept.inverse[1], n.hidden,      groups[2].quantised};
    bf16* const gated[] = {gate, up};
    multiply(of, with, 2, {nullptr, Normed::make, &second}, nullptr, gated, kept.adapters[2], rest);
    const Gated activated = {gate, up, n.inner, groups[3].quantised};
    multiply(of, with, 3, {nullptr, Gated::make, &activated}, kept.middle, &out, kept.adapters[3],
             rest);
}

// Gradients of the input, if it is not null, and of the B that have a place for one, in their order.
void falqon_decoder_grad(const FalqonDecoder* decoder, const FalqonTensors* tensors, const bf16* grad,
                         const bf16* x, const bf16* gate, const bf16* up, bf16* memory,
                         bf16* grad_input, float* const* grad_proxies, bf16* work) {
    const FalqonDecoder& of = *decoder;
    const FalqonTensors& with = *tensors;
    const Sizes n(of);
    const Kept kept(of, memory);
    const PassingBack by_the_way(of, work);
    bf16 *values = by_the_way.values, *rest = by_the_way.rest;
    bool below[GROUPS + 1] = {grad_input != nullptr};  // whether anything before a group needs a gradient
    for (i64 i = 0; i < GROUPS; i++) {
        below[i + 1] = below[i];
        for (i64 l = 0; l < MEMBERS[i].count; l++)
            below[i + 1] |= grad_proxies[MEMBERS[i].first + l] != nullptr;
    }
    if (!below[GROUPS]) return;
    const auto there = [&](const bf16* const* rows, i64 group) {
        return Gradients{rows, of.outs + MEMBERS[group].first, nullptr, nullptr};
    };
    multiply_back(of, with, 3, there(&grad, 3), kept.adapters[3], below[3] ? values : nullptr,
                  grad_proxies, rest);
    if (!below[3]) return;
    const GatedBack activated = {values, gate, up, n.inner};
    multiply_back(of, with, 2, {nullptr, nullptr, GatedBack::make, &activated}, kept.adapters[2],
                  below[2] ? by_the_way.normed : nullptr, grad_proxies, rest);
    if (!below[2]) return;
    const bf16* const middle = by_the_way.middle;
    falqon_rms_norm_grad(by_the_way.normed, kept.middle, with.norms[1], kept.inverse[1], grad, n.tokens,
                         n.hidden, by_the_way.middle);
    multiply_back(of, with, 1, there(&middle, 1), kept.adapters[1],
                  below[1] ? by_the_way.attended : nullptr, grad_proxies, rest);
    if (!below[1]) return;
    const bf16* const heads[] = {by_the_way.q, by_the_way.k, by_the_way.v};
    falqon_attention_grad(by_the_way.attended, n.heads, kept.q, kept.k, kept.v, with.cos, with.sin,
                          of.table_stride, with.first, with.last, of.batch, of.length, of.kv,
                          of.group, of.d, of.scaling, by_the_way.q, by_the_way.k,
                          by_the_way.v, of.team, rest);
    multiply_back(of, with, 0, there(heads, 0), kept.adapters[0],
                  below[0] ? by_the_way.normed : nullptr, grad_proxies, rest);
    if (!below[0]) return;
    falqon_rms_norm_grad(by_the_way.normed, x, with.norms[0], kept.inverse[0], middle, n.tokens, n.hidden,
                         grad_input);
}
}

#endif

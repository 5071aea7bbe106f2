// A decoder layer of the Llama family on processors with AMX, in one call a direction: what its
// modules do, in their order, with memory that is laid out once.

#include "amx.h"
#include "functions.h"

#ifdef FALQON_HAS_AMX

extern "C" {

// Melded layers with one input; as falqon_amx_matmul takes them. `proxies` and `biases` are null where
// there are none.
struct FalqonGroup {
    i64 layers, in, rank, quantised;
    i64 outs[3];
    const uint8_t* codes[3];
    const float *scales[3], *proxies[3];
    const bf16* biases[3];
    float factors[3];
};

// The groups are q/k/v, o, gate/up and down; the norms those before the first and the third.
struct FalqonDecoder {
    FalqonGroup groups[4];
    const bf16* norms[2];
    float eps[2];
    i64 batch, length, kv, group, d;
    const bf16 *cos, *sin;
    i64 table_stride;
    const int32_t *first, *last;
    float scaling;
    i64 team;
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
        : tokens(of.batch * of.length), hidden(of.groups[0].in), heads(of.groups[0].outs[0]),
          keys(of.groups[0].outs[1]), inner(of.groups[3].in) {}
};

// What backward needs of forward. Adapters' outputs of a group are side by side.
struct Kept {
    float* inverse[2];
    bf16 *adapters[4], *q, *k, *v, *middle;
    i64 size;
    Kept(const FalqonDecoder& of, bf16* memory) {
        const Sizes n(of);
        Cut cut = {memory};
        for (float*& of_norm : inverse) of_norm = reinterpret_cast<float*>(cut.part(2 * n.tokens));
        for (i64 i = 0; i < 4; i++)
            adapters[i] = cut.part(n.tokens * of.groups[i].layers * of.groups[i].rank);
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
    bf16 *values, *q, *k, *v, *attended, *rest;
    i64 size;
    Passing(const FalqonDecoder& of, bf16* memory) {
        const Sizes n(of);
        Cut cut = {memory};
        values = cut.part(n.tokens * most(most(n.hidden, n.heads), n.inner));
        q = cut.part(n.tokens * n.heads);
        k = cut.part(n.tokens * n.keys);
        v = cut.part(n.tokens * n.keys);
        attended = cut.part(n.tokens * n.heads);
        size = cut.size, rest = cut.part(0);
    }
};

struct PassingBack {
    bf16 *values, *gate, *up, *middle, *attended, *q, *k, *v, *rest;
    i64 size;
    PassingBack(const FalqonDecoder& of, bf16* memory) {
        const Sizes n(of);
        Cut cut = {memory};
        values = cut.part(n.tokens * most(n.hidden, n.inner));
        gate = cut.part(n.tokens * n.inner);
        up = cut.part(n.tokens * n.inner);
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

void multiply(const FalqonDecoder& of, const FalqonGroup& by, const bf16* x, const bf16* onto,
              bf16* const* results, bf16* adapters, bf16* work) {
    const i64 tokens = of.batch * of.length;
    falqon_amx_matmul(by.layers, x, tokens, by.in, by.codes, by.scales, by.outs, by.rank,
                      by.proxies[0] ? by.proxies : nullptr, by.factors,
                      by.biases[0] ? nullptr : onto, results, adapters, of.team, work);
    for (i64 l = 0; l < by.layers; l++)
        if (by.biases[l]) add_bias(by.biases[l], onto, tokens, by.outs[l], results[l]);
}

void multiply_back(const FalqonDecoder& of, const FalqonGroup& by, const bf16* const* grads,
                   const bf16* adapters, bf16* grad_input, float* const* grad_proxies, bf16* work) {
    const bf16* parts[3];
    i64 strides[3];
    for (i64 l = 0; l < by.layers; l++)
        parts[l] = adapters + l * by.rank, strides[l] = by.layers * by.rank;
    falqon_amx_matmul_grad(by.layers, grads, by.outs, of.batch * of.length, by.in, by.codes,
                           by.scales, by.outs, by.rank, by.proxies[0] ? by.proxies : nullptr,
                           by.factors, by.quantised, parts, strides, grad_input, grad_proxies,
                           of.team, work);
}

}  // namespace

extern "C" {

// How many 16-bit values the functions below need: as `memory`, and as `work` of each.
void falqon_amx_decoder_sizes(const FalqonDecoder* of, i64* memory, i64* work, i64* work_back) {
    const Sizes n(*of);
    i64 most_of = falqon_amx_attention_work(of->batch, of->length, of->kv, of->d, of->team);
    i64 most_back = falqon_amx_attention_grad_work(of->length, of->d, of->team);
    for (const FalqonGroup& by : of->groups) {
        most_of = most(most_of, falqon_amx_matmul_work(by.layers, by.outs, by.in, by.rank, n.tokens, 1));
        most_back = most(most_back, falqon_amx_matmul_grad_work(by.layers, by.outs, by.in, by.rank,
                                                                n.tokens, of->team));
    }
    *memory = Kept(*of, nullptr).size;
    *work = Passing(*of, nullptr).size + most_of;
    *work_back = PassingBack(*of, nullptr).size + most_back;
}

// A layer's output from its input, [tokens, hidden]; gate and up, [tokens, inner], and `memory` are for
// the backward pass.
void falqon_amx_decoder(const FalqonDecoder* decoder, const bf16* x, bf16* out, bf16* gate, bf16* up,
                        bf16* memory, bf16* work) {
    const FalqonDecoder& of = *decoder;
    const Sizes n(of);
    const Kept kept(of, memory);
    const Passing by_the_way(of, work);
    bf16 *values = by_the_way.values, *rest = by_the_way.rest;
    falqon_rms_norm(x, of.norms[0], of.eps[0], 0, kept.inverse[0], n.tokens, n.hidden,
                    of.groups[0].quantised, values);
    bf16* const heads[] = {by_the_way.q, by_the_way.k, by_the_way.v};
    multiply(of, of.groups[0], values, nullptr, heads, kept.adapters[0], rest);
    bf16* attended = by_the_way.attended;
    falqon_amx_attention(heads[0], n.heads, heads[1], n.keys, heads[2], n.keys, of.cos, of.sin,
                         of.table_stride, of.first, of.last, of.batch, of.length, of.kv, of.group,
                         of.d, of.scaling, kept.q, kept.k, kept.v, attended, of.team, rest);
    if (of.groups[1].quantised) {
        const float one = 1.0f;
        const bf16* const whole = attended;
        falqon_quantize(1, &whole, &n.heads, &n.heads, &one, n.tokens, 0, values);
        attended = values;
    }
    multiply(of, of.groups[1], attended, x, &kept.middle, kept.adapters[1], rest);
    falqon_rms_norm(kept.middle, of.norms[1], of.eps[1], 0, kept.inverse[1], n.tokens, n.hidden,
                    of.groups[2].quantised, values);
    bf16* const gated[] = {gate, up};
    multiply(of, of.groups[2], values, nullptr, gated, kept.adapters[2], rest);
    falqon_swiglu(gate, up, n.tokens, n.inner, of.groups[3].quantised, values);
    multiply(of, of.groups[3], values, kept.middle, &out, kept.adapters[3], rest);
}

// Gradients of the input, if it is not null, and of the B that have a place for one, in the order of
// the groups, three for each.
void falqon_amx_decoder_grad(const FalqonDecoder* decoder, const bf16* grad, const bf16* x,
                             const bf16* gate, const bf16* up, bf16* memory, bf16* grad_input,
                             float* const* grad_proxies, bf16* work) {
    const FalqonDecoder& of = *decoder;
    const Sizes n(of);
    const Kept kept(of, memory);
    const PassingBack by_the_way(of, work);
    bf16 *values = by_the_way.values, *rest = by_the_way.rest;
    bool below[5] = {grad_input != nullptr};  // whether anything before a group needs a gradient
    for (i64 i = 0; i < 4; i++) {
        below[i + 1] = below[i];
        for (i64 l = 0; l < of.groups[i].layers; l++) below[i + 1] |= grad_proxies[3 * i + l] != nullptr;
    }
    if (!below[4]) return;
    multiply_back(of, of.groups[3], &grad, kept.adapters[3], below[3] ? values : nullptr,
                  grad_proxies + 9, rest);
    if (!below[3]) return;
    const bf16* const gated[] = {by_the_way.gate, by_the_way.up};
    falqon_swiglu_grad(values, gate, up, n.tokens * n.inner, by_the_way.gate,
                       by_the_way.up);
    multiply_back(of, of.groups[2], gated, kept.adapters[2], below[2] ? values : nullptr,
                  grad_proxies + 6, rest);
    if (!below[2]) return;
    const bf16* const middle = by_the_way.middle;
    falqon_rms_norm_grad(values, kept.middle, of.norms[1], kept.inverse[1], grad, n.tokens,
                         n.hidden, by_the_way.middle);
    multiply_back(of, of.groups[1], &middle, kept.adapters[1],
                  below[1] ? by_the_way.attended : nullptr, grad_proxies + 3, rest);
    if (!below[1]) return;
    const bf16* const heads[] = {by_the_way.q, by_the_way.k, by_the_way.v};
    falqon_amx_attention_grad(by_the_way.attended, n.heads, kept.q, kept.k, kept.v, of.cos, of.sin,
                              of.table_stride, of.first, of.last, of.batch, of.length, of.kv,
                              of.group, of.d, of.scaling, by_the_way.q, by_the_way.k,
                              by_the_way.v, of.team, rest);
    multiply_back(of, of.groups[0], heads, kept.adapters[0], below[0] ? values : nullptr,
                  grad_proxies, rest);
    if (!below[0]) return;
    falqon_rms_norm_grad(values, x, of.norms[0], kept.inverse[0], middle, n.tokens, n.hidden,
                         grad_input);
}
}

#endif

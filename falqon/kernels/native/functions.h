// Functions that others are made of; where they are defined is said what they do.

#ifndef FALQON_FUNCTIONS_H
#define FALQON_FUNCTIONS_H

#include "values.h"

extern "C" {

// kernels.cpp
void falqon_rms_norm_grad(const bf16* grad, const bf16* x, const bf16* weight,
                          const float* inverse_rms, const bf16* onto, i64 rows, i64 n, bf16* out);

// groups.cpp
i64 falqon_matmul_work(i64 layers, const i64* outs, i64 in, i64 rank, i64 tokens, i64 pending,
                       i64 team);
i64 falqon_matmul_grad_work(i64 layers, const i64* outs, i64 in, i64 rank, i64 tokens, i64 team);

// attention.cpp
i64 falqon_attention_work(i64 batch, i64 length, i64 kv, i64 d, i64 team);
void falqon_attention(const bf16* q, i64 q_stride, const bf16* k, i64 k_stride, const bf16* v,
                      i64 v_stride, const bf16* cos, const bf16* sin, i64 table_stride,
                      const int32_t* first, const int32_t* last, i64 batch, i64 length, i64 kv,
                      i64 group, i64 d, float factor, bf16* kept_q, bf16* kept_k, bf16* kept_v,
                      bf16* out, i64 team, bf16* work);
i64 falqon_attention_grad_work(i64 length, i64 d, i64 team);
void falqon_attention_grad(const bf16* grad, i64 grad_stride, const bf16* kept_q,
                           const bf16* kept_k, const bf16* kept_v, const bf16* cos,
                           const bf16* sin, i64 table_stride, const int32_t* first,
                           const int32_t* last, i64 batch, i64 length, i64 kv, i64 group, i64 d,
                           float factor, bf16* grad_q, bf16* grad_k, bf16* grad_v,
                           i64 team, bf16* work);
}

// Rows of a left factor: those that there are, one behind the other, or `make(source, t, to)` makes
// row t, some of them twice.
struct Left {
    const bf16* rows;
    void (*make)(const void* source, i64 t, bf16* to);
    const void* source;
};

// Gradients of layers: rows of each that there are, `strides` apart, or `make(source, t, to)` makes row t
// of all, side by side, some of them twice.
struct Gradients {
    const bf16* const* rows;
    const i64* strides;
    void (*make)(const void* source, i64 t, bf16* to);
    const void* source;
};

void multiply(i64 layers, const Left& x, i64 tokens, i64 in, const uint8_t* const* codes,
              const float* const* scales, const i64* outs, i64 rank, const float* const* proxies,
              const float* factors, const bf16* onto, bf16* const* results, bf16* adapters, i64 team,
              bf16* work);
void multiply_back(i64 layers, const Gradients& grads, i64 tokens, i64 in, const uint8_t* const* codes,
                   const float* const* scales, const i64* outs, i64 rank, const float* const* proxies,
                   const float* factors, i64 rounded, const bf16* const* adapters,
                   const i64* adapter_strides, bf16* grad_input, float* const* grad_proxies, i64 team,
                   bf16* work);

#endif

// Tokens of a packed call outside every sequence, which rarely exist: they get zeros. And the check of the edges (cu_seqlens), which a
// call leaves to the device, since reading them would wait for the stream.
#pragma once
#include <cstdio>

#include "rows.cuh"

namespace sagetrain {

constexpr unsigned REST_BLOCKS = 264;  // of the kernels for tokens outside every sequence, which rarely exist

// Stops the program, with a message, where the edges of packed sequences are out of order or range.
static __device__ void check_edges(const Tokens& x, char name) {
  for (int i = threadIdx.x; i <= x.sequences; i += THREADS) {
    const int value = x.cu_seqlens[i], low = i ? x.cu_seqlens[i - 1] : 0;
    if (value < low || value > x.tokens) {
      printf("sagetrain: cu_seqlens_%c[%d] = %d after %d: must be non-decreasing and within 0..%d\n",
             name, i, value, low, x.tokens);
      __trap();
    }
  }
}

// Calls row(head, token, lane), eight lanes each, for the tokens of a packed row that belong to no sequence.
template <typename Row>
__device__ __forceinline__ void for_rest(const Tokens& x, int heads, Row row) {
  const int before = clamp_edge(x.cu_seqlens[0], x.tokens);
  const int after = max(before, clamp_edge(x.cu_seqlens[x.sequences], x.tokens)), count = before + x.tokens - after;
  const int64_t all = static_cast<int64_t>(count) * heads * 8, step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < all; i += step) {
    const int token = static_cast<int>(i / 8 % count);
    row(static_cast<int>(i / 8 / count), token < before ? token : token - before + after, static_cast<int>(i % 8));
  }
}
template <typename T>
__device__ __forceinline__ void zero_row(void* x, const Strides& s, int head, int token, int lane, int dim) {
  for (int d = 8 * lane; d < dim; d += 64)
    *reinterpret_cast<uint4*>(static_cast<T*>(x) + head * s.head + token * s.token + d) = uint4{0, 0, 0, 0};
}

// Gradients of the tokens of no sequence; stops the program where edges are wrong. Args: BackwardArgs of either architecture.
template <typename T, typename Args>
__device__ __forceinline__ void zero_rest(const Args& a) {
  if (blockIdx.x == 0) check_edges(a.queries, 'q'), check_edges(a.keys, 'k');
  const int dim = a.p.shape.head_dim;
  for_rest(a.queries, a.p.shape.heads_q,
           [&](int head, int token, int lane) { zero_row<T>(a.p.d_q, a.p.d_q_strides, head, token, lane, dim); });
  for_rest(a.keys, a.p.shape.heads_kv, [&](int head, int token, int lane) {
    zero_row<T>(a.p.d_k, a.p.d_k_strides, head, token, lane, dim);
    zero_row<T>(a.p.d_v, a.p.d_v_strides, head, token, lane, dim);
  });
}

}  // namespace sagetrain

// What the calls of the C boundary have in common: arguments of the forward's passes, sides of a call, parts of the workspace, limits.
#pragma once
#include <climits>
#include <type_traits>
#include <utility>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "tiles.cuh"

namespace sagetrain {

struct ForwardScratch {
  float* k_partial;   // [Hkv][tiles_k][Dp] sums of the samples of k, TILE each, from the first tile of a sequence on
  float* v_partial;   // [Hkv][tiles_k][Dp] the same of v
  float* v_mean;      // [N][Hkv][D] mean value of the sequence
  float* v_residual;  // [Hkv][tiles_k][Dp] sum over the tile of v - v_mean - v_scale * v8
  float* v_amax;      // [Hkv][tiles_k][Dp] largest |v - v_mean| of the tile, but for the sequence's first key
  void* keys;         // [Hkv][tiles_k] KeyValueRecord<Dp>
};

struct ForwardArgs {
  ForwardParams p;
  Tokens queries, keys;
  ForwardScratch w;
};

// Calls launch(a number of the call's dtype, an integral_constant of its padded head dimension).
template <typename Launch>
void dispatch(const Shape& s, Launch launch) {
  const auto with = [&](auto number) {
    s.head_dim_padded == 64 ? launch(number, std::integral_constant<int, 64>{}) : launch(number, std::integral_constant<int, 128>{});
  };
  s.dtype == DType::bfloat16 ? with(__nv_bfloat16{}) : with(__half{});
}

inline Tokens tokens_of(const int32_t* cu_seqlens, int64_t tokens, const Shape& s) {
  Tokens x{cu_seqlens, static_cast<int32_t>(tokens), static_cast<int32_t>(s.num_sequences), 0};
  x.tiles = all_tiles<TILE>(x);
  return x;
}
inline Tokens queries_of(const Shape& s) { return tokens_of(s.cu_seqlens_q, s.tokens_q, s); }
inline Tokens keys_of(const Shape& s) { return tokens_of(s.cu_seqlens_k, s.tokens_k, s); }

// Hands out parts of the workspace, each aligned to 256 bytes; with a null base it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  void take(void*& pointer, size_t count, size_t size) {
    pointer = base ? base + used : nullptr;
    used += (count * size + 255) / 256 * 256;
  }
  template <typename T>
  void take(T*& pointer, size_t count) {
    void* part;
    take(part, count, sizeof(T));
    pointer = static_cast<T*>(part);
  }
};

// The arguments of the forward's passes, and how much workspace they take; Keys<Dp> is the record of the main kernel.
template <template <int> typename Keys>
std::pair<ForwardArgs, size_t> forward_arguments(const ForwardParams& p, void* workspace) {
  ForwardArgs a{p, queries_of(p.shape), keys_of(p.shape), {}};
  const size_t dim = p.shape.head_dim_padded, tiles = p.shape.heads_kv * a.keys.tiles;
  Carver c{static_cast<char*>(workspace)};
  c.take(a.w.k_partial, tiles * dim);
  c.take(a.w.v_partial, tiles * dim);
  c.take(a.w.v_mean, p.shape.num_sequences * p.shape.heads_kv * p.shape.head_dim);
  c.take(a.w.v_residual, tiles * dim);
  c.take(a.w.v_amax, tiles * dim);
  c.take(a.w.keys, tiles, dim == 64 ? sizeof(Keys<64>) : sizeof(Keys<128>));
  return {a, c.used};
}

// Blocks of one head, of at least 64 tokens each: an upper bound.
inline int64_t blocks_of(const int32_t* cu_seqlens, int64_t tokens, const Shape& s) {
  return cu_seqlens ? tokens / 64 + s.num_sequences : s.batch * (tokens / 64 + 1);
}

// Null, or why this call is beyond what 32-bit token and block numbers can count.
inline const char* too_large(const Shape& s) {
  if (s.tokens_q > INT_MAX - 2 * TILE || s.tokens_k > INT_MAX - 2 * TILE) return "more than 2^31 tokens in one row of the batch";
  if (blocks_of(s.cu_seqlens_q, s.tokens_q, s) * s.heads_q > INT_MAX || blocks_of(s.cu_seqlens_k, s.tokens_k, s) * s.heads_kv > INT_MAX)
    return "more blocks of 64 tokens than a launch can have";
  return nullptr;
}

inline const char* status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace sagetrain

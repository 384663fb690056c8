// The two calls of the C boundary: carve the workspace, launch the passes in order.
#include <algorithm>
#include <climits>

#include "layout.cuh"

namespace sagetrain::sm80 {
namespace {

Tokens tokens_of(const int32_t* cu_seqlens, int64_t tokens, const Shape& s) {
  Tokens x{cu_seqlens, static_cast<int32_t>(tokens), static_cast<int32_t>(s.num_sequences), 0};
  x.tiles = all_tiles<TILE>(x);
  return x;
}
Tokens queries_of(const Shape& s) { return tokens_of(s.cu_seqlens_q, s.tokens_q, s); }
Tokens keys_of(const Shape& s) { return tokens_of(s.cu_seqlens_k, s.tokens_k, s); }

// Hands out pieces of the workspace, each aligned to 256 bytes; with a null base it only counts.
struct Carver {
  char* base;
  size_t used = 0;
  void take(void*& pointer, size_t count, size_t size) {
    pointer = base ? base + used : nullptr;
    used += (count * size + 255) / 256 * 256;
  }
  template <typename T>
  void take(T*& pointer, size_t count) {
    void* piece;
    take(piece, count, sizeof(T));
    pointer = static_cast<T*>(piece);
  }
};

size_t carve(const ForwardParams& p, void* workspace, ForwardScratch& w) {
  const size_t dim = p.shape.head_dim_padded, tiles = p.shape.heads_kv * keys_of(p.shape).tiles;
  Carver c{static_cast<char*>(workspace)};
  c.take(w.k_partial, tiles * dim);
  c.take(w.v_partial, tiles * dim);
  c.take(w.v_residual, tiles * dim);
  c.take(w.keys, tiles, dim == 64 ? sizeof(ForwardKeys<64>) : sizeof(ForwardKeys<128>));
  return c.used;
}

// Shared memory that a block of the current device can have.
int shared_bytes() {
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  return bytes;
}

// Blocks that share a tile of keys: as many as it takes for about two waves of a large GPU.
int splits_of(const Shape& s) {
  const int64_t enough = s.head_dim_padded == 64 ? 512 : 256, tiles = std::max<int64_t>(s.heads_kv * keys_of(s).tiles, 1);
  return static_cast<int>(std::clamp<int64_t>(enough / tiles, 1, 8));
}

BackwardArgs arguments(const BackwardParams& p, void* workspace, size_t& bytes) {
  const bool fused = !p.deterministic && fused_bytes(p.shape) <= shared_bytes();
  BackwardArgs a{p, queries_of(p.shape), keys_of(p.shape), fused, fused ? splits_of(p.shape) : 1, {}};
  const size_t dim = p.shape.head_dim_padded, tiles_k = p.shape.heads_kv * a.keys.tiles, tiles_q = p.shape.heads_q * a.queries.tiles;
  const bool small = dim == 64;
  BackwardScratch& w = a.w;
  Carver c{static_cast<char*>(workspace)};
  c.take(w.blocks, tiles_k, small ? sizeof(BlockKeys<64>) : sizeof(BlockKeys<128>));
  if (!a.fused) c.take(w.keys, tiles_k * (TILE / KEYS), small ? sizeof(BackwardKeys<64>) : sizeof(BackwardKeys<128>));
  c.take(w.v_norm, tiles_k);
  c.take(w.k_bound, tiles_k);
  c.take(w.queries, tiles_q * (TILE / QUERIES), small ? sizeof(BackwardQueries<64>) : sizeof(BackwardQueries<128>));
  c.take(w.q_rows, tiles_q * TILE);
  if (a.fused) c.take(w.d_q, tiles_q * TILE * dim);
  if (a.splits > 1) c.take(w.d_kv, tiles_k * 2 * TILE * dim);
  bytes = c.used;
  return a;
}

// Blocks of one head, of at least 64 tokens each: an upper bound.
int64_t blocks_of(const int32_t* cu_seqlens, int64_t tokens, const Shape& s) {
  return cu_seqlens ? tokens / 64 + s.num_sequences : s.batch * (tokens / 64 + 1);
}

// Null, or why this call is beyond what 32-bit token and block numbers can count.
const char* too_large(const Shape& s) {
  if (s.tokens_q > INT_MAX - 2 * TILE || s.tokens_k > INT_MAX - 2 * TILE) return "sm80: more than 2^31 tokens in one row of the batch";
  if (blocks_of(s.cu_seqlens_q, s.tokens_q, s) * s.heads_q > INT_MAX || blocks_of(s.cu_seqlens_k, s.tokens_k, s) * s.heads_kv > INT_MAX)
    return "sm80: more blocks of 64 tokens than a launch can have";
  return nullptr;
}

const char* status() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& p) {
  ForwardScratch w;
  return carve(p, nullptr, w);
}

size_t backward_workspace_bytes(const BackwardParams& p) {
  size_t bytes;
  arguments(p, nullptr, bytes);
  return bytes;
}

const char* forward(const ForwardParams& p) {
  if (const char* refusal = too_large(p.shape)) return refusal;
  ForwardArgs a{p, queries_of(p.shape), keys_of(p.shape), {}};
  carve(p, p.workspace, a.w);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  quantise(a, stream);
  attend(a, stream);
  return status();
}

const char* backward(const BackwardParams& p) {
  if (const char* refusal = too_large(p.shape)) return refusal;
  size_t bytes;
  const BackwardArgs a = arguments(p, p.workspace, bytes);
  const auto stream = static_cast<cudaStream_t>(p.stream);
  prepare(a, stream);
  key_gradients(a, stream);
  if (!a.fused) query_gradients(a, stream);
  return status();
}

}  // namespace sagetrain::sm80

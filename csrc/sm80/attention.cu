// The two calls of the C boundary: carve the workspace, launch the passes in order.
#include <algorithm>

#include "layout.cuh"

namespace sagetrain::sm80 {
namespace {

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
  c.take(w.blocks, tiles_k, small ? sizeof(KeyRecord<64>) : sizeof(KeyRecord<128>));
  if (!a.fused) c.take(w.keys, tiles_k * (TILE / DQ_KEYS), small ? sizeof(DqKeyRecord<64>) : sizeof(DqKeyRecord<128>));
  c.take(w.v_norm, tiles_k);
  c.take(w.k_bound, tiles_k);
  c.take(w.queries, tiles_q * (TILE / QUERIES), small ? sizeof(QueryRecord<64>) : sizeof(QueryRecord<128>));
  c.take(w.q_rows, tiles_q * TILE);
  if (a.fused) c.take(w.d_q, tiles_q * TILE * dim);
  if (a.splits > 1) c.take(w.d_kv, tiles_k * 2 * TILE * dim);
  bytes = c.used;
  return a;
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& p) {
  return forward_arguments<KeyValueRecord>(p, nullptr).second;
}

size_t backward_workspace_bytes(const BackwardParams& p) {
  size_t bytes;
  arguments(p, nullptr, bytes);
  return bytes;
}

const char* forward(const ForwardParams& p) {
  if (const char* refusal = too_large(p.shape)) return refusal;
  const ForwardArgs a = forward_arguments<KeyValueRecord>(p, p.workspace).first;
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
  gradients(a, stream);
  a.fused ? finish(a, stream) : query_gradients(a, stream);
  return status();
}

}  // namespace sagetrain::sm80

// The two calls of the C boundary: carve the workspace, launch the passes in order.
#include <algorithm>

#include "layout.cuh"

namespace sagetrain::sm90 {
namespace {

// Blocks that share a tile of keys: as many as it takes for about two waves.
int splits_of(const Shape& s) { return static_cast<int>(std::clamp<int64_t>(256 / std::max<int64_t>(s.heads_kv * keys_of(s).tiles, 1), 1, 8)); }

// Heads of keys at a time: the fewest whose tiles are about two waves, or all. What is added to dQ stays in L2 then. With one wave, the longest
// blocks of the last heads start when half of the time is over, and multiprocessors idle at the end: docs/sm90-backward.md, variants.
int heads_of(const Shape& s) {
  int heads = 1;
  while (heads < s.heads_kv && (heads * keys_of(s).tiles < 256 || s.heads_kv % heads)) ++heads;
  return heads;
}

std::pair<BackwardArgs, size_t> backward_arguments(const BackwardParams& p, void* workspace) {
  BackwardArgs a{p, queries_of(p.shape), keys_of(p.shape), splits_of(p.shape), heads_of(p.shape), {}};
  const size_t dim = p.shape.head_dim_padded, tiles_k = p.shape.heads_kv * a.keys.tiles, tiles_q = p.shape.heads_q * a.queries.tiles;
  BackwardScratch& w = a.w;
  Carver c{static_cast<char*>(workspace)};
  c.take(w.keys, tiles_k * (TILE / KEYS), dim == 64 ? sizeof(KeyRecord<64>) : sizeof(KeyRecord<128>));
  c.take(w.v_norm, tiles_k);
  c.take(w.k_bound, tiles_k);
  c.take(w.queries, tiles_q * (TILE / QUERIES), dim == 64 ? sizeof(QueryRecord<64>) : sizeof(QueryRecord<128>));
  c.take(w.fine, tiles_q * TILE);
  c.take(w.out, tiles_q * TILE);
  c.take(w.d_q, tiles_q * TILE * dim);
  if (a.splits > 1) c.take(w.d_kv, tiles_k * a.splits * 2 * TILE * dim);
  return {a, c.used};
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& p) { return forward_arguments<KeyValueRecord>(p, nullptr).second; }
size_t backward_workspace_bytes(const BackwardParams& p) { return backward_arguments(p, nullptr).second; }

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
  const BackwardArgs a = backward_arguments(p, p.workspace).first;
  const auto stream = static_cast<cudaStream_t>(p.stream);
  prepare(a, stream);
  gradients(a, stream);
  finish(a, stream);
  return status();
}

}  // namespace sagetrain::sm90

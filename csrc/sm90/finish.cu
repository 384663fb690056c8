// dQ from its sums: as floats, rotated back, scaled, with what d_lse brings; dK and dV from the parts of several blocks, always in the same order.
// Bound by memory. No barriers, no shared memory; a warp has 16 of a tile's TILE rows, as many as an accumulator, and all their channels.
#include "../common/mma.cuh"
#include "../common/rotate.cuh"
#include "layout.cuh"

namespace sagetrain::sm90 {
namespace {

constexpr int FINISH_THREADS = TILE / 16 * 32;  // a warp has 16 rows

template <typename T, int Dp>
__device__ __forceinline__ void finish_queries(const BackwardArgs& a, int number) {
  const QueryRows<TILE> rows(a.p.shape, a.queries, a.keys, number);
  if (!rows.exists()) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, t = lane % 4, head_dim = a.p.shape.head_dim;
  const int64_t first = rows.padded(a.queries) + rows.first;
  const int4* sums = reinterpret_cast<const int4*>(a.w.d_q) + first * (Dp / 4) + warp / 4 * (QUERIES * Dp / 4) + warp % 4 * (8 * 32) + lane;
  // Of the blocks of keys, those that the queries see: each has added MAGIC.
  const int record = (rows.first + warp / 4 * QUERIES) / QUERIES, edge = (record + 1) * QUERIES + rows.offset, all = (rows.keys.length + TILE - 1) / TILE;
  const int blocks = a.p.shape.is_causal ? min(max(0, (edge + TILE - 1) / TILE), all) : all;
  const int magic = static_cast<int>(static_cast<uint32_t>(MAGIC) * blocks);
  float x[Dp / 8][4];
#pragma unroll
  for (int n = 0; n < Dp / 8; ++n) {
    const int4 y = sums[n / 8 * (QUERIES * 64 / 4) + n % 8 * 32];
    x[n][0] = y.x - magic, x[n][1] = y.y - magic, x[n][2] = y.z - magic, x[n][3] = y.w - magic;
  }
  const float* k_mean = a.p.k_mean + (static_cast<int64_t>(rows.queries.sequence) * a.p.shape.heads_kv + rows.head_kv) * head_dim;
  unrotate(x, device_signs(k_mean), t);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int row = warp * 16 + lane / 4 + 8 * r, query = rows.first + row;
    const bool exists = query < rows.queries.length;
    const float out = exists ? a.w.out[first + row] : 0.f;
    const bool blind = out == INFINITY;  // it has no gradient, whatever d_lse says of its lse of -inf
    const bool adds = exists && a.p.d_lse && !blind;
    const float d_lse = adds ? a.p.d_lse[rows.index(a.p.shape, query)] * a.p.shape.scale : 0.f;
    store_row<Dp / 8>(rows.template row<T>(a.p.d_q, a.p.d_q_strides, query), exists, head_dim, [&](int n) {
      const int channel = n * 8 + 2 * t;
      const float2 mean = adds && channel < head_dim ? *reinterpret_cast<const float2*>(k_mean + channel) : float2{};
      return blind ? 0u : pack16<T>(fmaf(out, x[n][2 * r], d_lse * mean.x), fmaf(out, x[n][2 * r + 1], d_lse * mean.y));
    });
  }
}

// dK (which = 0) or dV (1) of a tile.
template <typename T, int Dp>
__device__ __forceinline__ void finish_keys(const BackwardArgs& a, int number) {
  const int heads = a.p.shape.heads_kv, which = number % 2, head = number / 2 % heads, slot = number / 2 / heads;
  const Span keys = span_of_tile(a.keys, slot);
  const int k0 = (slot - keys.first_tile) * TILE;
  if (k0 < 0 || k0 >= keys.length) return;
  constexpr int part = TILE * Dp / 4;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first = (static_cast<int64_t>(head) * a.keys.tiles + slot) * a.splits * 2 + which;
  const float4* parts = reinterpret_cast<const float4*>(a.w.d_kv) + first * part + warp * (Dp / 8 * 32) + lane;
  float x[Dp / 8][4] = {};
  for (int split = 0; split < a.splits; ++split, parts += 2 * part)
#pragma unroll
    for (int n = 0; n < Dp / 8; ++n) {
      const float4 y = parts[n * 32];
      x[n][0] += y.x, x[n][1] += y.y, x[n][2] += y.z, x[n][3] += y.w;
    }
  if (which == 0) unrotate(x, device_signs(a.p.k_mean + (static_cast<int64_t>(keys.sequence) * heads + head) * a.p.shape.head_dim), lane % 4);
  const Strides& s = which ? a.p.d_v_strides : a.p.d_k_strides;
  const float factor = which ? 1.f : a.p.shape.scale;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int key = k0 + warp / 4 * KEYS + key_of_row(warp % 4 * 16 + lane / 4 + 8 * r);
    T* row = static_cast<T*>(which ? a.p.d_v : a.p.d_k) + keys.batch * s.batch + head * s.head + (keys.begin + key) * s.token;
    store_row<Dp / 8>(row, key < keys.length, a.p.shape.head_dim, [&](int n) { return pack16<T>(factor * x[n][2 * r], factor * x[n][2 * r + 1]); });
  }
}

// Blocks 2i and 2i + 1 of the first `key_blocks`: dK and dV of a tile. The others: dQ of a tile.
template <typename T, int Dp>
__global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(const __grid_constant__ BackwardArgs a, int key_blocks) {
  after_previous();
  const int number = block_number();
  number < key_blocks ? finish_keys<T, Dp>(a, number) : finish_queries<T, Dp>(a, number - key_blocks);
}

template <typename T, int Dp>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  const size_t query_blocks = a.queries.tiles * a.p.shape.heads_q, key_blocks = a.splits == 1 ? 0 : 2 * a.keys.tiles * a.p.shape.heads_kv;
  const unsigned blocks = query_blocks + key_blocks;
  if (blocks) launch_kernel(finish_kernel<T, Dp>, blocks, FINISH_THREADS, 0, stream, a, static_cast<int>(key_blocks));
}

}  // namespace

void finish(const BackwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm90

// What the kernels of the backward share: scales and rounding of P and dS in registers, who owns which rows, and how results
// are written. Schedules, bound, variants: docs/sm80.md; the constants L, c, d, L', out: layout.cuh.
#pragma once
#include "../common/rotate.cuh"
#include "layout.cuh"
#include "matmul.cuh"

namespace sagetrain::sm80 {

constexpr float LARGEST_INVERSE = 60000.f;  // of a scale held in half precision

// What takes magnitudes up to `top` to `levels`, as a half. NaN stays NaN.
__device__ __forceinline__ __half inverse_scale(float top, float levels) {
  float wish = __fdividef(levels, top);
  if (wish > LARGEST_INVERSE) wish = LARGEST_INVERSE;
  return __float2half_rn(wish);
}

// What undoes it, but for the rounding of that half (2^-12 of the scale).
__device__ __forceinline__ float scale_of(float top, float levels) {
  const float scale = top * (1.f / levels);
  return scale < 1.f / LARGEST_INVERSE ? 1.f / LARGEST_INVERSE : scale;
}

// Scales of these rows: the largest of `x` (magnitudes) over its columns becomes `levels`.
// inverse: what multiplies x; scale: what takes the rounded values back. NaN stays NaN.
template <int n>
__device__ __forceinline__ void row_scales(const __half2 (&x)[n][2], float levels, bool is_signed, __half2 (&inverse)[2], float (&scale)[2]) {
  const __half2 both = row_tops(x, is_signed);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float top_r = r ? __high2float(both) : __low2float(both);
    inverse[r] = __half2half2(inverse_scale(top_r, levels));
    scale[r] = scale_of(top_r, levels);
  }
}

// ---------------------------------------------------------------------------------------------------- matmuls of a step

constexpr int COLUMNS = 64;  // of a step
static_assert(COLUMNS == DQ_KEYS && COLUMNS == QUERIES);

// sum += scale * (x times a matrix [channel][COLUMNS] of bytes in shared memory), x the rounded operand of dS.
template <int in_flight, int m, int channel_tiles>
__device__ __forceinline__ void accumulate(float (&sum)[m][channel_tiles][4], const uint32_t (&x)[m][2][4], const float (&scale)[m][2], uint32_t matrix) {
#pragma unroll
  for (int first = 0; first < channel_tiles; first += in_flight) {
    int y[in_flight][m][4];
    product_int8<false, COLUMNS>(y, x, matrix + first * 8 * COLUMNS);
#pragma unroll
    for (int n = 0; n < in_flight; ++n)
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          sum[i][first + n][c] = fmaf(__int_as_float(y[n][i][c]) - MAGIC_FLOAT, scale[i][c / 2], sum[i][first + n][c]);
  }
}

// ---------------------------------------------------------------------------------------------------- rows of keys

// Which keys a block of dkv_kernel owns and its part of the steps: the queries that see them, by their records in order.
template <int Dp, int row_tiles>
struct KeyRows {
  Span keys;
  int head, k0, warp_row, group, t;
  int left;                 // keys from the warp's first to the sequence's end
  int steps;                // of this split
  // of the step:
  int record;
  int diagonal;             // of its queries, the first that sees the warp's first key; negative where all do
  int blocks, until;        // records of a query head that see any key of the block, and of these those to come

  __device__ KeyRows(const BackwardArgs& a, int number) {
    const int heads_kv = a.p.shape.heads_kv, q_per_kv = a.p.shape.heads_q / heads_kv;
    head = number % heads_kv;
    const int split = number / heads_kv % a.splits, tile = number / heads_kv / a.splits;  // causal: the first keys have the most queries
    keys = span_of_tile(a.keys, tile);
    k0 = (tile - keys.first_tile) * TILE;
    const Span queries = span_of(a.queries, keys.sequence);
    const int offset = keys.length - queries.length, first_block = a.p.shape.is_causal ? max(0, k0 - offset) / QUERIES : 0;
    blocks = max(0, (queries.length + QUERIES - 1) / QUERIES - first_block);
    const int all = blocks * q_per_kv, first = static_cast<int>(static_cast<int64_t>(all) * split / a.splits);
    steps = static_cast<int>(static_cast<int64_t>(all) * (split + 1) / a.splits) - first;
    const int lane = threadIdx.x % 32;
    group = lane / 4, t = lane % 4;
    warp_row = k0 + threadIdx.x / 32 * (16 * row_tiles);
    left = keys.length - warp_row;
    const int done = blocks ? first % blocks : 0, block = first_block + done;
    until = blocks - done;
    diagonal = a.p.shape.is_causal ? warp_row - offset - block * QUERIES : -TILE;
    record = (head * q_per_kv + (blocks ? first / blocks : 0)) * head_stride(a) + queries.first_tile * (TILE / QUERIES) + block;
  }
  __device__ __forceinline__ bool exists() const { return k0 >= 0 && k0 < keys.length; }
  __device__ __forceinline__ int key(int i, int r) const { return warp_row + 16 * i + group + 8 * r; }
  static __device__ __forceinline__ int head_stride(const BackwardArgs& a) { return a.queries.tiles * (TILE / QUERIES); }
  __device__ __forceinline__ int following(const BackwardArgs& a) const { return record + 1 + (until == 1 ? head_stride(a) - blocks : 0); }
  __device__ __forceinline__ void advance(const BackwardArgs& a) {
    const int queries = a.p.shape.is_causal ? QUERIES : 0;
    record = following(a), diagonal -= queries;
    if (--until == 0) until = blocks, diagonal += blocks * queries;
  }

  __device__ __forceinline__ void load_k8(uint32_t (&operand)[row_tiles][Dp / 32][4], float (&scale)[row_tiles][2], const BackwardArgs& a) const {
    const int64_t row = row_index(keys.batch, a.p.shape.heads_kv, head, a.keys.tokens, keys.begin);
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      const bool valid[2] = {key(i, 0) < keys.length, key(i, 1) < keys.length};
      const void* rows[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows[r] = a.p.k8 + (row + key(i, r)) * Dp;
        scale[i][r] = valid[r] ? a.p.k_scale[row + key(i, r)] : 0.f;
      }
      load_operand(operand[i], rows, valid, t, Dp);
    }
  }
  // Writes this warp's rows of dK or dV.
  template <typename T>
  __device__ __forceinline__ void store(void* to, const Strides& s, const float (&x)[row_tiles][Dp / 8][4], float factor, int head_dim) const {
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        T* row = static_cast<T*>(to) + keys.batch * s.batch + head * s.head + (keys.begin + key(i, r)) * s.token;
        store_row<Dp / 8>(row, key(i, r) < keys.length, head_dim,
                          [&](int n) { return pack16<T>(factor * x[i][n][2 * r], factor * x[i][n][2 * r + 1]); });
      }
  }
  template <typename T>
  __device__ __forceinline__ void store_dk(const BackwardArgs& a, float (&dk)[row_tiles][Dp / 8][4]) const {
    const Signs signs = device_signs(a.p.k_mean + (static_cast<int64_t>(keys.sequence) * a.p.shape.heads_kv + head) * a.p.shape.head_dim);
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) unrotate(dk[i], signs, t);
    store<T>(a.p.d_k, a.p.d_k_strides, dk, a.p.shape.scale, a.p.shape.head_dim);
  }
  template <typename T>
  __device__ __forceinline__ void store_dv(const BackwardArgs& a, const float (&dv)[row_tiles][Dp / 8][4]) const {
    store<T>(a.p.d_v, a.p.d_v_strides, dv, 0x1p-15f, a.p.shape.head_dim);
  }
  // This lane's part of the sums of dK (which = 0) or dV (1) of the block's tile.
  __device__ __forceinline__ float4* sums(const BackwardArgs& a, int which) const {
    const int64_t tile = static_cast<int64_t>(head) * a.keys.tiles + keys.first_tile + k0 / TILE;
    return reinterpret_cast<float4*>(a.w.d_kv) + ((tile * 2 + which) * TILE + (warp_row - k0)) * (Dp / 4) + threadIdx.x % 32;
  }
};

// ---------------------------------------------------------------------------------------------------- results

// Writes this warp's 16 m rows of dQ, the first of them `first`: rotated back, times `out`, and what d_lse brings.
template <typename T, int Dp, int m, int rows>
__device__ __forceinline__ void store_dq(float (&dq)[m][Dp / 8][4], const BackwardArgs& a, const QueryRows<rows>& block, int first) {
  const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4, head_dim = a.p.shape.head_dim;
  const float* k_mean = a.p.k_mean + (static_cast<int64_t>(block.queries.sequence) * a.p.shape.heads_kv + block.head_kv) * head_dim;
  const Signs signs = device_signs(k_mean);
#pragma unroll
  for (int i = 0; i < m; ++i) {
    unrotate(dq[i], signs, t);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = first + 16 * i + group + 8 * r;
      const bool exists = query < block.queries.length;
      const float4 constants = exists ? a.w.q_rows[block.padded(a.queries) + query] : float4{};
      // A row that sees no key has no gradient, whatever d_lse says of its lse of -inf.
      const bool adds = exists && a.p.d_lse && constants.y != INFINITY;
      const float d_lse = adds ? a.p.d_lse[block.index(a.p.shape, query)] * a.p.shape.scale : 0.f;
      store_row<Dp / 8>(block.template row<T>(a.p.d_q, a.p.d_q_strides, query), exists, head_dim, [&](int n) {
        const int channel = n * 8 + 2 * t;
        const float2 mean = adds && channel < head_dim ? *reinterpret_cast<const float2*>(k_mean + channel) : float2{};
        return pack16<T>(fmaf(constants.w, dq[i][n][2 * r], d_lse * mean.x), fmaf(constants.w, dq[i][n][2 * r + 1], d_lse * mean.y));
      });
    }
  }
}

}  // namespace sagetrain::sm80

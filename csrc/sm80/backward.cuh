// What the kernels of the backward share: scales and rounding of P and dS in registers, undoing the rotation, and who owns
// which rows. Schedules, bound, variants: docs/sm80.md; the constants L, c, d, L', out: layout.cuh.
#pragma once
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

// The largest of the rows r (low half) and r + 8 (high half) of a warp tile; x[i] has two columns of both. NaN stays NaN.
template <int n>
__device__ __forceinline__ __half2 row_tops(const __half2 (&x)[n][2], bool is_signed) {
  __half2 top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = is_signed ? __habs2(x[0][r]) : x[0][r];
#pragma unroll
    for (int i = 1; i < n; ++i) top[r] = __hmax2_nan(top[r], is_signed ? __habs2(x[i][r]) : x[i][r]);
  }
  __half2 both = __hmax2_nan(__lows2half2(top[0], top[1]), __highs2half2(top[0], top[1]));
  both = __hmax2_nan(both, __shfl_xor_sync(~0u, both, 1));
  return __hmax2_nan(both, __shfl_xor_sync(~0u, both, 2));
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

// The two halves, or zeros in their place.
__device__ __forceinline__ __half2 keep(__half2 x, bool low, bool high) {
  const uint32_t bits = reinterpret_cast<uint32_t&>(x) & ((low ? 0xFFFFu : 0u) | (high ? 0xFFFF0000u : 0u));
  return reinterpret_cast<const __half2&>(bits);
}

// Rounds 32 columns (four 8-column tiles) to 8 bits: an A operand.
__device__ __forceinline__ void to_operand(uint32_t (&a)[4], const __half2 (*x)[2], const __half2 (&inverse)[2]) {
  const __half2 magic = __float2half2_rn(MAGIC_HALF);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      a[2 * half + r] = low_bytes(__hfma2(x[2 * half][r], inverse[r], magic), __hfma2(x[2 * half + 1][r], inverse[r], magic));
}

// x H over the channels of an accumulator (Sylvester's Hadamard matrix), and the signs: undoes the rotation of q and k.
template <int tiles>
__device__ __forceinline__ void unrotate(float (&x)[tiles][4], int t) {
#pragma unroll
  for (int n = 0; n < tiles; ++n)
#pragma unroll
    for (int r = 0; r < 4; r += 2) {  // channel bit 0
      const float a = x[n][r], b = x[n][r + 1];
      x[n][r] = a + b, x[n][r + 1] = a - b;
    }
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)  // channel bits 1 and 2: the lane within its quad
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float other = __shfl_xor_sync(~0u, x[n][c], bit);
        x[n][c] = t & bit ? other - x[n][c] : x[n][c] + other;
      }
#pragma unroll
  for (int bit = 1; bit < tiles; bit *= 2)  // the others: which 8-column tile
#pragma unroll
    for (int n = 0; n < tiles; ++n)
      if (!(n & bit))
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float a = x[n][c], b = x[n | bit][c];
          x[n][c] = a + b, x[n | bit][c] = a - b;
        }
#pragma unroll
  for (int n = 0; n < tiles; ++n) {
    const uint32_t bits = static_cast<uint32_t>((n < 8 ? kSignsLow : kSignsHigh) >> n % 8 * 8) >> 2 * t;  // of channel 8 n + 2 t and the next
#pragma unroll
    for (int c = 0; c < 4; ++c) x[n][c] = __uint_as_float(__float_as_uint(x[n][c]) ^ (bits << (31 - c % 2) & 0x80000000u));
  }
}

// ---------------------------------------------------------------------------------------------------- matmuls of a step

// 16-row tiles of a warp, warps of a block (TILE rows), blocks that a multiprocessor is to hold, and 8-column tiles whose
// products are under way at a time: what the registers allow.
template <int Dp>
struct DkvShape { static constexpr int row_tiles = Dp == 64 ? 2 : 1, warps = 8 / row_tiles, blocks = Dp == 64 ? 2 : 1, group = 4 / row_tiles; };
template <int Dp>
struct DqShape { static constexpr int row_tiles = Dp == 64 ? 2 : 1, warps = 4, blocks = 2, group = 4, rows = 16 * row_tiles * warps; };

constexpr int COLUMNS = 64;  // of a step
static_assert(COLUMNS == KEYS && COLUMNS == QUERIES);

// sum += scale * (x times a matrix [channel][COLUMNS] of bytes in shared memory), x the rounded operand of dS.
template <int group, int m, int channel_tiles>
__device__ __forceinline__ void accumulate(float (&sum)[m][channel_tiles][4], const uint32_t (&x)[m][2][4], const float (&scale)[m][2], uint32_t matrix) {
#pragma unroll
  for (int first = 0; first < channel_tiles; first += group) {
    int y[group][m][4];
    product_int8<false, COLUMNS>(y, x, matrix + first * 8 * COLUMNS);
#pragma unroll
    for (int n = 0; n < group; ++n)
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          sum[i][first + n][c] = fmaf(__int_as_float(y[n][i][c]) - MAGIC_FLOAT, scale[i][c / 2], sum[i][first + n][c]);
  }
}

// ---------------------------------------------------------------------------------------------------- results

// Writes this warp's 16 m rows of dQ, the first of them `first`: rotated back, times `out`, and what d_lse brings.
template <typename T, int Dp, int m, int rows>
__device__ __forceinline__ void store_dq(float (&dq)[m][Dp / 8][4], const BackwardArgs& a, const QueryRows<rows>& block, int first) {
  const int group = threadIdx.x % 32 / 4, t = threadIdx.x % 4, head_dim = a.p.shape.head_dim;
  const float* k_mean = a.p.k_mean + (static_cast<int64_t>(block.queries.sequence) * a.p.shape.heads_kv + block.head_kv) * head_dim;
#pragma unroll
  for (int i = 0; i < m; ++i) {
    unrotate(dq[i], t);
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

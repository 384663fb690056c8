// Before the forward: Q, rotated, rounded to INT8. See quantise.cuh.
#pragma once
#include "call.cuh"
#include "launch.cuh"
#include "quantise_row.cuh"

namespace sagetrain {
namespace {  // see quantise.cuh

// Also completes v_mean: what rounding V lost on average is added to it, by the first block of each sequence and q_per_kv. And v_centre from it.
template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, 3) query_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  constexpr int n = Dp / 64;
  constexpr float down = 0x1p-64f;  // k_mean is clamped to AMAX_MAX and scaled by this: no product with q overflows
  __shared__ __align__(16) float slices[4 * THREADS], total[Dp], amax[Dp], k_mean[Dp], scale[TILE], dot[TILE];
  const int heads = a.p.shape.heads_q, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const int heads_kv = a.p.shape.heads_kv, q_per_kv = heads / heads_kv, head_kv = head / q_per_kv;
  const Span queries = span_of_tile(a.queries, slot);
  const int tile = slot - queries.first_tile, begin = tile * TILE, rows = min(queries.length - begin, TILE);
  if (tile < 0) return;

  const int dim = a.p.shape.head_dim, t = threadIdx.x;
  const int64_t means = (static_cast<int64_t>(queries.sequence) * heads_kv + head_kv) * dim;
  if (tile == 0 && head % q_per_kv == 0) {
    const Span keys = span_of(a.keys, queries.sequence);
    const int64_t first_tile = (static_cast<int64_t>(head_kv) * a.keys.tiles + keys.first_tile) * Dp;
    const int tiles = (keys.length + TILE - 1) / TILE;
    fold_rows<Dp>(total, slices, a.w.v_residual + first_tile, tiles, Add{});
    fold_rows<Dp>(amax, slices, a.w.v_amax + first_tile, tiles, Max{});
    if (t < dim) {
      const float v_mean = a.w.v_mean[means + t] + (keys.length ? total[t] / static_cast<float>(keys.length) : 0.f);
      const float first = keys.length ? to_float(row_at<T>(a.p.v, a.p.v_strides, keys.batch, head_kv, keys.begin)[t]) : 0.f;
      a.w.v_mean[means + t] = v_mean;
      a.p.v_centre[means + t] = centre_of<T>(v_mean, fmaxf(amax[t], fabsf(first - v_mean)));
    }
  }
  if (rows <= 0) return;

  uint4 x[ROWS][n];  // not before, or registers spill
  load_rows(x, row_at<T>(a.p.q, a.p.q_strides, queries.batch, head, queries.begin + begin), a.p.q_strides.token, rows, dim);
  const Signs signs = device_signs(a.p.k_mean + means);
  if (t < Dp) k_mean[t] = t < dim ? change_sign(clamp(a.p.k_mean[means + t], AMAX_MAX) * down, signs, t) : 0.f;
  change_signs(x, signs);
  __syncthreads();
  const int64_t row = row_index(queries.batch, heads, head, a.queries.tokens, queries.begin + begin);
  int8_t* q8 = a.p.q8 + row * Dp;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    float y[n][8], sum = 0.f;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      float mean[8];
      load_channels(mean, k_mean, i, 1.f);
#pragma unroll
      for (int d = 0; d < 8; ++d) y[i][d] = element<T>(x[j][i], d) * (0.5f / Dp), sum = fmaf(y[i][d], mean[d], sum);
    }
    sum = fold_row(sum, Add{});
    uint2 bytes[n];
    const float s = quantise_row(bytes, y);
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (tile_row(j) < rows) *reinterpret_cast<uint2*>(q8 + tile_row(j) * Dp + channel_of(i)) = bytes[i];
    if (lane_chunk() == 0) scale[tile_row(j)] = s, dot[tile_row(j)] = sum;
    __syncwarp();  // or the means of four rows are loaded at once, and registers spill
  }
  __syncthreads();
  if (t < rows) {
    a.p.q_scale[row + t] = scale[t];
    a.p.lse[row + t] = clamp(dot[t] * (2 * Dp / down * a.p.shape.scale), 0x1p120f);
  }
}

}  // namespace
}  // namespace sagetrain

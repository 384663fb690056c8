// Before the forward: means of K and V; then K, rotated, and V rounded to INT8. See quantise.cuh.
#pragma once
#include "means.cuh"
#include "quantise_row.cuh"
#include "transpose.cuh"

namespace sagetrain {
namespace {  // see quantise.cuh

template <int Dp>
struct __align__(16) KeyValueShared {
  int8_t tile8[Dp * TILE];
  float folded[WARPS * 128], mean[Dp], scale[TILE], inverse[Dp], draw[4];
};

template <typename T, int Dp, typename Keys, bool is_value>
__device__ __forceinline__ void quantise_tile(const ForwardArgs& a, KeyValueShared<Dp>& shared) {
  constexpr int n = Dp / 64;
  constexpr float down = is_value ? 0.5f : 0.5f / Dp;  // halved: no sum overflows
  int8_t* const tile8 = shared.tile8;
  float *const folded = shared.folded, *const mean = shared.mean, *const scale = shared.scale, *const inverse = shared.inverse;
  const int heads = a.p.shape.heads_kv, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const Span keys = span_of_tile(a.keys, slot);
  const int tile = slot - keys.first_tile, begin = tile * TILE, rows = min(keys.length - begin, TILE);
  if (tile < 0 || (tile > 0 && rows <= 0)) return;  // the first tile of an empty sequence writes its means

  const int dim = a.p.shape.head_dim, t = threadIdx.x;
  const Strides& strides = is_value ? a.p.v_strides : a.p.k_strides;
  uint4 x[ROWS][n];
  load_rows(x, row_at<T>(is_value ? a.p.v : a.p.k, strides, keys.batch, head, keys.begin + begin), strides.token, rows, dim);

  const int64_t first = static_cast<int64_t>(head) * a.keys.tiles + keys.first_tile;
  Keys& record = static_cast<Keys*>(a.w.keys)[first + tile];
  const int samples = mean_samples(keys.length);
  fold_rows<Dp>(mean, folded, (is_value ? a.w.v_partial : a.w.k_partial) + first * Dp, (samples + TILE - 1) / TILE, Add{});
  if (t < Dp) mean[t] *= down * mean_factor(samples);
  if (t < dim && keys.length)
    mean[t] = fmaf(to_float(row_at<T>(is_value ? a.p.v : a.p.k, strides, keys.batch, head, keys.begin)[t]), down, mean[t]);
  if (t < dim) {
    const float saved = mean[t] * (1.f / down);
    if (tile == 0) (is_value ? a.w.v_mean : a.p.k_mean)[(static_cast<int64_t>(keys.sequence) * heads + head) * dim + t] = saved;
    if (!is_value && t < 2) shared.draw[t] = saved;
  }
  __syncthreads();
  if (rows <= 0) return;

  if constexpr (!is_value) {
    const Signs signs = device_signs(shared.draw);
    if (t < dim) mean[t] = change_sign(mean[t], signs, t);
    change_signs(x, signs);
    __syncthreads();
    const int64_t row = row_index(keys.batch, heads, head, a.keys.tokens, keys.begin + begin);
    int8_t* k8 = a.p.k8 + row * Dp;
    const auto centred = [&](float (&y)[n][8], int j) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        float m[8];
        load_channels(m, mean, i, 1.f);
#pragma unroll
        for (int d = 0; d < 8; ++d) y[i][d] = fmaf(element<T>(x[j][i], d), down, -m[d]);
      }
    };
    const auto write = [&](const uint2 (&bytes)[n], int j, float s) {
      const bool valid = tile_row(j) < rows;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (valid) *reinterpret_cast<uint2*>(k8 + tile_row(j) * Dp + channel_of(i)) = bytes[i];
        write_chunk<Dp>(record.k8, tile_row(j), i, valid ? bytes[i] : uint2{0, 0});
      }
      if (lane_chunk() == 0) scale[tile_row(j)] = valid ? s : 0.f;
    };
    if constexpr (Keys::scale_by_group) {  // by the rows that lanes with the same lane / 8 have in four warps: row / 64 and row / 2 % 4 are the same
      float y[ROWS][n][8], amax = 0.f;
      bool finite = true;
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        centred(y[j], j);
        hadamard(y[j]);
        const float row = row_amax(y[j]);  // by all lanes
        if (tile_row(j) < rows) amax = fmaxf(amax, row), finite = finite && is_finite(y[j][0][0]);
      }
      const int key_group = t % 32 / 8;
      if (lane_chunk() == 0) folded[t / 32 * 4 + key_group] = finite ? amax : infinity();
      __syncthreads();
#pragma unroll
      for (int w = 0; w < 4; ++w) amax = fmaxf(amax, folded[(t / 128 * 4 + w) * 4 + key_group]);
      const Scale s = int8_scale(2.f * amax, is_finite(amax));
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        uint2 bytes[n];
        round_row(bytes, y[j], amax, s);
        write(bytes, j, s.scale);
      }
    } else {
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        float y[n][8];
        centred(y, j);
        uint2 bytes[n];
        const float s = quantise_row(bytes, y);
        write(bytes, j, s);
        __syncwarp();  // or the means of four rows are loaded at once, and registers spill
      }
    }
    __syncthreads();
    record.write_key_scales(scale);
    if (t < rows) a.p.k_scale[row + t] = scale[t];
    return;
  }

  const auto centred = [&](int j, int i, int d, float m) {  // half of v - v_mean; of the sequence's first key the forward takes it unrounded
    return tile_row(j) < rows && begin + tile_row(j) > 0 ? fmaf(element<T>(x[j][i], d), down, -m) : 0.f;
  };
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float m[8];
    uint32_t amax[8] = {};
    load_channels(m, mean, i, 1.f);
#pragma unroll
    for (int j = 0; j < ROWS; ++j)
#pragma unroll
      for (int d = 0; d < 8; ++d) amax[d] = max(amax[d], magnitude(centred(j, i, d, m[d])));
    fold_channels<Dp>(reinterpret_cast<uint32_t*>(folded), amax, i, Max{});
  }
  __syncthreads();
  if (t < Dp) {
    const float amax = __uint_as_float(fold_warps<Dp, WARPS>(reinterpret_cast<const uint32_t*>(folded), t, Max{}));
    const Scale s = int8_scale(2.f * amax, is_finite(amax));
    scale[t] = s.scale, inverse[t] = s.inverse;
    record.write_value_scale(t, s.scale);
    a.w.v_amax[(first + tile) * Dp + t] = 2.f * amax;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float m[8], multiplier[8], half_scale[8], residual[8];
    load_channels(m, mean, i, 1.f);
    load_channels(multiplier, inverse, i, 2.f);
    load_channels(half_scale, scale, i, 0.5f);
    uint32_t words[8];
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      float y[ROWS], sum = 0.f;
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        const float v = saturate(centred(j, i, d, m[d]), 0.5f * AMAX_MAX);
        y[j] = fmaf(v, multiplier[d], MAGIC_FLOAT);
        sum += fmaf(MAGIC_FLOAT - y[j], half_scale[d], v);
      }
      words[d] = pack_bytes(y[0], y[1], y[2], y[3]), residual[d] = sum;
    }
    store_words(tile8, i, words);
    fold_channels<Dp>(folded, residual, i, Add{});
  }
  __syncthreads();
  if (t < Dp) a.w.v_residual[(first + tile) * Dp + t] = 2.f * fold_warps<Dp, WARPS>(folded, t, Add{});
  write_transposed<Dp, TILE>(record.v8t, tile8, 0);
}

template <typename T, int Dp, typename Keys>
__global__ void __launch_bounds__(THREADS, Dp == 64 ? 3 : 2) key_value_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  __shared__ KeyValueShared<Dp> shared;
  blockIdx.y ? quantise_tile<T, Dp, Keys, true>(a, shared) : quantise_tile<T, Dp, Keys, false>(a, shared);
}

}  // namespace
}  // namespace sagetrain

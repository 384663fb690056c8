// Before the forward: the sums that the means of K and V are made of.
//
// The means only shift K and V, and attention is the same for any shift: they need not be exact. Long sequences are sampled, every
// mean_step-th token, 512 to 1023 of them.
//
// Sums are of (x - the sequence's first token) * 2^-ceil(log2(samples)): they cannot overflow, and are zero, not almost
// zero, where all tokens are equal. mean_factor takes them to the mean, less the first token.
#pragma once
#include "call.cuh"
#include "launch.cuh"
#include "round.cuh"
#include "rows.cuh"

namespace sagetrain {
namespace {  // see quantise.cuh

__device__ __forceinline__ int mean_step(int length) { return max(length / 512, 1); }
__device__ __forceinline__ int mean_samples(int length) { return (length + mean_step(length) - 1) / mean_step(length); }
__device__ __forceinline__ int mean_shift(int samples) { return samples > 1 ? 32 - __clz(samples - 1) : 0; }
__device__ __forceinline__ float mean_factor(int samples) { return samples ? exp2_int(mean_shift(samples)) / static_cast<float>(samples) : 0.f; }

template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, Dp == 64 ? 3 : 2) sum_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  constexpr int n = Dp / 64;
  __shared__ __align__(16) float folded[WARPS * Dp];
  const bool is_value = blockIdx.y;
  const int heads = a.p.shape.heads_kv, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const Span keys = span_of_tile(a.keys, slot);
  const int samples = mean_samples(keys.length), begin = (slot - keys.first_tile) * TILE;
  if (begin < 0 || begin >= samples) return;

  const float weight = exp2_int(-mean_shift(samples));
  const int dim = a.p.shape.head_dim;
  const Strides& strides = is_value ? a.p.v_strides : a.p.k_strides;
  const T* from = row_at<T>(is_value ? a.p.v : a.p.k, strides, keys.batch, head, keys.begin);
  const int64_t stride = strides.token * mean_step(keys.length);
  uint4 x[ROWS][n], first[n];
  load_rows(x, from + begin * stride, stride, samples - begin, dim);
  float sum[n][8] = {};
#pragma unroll
  for (int i = 0; i < n; ++i)
    first[i] = channel_of(i) < dim ? *reinterpret_cast<const uint4*>(from + channel_of(i)) : uint4{0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    if (tile_row(j) >= samples - begin) continue;
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d)
        sum[i][d] = fmaf(element<T>(x[j][i], d), weight, fmaf(element<T>(first[i], d), -weight, sum[i][d]));
  }
#pragma unroll
  for (int i = 0; i < n; ++i) fold_channels<Dp>(folded, sum[i], i, Add{});
  __syncthreads();
  if (threadIdx.x < Dp)
    (is_value ? a.w.v_partial : a.w.k_partial)[(static_cast<int64_t>(head) * a.keys.tiles + slot) * Dp + threadIdx.x] =
        fold_warps<Dp, WARPS>(folded, threadIdx.x, Add{});
}

}  // namespace
}  // namespace sagetrain

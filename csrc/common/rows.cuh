// How the kernels that work once per token hold a tile, and what they share: loads and reductions.
//
// One block of 256 threads per (tile, head), heads fastest. A row is the business of eight lanes, lane % 8 = c has
// channels 64 i + 8 c .. + 7 (16 bytes), and a thread has the four rows
//
//       16 * warp + 2 * (lane / 8) + {0, 1, 8, 9}        the tokens of one 32-bit word of a permuted transposed tile
//
// so that reductions over a row are three shuffles, and a transposed word is packed from a thread's own registers.
#pragma once
#include <cstdint>

#include "numbers.cuh"
#include "tiles.cuh"

namespace sagetrain {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 4;  // of a thread
static_assert(WARPS * 4 * ROWS == TILE);

__device__ __forceinline__ int lane_chunk() { return threadIdx.x % 8; }
__device__ __forceinline__ int tile_row(int j) {
  return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 8 * 2 + (j & 1) + (j >> 1) * 8;
}
__device__ __forceinline__ int channel_of(int i) { return 64 * i + 8 * lane_chunk(); }

template <typename T>
__device__ __forceinline__ const T* row_at(const void* x, const Strides& s, int batch, int head, int token) {
  return static_cast<const T*>(x) + batch * s.batch + head * s.head + token * s.token;
}

// This thread's rows and channels of a tile; zeros past the last row and the last channel.
template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* from, int64_t stride, int j, int i, int rows, int dim) {
  const bool valid = tile_row(j) < rows && channel_of(i) < dim;
  return valid ? *reinterpret_cast<const uint4*>(from + tile_row(j) * stride + channel_of(i)) : uint4{0, 0, 0, 0};
}
template <typename T, int n>
__device__ __forceinline__ void load_rows(uint4 (&x)[ROWS][n], const T* from, int64_t stride, int rows, int dim) {
#pragma unroll
  for (int j = 0; j < ROWS; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i) x[j][i] = load_chunk(from, stride, j, i, rows, dim);
}
template <int n>
__device__ __forceinline__ void load_rows(uint2 (&x)[ROWS][n], const int8_t* from, int rows) {  // contiguous int8 rows
#pragma unroll
  for (int j = 0; j < ROWS; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i)
      x[j][i] = tile_row(j) < rows ? *reinterpret_cast<const uint2*>(from + tile_row(j) * (64 * n) + channel_of(i)) : uint2{0, 0};
}

// This lane's eight channels of chunk i, from a [Dp] array in shared memory.
__device__ __forceinline__ void load_channels(float (&to)[8], const float* from, int i, float factor) {
#pragma unroll
  for (int d = 0; d < 8; d += 4) {
    const float4 x = *reinterpret_cast<const float4*>(from + channel_of(i) + d);
    to[d] = x.x * factor, to[d + 1] = x.y * factor, to[d + 2] = x.z * factor, to[d + 3] = x.w * factor;
  }
}

struct Add { __device__ __forceinline__ float operator()(float x, float y) const { return x + y; } };
struct Max {
  __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
  template <typename X>
  __device__ __forceinline__ X operator()(X x, X y) const { return max(x, y); }
};

template <typename X, typename F>
__device__ __forceinline__ X fold_row(X x, F fold) {  // over the eight lanes of a row
#pragma unroll
  for (int m = 1; m < 8; m *= 2) x = fold(x, __shfl_xor_sync(~0u, x, m));
  return x;
}

// Largest of the warps' values in [first, first + count).
template <int count, typename X>
__device__ __forceinline__ X largest(const X* x, int first) {
  X all = x[first];
#pragma unroll
  for (int w = 1; w < count; ++w) all = max(all, x[first + w]);
  return all;
}

// Folds eight channels over the rows of a warp; the warp's results go to its row of `to` [WARPS][Dp].
template <int Dp, typename X, typename F>
__device__ __forceinline__ void fold_channels(X* to, X (&x)[8], int i, F fold) {
#pragma unroll
  for (int d = 0; d < 8; ++d) {
    x[d] = fold(x[d], __shfl_xor_sync(~0u, x[d], 8));
    x[d] = fold(x[d], __shfl_xor_sync(~0u, x[d], 16));
  }
  struct alignas(16) Four { X x[4]; };
  Four* row = reinterpret_cast<Four*>(to + threadIdx.x / 32 * Dp + channel_of(i));
  if (threadIdx.x % 32 < 8) row[0] = {{x[0], x[1], x[2], x[3]}}, row[1] = {{x[4], x[5], x[6], x[7]}};
}
template <int Dp, int count, typename X, typename F>  // over `count` warps from the first
__device__ __forceinline__ X fold_warps(const X* x, int channel, F fold) {
  X all = x[channel];
#pragma unroll
  for (int w = 1; w < count; ++w) all = fold(all, x[w * Dp + channel]);
  return all;
}

// Sum or largest (fold: Add, Max) of `count` rows of [Dp] floats, or 0 where that is larger, to total [Dp] in shared memory; always in the same order.
template <int Dp, typename Fold>
__device__ __forceinline__ void fold_rows(float* total, float* slices, const float* from, int count, Fold fold) {
  constexpr int lanes = Dp / 4, all_slices = THREADS / lanes;  // slices: [all_slices][Dp] = 4 * THREADS floats
  const int slice = threadIdx.x / lanes, channel = threadIdx.x % lanes * 4;
  float4 folded = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
  for (int i = slice; i < count; i += all_slices) {
    const float4 x = *reinterpret_cast<const float4*>(from + static_cast<int64_t>(i) * Dp + channel);
    folded = {fold(folded.x, x.x), fold(folded.y, x.y), fold(folded.z, x.z), fold(folded.w, x.w)};
  }
  *reinterpret_cast<float4*>(slices + slice * Dp + channel) = folded;
  __syncthreads();
  if (threadIdx.x < Dp) {
    float all = 0.f;
#pragma unroll
    for (int i = 0; i < all_slices; ++i) all = fold(all, slices[i * Dp + threadIdx.x]);
    total[threadIdx.x] = all;
  }
  __syncthreads();
}

}  // namespace sagetrain

// The rotation of q and k: signs (signs.h), then Sylvester's Hadamard matrix, not normalised; of rows before they are rounded (rows.cuh), and of
// accumulators on the way back.
#pragma once
#include "../signs.h"
#include "rows.cuh"

namespace sagetrain {

static __constant__ const Patterns device_patterns = kPatterns;

// The signs of a sequence and KV head, by its mean key: at least two floats, in any memory.
__device__ __forceinline__ Signs device_signs(const float* k_mean) {
  return device_patterns.of[drawn(__float_as_uint(k_mean[0]), __float_as_uint(k_mean[1]))];
}

// The signs of this lane's channels, for rows of 16-bit numbers; q and k have them before they are rotated.
__device__ __forceinline__ uint4 sign_bits(const Signs& signs, int i) {
  const uint32_t bits = static_cast<uint32_t>((i == 0 ? signs.low : signs.high) >> 8 * lane_chunk());
  const auto pair = [&](int d) { return (bits >> d & 1) << 15 | (bits >> (d + 1) & 1) << 31; };
  return {pair(0), pair(2), pair(4), pair(6)};
}
template <int n>
__device__ __forceinline__ void change_signs(uint4 (&x)[ROWS][n], const Signs& signs) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const uint4 bits = sign_bits(signs, i);
#pragma unroll
    for (int j = 0; j < ROWS; ++j) x[j][i].x ^= bits.x, x[j][i].y ^= bits.y, x[j][i].z ^= bits.z, x[j][i].w ^= bits.w;
  }
}
__device__ __forceinline__ float change_sign(float x, const Signs& signs, int channel) {
  return (channel < 64 ? signs.low : signs.high) >> channel % 64 & 1 ? -x : x;
}

// One row times the Hadamard matrix: channel bits 0-2 are registers, 3-5 lanes, 6 is i.
template <int n>
__device__ __forceinline__ void hadamard(float (&x)[n][8]) {
#pragma unroll
  for (int half = 1; half < 8; half *= 2)
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d)
        if (!(d & half)) {
          const float a = x[i][d], b = x[i][d + half];
          x[i][d] = a + b, x[i][d + half] = a - b;
        }
#pragma unroll
  for (int m = 1; m < 8; m *= 2) {
    const float sign = threadIdx.x & m ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d) x[i][d] = fmaf(x[i][d], sign, __shfl_xor_sync(~0u, x[i][d], m));
  }
#pragma unroll
  for (int d = 0; n == 2 && d < 8; ++d) {
    const float a = x[0][d], b = x[n - 1][d];
    x[0][d] = a + b, x[n - 1][d] = a - b;
  }
}

// x H over the channels of an accumulator (Sylvester's Hadamard matrix), and the signs: undoes the rotation of q and k.
template <int tiles>
__device__ __forceinline__ void unrotate(float (&x)[tiles][4], const Signs& signs, int t) {
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
    const uint32_t bits = static_cast<uint32_t>((n < 8 ? signs.low : signs.high) >> n % 8 * 8) >> 2 * t;  // of channel 8 n + 2 t and the next
#pragma unroll
    for (int c = 0; c < 4; ++c) x[n][c] = __uint_as_float(__float_as_uint(x[n][c]) ^ (bits << (31 - c % 2) & 0x80000000u));
  }
}

}  // namespace sagetrain

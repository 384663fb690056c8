// One row of q or k: rotated, and rounded by its largest magnitude.
#pragma once
#include "rotate.cuh"
#include "round.cuh"

namespace sagetrain {

// Largest magnitude of a row, over its eight lanes.
template <int n>
__device__ __forceinline__ float row_amax(const float (&x)[n][8]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int d = 0; d < 8; ++d) amax = fmaxf(amax, fabsf(x[i][d]));
  return fold_row(amax, Max{});
}

// Rounds one rotated row, given halved, to this lane's bytes.
template <int n>
__device__ __forceinline__ void round_row(uint2 (&bytes)[n], float (&x)[n][8], float amax, const Scale& s) {
  if (amax > 0.5f * AMAX_MAX) {
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d) x[i][d] = saturate(x[i][d], 0.5f * AMAX_MAX);
  }
  const float inverse = 2.f * s.inverse;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int d = 0; d < 8; ++d) x[i][d] = fmaf(x[i][d], inverse, MAGIC_FLOAT);
    bytes[i] = {pack_bytes(x[i][0], x[i][1], x[i][2], x[i][3]), pack_bytes(x[i][4], x[i][5], x[i][6], x[i][7])};
  }
}

// Rotates and rounds one row, given halved so that no sum overflows, to this lane's bytes; returns its scale.
template <int n>
__device__ __forceinline__ float quantise_row(uint2 (&bytes)[n], float (&x)[n][8]) {
  hadamard(x);
  const float amax = row_amax(x);
  const Scale s = int8_scale(2.f * amax, is_finite(x[0][0]));  // one channel that is not finite has reached all
  round_row(bytes, x, amax, s);
  return s.scale;
}

}  // namespace sagetrain

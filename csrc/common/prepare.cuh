// What the passes before both backwards have in common: limits of a query's constants, what these are made of, tokens of no sequence.
// Args is the BackwardArgs of either architecture.
#pragma once
#include <cfloat>

#include "launch.cuh"
#include "outside.cuh"
#include "round.cuh"

namespace sagetrain {

// Queries of small weight are lifted to this share, log2, of the largest in their record, so that rounding dS by keys keeps their digits; their
// q8t shrink instead.
constexpr int LEAST_WEIGHT = -2;
constexpr int LEAST_WEIGHT_OF_ZEROS = -10;  // ... whose dO is zero: the bounds of the others are loose, dS of d_lse alone is not
constexpr int U_MAX = 12;                   // log2 of |u|, which must fit a half

template <typename T, typename Args>
__global__ void __launch_bounds__(THREADS) backward_rest_kernel(const __grid_constant__ Args a) {
  after_previous();
  zero_rest<T>(a);
}

// Of the keys of a sequence, a warp's share of the largest ||v_j - v_centre|| and of the largest scale, as `magnitude`.
template <typename Args>
__device__ __forceinline__ void bounds_of_keys(uint32_t (&norms)[WARPS], uint32_t (&bounds)[WARPS], const Args& a, const Span& keys, int head_kv) {
  const int t = threadIdx.x, warp = t / 32;
  uint32_t norm = 0, bound = 0;
  const int64_t first_tile = static_cast<int64_t>(head_kv) * a.keys.tiles + keys.first_tile;
  for (int i = t; i < (keys.length + TILE - 1) / TILE; i += THREADS) {
    norm = max(norm, magnitude(a.w.v_norm[first_tile + i]));
    bound = max(bound, magnitude(a.w.k_bound[first_tile + i]));
  }
  norm = __reduce_max_sync(~0u, norm), bound = __reduce_max_sync(~0u, bound);
  if (t % 32 == 0) norms[warp] = norm, bounds[warp] = bound;
}

}  // namespace sagetrain

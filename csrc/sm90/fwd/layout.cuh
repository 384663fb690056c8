// What the passes of the sm90 forward hand to each other. Letters, tiles, permutation and scratch: sm80/layout.cuh.
//
// The base-2 score of query i and key j is s_ij = n q_i k_g:  n = sum_c q8 k8, an integer, |n| <= 127 * 127 * 128;  q_i = q_scale_i scale
// log2(e) Dp;  k_g the scale of j's group. A group is the 16 keys of half a tile that one lane has in the accumulators of S, those of the
// same key / 2 % 4: so a lane needs two scales for its 32 scores of a row.
#pragma once
#include "../../sm80/layout.cuh"

namespace sagetrain::sm90 {

using sm80::ForwardArgs, sm80::LN2, sm80::LOG2E, sm80::TILE;

constexpr int GROUPS = 8;  // of keys in a tile: 4 in each half

template <int Dp>
struct __align__(128) ForwardKeys {  // TILE keys
  static constexpr bool shared_scales = true;  // by a group
  int8_t k8[TILE * Dp];              // [key][channel]
  int8_t v8t[Dp * TILE];             // [channel][key], permuted: v - v_mean, one scale per channel
  float2 v_scale[Dp / 2];            // channels 2i and 2i + 1
  float k_scale[GROUPS];             // of the first half, of the second

  // [TILE], by a whole block; zero of keys that do not exist. A group without any has the first one's: its hidden scores must be low.
  __device__ __forceinline__ void write_key_scales(const float* scale) {
    const int i = threadIdx.x;
    const float own = i < GROUPS ? scale[i / 4 * 64 + i % 4 * 2] : 0.f;
    if (i < GROUPS) k_scale[i] = own == 0.f ? scale[0] : own;
  }
  __device__ __forceinline__ void write_value_scale(int channel, float scale) { reinterpret_cast<float*>(v_scale)[channel] = scale; }
};

void quantise(const ForwardArgs&, cudaStream_t);  // quantise.cu: k8, k_scale, q8, q_scale, means, scratch; lse becomes scale * q . k_mean
void attend(const ForwardArgs&, cudaStream_t);    // forward.cu: o, lse_smooth, lse

}  // namespace sagetrain::sm90

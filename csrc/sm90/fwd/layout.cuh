// What the passes of the sm90 forward hand to each other. Letters, tiles, permutation and scratch: sm80/layout.cuh.
//
// The base-2 score of query i and key j comes from n = sum_c q8 k8, an integer, |n| <= OFFSET:
//
//   x_ij = CENTRE + k_j n 2^-23,    CENTRE = OFFSET 2^-23,    k_j = k_scale_j / unit < 1,    unit a power of two of the tile
//   s_ij = (x_ij - CENTRE) q_i,     q_i = q_scale_i scale log2(e) Dp unit 2^23
//
// x is positive, so its bits, taken for an integer, have the order of the numbers. The accumulator holds OFFSET + n: taken for a float,
// that is the subnormal number (OFFSET + n) 2^-149, and one fused multiply-add makes it x:  acc (k_j 2^126) + CENTRE (1 - k_j).
#pragma once
#include "../../sm80/layout.cuh"

namespace sagetrain::sm90 {

using sm80::ForwardArgs, sm80::LN2, sm80::LOG2E, sm80::TILE;

constexpr int OFFSET = 32 * 255 * 255;  // one more step of the product, over bytes of 255; more than 127 * 127 * 128
constexpr float CENTRE = OFFSET * 0x1p-23f;
constexpr int UNIT_MIN = -100;  // exponent of a unit

template <int Dp>
struct __align__(128) ForwardKeys {  // TILE keys
  int8_t k8[TILE * Dp];              // [key][channel]
  int8_t v8t[Dp * TILE];             // [channel][key], permuted: v - v_mean, one scale per channel
  float4 k[TILE / 2];                // keys 2i and 2i + 1: k_j 2^126 of both, CENTRE (1 - k_j) of both
  float2 v_scale[Dp / 2];            // channels 2i and 2i + 1
  float unit;                        // unit * 2^23

  __device__ __forceinline__ void write_key_scales(const float* k_scale) {  // [TILE], by a whole block
    const int i = threadIdx.x;
    float top = 0.f;
#pragma unroll
    for (int key = i % 32; key < TILE; key += 32) top = fmaxf(top, k_scale[key]);  // but not NaN, of keys that are not finite
#pragma unroll
    for (int m = 1; m < 32; m *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
    const int exponent = max(static_cast<int>(__float_as_uint(top) >> 23) - 126, UNIT_MIN);  // of the power of two above
    if (i < TILE / 2) {
      const float inverse = power(-exponent), first = k_scale[2 * i] * inverse, second = k_scale[2 * i + 1] * inverse;
      k[i] = {first * 0x1p126f, second * 0x1p126f, CENTRE * (1.f - first), CENTRE * (1.f - second)};
    }
    if (i == 0) unit = power(exponent + 23);
  }
  __device__ __forceinline__ void write_value_scale(int channel, float scale) { reinterpret_cast<float*>(v_scale)[channel] = scale; }

 private:
  __device__ __forceinline__ static float power(int n) { return __int_as_float((n + 127) << 23); }  // 2^n, -126 <= n <= 127
};

void quantise(const ForwardArgs&, cudaStream_t);  // quantise.cu: k8, k_scale, q8, q_scale, means, scratch; lse becomes scale * q . k_mean
void attend(const ForwardArgs&, cudaStream_t);    // forward.cu: o, lse_smooth, lse

}  // namespace sagetrain::sm90

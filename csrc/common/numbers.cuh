// 16-bit numbers, one at a time, in pairs and in rows of eight; 2^x.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sagetrain {

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename T>
constexpr float LARGEST = std::is_same_v<T, __half> ? 65504.f : 0x1.fep127f;
template <typename T>
__device__ __forceinline__ uint32_t pack16(float lo, float hi) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    __half2 pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<uint32_t&>(pair);
  }
}

// Channel d of eight.
template <typename T>
__device__ __forceinline__ float element(const uint4& x, int d) {
  const uint32_t word = d < 2 ? x.x : d < 4 ? x.y : d < 6 ? x.z : x.w;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(d % 2 ? word & 0xffff0000 : word << 16);
  else return __half2float(__ushort_as_half(static_cast<unsigned short>(d % 2 ? word >> 16 : word & 0xffff)));
}

// Two or eight 16-bit numbers less a mean each, rounded to 16 bits again.
template <typename T>
__device__ __forceinline__ uint32_t centre(uint32_t x, const float* mean) {
  const T* pair = reinterpret_cast<const T*>(&x);
  return pack16<T>(to_float(pair[0]) - mean[0], to_float(pair[1]) - mean[1]);
}
template <typename T>
__device__ __forceinline__ uint4 centre(const uint4& x, const float* mean) {
  return {centre<T>(x.x, mean), centre<T>(x.y, mean + 2), centre<T>(x.z, mean + 4), centre<T>(x.w, mean + 6)};
}

}  // namespace sagetrain

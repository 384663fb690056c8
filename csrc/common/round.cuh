// Rounding to 8 bits by adding a large number, by thresholds or to the nearest, the scales that go with it, and the powers of two and limits that
// keep both finite.
#pragma once
#include <cuda_fp16.h>

#include <cstdint>

#include "numbers.cuh"

namespace sagetrain {

// An INT32 accumulator that starts at MAGIC has, read as a float, the value 12582912 + n: no conversion is needed.
constexpr int MAGIC = 0x4B400000;
constexpr float MAGIC_FLOAT = 12582912.f;  // 3 * 2^22

// Adding 1536 to an integer |n| <= 255 held in a half leaves n in the low byte (two's complement). Takes the four low
// bytes of two such pairs: {x.lo, x.hi, y.lo, y.hi}.
constexpr float MAGIC_HALF = 1536.f;
__device__ __forceinline__ uint32_t low_bytes(__half2 x, __half2 y) {
  return __byte_perm(reinterpret_cast<uint32_t&>(x), reinterpret_cast<uint32_t&>(y), 0x6420);
}

// Thresholds. P and dS are not rounded to the nearest integer, by which most of them would become 0, but up where their fraction is above a
// threshold: where these are spread evenly, sums are right on average. x + shift is rounded to the nearest, |shift| < 1/2: zeros stay zeros. Of two
// neighbours one takes a shift, the other its opposite.
//
// A word has two thresholds, of columns 2t and 2t + 1, in the low 10 bits of each half, of which the last is not used. Words are added where two
// things have a say; what leaves the 10 bits is dropped. So content of the sequence comes in: a pattern of positions alone leaves twice the bias.
constexpr uint32_t THRESHOLD_BITS = 0x3ff;
constexpr uint32_t GOLDEN = 0x9E3779B9;  // 2^32 over the golden ratio: multiples of it spread evenly, however many
constexpr float P_LEVELS = 254.5f, DS_LEVELS = 126.5f;  // of the largest number, in halves: with a shift it is still a byte
constexpr uint32_t NEXT_TILE = 0x02790279;  // 633 / 1024, next to the golden ratio: what both of a word go on by, from tile to tile or every 32 keys
// The thresholds of lane t of four and of a row or tile of this number: the eight of the lanes are an eighth apart.
__device__ __forceinline__ uint32_t thresholds_of(int number, int t) {
  const uint32_t first = (static_cast<uint32_t>(number) * GOLDEN >> 22) + 256 * t;
  return (first & THRESHOLD_BITS) | ((first + 128) & THRESHOLD_BITS) << 16;
}
__device__ __forceinline__ __half2 shifts_of(uint32_t thresholds) {
  const uint32_t above_one = (thresholds & 0x03fe03fe) | 0x3c013c01;  // halves, 1 to 2: odd multiples of 2^-10
  return __hsub2(reinterpret_cast<const __half2&>(above_one), __float2half2_rn(1.5f));
}
// 1536 + x * inverse by a threshold.
__device__ __forceinline__ __half2 round_halves(__half2 x, __half2 inverse, __half2 shift) {
  return __hadd2(__hfma2(x, inverse, shift), __float2half2_rn(MAGIC_HALF));
}

// Keeps 22 bits of a scale, so that MAGIC_FLOAT * scale is exact.
__device__ __forceinline__ float scale22(float x) { return __int_as_float(__float_as_int(x) & ~3); }

constexpr float AMAX_MIN = 0x1p-100f, AMAX_MAX = 0x1p55f;  // keeps scales and their products finite
constexpr int EXPONENT_MIN = -100;  // of a row of dO: smaller rows are divided by 2^-100
constexpr int NONE = -100000;       // exponent of a row, or a bound, of zeros
constexpr int UNBOUNDED = 100000;   // ... and of one that is not finite
constexpr uint32_t INFINITE = 0x7f800000, SMALLEST_NORMAL = 0x00800000;

__device__ __forceinline__ float nan_float() { return __int_as_float(0x7fffffff); }
__device__ __forceinline__ float infinity() { return __int_as_float(INFINITE); }
// Bits of the magnitude: as integers they are ordered like the magnitudes, then Inf, then NaN; a maximum keeps them.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffff; }
__device__ __forceinline__ bool is_finite(float x) { return magnitude(x) < INFINITE; }
__device__ __forceinline__ float clamp(float x, float limit) { return x > limit ? limit : x < -limit ? -limit : x; }  // NaN stays
__device__ __forceinline__ float saturate(float x, float limit) { return fminf(fmaxf(x, -limit), limit); }  // NaN does not

// ---------------------------------------------------------------------------------------------------- powers of two

__device__ __forceinline__ float exp2_int(int n) { return __int_as_float((n + 127) << 23); }  // -126 <= n <= 127

// x * 2^n in two steps, because 2^n alone may not fit a float. Exact unless the result leaves the normal numbers.
__device__ __forceinline__ float scale_by(float x, int n) {
  n = min(max(n, -252), 252);
  return x * exp2_int(n >> 1) * exp2_int(n - (n >> 1));
}

// ceil(log2(a * b)) of finite a, b >= 0, without overflow; NONE where either is 0.
__device__ __forceinline__ int ceil_log2(float a, float b) {
  const uint32_t x = magnitude(a), y = magnitude(b);
  if (x < SMALLEST_NORMAL || y < SMALLEST_NORMAL) return NONE;
  const auto mantissa = [](uint32_t bits) { return __uint_as_float((bits & 0x7fffff) | 0x3f800000); };
  const uint32_t product = __float_as_uint(mantissa(x) * mantissa(y));  // 1 to 4
  return static_cast<int>((x >> 23) + (y >> 23) + (product >> 23) + ((product & 0x7fffff) != 0)) - 3 * 127;
}

// A normal x > 0 is mantissa(x) * 2^exponent_of(x), 1 <= mantissa < 2.
__device__ __forceinline__ int exponent_of(float x) { return static_cast<int>(magnitude(x) >> 23) - 127; }
__device__ __forceinline__ float mantissa(float x) { return __uint_as_float((magnitude(x) & 0x7fffff) | 0x3f800000); }

// floor(log2(.)) of the magnitude of these bits, at least EXPONENT_MIN; NONE of zero, UNBOUNDED where it is not finite.
__device__ __forceinline__ int row_exponent(uint32_t amax) {
  if (amax >= INFINITE) return UNBOUNDED;
  return amax < SMALLEST_NORMAL ? NONE : max(static_cast<int>(amax >> 23) - 127, EXPONENT_MIN);
}
__device__ __forceinline__ bool is_number(int exponent) { return exponent != NONE && exponent != UNBOUNDED; }

// log2 of what a row's dP and delta are in units of: its dO, or where that is zero its d_lse.
__device__ __forceinline__ int dp_exponent(int exponent, float d_lse) {
  if (exponent == NONE) exponent = row_exponent(magnitude(d_lse));
  return is_number(exponent) ? exponent : 0;
}

// ---------------------------------------------------------------------------------------------------- scales

struct Scale {
  float scale, inverse;  // NaN scale where the values are not finite; the inverse is always finite
};
__device__ __forceinline__ Scale int8_scale(float amax, bool finite) {
  const float scale = scale22(fminf(fmaxf(amax, AMAX_MIN), AMAX_MAX) * (1.f / 127.f));
  return {finite ? scale : nan_float(), 1.f / scale};
}

// What values about `mean`, at most amax away from it, are centred by in 16 bits: the mean, or what is nearest to it of the numbers of which all
// values are 1/2 to 2, for then every difference is exact (Sterbenz); 0 where there is none. These are (|mean| + amax) / 2 to 2 (|mean| - amax), there
// are some up to amax = 0.6 |mean|, and rounding wants a margin. A rounding error that values have in common is no noise.
template <typename T>
__device__ __forceinline__ float centre_of(float mean, float amax) {
  const float size = fabsf(mean), centre = fminf(fminf(size, 1.95f * (size - amax)), LARGEST<T>);  // a mean of samples may be larger than any value
  const uint32_t rounded = pack16<T>(copysignf(centre, mean), 0.f);
  return amax <= 0.58f * size ? to_float(reinterpret_cast<const T&>(rounded)) : 0.f;
}

// Low bytes of four floats that are MAGIC_FLOAT + integer: the integers.
__device__ __forceinline__ uint32_t pack_bytes(float a, float b, float c, float d) {
  const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

}  // namespace sagetrain

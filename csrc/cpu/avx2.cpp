// AVX2 + FMA + F16C. Integers travel as int16 pairs: vpmaddwd multiplies 16 and adds them in twos, exactly.
// (vpmaddubsw would take bytes, but 255 * 127 * 2 saturates its 16-bit sums.)
//
// Cost: 2 instructions for 16 multiply-adds, so 32 a cycle where two of the four vector pipes multiply (Zen 3): twice
// the rate of fp32 FMA. dP runs in fp32.
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace sagetrain::cpu {
namespace {

constexpr int W = 8, G = 2, U = 0, MR = 6;
typedef int16_t elem;
typedef __m256i vop;
typedef int32_t vacc __attribute__((vector_size(32)));  // not __m256i: GCC 12 copies at every change of element type
constexpr bool kHalfDot = false;

#include "simd.inl"

SAGE_INLINE vop load_op(const elem* p) { return _mm256_loadu_si256((const __m256i*)p); }
SAGE_INLINE vop broadcast_op(const elem* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm256_set1_epi32(x);
}
// In assembly because 16 registers are exactly enough: given the intrinsics, GCC hoists the multiplications, runs out
// of registers and carries an accumulator through memory, at a third of the speed.
template <bool>
SAGE_INLINE vacc dot(vacc acc, vop lanes, vop row) {
  return acc + (vacc)_mm256_madd_epi16(lanes, row);
}
SAGE_INLINE vacc acc_splat(int32_t x) { return (vacc)_mm256_set1_epi32(x); }
SAGE_INLINE vacc acc_load(const int32_t* p) { return (vacc)_mm256_loadu_si256((const __m256i*)p); }
SAGE_INLINE vf to_float(vacc x) { return (vf)_mm256_cvtepi32_ps((__m256i)x); }
SAGE_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
SAGE_INLINE vf vmax(vf a, vf b) { return (vf)_mm256_max_ps((__m256)a, (__m256)b); }
SAGE_INLINE vf vmin(vf a, vf b) { return (vf)_mm256_min_ps((__m256)a, (__m256)b); }
SAGE_INLINE vi umax(vi a, vi b) { return (vi)_mm256_max_epu32((__m256i)a, (__m256i)b); }
SAGE_INLINE bool any(vi mask) { return _mm256_movemask_ps((__m256)mask) != 0; }
SAGE_INLINE int32_t hmax(vi x) {
  __m128i y = _mm_max_epu32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  y = _mm_max_epu32(y, _mm_shuffle_epi32(y, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epu32(y, _mm_shuffle_epi32(y, 0xb1)));
}
SAGE_INLINE vf exp2(vf x) { return exp2_by_shift(x); }
SAGE_INLINE vf round_even(vf x) {
  return (vf)_mm256_round_ps((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SAGE_INLINE void pack_rows(elem* dst, const vf (&x)[G]) {
  const __m256i low = _mm256_cvtps_epi32((__m256)x[0]), high = _mm256_cvtps_epi32((__m256)x[1]);
  _mm256_storeu_si256((__m256i*)dst, _mm256_blend_epi16(low, _mm256_slli_epi32(high, 16), 0xaa));
}
SAGE_INLINE void pack_signed(elem* dst, const vf (&x)[G]) { pack_rows(dst, x); }
template <class F>
SAGE_INLINE void pack_lanes(elem* dst, F row) {
  for (int i = 0; i < T; i += 2 * W) {
    const __m256i a = _mm256_cvtps_epi32((__m256)row(i)), b = _mm256_cvtps_epi32((__m256)row(i + W));
    const __m256i packed = _mm256_packs_epi32(a, b);  // 64-bit quarters a0 b0 a1 b1
    _mm256_storeu_si256((__m256i*)(dst + i), _mm256_permute4x64_epi64(packed, 0xd8));
  }
}
void half_to_float8(const uint16_t* src, float* dst) {
  _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)src)));
}
void float_to_half8(const float* src, uint16_t* dst) {
  _mm_storeu_si128((__m128i*)dst, _mm256_cvtps_ph(_mm256_loadu_ps(src), _MM_FROUND_TO_NEAREST_INT));
}
bool half_dot() { return false; }
[[maybe_unused]] SAGE_INLINE vf dot_bf16(vf acc, const uint16_t*, const uint16_t*) { return acc; }

#include "quantise.inl"
#include "forward.inl"
#include "backward.inl"

}  // namespace

const Kernel kAvx2 = {"avx2", forward_bytes, backward_bytes, run_forward, run_backward};

}  // namespace sagetrain::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

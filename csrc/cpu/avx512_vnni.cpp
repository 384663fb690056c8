// AVX-512 with VNNI: vpdpbusd does 64 u8 x s8 multiply-adds an instruction, 64 a cycle on Zen 4, 128 on server Intel.
// dP runs on vdpbf16ps where the CPU has it (half_dot), else, and for fp16 and fp32 tensors, on fp32 FMA.
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__(( \
    target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,f16c"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own _mm512_undefined_ps (GCC bug 105593)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16,f16c")
#endif

namespace sagetrain::cpu {
namespace {

constexpr int W = 16, G = 4, U = 128, MR = 8;
typedef uint8_t elem;
typedef __m512i vop;
typedef int32_t vacc __attribute__((vector_size(64)));  // not __m512i: GCC 12 copies at every change of element type
constexpr bool kHalfDot = true;

#include "simd.inl"

SAGE_INLINE vop load_op(const elem* p) { return _mm512_loadu_si512(p); }
SAGE_INLINE vop broadcast_op(const elem* p) {
  int32_t x;
  __builtin_memcpy(&x, p, 4);
  return _mm512_set1_epi32(x);
}
template <bool kRowUnsigned>
SAGE_INLINE vacc dot(vacc acc, vop lanes, vop row) {
  return (vacc)_mm512_dpbusd_epi32((__m512i)acc, kRowUnsigned ? row : lanes, kRowUnsigned ? lanes : row);
}
SAGE_INLINE vacc acc_splat(int32_t x) { return (vacc)_mm512_set1_epi32(x); }
SAGE_INLINE vacc acc_load(const int32_t* p) { return (vacc)_mm512_loadu_si512(p); }
SAGE_INLINE vf to_float(vacc x) { return (vf)_mm512_cvtepi32_ps((__m512i)x); }
SAGE_INLINE vf fma(vf a, vf b, vf c) { return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
SAGE_INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
SAGE_INLINE vf vmin(vf a, vf b) { return (vf)_mm512_min_ps((__m512)a, (__m512)b); }
SAGE_INLINE vi umax(vi a, vi b) { return (vi)_mm512_max_epu32((__m512i)a, (__m512i)b); }
SAGE_INLINE bool any(vi mask) { return _mm512_movepi32_mask((__m512i)mask) != 0; }
SAGE_INLINE int32_t hmax(vi x) { return (int32_t)_mm512_reduce_max_epu32((__m512i)x); }
SAGE_INLINE vf exp2(vf x) {  // 2^x = 2^(x - floor(x)) * 2^floor(x): vreduceps and vscalefps do both ends
  const vf r = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const vf p = polynomial(r, 0.6931512951850891f, 0.24016444385051727f, 0.05579991266131401f, 0.009017030708491802f,
                          0.0018671300495043397f);
  return (vf)_mm512_scalef_ps((__m512)p, (__m512)x);
}
SAGE_INLINE vf round_even(vf x) {
  return (vf)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// Four vectors of int32 to bytes; every 128-bit lane then holds 4 bytes of each.
SAGE_INLINE __m512i bytes_unsigned(__m512i a, __m512i b, __m512i c, __m512i d) {
  return _mm512_packus_epi16(_mm512_packus_epi32(a, b), _mm512_packus_epi32(c, d));
}
SAGE_INLINE __m512i bytes_signed(__m512i a, __m512i b, __m512i c, __m512i d) {
  return _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
}
SAGE_INLINE __m512i to_int(vf x) { return _mm512_cvtps_epi32((__m512)x); }
SAGE_INLINE void store_groups(elem* dst, __m512i bytes) {  // transposes the 4 x 4 bytes of each 128-bit lane
  const __m512i order = _mm512_set4_epi32(0x0f0b0703, 0x0e0a0602, 0x0d090501, 0x0c080400);
  _mm512_storeu_si512(dst, _mm512_shuffle_epi8(bytes, order));
}
SAGE_INLINE void pack_rows(elem* dst, const vf (&x)[G]) {
  store_groups(dst, bytes_unsigned(to_int(x[0]), to_int(x[1]), to_int(x[2]), to_int(x[3])));
}
SAGE_INLINE void pack_signed(elem* dst, const vf (&x)[G]) {
  store_groups(dst, bytes_signed(to_int(x[0]), to_int(x[1]), to_int(x[2]), to_int(x[3])));
}
template <class F>
SAGE_INLINE void pack_lanes(elem* dst, F row) {
  static_assert(T == 4 * W, "one store a row");
  __m512i x[4];
  for (int i = 0; i < 4; ++i) x[i] = to_int(row(i * W));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_storeu_si512(dst, _mm512_permutexvar_epi32(order, bytes_unsigned(x[0], x[1], x[2], x[3])));
}
void half_to_float8(const uint16_t* src, float* dst) {
  _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)src)));
}
void float_to_half8(const float* src, uint16_t* dst) {
  _mm_storeu_si128((__m128i*)dst, _mm256_cvtps_ph(_mm256_loadu_ps(src), _MM_FROUND_TO_NEAREST_INT));
}
bool half_dot() { return __builtin_cpu_supports("avx512bf16"); }
SAGE_INLINE vf dot_bf16(vf acc, const uint16_t* lanes, const uint16_t* row) {
  int32_t pair;
  __builtin_memcpy(&pair, row, 4);
  return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)_mm512_loadu_si512(lanes), (__m512bh)_mm512_set1_epi32(pair));
}

#include "quantise.inl"
#include "forward.inl"
#include "backward.inl"

}  // namespace

const Kernel kAvx512Vnni = {"avx512_vnni", forward_bytes, backward_bytes, run_forward, run_backward};

}  // namespace sagetrain::cpu
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

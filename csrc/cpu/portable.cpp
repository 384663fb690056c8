// Any CPU, any compiler with vector extensions: operands are integers held as floats. Every sum of products stays
// below 2^24 (127 * 127 * 128, 255 * 127 * 64), so fp32 arithmetic is exact and fast on whatever vectors there are.
#include "kernel.h"

namespace sagetrain::cpu {
namespace {

constexpr int W = 4, G = 1, U = 0, MR = 4;
typedef float elem;
typedef float vop __attribute__((vector_size(4 * W)));
typedef vop vacc;
constexpr bool kHalfDot = false;

#include "simd.inl"

SAGE_INLINE vop load_op(const elem* p) { return load(p); }
SAGE_INLINE vop broadcast_op(const elem* p) { return splat(*p); }
template <bool>
SAGE_INLINE vacc dot(vacc acc, vop lanes, vop row) { return acc + lanes * row; }
SAGE_INLINE vacc acc_splat(int32_t x) { return splat((float)x); }
SAGE_INLINE vacc acc_load(const int32_t* p) { return vf{(float)p[0], (float)p[1], (float)p[2], (float)p[3]}; }
SAGE_INLINE vf to_float(vacc x) { return x; }
SAGE_INLINE vf fma(vf a, vf b, vf c) { return a * b + c; }
SAGE_INLINE vf vmax(vf a, vf b) { return select(a > b, a, b); }
SAGE_INLINE vf vmin(vf a, vf b) { return select(a < b, a, b); }
SAGE_INLINE vi umax(vi a, vi b) {
  const vi mask = (a ^ INT32_MIN) > (b ^ INT32_MIN);  // flipping the sign bit makes a signed comparison unsigned
  return (a & mask) | (b & ~mask);
}
SAGE_INLINE bool any(vi mask) { return (mask[0] | mask[1] | mask[2] | mask[3]) != 0; }
SAGE_INLINE int32_t hmax(vi x) {
  const vi y = umax(x, vi{x[2], x[3], x[0], x[1]});
  return umax(y, vi{y[1], y[0], y[3], y[2]})[0];
}
SAGE_INLINE vf exp2(vf x) { return exp2_by_shift(x); }
SAGE_INLINE vf round_even(vf x) { return (x + 12582912.0f) - 12582912.0f; }
SAGE_INLINE vf to_elem(vf x) {  // saturates, as packing to integers does
  return round_even(vmax(splat(-256.0f), vmin(splat(256.0f), x)));
}
SAGE_INLINE void pack_rows(elem* dst, const vf (&x)[G]) { store(dst, to_elem(x[0])); }
SAGE_INLINE void pack_signed(elem* dst, const vf (&x)[G]) { pack_rows(dst, x); }
template <class F>
SAGE_INLINE void pack_lanes(elem* dst, F row) {
  for (int i = 0; i < T; i += W) store(dst + i, to_elem(row(i)));
}
// IEEE half precision by the bits: normal numbers are an exponent shift, the rest is scaled.
void half_to_float8(const uint16_t* src, float* dst) {
  for (int i = 0; i < 8; ++i) {
    const uint32_t sign = (uint32_t)(src[i] & 0x8000) << 16, magnitude = src[i] & 0x7fff;
    uint32_t u = magnitude << 13;
    float f;
    if (magnitude >= 0x7c00) {
      u |= 0x7f800000;  // Inf, NaN
      __builtin_memcpy(&f, &u, 4);
    } else {
      __builtin_memcpy(&f, &u, 4);
      f *= 0x1p112f;  // moves the exponent bias from 15 to 127; subnormals come out normal
    }
    __builtin_memcpy(&u, &f, 4);
    u |= sign;
    __builtin_memcpy(dst + i, &u, 4);
  }
}
void float_to_half8(const float* src, uint16_t* dst) {
  for (int i = 0; i < 8; ++i) {
    uint32_t u;
    __builtin_memcpy(&u, src + i, 4);
    const uint32_t sign = (u >> 16) & 0x8000;
    uint32_t magnitude = u & 0x7fffffff, half;
    if (magnitude > 0x7f800000) {
      half = 0x7e00;  // NaN
    } else if (magnitude >= 0x477ff000) {
      half = 0x7c00;  // rounds to 65536 or more: Inf
    } else if (magnitude < 0x38800000) {  // subnormal: let fp32 round at 2^-24
      float f;
      __builtin_memcpy(&f, &magnitude, 4);
      f += 0.5f;
      __builtin_memcpy(&half, &f, 4);
      half -= 0x3f000000;
    } else {
      magnitude += 0xfff + ((magnitude >> 13) & 1);
      half = (magnitude - 0x38000000) >> 13;
    }
    dst[i] = (uint16_t)(sign | half);
  }
}
bool half_dot() { return false; }
[[maybe_unused]] SAGE_INLINE vf dot_bf16(vf acc, const uint16_t*, const uint16_t*) { return acc; }

#include "quantise.inl"
#include "forward.inl"
#include "backward.inl"

}  // namespace

const Kernel kPortable = {"portable", forward_bytes, backward_bytes, run_forward, run_backward};

}  // namespace sagetrain::cpu

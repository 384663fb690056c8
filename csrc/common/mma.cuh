// Operands and accumulators of mma.m16n8 in registers, which are also those of a warp's 16 rows in wgmma: what is done with them between
// and after products.
//
// Layouts of mma.m16n8 (lane = 4 * group + t, so group = lane / 4 and t = lane % 4):
//
//   A, 16 x 32 bytes (or 16 x 16 halves): register 0 holds row `group`, bytes 4t..4t+3 (halves 2t, 2t+1);
//      register 1 the same of row group + 8; registers 2 and 3 the same two rows, 16 bytes (8 halves) further on.
//   B, 32 bytes x 8 (16 halves x 8): register 0 holds column `group`, bytes 4t..4t+3; register 1 is 16 bytes further on.
//   C and D, 16 x 8: {c0, c1} are row `group`, columns 2t and 2t+1; {c2, c3} the same columns of row group + 8.
#pragma once
#include "copy.cuh"
#include "launch.cuh"
#include "numbers.cuh"
#include "round.cuh"

namespace sagetrain {

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8. Register m then holds, of matrix m,
// row `group`, bytes 4t..4t+3: a B operand (or a quarter of an A operand).
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// The largest of the rows r (low half) and r + 8 (high half) of a warp tile; x[i] has two columns of both. NaN stays NaN.
template <int n>
__device__ __forceinline__ __half2 row_tops(const __half2 (&x)[n][2], bool is_signed) {
  __half2 top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = is_signed ? __habs2(x[0][r]) : x[0][r];
#pragma unroll
    for (int i = 1; i < n; ++i) top[r] = __hmax2_nan(top[r], is_signed ? __habs2(x[i][r]) : x[i][r]);
  }
  __half2 both = __hmax2_nan(__lows2half2(top[0], top[1]), __highs2half2(top[0], top[1]));
  both = __hmax2_nan(both, __shfl_xor_sync(~0u, both, 1));
  return __hmax2_nan(both, __shfl_xor_sync(~0u, both, 2));
}

// The two halves, or zeros in their place.
__device__ __forceinline__ __half2 keep(__half2 x, bool low, bool high) {
  const uint32_t bits = reinterpret_cast<uint32_t&>(x) & ((low ? 0xFFFFu : 0u) | (high ? 0xFFFF0000u : 0u));
  return reinterpret_cast<const __half2&>(bits);
}

// Rounds 32 columns (four 8-column tiles) to 8 bits: an A operand. Neighbouring tiles take a shift and its opposite, and so do the two rows, and the
// two halves: in dS of dQ on sm90 these are keys beside each other.
__device__ __forceinline__ void to_operand(uint32_t (&a)[4], const __half2 (*x)[2], const __half2 (&inverse)[2], __half2 shift) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const bool opposite = half != r;
      a[2 * half + r] = low_bytes(round_halves(x[2 * half][r], inverse[r], opposite ? __hneg2(shift) : shift),
                                  round_halves(x[2 * half + 1][r], inverse[r], opposite ? shift : __hneg2(shift)));
    }
}

// Writes a row of a 16-bit tensor from an accumulator: word(n) is this lane's two columns of 8-column tile n. The four lanes of
// the row exchange them, so that lane t has whole tiles 4 i + t and writes 16 bytes at a time. Every lane of the warp calls.
template <int tiles, typename Word>
__device__ __forceinline__ void store_row(void* row, bool valid, int columns, Word word) {
  const int t = thread_number() % 4;
#pragma unroll
  for (int n = 0; n < tiles; n += 4) {
    uint32_t x[4] = {word(n), word(n + 1), word(n + 2), word(n + 3)};
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (!(i & bit)) {
          const uint32_t other = __shfl_xor_sync(~0u, t & bit ? x[i] : x[i + bit], bit);
          x[i] = t & bit ? other : x[i], x[i + bit] = t & bit ? x[i + bit] : other;
        }
    if (valid && (n + t) * 8 < columns) reinterpret_cast<uint4*>(row)[n + t] = uint4{x[0], x[1], x[2], x[3]};
  }
}

}  // namespace sagetrain

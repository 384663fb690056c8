// Products of A operands in registers with matrices in shared memory, a few 8-column tiles at a time.
//
// An mma result is ready about 33 cycles after its issue and the tensor core takes a new one every 6: a chain that
// accumulates over k would wait most of the time. So k is the outer loop, and between two links of a chain lie the
// others `in flight`: tiles of columns x 16-row tiles of the warp, as many as the registers allow.
#pragma once
#include "../common/mma.cuh"

namespace sagetrain::sm80 {

// Copies `bytes` contiguous bytes by `threads` threads.
template <int bytes, int threads>
__device__ __forceinline__ void copy_run(uint32_t to, const void* from) {
  static_assert(bytes % 16 == 0);
  const char* source = static_cast<const char*>(from) + threadIdx.x * 16;
  to += threadIdx.x * 16;
#pragma unroll
  for (int i = 0; i < bytes / 16; i += threads)
    if (i + threads <= bytes / 16 || threadIdx.x < bytes / 16 - i) copy16(to + 16 * i, source + 16 * i);
}

__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

__device__ __forceinline__ void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

template <typename T>
__device__ __forceinline__ void mma_16bit(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

// Where a lane's row of the matrices that it loads lies in its 8-row tile, by 16-byte chunk 4 half + lane / 8.
template <int row_bytes>
__device__ __forceinline__ int lane_offset(int half = 0) {
  return swizzle<row_bytes>(threadIdx.x % 8, threadIdx.x % 32 / 8 + 4 * half);
}

// A operand of 16 rows from a row-major byte matrix in global memory; row r of `rows` is this lane's `group + 8 r`.
// Bytes from `limit` on are zeros.
template <int k_steps>
__device__ __forceinline__ void load_operand(uint32_t (&a)[k_steps][4], const void* const (&rows)[2], const bool (&valid)[2], int t, int limit) {
#pragma unroll
  for (int k = 0; k < k_steps; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int byte = 32 * k + 16 * half + 4 * t;
        a[k][2 * half + r] = valid[r] && byte < limit ? *reinterpret_cast<const uint32_t*>(static_cast<const char*>(rows[r]) + byte) : 0;
      }
}

// y = MAGIC + a B^T for `tiles` x 8 columns; a: 32 bytes a k-step, signed or (u8) unsigned; B: rows of row_bytes at
// `columns`, a column of the result each.
template <bool u8, int row_bytes, int tiles, int m, int k_steps>
__device__ __forceinline__ void product_int8(int (&y)[tiles][m][4], const uint32_t (&a)[m][k_steps][4], uint32_t columns) {
  const int magic[4] = {MAGIC, MAGIC, MAGIC, MAGIC};
#pragma unroll
  for (int k = 0; k < k_steps; k += 2) {
    const uint32_t from = columns + lane_offset<row_bytes>(k / 2);
    uint32_t b[tiles][4];
#pragma unroll
    for (int n = 0; n < tiles; ++n) load_matrices(b[n], from + n * 8 * row_bytes);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < m; ++i) {
          if (k + half == 0)
            u8 ? mma_u8s8(y[n][i], a[i][0], b[n][0], b[n][1], magic) : mma_s8(y[n][i], a[i][0], b[n][0], b[n][1], magic);
          else
            u8 ? mma_u8s8(y[n][i], a[i][k + half], b[n][2 * half], b[n][2 * half + 1], y[n][i])
               : mma_s8(y[n][i], a[i][k + half], b[n][2 * half], b[n][2 * half + 1], y[n][i]);
        }
  }
}

// A operands of dP: in registers, or read from a swizzled tile in shared memory whenever they are needed.
template <int m, int k_steps>
struct InRegisters {
  const uint32_t (&a)[m][k_steps][4];
  __device__ __forceinline__ void get(uint32_t (&to)[4], int i, int k) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) to[j] = a[i][k][j];
  }
};
template <int row_bytes>
struct InShared {
  uint32_t rows;  // of this warp
  int thread = threadIdx.x;
  __device__ __forceinline__ void get(uint32_t (&to)[4], int i, int k) const {
    load_matrices(to, rows + i * 16 * row_bytes + swizzle<row_bytes>(thread % 16, 2 * k + thread % 32 / 16));
  }
};

// y = start (a value per row) + a B^T, 16-bit operands: 16 numbers a k-step.
template <typename T, int row_bytes, int k_steps, int tiles, int m, typename Rows>
__device__ __forceinline__ void product_16bit(float (&y)[tiles][m][4], const Rows& rows, uint32_t columns, const float (&start)[m][2]) {
#pragma unroll
  for (int k = 0; k < k_steps; k += 2) {
    const uint32_t from = columns + lane_offset<row_bytes>(k / 2 % 2) + k / 4 * 128;
    uint32_t a[2][m][4], b[tiles][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < m; ++i) rows.get(a[half][i], i, k + half);
#pragma unroll
    for (int n = 0; n < tiles; ++n) load_matrices(b[n], from + n * 8 * row_bytes);
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int n = 0; n < tiles; ++n)
#pragma unroll
        for (int i = 0; i < m; ++i) {
          if (k + half == 0) {
            const float c[4] = {start[i][0], start[i][0], start[i][1], start[i][1]};
            mma_16bit<T>(y[n][i], a[half][i], b[n][0], b[n][1], c);
          } else {
            mma_16bit<T>(y[n][i], a[half][i], b[n][2 * half], b[n][2 * half + 1], y[n][i]);
          }
        }
  }
}

}  // namespace sagetrain::sm80

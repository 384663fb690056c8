// How the kernels that work once per token (rows.cuh) write matrices: as rows, and transposed through shared memory.
#pragma once
#include "copy.cuh"
#include "rows.cuh"

namespace sagetrain {

// Row `row` of a matrix with Dp channels of 8 or 16 bits: this lane's chunk i.
template <int Dp>
__device__ __forceinline__ void write_chunk(int8_t* matrix, int row, int i, const uint2& x) {
  *reinterpret_cast<uint2*>(matrix + swizzle<Dp>(row, channel_of(i) / 16) + channel_of(i) % 16) = x;
}
template <int Dp>
__device__ __forceinline__ void write_chunk(int16_t* matrix, int row, int i, const uint4& x) {
  *reinterpret_cast<uint4*>(reinterpret_cast<char*>(matrix) + swizzle<2 * Dp>(row, channel_of(i) / 8)) = x;
}

// A transposed tile in shared memory is [Dp][TILE] bytes, 16-byte chunks permuted so that no access conflicts.
__device__ __forceinline__ int transposed_byte(int channel, int chunk) {
  return channel * TILE + (chunk ^ (channel / 8 % 8) ^ (channel % 2 * 4)) * 16;
}
// This thread's word (four tokens) of its eight channels.
__device__ __forceinline__ void store_words(int8_t* tile, int i, const uint32_t (&words)[8]) {
  const int word = threadIdx.x / 8;  // 4 * warp + lane / 8
#pragma unroll
  for (int d = 0; d < 8; ++d)
    *reinterpret_cast<uint32_t*>(tile + transposed_byte(channel_of(i) + d, word / 4) + word % 4 * 4) = words[d];
}
// The tokens of a transposed tile, each times its factor and rounded.
template <int Dp, typename TokenAt>
__device__ __forceinline__ void shrink_tokens(int8_t* tile, const float* factors, TokenAt token_at) {
#pragma unroll 1
  for (int i = threadIdx.x; i < Dp * TILE / 4; i += THREADS) {
    const int channel = i / (TILE / 4), position = i % (TILE / 4) * 4;
    char4& x = *reinterpret_cast<char4*>(tile + transposed_byte(channel, position / 16) + position % 16);
    const auto times = [&](signed char value, int j) { return static_cast<signed char>(__float2int_rn(value * factors[token_at(position + j)])); };
    x = {times(x.x, 0), times(x.y, 1), times(x.z, 2), times(x.w, 3)};
  }
}
// Tokens [first, first + tokens) of the tile to a matrix of a record.
template <int Dp, int tokens>
__device__ __forceinline__ void write_transposed(int8_t* matrix, const int8_t* tile, int first) {
  constexpr int chunks = tokens / 16;
#pragma unroll
  for (int i = threadIdx.x; i < Dp * chunks; i += THREADS)
    *reinterpret_cast<uint4*>(matrix + swizzle<tokens>(i / chunks, i % chunks)) =
        *reinterpret_cast<const uint4*>(tile + transposed_byte(i / chunks, first / 16 + i % chunks));
}

// Four words of four bytes as a matrix: transposed.
__device__ __forceinline__ void transpose_bytes(uint32_t (&x)[4]) {
  const uint32_t ab = __byte_perm(x[0], x[1], 0x5140), ab_high = __byte_perm(x[0], x[1], 0x7362);
  const uint32_t cd = __byte_perm(x[2], x[3], 0x5140), cd_high = __byte_perm(x[2], x[3], 0x7362);
  x[0] = __byte_perm(ab, cd, 0x5410), x[1] = __byte_perm(ab, cd, 0x7632);
  x[2] = __byte_perm(ab_high, cd_high, 0x5410), x[3] = __byte_perm(ab_high, cd_high, 0x7632);
}

// This thread's rows of int8 to a transposed tile. paired: bytes 1 and 2 of every word change places, the order of paired_token_at (sm80/layout.cuh).
template <int n>
__device__ __forceinline__ void transpose_rows(int8_t* tile, const uint2 (&x)[ROWS][n], bool paired = false) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    uint32_t words[8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // four channels of four rows
      uint32_t rows[4];
#pragma unroll
      for (int j = 0; j < ROWS; ++j) rows[j] = half ? x[j][i].y : x[j][i].x;
      transpose_bytes(rows);
#pragma unroll
      for (int d = 0; d < 4; ++d) words[4 * half + d] = paired ? __byte_perm(rows[d], 0, 0x3120) : rows[d];
    }
    store_words(tile, i, words);
  }
}

}  // namespace sagetrain

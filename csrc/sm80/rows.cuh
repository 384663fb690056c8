// How the kernels that work once per token hold a tile, and what they share: loads, reductions, rounding, records.
//
// One block of 256 threads per (tile, head), heads fastest. A row is the business of eight lanes, lane % 8 = c has
// channels 64 i + 8 c .. + 7 (16 bytes), and a thread has the four rows
//
//       16 * warp + 2 * (lane / 8) + {0, 1, 8, 9}        the tokens of one 32-bit word of a permuted transposed tile
//
// so that reductions over a row are three shuffles, and a transposed word is packed from a thread's own registers.
#pragma once
#include <cfloat>
#include <cstdio>
#include <type_traits>

#include "layout.cuh"

namespace sagetrain::sm80 {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / 32;
constexpr int ROWS = 4;  // of a thread
static_assert(WARPS * 4 * ROWS == TILE);

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
__device__ __forceinline__ int unit_exponent(int exponent, float d_lse) {
  if (exponent == NONE) exponent = row_exponent(magnitude(d_lse));
  return is_number(exponent) ? exponent : 0;
}

// ---------------------------------------------------------------------------------------------------- rows of a tile

__device__ __forceinline__ int lane_chunk() { return threadIdx.x % 8; }
__device__ __forceinline__ int tile_row(int j) {
  return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 8 * 2 + (j & 1) + (j >> 1) * 8;
}
__device__ __forceinline__ int channel_of(int i) { return 64 * i + 8 * lane_chunk(); }

template <typename T>
__device__ __forceinline__ const T* at(const void* x, const Strides& s, int batch, int head, int token) {
  return static_cast<const T*>(x) + batch * s.batch + head * s.head + token * s.token;
}

// This thread's rows and channels of a tile; zeros past the last row and the last channel.
template <typename T>
__device__ __forceinline__ uint4 load_chunk(const T* from, int64_t stride, int j, int i, int rows, int dim) {
  const bool valid = tile_row(j) < rows && channel_of(i) < dim;
  return valid ? *reinterpret_cast<const uint4*>(from + tile_row(j) * stride + channel_of(i)) : uint4{0, 0, 0, 0};
}
template <typename T, int n>
__device__ __forceinline__ void load_rows(uint4 (&x)[ROWS][n], const T* from, int64_t stride, int rows, int dim) {
#pragma unroll
  for (int j = 0; j < ROWS; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i) x[j][i] = load_chunk(from, stride, j, i, rows, dim);
}
template <int n>
__device__ __forceinline__ void load_rows(uint2 (&x)[ROWS][n], const int8_t* from, int rows) {  // contiguous int8 rows
#pragma unroll
  for (int j = 0; j < ROWS; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i)
      x[j][i] = tile_row(j) < rows ? *reinterpret_cast<const uint2*>(from + tile_row(j) * (64 * n) + channel_of(i)) : uint2{0, 0};
}

// Channel d of eight.
template <typename T>
__device__ __forceinline__ float element(const uint4& x, int d) {
  const uint32_t word = d < 2 ? x.x : d < 4 ? x.y : d < 6 ? x.z : x.w;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) return __uint_as_float(d % 2 ? word & 0xffff0000 : word << 16);
  else return __half2float(__ushort_as_half(static_cast<unsigned short>(d % 2 ? word >> 16 : word & 0xffff)));
}

// This lane's eight channels of chunk i, from a [Dp] array in shared memory.
__device__ __forceinline__ void load_channels(float (&to)[8], const float* from, int i, float factor) {
#pragma unroll
  for (int d = 0; d < 8; d += 4) {
    const float4 x = *reinterpret_cast<const float4*>(from + channel_of(i) + d);
    to[d] = x.x * factor, to[d + 1] = x.y * factor, to[d + 2] = x.z * factor, to[d + 3] = x.w * factor;
  }
}

struct Add { __device__ __forceinline__ float operator()(float x, float y) const { return x + y; } };
struct Max {
  __device__ __forceinline__ float operator()(float x, float y) const { return fmaxf(x, y); }
  template <typename X>
  __device__ __forceinline__ X operator()(X x, X y) const { return max(x, y); }
};

template <typename X, typename F>
__device__ __forceinline__ X fold_row(X x, F fold) {  // over the eight lanes of a row
#pragma unroll
  for (int m = 1; m < 8; m *= 2) x = fold(x, __shfl_xor_sync(~0u, x, m));
  return x;
}

// Largest of the warps' values in [first, first + count).
template <int count, typename X>
__device__ __forceinline__ X largest(const X* x, int first) {
  X all = x[first];
#pragma unroll
  for (int w = 1; w < count; ++w) all = max(all, x[first + w]);
  return all;
}

// Folds eight channels over the rows of a warp; the warp's results go to its row of `to` [WARPS][Dp].
template <int Dp, typename X, typename F>
__device__ __forceinline__ void fold_channels(X* to, X (&x)[8], int i, F fold) {
#pragma unroll
  for (int d = 0; d < 8; ++d) {
    x[d] = fold(x[d], __shfl_xor_sync(~0u, x[d], 8));
    x[d] = fold(x[d], __shfl_xor_sync(~0u, x[d], 16));
  }
  struct alignas(16) Four { X x[4]; };
  Four* row = reinterpret_cast<Four*>(to + threadIdx.x / 32 * Dp + channel_of(i));
  if (threadIdx.x % 32 < 8) row[0] = {{x[0], x[1], x[2], x[3]}}, row[1] = {{x[4], x[5], x[6], x[7]}};
}
template <int Dp, int count, typename X, typename F>  // over `count` warps from the first
__device__ __forceinline__ X fold_warps(const X* x, int channel, F fold) {
  X all = x[channel];
#pragma unroll
  for (int w = 1; w < count; ++w) all = fold(all, x[w * Dp + channel]);
  return all;
}

// factor * the sum of `count` rows of [Dp] floats, to total [Dp] in shared memory; always in the same order.
template <int Dp>
__device__ __forceinline__ void sum_rows(float* total, float* slices, const float* from, int count, float factor) {
  constexpr int lanes = Dp / 4, all_slices = THREADS / lanes;  // slices: [all_slices][Dp] = 4 * THREADS floats
  const int slice = threadIdx.x / lanes, channel = threadIdx.x % lanes * 4;
  float4 sum = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
  for (int i = slice; i < count; i += all_slices) {
    const float4 x = *reinterpret_cast<const float4*>(from + static_cast<int64_t>(i) * Dp + channel);
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }
  *reinterpret_cast<float4*>(slices + slice * Dp + channel) = sum;
  __syncthreads();
  if (threadIdx.x < Dp) {
    float all = 0.f;
#pragma unroll
    for (int i = 0; i < all_slices; ++i) all += slices[i * Dp + threadIdx.x];
    total[threadIdx.x] = all * factor;
  }
  __syncthreads();
}

// ---------------------------------------------------------------------------------------------------- rounding

struct Scale {
  float scale, inverse;  // NaN scale where the values are not finite; the inverse is always finite
};
__device__ __forceinline__ Scale int8_scale(float amax, bool finite) {
  const float scale = scale22(fminf(fmaxf(amax, AMAX_MIN), AMAX_MAX) * (1.f / 127.f));
  return {finite ? scale : nan_float(), 1.f / scale};
}

// Low bytes of four floats that are MAGIC_FLOAT + integer: the integers.
__device__ __forceinline__ uint32_t pack_bytes(float a, float b, float c, float d) {
  const uint32_t low = __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x0040);
  const uint32_t high = __byte_perm(__float_as_uint(c), __float_as_uint(d), 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// ---------------------------------------------------------------------------------------------------- matrices of records

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

// This thread's rows of int8 to a transposed tile. paired: bytes 1 and 2 of every word change places, the order of BlockKeys.
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

// ---------------------------------------------------------------------------------------------------- outside sequences

constexpr unsigned REST_BLOCKS = 264;  // of the kernels for tokens outside every sequence, which rarely exist

// Stops the program, with a message, where the edges of packed sequences are out of order or range.
static __device__ void check_edges(const Tokens& x, char name) {
  for (int i = threadIdx.x; i <= x.sequences; i += THREADS) {
    const int value = x.cu_seqlens[i], low = i ? x.cu_seqlens[i - 1] : 0;
    if (value < low || value > x.tokens) {
      printf("sagetrain: cu_seqlens_%c[%d] = %d after %d: must be non-decreasing and within 0..%d\n",
             name, i, value, low, x.tokens);
      __trap();
    }
  }
}

// Calls row(head, token, lane), eight lanes each, for the tokens of a packed row that belong to no sequence.
template <typename Row>
__device__ __forceinline__ void for_rest(const Tokens& x, int heads, Row row) {
  const int before = clamp_edge(x.cu_seqlens[0], x.tokens);
  const int after = max(before, clamp_edge(x.cu_seqlens[x.sequences], x.tokens)), count = before + x.tokens - after;
  const int64_t all = static_cast<int64_t>(count) * heads * 8, step = static_cast<int64_t>(gridDim.x) * THREADS;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x; i < all; i += step) {
    const int token = static_cast<int>(i / 8 % count);
    row(static_cast<int>(i / 8 / count), token < before ? token : token - before + after, static_cast<int>(i % 8));
  }
}
template <typename T>
__device__ __forceinline__ void zero_row(void* x, const Strides& s, int head, int token, int lane, int dim) {
  for (int d = 8 * lane; d < dim; d += 64)
    *reinterpret_cast<uint4*>(static_cast<T*>(x) + head * s.head + token * s.token + d) = uint4{0, 0, 0, 0};
}

// Gradients of the tokens of no sequence; stops the program where edges are wrong. Args: BackwardArgs of either architecture.
template <typename T, typename Args>
__device__ __forceinline__ void zero_rest(const Args& a) {
  if (blockIdx.x == 0) check_edges(a.queries, 'q'), check_edges(a.keys, 'k');
  const int dim = a.p.shape.head_dim;
  for_rest(a.queries, a.p.shape.heads_q,
           [&](int head, int token, int lane) { zero_row<T>(a.p.d_q, a.p.d_q_strides, head, token, lane, dim); });
  for_rest(a.keys, a.p.shape.heads_kv, [&](int head, int token, int lane) {
    zero_row<T>(a.p.d_k, a.p.d_k_strides, head, token, lane, dim);
    zero_row<T>(a.p.d_v, a.p.d_v_strides, head, token, lane, dim);
  });
}

}  // namespace sagetrain::sm80

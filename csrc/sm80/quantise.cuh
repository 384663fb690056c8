// Before the forward, once per token: means, rotation, rounding to INT8. Bound by memory: q, k and v are read once, and a
// sample of k and v before, for their means; a tile stays in registers from its load to its last use.
//
// Every backend that includes this compiles the kernels for its own architectures. So they are local to its file: two of one name would
// be one to the linker, and a device could be given the code of another.
#pragma once
#include "rows.cuh"

namespace sagetrain::sm80 {
namespace {

// ---------------------------------------------------------------------------------------------------- rows of q and k

// The signs of this lane's channels, for rows of 16-bit numbers; q and k have them before they are rotated.
__device__ __forceinline__ uint4 sign_bits(int i) {
  const uint32_t bits = static_cast<uint32_t>((i == 0 ? kSignsLow : kSignsHigh) >> 8 * lane_chunk());
  const auto pair = [&](int d) { return (bits >> d & 1) << 15 | (bits >> (d + 1) & 1) << 31; };
  return {pair(0), pair(2), pair(4), pair(6)};
}
template <int n>
__device__ __forceinline__ void change_signs(uint4 (&x)[ROWS][n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const uint4 bits = sign_bits(i);
#pragma unroll
    for (int j = 0; j < ROWS; ++j) x[j][i].x ^= bits.x, x[j][i].y ^= bits.y, x[j][i].z ^= bits.z, x[j][i].w ^= bits.w;
  }
}
__device__ __forceinline__ float change_sign(float x, int channel) {
  return (channel < 64 ? kSignsLow : kSignsHigh) >> channel % 64 & 1 ? -x : x;
}

// One row times Sylvester's Hadamard matrix, not normalised: channel bits 0-2 are registers, 3-5 lanes, 6 is i.
template <int n>
__device__ __forceinline__ void hadamard(float (&x)[n][8]) {
#pragma unroll
  for (int half = 1; half < 8; half *= 2)
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d)
        if (!(d & half)) {
          const float a = x[i][d], b = x[i][d + half];
          x[i][d] = a + b, x[i][d + half] = a - b;
        }
#pragma unroll
  for (int m = 1; m < 8; m *= 2) {
    const float sign = threadIdx.x & m ? -1.f : 1.f;
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d) x[i][d] = fmaf(x[i][d], sign, __shfl_xor_sync(~0u, x[i][d], m));
  }
#pragma unroll
  for (int d = 0; n == 2 && d < 8; ++d) {
    const float a = x[0][d], b = x[n - 1][d];
    x[0][d] = a + b, x[n - 1][d] = a - b;
  }
}

// Largest magnitude of a row, over its eight lanes.
template <int n>
__device__ __forceinline__ float row_amax(const float (&x)[n][8]) {
  float amax = 0.f;
#pragma unroll
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int d = 0; d < 8; ++d) amax = fmaxf(amax, fabsf(x[i][d]));
  return fold_row(amax, Max{});
}

// Rounds one rotated row, given halved, to this lane's bytes.
template <int n>
__device__ __forceinline__ void round_row(uint2 (&bytes)[n], float (&x)[n][8], float amax, const Scale& s) {
  if (amax > 0.5f * AMAX_MAX) {
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d) x[i][d] = saturate(x[i][d], 0.5f * AMAX_MAX);
  }
  const float inverse = 2.f * s.inverse;
#pragma unroll
  for (int i = 0; i < n; ++i) {
#pragma unroll
    for (int d = 0; d < 8; ++d) x[i][d] = fmaf(x[i][d], inverse, MAGIC_FLOAT);
    bytes[i] = {pack_bytes(x[i][0], x[i][1], x[i][2], x[i][3]), pack_bytes(x[i][4], x[i][5], x[i][6], x[i][7])};
  }
}

// Rotates and rounds one row, given halved so that no sum overflows, to this lane's bytes; returns its scale.
template <int n>
__device__ __forceinline__ float quantise_row(uint2 (&bytes)[n], float (&x)[n][8]) {
  hadamard(x);
  const float amax = row_amax(x);
  const Scale s = int8_scale(2.f * amax, is_finite(x[0][0]));  // one channel that is not finite has reached all
  round_row(bytes, x, amax, s);
  return s.scale;
}

// ---------------------------------------------------------------------------------------------------- means

// The means only shift K and V, and attention is the same for any shift: they need not be exact. Long sequences are sampled, every
// mean_step-th token, 512 to 1023 of them.
//
// Sums are of (x - the sequence's first token) * 2^-ceil(log2(samples)): they cannot overflow, and are zero, not almost
// zero, where all tokens are equal. mean_factor takes them to the mean, less the first token.
__device__ __forceinline__ int mean_step(int length) { return max(length / 512, 1); }
__device__ __forceinline__ int mean_samples(int length) { return (length + mean_step(length) - 1) / mean_step(length); }
__device__ __forceinline__ int mean_shift(int samples) { return samples > 1 ? 32 - __clz(samples - 1) : 0; }
__device__ __forceinline__ float mean_factor(int samples) { return samples ? exp2_int(mean_shift(samples)) / static_cast<float>(samples) : 0.f; }

template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, Dp == 64 ? 3 : 2) sum_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  constexpr int n = Dp / 64;
  __shared__ __align__(16) float folded[WARPS * Dp];
  const bool is_value = blockIdx.y;
  const int heads = a.p.shape.heads_kv, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const Span keys = span_of_tile(a.keys, slot);
  const int samples = mean_samples(keys.length), begin = (slot - keys.first_tile) * TILE;
  if (begin < 0 || begin >= samples) return;

  const float weight = exp2_int(-mean_shift(samples));
  const int dim = a.p.shape.head_dim;
  const Strides& strides = is_value ? a.p.v_strides : a.p.k_strides;
  const T* from = at<T>(is_value ? a.p.v : a.p.k, strides, keys.batch, head, keys.begin);
  const int64_t stride = strides.token * mean_step(keys.length);
  uint4 x[ROWS][n], first[n];
  load_rows(x, from + begin * stride, stride, samples - begin, dim);
  float sum[n][8] = {};
#pragma unroll
  for (int i = 0; i < n; ++i)
    first[i] = channel_of(i) < dim ? *reinterpret_cast<const uint4*>(from + channel_of(i)) : uint4{0, 0, 0, 0};
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    if (tile_row(j) >= samples - begin) continue;
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d)
        sum[i][d] = fmaf(element<T>(x[j][i], d), weight, fmaf(element<T>(first[i], d), -weight, sum[i][d]));
  }
#pragma unroll
  for (int i = 0; i < n; ++i) fold_channels<Dp>(folded, sum[i], i, Add{});
  __syncthreads();
  if (threadIdx.x < Dp)
    (is_value ? a.w.v_partial : a.w.k_partial)[(static_cast<int64_t>(head) * a.keys.tiles + slot) * Dp + threadIdx.x] =
        fold_warps<Dp, WARPS>(folded, threadIdx.x, Add{});
}

// ---------------------------------------------------------------------------------------------------- keys and values

template <int Dp>
struct __align__(16) KeyValueShared {
  int8_t tile8[Dp * TILE];
  float folded[WARPS * 128], mean[Dp], scale[TILE], inverse[Dp];
};

template <typename T, int Dp, typename Keys, bool is_value>
__device__ __forceinline__ void quantise_tile(const ForwardArgs& a, KeyValueShared<Dp>& shared) {
  constexpr int n = Dp / 64;
  constexpr float down = is_value ? 0.5f : 0.5f / Dp;  // halved: no sum overflows
  int8_t* const tile8 = shared.tile8;
  float *const folded = shared.folded, *const mean = shared.mean, *const scale = shared.scale, *const inverse = shared.inverse;
  const int heads = a.p.shape.heads_kv, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const Span keys = span_of_tile(a.keys, slot);
  const int tile = slot - keys.first_tile, begin = tile * TILE, rows = min(keys.length - begin, TILE);
  if (tile < 0 || (tile > 0 && rows <= 0)) return;  // the first tile of an empty sequence writes its means

  const int dim = a.p.shape.head_dim, t = threadIdx.x;
  const Strides& strides = is_value ? a.p.v_strides : a.p.k_strides;
  uint4 x[ROWS][n];
  load_rows(x, at<T>(is_value ? a.p.v : a.p.k, strides, keys.batch, head, keys.begin + begin), strides.token, rows, dim);

  const int64_t first = static_cast<int64_t>(head) * a.keys.tiles + keys.first_tile;
  Keys& record = static_cast<Keys*>(a.w.keys)[first + tile];
  const int samples = mean_samples(keys.length);
  sum_rows<Dp>(mean, folded, (is_value ? a.w.v_partial : a.w.k_partial) + first * Dp, (samples + TILE - 1) / TILE, down * mean_factor(samples));
  if (t < dim && keys.length)
    mean[t] = fmaf(to_float(at<T>(is_value ? a.p.v : a.p.k, strides, keys.batch, head, keys.begin)[t]), down, mean[t]);
  if (tile == 0 && t < dim)
    (is_value ? a.p.v_mean : a.p.k_mean)[(static_cast<int64_t>(keys.sequence) * heads + head) * dim + t] = mean[t] * (1.f / down);
  if (!is_value && t < dim) mean[t] = change_sign(mean[t], t);
  __syncthreads();
  if (rows <= 0) return;

  if constexpr (!is_value) {
    change_signs(x);
    const int64_t row = row_index(keys.batch, heads, head, a.keys.tokens, keys.begin + begin);
    int8_t* k8 = a.p.k8 + row * Dp;
    const auto centred = [&](float (&y)[n][8], int j) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        float m[8];
        load_channels(m, mean, i, 1.f);
#pragma unroll
        for (int d = 0; d < 8; ++d) y[i][d] = fmaf(element<T>(x[j][i], d), down, -m[d]);
      }
    };
    const auto write = [&](const uint2 (&bytes)[n], int j, float s) {
      const bool valid = tile_row(j) < rows;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (valid) *reinterpret_cast<uint2*>(k8 + tile_row(j) * Dp + channel_of(i)) = bytes[i];
        write_chunk<Dp>(record.k8, tile_row(j), i, valid ? bytes[i] : uint2{0, 0});
      }
      if (lane_chunk() == 0) scale[tile_row(j)] = valid ? s : 0.f;
    };
    if constexpr (Keys::shared_scales) {  // by the rows that lanes with the same lane / 8 have in four warps: row / 64 and row / 2 % 4 are the same
      float y[ROWS][n][8], amax = 0.f;
      bool finite = true;
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        centred(y[j], j);
        hadamard(y[j]);
        const float row = row_amax(y[j]);  // by all lanes
        if (tile_row(j) < rows) amax = fmaxf(amax, row), finite = finite && is_finite(y[j][0][0]);
      }
      const int group = t % 32 / 8;
      if (lane_chunk() == 0) folded[t / 32 * 4 + group] = finite ? amax : infinity();
      __syncthreads();
#pragma unroll
      for (int w = 0; w < 4; ++w) amax = fmaxf(amax, folded[(t / 128 * 4 + w) * 4 + group]);
      const Scale s = int8_scale(2.f * amax, is_finite(amax));
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        uint2 bytes[n];
        round_row(bytes, y[j], amax, s);
        write(bytes, j, s.scale);
      }
    } else {
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        float y[n][8];
        centred(y, j);
        uint2 bytes[n];
        const float s = quantise_row(bytes, y);
        write(bytes, j, s);
        __syncwarp();  // or the means of four rows are loaded at once, and registers spill
      }
    }
    __syncthreads();
    record.write_key_scales(scale);
    if (t < rows) a.p.k_scale[row + t] = scale[t];
    return;
  }

  const auto centred = [&](int j, int i, int d, float m) {  // half of v - v_mean
    return tile_row(j) < rows ? fmaf(element<T>(x[j][i], d), down, -m) : 0.f;
  };
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float m[8];
    uint32_t amax[8] = {};
    load_channels(m, mean, i, 1.f);
#pragma unroll
    for (int j = 0; j < ROWS; ++j)
#pragma unroll
      for (int d = 0; d < 8; ++d) amax[d] = max(amax[d], magnitude(centred(j, i, d, m[d])));
    fold_channels<Dp>(reinterpret_cast<uint32_t*>(folded), amax, i, Max{});
  }
  __syncthreads();
  if (t < Dp) {
    const float amax = __uint_as_float(fold_warps<Dp, WARPS>(reinterpret_cast<const uint32_t*>(folded), t, Max{}));
    const Scale s = int8_scale(2.f * amax, is_finite(amax));
    scale[t] = s.scale, inverse[t] = s.inverse;
    record.write_value_scale(t, s.scale);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float m[8], multiplier[8], half_scale[8], residual[8];
    load_channels(m, mean, i, 1.f);
    load_channels(multiplier, inverse, i, 2.f);
    load_channels(half_scale, scale, i, 0.5f);
    uint32_t words[8];
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      float y[ROWS], sum = 0.f;
#pragma unroll
      for (int j = 0; j < ROWS; ++j) {
        const float v = saturate(centred(j, i, d, m[d]), 0.5f * AMAX_MAX);
        y[j] = fmaf(v, multiplier[d], MAGIC_FLOAT);
        sum += fmaf(MAGIC_FLOAT - y[j], half_scale[d], v);
      }
      words[d] = pack_bytes(y[0], y[1], y[2], y[3]), residual[d] = sum;
    }
    store_words(tile8, i, words);
    fold_channels<Dp>(folded, residual, i, Add{});
  }
  __syncthreads();
  if (t < Dp) a.w.v_residual[(first + tile) * Dp + t] = 2.f * fold_warps<Dp, WARPS>(folded, t, Add{});
  write_transposed<Dp, TILE>(record.v8t, tile8, 0);
}

template <typename T, int Dp, typename Keys>
__global__ void __launch_bounds__(THREADS, Dp == 64 ? 3 : 2) key_value_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  __shared__ KeyValueShared<Dp> shared;
  blockIdx.y ? quantise_tile<T, Dp, Keys, true>(a, shared) : quantise_tile<T, Dp, Keys, false>(a, shared);
}

// ---------------------------------------------------------------------------------------------------- queries

// Also completes v_mean: what rounding V lost on average is added to it, by the first block of each sequence and group.
template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, 3) query_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  constexpr int n = Dp / 64;
  constexpr float down = 0x1p-64f;  // k_mean is clamped to AMAX_MAX and scaled by this: no product with q overflows
  __shared__ __align__(16) float slices[4 * THREADS], total[Dp], k_mean[Dp], scale[TILE], dot[TILE];
  const int heads = a.p.shape.heads_q, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const int heads_kv = a.p.shape.heads_kv, group = heads / heads_kv, head_kv = head / group;
  const Span queries = span_of_tile(a.queries, slot);
  const int tile = slot - queries.first_tile, begin = tile * TILE, rows = min(queries.length - begin, TILE);
  if (tile < 0) return;

  const int dim = a.p.shape.head_dim, t = threadIdx.x;
  uint4 x[ROWS][n];
  load_rows(x, at<T>(a.p.q, a.p.q_strides, queries.batch, head, queries.begin + begin), a.p.q_strides.token, rows, dim);
  const int64_t means = (static_cast<int64_t>(queries.sequence) * heads_kv + head_kv) * dim;
  if (tile == 0 && head % group == 0) {
    const Span keys = span_of(a.keys, queries.sequence);
    sum_rows<Dp>(total, slices, a.w.v_residual + (static_cast<int64_t>(head_kv) * a.keys.tiles + keys.first_tile) * Dp,
                 (keys.length + TILE - 1) / TILE, keys.length ? 1.f / static_cast<float>(keys.length) : 0.f);
    if (t < dim) a.p.v_mean[means + t] += total[t];
  }
  if (rows <= 0) return;

  if (t < Dp) k_mean[t] = t < dim ? change_sign(clamp(a.p.k_mean[means + t], AMAX_MAX) * down, t) : 0.f;
  change_signs(x);
  __syncthreads();
  const int64_t row = row_index(queries.batch, heads, head, a.queries.tokens, queries.begin + begin);
  int8_t* q8 = a.p.q8 + row * Dp;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    float y[n][8], sum = 0.f;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      float mean[8];
      load_channels(mean, k_mean, i, 1.f);
#pragma unroll
      for (int d = 0; d < 8; ++d) y[i][d] = element<T>(x[j][i], d) * (0.5f / Dp), sum = fmaf(y[i][d], mean[d], sum);
    }
    sum = fold_row(sum, Add{});
    uint2 bytes[n];
    const float s = quantise_row(bytes, y);
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (tile_row(j) < rows) *reinterpret_cast<uint2*>(q8 + tile_row(j) * Dp + channel_of(i)) = bytes[i];
    if (lane_chunk() == 0) scale[tile_row(j)] = s, dot[tile_row(j)] = sum;
    __syncwarp();  // or the means of four rows are loaded at once, and registers spill
  }
  __syncthreads();
  if (t < rows) {
    a.p.q_scale[row + t] = scale[t];
    a.p.lse[row + t] = clamp(dot[t] * (2 * Dp / down * a.p.shape.scale), 0x1p120f);
  }
}

// ---------------------------------------------------------------------------------------------------- outside sequences

// Packed only: checks cu_seqlens, and gives the tokens outside every sequence their results.
template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS) forward_rest_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  if (blockIdx.x == 0) check_edges(a.queries, 'q'), check_edges(a.keys, 'k');
  const int dim = a.p.shape.head_dim;
  for_rest(a.queries, a.p.shape.heads_q, [&](int head, int token, int lane) {
    const int64_t row = static_cast<int64_t>(head) * a.queries.tokens + token;
    zero_row<T>(a.p.o, a.p.o_strides, head, token, lane, dim);
    for (int d = 8 * lane; d < Dp; d += 64) *reinterpret_cast<uint2*>(a.p.q8 + row * Dp + d) = uint2{0, 0};
    if (lane == 0) a.p.q_scale[row] = 0.f, a.p.lse[row] = a.p.lse_smooth[row] = -infinity();
  });
  for_rest(a.keys, a.p.shape.heads_kv, [&](int head, int token, int lane) {
    const int64_t row = static_cast<int64_t>(head) * a.keys.tokens + token;
    for (int d = 8 * lane; d < Dp; d += 64) *reinterpret_cast<uint2*>(a.p.k8 + row * Dp + d) = uint2{0, 0};
    if (lane == 0) a.p.k_scale[row] = 0.f;
  });
}

// ---------------------------------------------------------------------------------------------------- launches

template <typename T, int Dp, typename Keys>
void launch_passes(const ForwardArgs& a, cudaStream_t stream) {
  const unsigned key_blocks = static_cast<unsigned>(a.keys.tiles * a.p.shape.heads_kv);
  const unsigned query_blocks = static_cast<unsigned>(a.queries.tiles * a.p.shape.heads_q);
  if (a.queries.cu_seqlens) launch_kernel(forward_rest_kernel<T, Dp>, REST_BLOCKS, THREADS, 0, stream, a);
  if (key_blocks) {
    launch_kernel(sum_kernel<T, Dp>, dim3(key_blocks, 2), THREADS, 0, stream, a);
    launch_kernel(key_value_kernel<T, Dp, Keys>, dim3(key_blocks, 2), THREADS, 0, stream, a);
  }
  if (query_blocks) launch_kernel(query_kernel<T, Dp>, query_blocks, THREADS, 0, stream, a);
}

// All passes. Keys<Dp> is the record that the main kernel reads: k8, v8t, and functions that write the scales.
template <template <int> typename Keys>
void run_passes(const ForwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) {
    constexpr int Dp = decltype(dim)::value;
    launch_passes<decltype(number), Dp, Keys<Dp>>(a, stream);
  });
}

}  // namespace
}  // namespace sagetrain::sm80

// Before the backward, once per token: the records of keys and queries, and the constants of each row (layout.cuh); sums
// start as zeros. Bound by memory: every tensor is read once, and a tile stays in registers from its load to its last use.
//
//   barriers        __syncthreads between the parts of a block's work, no other
//   shared memory   keys: k8 of the tile, transposed: 8 KiB (D = 64), 16 (D = 128), and 0.6; queries: first q8, then do8, 8 and 16, and 5.6
//                   and 8.1 of rows' and channels' constants
//   tile size       TILE tokens of a head, all channels, 256 threads (common/rows.cuh). Registers limit the blocks of a multiprocessor: three
//                   with 80; queries at D = 128: two with 128
#include "../common/prepare.cuh"
#include "../common/transpose.cuh"
#include "layout.cuh"

namespace sagetrain::sm80 {
namespace {

constexpr int SHIFT_MAX = 100;  // |k_i|
constexpr float LEAST_RELATIVE = 0x1p-5f;  // of a key: as LEAST_WEIGHT of a query, of the largest in its tile

// ---------------------------------------------------------------------------------------------------- backward: keys

template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, 3) prepare_keys_kernel(const __grid_constant__ BackwardArgs a) {
  after_previous();
  constexpr int n = Dp / 64;
  __shared__ __align__(16) int8_t tile8[Dp * TILE];
  __shared__ uint32_t norms[WARPS], bounds[WARPS];
  __shared__ float shrink[TILE];
  const int heads = a.p.shape.heads_kv, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const Span keys = span_of_tile(a.keys, slot);
  const int tile = slot - keys.first_tile, begin = tile * TILE, rows = min(keys.length - begin, TILE);
  if (tile < 0 || rows <= 0) return;

  const int t = threadIdx.x, warp = t / 32;
  const int64_t row = row_index(keys.batch, heads, head, a.keys.tokens, keys.begin + begin);
  const int64_t padded = static_cast<int64_t>(head) * a.keys.tiles + slot;
  DqKeyRecord<Dp>* records = static_cast<DqKeyRecord<Dp>*>(a.w.keys) + padded * (TILE / DQ_KEYS);
  KeyRecord<Dp>& block = static_cast<KeyRecord<Dp>*>(a.w.blocks)[padded];
  uint2 k8[ROWS][n];
  uint4 v[ROWS][n];
  load_rows(k8, a.p.k8 + row * Dp, rows);
  const int dim = a.p.shape.head_dim;
  load_rows(v, row_at<T>(a.p.v, a.p.v_strides, keys.batch, head, keys.begin + begin), a.p.v_strides.token, rows, dim);
  const float* v_centre = a.p.v_centre + (static_cast<int64_t>(keys.sequence) * heads + head) * dim;
#pragma unroll
  for (int j = 0; j < ROWS; ++j)
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (tile_row(j) < rows && channel_of(i) < dim) v[j][i] = centre<T>(v[j][i], v_centre + channel_of(i));
  const float k_scale = t < rows ? a.p.k_scale[row + t] : 0.f;
  transpose_rows(tile8, k8, a.fused);

  uint32_t norm = 0;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      write_chunk<Dp>(block.v, tile_row(j), i, v[j][i]);
      if (a.fused) continue;
      write_chunk<Dp>(records[tile_row(j) / DQ_KEYS].k8, tile_row(j) % DQ_KEYS, i, k8[j][i]);
      write_chunk<Dp>(records[tile_row(j) / DQ_KEYS].v, tile_row(j) % DQ_KEYS, i, v[j][i]);
    }
    float sum = 0.f;
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d) amax = max(amax, magnitude(element<T>(v[j][i], d)));
    const int exponent = row_exponent(fold_row(amax, Max{})), e = is_number(exponent) ? exponent : 0;
    const float up = exp2_int(-(e >> 1)), up_more = exp2_int(-(e - (e >> 1)));  // the squares stay in range
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        const float x = element<T>(v[j][i], d) * up * up_more;
        sum = fmaf(x, x, sum);
      }
    const float length = fminf(scale_by(sqrtf(fold_row(sum, Add{})), e), FLT_MAX);
    norm = max(norm, exponent == UNBOUNDED ? magnitude(nan_float()) : magnitude(length));
  }
  norm = __reduce_max_sync(~0u, norm);
  const uint32_t bound = __reduce_max_sync(~0u, magnitude(k_scale));
  if (t % 32 == 0) norms[warp] = norm, bounds[warp] = bound;
  __syncthreads();
  const float k_bound = __uint_as_float(largest<WARPS>(bounds, 0));
  if (t == 0) a.w.v_norm[padded] = __uint_as_float(largest<WARPS>(norms, 0)), a.w.k_bound[padded] = k_bound;
  if (!a.fused) {
    if (t < TILE) write_scale(records[t / DQ_KEYS].k_scale, records[t / DQ_KEYS].k_bias, t % DQ_KEYS, k_scale);
    for (int i = 0; i < TILE / DQ_KEYS; ++i) write_transposed<Dp, DQ_KEYS>(records[i].k8t, tile8, i * DQ_KEYS);
    return;
  }
  const float relative = k_scale / k_bound;
  const bool small = t < rows && relative < LEAST_RELATIVE;
  if (t < TILE) block.scale[t] = {__float2half2_rn(relative < LEAST_RELATIVE ? LEAST_RELATIVE : relative), k_scale};
  if (t < 4) block.k_bound[t] = t ? 0.f : k_bound;
  if (t < TILE) shrink[t] = small ? relative * (1.f / LEAST_RELATIVE) : 1.f;
  if (__syncthreads_or(small)) {  // keys of very different scale in one tile
    shrink_tokens<Dp>(tile8, shrink, paired_token_at);
    __syncthreads();
  }
  write_transposed<Dp, TILE>(block.k8t, tile8, 0);
}

// ---------------------------------------------------------------------------------------------------- backward: queries

// In three parts between barriers: rows of dO and o (eight lanes each); the constants of each row (one thread each, both
// halves of the block the same); channels of dO / rho.
template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, Dp == 64 ? 3 : 2) prepare_queries_kernel(const __grid_constant__ BackwardArgs a) {
  after_previous();
  constexpr int n = Dp / 64, blocks = TILE / QUERIES;
  __shared__ __align__(16) int8_t tile8[Dp * TILE];
  __shared__ __align__(16) uint32_t folded[WARPS * Dp];
  __shared__ __align__(16) float inverse[blocks * Dp];
  __shared__ float row_lse[TILE], row_norm[TILE], row_dot[TILE], row_factor[TILE], row_shrink[TILE];
  __shared__ int row_e[TILE], warp_e[WARPS], warp_w[WARPS];
  __shared__ uint32_t warp_norm[WARPS], warp_bound[WARPS];

  const int heads = a.p.shape.heads_q, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const int head_kv = head / (heads / static_cast<int>(a.p.shape.heads_kv));
  const Span queries = span_of_tile(a.queries, slot);
  const int tile = slot - queries.first_tile, begin = tile * TILE, rows = min(queries.length - begin, TILE);
  if (tile < 0 || rows <= 0) return;
  const Span keys = span_of(a.keys, queries.sequence);

  const int t = threadIdx.x, warp = t / 32, dim = a.p.shape.head_dim;
  const int64_t first_row = row_index(queries.batch, heads, head, a.queries.tokens, queries.begin + begin);
  const int64_t padded = static_cast<int64_t>(head) * a.queries.tiles + slot;
  QueryRecord<Dp>* records = static_cast<QueryRecord<Dp>*>(a.w.queries) + padded * blocks;

  uint4 d_o[ROWS][n];
  {
    uint2 q8[ROWS][n];
    load_rows(q8, a.p.q8 + first_row * Dp, rows);
    load_rows(d_o, row_at<T>(a.p.d_o, a.p.d_o_strides, queries.batch, head, queries.begin + begin), a.p.d_o_strides.token, rows, dim);
    bounds_of_keys(warp_norm, warp_bound, a, keys, head_kv);
    transpose_rows(tile8, q8);
#pragma unroll
    for (int j = 0; j < ROWS; ++j)
#pragma unroll
      for (int i = 0; i < n; ++i) write_chunk<Dp>(records[tile_row(j) / QUERIES].q8, tile_row(j) % QUERIES, i, q8[j][i]);
  }
  {
    const float* v_centre = a.p.v_centre + (static_cast<int64_t>(queries.sequence) * static_cast<int>(a.p.shape.heads_kv) + head_kv) * dim;
    const T* o_tile = row_at<T>(a.p.o, a.p.o_strides, queries.batch, head, queries.begin + begin);
#pragma unroll
    for (int j = 0; j < ROWS; ++j) {
      uint32_t amax = 0;
      float norm2 = 0.f, dot = 0.f;
      const float lse = tile_row(j) < rows && keys.length ? a.p.lse_smooth[first_row + tile_row(j)] : -infinity();
      uint4 o[n];
#pragma unroll
      for (int i = 0; i < n; ++i) {
        o[i] = load_chunk(o_tile, a.p.o_strides.token, j, i, rows, dim);
        if (lse == -infinity()) d_o[j][i] = uint4{0, 0, 0, 0};  // whatever is there takes no part
#pragma unroll
        for (int d = 0; d < 8; ++d) amax = max(amax, magnitude(element<T>(d_o[j][i], d)));
      }
      const int exponent = row_exponent(fold_row(amax, Max{})), e = is_number(exponent) ? exponent : 0;
      const float up = exp2_int(-(e >> 1)), up_more = exp2_int(-(e - (e >> 1)));
#pragma unroll
      for (int i = 0; i < n; ++i) {
        float x[8];
#pragma unroll
        for (int d = 0; d < 8; ++d) {
          x[d] = element<T>(d_o[j][i], d) * up * up_more;
          norm2 = fmaf(x[d], x[d], norm2);
          if (lse != -infinity() && channel_of(i) < dim) dot = fmaf(x[d], element<T>(o[i], d) - v_centre[channel_of(i) + d], dot);
        }
        write_chunk<Dp>(records[tile_row(j) / QUERIES].do16, tile_row(j) % QUERIES, i,
                        uint4{pack16<T>(x[0], x[1]), pack16<T>(x[2], x[3]), pack16<T>(x[4], x[5]), pack16<T>(x[6], x[7])});
      }
      norm2 = fold_row(norm2, Add{}), dot = fold_row(dot, Add{});
      if (lane_chunk() == 0) {
        const int row = tile_row(j);
        row_lse[row] = lse, row_e[row] = exponent, row_norm[row] = sqrtf(norm2), row_dot[row] = dot;
      }
    }
  }
  __syncthreads();

  // E, rho and W of the block, then what the row needs of them
  const int row = t % TILE, first_warp = row / QUERIES * (QUERIES / 32);
  const float lse = row_lse[row];
  const bool live = lse != -infinity();
  const float q_scale = live ? a.p.q_scale[first_row + row] : 0.f;
  const float d_lse = live && a.p.d_lse ? a.p.d_lse[first_row + row] : 0.f;
  const int exponent = row_e[row], e = dp_exponent(exponent, d_lse);
  const float v_norm = __uint_as_float(largest<WARPS>(warp_norm, 0)), k_bound = __uint_as_float(largest<WARPS>(warp_bound, 0));
  const float dot = row_dot[row], delta = clamp(dot - scale_by(d_lse, -e), 0x1p120f);
  const float bound = fminf(fmaf(row_norm[row], v_norm, fabsf(delta)), FLT_MAX);
  const bool known = is_finite(lse) && is_finite(q_scale) && is_finite(v_norm) && is_finite(k_bound);
  const bool broken = live && !(known && exponent != UNBOUNDED && is_finite(dot) && is_finite(d_lse));

  const int e_warp = __reduce_max_sync(~0u, is_number(exponent) ? exponent : NONE);
  if (t < TILE && t % 32 == 0) warp_e[warp] = e_warp;
  __syncthreads();
  // A row of zeros has no say in the scales of dV: its P is left out, or where d_lse gives it a dS next to none.
  const bool zeros = exponent == NONE, takes_part = live && (broken || !zeros || d_lse != 0.f);
  const int log2_rho = is_number(exponent) ? (e - largest<QUERIES / 32>(warp_e, first_warp)) >> 1 : zeros ? -U_MAX : 0;
  const int log2_bound = ceil_log2(q_scale, bound);  // NONE for rows that see no key
  const int w_warp = __reduce_max_sync(~0u, broken ? UNBOUNDED : log2_bound == NONE ? NONE : log2_bound + e - (zeros ? 0 : log2_rho));
  if (t < TILE && t % 32 == 0) warp_w[warp] = w_warp;
  if (t < TILE) row_factor[row] = exp2_int(-log2_rho);
  __syncthreads();
  bool lifted = false;
  if (t < TILE) {
    int lift = 0;
    const int log2_w = max(largest<QUERIES / 32>(warp_w, first_warp), 15 - 126);
    const bool block_broken = log2_w == UNBOUNDED, lost = broken || block_broken;
    if (!lost && log2_bound != NONE) {
      const int weight = log2_bound + e - log2_w;  // of dS''; u has 2^-log2_rho more, P'' less
      lift = max(0, min((zeros ? LEAST_WEIGHT_OF_ZEROS : LEAST_WEIGHT) - weight, U_MAX + log2_rho - weight));
    }
    row_shrink[row] = exp2_int(-min(lift, 126)), lifted = lift > 0;
    const int shift = min(max(15 - ceil_log2(bound, k_bound), -SHIFT_MAX), SHIFT_MAX);
    const float lse2 = lse * LOG2E, delta16 = broken ? nan_float() : delta;
    const float scale = live ? scale22(q_scale * (a.p.shape.scale * LOG2E * Dp)) : 0.f;
    const float c = lost ? nan_float() : log2_bound == NONE ? 0.f : scale_by(q_scale, e - log2_rho - log2_w + lift);
    float out = scale_by(a.fused ? a.p.shape.scale / mantissa(q_scale) : a.p.shape.scale,
                         a.fused ? log2_w - 15 - lift - exponent_of(q_scale) : e - shift);
    out = (a.fused ? lost : broken) ? nan_float() : takes_part ? clamp(out, FLT_MAX) : 0.f;
    a.w.q_rows[padded * TILE + t] = {scale, takes_part ? lse2 - static_cast<float>(shift) : infinity(), delta16, out};
    QueryRecord<Dp>& record = records[t / QUERIES];
    const int i = t % QUERIES;
    write_scale(record.q_scale, record.q_bias, i, scale);
    reinterpret_cast<float*>(record.l)[i] = takes_part ? lse2 - static_cast<float>(log2_rho + 15) : infinity();
    reinterpret_cast<float*>(record.c)[i] = c;
    reinterpret_cast<float*>(record.d)[i] = c * delta16;
    if (i < 32) {
      const uint32_t content = __reduce_add_sync(~0u, __float_as_uint(lse)) & THRESHOLD_BITS;
      if (i == 0) record.dk_scale = block_broken ? nan_float() : exp2_int(min(log2_w - 15, 127)), record.thresholds = content << 16 | content;
      if (i < 2) record.padding[i] = 0.f;
    }
  }
  if (__syncthreads_or(lifted)) {  // rows of very different weight in one block
    shrink_tokens<Dp>(tile8, row_shrink, token_at);
    __syncthreads();
  }
  for (int i = 0; i < blocks; ++i) write_transposed<Dp, QUERIES>(records[i].q8t, tile8, i * QUERIES);

#pragma unroll
  for (int i = 0; i < n; ++i) {
    uint32_t amax[8] = {};
#pragma unroll
    for (int j = 0; j < ROWS; ++j)
#pragma unroll
      for (int d = 0; d < 8; ++d) amax[d] = max(amax[d], magnitude(element<T>(d_o[j][i], d) * row_factor[tile_row(j)]));
    fold_channels<Dp>(folded, amax, i, Max{});
  }
  __syncthreads();
  if (t < blocks * Dp) {
    const int b = t / Dp, channel = t % Dp;
    const uint32_t all = fold_warps<Dp, WARPS / blocks>(folded + b * (WARPS / blocks) * Dp, channel, Max{});
    const Scale s = int8_scale(__uint_as_float(all), all < INFINITE);
    inverse[t] = s.inverse;
    write_scale(records[b].do_scale, records[b].do_bias, channel, s.scale);
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    float multiplier[8];
    load_channels(multiplier, inverse + warp / (WARPS / blocks) * Dp, i, 1.f);
    uint32_t words[8];
#pragma unroll
    for (int d = 0; d < 8; ++d) {
      float x[ROWS];
#pragma unroll
      for (int j = 0; j < ROWS; ++j)
        x[j] = fmaf(saturate(element<T>(d_o[j][i], d) * row_factor[tile_row(j)], AMAX_MAX), multiplier[d], MAGIC_FLOAT);
      words[d] = pack_bytes(x[0], x[1], x[2], x[3]);
    }
    store_words(tile8, i, words);
  }
  __syncthreads();
  for (int i = 0; i < blocks; ++i) write_transposed<Dp, QUERIES>(records[i].do8t, tile8, i * QUERIES);
}

// ---------------------------------------------------------------------------------------------------- launches

template <typename T, int Dp>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  const size_t key_blocks = a.keys.tiles * a.p.shape.heads_kv, query_blocks = a.queries.tiles * a.p.shape.heads_q;
  if (a.fused) cudaMemsetAsync(a.w.d_q, 0, query_blocks * (TILE * Dp * sizeof(float)), stream);
  if (a.splits > 1) cudaMemsetAsync(a.w.d_kv, 0, key_blocks * (2 * TILE * Dp * sizeof(float)), stream);
  if (a.queries.cu_seqlens) launch_kernel(backward_rest_kernel<T, BackwardArgs>, REST_BLOCKS, THREADS, 0, stream, a);
  if (key_blocks) launch_kernel(prepare_keys_kernel<T, Dp>, key_blocks, THREADS, 0, stream, a);
  if (query_blocks) launch_kernel(prepare_queries_kernel<T, Dp>, query_blocks, THREADS, 0, stream, a);
}

}  // namespace

void prepare(const BackwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm80

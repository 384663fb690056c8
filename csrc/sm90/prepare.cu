// Before the backward, once per token: the records of keys and queries, and the constants of each row (layout.cuh); sums start as zeros.
// Bound by memory: every tensor is read once, and a tile stays in registers from its load to its last use.
//
//   barriers        __syncthreads between the parts of a block's work, no other
//   shared memory   keys: k8 of the tile, transposed: 8 KiB (D = 64), 16 (D = 128); queries: q8 and do8, 16 and 32, and 2.6 of rows' constants
//   tile size       TILE tokens of a head, all channels, 256 threads (common/rows.cuh). Registers limit the blocks of a multiprocessor: three
//                   with 80, D = 128: two with 128
#include "../common/prepare.cuh"
#include "../common/transpose.cuh"
#include "layout.cuh"

namespace sagetrain::sm90 {
namespace {

constexpr int FINE = 25;    // log2 of what the sums of dQ may reach: rounding is to 2^-25 of that, and most products of a block are below 2^22
constexpr int DP_MAX = 10;  // log2 of |dP16|, which must fit a half

// Row `row` of a matrix of 16-bit numbers, 64 rows of 64 channels to a panel: this lane's chunk i.
__device__ __forceinline__ void write_panel(int16_t* matrix, int row, int i, const uint4& x) {
  *reinterpret_cast<uint4*>(reinterpret_cast<char*>(matrix) + i * (64 * 128) + swizzle<128>(row, lane_chunk())) = x;
}

// A row times 2^-e, and its largest number.
template <typename T, int n>
__device__ __forceinline__ void multiply_row(float (&to)[n][8], const uint4 (&x)[n], int e) {
  const float up = exp2_int(-(e >> 1)), up_more = exp2_int(-(e - (e >> 1)));  // 2^-e may not fit a float
#pragma unroll
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int d = 0; d < 8; ++d) to[i][d] = element<T>(x[i], d) * up * up_more;
}
template <typename T, int n>
__device__ __forceinline__ uint32_t largest_of_row(const uint4 (&x)[n]) {  // as `magnitude`
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < n; ++i)
#pragma unroll
    for (int d = 0; d < 8; ++d) amax = max(amax, magnitude(element<T>(x[i], d)));
  return fold_row(amax, Max{});
}

// ---------------------------------------------------------------------------------------------------- keys

template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, Dp == 64 ? 3 : 2) prepare_keys_kernel(const __grid_constant__ BackwardArgs a) {
  after_previous();
  constexpr int n = Dp / 64;
  __shared__ __align__(16) int8_t tile8[Dp * TILE];
  __shared__ uint32_t norms[WARPS], bounds[WARPS];
  const int heads = a.p.shape.heads_kv, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const Span keys = span_of_tile(a.keys, slot);
  const int tile = slot - keys.first_tile, begin = tile * TILE, rows = min(keys.length - begin, TILE);
  if (tile < 0 || rows <= 0) return;

  const int t = threadIdx.x, warp = t / 32, dim = a.p.shape.head_dim;
  const int64_t row = row_index(keys.batch, heads, head, a.keys.tokens, keys.begin + begin);
  const int64_t padded = static_cast<int64_t>(head) * a.keys.tiles + slot;
  KeyRecord<Dp>* records = static_cast<KeyRecord<Dp>*>(a.w.keys) + padded * (TILE / KEYS);
  uint2 k8[ROWS][n];
  uint4 v[ROWS][n];
  const T* v_tile = row_at<T>(a.p.v, a.p.v_strides, keys.batch, head, keys.begin + begin);
  const float* v_centre = a.p.v_centre + (static_cast<int64_t>(keys.sequence) * heads + head) * dim;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const int key = key_of_row(tile_row(j));
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int channel = channel_of(i);
      k8[j][i] = key < rows ? *reinterpret_cast<const uint2*>(a.p.k8 + (row + key) * Dp + channel) : uint2{};
      v[j][i] = key < rows && channel < dim ? centre<T>(*reinterpret_cast<const uint4*>(v_tile + key * a.p.v_strides.token + channel), v_centre + channel) : uint4{};
    }
  }
  const int key = key_of_row(t % TILE);  // of this thread's row
  const float k_scale = key < rows ? a.p.k_scale[row + key] : 0.f;
  transpose_rows(tile8, k8);

  uint32_t norm = 0;
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      write_panel(records[tile_row(j) / KEYS].v, tile_row(j) % KEYS, i, v[j][i]);
      write_chunk<Dp>(records[tile_row(j) / KEYS].k8, tile_row(j) % KEYS, i, k8[j][i]);
    }
    const int exponent = row_exponent(largest_of_row<T>(v[j])), e = is_number(exponent) ? exponent : 0;
    float x[n][8], sum = 0.f;
    multiply_row<T>(x, v[j], e);
#pragma unroll
    for (int i = 0; i < n; ++i)
#pragma unroll
      for (int d = 0; d < 8; ++d) sum = fmaf(x[i][d], x[i][d], sum);
    const float length = fminf(scale_by(sqrtf(fold_row(sum, Add{})), e), FLT_MAX);
    norm = max(norm, exponent == UNBOUNDED ? magnitude(nan_float()) : magnitude(length));
  }
  norm = __reduce_max_sync(~0u, norm);
  const uint32_t bound = __reduce_max_sync(~0u, magnitude(k_scale));
  if (t % 32 == 0) norms[warp] = norm, bounds[warp] = bound;
  __syncthreads();
  if (t == 0) a.w.v_norm[padded] = __uint_as_float(largest<WARPS>(norms, 0)), a.w.k_bound[padded] = __uint_as_float(largest<WARPS>(bounds, 0));

  // Sixteen lanes have the rows of a warp of the main kernel: keys of one scale, of which some may not exist.
  const uint32_t half_warp = t % 32 < 16 ? 0xffffu : 0xffff0000u;
  const float scale = __uint_as_float(__reduce_max_sync(half_warp, magnitude(k_scale)));
  if (key < rows && k_scale != scale && scale == scale) {
    printf("sagetrain: keys of one group have different scales: forward and backward of different kernels\n");
    __trap();
  }
  if (t < TILE && t % 16 == 0) records[t / KEYS].scale[t % KEYS / 16] = scale;
  if (t < TILE / KEYS * 28) records[t / 28].padding[t % 28] = 0.f;
  for (int i = 0; i < TILE / KEYS; ++i) write_transposed<Dp, KEYS>(records[i].k8t, tile8, i * KEYS);
}

// ---------------------------------------------------------------------------------------------------- queries

// {c 2^shift, -c delta}: what they are rounded by is the same for all keys of the row, and where V has a mean both terms of u are large beside it, so
// that rows of dS would not sum to zero. So the second is made from the first as it is rounded, which is that of the three nearest halves of which the
// second loses least. Not of a c that a half cannot hold: there dP is nothing, or next to it beside delta.
__device__ __forceinline__ __half2 in_halves(float c, float delta, int shift) {
  const float factor = scale_by(c, shift);
  const __half nearest = __float2half_rn(factor > LARGEST<__half> ? LARGEST<__half> : factor);  // dP may be 0, where all rows of dO are; NaN stays
  __half2 best = __halves2half2(nearest, __float2half_rn(-c * delta));
  const int bits = __half_as_ushort(nearest);
  float least = bits > 0x400 && bits < 0x7bff ? FLT_MAX : -1.f;
#pragma unroll
  for (int i = -1; i <= 1; ++i) {
    const __half near = __ushort_as_half(static_cast<unsigned short>(bits + i));
    const float offset = -scale_by(__half2float(near), -shift) * delta;
    const __half rounded = __float2half_rn(offset);
    const float lost = fabsf(__half2float(rounded) - offset);
    if (lost < least) least = lost, best = __halves2half2(near, rounded);
  }
  return best;
}

// In three parts with barriers between them: the largest row of V and scale of K in the sequence; rows of dO and o (eight lanes each); the
// constants of each row (one thread each).
template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, Dp == 64 ? 3 : 2) prepare_queries_kernel(const __grid_constant__ BackwardArgs a) {
  after_previous();
  constexpr int n = Dp / 64, records_of_tile = TILE / QUERIES;
  __shared__ __align__(16) int8_t tile8[2][Dp * TILE];  // of q8, of do8
  __shared__ float row_lse[TILE], row_norm[TILE], row_dot[TILE], row_shrink[TILE];
  __shared__ uint32_t row_amax[TILE], warp_norm[WARPS], warp_bound[WARPS];
  __shared__ int warp_e[WARPS], warp_w[WARPS];

  const int heads = a.p.shape.heads_q, head = blockIdx.x % heads, slot = blockIdx.x / heads;
  const int head_kv = head / (heads / static_cast<int>(a.p.shape.heads_kv));
  const Span queries = span_of_tile(a.queries, slot);
  const int tile = slot - queries.first_tile, begin = tile * TILE, rows = min(queries.length - begin, TILE);
  if (tile < 0 || rows <= 0) return;
  const Span keys = span_of(a.keys, queries.sequence);

  const int t = threadIdx.x, warp = t / 32, dim = a.p.shape.head_dim;
  const int64_t first_row = row_index(queries.batch, heads, head, a.queries.tokens, queries.begin + begin);
  const int64_t padded = static_cast<int64_t>(head) * a.queries.tiles + slot;
  QueryRecord<Dp>* records = static_cast<QueryRecord<Dp>*>(a.w.queries) + padded * records_of_tile;
  // Everything is loaded before anything that has to wait for it is stored: the compiler does not know that they are different places.
  const T* o_tile = row_at<T>(a.p.o, a.p.o_strides, queries.batch, head, queries.begin + begin);
  const T* d_o_tile = row_at<T>(a.p.d_o, a.p.d_o_strides, queries.batch, head, queries.begin + begin);
  uint4 d_o[ROWS][n], o[ROWS][n];
  load_rows(d_o, d_o_tile, a.p.d_o_strides.token, rows, dim), load_rows(o, o_tile, a.p.o_strides.token, rows, dim);
  uint4* sums = reinterpret_cast<uint4*>(a.w.d_q) + padded * (TILE * Dp / 4);
#pragma unroll
  for (int i = 0; i < TILE * Dp / 4; i += THREADS) sums[i + t] = uint4{};
  {
    uint2 q8[ROWS][n];
    load_rows(q8, a.p.q8 + first_row * Dp, rows);
    bounds_of_keys(warp_norm, warp_bound, a, keys, head_kv);
    transpose_rows(tile8[0], q8);
#pragma unroll
    for (int j = 0; j < ROWS; ++j)
#pragma unroll
      for (int i = 0; i < n; ++i) write_chunk<Dp>(records[tile_row(j) / QUERIES].q8, tile_row(j) % QUERIES, i, q8[j][i]);
  }
  __syncthreads();
  const float v_norm = __uint_as_float(largest<WARPS>(warp_norm, 0)), k_bound = __uint_as_float(largest<WARPS>(warp_bound, 0));
  // What all exponents of the sequence are raised by: rows of dO are shorter than 2 sqrt(Dp) 2^e, 2^5 at most. Not so small that do16 leaves a half.
  const int shift = min(max(ceil_log2(v_norm, 1.f) + 5 - DP_MAX, -13), 100);
  const float v_shift = exp2_int(-shift);
  const float* v_centre = a.p.v_centre + (static_cast<int64_t>(queries.sequence) * static_cast<int>(a.p.shape.heads_kv) + head_kv) * dim;
  uint2 do8[ROWS][n];
#pragma unroll
  for (int j = 0; j < ROWS; ++j) {
    const int row = tile_row(j);
    const float lse = row < rows && keys.length ? a.p.lse_smooth[first_row + row] : -infinity();
#pragma unroll
    for (int i = 0; i < n; ++i)
      if (lse == -infinity()) d_o[j][i] = uint4{0, 0, 0, 0};  // whatever is there takes no part
    const uint32_t amax = largest_of_row<T>(d_o[j]);
    const int exponent = row_exponent(amax), e = is_number(exponent) ? exponent : 0;
    float x[n][8], norm2 = 0.f, dot = 0.f;
    multiply_row<T>(x, d_o[j], e);
    const float to8 = is_number(exponent) ? 127.f / fmaxf(scale_by(__uint_as_float(amax), -e), 1.f) : 0.f;  // of a smaller row: less than 127
#pragma unroll
    for (int i = 0; i < n; ++i) {
#pragma unroll
      for (int d = 0; d < 8; ++d) {
        norm2 = fmaf(x[i][d], x[i][d], norm2);
        if (lse != -infinity() && channel_of(i) < dim) dot = fmaf(x[i][d], element<T>(o[j][i], d) - v_centre[channel_of(i) + d], dot);
      }
      write_panel(records[row / QUERIES].do16, row % QUERIES, i,
                       uint4{pack16<T>(x[i][0] * v_shift, x[i][1] * v_shift), pack16<T>(x[i][2] * v_shift, x[i][3] * v_shift),
                             pack16<T>(x[i][4] * v_shift, x[i][5] * v_shift), pack16<T>(x[i][6] * v_shift, x[i][7] * v_shift)});
#pragma unroll
      for (int d = 0; d < 8; ++d) x[i][d] = fmaf(x[i][d], to8, MAGIC_FLOAT);
      do8[j][i] = {pack_bytes(x[i][0], x[i][1], x[i][2], x[i][3]), pack_bytes(x[i][4], x[i][5], x[i][6], x[i][7])};
    }
    norm2 = fold_row(norm2, Add{}), dot = fold_row(dot, Add{});
    if (lane_chunk() == 0) row_lse[row] = lse, row_amax[row] = amax, row_norm[row] = sqrtf(norm2), row_dot[row] = dot;
  }
  transpose_rows(tile8[1], do8);
  __syncthreads();

  // What is computed again did not occupy registers meanwhile.
  const int64_t padded_again = static_cast<int64_t>(block_number() % heads) * a.queries.tiles + block_number() / heads;
  QueryRecord<Dp>* records_again = static_cast<QueryRecord<Dp>*>(a.w.queries) + padded_again * records_of_tile;

  // E and W of the record, then what the row needs of them. Both halves of the block do the same.
  const int row = t % TILE, first_warp = row / QUERIES * (QUERIES / 32);
  const float lse = row_lse[row];
  const bool live = lse != -infinity();
  const uint32_t amax = row_amax[row];
  const float q_scale = live ? a.p.q_scale[first_row + row] : 0.f;
  const float d_lse = live && a.p.d_lse ? a.p.d_lse[first_row + row] : 0.f;
  const int exponent = row_exponent(amax), e = dp_exponent(exponent, d_lse);
  const float dot = row_dot[row], delta = clamp(dot - scale_by(d_lse, -e), 0x1p120f);
  const float bound = fminf(fmaf(row_norm[row], v_norm, fabsf(delta)), FLT_MAX);
  const bool known = is_finite(lse) && is_finite(q_scale) && is_finite(v_norm) && is_finite(k_bound);
  const bool broken = live && !(known && exponent != UNBOUNDED && is_finite(dot) && is_finite(d_lse));

  const int e_warp = __reduce_max_sync(~0u, exponent);
  if (t < TILE && t % 32 == 0) warp_e[warp] = e_warp;
  __syncthreads();
  const int e_record = largest<QUERIES / 32>(warp_e, first_warp);  // E - 1
  const float mantissa_of_row = is_number(exponent) ? fmaxf(scale_by(__uint_as_float(amax), -e), 1.f) : 1.f;  // amax = 2^e mantissa_of_row
  // rho = 2^log2_rho mantissa_of_row. A row of zeros has no say in the scales of dV: its P is left out, or where d_lse gives it a dS next to none.
  const bool zeros = exponent == NONE, takes_part = live && (broken || !zeros || d_lse != 0.f);
  const int log2_rho = is_number(exponent) ? e - e_record - 1 : zeros ? -U_MAX : 0;
  const int log2_bound = ceil_log2(q_scale, bound);  // NONE for rows that see no key
  const int crowded = max(0, -log2_rho - U_MAX);     // what u would have above its limit
  const int w_warp = __reduce_max_sync(~0u, broken ? UNBOUNDED : log2_bound == NONE ? NONE : log2_bound + e + crowded);
  if (t < TILE && t % 32 == 0) warp_w[warp] = w_warp;
  __syncthreads();
  bool lifted = false;
  if (t < TILE) {
    int lift = 0, reach = 0;
    const int log2_w = max(largest<QUERIES / 32>(warp_w, first_warp), 15 - 126);
    const bool record_broken = log2_w == UNBOUNDED, lost = broken || record_broken;
    if (!lost && log2_bound != NONE) {
      const int weight = log2_bound + e - log2_w;  // of dS''
      lift = max(0, min((zeros ? LEAST_WEIGHT_OF_ZEROS : LEAST_WEIGHT) - weight, U_MAX + log2_rho - weight));
      reach = weight + lift;
    }
    row_shrink[row] = exp2_int(-min(lift, 126)), lifted = lift > 0;
    const int fine = min(max(FINE - 15 - 7 - max(reach, -40) - ceil_log2(k_bound, 1.f), -120), 120);
    const float lse2 = lse * LOG2E, delta16 = broken ? nan_float() : delta;
    const float scale = live ? q_scale * (a.p.shape.scale * LOG2E * Dp) : 0.f;
    const float c = lost ? nan_float() : log2_bound == NONE ? 0.f : scale_by(q_scale / mantissa_of_row, e - log2_rho - log2_w + lift);
    const float fine_and_bits = __uint_as_float(__float_as_uint(exp2_int(fine)) | (__float_as_uint(lse) & THRESHOLD_BITS));
    const float out = scale_by(a.p.shape.scale / (mantissa(q_scale) * mantissa(fine_and_bits)), log2_w - 15 - lift - exponent_of(q_scale) - fine);
    a.w.fine[padded_again * TILE + row] = fine_and_bits;
    a.w.out[padded_again * TILE + row] = lost ? nan_float() : takes_part ? clamp(out, FLT_MAX) : infinity();
    QueryRecord<Dp>& record = records_again[row / QUERIES];
    const int i = row % QUERIES / 2 * 4 + row % 2;
    float* s = reinterpret_cast<float*>(record.s) + i;
    __half* u = reinterpret_cast<__half*>(record.u) + i;
    s[0] = scale, s[2] = takes_part ? static_cast<float>(log2_rho + 15) + log2f(mantissa_of_row) - lse2 : -infinity();
    const __half2 factor_and_offset = in_halves(c, delta16, shift);
    u[0] = __low2half(factor_and_offset), u[2] = __high2half(factor_and_offset);
    if (row % QUERIES) record.padding[row % QUERIES - 1] = 0.f;
    if (row % QUERIES < 32) {
      const uint32_t content = __reduce_add_sync(~0u, __float_as_uint(lse)) & THRESHOLD_BITS;
      if (row % QUERIES == 0) record.thresholds = content << 16 | content;
      const float dv_scale = e_record == NONE ? 0.f : scale_by(1.f / 127.f, e_record + 1 - 15), dk_scale = exp2_int(min(log2_w - 15, 127));
      (&record.dv_scale)[row % QUERIES] = row % QUERIES == 0 ? (e_record == UNBOUNDED ? nan_float() : dv_scale)
                                       : row % QUERIES == 1 ? (record_broken ? nan_float() : dk_scale) : 0.f;
    }
  }
  if (__syncthreads_or(lifted)) {  // rows of very different weight in one record
    shrink_tokens<Dp>(tile8[0], row_shrink, token_at);
    __syncthreads();
  }
  for (int i = 0; i < records_of_tile; ++i) {
    write_transposed<Dp, QUERIES>(records_again[i].q8t, tile8[0], i * QUERIES);
    write_transposed<Dp, QUERIES>(records_again[i].do8t, tile8[1], i * QUERIES);
  }
}

// ---------------------------------------------------------------------------------------------------- launches

template <typename T, int Dp>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  const size_t key_blocks = a.keys.tiles * a.p.shape.heads_kv, query_blocks = a.queries.tiles * a.p.shape.heads_q;
  if (a.queries.cu_seqlens) launch_kernel(backward_rest_kernel<T, BackwardArgs>, REST_BLOCKS, THREADS, 0, stream, a);
  if (key_blocks) launch_kernel(prepare_keys_kernel<T, Dp>, key_blocks, THREADS, 0, stream, a);
  if (query_blocks) launch_kernel(prepare_queries_kernel<T, Dp>, query_blocks, THREADS, 0, stream, a);
}

}  // namespace

void prepare(const BackwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm90

// Backward: dQ, dK and dV, five matmuls in INT8 and dP = dO V^T in 16 bits, on mma.sync. Bound, schedule, variants:
// docs/sm80.md.
//
// Two kernels, so that every scale lies along an axis that is not contracted, nothing is summed across blocks, and the
// same call gives the same bits:
//   dkv_kernel  rows are keys, columns the queries of all heads of the group: S^T -> P^T -> dV += P^T dO,
//               dP^T -> dS^T -> dK += dS^T Q
//   dq_kernel   rows are queries, columns keys: S, dP -> dS -> dQ += dS K
// S and dP are computed in both: cheaper here than to pass P and dS through shared memory. P and dS stay in registers:
// rounded to 8 bits, the accumulators of S and dP are the A operand of the last matmul. The constants L, c, d, L', out
// are those of layout.cuh.
#include "matmul.cuh"

namespace sagetrain::sm80 {
namespace {

constexpr float LARGEST_INVERSE = 60000.f;  // of a scale held in half precision

// Scales of the rows r and r + 8 of a warp tile: the largest of `x` (magnitudes) over its columns becomes `levels`.
// inverse: what multiplies x; scale: its exact reciprocal's stand-in for dequantising. NaN stays NaN.
template <int n>
__device__ __forceinline__ void row_scales(const __half2 (&x)[n][2], float levels, bool is_signed, __half2 (&inverse)[2], float (&scale)[2]) {
  __half2 top[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    top[r] = is_signed ? __habs2(x[0][r]) : x[0][r];
#pragma unroll
    for (int i = 1; i < n; ++i) top[r] = __hmax2_nan(top[r], is_signed ? __habs2(x[i][r]) : x[i][r]);
  }
  __half2 both = __hmax2_nan(__lows2half2(top[0], top[1]), __highs2half2(top[0], top[1]));
  both = __hmax2_nan(both, __shfl_xor_sync(~0u, both, 1));
  both = __hmax2_nan(both, __shfl_xor_sync(~0u, both, 2));
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float wish = __fdividef(levels, r ? __high2float(both) : __low2float(both));
    if (wish > LARGEST_INVERSE) wish = LARGEST_INVERSE;
    const __half rounded = __float2half_rn(wish);
    inverse[r] = __half2half2(rounded);
    scale[r] = __fdividef(1.f, __half2float(rounded));
  }
}

// The two halves, or zeros in their place.
__device__ __forceinline__ __half2 keep(__half2 x, bool low, bool high) {
  const uint32_t bits = reinterpret_cast<uint32_t&>(x) & ((low ? 0xFFFFu : 0u) | (high ? 0xFFFF0000u : 0u));
  return reinterpret_cast<const __half2&>(bits);
}

// Rounds 32 columns (four 8-column tiles) to 8 bits: an A operand.
__device__ __forceinline__ void to_operand(uint32_t (&a)[4], const __half2 (*x)[2], const __half2 (&inverse)[2]) {
  const __half2 magic = __float2half2_rn(MAGIC_HALF);
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int r = 0; r < 2; ++r)
      a[2 * half + r] = low_bytes(__hfma2(x[2 * half][r], inverse[r], magic), __hfma2(x[2 * half + 1][r], inverse[r], magic));
}

// x H over the channels of an accumulator (Sylvester's Hadamard matrix): undoes the rotation of q and k.
template <int tiles>
__device__ __forceinline__ void unrotate(float (&x)[tiles][4], int t) {
#pragma unroll
  for (int n = 0; n < tiles; ++n)
#pragma unroll
    for (int r = 0; r < 4; r += 2) {  // channel bit 0
      const float a = x[n][r], b = x[n][r + 1];
      x[n][r] = a + b, x[n][r + 1] = a - b;
    }
#pragma unroll
  for (int bit = 1; bit <= 2; bit *= 2)  // channel bits 1 and 2: the lane within its quad
#pragma unroll
    for (int n = 0; n < tiles; ++n)
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float other = __shfl_xor_sync(~0u, x[n][c], bit);
        x[n][c] = t & bit ? other - x[n][c] : x[n][c] + other;
      }
#pragma unroll
  for (int bit = 1; bit < tiles; bit *= 2)  // the others: which 8-column tile
#pragma unroll
    for (int n = 0; n < tiles; ++n)
      if (!(n & bit))
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float a = x[n][c], b = x[n | bit][c];
          x[n][c] = a + b, x[n | bit][c] = a - b;
        }
}

// ---------------------------------------------------------------------------------------------------- matmuls of a step

// 16-row tiles of a warp, warps of a block (TILE rows), blocks that a multiprocessor is to hold, and 8-column tiles whose
// products are under way at a time: what the registers allow.
template <int Dp>
struct DkvShape { static constexpr int row_tiles = Dp == 64 ? 2 : 1, warps = 8 / row_tiles, blocks = Dp == 64 ? 2 : 1, group = 2; };
template <int Dp>
struct DqShape { static constexpr int row_tiles = Dp == 64 ? 2 : 1, warps = 4, blocks = 2, group = Dp == 64 ? 4 : 2, rows = 16 * row_tiles * warps; };

constexpr int COLUMNS = 64;  // of a step
static_assert(COLUMNS == KEYS && COLUMNS == QUERIES);

// sum += scale * (x times a matrix [channel][COLUMNS] of bytes in shared memory), x the rounded operand of dS.
template <int group, int m, int channel_tiles>
__device__ __forceinline__ void accumulate(float (&sum)[m][channel_tiles][4], const uint32_t (&x)[m][2][4], const float (&scale)[m][2], uint32_t matrix) {
#pragma unroll
  for (int first = 0; first < channel_tiles; first += group) {
    int y[group][m][4];
    product_int8<false, COLUMNS>(y, x, matrix + first * 8 * COLUMNS);
#pragma unroll
    for (int n = 0; n < group; ++n)
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int c = 0; c < 4; ++c)
          sum[i][first + n][c] = fmaf(__int_as_float(y[n][i][c]) - MAGIC_FLOAT, scale[i][c / 2], sum[i][first + n][c]);
  }
}

// ---------------------------------------------------------------------------------------------------- rows are keys

// Which keys a warp of dkv_kernel owns, which queries see them, and their records in order.
template <int Dp, int row_tiles>
struct KeyRows {
  int head, k0, offset, first_block, blocks, steps, warp_row, group, t;
  bool causal;
  Span keys;
  const BackwardQueries<Dp>* record;  // of the next step
  int64_t head_stride;                // records from one query head to the next
  int block;                          // of the record's queries, from first_block on

  __device__ explicit KeyRows(const BackwardArgs& a) {
    const int heads_kv = a.p.shape.heads_kv, group_heads = a.p.shape.heads_q / heads_kv;
    const int number = block_number(), tile = number / heads_kv;
    head = number % heads_kv;  // causal: the first keys have the most queries
    keys = span_of_tile(a.keys, tile);
    k0 = (tile - keys.first_tile) * TILE;
    const Span queries = span_of(a.queries, keys.sequence);
    offset = keys.length - queries.length;
    causal = a.p.shape.is_causal;
    first_block = causal ? max(0, k0 - offset) / QUERIES : 0;
    blocks = max(0, (queries.length + QUERIES - 1) / QUERIES - first_block);
    steps = blocks * group_heads;
    const int lane = threadIdx.x % 32;
    group = lane / 4, t = lane % 4;
    warp_row = k0 + threadIdx.x / 32 * (16 * row_tiles);
    head_stride = static_cast<int64_t>(a.queries.tiles) * (TILE / QUERIES);
    block = first_block;
    record = static_cast<const BackwardQueries<Dp>*>(a.w.queries) + head * group_heads * head_stride + queries.first_tile * (TILE / QUERIES) + block;
  }
  __device__ __forceinline__ bool exists() const { return k0 >= 0 && k0 < keys.length; }
  __device__ __forceinline__ int key(int i, int r) const { return warp_row + 16 * i + group + 8 * r; }
  __device__ __forceinline__ void advance() {
    ++record;
    if (++block == first_block + blocks) block = first_block, record += head_stride - blocks;
  }
  // Of the step's queries, the first that sees the warp's first key; and whether one of the warp's keys is not seen by all.
  __device__ __forceinline__ int diagonal(int block) const { return causal ? warp_row - offset - block * QUERIES : -TILE; }
  static __device__ __forceinline__ bool masked(int diagonal) { return diagonal + 16 * row_tiles - 1 > 0; }

  __device__ __forceinline__ void load_k8(uint32_t (&operand)[row_tiles][Dp / 32][4], float (&scale)[row_tiles][2], const BackwardArgs& a) const {
    const int64_t row = row_index(keys.batch, a.p.shape.heads_kv, head, a.keys.tokens, keys.begin);
#pragma unroll
    for (int i = 0; i < row_tiles; ++i) {
      const bool valid[2] = {key(i, 0) < keys.length, key(i, 1) < keys.length};
      const void* rows[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        rows[r] = a.p.k8 + (row + key(i, r)) * Dp;
        scale[i][r] = valid[r] ? a.p.k_scale[row + key(i, r)] : 0.f;
      }
      load_operand(operand[i], rows, valid, t, Dp);
    }
  }
  // Writes this warp's rows of dK or dV.
  template <typename T>
  __device__ __forceinline__ void store(void* to, const Strides& s, const float (&x)[row_tiles][Dp / 8][4], float factor, int head_dim) const {
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        if (key(i, r) >= keys.length) continue;
        T* row = static_cast<T*>(to) + keys.batch * s.batch + head * s.head + (keys.begin + key(i, r)) * s.token;
#pragma unroll
        for (int n = 0; n < Dp / 8; ++n)
          if (n * 8 + 2 * t < head_dim)
            *reinterpret_cast<uint32_t*>(row + n * 8 + 2 * t) = pack16<T>(factor * x[i][n][2 * r], factor * x[i][n][2 * r + 1]);
      }
  }
};

template <typename T, int Dp>
__global__ void __launch_bounds__(32 * DkvShape<Dp>::warps, DkvShape<Dp>::blocks) dkv_kernel(const __grid_constant__ BackwardArgs a) {
  using Record = BackwardQueries<Dp>;
  constexpr int m = DkvShape<Dp>::row_tiles, group = DkvShape<Dp>::group, threads = 32 * DkvShape<Dp>::warps;
  constexpr int tiles = COLUMNS / 8, channel_tiles = Dp / 8;
  constexpr bool v_in_shared = Dp == 64;  // its registers are needed for dK and dV
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  KeyRows<Dp, m> rows(a);
  if (!rows.exists()) return;
  if (rows.steps) copy_run<sizeof(Record), threads>(stages, rows.record);
  commit_copies();

  uint32_t k8[m][Dp / 32][4];
  float k_scale[m][2];
  rows.load_k8(k8, k_scale, a);
  const T* v_first = static_cast<const T*>(a.p.v) + rows.keys.batch * a.p.v_strides.batch + rows.head * a.p.v_strides.head;
  const int head_dim = a.p.shape.head_dim;
  const float* v_mean = a.p.v_mean + (static_cast<int64_t>(rows.keys.sequence) * a.p.shape.heads_kv + rows.head) * head_dim;
  uint32_t v[m][v_in_shared ? 2 : Dp / 16][4];  // not used when v is in shared memory
  const uint32_t v_tile = stages + 2 * sizeof(Record);
  if constexpr (v_in_shared) {
    for (int i = threadIdx.x; i < TILE * Dp / 8; i += threads) {
      const int row = i / (Dp / 8), chunk = i % (Dp / 8);
      const bool valid = rows.k0 + row < rows.keys.length && chunk * 8 < head_dim;
      const T* from = v_first + (rows.keys.begin + rows.k0 + row) * a.p.v_strides.token + chunk * 8;
      const uint4 x = valid ? centre<T>(*reinterpret_cast<const uint4*>(from), v_mean + chunk * 8) : uint4{0, 0, 0, 0};
      *reinterpret_cast<uint4*>(shared + 2 * sizeof(Record) + swizzle<2 * Dp>(row, chunk)) = x;
    }
  } else {
#pragma unroll
    for (int i = 0; i < m; ++i) {
      const bool valid[2] = {rows.key(i, 0) < rows.keys.length, rows.key(i, 1) < rows.keys.length};
      const void* const v_rows[2] = {v_first + (rows.keys.begin + rows.key(i, 0)) * a.p.v_strides.token,
                                     v_first + (rows.keys.begin + rows.key(i, 1)) * a.p.v_strides.token};
      load_operand(v[i], v_rows, valid, rows.t, 2 * head_dim);
#pragma unroll
      for (int k = 0; k < Dp / 16; ++k)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int channel = 16 * k + j / 2 * 8 + 2 * rows.t;
          if (valid[j % 2] && channel < head_dim) v[i][k][j] = centre<T>(v[i][k][j], v_mean + channel);
        }
    }
  }
  float dk[m][channel_tiles][4] = {}, dv[m][channel_tiles][4] = {};
  const int t = rows.t;
  const float start[m][2] = {};

  for (int step = 0; step < rows.steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();
    const int diagonal = rows.diagonal(rows.block);
    rows.advance();
    if (step + 1 < rows.steps) copy_run<sizeof(Record), threads>(stages + (step + 1) % 2 * sizeof(Record), rows.record);
    commit_copies();
    const Record& record = reinterpret_cast<const Record*>(shared)[step % 2];

    // S^T, and P'' of it
    __half2 p[m][tiles][2];
#pragma unroll
    for (int first = 0; first < tiles; first += group) {
      int s[group][m][4];
      product_int8<false, Dp>(s, k8, shared_address(record.q8) + first * 8 * Dp);
#pragma unroll
      for (int j = 0; j < group; ++j) {
        const int n = first + j;
        const float2 scale = record.q_scale[n * 4 + t], bias = record.q_bias[n * 4 + t], l = record.l[n * 4 + t];
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float x = fmaf(__int_as_float(s[j][i][2 * r]), scale.x, bias.x), y = fmaf(__int_as_float(s[j][i][2 * r + 1]), scale.y, bias.y);
            p[i][n][r] = __floats2half2_rn(exp2_fast(fmaf(x, k_scale[i][r], -l.x)), exp2_fast(fmaf(y, k_scale[i][r], -l.y)));
          }
      }
    }
    if (rows.masked(diagonal)) {
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int n = 0; n < tiles; ++n)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int first = diagonal + 16 * i + rows.group + 8 * r - n * 8 - 2 * t;  // of this pair, the first query that sees the key
            p[i][n][r] = keep(p[i][n][r], first <= 0, first <= 1);
          }
    }

    // dV += P^T dO
    __half2 inverse[2];
    float scale[m][2];
    uint32_t operand[m][2][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      row_scales(p[i], 255.f, false, inverse, scale[i]);
      to_operand(operand[i][0], &p[i][0], inverse), to_operand(operand[i][1], &p[i][4], inverse);
    }
#pragma unroll
    for (int first = 0; first < channel_tiles; first += group) {
      int y[group][m][4];
      product_int8<true, COLUMNS>(y, operand, shared_address(record.do8t) + first * 8 * COLUMNS);
#pragma unroll
      for (int j = 0; j < group; ++j) {
        const int n = first + j;
        const float2 do_scale = record.do_scale[n * 4 + t], do_bias = record.do_bias[n * 4 + t];
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            dv[i][n][c] = fmaf(fmaf(__int_as_float(y[j][i][c]), c % 2 ? do_scale.y : do_scale.x, c % 2 ? do_bias.y : do_bias.x), scale[i][c / 2], dv[i][n][c]);
      }
    }

    // dP^T, and dS'' = P'' u in the place of P''
#pragma unroll
    for (int first = 0; first < tiles; first += group) {
      float dp[group][m][4];
      const uint32_t columns = shared_address(record.do16) + first * 16 * Dp;
      if constexpr (v_in_shared)
        product_16bit<T, 2 * Dp, Dp / 16>(dp, InShared<2 * Dp>{v_tile + (rows.warp_row - rows.k0) * 2 * Dp}, columns, start);
      else
        product_16bit<T, 2 * Dp, Dp / 16>(dp, InRegisters<m, Dp / 16>{v}, columns, start);
#pragma unroll
      for (int j = 0; j < group; ++j) {
        const int n = first + j;
        const float2 c = record.c[n * 4 + t], d = record.d[n * 4 + t];
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            p[i][n][r] = __hmul2(p[i][n][r], __floats2half2_rn(fmaf(dp[j][i][2 * r], c.x, -d.x), fmaf(dp[j][i][2 * r + 1], c.y, -d.y)));
      }
    }

    // dK += dS^T Q
    const float unit = record.dk_unit[0];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      row_scales(p[i], 127.f, true, inverse, scale[i]);
      scale[i][0] *= unit, scale[i][1] *= unit;
      to_operand(operand[i][0], &p[i][0], inverse), to_operand(operand[i][1], &p[i][4], inverse);
    }
    accumulate<group>(dk, operand, scale, shared_address(record.q8t));
  }
  const KeyRows<Dp, m> again(a);
#pragma unroll
  for (int i = 0; i < m; ++i) unrotate(dk[i], t);
  again.template store<T>(a.p.d_k, a.p.d_k_strides, dk, a.p.shape.scale, a.p.shape.head_dim);
  again.template store<T>(a.p.d_v, a.p.d_v_strides, dv, 0x1p-15f, a.p.shape.head_dim);
}

// ---------------------------------------------------------------------------------------------------- rows are queries

template <typename T, int Dp>
__global__ void __launch_bounds__(32 * DqShape<Dp>::warps, DqShape<Dp>::blocks) dq_kernel(const __grid_constant__ BackwardArgs a) {
  using Record = BackwardKeys<Dp>;
  constexpr int m = DqShape<Dp>::row_tiles, group_tiles = DqShape<Dp>::group, tiles = COLUMNS / 8, threads = 32 * DqShape<Dp>::warps;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared);

  const QueryRows<DqShape<Dp>::rows> block(a.p.shape, a.queries, a.keys);
  if (!block.exist()) return;
  const int steps = (block.visible + KEYS - 1) / KEYS;

  const Record* next = static_cast<const Record*>(a.w.keys) + (static_cast<int64_t>(block.head_kv) * a.keys.tiles + block.keys.first_tile) * (TILE / KEYS);
  if (steps) copy_run<sizeof(Record), threads>(stages, next);
  commit_copies();

  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  const int warp_row = block.first + threadIdx.x / 32 * 16 * m;

  uint32_t q8[m][Dp / 32][4], d_o[m][Dp / 16][4];
  float q_scale[m][2], l[m][2], start[m][2];
  const int64_t padded_row = block.padded(a.queries);
#pragma unroll
  for (int i = 0; i < m; ++i) {
    const void* q_rows[2];
    bool valid[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = warp_row + 16 * i + group + 8 * r;
      valid[r] = query < block.queries.length;
      q_rows[r] = a.p.q8 + block.index(a.p.shape, query) * Dp;
      const float4 constants = valid[r] ? a.w.q_rows[padded_row + query] : float4{0.f, INFINITY, 0.f, 0.f};
      q_scale[i][r] = constants.x, l[i][r] = constants.y, start[i][r] = -constants.z;
      // dO from its record, where 16-byte chunks are swizzled
      const auto& record = static_cast<const BackwardQueries<Dp>*>(a.w.queries)[(padded_row + query) / QUERIES];
#pragma unroll
      for (int k = 0; k < Dp / 16; ++k)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          d_o[i][k][2 * half + r] = !valid[r] ? 0u : *reinterpret_cast<const uint32_t*>(reinterpret_cast<const char*>(record.do16) +
                                                                       swizzle<2 * Dp>(query % QUERIES, 2 * k + half) + 4 * t);
    }
    load_operand(q8[i], q_rows, valid, t, Dp);
  }

  float dq[m][Dp / 8][4] = {};

  // Within the step: the last key that exists, and the last that the warp's first row sees.
  int last = block.last_key(), diagonal = block.diagonal(a.p.shape, warp_row);
  for (int step = 0; step < steps; ++step) {
    wait_for_copies<0>();
    __syncthreads();
    if (step + 1 < steps) copy_run<sizeof(Record), threads>(stages + (step + 1) % 2 * sizeof(Record), ++next);
    commit_copies();
    const Record& record = reinterpret_cast<const Record*>(shared)[step % 2];

    __half2 ds[m][tiles][2];
#pragma unroll
    for (int first = 0; first < tiles; first += group_tiles) {
      float dp[group_tiles][m][4];
      product_16bit<T, 2 * Dp, Dp / 16>(dp, InRegisters<m, Dp / 16>{d_o}, shared_address(record.v) + first * 16 * Dp, start);
      int s[group_tiles][m][4];
      product_int8<false, Dp>(s, q8, shared_address(record.k8) + first * 8 * Dp);
#pragma unroll
      for (int j = 0; j < group_tiles; ++j) {
        const int n = first + j;
        const float2 scale = record.k_scale[n * 4 + t], bias = record.k_bias[n * 4 + t];
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const float x = fmaf(__int_as_float(s[j][i][2 * r]), scale.x, bias.x), y = fmaf(__int_as_float(s[j][i][2 * r + 1]), scale.y, bias.y);
            ds[i][n][r] = __floats2half2_rn(exp2_fast(fmaf(x, q_scale[i][r], -l[i][r])) * dp[j][i][2 * r] * scale.x,
                                            exp2_fast(fmaf(y, q_scale[i][r], -l[i][r])) * dp[j][i][2 * r + 1] * scale.y);
          }
      }
    }
    if (min(diagonal, last) < KEYS - 1) {
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int n = 0; n < tiles; ++n)
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            const int limit = min(last, diagonal + 16 * i + group + 8 * r) - n * 8 - 2 * t;
            ds[i][n][r] = keep(ds[i][n][r], limit >= 0, limit >= 1);
          }
    }

    last -= KEYS, diagonal -= KEYS;

    float scale[m][2];
    uint32_t ds8[m][2][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      __half2 inverse[2];
      row_scales(ds[i], 127.f, true, inverse, scale[i]);
      to_operand(ds8[i][0], &ds[i][0], inverse), to_operand(ds8[i][1], &ds[i][4], inverse);
    }
    accumulate<group_tiles>(dq, ds8, scale, shared_address(record.k8t));
  }

  const QueryRows<DqShape<Dp>::rows> again(a.p.shape, a.queries, a.keys);
  const int head_dim = a.p.shape.head_dim;
  const float* k_mean = a.p.k_mean + (static_cast<int64_t>(again.queries.sequence) * a.p.shape.heads_kv + again.head_kv) * head_dim;
#pragma unroll
  for (int i = 0; i < m; ++i) {
    unrotate(dq[i], t);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = again.first + threadIdx.x / 32 * 16 * m + 16 * i + group + 8 * r;
      if (query >= again.queries.length) continue;
      const float4 constants = a.w.q_rows[again.padded(a.queries) + query];
      // A row that sees no key has no gradient, whatever d_lse says of its lse of -inf.
      const bool blind = constants.y == INFINITY;
      const float d_lse = a.p.d_lse && !blind ? a.p.d_lse[again.index(a.p.shape, query)] * a.p.shape.scale : 0.f;
      T* to = again.template row<T>(a.p.d_q, a.p.d_q_strides, query);
#pragma unroll
      for (int n = 0; n < Dp / 8; ++n) {
        const int channel = n * 8 + 2 * t;
        if (channel >= head_dim) continue;
        const float2 mean = blind ? float2{0.f, 0.f} : *reinterpret_cast<const float2*>(k_mean + channel);
        *reinterpret_cast<uint32_t*>(to + channel) = pack16<T>(fmaf(constants.w, dq[i][n][2 * r], d_lse * mean.x),
                                                               fmaf(constants.w, dq[i][n][2 * r + 1], d_lse * mean.y));
      }
    }
  }
}

template <typename T, int Dp>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  constexpr int dkv_bytes = 2 * sizeof(BackwardQueries<Dp>) + (Dp == 64 ? TILE * 2 * Dp : 0);
  constexpr int dq_bytes = 2 * sizeof(BackwardKeys<Dp>);
  cudaFuncSetAttribute(dkv_kernel<T, Dp>, cudaFuncAttributeMaxDynamicSharedMemorySize, dkv_bytes);
  cudaFuncSetAttribute(dq_kernel<T, Dp>, cudaFuncAttributeMaxDynamicSharedMemorySize, dq_bytes);
  const unsigned key_blocks = a.keys.tiles * a.p.shape.heads_kv, query_blocks = all_tiles<DqShape<Dp>::rows>(a.queries) * a.p.shape.heads_q;
  if (key_blocks) dkv_kernel<T, Dp><<<key_blocks, 32 * DkvShape<Dp>::warps, dkv_bytes, stream>>>(a);
  if (query_blocks) dq_kernel<T, Dp><<<query_blocks, 32 * DqShape<Dp>::warps, dq_bytes, stream>>>(a);
}

}  // namespace

void gradients(const BackwardArgs& a, cudaStream_t stream) {
  const bool small = a.p.shape.head_dim_padded == 64;
  if (a.p.shape.dtype == DType::bfloat16)
    small ? launch<__nv_bfloat16, 64>(a, stream) : launch<__nv_bfloat16, 128>(a, stream);
  else
    small ? launch<__half, 64>(a, stream) : launch<__half, 128>(a, stream);
}

}  // namespace sagetrain::sm80

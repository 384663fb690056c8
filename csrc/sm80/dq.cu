// dQ by itself, for `deterministic` calls and where the shared memory of backward.cu does not fit: rows are queries, columns
// keys; S, dP -> dS -> dQ += dS K. S and dP are computed here a second time, so that nothing is summed across blocks.
//
//   barrier               who waits, before what                    who arrives, after what
//   wait_for_copies       every thread, once a step: reading it     the thread's own copies of this record
//   __syncthreads         all, once a step: reading this record,    all: their own copies are there, and they have left the record before
//                         copying the next to the other stage
//
//   shared memory, KiB    2 x 16.5, D = 128: 2 x 32.5    stages of a DqKeyRecord
//
//   tile size             what limits it: DqShape
#include "backward.cuh"

namespace sagetrain::sm80 {
namespace {

// What limits each number is registers (sm_90: 244, D = 128: 202 a thread): q8 and dO take 48 of them, dQ 64; dP and S
// in flight 64, D = 128: 32.
template <int Dp>
struct DqShape {
  static constexpr int row_tiles = Dp == 64 ? 2 : 1;    // 16-row tiles of a warp
  static constexpr int warps = 4, blocks = 2;           // of a block; blocks that a multiprocessor is to hold
  static constexpr int rows = 16 * row_tiles * warps;   // queries of a block
  static constexpr int in_flight = 4;                   // 8-column tiles of a product under way at a time
};

template <typename T, int Dp>
__global__ void __launch_bounds__(32 * DqShape<Dp>::warps, DqShape<Dp>::blocks) dq_kernel(const __grid_constant__ BackwardArgs a) {
  after_previous();
  using Record = DqKeyRecord<Dp>;
  constexpr int m = DqShape<Dp>::row_tiles, in_flight = DqShape<Dp>::in_flight, tiles = COLUMNS / 8, threads = 32 * DqShape<Dp>::warps;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared);

  const QueryRows<DqShape<Dp>::rows> block(a.p.shape, a.queries, a.keys, block_number());
  if (!block.exists()) return;
  const int steps = (block.visible + DQ_KEYS - 1) / DQ_KEYS;

  const Record* next = static_cast<const Record*>(a.w.keys) + (static_cast<int64_t>(block.head_kv) * a.keys.tiles + block.keys.first_tile) * (TILE / DQ_KEYS);
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
      const auto& record = static_cast<const QueryRecord<Dp>*>(a.w.queries)[(padded_row + query) / QUERIES];
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
  uint32_t thresholds[m];  // of this step (common/round.cuh): last bits of the rows' LSE
#pragma unroll
  for (int i = 0; i < m; ++i) thresholds[i] = thresholds_of(0, t) + __byte_perm(__float_as_uint(l[i][0]), __float_as_uint(l[i][1]), 0x5410);

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
    for (int first = 0; first < tiles; first += in_flight) {
      float dp[in_flight][m][4];
      product_16bit<T, 2 * Dp, Dp / 16>(dp, InRegisters<m, Dp / 16>{d_o}, shared_address(record.v) + first * 16 * Dp, start);
      int s[in_flight][m][4];
      product_int8<false, Dp>(s, q8, shared_address(record.k8) + first * 8 * Dp);
#pragma unroll
      for (int j = 0; j < in_flight; ++j) {
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
    if (min(diagonal, last) < DQ_KEYS - 1) {
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

    last -= DQ_KEYS, diagonal -= DQ_KEYS;

    float scale[m][2];
    uint32_t ds8[m][2][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      __half2 inverse[2];
      row_scales(ds[i], DS_LEVELS, true, inverse, scale[i]);
      const __half2 shift = shifts_of(thresholds[i]);
      thresholds[i] += NEXT_TILE;
      to_operand(ds8[i][0], &ds[i][0], inverse, shift), to_operand(ds8[i][1], &ds[i][4], inverse, shift);
    }
    accumulate<in_flight>(dq, ds8, scale, shared_address(record.k8t));
  }

  const QueryRows<DqShape<Dp>::rows> again(a.p.shape, a.queries, a.keys, block_number());
  store_dq<T, Dp>(dq, a, again, again.first + threadIdx.x / 32 * 16 * m);
}

template <typename T, int Dp>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  constexpr int bytes = 2 * sizeof(DqKeyRecord<Dp>);
  static_assert(bytes <= SHARED_BYTES);
  cudaFuncSetAttribute(dq_kernel<T, Dp>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const unsigned blocks = all_tiles<DqShape<Dp>::rows>(a.queries) * a.p.shape.heads_q;
  if (blocks) launch_kernel(dq_kernel<T, Dp>, blocks, 32 * DqShape<Dp>::warps, bytes, stream, a);
}

}  // namespace

void query_gradients(const BackwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm80

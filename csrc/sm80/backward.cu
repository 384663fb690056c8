// dK and dV, and dQ along with them: five matmuls in INT8 and dP = dO V^T in 16 bits, on mma.sync. Rows are keys, columns
// the queries of all heads that share them:
//
//   S^T -> P^T -> dV += P^T dO,    dP^T -> dS^T -> dK += dS^T Q,    dS^T -> shared memory -> dQ += dS K
//
// P and dS stay in registers: rounded to 8 bits, the accumulators of S^T and dP^T are the A operand of the next matmul.
// dQ needs dS the other way round, and another scale: one per query and block of keys. So the warps agree on the largest
// of each column, round dS a second time into shared memory, and multiply that by K; the result is added to the query's
// sum in device memory. Where there are few tiles of keys, several blocks share one (`splits`), each with its part of the
// queries, and add up dK and dV in device memory too. finish.cu turns sums into gradients.
//
// Such sums have no fixed order. `deterministic` calls do without (`fused` false, one split): dq.cu computes their dQ.
// Schedule, bound, variants: docs/sm80.md; constants: layout.cuh.
//
//   barrier             who waits, before what                          who arrives, after what
//   wait_for_copies     every thread, once a step: reading it           the thread's own copies of this record (at first: of the keys, too)
//   __syncthreads       all, at first: reading the block's keys         all: their own copies are there
//                       all, once a step: reading this record,          all: their own copies are there, and they have left the record
//                       copying the next to the other stage             before and dS of that step
//                       fused, all: reading `top`, rounding dS          all: they have written their warp's `top`
//                       fused, all: dQ                                  all: they have written their part of dS and its scales
//
//   shared memory, KiB  D = 64      D = 128
//   two stages          2 x 21.8    2 x 42.3    QueryRecord
//   v                   16          (0)         of the KeyRecord; D = 128: on its way to registers, in the second stage
//   k8t, key_scales     9           17          of the KeyRecord; fused, like all below
//   ds8                 8           8           dS, rounded
//   top, query_scales   0.8         1.3         largest |dS| of a warp and query; scales of dS
//   all                 77          111         without `fused` 59.5, 84.5; DkvMemory has the places
//
//   tile size           what limits it: DkvShape
#include <cstddef>

#include "backward.cuh"

namespace sagetrain::sm80 {
namespace {

// TILE keys a block. What limits each number is registers (sm_90: 254 a thread): dK and dV of 32 x 64 or 16 x 128 take 128.
template <int Dp>
struct DkvShape {
  static constexpr int row_tiles = Dp == 64 ? 2 : 1;   // 16-row tiles of a warp
  static constexpr int warps = 8 / row_tiles;          // of a block
  static constexpr int blocks = Dp == 64 ? 2 : 1;      // that a multiprocessor is to hold
  static constexpr int in_flight = 4 / row_tiles;      // 8-column tiles of a product under way at a time
};

// ---------------------------------------------------------------------------------------------------- dQ beside dK and dV

// Where dkv_kernel keeps what in shared memory, in bytes.
template <int Dp, bool fused>
struct DkvMemory {
  static constexpr int warps = DkvShape<Dp>::warps;
  static constexpr bool v_in_shared = Dp == 64;  // its registers are needed for dK and dV
  static constexpr int v = v_in_shared ? 2 * sizeof(QueryRecord<Dp>) : sizeof(QueryRecord<Dp>);    // KeyRecord::v; else on its way to registers
  static constexpr int k8t = 2 * sizeof(QueryRecord<Dp>) + (v_in_shared ? TILE * 2 * Dp : 0);      // KeyRecord from k8t on
  static constexpr int key_scales = k8t + Dp * TILE;
  static constexpr int k_bound = key_scales + TILE * sizeof(KeyScale);
  static constexpr int ds8 = k_bound + 16;                              // [query][key], in the order of k8t
  static constexpr int top = ds8 + QUERIES * TILE;                      // [warp][query / 2] largest |dS|
  static constexpr int query_scales = top + warps * (QUERIES / 2) * 4;  // [query]
  static constexpr int bytes = fused ? query_scales + QUERIES * 4 : k8t;
};
static_assert(sizeof(QueryRecord<128>) >= TILE * 2 * 128);

// The warp's largest |dS| of each query: columns 2 lane and 2 lane + 1 in this lane. Halves the columns with every fold.
template <int m>
__device__ __forceinline__ __half2 column_tops(const __half2 (&ds)[m][8][2]) {
  __half2 top[8];
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    top[n] = __hmax2_nan(__habs2(ds[0][n][0]), __habs2(ds[0][n][1]));
#pragma unroll
    for (int i = 1; i < m; ++i) top[n] = __hmax2_nan(top[n], __hmax2_nan(__habs2(ds[i][n][0]), __habs2(ds[i][n][1])));
  }
#pragma unroll
  for (int half = 4; half; half /= 2) {
    const bool upper = threadIdx.x & 4 * half;
#pragma unroll
    for (int n = 0; n < half; ++n) {
      const uint32_t low = reinterpret_cast<uint32_t&>(top[n]), high = reinterpret_cast<uint32_t&>(top[n + half]);
      const uint32_t mine = upper ? high : low, other = __shfl_xor_sync(~0u, upper ? low : high, 4 * half);
      top[n] = __hmax2_nan(reinterpret_cast<const __half2&>(mine), reinterpret_cast<const __half2&>(other));
    }
  }
  return top[0];
}

// Rounds dS to 8 bits by the columns' scales and the thresholds of to_operand, and writes it to shared memory.
template <int Dp, int m>
__device__ __forceinline__ void store_ds(unsigned char* shared, const __half2 (&ds)[m][8][2], __half2 shift) {
  using Memory = DkvMemory<Dp, true>;
  const int thread = thread_number(), warp = thread / 32, lane = thread % 32, group = lane / 4, t = lane % 4;
  const __half2* tops = reinterpret_cast<const __half2*>(shared + Memory::top) + lane;
  __half2 top = tops[0];
#pragma unroll
  for (int w = 1; w < Memory::warps; ++w) top = __hmax2_nan(top, tops[w * (QUERIES / 2)]);
  const __half2 mine = {inverse_scale(__low2float(top), DS_LEVELS), inverse_scale(__high2float(top), DS_LEVELS)};
  const float k_bound = *reinterpret_cast<const float*>(shared + Memory::k_bound);
  if (warp == 0)
    reinterpret_cast<float2*>(shared + Memory::query_scales)[lane] = {k_bound * scale_of(__low2float(top), DS_LEVELS), k_bound * scale_of(__high2float(top), DS_LEVELS)};
#pragma unroll
  for (int n = 0; n < 8; ++n) {
    const __half2 inverse = __shfl_sync(~0u, mine, 4 * n + t);
    unsigned char* to = shared + Memory::ds8;
#pragma unroll
    for (int i = 0; i < m; ++i) {
      const __half2 low = round_halves(ds[i][n][0], inverse, n % 2 ? __hneg2(shift) : shift);
      const __half2 high = round_halves(ds[i][n][1], inverse, n % 2 ? shift : __hneg2(shift));
      const uint32_t pairs = __byte_perm(reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high), 0x6240);
#pragma unroll
      for (int c = 0; c < 2; ++c)  // two keys of column 2t, then of 2t + 1
        *reinterpret_cast<uint16_t*>(to + swizzle<TILE>(8 * n + 2 * t + c, warp * m + i) + group * 2) = static_cast<uint16_t>(c ? pairs >> 16 : pairs);
    }
  }
}

// Adds 16 bytes to device memory, each float by itself.
__device__ __forceinline__ void add4(float4* to, float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 900
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(a), "f"(b), "f"(c), "f"(d) : "memory");
#else
  float* x = reinterpret_cast<float*>(to);
  atomicAdd(x, a), atomicAdd(x + 1, b), atomicAdd(x + 2, c), atomicAdd(x + 3, d);
#endif
}

// dS K of the step's queries, added to their sums. A warp has 16 queries and 64 channels.
template <int Dp>
__device__ __forceinline__ void add_dq(unsigned char* shared, float* sums) {
  using Memory = DkvMemory<Dp, true>;
  constexpr int in_flight = 4;
  const int thread = thread_number(), lane = thread % 32, row_tile = thread / 32 % 4, first_tile = thread / 128 * 8;
  uint32_t ds8[1][TILE / 32][4];
  const InShared<TILE> rows{shared_address(shared) + Memory::ds8 + row_tile * 16 * TILE, thread};
#pragma unroll
  for (int k = 0; k < TILE / 32; ++k) rows.get(ds8[0][k], 0, k);
  const float* scales = reinterpret_cast<const float*>(shared + Memory::query_scales) + row_tile * 16 + lane / 4;
  const float scale[2] = {scales[0], scales[8]};
  float4* to = reinterpret_cast<float4*>(sums) + (row_tile * (Dp / 8) + first_tile) * 32 + lane;
  const uint32_t columns = shared_address(shared) + Memory::k8t + first_tile * 8 * TILE;
#pragma unroll
  for (int first = 0; first < 8; first += in_flight) {
    int y[in_flight][1][4];
    product_int8<false, TILE>(y, ds8, columns + first * 8 * TILE);
#pragma unroll
    for (int n = 0; n < in_flight; ++n) {
      float x[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) x[c] = (__int_as_float(y[n][0][c]) - MAGIC_FLOAT) * scale[c / 2];
      add4(to + (first + n) * 32, x[0], x[1], x[2], x[3]);
    }
  }
}

// ---------------------------------------------------------------------------------------------------- the kernel

template <typename T, int Dp, bool fused>
__global__ void __launch_bounds__(32 * DkvShape<Dp>::warps, DkvShape<Dp>::blocks) dkv_kernel(const __grid_constant__ BackwardArgs a) {
  after_previous();
  using Record = QueryRecord<Dp>;
  using Memory = DkvMemory<Dp, fused>;
  constexpr int m = DkvShape<Dp>::row_tiles, in_flight = DkvShape<Dp>::in_flight, threads = 32 * DkvShape<Dp>::warps;
  constexpr int tiles = COLUMNS / 8, channel_tiles = Dp / 8;
  constexpr bool v_in_shared = Memory::v_in_shared;
  extern __shared__ __align__(128) unsigned char shared[];
  const uint32_t stages = shared_address(shared);
  KeyRows<Dp, m> rows(a, block_number());
  if (!rows.exists()) return;
  const Record* records = static_cast<const Record*>(a.w.queries);
  const int64_t key_tile = static_cast<int64_t>(rows.head) * a.keys.tiles + rows.keys.first_tile + rows.k0 / TILE;
  const KeyRecord<Dp>& keys = static_cast<const KeyRecord<Dp>*>(a.w.blocks)[key_tile];
  copy_run<sizeof(keys.v), threads>(stages + Memory::v, keys.v);
  if constexpr (fused) copy_run<sizeof(keys) - offsetof(KeyRecord<Dp>, k8t), threads>(stages + Memory::k8t, keys.k8t);
  if (rows.steps) copy_run<sizeof(Record), threads>(stages, records + rows.record);
  commit_copies();

  uint32_t k8[m][Dp / 32][4];
  float k_scale[m][2];
  rows.load_k8(k8, k_scale, a);
  wait_for_copies<0>();
  __syncthreads();
  const InShared<2 * Dp> v_rows{stages + Memory::v + static_cast<int>(threadIdx.x) / 32 * 16 * m * 2 * Dp};
  uint32_t v[m][v_in_shared ? 2 : Dp / 16][4];  // not used when v is in shared memory
  if constexpr (!v_in_shared) {
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int k = 0; k < Dp / 16; ++k) v_rows.get(v[i][k], i, k);
  }
  float dk[m][channel_tiles][4] = {}, dv[m][channel_tiles][4] = {};
  const float start[m][2] = {};

  for (int left = rows.steps, stage = 0; left > 0; --left) {
    wait_for_copies<0>();
    __syncthreads();
    const Record& record = *reinterpret_cast<const Record*>(shared + stage);
    stage = sizeof(Record) - stage;
    if (left > 1) copy_run<sizeof(Record), threads>(stages + stage, records + rows.following(a));
    commit_copies();

    const int thread = thread_number(), group = thread % 32 / 4, t = thread % 4;  // again, rather than in registers all the time
    const KeyScale* key_scales = reinterpret_cast<const KeyScale*>(shared + Memory::key_scales) + thread / 32 * 16 * m + group;
    if constexpr (fused) {  // rather than in registers all the time
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) k_scale[i][r] = key_scales[16 * i + 8 * r].k_scale;
    }

    // S^T, and P'' of it
    __half2 p[m][tiles][2];
#pragma unroll
    for (int first = 0; first < tiles; first += in_flight) {
      int s[in_flight][m][4];
      product_int8<false, Dp>(s, k8, shared_address(record.q8) + first * 8 * Dp);
#pragma unroll
      for (int j = 0; j < in_flight; ++j) {
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
    if constexpr (fused) {
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const __half2 relative = key_scales[16 * i + 8 * r].relative;
#pragma unroll
          for (int n = 0; n < tiles; ++n) p[i][n][r] = __hmul2(p[i][n][r], relative);
        }
    }
    // Not every query sees the warp's last key; and keys past the end must not reach dQ.
    if (rows.diagonal + 16 * m - 1 > 0 || (fused && rows.left < 16 * m)) {
#pragma unroll
      for (int i = 0; i < m; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int key = 16 * i + group + 8 * r;
          const int first = !fused || key < rows.left ? rows.diagonal + key - 2 * t : TILE;  // of its queries, from the lane's first
#pragma unroll
          for (int n = 0; n < tiles; ++n) p[i][n][r] = keep(p[i][n][r], first <= n * 8, first <= n * 8 + 1);
        }
    }

    // dV += P^T dO. Where dQ sums over the same dS, tiles of keys have thresholds of their own: by the keys that are left.
    const auto shift_of = [&](int thread) { return shifts_of(thresholds_of((fused ? rows.left : rows.diagonal) + thread / 4, thread % 4) + record.thresholds); };
    __half2 shift = shift_of(thread);
    __half2 inverse[2];
    float scale[m][2];
    uint32_t operand[m][2][4];
#pragma unroll
    for (int i = 0; i < m; ++i) {
      row_scales(p[i], P_LEVELS, false, inverse, scale[i]);
      to_operand(operand[i][0], &p[i][0], inverse, shift), to_operand(operand[i][1], &p[i][4], inverse, shift);
    }
#pragma unroll
    for (int first = 0; first < channel_tiles; first += in_flight) {
      int y[in_flight][m][4];
      product_int8<true, COLUMNS>(y, operand, shared_address(record.do8t) + first * 8 * COLUMNS);
#pragma unroll
      for (int j = 0; j < in_flight; ++j) {
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
    for (int first = 0; first < tiles; first += in_flight) {
      float dp[in_flight][m][4];
      const uint32_t columns = shared_address(record.do16) + first * 16 * Dp;
      if constexpr (v_in_shared)
        product_16bit<T, 2 * Dp, Dp / 16>(dp, v_rows, columns, start);
      else
        product_16bit<T, 2 * Dp, Dp / 16>(dp, InRegisters<m, Dp / 16>{v}, columns, start);
#pragma unroll
      for (int j = 0; j < in_flight; ++j) {
        const int n = first + j;
        const float2 c = record.c[n * 4 + t], d = record.d[n * 4 + t];
#pragma unroll
        for (int i = 0; i < m; ++i)
#pragma unroll
          for (int r = 0; r < 2; ++r)
            p[i][n][r] = __hmul2(p[i][n][r], __floats2half2_rn(fmaf(dp[j][i][2 * r], c.x, -d.x), fmaf(dp[j][i][2 * r + 1], c.y, -d.y)));
      }
    }
    if constexpr (fused) reinterpret_cast<__half2*>(shared + Memory::top)[thread_number()] = column_tops(p);

    // dK += dS^T Q
    const float dk_scale = record.dk_scale;
    shift = shift_of(thread_number());  // again, rather than in a register meanwhile
#pragma unroll
    for (int i = 0; i < m; ++i) {
      row_scales(p[i], DS_LEVELS, true, inverse, scale[i]);
      scale[i][0] *= dk_scale, scale[i][1] *= dk_scale;
      to_operand(operand[i][0], &p[i][0], inverse, shift), to_operand(operand[i][1], &p[i][4], inverse, shift);
    }
    constexpr bool early = m == 2;  // round dS for dQ before the product for dK or after: whichever spills no register
    if constexpr (fused && early) {
      __syncthreads();
      store_ds<Dp, m>(shared, p, shift);
    }
    accumulate<in_flight>(dk, operand, scale, shared_address(record.q8t));

    if constexpr (fused) {
      if constexpr (!early) {
        __syncthreads();
        store_ds<Dp, m>(shared, p, shift);
      }
      __syncthreads();
      add_dq<Dp>(shared, a.w.d_q + static_cast<int64_t>(rows.record) * (QUERIES * Dp));
    }
    rows.advance(a);
  }

  const KeyRows<Dp, m> again(a, block_number());
  if constexpr (fused) {
    const KeyScale* key_scales = reinterpret_cast<const KeyScale*>(shared + Memory::key_scales) + threadIdx.x / 32 * 16 * m + again.group;
#pragma unroll
    for (int i = 0; i < m; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float out = __fdividef(1.f, __low2float(key_scales[16 * i + 8 * r].relative));
#pragma unroll
        for (int n = 0; n < channel_tiles; ++n)
#pragma unroll
          for (int c = 2 * r; c < 2 * r + 2; ++c) dk[i][n][c] *= out, dv[i][n][c] *= out;
      }
  }
  if (!fused || a.splits == 1) {
    again.template store_dk<T>(a, dk), again.template store_dv<T>(a, dv);
    return;
  }
  float4 *dk_sums = again.sums(a, 0), *dv_sums = again.sums(a, 1);
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int n = 0; n < channel_tiles; ++n) {
      add4(dk_sums + (i * channel_tiles + n) * 32, dk[i][n][0], dk[i][n][1], dk[i][n][2], dk[i][n][3]);
      add4(dv_sums + (i * channel_tiles + n) * 32, dv[i][n][0], dv[i][n][1], dv[i][n][2], dv[i][n][3]);
    }
}

// ---------------------------------------------------------------------------------------------------- launches

template <typename T, int Dp, bool fused>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  constexpr int bytes = DkvMemory<Dp, fused>::bytes;
  static_assert(fused || bytes <= SHARED_BYTES);  // `fused` is chosen where a block has as much (attention.cu)
  cudaFuncSetAttribute(dkv_kernel<T, Dp, fused>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const unsigned blocks = a.keys.tiles * a.p.shape.heads_kv * a.splits;
  if (blocks) launch_kernel(dkv_kernel<T, Dp, fused>, blocks, 32 * DkvShape<Dp>::warps, bytes, stream, a);
}

}  // namespace

int fused_bytes(const Shape& s) { return s.head_dim_padded == 64 ? DkvMemory<64, true>::bytes : DkvMemory<128, true>::bytes; }

void gradients(const BackwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) {
    constexpr int Dp = decltype(dim)::value;
    a.fused ? launch<decltype(number), Dp, true>(a, stream) : launch<decltype(number), Dp, false>(a, stream);
  });
}

}  // namespace sagetrain::sm80

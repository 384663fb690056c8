// Forward: o = softmax(scale Q K^T) V, both matmuls in INT8, on mma.sync. Bound, schedule, variants: docs/sm80.md.
//
// One block owns 64 queries of one head, one warp 16 of them, and walks the key tiles with two stages (the next tile is copied while this one
// is computed). Everything between the two matmuls stays in registers.
//
//   barrier                 who waits, before what                      who arrives, after what
//   wait_for_copies         every thread, once a step: reading it       the thread's own copies of this tile
//   __syncthreads           all, once a step: reading this tile,        all: their own copies are there, and they have left the tile before
//                           copying the next to the other stage
//
//   shared memory, KiB      2 x 17.5, D = 128: 2 x 34    stages of a KeyValueRecord
//
//   tile size               what limits it (sm_90)
//   BLOCK_WARPS = 4 x 16    registers, 164 or 207 of a thread: three such blocks of a multiprocessor, D = 128: two (BLOCKS)
//   TILE = 128 keys         registers: S of a warp is 64 a thread; and V's scales are made for as many (common/quantise_keys.cuh)
//   IN_FLIGHT = 8           registers: 8-column tiles of a product under way at a time (matmul.cuh)
#include "layout.cuh"
#include "matmul.cuh"

namespace sagetrain::sm80 {
namespace {

constexpr int BLOCK_WARPS = 4;  // 16 queries each
template <int Dp>
constexpr int BLOCKS = Dp == 64 ? 3 : 2;
constexpr int IN_FLIGHT = 8;
constexpr float GROWTH = 10.f;  // a row's maximum may outgrow its reference by 2^10 before O and l are rescaled

// Largest over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

template <typename T, int Dp>
__global__ void __launch_bounds__(32 * BLOCK_WARPS, BLOCKS<Dp>) forward_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  constexpr int k_steps = Dp / 32;     // of S
  constexpr int key_tiles = TILE / 8;  // 8-column tiles of S
  constexpr int channel_tiles = Dp / 8;
  extern __shared__ __align__(128) unsigned char shared[];

  constexpr int rows = 16 * BLOCK_WARPS, threads = 32 * BLOCK_WARPS;
  using Record = KeyValueRecord<Dp>;
  const QueryRows<rows> block(a.p.shape, a.queries, a.keys, block_number());
  if (!block.exists()) return;
  const int tiles = (block.visible + TILE - 1) / TILE;

  const uint32_t stages = shared_address(shared);
  const Record* next = static_cast<const Record*>(a.w.keys) + static_cast<int64_t>(block.head_kv) * a.keys.tiles + block.keys.first_tile;
  if (tiles) copy_run<sizeof(Record), threads>(stages, next);
  commit_copies();

  const int lane = threadIdx.x % 32, group = lane / 4, t = lane % 4;
  const int warp_row = block.first + threadIdx.x / 32 * 16;

  uint32_t q_operand[1][k_steps][4];
  float q_scale[2];
  uint32_t content[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = warp_row + group + 8 * r;
    const bool valid = query < block.queries.length;
    const int64_t row = block.index(a.p.shape, query);
    content[r] = valid ? __float_as_uint(a.p.lse[row]) : 0;  // scale * q . k_mean
    const float scale = valid ? scale22(a.p.q_scale[row] * (a.p.shape.scale * LOG2E * Dp)) : 0.f;
    q_scale[r] = scale < 0x1p-120f ? 0x1p-120f : scale;  // not 0, for -inf * 0 is no number; NaN stays
#pragma unroll
    for (int k = 0; k < k_steps; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        q_operand[0][k][2 * half + r] = valid ? *reinterpret_cast<const uint32_t*>(a.p.q8 + row * Dp + 32 * k + 16 * half + 4 * t) : 0;
  }

  float o[channel_tiles][4] = {};
  float sum[2] = {0.f, 0.f};             // of exp2(s - reference), over all lanes of the row already
  float reference[2] = {-3e38f, -3e38f}; // below any score: what O and the sum are scaled by; within GROWTH of the running maximum
  const uint32_t ones = 0x3C003C00;      // two halves
  uint32_t thresholds = thresholds_of(0, t) + __byte_perm(content[0], content[1], 0x5410);  // of these 32 keys: common/round.cuh

  // Within the tile: the last key that exists, and the last that the warp's first row sees.
  int last = block.last_key(), diagonal = block.diagonal(a.p.shape, warp_row);
  for (int tile = 0; tile < tiles; ++tile) {
    wait_for_copies<0>();
    __syncthreads();
    if (tile + 1 < tiles) copy_run<sizeof(Record), threads>(stages + (tile + 1) % 2 * sizeof(Record), ++next);
    commit_copies();
    const Record& record = reinterpret_cast<const Record*>(shared)[tile % 2];

    // S = Q K^T, then the keys' scales
    float x[key_tiles][4];
#pragma unroll
    for (int first = 0; first < key_tiles; first += IN_FLIGHT) {
      int s[IN_FLIGHT][1][4];
      product_int8<false, Dp>(s, q_operand, shared_address(record.k8) + first * 8 * Dp);
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; ++j) {
        const int n = first + j;
        const float2 scale = record.k_scale[n * 4 + t], bias = record.k_bias[n * 4 + t];
#pragma unroll
        for (int c = 0; c < 4; ++c) x[n][c] = fmaf(__int_as_float(s[j][0][c]), c % 2 ? scale.y : scale.x, c % 2 ? bias.y : bias.x);
      }
    }
    if (min(diagonal, last) < TILE - 1) {
#pragma unroll
      for (int n = 0; n < key_tiles; ++n)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (n * 8 + 2 * t + c % 2 > min(last, diagonal + group + c / 2 * 8)) x[n][c] = -INFINITY;
        }
    }
    last -= TILE, diagonal -= TILE;
    if (tile == 0) {  // the first key, at which many rows look alone, goes no further: O begins with its value, which is not rounded
      const T* v = block.template first_key<T>(a.p.v, a.p.v_strides);
      const float* v_mean = a.w.v_mean + (static_cast<int64_t>(block.queries.sequence) * a.p.shape.heads_kv + block.head_kv) * a.p.shape.head_dim;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float own = x[0][2 * r] == -INFINITY ? -INFINITY : x[0][2 * r] * q_scale[r];  // the scale may be NaN
        const float score = __shfl_sync(~0u, own, lane & ~3);
        if (t == 0) x[0][2 * r] = -INFINITY;
        if (score == -INFINITY) continue;  // sees no key
        reference[r] = score, sum[r] = 1.f;
#pragma unroll
        for (int n = 0; n < channel_tiles; ++n)
#pragma unroll
          for (int c = 0; c < 2; ++c) {
            const int channel = n * 8 + 2 * t + c;
            o[n][2 * r + c] = channel < a.p.shape.head_dim ? clamp(to_float(v[channel]) - v_mean[channel], AMAX_MAX) : 0.f;
          }
      }
    }

    // P = exp2(s - tile maximum) in half precision: it is rounded to 8 bits next
    float factor[2], shift[2];
    bool grown = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float top = fmaxf(x[0][2 * r], x[0][2 * r + 1]);
#pragma unroll
      for (int n = 1; n < key_tiles; ++n) top = fmaxf(top, fmaxf(x[n][2 * r], x[n][2 * r + 1]));
      top = __fmul_ru(quad_max(top), q_scale[r]);  // no score exceeds it: a byte would wrap around
      shift[r] = top == -INFINITY ? 0.f : top;
      factor[r] = top;
      grown |= top > reference[r] + GROWTH;
    }
    if (__any_sync(~0u, grown)) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float higher = fmaxf(reference[r], factor[r]);
        const float shrink = exp2_fast(reference[r] - higher);
        reference[r] = higher;
        sum[r] *= shrink;
#pragma unroll
        for (int n = 0; n < channel_tiles; ++n) o[n][2 * r] *= shrink, o[n][2 * r + 1] *= shrink;
      }
    }
    float p_sum[4] = {0.f, 0.f, 0.f, 0.f};
    uint32_t p8[1][key_tiles / 4][4];
#pragma unroll
    for (int step = 0; step < key_tiles / 4; ++step) {
      const __half2 add = shifts_of(thresholds);
      thresholds += NEXT_TILE;
      __half2 p[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float* pair = &x[step * 4 + i][2 * r];
          p[i][r] = __floats2half2_rn(exp2_fast(fmaf(pair[0], q_scale[r], -shift[r])), exp2_fast(fmaf(pair[1], q_scale[r], -shift[r])));
        }
#pragma unroll
      for (int i = 0; i < 4; i += 2) {  // row sums by the tensor core: P times a column of ones
        const uint32_t operand[4] = {reinterpret_cast<uint32_t&>(p[i][0]), reinterpret_cast<uint32_t&>(p[i][1]),
                                     reinterpret_cast<uint32_t&>(p[i + 1][0]), reinterpret_cast<uint32_t&>(p[i + 1][1])};
        mma_16bit<__half>(p_sum, operand, ones, ones, p_sum);
      }
      const __half2 levels[2] = {__float2half2_rn(P_LEVELS), __float2half2_rn(P_LEVELS)};
      to_operand(p8[0][step], p, levels, add);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      factor[r] = exp2_fast(factor[r] - reference[r]);
      sum[r] = fmaf(p_sum[2 * r], factor[r], sum[r]);
      factor[r] *= 1.f / P_LEVELS;
    }

    // O += P V
#pragma unroll
    for (int first = 0; first < channel_tiles; first += IN_FLIGHT) {
      int d[IN_FLIGHT][1][4];
      product_int8<true, TILE>(d, p8, shared_address(record.v8t) + first * 8 * TILE);
#pragma unroll
      for (int j = 0; j < IN_FLIGHT; ++j) {
        const int n = first + j;
        const float2 scale = record.v_scale[n * 4 + t], bias = record.v_bias[n * 4 + t];
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float value = fmaf(__int_as_float(d[j][0][c]), c % 2 ? scale.y : scale.x, c % 2 ? bias.y : bias.x);
          o[n][c] = fmaf(value, factor[c / 2], o[n][c]);
        }
      }
    }
  }

  const QueryRows<rows> again(a.p.shape, a.queries, a.keys, block_number());
  const int head_dim = a.p.shape.head_dim;
  const float* v_mean = a.w.v_mean + (static_cast<int64_t>(again.queries.sequence) * a.p.shape.heads_kv + again.head_kv) * head_dim;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int query = again.first + threadIdx.x / 32 * 16 + group + 8 * r;
    const bool exists = query < again.queries.length, blind = sum[r] == 0.f;  // blind: sees no key
    const float inverse = blind ? 0.f : 1.f / sum[r];
    store_row<channel_tiles>(again.template row<T>(a.p.o, a.p.o_strides, query), exists, head_dim, [&](int n) {
      const int channel = n * 8 + 2 * t;
      const float2 mean = blind || channel >= head_dim ? float2{} : *reinterpret_cast<const float2*>(v_mean + channel);
      return pack16<T>(fmaf(o[n][2 * r], inverse, mean.x), fmaf(o[n][2 * r + 1], inverse, mean.y));
    });
    if (exists && t == 0) {
      const int64_t i = again.index(a.p.shape, query);
      const float smooth = blind ? -INFINITY : (reference[r] + log2f(sum[r])) * LN2;
      a.p.lse_smooth[i] = smooth;
      a.p.lse[i] = blind ? -INFINITY : smooth + a.p.lse[i];  // held scale * q . k_mean
    }
  }
}

template <typename T, int Dp>
void launch(const ForwardArgs& a, cudaStream_t stream) {
  constexpr int bytes = 2 * sizeof(KeyValueRecord<Dp>);
  static_assert(bytes <= SHARED_BYTES);
  cudaFuncSetAttribute(forward_kernel<T, Dp>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const int64_t blocks = all_tiles<16 * BLOCK_WARPS>(a.queries) * a.p.shape.heads_q;
  if (blocks) launch_kernel(forward_kernel<T, Dp>, static_cast<unsigned>(blocks), 32 * BLOCK_WARPS, bytes, stream, a);
}

}  // namespace

void attend(const ForwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm80

// Forward: o = softmax(scale Q K^T) V, both matmuls in INT8, on wgmma. Bound, schedule, variants: docs/sm90-forward.md.
//
// One block per multiprocessor, for good. A producer thread copies key records into a ring of stages; three warpgroups of consumers own
// 64 queries each and walk over them. The consumers take turns with the exponentials, so that one uses the special function unit while
// the others multiply, scale and wait for the tensor cores.
#include "../../sm80/matmul.cuh"
#include "../hopper.cuh"
#include "layout.cuh"

namespace sagetrain::sm90 {
namespace {

using sm80::QueryRows, sm80::all_tiles, sm80::store_row;

constexpr int CONSUMERS = 3;  // warpgroups
constexpr int ROWS = 64 * CONSUMERS, THREADS = 128 * (1 + CONSUMERS);
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 160;  // 128 * (24 + 3 * 160) of the 65536 of a multiprocessor
template <int Dp>
constexpr int STAGES = Dp == 64 ? 6 : 4;
template <int Dp>
constexpr int HANDOVER = Dp == 64 ? 2 : 3;  // of a tile's four steps of exponentials: after these the next warpgroup may start
constexpr float GROWTH = 10.f;  // a row's maximum may outgrow its reference by 2^10 before O and the sum are rescaled

// Barriers by number; 0 is __syncthreads. Warpgroup w waits for its turn at TURN + w, and for its own threads at ALONE + w.
constexpr int TURN = 1, ALONE = TURN + CONSUMERS;

template <int Dp>
struct __align__(1024) Queries {
  int8_t q8[64 * Dp];  // [query][channel], swizzled
};
template <int Dp>
struct __align__(1024) Stage {
  ForwardKeys<Dp> keys;
};
template <int Dp>
struct Shared {
  Stage<Dp> stages[STAGES<Dp>];
  Queries<Dp> queries[CONSUMERS];
  uint4 ones[TILE * 32 / 16];  // bytes of 255
  uint64_t full[STAGES<Dp>], empty[STAGES<Dp>];
};

// Where a warp is in the ring, and in which of its rounds.
template <int Dp>
struct Position {
  int stage = 0, parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES<Dp>) stage = 0, parity ^= 1;
  }
};

// The pieces of work, ROWS queries of a head each, longest first; a block takes them there and back, so that each gets long and short ones.
__device__ __forceinline__ int pieces(const ForwardArgs& a) { return static_cast<int>(all_tiles<ROWS>(a.queries) * a.p.shape.heads_q); }
__device__ __forceinline__ int piece_of(int round) {
  return static_cast<int>(round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x));
}
__device__ __forceinline__ int tiles_of(const QueryRows<ROWS>& block) { return (block.visible + TILE - 1) / TILE; }

// ---------------------------------------------------------------------------------------------------- arithmetic

__device__ __forceinline__ float multiply_up(float x, float y) {
  float z;
  asm("mul.rp.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}
// Also of subnormal numbers, which --use_fast_math would take for zeros.
__device__ __forceinline__ float multiply_add(float x, float y, float z) {
  float r;
  asm("fma.rn.f32 %0, %1, %2, %3;" : "=f"(r) : "f"(x), "f"(y), "f"(z));
  return r;
}
__device__ __forceinline__ int quad_max(int x) {
  x = max(x, __shfl_xor_sync(~0u, x, 1));
  return max(x, __shfl_xor_sync(~0u, x, 2));
}

// ---------------------------------------------------------------------------------------------------- consumers

template <typename T, int Dp>
struct Consumer {
  static constexpr int key_tiles = TILE / 8, channel_tiles = Dp / 8, steps = TILE / 32;

  const ForwardArgs& a;
  Shared<Dp>& shared;
  const int warpgroup = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
  Position<Dp> position = {};

  // The first of a warp's 16 rows, within the piece.
  __device__ __forceinline__ static int warp_row() { return thread_number() / 32 * 16 - 64; }  // after the 128 threads of the producer

  // This warpgroup's queries to shared memory.
  __device__ __forceinline__ void load_queries(const QueryRows<ROWS>& block) {
    synchronise(ALONE + warpgroup, 128);  // nobody multiplies the ones before them any more
#pragma unroll
    for (int i = threadIdx.x % 128; i < 64 * Dp / 16; i += 128) {
      const int row = i / (Dp / 16), chunk = i % (Dp / 16), query = block.first + 64 * warpgroup + row;
      const bool exists = query < block.queries.length;
      *reinterpret_cast<uint4*>(shared.queries[warpgroup].q8 + swizzle<Dp>(row, chunk)) =
          exists ? *reinterpret_cast<const uint4*>(a.p.q8 + block.index(a.p.shape, query) * Dp + 16 * chunk) : uint4{0, 0, 0, 0};
    }
    fence_async();
    synchronise(ALONE + warpgroup, 128);
  }

  // s = S + OFFSET of this warpgroup's queries and the keys of a stage.
  __device__ __forceinline__ void scores(int (&s)[4 * key_tiles], const ForwardKeys<Dp>& keys) {
    const uint64_t ones = uniform_matrix(shared_address(shared.ones));
    const uint64_t q8 = matrix<Dp>(shared_address(shared.queries[warpgroup].q8)), k8 = matrix<Dp>(shared_address(keys.k8));
    begin_products();
    multiply_u8u8<false>(s, ones, ones);
#pragma unroll
    for (int k = 0; k < Dp / 32; ++k) multiply_s8s8<true>(s, q8 + 2 * k, k8 + 2 * k);
    commit_products();
    wait_for_products<0>();
  }

  // P = exp2(x * scale - shift), rounded to bytes, and the sums of its rows' halves. Gives the turn to the next warpgroup on the way.
  //
  // The order of the instructions matters, and the assembler changes it: it moves all that can start early to the front, where it fills
  // no gap between exponentials. `zero` is 0 because the number of tokens is not negative, but the assembler does not know; so what
  // is combined with bytes of P and `zero` cannot start before these bytes are done.
  __device__ __forceinline__ void exponentials(uint32_t (&p8)[steps][4], float (&total)[2], const float (&x)[key_tiles][4], const float (&scale)[2],
                                               const float (&shift)[2]) {
    constexpr int pairs = 2 * key_tiles;  // pair i: row i / 4 % 2, columns of 8-column tile i / 8 * 4 + i % 4
    const int zero = a.queries.tokens >> 31;
    const __half2 gain = __float2half2_rn(255.f), round = __float2half2_rn(MAGIC_HALF);
    const auto row = [](int i) { return i / 4 % 2; };
    const auto tile = [](int i) { return i / 8 * 4 + i % 4; };
    float y[pairs][2], from[2] = {shift[0], shift[1]};
    __half2 p[pairs], rounded[pairs], sum[2] = {};
#pragma unroll
    for (int i = 0; i < pairs + 3; ++i) {  // a pair's four stages lie in four turns of this loop, so that none waits for the one before
      if (i < pairs) {
        const int r = row(i);
        if (i >= 8 && i % 4 == 0) from[r] = __int_as_float(__float_as_int(from[r]) | (p8[(i - 8) / 8][r] & zero));
        const float* pair = &x[tile(i)][2 * r];
        y[i][0] = fmaf(pair[0], scale[r], -from[r]), y[i][1] = fmaf(pair[1], scale[r], -from[r]);
      }
      if (i >= 1 && i < pairs + 1) y[i - 1][0] = exp2_fast(y[i - 1][0]), y[i - 1][1] = exp2_fast(y[i - 1][1]);
      if (i >= 2 && i < pairs + 2) p[i - 2] = __floats2half2_rn(y[i - 2][0], y[i - 2][1]);
      if (i >= 3) rounded[i - 3] = __hfma2(p[i - 3], gain, round);
      if (i >= 3 && i % 2 == 0) {
        const int j = i - 3, r = row(j);  // pairs j - 1 and j
        p8[j / 8][2 * (j % 4 / 2) + r] = low_bytes(rounded[j - 1], rounded[j]);
        sum[r] = __hadd2(sum[r], __hadd2(p[j - 1], p[j]));
        if (j == 8 * HANDOVER<Dp> - 1) arrive(TURN + (warpgroup + 1) % CONSUMERS + (p8[j / 8][3] & zero), 256);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float2 halves = __half22float2(sum[r]);
      total[r] = halves.x + halves.y;
    }
  }

  // d = P V of a stage.
  __device__ __forceinline__ void values(int (&d)[4 * channel_tiles], const uint32_t (&p8)[steps][4], const ForwardKeys<Dp>& keys) {
    const uint64_t v8 = matrix<TILE>(shared_address(keys.v8t));
    begin_products();
    multiply_u8s8<false>(d, p8[0], v8);
#pragma unroll
    for (int k = 1; k < steps; ++k) multiply_u8s8<true>(d, p8[k], v8 + 2 * k);
    commit_products();
    wait_for_products<0>();
  }

  __device__ __forceinline__ void attend(int piece) {
    const QueryRows<ROWS> block(a.p.shape, a.queries, a.keys, piece);
    if (!block.exist()) return;
    const int tiles = tiles_of(block), group = lane / 4, t = lane % 4;
    load_queries(block);
    float q_unit[2];  // q_scale_i * scale * log2(e) * Dp
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = block.first + warp_row() + group + 8 * r;
      const float q_scale = query < block.queries.length ? a.p.q_scale[block.index(a.p.shape, query)] : 0.f;
      q_unit[r] = scale22(q_scale * (a.p.shape.scale * LOG2E * Dp));
    }

    float o[channel_tiles][4] = {};
    float sum[2] = {0.f, 0.f};              // of exp2(s - reference), this lane's share
    float reference[2] = {-3e38f, -3e38f};  // below any score: what O and the sum are scaled by; within GROWTH of the running maximum

    // Within the tile: the last key that exists, and the last that the warp's first row sees.
    int last = block.last_key(), diagonal = block.diagonal(a.p.shape, block.first + warp_row());
    for (int tile = 0; tile < tiles; ++tile) {
      const ForwardKeys<Dp>& keys = shared.stages[position.stage].keys;
      wait(shared_address(&shared.full[position.stage]), position.parity);
      int s[4 * key_tiles];
      scores(s, keys);

      float x[key_tiles][4];
#pragma unroll
      for (int n = 0; n < key_tiles; ++n) {
        const float4 k = keys.k[4 * n + t];
#pragma unroll
        for (int c = 0; c < 4; ++c) x[n][c] = multiply_add(__int_as_float(s[4 * n + c]), c % 2 ? k.y : k.x, c % 2 ? k.w : k.z);
      }
      if (min(diagonal, last) < TILE - 1) {
#pragma unroll
        for (int n = 0; n < key_tiles; ++n)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (n * 8 + 2 * t + c % 2 > min(last, diagonal + group + c / 2 * 8)) x[n][c] = -INFINITY;
      }
      last -= TILE, diagonal -= TILE;

      // s = x * scale - shift + top, and top is the largest of a row (the smallest possible score, where all keys are hidden).
      float scale[2], shift[2], top[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        int x_top = 0;
#pragma unroll
        for (int n = 0; n < key_tiles; ++n) x_top = __vimax3_s32(x_top, __float_as_int(x[n][2 * r]), __float_as_int(x[n][2 * r + 1]));
        scale[r] = fmaxf(q_unit[r] * keys.unit, 1e-37f);  // not 0, for -inf * 0 is no number
        shift[r] = multiply_up(__int_as_float(quad_max(x_top)), scale[r]);  // up: P is never above 1
        top[r] = fmaf(-CENTRE, scale[r], shift[r]);
      }
      if (__any_sync(~0u, top[0] > reference[0] + GROWTH || top[1] > reference[1] + GROWTH)) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float higher = fmaxf(reference[r], top[r]);
          const float shrink = exp2_fast(reference[r] - higher);
          reference[r] = higher;
          sum[r] *= shrink;
#pragma unroll
          for (int n = 0; n < channel_tiles; ++n) o[n][2 * r] *= shrink, o[n][2 * r + 1] *= shrink;
        }
      }
      float factor[2], total[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[r] = exp2_fast(top[r] - reference[r]);

      synchronise(TURN + warpgroup, 256);
      uint32_t p8[steps][4];
      exponentials(p8, total, x, scale, shift);
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[r] = fmaf(total[r], factor[r], sum[r]), factor[r] *= 1.f / 255.f;

      int d[4 * channel_tiles];
      values(d, p8, keys);
#pragma unroll
      for (int n = 0; n < channel_tiles; ++n) {
        const float2 v = keys.v_scale[4 * n + t];
#pragma unroll
        for (int c = 0; c < 4; ++c) o[n][c] = fmaf(__int2float_rn(d[4 * n + c]) * (c % 2 ? v.y : v.x), factor[c / 2], o[n][c]);
      }
      __syncwarp();
      if (lane == 0) arrive(shared_address(&shared.empty[position.stage]));
      position.advance();
    }
    finish(piece, o, sum, reference);
  }

  // Divides by the sums and writes the results.
  __device__ __forceinline__ void finish(int piece, const float (&o)[channel_tiles][4], const float (&sum)[2], const float (&reference)[2]) {
    asm volatile("" : "+r"(piece));  // what is derived from it here does not occupy registers before
    const QueryRows<ROWS> block(a.p.shape, a.queries, a.keys, piece);
    const int head_dim = a.p.shape.head_dim, t = lane % 4;
    const float* v_mean = a.p.v_mean + (static_cast<int64_t>(block.queries.sequence) * a.p.shape.heads_kv + block.head_kv) * head_dim;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int query = block.first + warp_row() + lane / 4 + 8 * r;
      const bool exists = query < block.queries.length;
      const int64_t i = block.index(a.p.shape, query);
      float all = sum[r];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      if (exists && (__float_as_uint(a.p.q_scale[i]) & 0x7fffffff) >= 0x7f800000) all = __int_as_float(0x7fffffff);  // the query is not finite
      const bool blind = all == 0.f;  // sees no key
      const float inverse = blind ? 0.f : 1.f / all;
      store_row<channel_tiles>(block.template row<T>(a.p.o, a.p.o_strides, query), exists, head_dim, [&](int n) {
        const int channel = n * 8 + 2 * t;
        const float2 mean = blind || channel >= head_dim ? float2{} : *reinterpret_cast<const float2*>(v_mean + channel);
        return pack16<T>(fmaf(o[n][2 * r], inverse, mean.x), fmaf(o[n][2 * r + 1], inverse, mean.y));
      });
      if (exists && t == 0) {
        const float smooth = blind ? -INFINITY : (reference[r] + log2f(all)) * LN2;
        a.p.lse_smooth[i] = smooth;
        a.p.lse[i] = blind ? -INFINITY : smooth + a.p.lse[i];  // held scale * q . k_mean
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------- producer

template <int Dp>
__device__ __forceinline__ void produce(const ForwardArgs& a, Shared<Dp>& shared) {
  Position<Dp> position;
  for (int round = 0; piece_of(round) < pieces(a); ++round) {
    const QueryRows<ROWS> block(a.p.shape, a.queries, a.keys, piece_of(round));
    if (!block.exist()) continue;
    const ForwardKeys<Dp>* keys =
        static_cast<const ForwardKeys<Dp>*>(a.w.keys) + static_cast<int64_t>(block.head_kv) * a.keys.tiles + block.keys.first_tile;
    for (int tile = 0; tile < tiles_of(block); ++tile) {
      const uint32_t full = shared_address(&shared.full[position.stage]);
      wait(shared_address(&shared.empty[position.stage]), position.parity ^ 1);  // the first round finds all stages empty
      arrive_expecting(full, sizeof(ForwardKeys<Dp>));
      copy_bulk(shared_address(&shared.stages[position.stage].keys), keys + tile, sizeof(ForwardKeys<Dp>), full);
      position.advance();
    }
  }
}

template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS, 1) forward_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared<Dp>& shared = *reinterpret_cast<Shared<Dp>*>(bytes);
  if (threadIdx.x < TILE * 32 / 16) shared.ones[threadIdx.x] = uint4{~0u, ~0u, ~0u, ~0u};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES<Dp>; ++i) {
      init_barrier(shared_address(&shared.full[i]), 1);
      init_barrier(shared_address(&shared.empty[i]), 4 * CONSUMERS);
    }
    fence_barriers();
  }
  fence_async();
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce<Dp>(a, shared);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    Consumer<T, Dp> consumer{a, shared};
    if (consumer.warpgroup == CONSUMERS - 1) arrive(TURN, 256);  // the first turn is warpgroup 0's
    for (int round = 0; piece_of(round) < pieces(a); ++round) consumer.attend(piece_of(round));
  }
}

template <typename T, int Dp>
void launch(const ForwardArgs& a, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<Dp>);
  cudaFuncSetAttribute(forward_kernel<T, Dp>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t pieces = all_tiles<ROWS>(a.queries) * a.p.shape.heads_q;
  if (pieces) launch_kernel(forward_kernel<T, Dp>, static_cast<unsigned>(pieces < processors ? pieces : processors), THREADS, bytes, stream, a);
}

}  // namespace

void attend(const ForwardArgs& a, cudaStream_t stream) {
  sm80::dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm90

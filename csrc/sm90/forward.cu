// Forward: o = softmax(scale Q K^T) V, both matmuls in INT8, on wgmma. Bound, schedule, variants: docs/sm90-forward.md.
//
// One persistent block per multiprocessor. Of a first warpgroup, a thread (the producer) copies key records into a ring of stages, and three
// warps (the fetchers) fetch the next work tile: 192 queries of a head. Three warpgroups of consumers own 64 of them each and walk over the
// keys. They take turns with the exponentials, so that one uses the special function unit while the others multiply, scale and wait for the
// tensor cores.
//
//   barrier            who waits, before what                        who arrives, after what                               arrivals
//   stage.full         consumers: S of these keys                    producer: it announces the bytes, the copy brings them       1
//   stage.empty        producer: copying the next record to it       consumers: P V of these keys, lane 0 of each warp           12
//   work.full          consumers: the first product of the work tile fetchers: all is copied, every thread                       96
//   work.empty         fetchers: fetching the next but one           consumers: results are written, lane 0 of each warp         12
//   TURN + i (named)   consumer warp i: its exponentials             the same warp of the warpgroup before: half of its own      64 threads
//   FETCHED (named)    fetchers: copying by the tile's fields        fetchers: one of them has written these                     96 threads
//   0, __syncthreads   all, once: the first barrier above            all: one thread has initialised these
//
//   shared memory, KiB   D = 64    D = 128
//   stages               6 x 17    4 x 33     a KeyValueRecord, as one bulk copy, and its two barriers
//   work                 2 x 15    2 x 27     queries and all else that consumers need of a work tile: this and the next
//   all                  132       186        of 227
//
//   tile size                     what limits it
//   BLOCK_QUERIES = 3 x 64        registers: 64 rows of wgmma a warpgroup with 160 (S takes 64 of them, O 32 or 64) fill a multiprocessor three
//                                 times, beside 32 for the producer's; a fourth would get 112, and spills
//   TILE = 128 keys               registers: S; and V's scales are made for as many (common/quantise_keys.cuh)
//   STAGES = 6, D = 128: 4        nothing: 11 and 5 would fit
#include "../common/mma.cuh"
#include "hopper.cuh"
#include "layout.cuh"

namespace sagetrain::sm90 {
namespace {

constexpr int CONSUMERS = 3;  // warpgroups
constexpr int BLOCK_QUERIES = 64 * CONSUMERS, BLOCK_THREADS = 128 * (1 + CONSUMERS);
constexpr int FETCHERS = 96;                                      // threads 32 to 127; thread 0 is the producer
constexpr int PRODUCER_REGISTERS = 32, CONSUMER_REGISTERS = 160;  // 128 * (32 + 3 * 160): the 65536 of a multiprocessor
static_assert(128 * (PRODUCER_REGISTERS + CONSUMERS * CONSUMER_REGISTERS) <= registers_of(BLOCK_THREADS));
template <int Dp>
constexpr int STAGES = Dp == 64 ? 6 : 4;
constexpr float GROWTH = 10.f;           // a row's maximum may outgrow its reference by 2^10 before O and the sum are rescaled
constexpr float LOG255 = 7.9943534f;     // log2(255): P is computed 255 times as large
constexpr float LARGE = 1024.f;          // above it a float lacks too many digits of a score for its P to be summed before it is a byte
constexpr int HIDDEN = -2147483647 - 1;  // in place of the integer score of a key that the query does not see
constexpr int LOWEST = -(1 << 21);       // below every integer score

// Named barriers, by number. A turn is given by the warp of the same number in the warpgroup before: they share a scheduler.
constexpr int TURN = 1, FETCHED = TURN + 4 * CONSUMERS;
static_assert(FETCHED < NAMED_BARRIERS);

template <int Dp>
struct __align__(1024) Stage {
  KeyValueRecord<Dp> keys;
  uint64_t full, empty;
};

// BLOCK_QUERIES queries of a head, and what the consumers need to know of them.
template <int Dp>
struct __align__(1024) WorkTile {
  int8_t q8[CONSUMERS][64 * Dp];  // [query][channel], swizzled
  float q_scale[BLOCK_QUERIES];   // q_scale_i * scale * log2(e) * Dp
  float lse[BLOCK_QUERIES];       // scale * q_i . k_mean
  float v_mean[Dp], v_first[Dp];  // v_first: 255 (v - v_mean) of the sequence's first key
  void* o;                 // row of the first query
  const void* v;           // row of the first key
  int64_t first;           // index of the first query in [B, Hq, Tq]
  int64_t means;           // index of its mean of V in [N, Hkv, D]
  int rows;                // of the sequence, from the first query on; 0: there are no more work tiles
  int seen[CONSUMERS];     // tiles of keys that a warpgroup sees
  int tiles;               // that any of them sees
  int last_key, diagonal;  // the last that exists; the last that the first query sees, if nothing but causality hides any
  uint64_t full, empty;
};
template <int Dp>
struct Shared {
  Stage<Dp> stages[STAGES<Dp>];
  WorkTile<Dp> work[2];  // this and the next
};

// Where a warp is in the ring, and in which of its rounds.
template <int Dp>
struct Position {
  const uint32_t ring;  // address of the first stage
  uint32_t at = ring;
  int parity = 0;
  __device__ __forceinline__ uint32_t full() const { return at + offsetof(Stage<Dp>, full); }
  __device__ __forceinline__ uint32_t empty() const { return at + offsetof(Stage<Dp>, empty); }
  __device__ __forceinline__ void advance() {
    at += sizeof(Stage<Dp>);
    if (at == ring + STAGES<Dp> * sizeof(Stage<Dp>)) at = ring, parity ^= 1;
  }
};

// The work tiles of a call, longest first; a block takes them there and back, so that each gets long and short ones.
__device__ __forceinline__ int work_tiles(const ForwardArgs& a) { return static_cast<int>(all_tiles<BLOCK_QUERIES>(a.queries) * a.p.shape.heads_q); }
__device__ __forceinline__ int work_tile_of(int round) {
  return static_cast<int>(round * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x));
}
// The first round from this one on whose work tile has queries.
__device__ __forceinline__ int round_with_queries(const ForwardArgs& a, int round) {
  while (work_tile_of(round) < work_tiles(a) && !QueryRows<BLOCK_QUERIES>(a.p.shape, a.queries, a.keys, work_tile_of(round)).exists()) ++round;
  return round;
}
__device__ __forceinline__ int tiles_of(int keys) { return (keys + TILE - 1) / TILE; }

// ---------------------------------------------------------------------------------------------------- arithmetic

// Two numbers rounded to bytes, 0 to 255 (what is above is 255), low one first, below the two bytes of `above`.
__device__ __forceinline__ uint32_t round_bytes(float low, float high, uint32_t above) {
  uint32_t x;
  asm("{\n.reg .s32 a, b;\ncvt.rni.s32.f32 a, %1;\ncvt.rni.s32.f32 b, %2;\ncvt.pack.sat.u8.s32.b32 %0, b, a, %3;\n}" : "=r"(x) : "f"(low), "f"(high), "r"(above));
  return x;
}

// ---------------------------------------------------------------------------------------------------- the assembler

// The same in all lanes; the assembler can neither see how it is computed nor compute it again where it is used.
__device__ __forceinline__ uint32_t once(uint32_t x) { return __shfl_sync(~0u, x, 0); }

// x, but what is derived from it after this does not occupy registers before.
__device__ __forceinline__ int known_later(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Ends the thread if x is a number that it cannot be: no instruction makes a NaN with these bits. Barriers the assembler does not move past
// this, and two issue slots are all it costs.
__device__ __forceinline__ void fence(float x) {
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0xffc12345;\n@p exit;\n}" ::"r"(__float_as_int(x)));
}

// ---------------------------------------------------------------------------------------------------- consumers

template <typename T, int Dp>
struct Consumer {
  static constexpr int key_tiles = TILE / 8, channel_tiles = Dp / 8, k_steps = TILE / 32;

  const ForwardArgs& a;
  Shared<Dp>& shared;
  const int warpgroup = once(threadIdx.x / 128 - 1), lane = threadIdx.x % 32;
  const int turn = once(TURN + threadIdx.x / 32 - 4);
  Position<Dp> position{once(shared_address(shared.stages))};

  __device__ __forceinline__ void give_turn() const { arrive_named(turn < TURN + 4 * (CONSUMERS - 1) ? turn + 4 : turn - 4 * (CONSUMERS - 1), 64); }

  // The first of a warp's 16 rows, within the work tile.
  __device__ __forceinline__ static int warp_row() { return thread_number() / 32 * 16 - 64; }  // after the 128 threads of the producer

  // P = 255 exp2(n scale - top), rounded to bytes by thresholds, and the sums of its rows before that. Gives the turn to the next warpgroup on
  // the way. A lane has one threshold for 32 keys, 1/2 + shift; of neighbours one takes that, the other 1/2 - shift: P + shift or P - shift is rounded
  // to the nearest. Zeros stay zeros.
  template <bool masked>
  __device__ __forceinline__ void exponentials(uint32_t (&p8)[k_steps][4], float (&sum)[2], const int (&n)[4 * key_tiles], const float (&scale)[2][2],
                                               const float (&top)[2], uint32_t& threshold) {
    constexpr int pairs = 2 * key_tiles, ahead = 8;  // pair i: row i / 2 % 2, columns of 8-column tile i / 4 * 2 + i % 2
    float y[pairs][2];
    const auto argument = [&](int i) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int r = i / 2 % 2, x = n[4 * (i / 4 * 2 + i % 2) + 2 * r + c];
        const float score = fmaf(__int2float_rn(x), scale[2 * i / pairs][r], -top[r]);  // NaN where a key is, which hidden ones must not reach
        y[i][c] = masked && x == HIDDEN ? -INFINITY : score;
      }
    };
    float shift;
    const auto pack = [&](int i) {  // pairs i and i + 1
      if (i % 8 == 0) shift = __int2float_rn(static_cast<int>(threshold)) * 0x1p-32f, threshold += GOLDEN;
      const int r = i / 2 % 2;
      const float add = r ? -shift : shift;
      uint32_t& four = p8[i / 8][i % 8 / 2];
      four = round_bytes(y[i][0] + add, y[i][1] - add, round_bytes(y[i + 1][0] - add, y[i + 1][1] + add, 0));
      sum[r] += (y[i][0] + y[i][1]) + (y[i + 1][0] + y[i + 1][1]);
    };
    // Arguments are computed `ahead` pairs before and bytes as many behind, so that no exponential is waited for.
#pragma unroll
    for (int i = 0; i < ahead; ++i) argument(i);
#pragma unroll
    for (int i = 0; i < pairs; i += 2) {
#pragma unroll
      for (int j = i; j < i + 2; ++j) {
        y[j][0] = exp2_fast(y[j][0]), y[j][1] = exp2_fast(y[j][1]);
        if (j + ahead < pairs) argument(j + ahead);
      }
      if (i >= ahead) pack(i - ahead);
      if (i + 2 == pairs / 2) fence(y[i + 1][1]), give_turn();
    }
#pragma unroll
    for (int i = pairs - ahead; i < pairs; i += 2) pack(i);
  }

  // The block's work tile of this number. False if there are no more.
  __device__ __forceinline__ bool process(int number) {
    const WorkTile<Dp>& work = shared.work[number % 2];
    wait(shared_address(&work.full), number / 2 % 2);
    if (work.rows == 0) return false;
    const int group = lane / 4, t = lane % 4;
    const uint32_t q8 = once(matrix_at(shared_address(work.q8[warpgroup])));
    const float q_scale[2] = {work.q_scale[warp_row() + group], work.q_scale[warp_row() + group + 8]};

    float o[channel_tiles][4] = {};
    float sum[2] = {0.f, 0.f};              // of exp2(s - reference), this lane's share; log2(255) is off reference: 255 for the first key
    // This lane's threshold in multiples of 2^-32. The four lanes of a row begin a quarter apart with the last bits of scale * q_i . k_mean, in
    // which the whole sequence has a say, and go on every 32 keys.
    uint32_t threshold = ((__float_as_uint(work.lse[warp_row() + group]) + __float_as_uint(work.lse[warp_row() + group + 8])) << 20) + (t << 30);
    float reference[2] = {-3e38f, -3e38f};  // below any score: what O and the sum are scaled by; within GROWTH of the largest top so far

    // Which of the last two tiles have a key that the warp's first row does not see: its other rows see at most 15 more, the warpgroup's 63.
    const int seen = work.seen[warpgroup];
    const int limit = min(work.last_key, work.diagonal + warp_row()) - (seen - 1) * TILE;
    const int hiding = (limit < TILE - 1) + (limit + TILE < TILE - 1);
    for (int left = seen; left > 0; --left) {
      const uint32_t at = position.at;
      wait(position.full(), position.parity);
      int n[4 * key_tiles];
      begin_products();
      multiply_s8s8<Dp, false>(n, q8, matrix_at(at));
#pragma unroll
      for (int k = 1; k < Dp / 32; ++k) multiply_s8s8<Dp, true>(n, q8 + 2 * k, matrix_at(at) + 2 * k);
      commit_products();
      wait_for_products<0>();

      const bool begins = left == seen;  // the tile of the sequence's first key
      if (left <= hiding) {
        const WorkTile<Dp>& again = shared.work[known_later(number) % 2];
        const int before = (again.seen[warpgroup] - left) * TILE, last = again.last_key - before;
        const int diagonal = again.diagonal + warp_row() + group - before;
#pragma unroll
        for (int i = 0; i < key_tiles; ++i)
#pragma unroll
          for (int c = 0; c < 4; ++c)
            if (i * 8 + 2 * t + c % 2 > min(last, diagonal + c / 2 * 8)) n[4 * i + c] = HIDDEN;
      }

      // The first key, at which many rows look alone, goes no further: O begins with its value, which is not rounded.
      const int n_first[2] = {n[0], n[2]};  // of the first lane of a row
      if (begins && t == 0) n[0] = n[2] = HIDDEN;

      // A score is n * scale; top is the largest of a row that is not hidden (where all are, lower than any), less log2(255), rounded down: so the
      // largest P is a byte of 255 however large scores are. It is NaN where a key that the row sees is not finite, and so are the row's factor, its
      // sum and O: bytes cannot say so.
      float k_scale[2], scale[2][2], top[2];  // [half of the tile], [half of the tile][row], [row]
      load(k_scale[0], at + offsetof(KeyValueRecord<Dp>, k_scale) + 4 * t), load(k_scale[1], at + offsetof(KeyValueRecord<Dp>, k_scale) + 16 + 4 * t);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float x;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          int n_top = LOWEST;
#pragma unroll
          for (int i = 0; i < key_tiles / 2; ++i) {
            const int* pair = &n[2 * key_tiles * half + 4 * i + 2 * r];
            n_top = __vimax3_s32(n_top, pair[0], pair[1]);
          }
          scale[half][r] = max_or_nan(q_scale[r] * k_scale[half], 1e-37f);  // not 0, for -inf * 0 is no number
          const float half_top = n_top == LOWEST ? -3e38f : __fmul_rd(__int2float_rn(n_top), scale[half][r]);
          x = half ? max_or_nan(x, half_top) : half_top;
        }
        x = max_or_nan(x, __shfl_xor_sync(~0u, x, 1));
        top[r] = __fsub_rd(max_or_nan(x, __shfl_xor_sync(~0u, x, 2)), LOG255);
      }
      if (begins) {
        const WorkTile<Dp>& again = shared.work[known_later(number) % 2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float own = n_first[r] == HIDDEN ? -INFINITY : __fmul_rd(__int2float_rn(n_first[r]), scale[0][r]);
          const float score = __shfl_sync(~0u, own, lane & ~3);
          if (score == -INFINITY) continue;  // sees no key
          reference[r] = __fsub_rd(score, LOG255), sum[r] = t == 0 ? 255.f : 0.f;  // as top of an equal key
#pragma unroll
          for (int i = 0; i < channel_tiles; ++i) {
            const float2 v = *reinterpret_cast<const float2*>(again.v_first + i * 8 + 2 * t);
            o[i][2 * r] = v.x, o[i][2 * r + 1] = v.y;
          }
        }
      }
      if (__any_sync(~0u, top[0] > reference[0] + GROWTH || top[1] > reference[1] + GROWTH)) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float higher = fmaxf(reference[r], top[r]);
          const float shrink = exp2_fast(reference[r] - higher);
          reference[r] = higher;
          sum[r] *= shrink;
#pragma unroll
          for (int i = 0; i < channel_tiles; ++i) o[i][2 * r] *= shrink, o[i][2 * r + 1] *= shrink;
        }
      }
      float factor[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) factor[r] = exp2_fast(top[r] - reference[r]);
      uint32_t p8[k_steps][4];
      float total[2] = {0.f, 0.f};
      sync_named(turn + (__float_as_int(top[0]) & __float_as_int(top[1]) & (a.queries.tokens >> 31)), 64);  // + 0, but not before top
      fence(top[0]);
      if (begins || left <= hiding) exponentials<true>(p8, total, n, scale, top, threshold); else exponentials<false>(p8, total, n, scale, top, threshold);
      const auto large = [](float x) { return fabsf(x) > LARGE && x > -1e38f; };  // not where all keys are hidden
      if (__any_sync(~0u, large(top[0]) || large(top[1]))) {  // P may be above 255, where bytes end: the sum is theirs, then
        int bytes[2] = {};
#pragma unroll
        for (int i = 0; i < 4 * k_steps; ++i) bytes[i % 2] = __dp4a(p8[i / 4][i % 4], 0x01010101u, static_cast<uint32_t>(bytes[i % 2]));
        total[0] = __int2float_rn(bytes[0]), total[1] = __int2float_rn(bytes[1]);
      }

#pragma unroll
      for (int r = 0; r < 2; ++r) sum[r] = fmaf(total[r], factor[r], sum[r]);
      int d[4 * channel_tiles];
      begin_products();
      constexpr uint32_t v8 = offsetof(KeyValueRecord<Dp>, v8t) / 16;
      multiply_u8s8<TILE, false>(d, p8[0], matrix_at(at) + v8);
#pragma unroll
      for (int k = 1; k < k_steps; ++k) multiply_u8s8<TILE, true>(d, p8[k], matrix_at(at) + v8 + 2 * k);
      commit_products();
      wait_for_products<0>();
#pragma unroll
      for (int i = 0; i < channel_tiles; ++i) {
        float2 v;
        load(v, at + offsetof(KeyValueRecord<Dp>, v_scale) + 32 * i + 8 * t);
#pragma unroll
        for (int c = 0; c < 4; ++c) o[i][c] = fmaf(__int2float_rn(d[4 * i + c]) * (c % 2 ? v.y : v.x), factor[c / 2], o[i][c]);
      }
      leave_stage();
    }
    WorkTile<Dp>& again = shared.work[known_later(number) % 2];
    for (int left = again.tiles - again.seen[warpgroup]; left > 0; --left) {  // tiles that only the warpgroups after this one see
      wait(position.full(), position.parity);
      sync_named(turn, 64);
      give_turn();
      leave_stage();
    }
    store(again, o, sum, reference);
    __syncwarp();
    if (lane == 0) arrive(shared_address(&again.empty));
    return true;
  }

  __device__ __forceinline__ void leave_stage() {
    __syncwarp();
    if (lane == 0) arrive(position.empty());
    position.advance();
  }

  // Divides by the sums and writes the results.
  __device__ __forceinline__ void store(const WorkTile<Dp>& work, const float (&o)[channel_tiles][4], const float (&sum)[2], const float (&reference)[2]) {
    const int head_dim = a.p.shape.head_dim, t = lane % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = warp_row() + lane / 4 + 8 * r;
      const bool exists = row < work.rows;
      float all = sum[r];
      all += __shfl_xor_sync(~0u, all, 1);
      all += __shfl_xor_sync(~0u, all, 2);
      if ((__float_as_uint(work.q_scale[row]) & 0x7fffffff) >= 0x7f800000) all = __int_as_float(0x7fffffff);  // the query is not finite
      const bool blind = all == 0.f;  // sees no key
      const float inverse = blind ? 0.f : 1.f / all;
      store_row<channel_tiles>(static_cast<T*>(work.o) + row * a.p.o_strides.token, exists, head_dim, [&](int n) {
        const float2 mean = blind ? float2{} : *reinterpret_cast<const float2*>(work.v_mean + n * 8 + 2 * t);
        return pack16<T>(fmaf(o[n][2 * r], inverse, mean.x), fmaf(o[n][2 * r + 1], inverse, mean.y));
      });
      if (exists && t == 0) {
        const float smooth = blind ? -INFINITY : (reference[r] + log2f(all)) * LN2;
        a.p.lse_smooth[work.first + row] = smooth;
        a.p.lse[work.first + row] = blind ? -INFINITY : smooth + work.lse[row];
      }
    }
  }
};

// ---------------------------------------------------------------------------------------------------- producer

template <int Dp>
__device__ __forceinline__ void produce(const ForwardArgs& a, Shared<Dp>& shared) {
  Position<Dp> position{shared_address(shared.stages)};
  for (int round = round_with_queries(a, 0); work_tile_of(round) < work_tiles(a); round = round_with_queries(a, round + 1)) {
    const QueryRows<BLOCK_QUERIES> block(a.p.shape, a.queries, a.keys, work_tile_of(round));
    const KeyValueRecord<Dp>* keys =
        static_cast<const KeyValueRecord<Dp>*>(a.w.keys) + static_cast<int64_t>(block.head_kv) * a.keys.tiles + block.keys.first_tile;
    for (int tile = 0; tile < tiles_of(block.visible); ++tile) {
      wait(position.empty(), position.parity ^ 1);  // the first round finds all stages empty
      arrive_expecting(position.full(), sizeof(KeyValueRecord<Dp>));
      copy_bulk(position.at, keys + tile, sizeof(KeyValueRecord<Dp>), position.full());
      position.advance();
    }
  }
}

// By FETCHERS threads: the work tiles of this block, in order. The producer works them out once more, for it runs ahead: reading them from here
// made the kernel slower. Not unrolled: it has PRODUCER_REGISTERS.
template <typename T, int Dp>
__device__ __forceinline__ void fetch(const ForwardArgs& a, Shared<Dp>& shared) {
  const int t = threadIdx.x - (128 - FETCHERS);
  int place = 0, parity = 1;  // the first round finds both empty
  for (int round = 0;; ++round) {
    WorkTile<Dp>& work = shared.work[place];
    wait(shared_address(&work.empty), parity);
    if (t == 0) {
      round = round_with_queries(a, round);
      if (work_tile_of(round) < work_tiles(a)) {
        const QueryRows<BLOCK_QUERIES> block(a.p.shape, a.queries, a.keys, work_tile_of(round));
        work.o = block.template row<T>(a.p.o, a.p.o_strides, block.first);
        work.v = block.template first_key<T>(a.p.v, a.p.v_strides);
        work.means = (static_cast<int64_t>(block.queries.sequence) * a.p.shape.heads_kv + block.head_kv) * a.p.shape.head_dim;
        work.first = block.index(a.p.shape, block.first), work.rows = block.queries.length - block.first;
#pragma unroll 1
        for (int w = 0; w < CONSUMERS; ++w) work.seen[w] = tiles_of(block.visible_to(a.p.shape, 64 * w, 64));
        work.tiles = tiles_of(block.visible);
        work.last_key = block.last_key(), work.diagonal = block.diagonal(a.p.shape, block.first);
      } else {
        work.rows = 0;
      }
    }
    sync_named(FETCHED, FETCHERS);
    const int rows = work.rows;
    if (rows) {
      const int8_t* q8 = a.p.q8 + work.first * Dp;
#pragma unroll 1
      for (int i = t; i < BLOCK_QUERIES * Dp / 16; i += FETCHERS) {
        const int row = i / (Dp / 16), chunk = i % (Dp / 16);
        copy16(shared_address(work.q8[row / 64]) + swizzle<Dp>(row % 64, chunk), q8 + min(row, rows - 1) * Dp + 16 * chunk);  // later rows are nobody's
      }
      commit_copies();
      const float *q_scale = a.p.q_scale + work.first, *lse = a.p.lse + work.first, *v_mean = a.w.v_mean + work.means;
#pragma unroll 1
      for (int row = t; row < BLOCK_QUERIES; row += FETCHERS) {
        work.q_scale[row] = row < rows ? q_scale[row] * (a.p.shape.scale * LOG2E * Dp) : 0.f;
        work.lse[row] = row < rows ? lse[row] : 0.f;
      }
#pragma unroll 1
      for (int i = t; i < Dp; i += FETCHERS) {
        const bool exists = i < a.p.shape.head_dim && work.last_key >= 0;
        work.v_mean[i] = exists ? v_mean[i] : 0.f;
        work.v_first[i] = exists ? 255.f * clamp(to_float(static_cast<const T*>(work.v)[i]) - v_mean[i], AMAX_MAX) : 0.f;
      }
      wait_for_copies<0>();
      fence_async();
    }
    arrive(shared_address(&work.full));
    if (!rows) return;
    parity ^= place, place ^= 1;
  }
}

template <typename T, int Dp>
__global__ void __launch_bounds__(BLOCK_THREADS, 1) forward_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared<Dp>& shared = *reinterpret_cast<Shared<Dp>*>(bytes);
  if (threadIdx.x == 0) {
    for (Stage<Dp>& stage : shared.stages) init_barrier(shared_address(&stage.full), 1), init_barrier(shared_address(&stage.empty), 4 * CONSUMERS);
    for (WorkTile<Dp>& work : shared.work) init_barrier(shared_address(&work.full), FETCHERS), init_barrier(shared_address(&work.empty), 4 * CONSUMERS);
    fence_barriers();
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    give_registers<PRODUCER_REGISTERS>();
    if (threadIdx.x == 0) produce<Dp>(a, shared);
    if (threadIdx.x >= 128 - FETCHERS) fetch<T, Dp>(a, shared);
  } else {
    take_registers<CONSUMER_REGISTERS>();
    Consumer<T, Dp> consumer{a, shared};
    if (consumer.warpgroup == CONSUMERS - 1) consumer.give_turn();  // the first turn is warpgroup 0's
    for (int number = 0; consumer.process(number); ++number) continue;
  }
}

template <typename T, int Dp>
void launch(const ForwardArgs& a, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<Dp>);
  static_assert(bytes <= SHARED_BYTES);
  cudaFuncSetAttribute(forward_kernel<T, Dp>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  int device = 0, processors = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t count = all_tiles<BLOCK_QUERIES>(a.queries) * a.p.shape.heads_q;
  if (count) launch_kernel(forward_kernel<T, Dp>, static_cast<unsigned>(count < processors ? count : processors), BLOCK_THREADS, bytes, stream, a);
}

}  // namespace

void attend(const ForwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm90

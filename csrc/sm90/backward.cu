// dK, dV and dQ in one kernel, on wgmma: four matmuls in INT8 and dP in 16 bits. Rows are TILE keys, columns the queries of all heads that
// share them, one record after another. Bound, schedule, variants: docs/sm90-backward.md; constants: layout.cuh.
//
//   two warpgroups, 64 keys each:       S^T -> P^T -> dV += P^T dO,   dP^T -> dS^T -> dK += dS^T Q        P and dS in registers
//   the first warpgroup, 64 queries:    dS (halves, through shared memory) -> dQ += dS K                  sums in device memory, as integers
//
// dS^T, rounded by rows, is the A operand of dK. dQ wants it the other way round and by a scale per query, so the first warpgroup gets it
// unrounded, and is a step behind. It also copies the records: once it has dS of a step, nobody reads the record of the step before, nor
// what dS of this step was made of.
//
//   barrier                 who waits, before what                     who arrives, after what                               arrivals
//   keys_full               all, once: reading the block's keys        COPIER: it announces the bytes, the copies bring them        1
//   full[stage]             keys: S of this record                     COPIER: of the record; D = 128: of its first part            1
//   second_full[stage]      keys, D = 128: rounding P                  COPIER: of its second part                                   1
//   ds_full[stage]          first warpgroup: reading dS, and so        keys: dS is written, lane 0 of each warp                     8
//                           copying what that frees (above)
//   ds_empty[stage]         keys, D = 64: writing dS of three steps    first warpgroup: dS is read, lane 0 of each warp             4
//                           later; D = 128: full[stage] says it too
//   DQ_BARRIER (named)      first warpgroup: once, reading `relative`; first warpgroup: `relative` is written;                    128 threads
//                           every step, overwriting dq (D = 128: and   ... the copy engine has read dq, all have read dS;
//                           dS); starting the addition                 ... dq is written
//   0, __syncthreads        all, once: reading `block`, the barriers   all: one thread has made it, another initialised these
//
//   shared memory, KiB   D = 64    D = 128
//   keys                 2 x 17    2 x 33     KeyRecord, one a warpgroup
//   stages               3 x 22    2 x 42     QueryRecord; D = 128: in two copies, since there is no third stage
//   ds                   3 x 16    2 x 16     dS of 64 queries and 128 keys, as halves
//   dq                   16        32         dQ of the step, on its way to the sums
//   all                  165       215        of 227, with 1 of scales, barriers and the block's place in the call
//
//   tile size                what limits it
//   TILE = 2 x 64 keys       registers: 64 rows of wgmma a warpgroup with 208 (dK and dV take 64 of them or 128, S and dP 64); 88 for dQ's
//   QUERIES = 64             registers: with 128 none are left to load constants ahead
//   STAGES = 3, D = 128: 2   shared memory at D = 128, a third would take 273; at D = 64 a fourth fits and is no faster
#include <cstddef>

#include "../common/mma.cuh"
#include "../common/rotate.cuh"
#include "hopper.cuh"
#include "layout.cuh"

namespace sagetrain::sm90 {
namespace {

constexpr int KEY_WARPGROUPS = TILE / KEYS;  // warpgroups of keys
constexpr int BLOCK_THREADS = 128 * (1 + KEY_WARPGROUPS);
constexpr int DQ_REGISTERS = 88, KEY_REGISTERS = 208;  // 88 + 2 * 208 = 3 * 168: what the launch takes
static_assert(128 * (DQ_REGISTERS + KEY_WARPGROUPS * KEY_REGISTERS) <= registers_of(BLOCK_THREADS));
template <int Dp>
constexpr int STAGES = Dp == 64 ? 3 : 2;  // of records, and of dS
template <int Dp>
constexpr bool IN_TWO = Dp == 128;        // records come in two copies, since there is no third stage
constexpr int COPIER = 96;  // thread of the first warpgroup that starts copies
constexpr int DQ_BARRIER = 1;  // named barrier of the first warpgroup
static_assert(DQ_BARRIER < NAMED_BARRIERS);

// The record of a step, one step after another.
struct Walk {
  int record, done;  // done: records of its head before it

  __device__ __forceinline__ void advance(int blocks, int stride) {
    ++record;
    if (++done == blocks) done = 0, record += stride - blocks;
  }
};

// Which keys a block owns and its steps: the records of the queries that see any of them. One thread works it out, in some 300 instructions one
// after another; the others read it in shared memory.
struct KeyBlock {
  Span keys;
  int head, slot, k0;  // slot: of all tiles of a head; k0: the first key, within its sequence
  int left;            // keys of the sequence from there on
  int steps;           // of all steps of these keys, those of this split
  int blocks, stride;  // records of a query head, and from head to head
  int begin;           // causal: the first query of the first of them, less the first that sees the first key; else large
  Walk walk;           // at the first step

  __device__ KeyBlock(const BackwardArgs& a, int number) {
    const int heads_kv = a.p.shape.heads_kv, q_per_kv = static_cast<int>(a.p.shape.heads_q) / heads_kv;
    const int tile = number / a.splits, split = number - tile * a.splits, wave_tiles = a.heads * a.keys.tiles;
    const int wave = tile / wave_tiles, place = tile - wave * wave_tiles;  // a wave: a.heads heads at a time
    slot = place / a.heads, head = wave * a.heads + place - slot * a.heads;
    keys = span_of_tile(a.keys, slot);
    k0 = (slot - keys.first_tile) * TILE, left = keys.length - k0;
    const Span queries = span_of(a.queries, keys.sequence);
    const int diagonal = k0 - keys.length + queries.length, start = a.p.shape.is_causal ? max(0, diagonal) / QUERIES : 0;
    begin = a.p.shape.is_causal ? start * QUERIES - diagonal : 1 << 29;
    blocks = max(0, (queries.length + QUERIES - 1) / QUERIES - start);
    stride = a.queries.tiles * (TILE / QUERIES);
    const int all = blocks * q_per_kv, records = head * q_per_kv * stride + queries.first_tile * (TILE / QUERIES) + start;
    walk = {records, 0}, steps = all;
    if (a.splits > 1 && all) {
      const int share = all / a.splits, more = all - share * a.splits, first = share * split + min(split, more), heads = first / blocks;
      walk.done = first - heads * blocks, walk.record = records + heads * stride + walk.done, steps = share + (split < more);
    }
  }
  __device__ __forceinline__ bool exists() const { return k0 >= 0 && left > 0; }
};

template <int Dp>
struct __align__(1024) Shared {
  struct __align__(1024) { KeyRecord<Dp> record; } keys[KEY_WARPGROUPS];
  struct __align__(1024) {
    QueryRecord<Dp> record;
    int query;                                     // causal: the record's first query, less the first that sees the block's first key
  } stages[STAGES<Dp>];
  __half ds[STAGES<Dp>][KEY_WARPGROUPS][QUERIES * KEYS];  // [query][row], 16-byte chunks swizzled
  int dq[QUERIES * Dp];                            // on its way to the sums, as these lie
  __half2 relative[4 * KEY_WARPGROUPS];            // k_scale / k_bound of the keys of a warp, twice the same
  uint64_t keys_full, full[STAGES<Dp>], second_full[STAGES<Dp>], ds_full[STAGES<Dp>], ds_empty[STAGES<Dp>];
  KeyBlock block;
  int steps;                                       // how many records have still to be copied
  Walk next;                                       // the first of them
  int last;                                        // the one before it, -1 behind the end
};

// Copies bytes [first, end) of a record to a stage.
template <int Dp, int first, int end>
__device__ __forceinline__ void copy_part(const BackwardArgs& a, Shared<Dp>& shared, int stage, int record, uint64_t& full) {
  const char* from = reinterpret_cast<const char*>(static_cast<const QueryRecord<Dp>*>(a.w.queries) + record);
  arrive_expecting(shared_address(&full), end - first);
  copy_bulk(shared_address(&shared.stages[stage]) + first, from + first, end - first, shared_address(&full));
}
// Starts the copy of the block's next record, if there is one, to a stage that is free: all of it, or its first part, what dS is made of.
template <int Dp>
__device__ __forceinline__ void copy_queries(const BackwardArgs& a, Shared<Dp>& shared, int stage) {
  constexpr int end = IN_TWO<Dp> ? offsetof(QueryRecord<Dp>, q8t) : sizeof(QueryRecord<Dp>);
  shared.last = -1;
  if (shared.steps == 0) return;
  const Walk at = shared.next;
  shared.stages[stage].query = shared.block.begin + at.done * QUERIES, shared.last = at.record, --shared.steps;
  shared.next.advance(shared.block.blocks, shared.block.stride);
  copy_part<Dp, 0, end>(a, shared, stage, at.record, shared.full[stage]);
}
// The second part of the record that copy_queries was called for last.
template <int Dp>
__device__ __forceinline__ void copy_second(const BackwardArgs& a, Shared<Dp>& shared, int stage) {
  if (shared.last >= 0) copy_part<Dp, offsetof(QueryRecord<Dp>, q8t), sizeof(QueryRecord<Dp>)>(a, shared, stage, shared.last, shared.second_full[stage]);
}

template <int Dp>
__device__ __forceinline__ void init_barriers(Shared<Dp>& shared) {
  init_barrier(shared_address(&shared.keys_full), 1);
  for (int i = 0; i < STAGES<Dp>; ++i) {
    init_barrier(shared_address(&shared.full[i]), 1), init_barrier(shared_address(&shared.second_full[i]), 1);
    init_barrier(shared_address(&shared.ds_full[i]), 4 * KEY_WARPGROUPS), init_barrier(shared_address(&shared.ds_empty[i]), 4);
  }
  fence_barriers();
}
// Starts the first copies.
template <int Dp>
__device__ __forceinline__ void start_copies(const BackwardArgs& a, Shared<Dp>& shared) {
  const KeyBlock& block = shared.block;
  const uint32_t full = shared_address(&shared.keys_full);
  arrive_expecting(full, KEY_WARPGROUPS * sizeof(KeyRecord<Dp>));
  const KeyRecord<Dp>* keys = static_cast<const KeyRecord<Dp>*>(a.w.keys) + (static_cast<int64_t>(block.head) * a.keys.tiles + block.slot) * KEY_WARPGROUPS;
  for (int i = 0; i < KEY_WARPGROUPS; ++i) copy_bulk(shared_address(&shared.keys[i]), keys + i, sizeof(KeyRecord<Dp>), full);
  shared.next = block.walk, shared.steps = block.steps;
  for (int i = 0; i < STAGES<Dp>; ++i) {
    copy_queries(a, shared, i);
    if (IN_TWO<Dp> && i + 1 < STAGES<Dp>) copy_second(a, shared, i);
  }
}

// The same in all lanes, in a uniform register, where matrix descriptors are made without a detour.
__device__ __forceinline__ uint32_t uniform(uint32_t x) { return __reduce_max_sync(~0u, x); }

// Results of products may be read from here on.
template <typename X, int n>
__device__ __forceinline__ void ready(X (&x)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i)
    if constexpr (std::is_same_v<X, int>) asm volatile("" : "+r"(x[i])); else asm volatile("" : "+f"(x[i]));
}

__device__ __forceinline__ uint32_t bits(__half2 x) { return reinterpret_cast<const uint32_t&>(x); }
__device__ __forceinline__ __half2 half2_of(uint32_t x) { return reinterpret_cast<const __half2&>(x); }

// What takes the largest numbers to P_LEVELS or DS_LEVELS, never so far above that with a shift they were no byte (all halves tried), at most 65504;
// NaN of NaN. The bits of a half are about its logarithm, so a difference of bits is within 6% of a quotient; one iteration of Newton's takes that to
// 0.4%.
// Infinity would come out as zero, but does not come in: P'' and dS'' stay within 2^15 (layout.cuh), and rows that are not finite are NaN.
template <bool is_signed>
__device__ __forceinline__ __half2 inverse_scales(__half2 tops) {
  constexpr float levels = is_signed ? DS_LEVELS : P_LEVELS;
  constexpr uint32_t one_over = is_signed ? 0x93709370u : 0x977c977cu, largest = 0x77ff77ffu;  // twice `largest` is still a half
  const __half2 guess = half2_of(__vminu2(one_over - bits(tops), largest));
  const __half2 error = __hfma2(__hmul2(tops, guess), __float2half2_rn(-1.f / levels), __float2half2_rn(1.f));
  return __hfma2(guess, error, guess);
}
__device__ __forceinline__ float reciprocal(float x) { return __fdividef(1.f, x); }

// ---------------------------------------------------------------------------------------------------- dK and dV

template <typename T, int Dp>
struct KeyWarpgroup {
  using Record = QueryRecord<Dp>;
  static constexpr int tiles = QUERIES / 8, channel_tiles = Dp / 8, steps32 = QUERIES / 32;
  static constexpr int width = Dp == 64 ? 64 : 32, products = 2 * Dp / width;  // dV and dK are multiplied `width` channels at a time
  static constexpr bool holds_v = Dp == 64;                                    // V in registers: half of what dP reads of shared memory
  const BackwardArgs& a;
  Shared<Dp>& shared;
  const int lane = threadIdx.x % 32, warp = (Dp == 64 ? static_cast<int>(uniform(threadIdx.x / 32)) : threadIdx.x / 32) - 4;  // of all that have keys
  float dk[channel_tiles][4] = {}, dv[channel_tiles][4] = {};
  uint32_t held_v[holds_v ? Dp / 16 : 1][4];

  // y = x times a matrix [channel][QUERIES] of bytes; x the rounded operand.
  template <bool is_unsigned>
  __device__ __forceinline__ static void multiply(int (&y)[width / 2], const uint32_t (&x)[steps32][4], uint32_t matrix) {
    begin_products();
    const uint32_t b = matrix_at(matrix);
    if constexpr (is_unsigned) multiply_u8s8<QUERIES, false>(y, x[0], b); else multiply_s8s8<QUERIES, false>(y, x[0], b);
#pragma unroll
    for (int k = 1; k < steps32; ++k)
      if constexpr (is_unsigned) multiply_u8s8<QUERIES, true>(y, x[k], b + 2 * k); else multiply_s8s8<QUERIES, true>(y, x[k], b + 2 * k);
    commit_products();
  }
  __device__ __forceinline__ static void accumulate(float (&sum)[channel_tiles][4], int product, int (&y)[width / 2], const float (&scale)[2]) {
    ready(y);
#pragma unroll
    for (int i = 0; i < width / 2; ++i) {
      float& to = sum[product % (products / 2) * (width / 8) + i / 4][i % 4];
      to = fmaf(__int2float_rn(y[i]), scale[i % 4 / 2], to);
    }
  }
  __device__ __forceinline__ static void scores(int (&s)[32], uint32_t k8, uint32_t at) {
    begin_products();
    const uint32_t q8 = matrix_at(at + offsetof(Record, q8));
    multiply_s8s8<Dp, false>(s, k8, q8);
#pragma unroll
    for (int k = 1; k < Dp / 32; ++k) multiply_s8s8<Dp, true>(s, k8 + 2 * k, q8 + 2 * k);
    commit_products();
  }
  __device__ __forceinline__ void products_with_v(float (&dp)[32], uint32_t v, uint32_t at) const {
    begin_products();
    const uint32_t do16 = matrix_at(at + offsetof(Record, do16));
#pragma unroll
    for (int k = 0; k < Dp / 16; ++k) {
      const uint32_t next = k / 4 * 512 + k % 4 * 2;
      if constexpr (holds_v) k ? multiply_16bit<T, true>(dp, held_v[k], do16 + next) : multiply_16bit<T, false>(dp, held_v[k], do16 + next);
      else k ? multiply_16bit<T, true>(dp, v + next, do16 + next) : multiply_16bit<T, false>(dp, v + next, do16 + next);
    }
    commit_products();
  }

  __device__ __forceinline__ void run() {
    const int t = lane % 4, number = warp / 4;  // of the warpgroup
    const int steps = static_cast<int>(uniform(shared.block.steps));
    // Of a record's first query, the last that does not see all of the warpgroup's keys.
    const int last_query = static_cast<int>(uniform(shared.block.left < KEYS * (number + 1) ? 1 << 30 : KEYS * number + KEYS - 1));
    wait(shared_address(&shared.keys_full), 0);
    const KeyRecord<Dp>& keys = shared.keys[number].record;
    const float k_scale = keys.scale[warp % 4];
    const uint32_t thresholds = thresholds_of(shared.block.k0 + warp * 16 + lane / 4, t);
    const uint32_t k8 = uniform(matrix_at(shared_address(keys.k8))), v = uniform(matrix_at(shared_address(keys.v)));
    if constexpr (holds_v)
#pragma unroll
      for (int k = 0; k < Dp / 16; ++k) load_matrices(held_v[k], shared_address(keys.v) + swizzle<128>(warp % 4 * 16 + lane % 16, 2 * k + lane / 16));
    const uint32_t ds_rows = shared_address(shared.ds[0][number]) + swizzle<2 * KEYS>(lane / 16 * 8 + lane % 8, warp % 4 * 2 + lane / 8 % 2);

    int s[32];
    float dp[32];
    __half2 p[tiles][2], ds[tiles][2];
    uint32_t p8[steps32][4], ds8[steps32][4] = {};
    float p_scale[2], ds_scale[2] = {0.f, 0.f};
    float4 ahead;  // the first of a record's constants of S

    const auto start_scores = [&](const Record& record, uint32_t at) {
      scores(s, k8, at);
      ahead = record.s[t];
    };
    const auto exponentials = [&](const Record& record) {
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const float4 x = n ? record.s[n * 4 + t] : ahead;
        const float scale[2] = {x.x * k_scale, x.y * k_scale}, offset[2] = {x.z, x.w};
        float e[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) e[c] = exp2_fast(fmaf(__int2float_rn(s[4 * n + c]), scale[c % 2], offset[c % 2]));
        p[n][0] = __floats2half2_rn(e[0], e[1]), p[n][1] = __floats2half2_rn(e[2], e[3]);
      }
    };
    const auto to_ds = [&](const Record& record) {
      ready(dp);
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const uint2 u = record.u[n * 4 + t];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          ds[n][r] = __hmul2(p[n][r], __hfma2(__floats2half2_rn(dp[4 * n + 2 * r], dp[4 * n + 2 * r + 1]), half2_of(u.x), half2_of(u.y)));
      }
    };
    const auto send_ds = [&](int stage) {  // to the first warpgroup
#pragma unroll
      for (int n = 0; n < tiles; n += 2)
        store_transposed(ds_rows + stage * sizeof(shared.ds[0]) + n * 8 * (2 * KEYS), bits(ds[n][0]), bits(ds[n][1]), bits(ds[n + 1][0]), bits(ds[n + 1][1]));
      __syncwarp();
      if (lane == 0) arrive(shared_address(&shared.ds_full[stage]));
    };
    const auto to_int8 = [&](uint32_t (&x8)[steps32][4], float (&scale)[2], const __half2 (&x)[tiles][2], __half2 inverse_of_both, __half2 shift, float factor) {
      const __half2 inverse[2] = {__low2half2(inverse_of_both), __high2half2(inverse_of_both)};
#pragma unroll
      for (int k = 0; k < steps32; ++k) to_operand(x8[k], &x[4 * k], inverse, shift);
      scale[0] = factor * reciprocal(__low2float(inverse_of_both)), scale[1] = factor * reciprocal(__high2float(inverse_of_both));
    };

    // S of a step is multiplied in the step before it. Behind the last step: of whatever is there, and nobody reads it.
    if (steps) wait(shared_address(&shared.full[0]), 0);
    start_scores(shared.stages[0].record, shared_address(&shared.stages[0].record));
    wait_for_products<0>();
    ready(s);
    if constexpr (Dp == 64) {
      // dK is multiplied in the step after it.
      int y[32], parity = 0;
      const auto one = [&](auto stage_number, int step) {
        constexpr int stage = decltype(stage_number)::value, next = (stage + 1) % STAGES<Dp>, before = (stage + STAGES<Dp> - 1) % STAGES<Dp>;
        const Record& record = shared.stages[stage].record;
        const uint32_t at = shared_address(&record);
        const int query = shared.stages[stage].query;
        multiply<false>(y, ds8, shared_address(&shared.stages[before].record) + offsetof(Record, q8t));
        products_with_v(dp, v, at);
        exponentials(record);
        if (query < last_query) hide(p, query);
        wait_for_products<1>();
        const __half2 p_inverse = inverse_scales<false>(row_tops(p, false)), shift = shifts_of(thresholds + record.thresholds);
        accumulate(dk, 1, y, ds_scale);
        wait(shared_address(&shared.ds_empty[stage]), parity ^ 1);  // here, since it keeps the assembler from waiting for dP further up
        wait_for_products<0>();
        to_ds(record);
        const __half2 ds_inverse = inverse_scales<true>(row_tops(ds, true));
        to_int8(p8, p_scale, p, p_inverse, shift, record.dv_scale);
        multiply<true>(y, p8, at + offsetof(Record, do8t));
        to_int8(ds8, ds_scale, ds, ds_inverse, shift, record.dk_scale);
        send_ds(stage);
        if (next == 0) parity ^= 1;
        if (step + 1 < steps) wait(shared_address(&shared.full[next]), parity);
        start_scores(shared.stages[next].record, shared_address(&shared.stages[next].record));
        wait_for_products<1>();
        accumulate(dv, 0, y, p_scale);
        wait_for_products<0>();
        ready(s);
      };
      for (int step = 0; step < steps; step += STAGES<Dp>) {
        one(std::integral_constant<int, 0>{}, step);
        if (step + 1 == steps) break;
        one(std::integral_constant<int, 1>{}, step + 1);
        if (step + 2 == steps) break;
        one(std::integral_constant<int, 2>{}, step + 2);
      }
      if (steps) {
        multiply<false>(y, ds8, shared_address(&shared.stages[(steps - 1) % STAGES<Dp>].record) + offsetof(Record, q8t));
        wait_for_products<0>();
        accumulate(dk, 1, y, ds_scale);
      }
    } else {
      uint32_t at = uniform(shared_address(&shared.stages[0].record));
      for (int step = 0; step < steps; ++step) {
        const int stage = step % STAGES<Dp>, next = (step + 1) % STAGES<Dp>, query = shared.stages[stage].query;
        const Record& record = shared.stages[stage].record;
        exponentials(record);
        products_with_v(dp, v, at);
        if (query < last_query) hide(p, query);
        wait(shared_address(&shared.second_full[stage]), step / STAGES<Dp> % 2);
        const __half2 shift = shifts_of(thresholds + record.thresholds);
        to_int8(p8, p_scale, p, inverse_scales<false>(row_tops(p, false)), shift, record.dv_scale);
        wait_for_products<0>();
        to_ds(record);
        const __half2 ds_inverse = inverse_scales<true>(row_tops(ds, true));
        int y[2][width / 2];
        const auto product = [&](int i) {
          const uint32_t matrix = at + i % (products / 2) * (width * QUERIES);
          i < products / 2 ? multiply<true>(y[i % 2], p8, matrix + offsetof(Record, do8t)) : multiply<false>(y[i % 2], ds8, matrix + offsetof(Record, q8t));
        };
        product(0);
        send_ds(stage);  // its place is empty: this record was copied after everybody had read dS of two steps before
        to_int8(ds8, ds_scale, ds, ds_inverse, shift, record.dk_scale);
#pragma unroll
        for (int i = 0; i < products; ++i) {
          if (i + 1 < products) {
            product(i + 1);
          } else {
            if (step + 1 < steps) wait(shared_address(&shared.full[next]), (step + 1) / STAGES<Dp> % 2);
            at = uniform(shared_address(&shared.stages[next].record));
            start_scores(shared.stages[next].record, at);
          }
          wait_for_products<1>();
          accumulate(i < products / 2 ? dv : dk, i, y[i % 2], i < products / 2 ? p_scale : ds_scale);
        }
        wait_for_products<0>();
        ready(s);
      }
    }
    store();
  }

  // P of keys that a query does not see, and of keys past the end, which must not reach dQ. query: first of the record, as in Shared.
  __device__ __forceinline__ void hide(__half2 (&p)[tiles][2], int query) const {
    const int thread = thread_number(), row = thread % 128 / 32 * 16 + thread % 32 / 4, before = (thread / 128 - 1) * KEYS, left = shared.block.left;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = before + key_of_row(row + 8 * r);
      const int first = key < left ? key - query - 2 * (thread % 4) : QUERIES;  // of its queries, from the lane's first
#pragma unroll
      for (int n = 0; n < tiles; ++n) p[n][r] = keep(p[n][r], first <= n * 8, first <= n * 8 + 1);
    }
  }

  // Writes dK and dV, or this split's parts.
  __device__ __forceinline__ void store() {
    const KeyBlock& block = shared.block;
    const int head_dim = a.p.shape.head_dim, thread = thread_number(), lane = thread % 32, warp = thread / 32 - 4;
    if (a.splits > 1) {
      constexpr int warps = 4 * KEY_WARPGROUPS;
      const int64_t part = (static_cast<int64_t>(block.head) * a.keys.tiles + block.slot) * a.splits + block_number() % a.splits;
      float4* to = reinterpret_cast<float4*>(a.w.d_kv) + (part * 2 * warps + warp) * (channel_tiles * 32) + lane;
#pragma unroll
      for (int n = 0; n < channel_tiles; ++n) {
        to[n * 32] = {dk[n][0], dk[n][1], dk[n][2], dk[n][3]};
        to[(warps * channel_tiles + n) * 32] = {dv[n][0], dv[n][1], dv[n][2], dv[n][3]};
      }
      return;
    }
    unrotate(dk, device_signs(a.p.k_mean + (static_cast<int64_t>(block.keys.sequence) * a.p.shape.heads_kv + block.head) * head_dim), lane % 4);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int key = block.k0 + warp / 4 * KEYS + key_of_row(warp % 4 * 16 + lane / 4 + 8 * r);
      const auto write = [&](void* to, const Strides& s, const float (&x)[channel_tiles][4], float factor) {
        T* row = static_cast<T*>(to) + block.keys.batch * s.batch + block.head * s.head + (block.keys.begin + key) * s.token;
        store_row<channel_tiles>(row, key < block.keys.length, head_dim, [&](int n) { return pack16<T>(factor * x[n][2 * r], factor * x[n][2 * r + 1]); });
      };
      write(a.p.d_k, a.p.d_k_strides, dk, a.p.shape.scale), write(a.p.d_v, a.p.d_v_strides, dv, 1.f);
    }
  }
};

// ---------------------------------------------------------------------------------------------------- dQ

template <int Dp>
__device__ __forceinline__ void add_dq(const BackwardArgs& a, Shared<Dp>& shared) {
  constexpr int steps16 = TILE / 16, steps32 = TILE / 32, chunks = Dp / 32;  // k-steps of 16 keys, those of a warp, and of 32; chunks of 32 channels
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16 + lane / 4;
  Walk walk = shared.block.walk;
  const uint32_t thresholds = thresholds_of(shared.block.k0 / TILE, lane % 4);
  const int steps = shared.block.steps, blocks = shared.block.blocks, stride = shared.block.stride;
  wait(shared_address(&shared.keys_full), 0);
  float k_bound = 0.f;
#pragma unroll
  for (int k = 0; k < steps16; ++k) k_bound = max_or_nan(k_bound, shared.keys[k / 4].record.scale[k % 4]);
  if (threadIdx.x < steps16)
    shared.relative[threadIdx.x] = __float2half2_rn(__fdividef(shared.keys[threadIdx.x / 4].record.scale[threadIdx.x % 4], k_bound));
  sync_named(DQ_BARRIER, 128);
  const uint32_t k8t = matrix_at(shared_address(shared.keys[0].record.k8t)), rows = shared_address(shared.ds) + swizzle<2 * KEYS>(warp * 16 + lane % 16, lane / 16);
  for (int step = 0; step < steps; ++step, walk.advance(blocks, stride)) {
    const int stage = step % STAGES<Dp>;
    const int64_t record = walk.record;
    const float fine[2] = {a.w.fine[record * QUERIES + row], a.w.fine[record * QUERIES + row + 8]};
    float scale[2] = {fine[0] * k_bound, fine[1] * k_bound};
    const __half2 shift = shifts_of(thresholds + __byte_perm(__float_as_uint(fine[0]), __float_as_uint(fine[1]), 0x5410));
    wait(shared_address(&shared.ds_full[stage]), step / STAGES<Dp> % 2);
    if (threadIdx.x == COPIER) {
      if constexpr (IN_TWO<Dp>) copy_second(a, shared, (step + 1) % STAGES<Dp>);
      else if (step > 0) copy_queries(a, shared, (step - 1) % STAGES<Dp>);
    }
    __half2 x[2 * steps16][2];  // dS by the keys' relative scales
#pragma unroll
    for (int k = 0; k < steps16; ++k) {
      uint32_t loaded[4];
      load_matrices(loaded, ((rows + stage * static_cast<int>(sizeof(shared.ds[0]))) ^ (k % 4 * 32)) + k / 4 * static_cast<int>(sizeof(shared.ds[0][0])));
#pragma unroll
      for (int i = 0; i < 4; ++i) x[2 * k + i / 2][i % 2] = __hmul2(half2_of(loaded[i]), shared.relative[k]);
    }
    if constexpr (!IN_TWO<Dp>) {
      __syncwarp();
      if (lane == 0) arrive(shared_address(&shared.ds_empty[stage]));
    }
    const __half2 both = inverse_scales<true>(row_tops(x, true)), inverse[2] = {__low2half2(both), __high2half2(both)};
    scale[0] *= reciprocal(__low2float(both)), scale[1] *= reciprocal(__high2float(both));
    const bool small = __all_sync(~0u, scale[0] <= 2.f && scale[1] <= 2.f);  // then |y scale| <= 2^22: a sum with MAGIC_FLOAT rounds it
    uint32_t operand[steps32][4];
#pragma unroll
    for (int k = 0; k < steps32; ++k) to_operand(operand[k], &x[4 * k], inverse, shift);
    int y[2][16];
    const auto product = [&](int chunk) {
      begin_products();
      const uint32_t b = k8t + chunk * (32 * KEYS / 16);
      multiply_s8s8<KEYS, false>(y[chunk % 2], operand[0], b);
#pragma unroll
      for (int k = 1; k < steps32; ++k) multiply_s8s8<KEYS, true>(y[chunk % 2], operand[k], b + k / 2 * static_cast<int>(sizeof(shared.keys[0]) / 16) + k % 2 * 2);
      commit_products();
    };
    product(0);
    if (threadIdx.x == 0) wait_for_reads<0>();
    sync_named(DQ_BARRIER, 128);
    if (IN_TWO<Dp> && threadIdx.x == COPIER) copy_queries(a, shared, stage);  // not before: it says that everybody here has read dS
#pragma unroll
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) product(chunk + 1), wait_for_products<1>(); else wait_for_products<0>();
      ready(y[chunk % 2]);
      int4* to = reinterpret_cast<int4*>(shared.dq) + chunk / 2 * (QUERIES * 64 / 4) + (warp * 8 + chunk % 2 * 4) * 32 + lane;
      const auto write = [&](auto as_integer) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          int z[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) z[c] = as_integer(__int2float_rn(y[chunk % 2][4 * n + c]), scale[c / 2]);
          to[n * 32] = {z[0], z[1], z[2], z[3]};
        }
      };
      if (small) write([](float x, float scale) { return __float_as_int(fmaf(x, scale, MAGIC_FLOAT)); });
      else write([](float x, float scale) { return MAGIC + __float2int_rn(x * scale); });
    }
    fence_async();
    sync_named(DQ_BARRIER, 128);
    if (threadIdx.x == 0) add_bulk(a.w.d_q + record * (QUERIES * Dp), shared_address(shared.dq), sizeof(shared.dq));
  }
  if (threadIdx.x == 0) wait_for_additions();
}

template <typename T, int Dp>
__global__ void __launch_bounds__(BLOCK_THREADS, 1) backward_kernel(const __grid_constant__ BackwardArgs a) {
  after_previous();
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared<Dp>& shared = *reinterpret_cast<Shared<Dp>*>(bytes);
  if (threadIdx.x == 0) shared.block = KeyBlock(a, block_number());
  if (threadIdx.x == COPIER) init_barriers(shared);
  __syncthreads();
  if (!shared.block.exists()) return;
  if (threadIdx.x == COPIER) start_copies(a, shared);
  if (threadIdx.x < 128) {
    give_registers<DQ_REGISTERS>();
    add_dq<Dp>(a, shared);
  } else {
    take_registers<KEY_REGISTERS>();
    KeyWarpgroup<T, Dp>{a, shared}.run();
  }
}

template <typename T, int Dp>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<Dp>);
  static_assert(bytes <= SHARED_BYTES);
  cudaFuncSetAttribute(backward_kernel<T, Dp>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const unsigned blocks = a.keys.tiles * a.p.shape.heads_kv * a.splits;
  if (blocks) launch_kernel(backward_kernel<T, Dp>, blocks, BLOCK_THREADS, bytes, stream, a);
}

}  // namespace

void gradients(const BackwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm90

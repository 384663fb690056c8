// dK, dV and dQ in one kernel, on wgmma: four matmuls in INT8 and dP in 16 bits. Rows are TILE keys, columns the queries of all heads
// of its group, one record after another. Bound, schedule, variants: docs/sm90-backward.md; constants: layout.cuh.
//
//   two warpgroups, 64 keys each:       S^T -> P^T -> dV += P^T dO,   dP^T -> dS^T -> dK += dS^T Q        P and dS in registers
//   the first warpgroup, 64 queries:    dS (halves, through shared memory) -> dQ += dS K                  sums in device memory, as integers
//
// dS^T, rounded by rows, is the A operand of dK. dQ wants it the other way round and by a scale per query, so the first warpgroup gets it
// unrounded, and is a step behind. It also copies the records: once it has dS of a step, nobody reads the record of the step before.
#include <cstddef>

#include "../../sm80/backward.cuh"
#include "../hopper.cuh"
#include "layout.cuh"

namespace sagetrain::sm90 {
namespace {

using namespace sm80;
using sm90::BackwardArgs, sm90::KEYS, sm90::QUERIES;

constexpr int GROUPS = TILE / KEYS;  // warpgroups of keys
constexpr int BLOCK_THREADS = 128 * (1 + GROUPS);
constexpr int DQ_REGISTERS = 88, KEY_REGISTERS = 208;  // 88 + 2 * 208 = 3 * 168: what the launch takes
template <int Dp>
constexpr int STAGES = Dp == 64 ? 3 : 2;
constexpr int BUFFERS = 2;
constexpr int COPIER = 96;  // thread of the first warpgroup that starts copies
constexpr int ADDED = 1;    // named barrier of the first warpgroup

template <int Dp>
struct __align__(1024) Shared {
  struct __align__(1024) { KeyRecord<Dp> record; } keys[GROUPS];
  struct __align__(1024) {
    QueryRecord<Dp> record;
    int query;                                     // causal: the record's first query, less the first that sees the block's first key
  } stages[STAGES<Dp>];
  __half ds[BUFFERS][GROUPS][QUERIES * KEYS];      // [query][row], 16-byte chunks swizzled
  int dq[QUERIES * Dp];                            // on its way to the sums, as these lie
  __half2 unit[4 * GROUPS];                        // of the keys of a warp, twice the same
  uint64_t keys_full, full[STAGES<Dp>], ds_full[BUFFERS], ds_empty[BUFFERS];
  int begin, blocks, stride;                       // as in KeyBlock
  int keys_left;                                   // of the sequence, from the block's first
  int record, done, steps;                         // the next to be copied, how many of its head's come before it, how many steps are left
};

// Which keys a block owns and its steps: the records of the queries that see any of them.
template <int Dp>
struct KeyBlock {
  Span keys;
  int head, slot, k0;   // slot: of all tiles of a head; k0: the first key, within its sequence
  int left;             // keys of the sequence from there on
  int first, steps;     // of all steps of these keys, those of this split
  int blocks;           // records of a query head
  int begin;            // causal: the first query of the first of them, less the first that sees the first key; else large
  int records, stride;  // the first record of the group's first head, and from head to head

  __device__ KeyBlock(const BackwardArgs& a, int number) {
    const int heads_kv = a.p.shape.heads_kv, group = a.p.shape.heads_q / heads_kv;
    const int split = number % a.splits, tile = number / a.splits, some = a.heads * a.keys.tiles;
    slot = tile % some / a.heads, head = tile / some * a.heads + tile % a.heads;
    keys = span_of_tile(a.keys, slot);
    k0 = (slot - keys.first_tile) * TILE, left = keys.length - k0;
    const Span queries = span_of(a.queries, keys.sequence);
    const int diagonal = k0 - keys.length + queries.length, start = a.p.shape.is_causal ? max(0, diagonal) / QUERIES : 0;
    begin = a.p.shape.is_causal ? start * QUERIES - diagonal : 1 << 29;
    blocks = max(0, (queries.length + QUERIES - 1) / QUERIES - start);
    const int64_t all = static_cast<int64_t>(blocks) * group;
    first = static_cast<int>(all * split / a.splits), steps = static_cast<int>(all * (split + 1) / a.splits) - first;
    stride = a.queries.tiles * (TILE / QUERIES);
    records = head * group * stride + queries.first_tile * (TILE / QUERIES) + start;
  }
  __device__ __forceinline__ bool exists() const { return k0 >= 0 && left > 0; }
};

// The record of a step, one step after another.
struct Walk {
  int record, done;  // done: records of its head before it

  template <int Dp>
  __device__ explicit Walk(const KeyBlock<Dp>& b) {
    done = b.blocks ? b.first % b.blocks : 0;
    record = b.records + (b.blocks ? b.first / b.blocks * b.stride : 0) + done;
  }
  __device__ __forceinline__ void advance(int blocks, int stride) {
    ++record;
    if (++done == blocks) done = 0, record += stride - blocks;
  }
};

// Starts the copy of the block's next record, if there is one, to a stage that is free.
template <int Dp>
__device__ __forceinline__ void copy_queries(const BackwardArgs& a, Shared<Dp>& shared, int stage) {
  if (shared.steps == 0) return;
  const int record = shared.record, done = shared.done;
  const bool last = done + 1 == shared.blocks;
  shared.record = last ? record + 1 + shared.stride - shared.blocks : record + 1, shared.done = last ? 0 : done + 1, --shared.steps;
  shared.stages[stage].query = shared.begin + done * QUERIES;
  const uint32_t full = shared_address(&shared.full[stage]);
  arrive_expecting(full, sizeof(QueryRecord<Dp>));
  copy_bulk(shared_address(&shared.stages[stage]), static_cast<const QueryRecord<Dp>*>(a.w.queries) + record, sizeof(QueryRecord<Dp>), full);
}

// By one thread: everything of the block that the others wait for.
template <int Dp>
__device__ __forceinline__ void start(const BackwardArgs& a, Shared<Dp>& shared) {
  init_barrier(shared_address(&shared.keys_full), 1);
  for (uint64_t& full : shared.full) init_barrier(shared_address(&full), 1);
  for (int i = 0; i < BUFFERS; ++i) init_barrier(shared_address(&shared.ds_full[i]), 4 * GROUPS), init_barrier(shared_address(&shared.ds_empty[i]), 4);
  fence_barriers();
  const KeyBlock<Dp> block(a, block_number());
  if (!block.exists()) return;
  const uint32_t full = shared_address(&shared.keys_full);
  arrive_expecting(full, GROUPS * sizeof(KeyRecord<Dp>));
  const KeyRecord<Dp>* keys = static_cast<const KeyRecord<Dp>*>(a.w.keys) + (static_cast<int64_t>(block.head) * a.keys.tiles + block.slot) * GROUPS;
  for (int i = 0; i < GROUPS; ++i) copy_bulk(shared_address(&shared.keys[i]), keys + i, sizeof(KeyRecord<Dp>), full);
  const Walk walk(block);
  shared.begin = block.begin, shared.blocks = block.blocks, shared.stride = block.stride, shared.keys_left = block.left;
  shared.record = walk.record, shared.done = walk.done, shared.steps = block.steps;
  for (int i = 0; i < STAGES<Dp>; ++i) copy_queries(a, shared, i);
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

// ---------------------------------------------------------------------------------------------------- dK and dV

template <typename T, int Dp>
struct KeyGroup {
  using Record = QueryRecord<Dp>;
  static constexpr int tiles = QUERIES / 8, channel_tiles = Dp / 8, steps32 = QUERIES / 32;
  static constexpr int width = Dp == 64 ? 64 : 32, products = 2 * Dp / width;  // dV and dK are multiplied `width` channels at a time
  const BackwardArgs& a;
  Shared<Dp>& shared;
  const int lane = threadIdx.x % 32, warp = (Dp == 64 ? static_cast<int>(uniform(threadIdx.x / 32)) : threadIdx.x / 32) - 4;  // of all that have keys
  float dk[channel_tiles][4] = {}, dv[channel_tiles][4] = {};

  // y = x times a matrix [channel][QUERIES] of bytes; x the rounded operand.
  template <bool is_unsigned>
  __device__ __forceinline__ static void multiply(int (&y)[width / 2], const uint32_t (&x)[steps32][4], uint32_t matrix) {
    begin_products();
    const uint32_t b = where(matrix);
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
    const uint32_t q8 = where(at + offsetof(Record, q8));
    multiply_s8s8<Dp, false>(s, k8, q8);
#pragma unroll
    for (int k = 1; k < Dp / 32; ++k) multiply_s8s8<Dp, true>(s, k8 + 2 * k, q8 + 2 * k);
    commit_products();
  }
  __device__ __forceinline__ static void products_with_v(float (&dp)[32], uint32_t v, uint32_t at) {
    begin_products();
    const uint32_t do16 = where(at + offsetof(Record, do16));
    multiply_16bit<T, false>(dp, v, do16);
#pragma unroll
    for (int k = 1; k < Dp / 16; ++k) multiply_16bit<T, true>(dp, v + k / 4 * 512 + k % 4 * 2, do16 + k / 4 * 512 + k % 4 * 2);
    commit_products();
  }

  __device__ __forceinline__ void run() {
    const int t = lane % 4, number = warp / 4;  // of the warpgroup
    int steps, last_query;                      // last_query: of a record's first, the last that does not see all of the warpgroup's keys
    {
      const KeyBlock<Dp> block(a, block_number());
      steps = static_cast<int>(uniform(block.steps)), last_query = static_cast<int>(uniform(block.left < KEYS * (number + 1) ? 1 << 30 : KEYS * number + KEYS - 1));
    }
    wait(shared_address(&shared.keys_full), 0);
    const KeyRecord<Dp>& keys = shared.keys[number].record;
    const float k_scale = keys.scale[warp % 4];
    const uint32_t k8 = uniform(where(shared_address(keys.k8))), v = uniform(where(shared_address(keys.v)));
    const uint32_t ds_rows = shared_address(shared.ds[0][number]) + swizzle<2 * KEYS>(lane / 16 * 8 + lane % 8, warp % 4 * 2 + lane / 8 % 2);

    int s[32];
    float dp[32];
    __half2 p[tiles][2], inverse[2];  // P, then dS
    uint32_t p8[steps32][4], ds8[steps32][4] = {};
    float p_scale[2], ds_scale[2] = {0.f, 0.f};

    const auto exponentials = [&](const Record& record, int first, int last) {
#pragma unroll
      for (int n = first; n < last; ++n) {
        const float4 x = record.s[n * 4 + t];
        const float scale[2] = {x.x * k_scale, x.y * k_scale}, offset[2] = {x.z, x.w};
        float e[4];
#pragma unroll
        for (int c = 0; c < 4; ++c) e[c] = exp2_fast(fmaf(__int2float_rn(s[4 * n + c]), scale[c % 2], offset[c % 2]));
        p[n][0] = __floats2half2_rn(e[0], e[1]), p[n][1] = __floats2half2_rn(e[2], e[3]);
      }
    };
    const auto round_p = [&](const Record& record) {
      row_scales(p, 255.f, false, inverse, p_scale);
#pragma unroll
      for (int k = 0; k < steps32; ++k) to_operand(p8[k], &p[4 * k], inverse);
      p_scale[0] *= record.dv_unit, p_scale[1] *= record.dv_unit;
    };
    const auto to_ds = [&](const Record& record) {
      ready(dp);
#pragma unroll
      for (int n = 0; n < tiles; ++n) {
        const uint2 u = record.u[n * 4 + t];
#pragma unroll
        for (int r = 0; r < 2; ++r)
          p[n][r] = __hmul2(p[n][r], __hfma2(__floats2half2_rn(dp[4 * n + 2 * r], dp[4 * n + 2 * r + 1]), half2_of(u.x), half2_of(u.y)));
      }
    };
    const auto send_ds = [&](int step) {  // to the first warpgroup
      const int buffer = step % BUFFERS;
      wait(shared_address(&shared.ds_empty[buffer]), step / BUFFERS % 2 ^ 1);
#pragma unroll
      for (int n = 0; n < tiles; n += 2)
        store_transposed(ds_rows + buffer * sizeof(shared.ds[0]) + n * 8 * (2 * KEYS), bits(p[n][0]), bits(p[n][1]), bits(p[n + 1][0]), bits(p[n + 1][1]));
      __syncwarp();
      if (lane == 0) arrive(shared_address(&shared.ds_full[buffer]));
    };
    const auto round_ds = [&](const Record& record) {
      row_scales(p, 127.f, true, inverse, ds_scale);
#pragma unroll
      for (int k = 0; k < steps32; ++k) to_operand(ds8[k], &p[4 * k], inverse);
      ds_scale[0] *= record.dk_unit, ds_scale[1] *= record.dk_unit;
    };

    if constexpr (Dp == 64) {
      // S of a step is multiplied in the step before it, dK in the step after it.
      int stage = 0, parity = 0, y[32];
      uint32_t before = uniform(shared_address(&shared.stages[0].record)), at = before;
      if (steps) wait(shared_address(&shared.full[0]), 0);
      scores(s, k8, at);
      wait_for_products<0>();
      ready(s);
      for (int step = 0; step < steps; ++step) {
        const Record& record = shared.stages[stage].record;
        const int query = shared.stages[stage].query;
        multiply<false>(y, ds8, before + offsetof(Record, q8t));
        products_with_v(dp, v, at);
        exponentials(record, 0, tiles / 2);
        wait_for_products<1>();
        exponentials(record, tiles / 2, tiles);
        accumulate(dk, 1, y, ds_scale);
        if (query < last_query) hide(p, query);
        round_p(record);
        multiply<true>(y, p8, at + offsetof(Record, do8t));
        wait_for_products<1>();
        to_ds(record);
        send_ds(step);
        before = at;
        if (++stage == STAGES<Dp>) stage = 0, parity ^= 1;
        at = uniform(shared_address(&shared.stages[stage].record));
        if (step + 1 < steps) wait(shared_address(&shared.full[stage]), parity);
        scores(s, k8, at);  // of the last step: of whatever is there, and nobody reads it
        round_ds(record);
        wait_for_products<0>();
        ready(s);
        accumulate(dv, 0, y, p_scale);
      }
      if (steps) {
        multiply<false>(y, ds8, before + offsetof(Record, q8t));
        wait_for_products<0>();
        accumulate(dk, 1, y, ds_scale);
      }
    } else {
      for (int step = 0; step < steps; ++step) {
        const int stage = step % STAGES<Dp>;
        const Record& record = shared.stages[stage].record;
        const uint32_t at = uniform(shared_address(&record));
        wait(shared_address(&shared.full[stage]), step / STAGES<Dp> % 2);
        scores(s, k8, at);
        wait_for_products<0>();
        ready(s);
        exponentials(record, 0, tiles);
        products_with_v(dp, v, at);
        if (shared.stages[stage].query < last_query) hide(p, shared.stages[stage].query);
        round_p(record);
        wait_for_products<0>();
        to_ds(record);
        int y[2][width / 2];
        const auto product = [&](int i) {
          const uint32_t matrix = at + i % (products / 2) * (width * QUERIES);
          i < products / 2 ? multiply<true>(y[i % 2], p8, matrix + offsetof(Record, do8t)) : multiply<false>(y[i % 2], ds8, matrix + offsetof(Record, q8t));
        };
        product(0);
        send_ds(step);
        round_ds(record);
#pragma unroll
        for (int i = 0; i < products; ++i) {
          if (i + 1 < products) product(i + 1), wait_for_products<1>(); else wait_for_products<0>();
          accumulate(i < products / 2 ? dv : dk, i, y[i % 2], i < products / 2 ? p_scale : ds_scale);
        }
      }
    }
    store();
  }

  // P of keys that a query does not see, and of keys past the end, which must not reach dQ. query: first of the record, as in Shared.
  __device__ __forceinline__ void hide(__half2 (&p)[tiles][2], int query) const {
    const int thread = thread_number(), row = thread % 128 / 32 * 16 + thread % 32 / 4, before = (thread / 128 - 1) * KEYS, left = shared.keys_left;
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
    const KeyBlock<Dp> block(a, block_number());
    const int head_dim = a.p.shape.head_dim;
    if (a.splits > 1) {
      constexpr int warps = 4 * GROUPS;
      const int64_t part = (static_cast<int64_t>(block.head) * a.keys.tiles + block.slot) * a.splits + block_number() % a.splits;
      float4* to = reinterpret_cast<float4*>(a.w.d_kv) + (part * 2 * warps + warp) * (channel_tiles * 32) + lane;
#pragma unroll
      for (int n = 0; n < channel_tiles; ++n) {
        to[n * 32] = {dk[n][0], dk[n][1], dk[n][2], dk[n][3]};
        to[(warps * channel_tiles + n) * 32] = {dv[n][0], dv[n][1], dv[n][2], dv[n][3]};
      }
      return;
    }
    unrotate(dk, lane % 4);
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
  constexpr int steps16 = TILE / 16, steps32 = TILE / 32, chunks = Dp / 32;  // a step of 16: the keys of a warp; chunks of 32 channels
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row = warp * 16 + lane / 4;
  const KeyBlock<Dp> block(a, block_number());
  Walk walk(block);
  const int steps = block.steps, blocks = block.blocks, stride = block.stride;
  wait(shared_address(&shared.keys_full), 0);
  float k_bound = 0.f;
#pragma unroll
  for (int k = 0; k < steps16; ++k) k_bound = max_or_nan(k_bound, shared.keys[k / 4].record.scale[k % 4]);
  if (threadIdx.x < steps16)
    shared.unit[threadIdx.x] = __float2half2_rn(__fdividef(shared.keys[threadIdx.x / 4].record.scale[threadIdx.x % 4], k_bound));
  synchronise(ADDED, 128);
  const uint32_t k8t = where(shared_address(shared.keys[0].record.k8t)), rows = shared_address(shared.ds) + swizzle<2 * KEYS>(warp * 16 + lane % 16, lane / 16);
  for (int step = 0; step < steps; ++step, walk.advance(blocks, stride)) {
    const int buffer = step % BUFFERS;
    const int64_t record = walk.record;
    float scale[2] = {a.w.fine[record * QUERIES + row] * k_bound, a.w.fine[record * QUERIES + row + 8] * k_bound};
    wait(shared_address(&shared.ds_full[buffer]), step / BUFFERS % 2);
    if (threadIdx.x == COPIER && step > 0) copy_queries(a, shared, (step - 1) % STAGES<Dp>);
    uint32_t x[steps16][4];
#pragma unroll
    for (int k = 0; k < steps16; ++k) {
      load_matrices(x[k], ((rows + buffer * static_cast<int>(sizeof(shared.ds[0]))) ^ (k % 4 * 32)) + k / 4 * static_cast<int>(sizeof(shared.ds[0][0])));
#pragma unroll
      for (int i = 0; i < 4; ++i) x[k][i] = bits(__hmul2(half2_of(x[k][i]), shared.unit[k]));
    }
    __syncwarp();
    if (lane == 0) arrive(shared_address(&shared.ds_empty[buffer]));
    __half2 top[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      top[r] = __hmax2_nan(__habs2(half2_of(x[0][r])), __habs2(half2_of(x[0][r + 2])));
#pragma unroll
      for (int k = 1; k < steps16; ++k) top[r] = __hmax2_nan(top[r], __hmax2_nan(__habs2(half2_of(x[k][r])), __habs2(half2_of(x[k][r + 2]))));
    }
    __half2 both = __hmax2_nan(__lows2half2(top[0], top[1]), __highs2half2(top[0], top[1])), inverse[2];
    both = __hmax2_nan(both, __shfl_xor_sync(~0u, both, 1));
    both = __hmax2_nan(both, __shfl_xor_sync(~0u, both, 2));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float largest = r ? __high2float(both) : __low2float(both);
      inverse[r] = __half2half2(inverse_scale(largest, 127.f)), scale[r] *= scale_of(largest, 127.f);
    }
    const bool small = __all_sync(~0u, scale[0] <= 2.f && scale[1] <= 2.f);  // then |y scale| <= 2^22: a sum with MAGIC_FLOAT rounds it
    uint32_t operand[steps32][4];
    const __half2 magic = __float2half2_rn(MAGIC_HALF);
#pragma unroll
    for (int k = 0; k < steps32; ++k)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        operand[k][i] = low_bytes(__hfma2(half2_of(x[2 * k + i / 2][i % 2]), inverse[i % 2], magic), __hfma2(half2_of(x[2 * k + i / 2][i % 2 + 2]), inverse[i % 2], magic));
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
    synchronise(ADDED, 128);
#pragma unroll
    for (int chunk = 0; chunk < chunks; ++chunk) {
      if (chunk + 1 < chunks) product(chunk + 1), wait_for_products<1>(); else wait_for_products<0>();
      ready(y[chunk % 2]);
      int4* to = reinterpret_cast<int4*>(shared.dq) + chunk / 2 * (QUERIES * 64 / 4) + (warp * 8 + chunk % 2 * 4) * 32 + lane;
      const auto write = [&](auto round) {
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          int z[4];
#pragma unroll
          for (int c = 0; c < 4; ++c) z[c] = round(__int2float_rn(y[chunk % 2][4 * n + c]), scale[c / 2]);
          to[n * 32] = {z[0], z[1], z[2], z[3]};
        }
      };
      if (small) write([](float x, float scale) { return __float_as_int(fmaf(x, scale, MAGIC_FLOAT)); });
      else write([](float x, float scale) { return MAGIC + __float2int_rn(x * scale); });
    }
    fence_async();
    synchronise(ADDED, 128);
    if (threadIdx.x == 0) add_bulk(a.w.d_q + record * (QUERIES * Dp), shared_address(shared.dq), sizeof(shared.dq));
  }
  if (threadIdx.x == 0) wait_for_additions();
}

template <typename T, int Dp>
__global__ void __launch_bounds__(BLOCK_THREADS, 1) backward_kernel(const __grid_constant__ BackwardArgs a) {
  after_previous();
  extern __shared__ __align__(1024) unsigned char bytes[];
  Shared<Dp>& shared = *reinterpret_cast<Shared<Dp>*>(bytes);
  if (threadIdx.x == 0) start(a, shared);
  __syncthreads();
  if (!KeyBlock<Dp>(a, block_number()).exists()) return;
  if (threadIdx.x < 128) {
    give_registers<DQ_REGISTERS>();
    add_dq<Dp>(a, shared);
  } else {
    take_registers<KEY_REGISTERS>();
    KeyGroup<T, Dp>{a, shared}.run();
  }
}

template <typename T, int Dp>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  constexpr int bytes = sizeof(Shared<Dp>);
  static_assert(bytes <= 227 * 1024);
  cudaFuncSetAttribute(backward_kernel<T, Dp>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  const unsigned blocks = a.keys.tiles * a.p.shape.heads_kv * a.splits;
  if (blocks) launch_kernel(backward_kernel<T, Dp>, blocks, BLOCK_THREADS, bytes, stream, a);
}

}  // namespace

void gradients(const BackwardArgs& a, cudaStream_t stream) {
  sm80::dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm90

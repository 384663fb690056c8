// What the sm80 kernels hand to each other: tiles, the scratch arrays and their layouts.
//
// Tokens are cut into tiles of TILE within each sequence. Scratch arrays are padded to whole tiles, so that the main
// kernels copy them without looking at lengths; the tiles of all sequences lie one after another (`first_tile`).
// For packed sequences, sequence n starts at tile cu_seqlens[n] / TILE + n: room enough without a prefix sum.
//
// Letters as in attention.h. [Hq][tiles] means: head-major, then all tiles of all sequences of the call.
//
// Token-contiguous ("transposed") int8 tiles are [Dp][TILE], and within each group of 32 tokens they are permuted, so
// that an accumulator of one matmul is, without a shuffle, the A operand of the next. Position p = 16 h + 4 t + 2 a + b
// of a group (h, a, b in 0..1, t in 0..3) holds its token
//
//       token(p) = 16 h + 8 a + 2 t + b        p: 0 1 2 3 | 4 5  6  7 |  8  9 10 11 | 12 13 14 15 | 16 ..
//                                          token: 0 1 8 9 | 2 3 10 11 |  4  5 12 13 |  6  7 14 15 | 16 ..
//
// because a lane's accumulator has columns 2t, 2t+1 of each 8-column tile, and its A operand bytes 4t..4t+3.
//
// Two neighbouring columns (tokens or channels 2i, 2i + 1) of an accumulator take one float2 of every constant. `bias` is
// -MAGIC_FLOAT * scale: one fused multiply-add takes an accumulator that started at MAGIC to scale * n. Scales have 22
// bits (`scale22`), so the bias is exact.
//
// A "record" is all that a main kernel needs of one tile, as it lies in shared memory: copying it is one run of 16-byte
// pieces. Matrices in it are swizzled (`swizzle<row bytes>`); rows and columns past the end of the sequence are zeros.
#pragma once
#include "../attention.h"
#include "../common/cuda.cuh"

namespace sagetrain::sm80 {

constexpr int TILE = 128;
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

// One side (queries or keys) of a call.
struct Tokens {
  const int32_t* cu_seqlens;  // or null
  int32_t tokens;             // of a batch row
  int32_t sequences;          // N
  int32_t tiles;              // of all sequences
};

// Tiles of a sequence of `tokens` tokens, when sequences are not packed (one even if it is empty), and of a whole call.
template <int tile>
__host__ __device__ constexpr int tiles_each(int tokens) { return tokens > 0 ? (tokens + tile - 1) / tile : 1; }
template <int tile>
__host__ __device__ constexpr int all_tiles(const Tokens& x) {
  return x.cu_seqlens && x.sequences ? x.tokens / tile + x.sequences : x.sequences * tiles_each<tile>(x.tokens);
}

struct Span {  // one sequence
  int32_t sequence, batch, begin, length, first_tile;
};

// Column i's scale and bias.
__device__ __forceinline__ void write_scale(float2* scales, float2* biases, int i, float scale) {
  reinterpret_cast<float*>(scales)[i] = scale, reinterpret_cast<float*>(biases)[i] = -MAGIC_FLOAT * scale;
}

template <int Dp>
struct __align__(16) ForwardKeys {  // TILE keys
  static constexpr bool shared_scales = false;     // every key has its own
  int8_t k8[TILE * Dp];                            // [key][channel]
  int8_t v8t[Dp * TILE];                           // [channel][key], permuted: v - v_mean, one scale per channel
  float2 k_scale[TILE / 2], k_bias[TILE / 2];      // columns of S
  float2 v_scale[Dp / 2], v_bias[Dp / 2];          // columns of O

  __device__ __forceinline__ void write_key_scales(const float* scale) {  // [TILE], by a whole block
    if (threadIdx.x < TILE) write_scale(k_scale, k_bias, threadIdx.x, scale[threadIdx.x]);
  }
  __device__ __forceinline__ void write_value_scale(int channel, float scale) { write_scale(v_scale, v_bias, channel, scale); }
};

constexpr int KEYS = 64;  // of a step of the dQ kernel
template <int Dp>
struct __align__(16) BackwardKeys {  // KEYS keys
  int8_t k8[KEYS * Dp];                            // [key][channel]
  int8_t k8t[Dp * KEYS];                           // [channel][key], permuted
  int16_t v[KEYS * Dp];                            // [key][channel] v - v_mean, rounded to 16 bits
  float2 k_scale[KEYS / 2], k_bias[KEYS / 2];      // columns of S
};

// The keys of a block of the dK and dV kernel. In its k8t, position 2 g + r of 16 keys holds key 8 r + g: the two keys
// that a lane's accumulator has are neighbours.
struct __align__(8) KeyUnit {
  __half2 unit;  // twice the same half
  float k_scale;
};
template <int Dp>
struct __align__(16) BlockKeys {  // TILE keys
  int16_t v[TILE * Dp];                            // [key][channel] v - v_mean, rounded to 16 bits
  int8_t k8t[Dp * TILE];                           // [channel][key]; only for `fused`, like all below
  KeyUnit unit[TILE];
  float k_bound[4];                                // the first; three of padding
};

constexpr int QUERIES = 64;  // of a step of the dK and dV kernel; they share one scale per channel of dO
template <int Dp>
struct __align__(16) BackwardQueries {  // QUERIES queries; the formulas are below
  // for dV
  int8_t do8t[Dp * QUERIES];                       // [channel][query], permuted: dO / rho, one scale per channel
  float2 do_scale[Dp / 2], do_bias[Dp / 2];        // columns of dV
  // for S^T
  int8_t q8[QUERIES * Dp];                         // [query][channel]
  float2 q_scale[QUERIES / 2], q_bias[QUERIES / 2];  // columns of S^T: q_scale * scale * log2(e) * Dp
  float2 l[QUERIES / 2];
  // for dK
  float2 c[QUERIES / 2], d[QUERIES / 2];
  float dk_unit[4];                                // the first; three of padding
  int8_t q8t[Dp * QUERIES];                        // [channel][query], permuted
  // for dP^T, and the rows of the dQ kernel
  int16_t do16[QUERIES * Dp];                      // [query][channel] dO / 2^e, e = floor(log2(its row's largest magnitude)): exact
};

struct ForwardScratch {
  float* k_partial;   // [Hkv][tiles_k][Dp] sums of the samples of k, TILE each, from the first tile of a sequence on
  float* v_partial;   // [Hkv][tiles_k][Dp] the same of v
  float* v_residual;  // [Hkv][tiles_k][Dp] sum over the tile of v - v_mean - v_scale * v8
  void* keys;         // [Hkv][tiles_k] ForwardKeys<Dp>
};

struct BackwardScratch {
  void* blocks;       // [Hkv][tiles_k] BlockKeys<Dp>
  void* keys;         // not fused: [Hkv][tiles_k][TILE / KEYS] BackwardKeys<Dp>
  float* v_norm;      // [Hkv][tiles_k] largest ||v_j - v_mean|| of the tile (0 where empty)
  float* k_bound;     // [Hkv][tiles_k] largest k_scale of the tile (0 where empty)
  void* queries;      // [Hq][tiles_q][TILE / QUERIES] BackwardQueries<Dp>
  float4* q_rows;     // [Hq][tiles_q][TILE] {q_scale * scale * log2(e) * Dp, L', delta16, out}; out differs where fused
  float* d_q;         // fused: [Hq][tiles_q][TILE / 16][Dp / 8][lane][4] sums of dQ, 16-row tiles as accumulators lie in registers
  float* d_kv;        // splits > 1: [Hkv][tiles_k][dK, dV][TILE / 16][Dp / 8][lane][4] likewise
};
// For key i and query j of QUERIES of them, s the base-2 score and lse2 = lse_smooth * log2(e):
//   P''  = exp2(s - L_j) = 2^15 P rho_j,      L_j = lse2_j - log2(rho_j) - 15; +inf past the end and for rows that see no key
//          rho_j = 2^floor((e_j - E) / 2) <= 1, E the largest e of the block (rows of zeros: rho_j = 1)
//   dV_i = 2^-15 sum_j P''_ij (dO_j / rho_j)
//   u    = c_j dP16 - d_j, |u rho_j| <= 1:    c_j = lift_j q_scale_j 2^e_j / rho_j / W,  d_j = c_j delta16_j
//          W = 2^ceil(log2(max over the block of (q_scale_j 2^e_j / rho_j) * bound_j)), a power of two
//          bound_j = ||do16_j|| * max ||v|| + |delta16_j|
//          lift_j >= 1, a power of two: brings small rows to 1/4 of the largest; q8t_j = q8_j / lift_j, rounded
//   dK_i = scale sum_j P''_ij u_ij * dk_unit * q8t_j,     dk_unit = 2^-15 W      (dS_ij q_scale_j = P'' u * dk_unit / lift_j)
// Fused, P'' is multiplied by unit_i = k_scale_i / k_bound as a half, at least 2^-5; dV_i and dK_i are divided by it at the end.
//   dQ_j = out_j sum_i P''_ij unit_i u_ij * k_bound * k8t_i,   out_j = scale * dk_unit / (q_scale_j lift_j)
//          k8t_i = k8_i, where unit_i was raised times k_scale_i / k_bound / unit_i and rounded
// For query row i and key j in the dQ kernel (not fused):
//   P'   = exp2(s - L'_i) = 2^k_i P,          k_i = 15 - ceil(log2(bound_i * max k_scale)), clamped to +-100;  L'_i = lse2_i - k_i
//         (+inf past the end and for rows that see no key)
//   dS' k_scale_j = P' (dP16 - delta16_i) k_scale_j, at most 2^15;  out_i = scale * 2^(e_i - k_i) undoes it
// delta16 = (rowsum(dO (o - v_mean)) - d_lse) / 2^e, and v in bound_j is v - v_mean. Where dO, o or d_lse is not finite the constants are NaN, and so are the gradients.

// ---------------------------------------------------------------------------------------------------- device helpers

__device__ __forceinline__ int clamp_edge(int edge, int tokens) { return min(max(edge, 0), tokens); }

// Sequence n, in tiles of `tile` tokens.
template <int tile = TILE>
__device__ __forceinline__ Span span_of(const Tokens& x, int n) {
  if (!x.cu_seqlens) return {n, n, 0, x.tokens, n * tiles_each<tile>(x.tokens)};
  const int begin = clamp_edge(x.cu_seqlens[n], x.tokens), end = clamp_edge(x.cu_seqlens[n + 1], x.tokens);
  return {n, 0, begin, max(end - begin, 0), begin / tile + n};
}

// The sequence that tile number `index` belongs to: the last one that starts at or before it.
template <int tile = TILE>
__device__ __forceinline__ Span span_of_tile(const Tokens& x, int index) {
  if (!x.cu_seqlens) return span_of<tile>(x, index / tiles_each<tile>(x.tokens));
  int low = 0, high = x.sequences - 1;  // packed: first tiles increase strictly
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (clamp_edge(x.cu_seqlens[middle], x.tokens) / tile + middle <= index) low = middle; else high = middle - 1;
  }
  return span_of<tile>(x, low);
}

// The token at a position of a permuted tile: in the order of the top, and in that of BlockKeys.
__host__ __device__ __forceinline__ constexpr int token_at(int p) { return (p & ~14) | (p & 2) << 2 | (p & 12) >> 1; }
__host__ __device__ __forceinline__ constexpr int paired_token_at(int p) { return (p & ~15) | (p & 1) << 3 | (p & 14) >> 1; }

// Index of (batch, head, token) in a contiguous [B, H, T] array.
__device__ __forceinline__ int64_t row_index(int batch, int heads, int head, int64_t tokens, int token) {
  return (static_cast<int64_t>(batch) * heads + head) * tokens + token;
}

// The queries of a block of the forward and dQ kernels, `rows` of them in one head, and the keys that they see. Blocks
// with more keys (causal) come first.
template <int rows>
struct QueryRows {
  Span queries, keys;
  int head, head_kv, first;  // first: the block's first query, within its sequence
  int offset;                // causal: query i sees keys up to i + offset
  int visible;               // keys that any of the block's queries sees

  __device__ QueryRows(const Shape& s, const Tokens& q, const Tokens& k, int block) {
    const int heads = s.heads_q, tile = all_tiles<rows>(q) - 1 - block / heads;
    head = block % heads, head_kv = head / (heads / static_cast<int>(s.heads_kv));
    queries = span_of_tile<rows>(q, tile);
    keys = span_of(k, queries.sequence);
    first = (tile - queries.first_tile) * rows;
    offset = keys.length - queries.length;
    visible = visible_to(s, 0, rows);
  }
  // Keys that any of `count` of the block's queries sees, from number `from` of them on; 0 if there is no such query.
  __device__ __forceinline__ int visible_to(const Shape& s, int from, int count) const {
    if (first + from >= queries.length) return 0;
    return s.is_causal ? max(0, min(keys.length, min(first + from + count, queries.length) + offset)) : keys.length;
  }
  // Within the keys: the last that exists, and the last that `query` sees if nothing but causality hides any.
  __device__ __forceinline__ int last_key() const { return keys.length - 1; }
  __device__ __forceinline__ int diagonal(const Shape& s, int query) const { return s.is_causal ? query + offset : 1 << 30; }
  __device__ __forceinline__ bool exist() const { return first >= 0 && first < queries.length; }
  // Row of an output [B, Hq, Tq, D].
  template <typename T>
  __device__ __forceinline__ T* row(void* to, const Strides& s, int query) const {
    return static_cast<T*>(to) + queries.batch * s.batch + head * s.head + (queries.begin + query) * s.token;
  }
  // Index of a query in [B, Hq, Tq], and of the sequence's first query in scratch of whole tiles, [Hq][tiles][TILE].
  __device__ __forceinline__ int64_t index(const Shape& s, int query) const {
    return row_index(queries.batch, s.heads_q, head, s.tokens_q, queries.begin + query);
  }
  __device__ __forceinline__ int64_t padded(const Tokens& q) const {
    return (static_cast<int64_t>(head) * q.tiles + span_of(q, queries.sequence).first_tile) * TILE;
  }
};

// ---------------------------------------------------------------------------------------------------- launches

struct ForwardArgs {
  ForwardParams p;
  Tokens queries, keys;
  ForwardScratch w;
};
struct BackwardArgs {
  BackwardParams p;
  Tokens queries, keys;
  bool fused;   // dQ in the same kernel as dK and dV
  int splits;   // blocks that share a tile of keys
  BackwardScratch w;
};

void quantise(const ForwardArgs&, cudaStream_t);          // quantise.cu: k8, k_scale, q8, q_scale, means, scratch; lse becomes scale * q . k_mean
void attend(const ForwardArgs&, cudaStream_t);            // forward.cu: o, lse_smooth, lse
void prepare(const BackwardArgs&, cudaStream_t);          // prepare.cu: BackwardScratch, the sums as zeros
void key_gradients(const BackwardArgs&, cudaStream_t);    // dkv.cu: d_k, d_v, and d_q where fused
int fused_bytes(const Shape&);                            // dkv.cu: shared memory that `fused` takes
void query_gradients(const BackwardArgs&, cudaStream_t);  // dq.cu: d_q

// Calls launch(a number of the call's dtype, an integral_constant of its padded head dimension).
template <typename Launch>
void dispatch(const Shape& s, Launch launch) {
  const auto with = [&](auto number) {
    s.head_dim_padded == 64 ? launch(number, std::integral_constant<int, 64>{}) : launch(number, std::integral_constant<int, 128>{});
  };
  s.dtype == DType::bfloat16 ? with(__nv_bfloat16{}) : with(__half{});
}

}  // namespace sagetrain::sm80

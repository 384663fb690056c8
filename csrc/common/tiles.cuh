// Tiles of tokens: how a call is cut into them, which sequence and head a block works for, what it sees.
//
// Tokens are cut into tiles of TILE within each sequence. Scratch arrays are padded to whole tiles, so that the main
// kernels copy them without looking at lengths; the tiles of all sequences lie one after another (`first_tile`).
// For packed sequences, sequence n starts at tile cu_seqlens[n] / TILE + n: room enough without a prefix sum.
//
// Letters as in attention.h. [Hq][tiles] means: head-major, then all tiles of all sequences of the call.
//
// Token-contiguous ("transposed") int8 tiles are [Dp][TILE], and within each run of 32 tokens they are permuted, so
// that an accumulator of one matmul is, without a shuffle, the A operand of the next. Position p = 16 h + 4 t + 2 a + b
// of a run (h, a, b in 0..1, t in 0..3) holds its token
//
//       token(p) = 16 h + 8 a + 2 t + b        p: 0 1 2 3 | 4 5  6  7 |  8  9 10 11 | 12 13 14 15 | 16 ..
//                                          token: 0 1 8 9 | 2 3 10 11 |  4  5 12 13 |  6  7 14 15 | 16 ..
//
// because a lane's accumulator has columns 2t, 2t+1 of each 8-column tile, and its A operand bytes 4t..4t+3.
#pragma once
#include <cuda_runtime.h>

#include "../attention.h"

namespace sagetrain {

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

// The token at a position of a permuted tile.
__host__ __device__ __forceinline__ constexpr int token_at(int p) { return (p & ~14) | (p & 2) << 2 | (p & 12) >> 1; }

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
  __device__ __forceinline__ bool exists() const { return first >= 0 && first < queries.length; }
  // Row of an output [B, Hq, Tq, D].
  template <typename T>
  __device__ __forceinline__ T* row(void* to, const Strides& s, int query) const {
    return static_cast<T*>(to) + queries.batch * s.batch + head * s.head + (queries.begin + query) * s.token;
  }
  // Row of the sequence's first key in an input [B, Hkv, Tk, D].
  template <typename T>
  __device__ __forceinline__ const T* first_key(const void* of, const Strides& s) const {
    return static_cast<const T*>(of) + keys.batch * s.batch + head_kv * s.head + keys.begin * s.token;
  }
  // Index of a query in [B, Hq, Tq], and of the sequence's first query in scratch of whole tiles, [Hq][tiles][TILE].
  __device__ __forceinline__ int64_t index(const Shape& s, int query) const {
    return row_index(queries.batch, s.heads_q, head, s.tokens_q, queries.begin + query);
  }
  __device__ __forceinline__ int64_t padded(const Tokens& q) const {
    return (static_cast<int64_t>(head) * q.tiles + span_of(q, queries.sequence).first_tile) * TILE;
  }
};

}  // namespace sagetrain

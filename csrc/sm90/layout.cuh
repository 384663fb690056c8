// What the sm90 kernels hand to each other: records, scratch and the constants in them. Letters as in attention.h; tiles, and the order of
// tokens in what is transposed: common/tiles.cuh. Records lie as in shared memory: matrices swizzled for wgmma (hopper.cuh), rows and
// columns past the end of the sequence zeros.
#pragma once
#include "../common/call.cuh"

namespace sagetrain::sm90 {

// ---------------------------------------------------------------------------------------------------- forward

// The base-2 score of query i and key j is s_ij = n q_i k_g:  n = sum_c q8 k8, an integer, |n| <= 127 * 127 * 128;  q_i = q_scale_i scale
// log2(e) Dp;  k_g the scale of j's key group. A key group is the 16 keys of half a tile that one lane has in the accumulators of S, those of the
// same key / 2 % 4: so a lane needs two scales for its 32 scores of a row.

constexpr int KEY_GROUPS = 8;  // of keys in a tile: 4 in each half

template <int Dp>
struct __align__(128) KeyValueRecord {  // TILE keys
  static constexpr bool scale_by_group = true;
  int8_t k8[TILE * Dp];              // [key][channel]
  int8_t v8t[Dp * TILE];             // [channel][key], permuted: v - v_mean, one scale per channel; 0 of a sequence's first key
  float2 v_scale[Dp / 2];            // channels 2i and 2i + 1
  float k_scale[KEY_GROUPS];         // of the first half, of the second

  // [TILE], by a whole block; zero of keys that do not exist.
  __device__ __forceinline__ void write_key_scales(const float* scale) {
    const int i = threadIdx.x;
    if (i < KEY_GROUPS) k_scale[i] = scale[i / 4 * 64 + i % 4 * 2];
  }
  __device__ __forceinline__ void write_value_scale(int channel, float scale) { reinterpret_cast<float*>(v_scale)[channel] = scale; }
};

// ---------------------------------------------------------------------------------------------------- backward

// The main kernel's rows are the keys of a block, 64 to a warpgroup and 16 to a warp, in an order that gives a warp keys of one scale: of 64
// keys, warp w of the warpgroup has those with key / 2 % 4 = w, which is a key group of the forward (above). `key_of_row` says which.
//
// For key i and query j of a record, s the base-2 score and lse2 = lse_smooth * log2(e):
//   P''  = exp2(s - L_j) = 2^15 P rho_j,      L_j = lse2_j - log2(rho_j) - 15; +inf past the end and for rows that see no key
//          rho_j = amax_j / 2^E, 2^E > the record's largest |dO|; amax_j the row's largest |dO|, do8_j = dO_j / (amax_j / 127), rounded
//   dV_i = sum_j P''_ij do8_j * dv_scale,                  dv_scale = 2^-15 2^E / 127
//   u    = c_j dP16 - d_j:    c_j = lift_j q_scale_j 2^e_j / rho_j / W,  d_j = c_j delta16_j,    dO = 2^e_j do16_j
//          as halves: d_j of c_j as it is rounded, c_j by a unit so that d_j loses least (prepare.cu)
//          e_j = floor(log2(amax_j)) + a number for all queries of a sequence that keeps |dP16| below 2^10: it fits a half
//          W = 2^ceil(log2(max over the record of q_scale_j 2^e_j bound_j max(1, 2^-12 / rho_j))), bound_j = ||do16_j|| max ||v|| + |delta16_j|
//          lift_j >= 1, a power of two: brings small rows to 1/4 of the largest, as far as |u| <= 2^12; q8t_j = q8_j / lift_j, rounded
//   dK_i = scale sum_j P''_ij u_ij * dk_scale * q8t_j,     dk_scale = 2^-15 W
//   dQ_j = out_j sum_i P''_ij u_ij relative_i * k_bound k8_i,  relative_i = k_scale_i / k_bound, k_bound the largest of the tile
//          out_j = scale * dk_scale / (q_scale_j lift_j)
// The sums of dQ are integers: multiples of 1 / fine_j, a power of two (see below) so large that no sum can leave 32 bits: |P'' u| <= 2^15 P 2^reach_j with
// 2^reach_j = the row's share of W, after lifting, and the P of a row sum to one. So what is added in no order has the same bits every time.
// Every block adds MAGIC besides, which is for free; finish.cu knows how many blocks there are.
// What the sequence has a say in of the thresholds (common/round.cuh) by which P'' and dS'' are rounded: of dV and dK, the last bits of the LSE of the
// record's first 32 queries, added; of dQ, those of the two rows of a lane, which are also the last 10 of their fine_j, so that this is a little more than a power of two.

constexpr int QUERIES = 64;  // of a record
constexpr int KEYS = 64;     // of a record: those of a warpgroup

// The key of a row of the main kernel, within its record or tile.
__host__ __device__ __forceinline__ constexpr int key_of_row(int row) { return (row & 64) | (row & 14) << 2 | (row >> 4 & 3) << 1 | (row & 1); }

template <int Dp>
struct __align__(128) KeyRecord {  // KEYS keys, by rows
  int16_t v[KEYS * Dp];            // [channel / 64][row][64 channels] v - v_centre, which 16 bits hold
  int8_t k8[KEYS * Dp];            // [row][channel]
  int8_t k8t[Dp * KEYS];           // [channel][row], permuted
  float scale[4], padding[28];     // k_scale of a warp's rows
};

template <int Dp>
struct __align__(128) QueryRecord {  // QUERIES queries
  // what S, P and dS are made of
  int8_t q8[QUERIES * Dp];           // [query][channel]
  int16_t do16[QUERIES * Dp];        // [channel / 64][query][64 channels] dO / 2^e: exact, but for a half too small to be normal
  float4 s[QUERIES / 2];             // queries 2i and 2i + 1: {q_scale * scale * log2(e) * Dp, twice; -L, twice}
  uint2 u[QUERIES / 2];              // as halves: {c, c}, {-d, -d}
  uint32_t thresholds;               // of the record, twice the same
  float padding[63];
  // what dK and dV are made of
  int8_t q8t[Dp * QUERIES];          // [channel][query], permuted, like the next
  int8_t do8t[Dp * QUERIES];         // [channel][query]
  float dv_scale, dk_scale, more_padding[30];
};

struct BackwardScratch {
  void* keys;         // [Hkv][tiles_k][TILE / KEYS] KeyRecord<Dp>
  float* v_norm;      // [Hkv][tiles_k] largest ||v_j - v_centre|| of the tile (0 where empty)
  float* k_bound;     // [Hkv][tiles_k] largest k_scale of the tile (0 where empty)
  void* queries;      // [Hq][tiles_q][TILE / QUERIES] QueryRecord<Dp>
  float* fine;        // [Hq][tiles_q][TILE]
  float* out;         // [Hq][tiles_q][TILE] out / fine; infinite for rows that see no key
  int* d_q;           // [Hq][tiles_q][TILE / QUERIES][Dp / 64][4][8][lane][4] sums of dQ, 16 x 64 tiles as accumulators lie in registers
  float* d_kv;        // splits > 1: [Hkv][tiles_k][splits][dK, dV][warp][Dp / 8][lane][4] parts of dK and dV, likewise
};

struct BackwardArgs {
  BackwardParams p;
  Tokens queries, keys;
  int splits;  // blocks that share a tile of keys
  int heads;   // of keys that are worked on at a time: a divisor of Hkv
  BackwardScratch w;
};

// ---------------------------------------------------------------------------------------------------- passes

void quantise(const ForwardArgs&, cudaStream_t);  // quantise.cu: k8, k_scale, q8, q_scale, means, scratch; lse becomes scale * q . k_mean
void attend(const ForwardArgs&, cudaStream_t);    // forward.cu: o, lse_smooth, lse

void prepare(const BackwardArgs&, cudaStream_t);    // prepare.cu: records, constants, zeros for the sums of dQ
void gradients(const BackwardArgs&, cudaStream_t);  // backward.cu: sums of dQ; dK and dV, or their parts
void finish(const BackwardArgs&, cudaStream_t);     // finish.cu: dQ, and where there are parts dK and dV

}  // namespace sagetrain::sm90

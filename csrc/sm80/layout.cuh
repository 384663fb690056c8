// What the sm80 kernels hand to each other: records, scratch and the constants in them. Tiles, and the order of tokens in what is
// transposed: common/tiles.cuh. Letters as in attention.h. [Hq][tiles] means: head-major, then all tiles of all sequences of the call.
//
// Two neighbouring columns (tokens or channels 2i, 2i + 1) of an accumulator take one float2 of every constant. `bias` is
// -MAGIC_FLOAT * scale: one fused multiply-add takes an accumulator that started at MAGIC to scale * n. Scales have 22
// bits (`scale22`), so the bias is exact.
//
// A record is all that a main kernel needs of one tile, as it lies in shared memory: copying it is one run of 16-byte
// chunks. Matrices in it are swizzled (`swizzle<row bytes>`); rows and columns past the end of the sequence are zeros.
#pragma once
#include "../common/call.cuh"
#include "../common/round.cuh"

namespace sagetrain::sm80 {

constexpr int SHARED_BYTES = 99 * 1024;  // that a block can have on all architectures that these are compiled for (8.6, 8.9, 12.0)

// Column i's scale and bias.
__device__ __forceinline__ void write_scale(float2* scales, float2* biases, int i, float scale) {
  reinterpret_cast<float*>(scales)[i] = scale, reinterpret_cast<float*>(biases)[i] = -MAGIC_FLOAT * scale;
}

template <int Dp>
struct __align__(16) KeyValueRecord {  // TILE keys
  static constexpr bool scale_by_group = false;    // every key has its own
  int8_t k8[TILE * Dp];                            // [key][channel]
  int8_t v8t[Dp * TILE];                           // [channel][key], permuted: v - v_mean, one scale per channel; 0 of a sequence's first key
  float2 k_scale[TILE / 2], k_bias[TILE / 2];      // columns of S
  float2 v_scale[Dp / 2], v_bias[Dp / 2];          // columns of O

  __device__ __forceinline__ void write_key_scales(const float* scale) {  // [TILE], by a whole block
    if (threadIdx.x < TILE) write_scale(k_scale, k_bias, threadIdx.x, scale[threadIdx.x]);
  }
  __device__ __forceinline__ void write_value_scale(int channel, float scale) { write_scale(v_scale, v_bias, channel, scale); }
};

constexpr int DQ_KEYS = 64;  // of a DqKeyRecord, which is a step of dq.cu
template <int Dp>
struct __align__(16) DqKeyRecord {  // DQ_KEYS keys
  int8_t k8[DQ_KEYS * Dp];                         // [key][channel]
  int8_t k8t[Dp * DQ_KEYS];                        // [channel][key], permuted
  int16_t v[DQ_KEYS * Dp];                         // [key][channel] v - v_centre, which 16 bits hold
  float2 k_scale[DQ_KEYS / 2], k_bias[DQ_KEYS / 2];  // columns of S
};

// The keys of a block of backward.cu. In its k8t, position 2 g + r of 16 keys holds key 8 r + g: the two keys
// that a lane's accumulator has are neighbours.
__host__ __device__ __forceinline__ constexpr int paired_token_at(int p) { return (p & ~15) | (p & 1) << 3 | (p & 14) >> 1; }
struct __align__(8) KeyScale {
  __half2 relative;  // k_scale / k_bound, twice the same half
  float k_scale;
};
template <int Dp>
struct __align__(16) KeyRecord {  // TILE keys
  int16_t v[TILE * Dp];                            // [key][channel] v - v_centre, which 16 bits hold
  int8_t k8t[Dp * TILE];                           // [channel][key]; only for `fused`, like all below
  KeyScale scale[TILE];
  float k_bound[4];                                // the first; three of padding
};

constexpr int QUERIES = 64;  // of a QueryRecord, which is a step of backward.cu; they share one scale per channel of dO
template <int Dp>
struct __align__(16) QueryRecord {  // QUERIES queries; the formulas are below
  // for dV
  int8_t do8t[Dp * QUERIES];                       // [channel][query], permuted: dO / rho, one scale per channel
  float2 do_scale[Dp / 2], do_bias[Dp / 2];        // columns of dV
  // for S^T
  int8_t q8[QUERIES * Dp];                         // [query][channel]
  float2 q_scale[QUERIES / 2], q_bias[QUERIES / 2];  // columns of S^T: q_scale * scale * log2(e) * Dp
  float2 l[QUERIES / 2];
  // for dK
  float2 c[QUERIES / 2], d[QUERIES / 2];
  float dk_scale;
  uint32_t thresholds;                             // of the record (common/round.cuh), twice the same: last bits of the LSE of 32 queries, added
  float padding[2];
  int8_t q8t[Dp * QUERIES];                        // [channel][query], permuted
  // for dP^T, and the rows of the dQ kernel
  int16_t do16[QUERIES * Dp];                      // [query][channel] dO / 2^e, e = floor(log2(its row's largest magnitude)): exact
};

struct BackwardScratch {
  void* blocks;       // [Hkv][tiles_k] KeyRecord<Dp>
  void* keys;         // not fused: [Hkv][tiles_k][TILE / DQ_KEYS] DqKeyRecord<Dp>
  float* v_norm;      // [Hkv][tiles_k] largest ||v_j - v_centre|| of the tile (0 where empty)
  float* k_bound;     // [Hkv][tiles_k] largest k_scale of the tile (0 where empty)
  void* queries;      // [Hq][tiles_q][TILE / QUERIES] QueryRecord<Dp>
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
//   dK_i = scale sum_j P''_ij u_ij * dk_scale * q8t_j,     dk_scale = 2^-15 W      (dS_ij q_scale_j = P'' u * dk_scale / lift_j)
// Fused, P'' is multiplied by relative_i = k_scale_i / k_bound as a half, at least 2^-5; dV_i and dK_i are divided by it at the end.
//   dQ_j = out_j sum_i P''_ij relative_i u_ij * k_bound * k8t_i,   out_j = scale * dk_scale / (q_scale_j lift_j)
//          k8t_i = k8_i, where relative_i was raised times k_scale_i / k_bound / relative_i and rounded
// For query row i and key j in the dQ kernel (not fused):
//   P'   = exp2(s - L'_i) = 2^k_i P,          k_i = 15 - ceil(log2(bound_i * max k_scale)), clamped to +-100;  L'_i = lse2_i - k_i
//         (+inf past the end and for rows that see no key)
//   dS' k_scale_j = P' (dP16 - delta16_i) k_scale_j, at most 2^15;  out_i = scale * 2^(e_i - k_i) undoes it
// delta16 = (rowsum(dO (o - v_centre)) - d_lse) / 2^e, and v in bound_j is v - v_centre. Where dO, o or d_lse is not finite the constants are NaN, and so are the gradients.

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
void gradients(const BackwardArgs&, cudaStream_t);        // backward.cu: d_k, d_v; fused: sums of d_q, and where splits > 1 of d_k and d_v
int fused_bytes(const Shape&);                            // backward.cu: shared memory that `fused` takes
void query_gradients(const BackwardArgs&, cudaStream_t);  // dq.cu, not fused: d_q
void finish(const BackwardArgs&, cudaStream_t);           // finish.cu, fused: gradients from their sums

}  // namespace sagetrain::sm80

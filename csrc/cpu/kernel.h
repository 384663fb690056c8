// What the CPU kernel's parts agree on: tile numbers, operand layouts, the table entry of one instruction set.
//
// One idea carries the whole kernel: *vector lanes are query rows, matrix rows are keys*. Scores are computed
// transposed (S^T[key, query]), so everything a softmax keeps per query (maximum, sum, lse, delta, the scale of a row
// of dS) is a lane of a vector, and no horizontal reduction is left but one maximum per key row in the backward.
// Every INT8 matmul is then the same micro-kernel (`multiply` in simd.inl):
//
//        C[row, lane] += sum_g  dot( broadcast A[row, g],  X[g, lane] )       A: rows x groups, X: groups x lanes
//
// where a "group" is the G neighbouring contracted elements that fill 32 bits, the unit of one dot instruction:
//
//     G = 4 bytes    avx512_vnni   vpdpbusd, u8 x s8: the unsigned side of a signed product carries +128 (U), taken
//                                  back through the accumulator's start value (-128 * sum of the other side)
//     G = 2 int16    avx2          vpmaddwd + vpaddd: exact (vpmaddubsw would saturate)
//     G = 1 float    portable      exact too: every product sum is an integer below 2^24
//
//   packed operand X ("lanes")               broadcast operand A ("rows")
//   group 0:  lane 0 |e0 e1 e2 e3| lane 1 |e0 e1 e2 e3| ... lane 63        row 0: e0 e1 e2 e3 | e4 e5 e6 e7 | ...
//   group 1:  lane 0 |e4 e5 e6 e7| ...                                     row 1: ...
//
// The five INT8 matmuls (d: channel, i: query, j: key) and the one that is never quantised:
//     S^T [j, i]   X = Q8 [d/G][64 i][G]  (+U)   A = K8 [j][d]              forward and backward
//     O^T [d, i]   X = P8 [j/G][i][G]     u8     A = V8^T [d][j]            forward
//     dP^T[j, i]   X = dO'[d/2][64 i][2]  bf16   A = V' [j][d]              (or fp32, groups of one)
//     dV  [j, d]   X = dO8[i/G][d][G]            A = P8 [j][i]    u8
//     dK  [j, d]   X = Q8 [i/G][d][G]            A = dS8[j][i]    (+U)
//     dQ^T[d, i]   X = dS8[j/G][i][G]     (+U)   A = K8^T [d][j]
//
// The same sources compile once per instruction set, inside an unnamed namespace, with the target switched on by a
// pragma after the includes: nothing compiled for a newer CPU can leak into another translation unit.
#pragma once
#include <cfloat>
#include <cstddef>
#include <cstdint>

#include "../attention.h"
#include "../signs.h"

namespace sagetrain::cpu {

// Tiles. The forward's key tile is where P gets its row maximum and V its scales; the backward's tiles are where P, dS
// and dO get theirs (docs/numerics.md). 64 query lanes = 4 zmm or 8 ymm; 32 keys keep S^T of a lane block in L1.
constexpr int kQueryTile = 64;
constexpr int kKeyTileForward = 32;
constexpr int kKeyTileBackward = 64;

// The smallest and largest row maximum a scale is made of: all-zero rows and absurdly large ones stay finite.
constexpr float kAmaxMin = 0x1p-100f, kAmaxMax = 0x1p55f;

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

struct Kernel {
  const char* name;
  size_t (*forward_workspace_bytes)(const ForwardParams&);
  size_t (*backward_workspace_bytes)(const BackwardParams&);
  void (*forward)(const ForwardParams&);
  void (*backward)(const BackwardParams&);
};
extern const Kernel kAvx512Vnni, kAvx2, kPortable;

}  // namespace sagetrain::cpu

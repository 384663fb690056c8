// Signs of the channels of q and k before they are rotated: 32 patterns, of which each sequence and KV head draws one, by its mean key.
//
// Sylvester's Hadamard matrix sums channels that move together into one; with these signs it does not. And what rounding to the nearest
// integer makes of a token is the same whenever it stands at the same place, a bias; in another rotation it is another. How the patterns were
// chosen, and what they leave: docs/LOG.md, 2026-11-29. The same in Python: sagetrain/ops/signs.py. On a GPU: common/rotate.cuh.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define SAGE_BOTH __host__ __device__
#else
#define SAGE_BOTH
#endif

namespace sagetrain {

struct Signs {
  uint64_t low, high;  // bit d: channel d (d - 64) changes its sign
};
struct Patterns {
  Signs of[32];
};

constexpr Patterns kPatterns = {{
    {0x3f3f21dea6a68b74, 0x0ac9fa39b47778bb}, {0x8edb7e2b7dd88d28, 0x8edb7e2b7dd88d28},
    {0x593f95f339a06cf5, 0xb1d71b7d63fac950}, {0xde472174de74deb8, 0x3a71f64281604d53},
    {0x660f55335a3c6900, 0xc6c66c93faf505f5}, {0x8774bb482122e2e1, 0x4b7822eebb77d2e1},
    {0xc39933695a00aaf0, 0xb4884b771e221e22}, {0xc30a33f596059905, 0xc39933695a00aaf0},
    {0xf50ac9c99c635050, 0xcc69ff0fa5aa3c99}, {0x8484d1d11de27b84, 0xb7484747e21d4848},
    {0xc3335a96aa9900f0, 0x1d692ea5fc22cfee}, {0x56f6ca3f59f63530, 0x3f3f21dea6a68b74},
    {0x3a95f60cc565f6fc, 0x565c603f59a36030}, {0x1e1e1ee1eedd11dd, 0xc0a9a63fcfa959cf},
    {0x5035afc590c660c6, 0x5f0aa00a636c9c6c}, {0xd1741db848de4821, 0x2e6a84c0f34859e2},
    {0xc0a9cf56c09a309a, 0xb4e1d82744ee2828}, {0xb4e1d82744ee2828, 0xc900c6f055c95a39},
    {0x86a4d3f102b9a813, 0x693ca5f03399ffaa}, {0x2e2d1de14844b744, 0xcaa93a566ff360f3},
    {0x63af9c5005930593, 0xf90635ca2d2d1111}, {0xb24217e77e8edb2b, 0x74d147e212b7de7b},
    {0x3e319b94bf4f1aea, 0xeb1b414e28d8828d}, {0x7822d78dbe1b1ebb, 0xa5c300aaf09666cc},
    {0x88dd2882e14b1b4e, 0x888b8847cfa53096}, {0x0fcca5aa96993cff, 0xc3335a96aa9900f0},
    {0x356fc560065309a3, 0x6fc095c5ca653060}, {0x0f96ccaa3c66ff5a, 0x95309ac0560c59fc},
    {0xf50563635ca30906, 0x959ac6c9c030afa0}, {0x8b848b847b8b8474, 0x323efef2986ba457},
    {0x9363a0505f50c636, 0x5f3936af0a939cfa}, {0x1edeb47b2eee8b44, 0x565c603f59a36030},
}};

// Which of them a sequence and KV head has: by the first bits of two channels of its mean key. Not by the last ones, which hang on the order
// of sums: the same sequence beside others would be rounded in another way.
SAGE_BOTH inline int drawn(uint32_t first, uint32_t second) { return static_cast<int>((first >> 12 ^ (second >> 12) * 2246822519u) * 2654435761u >> 27); }
inline Signs signs_of(const float* k_mean) {
  uint32_t bits[2];
  std::memcpy(bits, k_mean, sizeof bits);
  return kPatterns.of[drawn(bits[0], bits[1])];
}

}  // namespace sagetrain

#undef SAGE_BOTH

// After the fused backward: dQ from its sums, and where several blocks share a tile of keys dK and dV from theirs. Bound by memory. No barriers,
// no shared memory; a warp has 16 of a tile's TILE rows, as many as an accumulator, and all their channels.
#include "backward.cuh"

namespace sagetrain::sm80 {
namespace {

constexpr int FINISH_THREADS = TILE / 16 * 32;  // a warp has 16 rows

template <int n>
__device__ __forceinline__ void load_sums(float (&x)[n][4], const float4* sums) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const float4 y = sums[j * 32];
    x[j][0] = y.x, x[j][1] = y.y, x[j][2] = y.z, x[j][3] = y.w;
  }
}

// Blocks 2i and 2i + 1 of the first `key_blocks`: dK and dV of a tile. The others: dQ of a tile.
template <typename T, int Dp>
__global__ void __launch_bounds__(FINISH_THREADS) finish_kernel(const __grid_constant__ BackwardArgs a, int key_blocks) {
  after_previous();
  const int number = block_number();
  float x[1][Dp / 8][4];
  if (number < key_blocks) {
    const int heads = a.p.shape.heads_kv, tile = number / 2 / heads, which = number % 2;
    const KeyRows<Dp, 1> rows(a, tile * a.splits * heads + number / 2 % heads);
    if (!rows.exists()) return;
    load_sums(x[0], rows.sums(a, which));
    which ? rows.template store_dv<T>(a, x) : rows.template store_dk<T>(a, x);
  } else {
    const QueryRows<TILE> rows(a.p.shape, a.queries, a.keys, number - key_blocks);
    if (!rows.exists()) return;
    const int first = rows.first + threadIdx.x / 32 * 16;
    load_sums(x[0], reinterpret_cast<const float4*>(a.w.d_q) + (rows.padded(a.queries) + first) * (Dp / 4) + threadIdx.x % 32);
    store_dq<T, Dp>(x, a, rows, first);
  }
}

template <typename T, int Dp>
void launch(const BackwardArgs& a, cudaStream_t stream) {
  const size_t query_blocks = a.queries.tiles * a.p.shape.heads_q, key_tiles = a.splits == 1 ? 0 : a.keys.tiles * a.p.shape.heads_kv;
  const unsigned blocks = query_blocks + 2 * key_tiles;
  if (blocks) launch_kernel(finish_kernel<T, Dp>, blocks, FINISH_THREADS, 0, stream, a, 2 * key_tiles);
}

}  // namespace

void finish(const BackwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) { launch<decltype(number), decltype(dim)::value>(a, stream); });
}

}  // namespace sagetrain::sm80

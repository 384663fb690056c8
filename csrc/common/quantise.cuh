// Before the forward, once per token: means, rotation, rounding to INT8. Bound by memory: q, k and v are read once, and a
// sample of k and v before, for their means; a tile stays in registers from its load to its last use.
//
//   barriers        __syncthreads between the parts of a block's work, no other
//   shared memory   sums 2 KiB (D = 64), 4 (D = 128); keys and values 13, 21.5: V of the tile, transposed, and 5 of scales and maxima;
//                   queries 5.75, 6.5
//   tile size       TILE tokens of a head, all channels, 256 threads (rows.cuh). Registers limit the blocks of a multiprocessor: three with
//                   80; sums, keys and values at D = 128: two with 128
//
// Every backend that includes this compiles the kernels for its own architectures. So they are local to its file: two of one name would
// be one to the linker, and a device could be given the code of another.
#pragma once
#include "outside.cuh"
#include "quantise_keys.cuh"
#include "quantise_queries.cuh"

namespace sagetrain {
namespace {

// Packed only: checks cu_seqlens, and gives the tokens outside every sequence their results.
template <typename T, int Dp>
__global__ void __launch_bounds__(THREADS) forward_rest_kernel(const __grid_constant__ ForwardArgs a) {
  after_previous();
  if (blockIdx.x == 0) check_edges(a.queries, 'q'), check_edges(a.keys, 'k');
  const int dim = a.p.shape.head_dim;
  for_rest(a.queries, a.p.shape.heads_q, [&](int head, int token, int lane) {
    const int64_t row = static_cast<int64_t>(head) * a.queries.tokens + token;
    zero_row<T>(a.p.o, a.p.o_strides, head, token, lane, dim);
    for (int d = 8 * lane; d < Dp; d += 64) *reinterpret_cast<uint2*>(a.p.q8 + row * Dp + d) = uint2{0, 0};
    if (lane == 0) a.p.q_scale[row] = 0.f, a.p.lse[row] = a.p.lse_smooth[row] = -infinity();
  });
  for_rest(a.keys, a.p.shape.heads_kv, [&](int head, int token, int lane) {
    const int64_t row = static_cast<int64_t>(head) * a.keys.tokens + token;
    for (int d = 8 * lane; d < Dp; d += 64) *reinterpret_cast<uint2*>(a.p.k8 + row * Dp + d) = uint2{0, 0};
    if (lane == 0) a.p.k_scale[row] = 0.f;
  });
}

// ---------------------------------------------------------------------------------------------------- launches

template <typename T, int Dp, typename Keys>
void launch_passes(const ForwardArgs& a, cudaStream_t stream) {
  const unsigned key_blocks = static_cast<unsigned>(a.keys.tiles * a.p.shape.heads_kv);
  const unsigned query_blocks = static_cast<unsigned>(a.queries.tiles * a.p.shape.heads_q);
  if (a.queries.cu_seqlens) launch_kernel(forward_rest_kernel<T, Dp>, REST_BLOCKS, THREADS, 0, stream, a);
  if (key_blocks) {
    launch_kernel(sum_kernel<T, Dp>, dim3(key_blocks, 2), THREADS, 0, stream, a);
    launch_kernel(key_value_kernel<T, Dp, Keys>, dim3(key_blocks, 2), THREADS, 0, stream, a);
  }
  if (query_blocks) launch_kernel(query_kernel<T, Dp>, query_blocks, THREADS, 0, stream, a);
}

// All passes. Keys<Dp> is the KeyValueRecord of a folder: k8, v8t, scale_by_group, and functions that write the scales.
template <template <int> typename Keys>
void run_passes(const ForwardArgs& a, cudaStream_t stream) {
  dispatch(a.p.shape, [&](auto number, auto dim) {
    constexpr int Dp = decltype(dim)::value;
    launch_passes<decltype(number), Dp, Keys<Dp>>(a, stream);
  });
}

}  // namespace
}  // namespace sagetrain

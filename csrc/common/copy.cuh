// From device memory to shared memory by cp.async, and how rows lie there without bank conflicts.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace sagetrain {

__device__ __forceinline__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// Copies 16 bytes without passing through registers.
__device__ __forceinline__ void copy16(uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_for_copies() {  // until at most `pending` groups are still under way
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Offset of 16-byte chunk `chunk` of row `row` in a tile with rows of 64, 128 or 256 bytes, permuted so that eight
// rows of one chunk column lie in different banks.
template <int row_bytes>
__host__ __device__ __forceinline__ constexpr int swizzle(int row, int chunk) {
  static_assert(row_bytes == 64 || row_bytes == 128 || row_bytes == 256);
  return row * row_bytes + (chunk ^ (row_bytes == 64 ? (row >> 1) & 3 : row & 7)) * 16;
}

}  // namespace sagetrain

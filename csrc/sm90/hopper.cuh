// Hopper's own instructions, one inline function each: barriers in shared memory, bulk copies, warpgroup matrix products.
#pragma once
#include <cuda_bf16.h>

#include <cstdint>
#include <type_traits>

#include "../common/copy.cuh"

namespace sagetrain::sm90 {

// ---------------------------------------------------------------------------------------------------- limits

constexpr int SHARED_BYTES = 227 * 1024;  // that a block can have
constexpr int NAMED_BARRIERS = 16;        // of a block, 0 among them: __syncthreads
// Registers of a block that has a multiprocessor for itself, as they are launched; what warpgroups give and take stays within them.
constexpr int registers_of(int threads) { return 65536 / threads / 8 * 8 * threads; }

// ---------------------------------------------------------------------------------------------------- barriers, copies

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Until the phase of this parity is complete.
__device__ __forceinline__ void wait(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(barrier), "r"(parity) : "memory");
}
// Copies a run of bytes (multiples of 16) by the copy engine, which reports them to the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier)
               : "memory");
}
// Adds 32-bit integers in shared memory to those in device memory, by the copy engine. In no order: sums of floats would differ from call to call.
__device__ __forceinline__ void add_bulk(int* to, uint32_t from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to), "r"(from), "r"(bytes) : "memory");
}
// Until at most `pending` of this thread's additions have still to be read from shared memory; until all are done.
template <int pending>
__device__ __forceinline__ void wait_for_reads() { asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(pending) : "memory"); }
__device__ __forceinline__ void wait_for_additions() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Read from shared memory by address.
__device__ __forceinline__ void load(float& x, uint32_t address) { asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory"); }
__device__ __forceinline__ void load(float2& x, uint32_t address) {
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
}
// The reverse of load_matrices, transposed: row l % 8 of matrix l / 8, at lane l's address, receives column l % 8.
__device__ __forceinline__ void store_transposed(uint32_t address, uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// Named barriers of `threads` threads: sync_named waits for all of them, arrive_named counts as one and goes on.
__device__ __forceinline__ void sync_named(int barrier, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }
__device__ __forceinline__ void arrive_named(int barrier, int threads) { asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory"); }

template <int registers>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers)); }
template <int registers>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers)); }

// ---------------------------------------------------------------------------------------------------- matrix products

// Matrices in shared memory are K-major, of bytes, rows of 64 or 128 bytes swizzled as swizzle<row_bytes> does, and start at a multiple
// of 8 rows. Their descriptor is {matrix_at(address), descriptor_high<row_bytes>()}; the next 32 bytes of k are at `matrix_at(address) + 2`.
template <int row_bytes>
__device__ __forceinline__ constexpr uint32_t descriptor_high() {
  static_assert(row_bytes == 64 || row_bytes == 128);
  return (row_bytes == 128 ? 1u : 2u) << 30 | row_bytes * 8 / 16;
}
template <int row_bytes>
__device__ __forceinline__ uint64_t descriptor(uint32_t matrix) { return static_cast<uint64_t>(descriptor_high<row_bytes>()) << 32 | matrix; }
__device__ __forceinline__ uint32_t matrix_at(uint32_t address) { return 1u << 16 | address >> 4; }

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }

// d (+)= a b^T for 64 rows and 32, 64 or 128 columns, 32 bytes of k (multiply_16bit: both operands of 16 bits, rows of 128 bytes). For each
// 8-column tile n, d[4 n + c] is C of mma.m16n8; warp w of the four has rows 16 w to 16 w + 15. Operand registers are A of mma.m16n8k32. Neither may be touched until wait_for_products.
#define SAGETRAIN_D8(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), "+r"(d[i + 7])
#define SAGETRAIN_D32(i) SAGETRAIN_D8(i), SAGETRAIN_D8(i + 8), SAGETRAIN_D8(i + 16), SAGETRAIN_D8(i + 24)
#define SAGETRAIN_LOW "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define SAGETRAIN_HIGH "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

template <int row_bytes, bool add>
__device__ __forceinline__ void multiply_s8s8(int (&d)[64], uint32_t a, uint32_t b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {" SAGETRAIN_LOW "," SAGETRAIN_HIGH "}, %64, %65, add;\n}"
               : SAGETRAIN_D32(0), SAGETRAIN_D32(32) : "l"(descriptor<row_bytes>(a)), "l"(descriptor<row_bytes>(b)), "n"(add));
}
template <int row_bytes, bool add>
__device__ __forceinline__ void multiply_u8s8(int (&d)[64], const uint32_t (&a)[4], uint32_t b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.s8 {" SAGETRAIN_LOW "," SAGETRAIN_HIGH "}, {%64,%65,%66,%67}, %68, add;\n}"
               : SAGETRAIN_D32(0), SAGETRAIN_D32(32)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor<row_bytes>(b)), "n"(add));
}
template <int row_bytes, bool add>
__device__ __forceinline__ void multiply_u8s8(int (&d)[32], const uint32_t (&a)[4], uint32_t b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k32.s32.u8.s8 {" SAGETRAIN_LOW "}, {%32,%33,%34,%35}, %36, add;\n}"
               : SAGETRAIN_D32(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor<row_bytes>(b)), "n"(add));
}
template <int row_bytes, bool add>
__device__ __forceinline__ void multiply_s8s8(int (&d)[32], uint32_t a, uint32_t b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" SAGETRAIN_LOW "}, %32, %33, add;\n}"
               : SAGETRAIN_D32(0) : "l"(descriptor<row_bytes>(a)), "l"(descriptor<row_bytes>(b)), "n"(add));
}
template <int row_bytes, bool add>
__device__ __forceinline__ void multiply_s8s8(int (&d)[32], const uint32_t (&a)[4], uint32_t b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {" SAGETRAIN_LOW "}, {%32,%33,%34,%35}, %36, add;\n}"
               : SAGETRAIN_D32(0)
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor<row_bytes>(b)), "n"(add));
}
#define SAGETRAIN_D16 SAGETRAIN_D8(0), SAGETRAIN_D8(8)
#define SAGETRAIN_LOWEST "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
template <int row_bytes, bool add>
__device__ __forceinline__ void multiply_s8s8(int (&d)[16], const uint32_t (&a)[4], uint32_t b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n32k32.s32.s8.s8 {" SAGETRAIN_LOWEST "}, {%16,%17,%18,%19}, %20, add;\n}"
               : SAGETRAIN_D16
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor<row_bytes>(b)), "n"(add));
}
template <int row_bytes, bool add>
__device__ __forceinline__ void multiply_u8s8(int (&d)[16], const uint32_t (&a)[4], uint32_t b) {
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %21, 0;\n"
               "wgmma.mma_async.sync.aligned.m64n32k32.s32.u8.s8 {" SAGETRAIN_LOWEST "}, {%16,%17,%18,%19}, %20, add;\n}"
               : SAGETRAIN_D16
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor<row_bytes>(b)), "n"(add));
}
#undef SAGETRAIN_D16
#undef SAGETRAIN_LOWEST
#define SAGETRAIN_F8(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
template <typename T, bool add>
__device__ __forceinline__ void multiply_16bit(float (&d)[32], uint32_t a, uint32_t b) {
#define SAGETRAIN_MULTIPLY(type)                                                                                                                  \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                                                                                     \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" SAGETRAIN_LOW "}, %32, %33, add, 1, 1, 0, 0;\n}"                  \
               : SAGETRAIN_F8(0), SAGETRAIN_F8(8), SAGETRAIN_F8(16), SAGETRAIN_F8(24) : "l"(descriptor<128>(a)), "l"(descriptor<128>(b)), "n"(add))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) SAGETRAIN_MULTIPLY("bf16"); else SAGETRAIN_MULTIPLY("f16");
#undef SAGETRAIN_MULTIPLY
}
template <typename T, bool add>
__device__ __forceinline__ void multiply_16bit(float (&d)[32], const uint32_t (&a)[4], uint32_t b) {
#define SAGETRAIN_MULTIPLY(type)                                                                                                                  \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                                                                                     \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" SAGETRAIN_LOW "}, {%32,%33,%34,%35}, %36, add, 1, 1, 0;\n}"      \
               : SAGETRAIN_F8(0), SAGETRAIN_F8(8), SAGETRAIN_F8(16), SAGETRAIN_F8(24)                                                              \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor<128>(b)), "n"(add))
  if constexpr (std::is_same_v<T, __nv_bfloat16>) SAGETRAIN_MULTIPLY("bf16"); else SAGETRAIN_MULTIPLY("f16");
#undef SAGETRAIN_MULTIPLY
}
#undef SAGETRAIN_F8
#undef SAGETRAIN_D8
#undef SAGETRAIN_D32
#undef SAGETRAIN_LOW
#undef SAGETRAIN_HIGH

}  // namespace sagetrain::sm90

// How the CUDA kernels are launched, and the few machine instructions that they use, one inline function each, with what their
// operands look like.
//
// Layouts of mma.m16n8 (lane = 4 * group + t, so group = lane / 4 and t = lane % 4):
//
//   A, 16 x 32 bytes (or 16 x 16 halves): register 0 holds row `group`, bytes 4t..4t+3 (halves 2t, 2t+1);
//      register 1 the same of row group + 8; registers 2 and 3 the same two rows, 16 bytes (8 halves) further on.
//   B, 32 bytes x 8 (16 halves x 8): register 0 holds column `group`, bytes 4t..4t+3; register 1 is 16 bytes further on.
//   C and D, 16 x 8: {c0, c1} are row `group`, columns 2t and 2t+1; {c2, c3} the same columns of row group + 8.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

namespace sagetrain {

// ---------------------------------------------------------------------------------------------------- launches

// Launches `kernel`, which must call after_previous() first of all, in every thread. Code for compute capability 9.0 and later then
// overlaps its launch with the end of the kernel before it in the stream (programmatic dependent launch): about 1 us less each.
template <typename... Parameters, typename... Arguments>
void launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared, cudaStream_t stream, const Arguments&... arguments) {
  cudaFuncAttributes code{};
  cudaFuncGetAttributes(&code, kernel);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(threads), config.dynamicSmemBytes = shared, config.stream = stream;
  config.attrs = &overlap, config.numAttrs = code.ptxVersion >= 90 ? 1 : 0;  // only if this code does wait: __CUDA_ARCH__ below
  cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}
// Until the kernel before this one in the stream is done and what it wrote can be read.
__device__ __forceinline__ void after_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---------------------------------------------------------------------------------------------------- global -> shared

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

// Four 8 x 16-byte matrices; lane l gives the address of row l % 8 of matrix l / 8. Register m then holds, of matrix m,
// row `group`, bytes 4t..4t+3: a B operand (or a quarter of an A operand).
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}

// Offset of 16-byte chunk `chunk` of row `row` in a tile with rows of 64, 128 or 256 bytes, permuted so that eight
// rows of one chunk column lie in different banks.
template <int row_bytes>
__host__ __device__ __forceinline__ constexpr int swizzle(int row, int chunk) {
  static_assert(row_bytes == 64 || row_bytes == 128 || row_bytes == 256);
  return row * row_bytes + (chunk ^ (row_bytes == 64 ? (row >> 1) & 3 : row & 7)) * 16;
}

// Copies `bytes` contiguous bytes by `threads` threads.
template <int bytes, int threads>
__device__ __forceinline__ void copy_run(uint32_t to, const void* from) {
  static_assert(bytes % 16 == 0);
  const char* source = static_cast<const char*>(from) + threadIdx.x * 16;
  to += threadIdx.x * 16;
#pragma unroll
  for (int i = 0; i < bytes / 16; i += threads)
    if (i + threads <= bytes / 16 || threadIdx.x < bytes / 16 - i) copy16(to + 16 * i, source + 16 * i);
}

// ---------------------------------------------------------------------------------------------------- tensor cores

// An INT32 accumulator that starts at MAGIC has, read as a float, the value 12582912 + n: no conversion is needed.
constexpr int MAGIC = 0x4B400000;
constexpr float MAGIC_FLOAT = 12582912.f;  // 3 * 2^22

__device__ __forceinline__ void mma_s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

__device__ __forceinline__ void mma_u8s8(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const int (&c)[4]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

template <typename T>
__device__ __forceinline__ void mma_16bit(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, const float (&c)[4]) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
  }
}

// The block's number and the thread's, as values that the compiler does not know: what is derived from them again, after a
// long loop or late in its body, does not occupy registers before.
__device__ __forceinline__ int block_number() {
  int x;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(x));
  return x;
}
__device__ __forceinline__ int thread_number() {
  int x;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
  return x;
}

// ---------------------------------------------------------------------------------------------------- arithmetic

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Adding 1536 to an integer |n| <= 255 held in a half leaves n in the low byte (two's complement). Takes the four low
// bytes of two such pairs: {x.lo, x.hi, y.lo, y.hi}.
constexpr float MAGIC_HALF = 1536.f;
__device__ __forceinline__ uint32_t low_bytes(__half2 x, __half2 y) {
  return __byte_perm(reinterpret_cast<uint32_t&>(x), reinterpret_cast<uint32_t&>(y), 0x6420);
}

// Largest (or sum) over the four lanes that share a row of an accumulator.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
  return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
template <typename T>
__device__ __forceinline__ uint32_t pack16(float lo, float hi) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return reinterpret_cast<uint32_t&>(pair);
  } else {
    __half2 pair = __floats2half2_rn(lo, hi);
    return reinterpret_cast<uint32_t&>(pair);
  }
}

// Two or eight 16-bit numbers less a mean each, rounded to 16 bits again.
template <typename T>
__device__ __forceinline__ uint32_t centre(uint32_t x, const float* mean) {
  const T* pair = reinterpret_cast<const T*>(&x);
  return pack16<T>(to_float(pair[0]) - mean[0], to_float(pair[1]) - mean[1]);
}
template <typename T>
__device__ __forceinline__ uint4 centre(const uint4& x, const float* mean) {
  return {centre<T>(x.x, mean), centre<T>(x.y, mean + 2), centre<T>(x.z, mean + 4), centre<T>(x.w, mean + 6)};
}

// Four words of four bytes as a matrix: transposed.
__device__ __forceinline__ void transpose_bytes(uint32_t (&x)[4]) {
  const uint32_t ab = __byte_perm(x[0], x[1], 0x5140), ab_high = __byte_perm(x[0], x[1], 0x7362);
  const uint32_t cd = __byte_perm(x[2], x[3], 0x5140), cd_high = __byte_perm(x[2], x[3], 0x7362);
  x[0] = __byte_perm(ab, cd, 0x5410), x[1] = __byte_perm(ab, cd, 0x7632);
  x[2] = __byte_perm(ab_high, cd_high, 0x5410), x[3] = __byte_perm(ab_high, cd_high, 0x7632);
}

// Keeps 22 bits of a scale, so that MAGIC_FLOAT * scale is exact.
__device__ __forceinline__ float scale22(float x) { return __int_as_float(__float_as_int(x) & ~3); }

}  // namespace sagetrain

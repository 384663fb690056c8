// How kernels are launched, and what a kernel knows of its place in the launch.
#pragma once
#include <cuda_runtime.h>

namespace sagetrain {

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

}  // namespace sagetrain

// What overlaps with mma.sync? Cycles of small instruction mixes on one GPU: the ground under docs/sm80.md, "The bound".
//
//   nvcc -O3 -std=c++17 -arch=sm_90 benchmarks/mma_overlap.cu -o mma_overlap && ./mma_overlap        (-arch of the GPU)
//
// One line per mix, 1 to 4 warps per scheduler (4 to 16 per multiprocessor, one block on each). The number is cycles of a
// scheduler per mix of one warp: were everything to overlap it would be that of the slowest unit, were nothing to, the sum.
//
// Instructions of a mix do not depend on each other: eight independent MMAs, 32 FFMAs, 8 PRMTs and 8 EX2s go round, so that
// with several warps latency does not show.
// Look at the machine code after a change (cuobjdump -sass): ptxas drops or merges what it can prove to be the same.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

struct Mix {  // warp instructions of each kind
  int imma;   // mma.m16n8k32, int8
  int hmma;   // mma.m16n8k16, bf16
  int ffma;   // fma.f32
  int prmt;   // byte permutation
  int ex2;    // MUFU.EX2
  int ldsm;   // ldmatrix.x4
};

constexpr int UNROLL = 8;  // mixes of an iteration

template <int imma, int hmma, int ffma, int prmt, int ex2, int ldsm>
__global__ void mix_kernel(float* out, long long* cycles, int iterations, uint32_t zero) {
  __shared__ __align__(128) unsigned char shared[UNROLL * 512];
  int s[UNROLL][4];
  float y[UNROLL][4], f[32];
  uint32_t u[8], loaded[4] = {0, 0, 0, 0}, seen = 0;
  for (int i = 0; i < UNROLL; ++i)
    for (int j = 0; j < 4; ++j) s[i][j] = threadIdx.x, y[i][j] = threadIdx.x;
  for (int i = 0; i < 32; ++i) f[i] = threadIdx.x * 0.001f + i;
  for (int i = 0; i < 8; ++i) u[i] = threadIdx.x + i;
  for (int i = threadIdx.x; i < UNROLL * 128; i += blockDim.x) reinterpret_cast<uint32_t*>(shared)[i] = i;
  __syncthreads();
  const uint32_t a[4] = {threadIdx.x, threadIdx.x + 1, 3, 4}, b[2] = {threadIdx.x * 7, 5};
  const float m = out[0], c = out[1];
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared)) + threadIdx.x % 32 * 16;

  const long long start = clock64();
  for (int n = 0; n < iterations; ++n) {
#pragma unroll
    for (int i = 0; i < UNROLL; ++i) {
#pragma unroll
      for (int j = 0; j < imma; ++j) {
        int (&d)[4] = s[(i * imma + j) % UNROLL];
        asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      }
#pragma unroll
      for (int j = 0; j < hmma; ++j) {
        float (&d)[4] = y[(i * hmma + j) % UNROLL];
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
      }
#pragma unroll
      for (int j = 0; j < ffma; ++j) asm volatile("fma.rn.f32 %0, %0, %1, %2;" : "+f"(f[(i * ffma + j) % 32]) : "f"(m), "f"(c));
#pragma unroll
      for (int j = 0; j < prmt; ++j) asm volatile("prmt.b32 %0, %0, %1, 0x6420;" : "+r"(u[(i * prmt + j) % 8]) : "r"(zero));
#pragma unroll
      for (int j = 0; j < ex2; ++j) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(f[(i * ex2 + j + 5) % 32]));
#pragma unroll
      for (int j = 0; j < ldsm; ++j) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(loaded[0]), "=r"(loaded[1]), "=r"(loaded[2]), "=r"(loaded[3])
                     : "r"(address + i * 512));
        seen ^= loaded[1];
      }
    }
    address += zero;  // a value that ptxas does not know: or it loads once, before the loop
  }
  const long long end = clock64();

  float all = 0;
  for (int i = 0; i < UNROLL; ++i)
    for (int j = 0; j < 4; ++j) all += s[i][j] + y[i][j];
  for (int i = 0; i < 32; ++i) all += f[i];
  for (int i = 0; i < 8; ++i) all += u[i];
  out[2 + blockIdx.x * blockDim.x + threadIdx.x] = all + seen;
  if (threadIdx.x == 0) cycles[blockIdx.x] = end - start;
}

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "mma_overlap: %s\n", cudaGetErrorString(error));
  exit(1);
}

template <int imma, int hmma, int ffma, int prmt, int ex2, int ldsm>
void run(const char* name, int blocks, float* out, long long* cycles) {
  constexpr int iterations = 1000;
  printf("%-40s", name);
  for (int warps = 1; warps <= 4; ++warps) {
    long long all = 0;
    for (int n : {iterations / 5, iterations}) {  // the first warms up
      mix_kernel<imma, hmma, ffma, prmt, ex2, ldsm><<<blocks, 128 * warps>>>(out, cycles, n, 0);
      check(cudaGetLastError());
      check(cudaMemcpy(&all, cycles, sizeof(all), cudaMemcpyDeviceToHost));
    }
    printf("  %6.2f", static_cast<double>(all) / iterations / UNROLL / warps);
  }
  printf("\n");
}

int main() {
  cudaDeviceProp device;
  check(cudaGetDeviceProperties(&device, 0));
  const int blocks = device.multiProcessorCount;
  float* out;
  long long* cycles;
  check(cudaMalloc(&out, (2 + blocks * 512) * sizeof(float)));
  check(cudaMemset(out, 0, (2 + blocks * 512) * sizeof(float)));
  check(cudaMalloc(&cycles, blocks * sizeof(long long)));
  printf("%s: cycles of a scheduler per mix and warp, with 1, 2, 3, 4 warps\n", device.name);
  //  imma hmma ffma prmt ex2 ldsm
  run<1, 0, 0, 0, 0, 0>("IMMA", blocks, out, cycles);
  run<0, 1, 0, 0, 0, 0>("HMMA", blocks, out, cycles);
  run<1, 1, 0, 0, 0, 0>("IMMA + HMMA", blocks, out, cycles);
  run<0, 0, 8, 0, 0, 0>("8 FFMA", blocks, out, cycles);
  run<1, 0, 4, 0, 0, 0>("IMMA + 4 FFMA", blocks, out, cycles);
  run<1, 0, 8, 0, 0, 0>("IMMA + 8 FFMA", blocks, out, cycles);
  run<0, 1, 8, 0, 0, 0>("HMMA + 8 FFMA", blocks, out, cycles);
  run<0, 0, 0, 0, 1, 0>("EX2", blocks, out, cycles);
  run<1, 0, 0, 0, 1, 0>("IMMA + EX2", blocks, out, cycles);
  run<0, 0, 8, 0, 1, 0>("8 FFMA + EX2", blocks, out, cycles);
  run<1, 0, 8, 0, 1, 0>("IMMA + 8 FFMA + EX2", blocks, out, cycles);
  run<0, 0, 0, 0, 0, 1>("LDSM", blocks, out, cycles);
  run<1, 0, 0, 0, 0, 1>("IMMA + LDSM", blocks, out, cycles);
  run<4, 0, 0, 0, 0, 1>("4 IMMA + LDSM", blocks, out, cycles);
  run<1, 0, 8, 0, 0, 1>("IMMA + 8 FFMA + LDSM", blocks, out, cycles);
  run<1, 0, 8, 0, 1, 1>("IMMA + 8 FFMA + EX2 + LDSM", blocks, out, cycles);
  run<0, 0, 0, 4, 0, 0>("4 PRMT", blocks, out, cycles);
  run<0, 0, 4, 4, 0, 0>("4 FFMA + 4 PRMT", blocks, out, cycles);
  run<1, 0, 4, 4, 0, 0>("IMMA + 4 FFMA + 4 PRMT", blocks, out, cycles);
  run<1, 1, 8, 2, 1, 0>("IMMA + HMMA + 8 FFMA + EX2 + 2 PRMT", blocks, out, cycles);
  return 0;
}

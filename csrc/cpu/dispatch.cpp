// The boundary of attention.h for the CPU: picks the best kernel this CPU runs, or the one SAGETRAIN_CPU_ISA names.
// The saved tensors (q8, k8, scales) are the same for all of them, so the choice may differ between two calls.
#include <cstdlib>
#include <cstring>

#include "kernel.h"

namespace sagetrain::cpu {
namespace {

struct Choice {
  const Kernel* kernel;  // null: `error` says why
  const char* error;
};

#if defined(__x86_64__)
bool has_avx2() {  // every CPU with these two has F16C as well, which not every compiler can ask for
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
bool has_avx512_vnni() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512vnni");
}
const Kernel* avx2() { return has_avx2() ? &kAvx2 : nullptr; }
const Kernel* avx512_vnni() { return has_avx512_vnni() ? &kAvx512Vnni : nullptr; }
#else
const Kernel* avx2() { return nullptr; }
const Kernel* avx512_vnni() { return nullptr; }
#endif

Choice choose() {
  const char* name = std::getenv("SAGETRAIN_CPU_ISA");
  if (!name || !*name) return {avx512_vnni() ? avx512_vnni() : avx2() ? avx2() : &kPortable, nullptr};
  if (!std::strcmp(name, "portable")) return {&kPortable, nullptr};
  if (!std::strcmp(name, "avx2"))
    return {avx2(), "SAGETRAIN_CPU_ISA=avx2, but this CPU lacks AVX2 or FMA; unset it or use portable"};
  if (!std::strcmp(name, "avx512_vnni"))
    return {avx512_vnni(), "SAGETRAIN_CPU_ISA=avx512_vnni, but this CPU lacks AVX-512 F, BW, DQ, VL or VNNI; unset it, "
                           "or use avx2 or portable"};
  return {nullptr, "SAGETRAIN_CPU_ISA must be avx512_vnni, avx2 or portable (or unset: the best one this CPU runs)"};
}

const char* check(const Shape& s, const void* workspace, size_t bytes) {
  if (s.head_dim < 8 || s.head_dim > 128 || s.head_dim % 8)
    return "cpu attention: head_dim must be a multiple of 8 from 8 to 128";
  if (s.head_dim_padded != (s.head_dim <= 64 ? 64 : 128))
    return "cpu attention: head_dim_padded must be 64 for head_dim <= 64, else 128";
  if (s.heads_kv < 1 || s.heads_q % s.heads_kv) return "cpu attention: heads_q must be a multiple of heads_kv";
  if (bytes && !workspace) return "cpu attention: no workspace";
  return nullptr;
}

}  // namespace

size_t forward_workspace_bytes(const ForwardParams& p) {
  const Choice c = choose();
  return c.kernel ? c.kernel->forward_workspace_bytes(p) : 0;
}
size_t backward_workspace_bytes(const BackwardParams& p) {
  const Choice c = choose();
  return c.kernel ? c.kernel->backward_workspace_bytes(p) : 0;
}
const char* forward(const ForwardParams& p) {
  const Choice c = choose();
  if (!c.kernel) return c.error;
  if (const char* error = check(p.shape, p.workspace, c.kernel->forward_workspace_bytes(p))) return error;
  c.kernel->forward(p);
  return nullptr;
}
const char* backward(const BackwardParams& p) {
  const Choice c = choose();
  if (!c.kernel) return c.error;
  if (const char* error = check(p.shape, p.workspace, c.kernel->backward_workspace_bytes(p))) return error;
  c.kernel->backward(p);
  return nullptr;
}
const char* isa(const char** error) {
  const Choice c = choose();
  *error = c.kernel ? nullptr : c.error;
  return c.kernel ? c.kernel->name : nullptr;
}

}  // namespace sagetrain::cpu

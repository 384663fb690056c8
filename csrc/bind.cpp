// The only file that includes torch: op schemas, allocation, choice of kernel.
//
// Built on the LibTorch stable ABI (target 2.10) and Python's limited API, so one wheel serves every torch >= 2.10 and
// Python >= 3.11. Arguments are checked with friendly messages in sagetrain/ops/functional.py; the checks here
// keep a direct call of the op from reading outside its tensors. Fake kernels and autograd are registered in sagetrain/ops/library.py.
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.h"

#ifdef SAGETRAIN_CUDA
#include <cuda_runtime_api.h>
// Lives in libtorch_cuda; weak, so that the same binary loads beside a CPU-only torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using namespace sagetrain;

void check(bool ok, const std::string& message) {
  if (!ok) throw std::runtime_error("sagetrain: " + message);
}

// ------------------------------------------------------------------------------------------------ choice of kernel

struct Kernel {
  const char* name;
  size_t (*forward_workspace)(const ForwardParams&);
  size_t (*backward_workspace)(const BackwardParams&);
  const char* (*forward)(const ForwardParams&);
  const char* (*backward)(const BackwardParams&);
};

const Kernel cpu_kernel{"cpu", cpu::forward_workspace_bytes, cpu::backward_workspace_bytes, cpu::forward, cpu::backward};

// Device -1 is the CPU, others are CUDA ordinals. The newest kernel that the device can run, or the one that the environment variable
// SAGETRAIN_GPU_KERNEL names; throws where there is none. The variable is read once in a process: a backward traps on what the forward of
// another kernel saved.
const Kernel& kernel_for(int64_t device) {
  if (device < 0) return cpu_kernel;
#ifdef SAGETRAIN_CUDA
  int major = 0, minor = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, static_cast<int>(device));
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, static_cast<int>(device));
  static const std::string wish = [] {
    const char* name = std::getenv("SAGETRAIN_GPU_KERNEL");
    return std::string(name ? name : "");
  }();
  const auto wanted = [&](const char* name) { return wish.empty() || wish == name; };
#ifdef SAGETRAIN_SM90
  static const Kernel sm90_kernel{"sm90", sm90::forward_workspace_bytes, sm90::backward_workspace_bytes, sm90::forward, sm90::backward};
  if (major == 9 && wanted(sm90_kernel.name)) return sm90_kernel;
#endif
#ifdef SAGETRAIN_SM80
  static const Kernel sm80_kernel{"sm80", sm80::forward_workspace_bytes, sm80::backward_workspace_bytes, sm80::forward, sm80::backward};
  if (major >= 8 && wanted(sm80_kernel.name)) return sm80_kernel;
#endif
  throw std::runtime_error("sagetrain: no INT8 attention kernel " + (wish.empty() ? "" : "'" + wish + "' (SAGETRAIN_GPU_KERNEL) ") +
                           "in this build for compute capability " + std::to_string(major) + "." + std::to_string(minor));
#else
  throw std::runtime_error("sagetrain: this build has no CUDA kernels (nvcc was not there, or its sources were not, when it was built)");
#endif
}

int64_t device_of(const Tensor& t) { return t.is_cpu() ? -1 : t.get_device_index(); }

std::string kernel_name(int64_t device) {
  const Kernel& kernel = kernel_for(device);
  if (device >= 0) return kernel.name;
  const char* error = nullptr;
  const char* isa = cpu::isa(&error);
  check(isa != nullptr, error ? error : "");
  return std::string("cpu/") + isa;
}

// ------------------------------------------------------------------------------------------------ tensors to structs

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    case ScalarType::Float: return DType::float32;
    default: throw std::runtime_error("sagetrain: q, k and v must be bfloat16, float16 or (CPU) float32");
  }
}

Strides strides_of(const Tensor& t) {
  check(t.dim() == 4, "expected a tensor [B, H, T, D]");
  check(t.stride(3) == 1 || t.numel() == 0, "the last dimension must be contiguous");
  return {t.stride(0), t.stride(1), t.stride(2)};
}

// CUDA kernels read rows in 16-byte chunks: a tensor whose rows do not start at multiples of that is copied once.
Tensor aligned(const Tensor& t, int64_t device) {
  if (device < 0 || t.numel() == 0) return t;
  bool ok = reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < 3; ++i) ok = ok && (t.size(i) == 1 || t.stride(i) % 8 == 0);
  if (ok) return t;
  Tensor copy = torch::stable::new_empty(t, {t.size(0), t.size(1), t.size(2), t.size(3)});
  torch::stable::copy_(copy, t);
  return copy;
}

void run_parallel(int64_t n, void* context, void (*body)(void*, int64_t, int64_t)) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

Parallel parallel() { return {run_parallel, static_cast<int32_t>(torch::stable::get_num_threads())}; }

const int32_t* cu_seqlens(const OptionalTensor& edges, int64_t tokens, int64_t device, const char* name) {
  if (!edges) return nullptr;
  check(edges->scalar_type() == ScalarType::Int && edges->dim() == 1 && edges->size(0) >= 1 && edges->is_contiguous() && device_of(*edges) == device,
        std::string(name) + " must be a contiguous int32 vector [N + 1] on the device of q");
  const int32_t* values = static_cast<const int32_t*>(edges->const_data_ptr());
  for (int64_t i = 0; device < 0 && i < edges->size(0); ++i) {  // a GPU checks them itself: to read them here would wait for the stream
    const int64_t low = i ? values[i - 1] : 0;
    check(values[i] >= low && values[i] <= tokens,
          std::string(name) + "[" + std::to_string(i) + "] = " + std::to_string(values[i]) + ": must be non-decreasing and within 0.." +
              std::to_string(tokens));
  }
  return values;
}

Shape make_shape(const Tensor& q, const Tensor& k, int64_t head_dim, DType dtype, double scale, bool is_causal,
                 const OptionalTensor& cu_q, const OptionalTensor& cu_k) {
  const int64_t device = device_of(q);
  check(cu_q.has_value() == cu_k.has_value(), "cu_seqlens_q and cu_seqlens_k go together");
  check(!cu_q || (q.size(0) == 1 && cu_q->size(0) == cu_k->size(0)), "packed sequences need B = 1 and cu_seqlens of one length");
  check(k.size(1) > 0 && q.size(1) % k.size(1) == 0, "query heads must be a multiple of key/value heads");
  check(q.size(0) == k.size(0), "q and k differ in batch size");
  check(head_dim % 8 == 0 && head_dim >= 8 && head_dim <= 128, "head dimension must be a multiple of 8 up to 128");
  Shape s{};
  s.dtype = dtype;
  s.batch = q.size(0), s.heads_q = q.size(1), s.heads_kv = k.size(1);
  s.tokens_q = q.size(2), s.tokens_k = k.size(2);
  s.head_dim = head_dim, s.head_dim_padded = head_dim <= 64 ? 64 : 128;
  s.num_sequences = cu_q ? cu_q->size(0) - 1 : s.batch;
  s.cu_seqlens_q = cu_seqlens(cu_q, s.tokens_q, device, "cu_seqlens_q");
  s.cu_seqlens_k = cu_seqlens(cu_k, s.tokens_k, device, "cu_seqlens_k");
  s.is_causal = is_causal, s.scale = static_cast<float>(scale);
  return s;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < 4; ++i)
    if (a.size(i) != b.size(i)) return false;
  return true;
}

void* stream_of(int64_t device) {
#ifdef SAGETRAIN_CUDA
  void* stream = nullptr;
  if (device >= 0) {
    check(aoti_torch_get_current_cuda_stream != nullptr, "tensors are on a GPU but this torch has no CUDA");
    check(aoti_torch_get_current_cuda_stream(static_cast<int32_t>(device), &stream) == 0, "no current CUDA stream");
  }
  return stream;
#else
  (void)device;
  return nullptr;
#endif
}

float* f32(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
int8_t* i8(const Tensor& t) { return static_cast<int8_t*>(t.mutable_data_ptr()); }

// Scratch from torch's allocator, aligned to 256 bytes. `holder` keeps it alive.
void* workspace(const Tensor& like, size_t bytes, Tensor& holder) {
  holder = torch::stable::new_empty(like, {static_cast<int64_t>(bytes) + 256}, ScalarType::Byte);
  return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(holder.mutable_data_ptr()) + 255) & ~uintptr_t{255});
}

// ------------------------------------------------------------------------------------------------ the two ops

using Forward = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Forward attention_forward(Tensor q, Tensor k, Tensor v, double scale, bool is_causal, OptionalTensor cu_q,
                          OptionalTensor cu_k, bool /*deterministic: carried to the backward by autograd*/) {
  const int64_t device = device_of(q);
  const Kernel& kernel = kernel_for(device);
#ifdef SAGETRAIN_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (device >= 0) guard.emplace(static_cast<int32_t>(device));
#endif
  check(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "expected tensors [B, H, T, D]");
  Tensor o = torch::stable::empty_like(q);
  q = aligned(q, device), k = aligned(k, device), v = aligned(v, device);
  ForwardParams p{};
  p.q_strides = strides_of(q), p.k_strides = strides_of(k), p.v_strides = strides_of(v);
  check(same_shape(k, v) && q.size(3) == k.size(3), "k and v must have one shape, and the head dimension of q");
  check(dtype_of(q) == dtype_of(k) && dtype_of(q) == dtype_of(v) && device_of(k) == device && device_of(v) == device,
        "q, k and v must have one dtype and one device");
  check(device < 0 || dtype_of(q) != DType::float32, "float32 is for the CPU only");
  Shape& s = p.shape = make_shape(q, k, q.size(3), dtype_of(q), scale, is_causal, cu_q, cu_k);

  Tensor lse = torch::stable::new_empty(q, {s.batch, s.heads_q, s.tokens_q}, ScalarType::Float);
  Tensor q8 = torch::stable::new_empty(q, {s.batch, s.heads_q, s.tokens_q, s.head_dim_padded}, ScalarType::Char);
  Tensor q_scale = torch::stable::new_empty(q, {s.batch, s.heads_q, s.tokens_q}, ScalarType::Float);
  Tensor k8 = torch::stable::new_empty(q, {s.batch, s.heads_kv, s.tokens_k, s.head_dim_padded}, ScalarType::Char);
  Tensor k_scale = torch::stable::new_empty(q, {s.batch, s.heads_kv, s.tokens_k}, ScalarType::Float);
  Tensor lse_smooth = torch::stable::new_empty(q, {s.batch, s.heads_q, s.tokens_q}, ScalarType::Float);
  Tensor kv_mean = torch::stable::new_empty(q, {2, s.num_sequences, s.heads_kv, s.head_dim}, ScalarType::Float);

  p.parallel = parallel();
  p.stream = stream_of(device);
  p.q = q.const_data_ptr(), p.k = k.const_data_ptr(), p.v = v.const_data_ptr();
  p.o = o.mutable_data_ptr(), p.o_strides = strides_of(o);
  p.lse = f32(lse), p.q8 = i8(q8), p.q_scale = f32(q_scale), p.k8 = i8(k8), p.k_scale = f32(k_scale);
  p.lse_smooth = f32(lse_smooth);
  p.k_mean = f32(kv_mean), p.v_centre = p.k_mean + s.num_sequences * s.heads_kv * s.head_dim;
  Tensor scratch;
  p.workspace = workspace(q, kernel.forward_workspace(p), scratch);
  if (const char* error = kernel.forward(p)) check(false, error);
  return {o, lse, q8, q_scale, k8, k_scale, lse_smooth, kv_mean};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(Tensor d_o, OptionalTensor d_lse, Tensor v, Tensor o, Tensor q8,
                                                      Tensor q_scale, Tensor k8, Tensor k_scale, Tensor lse_smooth,
                                                      Tensor kv_mean, double scale, bool is_causal, OptionalTensor cu_q,
                                                      OptionalTensor cu_k, bool deterministic) {
  const int64_t device = device_of(o);
  const Kernel& kernel = kernel_for(device);
#ifdef SAGETRAIN_CUDA
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  if (device >= 0) guard.emplace(static_cast<int32_t>(device));
#endif
  if (d_o.stride(3) != 1) d_o = torch::stable::contiguous(d_o);  // e.g. the expanded gradient of a sum
  d_o = aligned(d_o, device);
  if (d_lse && !d_lse->is_contiguous()) d_lse = torch::stable::contiguous(*d_lse);
  check(same_shape(d_o, o) && o.size(3) == v.size(3) && dtype_of(d_o) == dtype_of(v) && dtype_of(o) == dtype_of(v) &&
            device_of(d_o) == device && device_of(v) == device,
        "d_o, o and v differ in shape, dtype or device");
  check(!d_lse || d_lse->scalar_type() == ScalarType::Float, "the gradient of lse must be float32");
  BackwardParams p{};
  Shape& s = p.shape = make_shape(o, v, v.size(3), dtype_of(v), scale, is_causal, cu_q, cu_k);
  check(q8.is_contiguous() && k8.is_contiguous() && q8.numel() == s.batch * s.heads_q * s.tokens_q * s.head_dim_padded &&
            k8.numel() == s.batch * s.heads_kv * s.tokens_k * s.head_dim_padded &&
            kv_mean.numel() == 2 * s.num_sequences * s.heads_kv * s.head_dim,
        "saved tensors do not belong to this call");

  Tensor d_q = torch::stable::empty_like(o), d_k = torch::stable::empty_like(v), d_v = torch::stable::empty_like(v);
  const Tensor v_read = aligned(v, device), o_read = aligned(o, device);
  p.parallel = parallel();
  p.stream = stream_of(device);
  p.deterministic = deterministic;
  p.d_o = d_o.const_data_ptr(), p.d_lse = d_lse ? f32(*d_lse) : nullptr;
  p.v = v_read.const_data_ptr(), p.o = o_read.const_data_ptr();
  p.d_o_strides = strides_of(d_o), p.v_strides = strides_of(v_read), p.o_strides = strides_of(o_read);
  p.q8 = i8(q8), p.q_scale = f32(q_scale), p.k8 = i8(k8), p.k_scale = f32(k_scale), p.lse_smooth = f32(lse_smooth);
  p.k_mean = f32(kv_mean), p.v_centre = p.k_mean + s.num_sequences * s.heads_kv * s.head_dim;
  p.d_q = d_q.mutable_data_ptr(), p.d_k = d_k.mutable_data_ptr(), p.d_v = d_v.mutable_data_ptr();
  p.d_q_strides = strides_of(d_q), p.d_k_strides = strides_of(d_k), p.d_v_strides = strides_of(d_v);
  Tensor scratch;
  p.workspace = workspace(o, kernel.backward_workspace(p), scratch);
  if (const char* error = kernel.backward(p)) check(false, error);
  return {d_q, d_k, d_v};
}

STABLE_TORCH_LIBRARY(sagetrain, m) {
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, float scale, bool is_causal, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, bool deterministic) -> (Tensor o, Tensor lse, Tensor q8, Tensor q_scale, Tensor k8, "
      "Tensor k_scale, Tensor lse_smooth, Tensor kv_mean)");
  m.def(
      "attention_backward(Tensor d_o, Tensor? d_lse, Tensor v, Tensor o, Tensor q8, Tensor q_scale, Tensor k8, "
      "Tensor k_scale, Tensor lse_smooth, Tensor kv_mean, float scale, bool is_causal, Tensor? cu_seqlens_q, "
      "Tensor? cu_seqlens_k, bool deterministic) -> (Tensor d_q, Tensor d_k, Tensor d_v)");
  m.def("kernel_name(int device) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(sagetrain, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(sagetrain, CUDA, m) {
  m.impl("attention_forward", TORCH_BOX(&attention_forward));
  m.impl("attention_backward", TORCH_BOX(&attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(sagetrain, CompositeExplicitAutograd, m) { m.impl("kernel_name", TORCH_BOX(&kernel_name)); }

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {  // importing the module runs the registrations above
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

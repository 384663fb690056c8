// The whole boundary between torch and the kernels.
//
// Everything above this file (bind.cpp, Python) speaks tensors; everything below it (cpu/, sm80/, ...) speaks
// these two structs. No torch, no templates, no exceptions. A new backend is a namespace with the four functions at the end
// of this file, declared there, a line in setup.py and one in `kernel_for` (bind.cpp) for the devices that it serves.
//
// Letters used in the shapes below:
//   B batch   Hq query heads   Hkv key/value heads (Hq is a multiple of Hkv)   Tq, Tk tokens   D head dimension
//   Dp  head dimension padded to a tile: 64 if D <= 64, else 128. The padding is zeros, added before the rotation.
//   N   number of sequences: B, or cu_seqlens length - 1 when sequences are packed (then B = 1)
// Quantised tensors and the row constants are contiguous; q, k, v, o, do and the gradients have strides
// (in elements) for the first three dimensions and a contiguous last one. On a GPU their rows start at multiples of
// 16 bytes.
//
// Method: docs/numerics.md; the same arithmetic in plain torch: sagetrain/ops/reference.py (presets `sage`,
// `sage_sm80` and `sage_sm90`).
#pragma once
#include <cstddef>
#include <cstdint>

namespace sagetrain {

enum class DType : int32_t { bfloat16, float16, float32 };

struct Strides {  // in elements; the stride of the last dimension is 1
  int64_t batch, head, token;
};

// Runs body(context, begin, end) over disjoint ranges that cover [0, n), on as many threads as the caller allows.
// CPU kernels get their threads from here (torch's own pool), so that two thread pools never fight over the cores.
struct Parallel {
  void (*run)(int64_t n, void* context, void (*body)(void* context, int64_t begin, int64_t end));
  int32_t num_threads;
};

struct Shape {
  DType dtype;               // of q, k, v, o, do and the gradients
  int64_t batch, heads_q, heads_kv, tokens_q, tokens_k, head_dim, head_dim_padded;
  int64_t num_sequences;     // N
  const int32_t* cu_seqlens_q;  // [N + 1] first query token of each sequence, or null when not packed
  const int32_t* cu_seqlens_k;  // [N + 1] first key token of each sequence; null exactly when cu_seqlens_q is
  bool is_causal;            // bottom-right aligned: query i of Tq sees keys j <= i + Tk - Tq
  float scale;               // softmax(scale * Q K^T)
};

struct ForwardParams {
  Shape shape;
  Parallel parallel;         // CPU only
  void* stream;              // cudaStream_t; null on CPU
  void* workspace;           // forward_workspace_bytes() bytes, 256-byte aligned; not initialised

  // inputs, never written
  const void* q;             // [B, Hq, Tq, D]
  const void* k;             // [B, Hkv, Tk, D]
  const void* v;             // [B, Hkv, Tk, D]
  Strides q_strides, k_strides, v_strides;

  // results
  void* o;                   // [B, Hq, Tq, D]
  Strides o_strides;
  float* lse;                // [B, Hq, Tq] natural log of the softmax denominator of scale * q k^T; -inf for a row that sees no key

  // saved for the backward
  int8_t* q8;                // [B, Hq, Tq, Dp]  rotated and rounded query
  float* q_scale;            // [B, Hq, Tq]      rotated query = q_scale * q8
  int8_t* k8;                // [B, Hkv, Tk, Dp] smoothed (k - k_mean), rotated and rounded key
  float* k_scale;            // [B, Hkv, Tk]     rotated key = k_scale * k8
  float* lse_smooth;         // [B, Hq, Tq]      lse - scale * q . k_mean: what the backward exponentiates against
  float* k_mean;             // [N, Hkv, D]      mean key of the sequence
  float* v_centre;           // [N, Hkv, D]      what v is less in the backward: its mean or near it, where that leaves no rounding, else 0
};

struct BackwardParams {
  Shape shape;
  Parallel parallel;         // CPU only
  void* stream;              // cudaStream_t; null on CPU
  void* workspace;           // backward_workspace_bytes() bytes, 256-byte aligned; not initialised
  bool deterministic;        // same bits for the same call, also where another way is faster

  // inputs, never written
  const void* d_o;           // [B, Hq, Tq, D]
  const float* d_lse;        // [B, Hq, Tq] gradient of lse, or null for none
  const void* v;             // [B, Hkv, Tk, D]
  const void* o;             // [B, Hq, Tq, D]
  Strides d_o_strides, v_strides, o_strides;
  const int8_t* q8;          // as the forward left them
  const float* q_scale;
  const int8_t* k8;
  const float* k_scale;
  const float* lse_smooth;
  const float* k_mean;
  const float* v_centre;

  // results, every element written
  void* d_q;                 // [B, Hq, Tq, D]
  void* d_k;                 // [B, Hkv, Tk, D]
  void* d_v;                 // [B, Hkv, Tk, D]
  Strides d_q_strides, d_k_strides, d_v_strides;
};

// Per backend: how much scratch a call needs (never more than linear in Tq + Tk), and the call itself.
// A call returns null, or a static text saying what went wrong.
namespace cpu {
size_t forward_workspace_bytes(const ForwardParams&);
size_t backward_workspace_bytes(const BackwardParams&);
const char* forward(const ForwardParams&);
const char* backward(const BackwardParams&);
// "avx512_vnni", "avx2" or "portable": the code path chosen at run time, or the one that the environment variable
// SAGETRAIN_CPU_ISA names; null, and a text in *error, when that one is unknown or cannot run here.
const char* isa(const char** error);
}  // namespace cpu

// GPU backends are compiled where nvcc is present (setup.py defines SAGETRAIN_SM80 / SAGETRAIN_SM90 with their sources).
namespace sm80 {
size_t forward_workspace_bytes(const ForwardParams&);
size_t backward_workspace_bytes(const BackwardParams&);
const char* forward(const ForwardParams&);
const char* backward(const BackwardParams&);
}  // namespace sm80
namespace sm90 {
size_t forward_workspace_bytes(const ForwardParams&);
size_t backward_workspace_bytes(const BackwardParams&);
const char* forward(const ForwardParams&);
const char* backward(const BackwardParams&);
}  // namespace sm90

}  // namespace sagetrain

// The two calls of the C boundary: the forward is this folder's, the backward that of sm80.
#include "../sm80/call.cuh"
#include "fwd/layout.cuh"

namespace sagetrain::sm90 {

size_t forward_workspace_bytes(const ForwardParams& p) { return sm80::forward_arguments<ForwardKeys>(p, nullptr).second; }
size_t backward_workspace_bytes(const BackwardParams& p) { return sm80::backward_workspace_bytes(p); }

const char* forward(const ForwardParams& p) {
  if (const char* refusal = sm80::too_large(p.shape)) return refusal;
  const ForwardArgs a = sm80::forward_arguments<ForwardKeys>(p, p.workspace).first;
  const auto stream = static_cast<cudaStream_t>(p.stream);
  sm90::quantise(a, stream);
  sm90::attend(a, stream);
  return sm80::status();
}

const char* backward(const BackwardParams& p) { return sm80::backward(p); }

}  // namespace sagetrain::sm90

// The passes before the forward: those of sm80, for the records of sm90.
#include "../../sm80/quantise.cuh"
#include "layout.cuh"

namespace sagetrain::sm90 {

void quantise(const ForwardArgs& a, cudaStream_t stream) { sm80::run_passes<ForwardKeys>(a, stream); }

}  // namespace sagetrain::sm90

// The passes before the forward, for the records of sm80.
#include "../common/quantise.cuh"
#include "layout.cuh"

namespace sagetrain::sm80 {

void quantise(const ForwardArgs& a, cudaStream_t stream) { run_passes<KeyValueRecord>(a, stream); }

}  // namespace sagetrain::sm80

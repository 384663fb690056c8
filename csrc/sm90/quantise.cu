// The passes before the forward: for the records of sm90.
#include "../common/quantise.cuh"
#include "layout.cuh"

namespace sagetrain::sm90 {

void quantise(const ForwardArgs& a, cudaStream_t stream) { run_passes<KeyValueRecord>(a, stream); }

}  // namespace sagetrain::sm90

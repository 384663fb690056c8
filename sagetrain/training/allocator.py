"""How torch allocates in a run, unless the environment says how it should.

Device memory: segments that grow (`expandable_segments`). Micro-batches ask for pieces of many sizes, and of fixed
segments some 1.5 GiB were lost between them: Llama-1B with 16K tokens did not fit into 24 GB.
Pinned memory: in two steps, eight threads have the pages, and only then the driver registers them. In one step
(cudaHostAlloc) the driver keeps its lock while it has the pages, and no kernel starts: 7 s for the state of a model of
1.2 billion weights.
Choice: torch's setter, though it is not public: the environment is read when CUDA begins, and some imports begin it.
"""

import os

import torch

SETTINGS = "expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"


def set_allocator() -> None:
    """Have torch allocate by `SETTINGS`, where there is a GPU and neither PYTORCH_ALLOC_CONF nor
    PYTORCH_CUDA_ALLOC_CONF is set."""
    if torch.cuda.is_available() and not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        torch._C._accelerator_setAllocatorSettings(SETTINGS)

"""SageTrain: low-bit attention that trains.

`sagetrain.attention(q, k, v)` is the INT8 attention; it needs torch and nothing else. When transformers and Lightning
are imported, before or after sagetrain, it is registered there too (`attn_implementation="sage_int8"`,
`Trainer(strategy="sage_ddp")`): entries in their tables, no more.
"""

import torch

try:
    import sagetrain._C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"sagetrain's compiled extension does not load ({error}). Build it with the torch that is installed "
        f"(here {torch.__version__}), in the checkout: pip install --no-build-isolation -e . (without -e the "
        "checkout hides what is installed)"
    ) from error

from sagetrain import integrations
from sagetrain.ops.functional import attention, kernel_name

__version__ = "0.1.0"
__all__ = ["attention", "kernel_name"]

integrations.register()

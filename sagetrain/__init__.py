"""SageTrain: low-bit attention that trains.

`sagetrain.attention(q, k, v)` is the INT8 attention; importing the package also registers it with transformers
(`attn_implementation="sage_int8"`) and its strategies with Lightning (`Trainer(strategy="sage_ddp")`). Registering adds
entries to their tables and changes nothing else.
"""

import torch

try:
    import sagetrain._C  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"sagetrain's compiled extension does not load ({error}). Build it with the torch that is installed "
        f"(here {torch.__version__}): pip install --no-build-isolation ."
    ) from error

from sagetrain.attention import functional, hf, ops, reference
from sagetrain.attention.functional import attention, kernel_name
from sagetrain.training import strategies  # noqa: F401  (registers with Lightning)

__version__ = "0.1.0"
__all__ = ["attention", "kernel_name"]

# The function has the name of the package it lives in; both spellings work: sagetrain.attention(q, k, v) and
# sagetrain.attention.reference.exact(q, k, v).
for _module in (functional, hf, ops, reference):
    setattr(attention, _module.__name__.rpartition(".")[2], _module)

hf.register()

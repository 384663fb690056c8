"""The table of schemes: name, ops that compute attention by it, where they run, reference that they are held to.

Method: a scheme is one `Scheme` in `SCHEMES`; its name is what users choose (`scheme=`, transformers'
`attn_implementation=`, a strategy's `attention=`, a recipe's `attention.implementation`). All else (checks,
transformers, strategies, recipes, reports, the test kit) reads this table, so that a second scheme is one call of
`register` in a file of its own.
Choice: what a forward saves for its backward is opaque, a tuple of tensors whose shapes are stated where its ops
become one function (`saved` of library.define): no one else knows them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sagetrain.ops import library

FLOATS = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Scheme:
    """One way to compute attention.

    name: unique, an identifier, no name of transformers' own. label: for people, in reports.
    forward: (q, k, v, scale, is_causal, cu_seqlens_q, cu_seqlens_k, deterministic) -> (o, lse, *saved), differentiable;
        shapes and meaning as `sagetrain.attention`, whose checks have passed (`library.define` makes one of two ops).
    kernel_name: device -> name of the kernel that serves it; RuntimeError that says why when none does.
    preset: name of a kernel -> name of the preset of reference.py that it computes (tests hold it to that).
    dtypes: by device type, what the kernels take. max_head_dim: of q, k, v; a multiple of 8.
    Raises ValueError for a field that could not be used.
    """

    name: str
    label: str
    forward: Callable[..., tuple[Tensor, ...]]
    kernel_name: Callable[[torch.device], str]
    preset: Callable[[str], str]
    dtypes: dict[str, tuple[torch.dtype, ...]]
    max_head_dim: int = 128

    def __post_init__(self) -> None:
        name = self.name
        if not (isinstance(name, str) and name.isidentifier()) or "flash" in name or name.startswith("bf16"):
            raise ValueError(
                f"scheme {name!r}: a name has letters, digits and underscores, no 'flash' (transformers would look for "
                "a package) and no 'bf16' at its start (what schemes are compared with)"
            )
        if not self.dtypes or not all(_is_device(kind) and _are_dtypes(x) for kind, x in self.dtypes.items()):
            raise ValueError(
                f"scheme {name!r}: dtypes is {self.dtypes}, expected a device type of torch's ('cpu', 'cuda', ...) and "
                "a tuple of torch dtypes for each"
            )
        if self.max_head_dim < 8 or self.max_head_dim % 8:
            raise ValueError(f"scheme {name!r}: max_head_dim is {self.max_head_dim}, expected a multiple of 8")


def _is_device(kind: Any) -> bool:
    try:
        return torch.device(kind).type == kind
    except (RuntimeError, TypeError):
        return False


def _are_dtypes(found: Any) -> bool:
    return isinstance(found, tuple) and len(found) > 0 and all(isinstance(x, torch.dtype) for x in found)


SCHEMES: dict[str, Scheme] = {}
_watchers: dict[str, Callable[[Scheme], Any]] = {}


def register(scheme: Scheme) -> Scheme:
    """Adds a scheme, also to the integrations that are loaded. Raises ValueError for a name that is taken."""
    if scheme.name in SCHEMES:
        raise ValueError(f"there is a scheme {scheme.name!r} already")
    for watcher in _watchers.values():
        watcher(scheme)
    SCHEMES[scheme.name] = scheme  # no sooner: one that an integration refuses is none
    return scheme


def watch(watcher: Callable[[Scheme], Any]) -> None:
    """Calls `watcher` with every scheme, those to come too: for integrations that register names elsewhere.

    One a module: that of a module that is loaded anew takes the old one's place.
    """
    for scheme in SCHEMES.values():
        watcher(scheme)
    _watchers[watcher.__module__] = watcher


def get(name: str | None = None) -> Scheme:
    """The scheme of that name (None: the default, INT8). Raises ValueError with the choices."""
    name = DEFAULT if name is None else name
    if not isinstance(name, str) or name not in SCHEMES:
        raise ValueError(f"unknown scheme {name!r}: choose from {', '.join(SCHEMES)}")
    return SCHEMES[name]


def named_in(text: str) -> Iterator[Scheme]:
    """The schemes among comma-separated names of attentions."""
    return (SCHEMES[name] for name in text.split(", ") if name in SCHEMES)


def _int8_kernel(device: torch.device) -> str:
    if device.type == "cpu":
        return torch.ops.sagetrain.kernel_name(-1)
    if device.type != "cuda":
        raise RuntimeError(
            f"sagetrain: no INT8 attention kernel for device '{device}': only cpu and cuda are supported"
        )
    if not torch.cuda.is_available():
        raise RuntimeError("sagetrain: torch sees no CUDA device here")
    return torch.ops.sagetrain.kernel_name(torch.cuda.current_device() if device.index is None else device.index)


INT8 = register(
    Scheme(
        name="sage_int8",
        label="INT8",
        forward=library.int8_forward,
        kernel_name=_int8_kernel,
        preset=lambda kernel: f"sage_{kernel}" if kernel in ("sm80", "sm90") else "sage",
        dtypes={"cpu": (*FLOATS, torch.float32), "cuda": FLOATS},
    )
)
DEFAULT = INT8.name

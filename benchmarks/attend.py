"""A function as an attention of transformers, for the benchmarks that compare gradients of a whole model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface


def register(name: str, attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    """Makes `attend` the `attn_implementation` of that name, for models in FP32 and rows without padding.

    attend(layer, q [B, Hq, T, D], k, v [B, Hkv, T, D], scale) -> o [B, Hq, T, D], causal; layer: its number. It gets
    its inputs in `dtype`, and its output is rounded to that.
    """

    def attention(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        if mask is not None:
            raise RuntimeError("a mask tensor: this would measure something else")
        o = attend(module.layer_idx, *(x.to(dtype) for x in (q, k, v)), scaling)
        return o.to(dtype).float().transpose(1, 2), None

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda *args, **kwargs: None)

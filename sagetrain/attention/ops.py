"""The two torch.library ops: shapes for the compiler, the derivative for autograd.

The ops themselves (`sagetrain::attention_forward`, `sagetrain::attention_backward`) are defined in csrc/bind.cpp; its
schema is their documentation. Here they get fake kernels and autograd, which is what makes them pass `opcheck` and
work under `torch.compile(fullgraph=True)`, activation checkpointing and CUDA graphs.

Saved for the backward: Q8, K8 (1 byte an element), their scales and LSE (4 bytes a token), V and O (16 bits).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import sagetrain._C  # noqa: F401  (defines the ops)

attention_forward = torch.ops.sagetrain.attention_forward.default
attention_backward = torch.ops.sagetrain.attention_backward.default


@torch.library.register_fake("sagetrain::attention_forward")
def _(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    b, hq, tq, d = q.shape
    hkv, tk = k.shape[1:3]
    dp = 64 if d <= 64 else 128
    sequences = b if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    f32 = {"dtype": torch.float32}
    return (
        torch.empty_like(q),
        q.new_empty(b, hq, tq, **f32),
        q.new_empty(b, hq, tq, dp, dtype=torch.int8),
        q.new_empty(b, hq, tq, **f32),
        q.new_empty(b, hkv, tk, dp, dtype=torch.int8),
        q.new_empty(b, hkv, tk, **f32),
        q.new_empty(b, hq, tq, **f32),
        q.new_empty(2, sequences, hkv, d, **f32),
    )


@torch.library.register_fake("sagetrain::attention_backward")
def _(d_o: Tensor, d_lse: Tensor | None, v: Tensor, o: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(o), torch.empty_like(v), torch.empty_like(v)


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    _, _, v, scale, is_causal, cu_seqlens_q, cu_seqlens_k, deterministic = inputs
    o, _, *saved = output
    ctx.save_for_backward(v, o, *saved, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.options = scale, is_causal, deterministic


def _backward(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    v, o, q8, q_scale, k8, k_scale, lse_smooth, kv_mean, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    scale, is_causal, deterministic = ctx.options
    if d_o is None and d_lse is None:
        return (None,) * 8
    d_o = torch.zeros_like(o) if d_o is None else d_o
    d_q, d_k, d_v = attention_backward(
        d_o, d_lse, v, o, q8, q_scale, k8, k_scale, lse_smooth, kv_mean,
        scale, is_causal, cu_seqlens_q, cu_seqlens_k, deterministic,
    )  # fmt: skip
    return d_q, d_k, d_v, *(None,) * 5


def _no_double_backward(ctx: Any, *_: Any) -> tuple[None, ...]:
    raise NotImplementedError(
        "sagetrain.attention has no double backward (create_graph=True through it): use attention='bf16' / "
        "torch's scaled_dot_product_attention(MATH) where second derivatives are needed"
    )


torch.library.register_autograd("sagetrain::attention_forward", _backward, setup_context=_setup_context)
torch.library.register_autograd("sagetrain::attention_backward", _no_double_backward)

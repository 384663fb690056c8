"""FlashAttention-4 as two ops of torch.library, so that compiled layers hold it whole and checkpointing can keep it.

Method: each op calls one function of the package flash-attn-4, forward or backward; here are the shapes for the
compiler and the derivative for autograd. The ops are there without the package, which is imported when they run.
Choice: what the package offers to users is no op: every compiled layer would break at it, and a checkpoint, which keeps
results by their op, would compute it again. The two functions below that are private to the package, so another
version may call them otherwise: `lacks` finds that out before a run does.
Cost: the log-sum-exp is written where nobody differentiates too, 4 bytes for each token and head.

In all of this q is [B, T, H, D] or, with cu_seqlens (int32 [N + 1]), [tokens, H, D]; k and v likewise, with heads that
divide H; v may have another D.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor

KNOWN = "4.0.0b36"  # a version whose functions are called as here


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, softmax_scale: float, causal: bool, deterministic: bool,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
) -> Tensor:  # fmt: skip
    """flash_attn_func and, with cu_seqlens and max_seqlen, flash_attn_varlen_func, as FlashAttention-3 has them."""
    lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return forward(q, k, v, *lengths, softmax_scale, causal, deterministic)[0]


def lacks() -> str:
    """What keeps the package from being called as it is here; "" when nothing does. Raises where it does not load."""
    interface = importlib.import_module("flash_attn.cute.interface")
    options = _options(*(None,) * 6)
    try:
        inspect.signature(interface._flash_attn_fwd).bind(*(None,) * 3, **options, return_lse=True)
        inspect.signature(interface._flash_attn_bwd).bind(
            *(None,) * 6, **options, deterministic=True, dq=None, dk=None, dv=None
        )
    except (AttributeError, TypeError) as error:
        return f"a flash-attn-4 that is called as {KNOWN} is ({error})"
    return ""


def _options(
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None,
    scale: float, is_causal: bool,
) -> dict[str, Any]:  # fmt: skip
    lengths = {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    documents = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
    return documents | lengths | {"softmax_scale": scale, "causal": is_causal}


@torch.library.custom_op("sagetrain::fa4_forward", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None, max_seqlen_k: int | None, scale: float, is_causal: bool, deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out, like q with the D of v; lse, float32 [B, H, T] or [H, tokens]). `deterministic` is for the backward."""
    from flash_attn.cute.interface import _flash_attn_fwd

    options = _options(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, is_causal)
    out, lse, *_ = _flash_attn_fwd(q, k, v, **options, return_lse=True)
    return out, lse


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    *rows, tokens, heads, _ = q.shape
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(*rows, heads, tokens, dtype=torch.float32)


@torch.library.custom_op("sagetrain::fa4_backward", mutates_args=())
def backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None, max_seqlen_k: int | None,
    scale: float, is_causal: bool, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(d_q, d_k, d_v), contiguous."""
    from flash_attn.cute.interface import _flash_attn_bwd

    options = _options(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, scale, is_causal)
    d_q, d_k, d_v = _contiguous_like(q, k, v)
    _flash_attn_bwd(q, k, v, out, d_out, lse, **options, deterministic=deterministic, dq=d_q, dk=d_k, dv=d_v)
    return d_q, d_k, d_v


@backward.register_fake
def _(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _contiguous_like(q, k, v)


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Empty tensors, contiguous whatever the strides are, so that what a compiler foresees is what comes."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, cu_seqlens_q, cu_seqlens_k)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _derivative(ctx: Any, d_out: Tensor | None, d_lse: None) -> tuple[Tensor | None, ...]:
    gradients = (None,) * 3 if d_out is None else backward(d_out, *ctx.saved_tensors, *ctx.options)
    return *gradients, *(None,) * 7


forward.register_autograd(_derivative, setup_context=_keep)

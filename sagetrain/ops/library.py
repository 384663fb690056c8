"""torch.library ops: shapes for the compiler, the derivative for autograd.

Method: a scheme is two ops, a forward and a backward, of one signature each. `define` gives them fake kernels and
autograd, which is what makes them pass `opcheck` and work under `torch.compile(fullgraph=True)`, activation
checkpointing and CUDA graphs. What the forward saves is the scheme's own affair: opaque tensors, whose shapes its
`saved` states. The INT8 ops (`sagetrain::attention_forward`, `sagetrain::attention_backward`) are defined in
csrc/bind.cpp; its schema is their documentation. Shapes are in torch.compile's caches on the disks of users, which do
not ask with which version of an op they were made: other shapes want an op of another name.

Saved by INT8 for the backward: Q8, K8 (1 byte an element), their scales and LSE (4 bytes a token), K's mean and
what V is centred by, V and O (16 bits).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import sagetrain._C  # noqa: F401  (defines the ops)

Op = Callable[..., tuple[Tensor, ...]]


def define(name: str, saved: Callable[..., tuple[Tensor, ...]]) -> Op:
    """Makes one differentiable function of the ops `NAME_forward` and `NAME_backward` (name: "namespace::op").

    NAME_forward(q, k, v, scale, is_causal, cu_seqlens_q, cu_seqlens_k, deterministic) -> (o, lse, *saved)
    NAME_backward(d_o, d_lse, v, o, *saved, scale, is_causal, cu_seqlens_q, cu_seqlens_k, deterministic)
        -> (d_q, d_k, d_v)
    saved(q, k, cu_seqlens_q): empty tensors of the shapes and types that the forward saves beyond v and o. The first
        call that will have a backward raises ValueError where it saves others.
    """
    namespace, op = name.split("::")
    forward = getattr(getattr(torch.ops, namespace), f"{op}_forward").default
    backward = getattr(getattr(torch.ops, namespace), f"{op}_backward").default

    @torch.library.register_fake(f"{name}_forward")
    def _(
        q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool,
        cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, deterministic: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32), *saved(q, k, cu_seqlens_q)

    @torch.library.register_fake(f"{name}_backward")
    def _(d_o: Tensor, d_lse: Tensor | None, v: Tensor, o: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.empty_like(o), torch.empty_like(v), torch.empty_like(v)

    def derivative(ctx: Any, d_o: Tensor | None, d_lse: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        v, o, *kept, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        scale, is_causal, deterministic = ctx.options
        if d_o is None and d_lse is None:
            return (None,) * 8
        d_o = torch.zeros_like(o) if d_o is None else d_o
        gradients = backward(d_o, d_lse, v, o, *kept, scale, is_causal, cu_seqlens_q, cu_seqlens_k, deterministic)
        return *gradients, *(None,) * 5

    stated_right = False

    def keep(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        nonlocal stated_right
        q, k, v, scale, is_causal, cu_seqlens_q, cu_seqlens_k, deterministic = inputs
        o, _, *kept = output
        if not stated_right and type(o) is Tensor and not o.is_meta:  # else they are those that `saved` made
            found, stated = (
                [(list(x.shape), x.dtype) for x in tensors] for tensors in (kept, saved(q, k, cu_seqlens_q))
            )
            if found != stated:
                raise ValueError(f"{name}_forward saves {found} beyond v and o, but `saved` says {stated}")
            stated_right = True
        ctx.save_for_backward(v, o, *kept, cu_seqlens_q, cu_seqlens_k)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.options = scale, is_causal, deterministic

    torch.library.register_autograd(f"{name}_forward", derivative, setup_context=keep)
    torch.library.register_autograd(f"{name}_backward", _no_double_backward)
    return forward


def _no_double_backward(ctx: Any, *_: Any) -> tuple[None, ...]:
    raise NotImplementedError(
        "sagetrain.attention has no double backward (create_graph=True through it): use attention='bf16' / "
        "torch's scaled_dot_product_attention(MATH) where second derivatives are needed"
    )


def _int8_saved(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None) -> tuple[Tensor, ...]:
    """Q8, its scales, K8, its scales, LSE of the smoothed scores, K's mean and what the backward centres V by."""
    (b, hq, tq, d), (hkv, tk) = q.shape, k.shape[1:3]
    width = 64 if d <= 64 else 128
    sequences = b if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    f32 = {"dtype": torch.float32}
    return (
        q.new_empty(b, hq, tq, width, dtype=torch.int8),
        q.new_empty(b, hq, tq, **f32),
        q.new_empty(b, hkv, tk, width, dtype=torch.int8),
        q.new_empty(b, hkv, tk, **f32),
        q.new_empty(b, hq, tq, **f32),
        q.new_empty(2, sequences, hkv, d, **f32),
    )


int8_forward = define("sagetrain::attention", _int8_saved)

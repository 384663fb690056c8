"""What users call: `attention(q, k, v)`, checked and with its defaults filled in, then one op.

Every refusal says what was asked, what is supported and what to do. Nothing falls back to another kernel by itself.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from sagetrain.ops import schemes


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False, deterministic: bool = False, scheme: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """softmax(scale * q kᵀ) v in INT8, with gradients for q, k and v in INT8 (SageBwd; arXiv 2505.11594, 2603.02170).

    Six of the seven matmuls run in INT8; dO·Vᵀ keeps the dtype of v. Under `torch.autocast` the inputs are cast to the
    autocast dtype, as scaled_dot_product_attention does.

    Args:
        q: `[B, Hq, Tq, D]` bfloat16 or float16 (float32 on the CPU); any strides with a contiguous last dimension.
        k, v: `[B, Hkv, Tk, D]`, dtype and device of q; Hq a multiple of Hkv (grouped-query attention, not expanded).
            D is a multiple of 8, at most 128. v may have another D (multi-head latent attention): the narrower side is
            padded with zeros, which costs what the wider D costs.
        is_causal: query i sees keys j <= i + Tk - Tq (aligned bottom-right), within its sequence.
        scale: factor on q·k, not negative; 1/sqrt(D) when None.
        cu_seqlens_q, cu_seqlens_k: int32 `[N + 1]`, first token of each packed sequence (B = 1), non-decreasing. Empty
            sequences are fine; tokens before the first and after the last edge belong to no sequence.
        return_lse: also return the log-sum-exp of scale * q kᵀ (differentiable).
        deterministic: same bits for the same call in the backward too, as with `torch.use_deterministic_algorithms`.
            The forward and the CPU kernel always do so; on a GPU the backward is slower for it (docs/sm80.md).
        scheme: what computes it, a name of `sagetrain.ops.schemes`; None is INT8, what all of the above describes.

    Returns:
        o `[B, Hq, Tq, D]` (D of v) in the dtype and memory order of q; with `return_lse` also lse `[B, Hq, Tq]`,
        float32, natural logarithm. Rows that see no key: o = 0, lse = -inf, zero gradients. NaN or Inf in an input
        makes the outputs that depend on it NaN (at most the whole head of that sequence); finite input never does.

    Errors:
        TypeError, ValueError for arguments that do not fit together; NotImplementedError for what no kernel here can do
        (among it double backward); RuntimeError for cu_seqlens whose values are out of order or range (on a GPU the
        program stops with a message, as at a device assertion).
    """
    if not torch.compiler.is_compiling() and _sdpa_is_replaced():
        raise NotImplementedError(  # it has replaced SDPA; ours would attend to the local shard alone, without a word
            "torch context_parallel does not see the INT8 attention op: each rank would attend to its own shard of the "
            "sequence only. Leave the context_parallel block, or use SDPA (attention='sdpa') for these runs."
        )
    chosen, device = schemes.get(scheme), q.device.type
    if device in chosen.dtypes and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        q, k, v = (x.to(dtype) if x.is_floating_point() else x for x in (q, k, v))
    _check(chosen, q, k, v, cu_seqlens_q, cu_seqlens_k)
    if scale is not None and not scale >= 0:  # the GPU kernels look for a row's largest score before they scale
        raise ValueError(f"scale is {scale}: it must not be negative; negate q instead")
    scale, width = q.shape[-1] ** -0.5 if scale is None else scale, v.shape[-1]
    if width != q.shape[-1]:
        q, k, v = (pad(x, (0, max(q.shape[-1], width) - x.shape[-1])) for x in (q, k, v))
    o, lse, *_ = chosen.forward(
        q, k, v, scale, is_causal, cu_seqlens_q, cu_seqlens_k,
        deterministic or torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    o = o[..., :width] if width != o.shape[-1] else o
    return (o, lse) if return_lse else o


def kernel_name(device: torch.device | str | int = "cpu", scheme: str | None = None) -> str:
    """The kernel that serves a device, e.g. "cpu/avx512_vnni" or "sm90". RuntimeError that says why when none does."""
    return schemes.get(scheme).kernel_name(torch.device(device))


def _check(
    scheme: schemes.Scheme, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {_shape(x)}: expected 4 dimensions [B, H, T, D]")
        if x.device != q.device:
            raise ValueError(f"q is on {q.device} but {name} is on {x.device}: move them to one device")
        if x.dtype != q.dtype:
            raise TypeError(f"q is {q.dtype} but {name} is {x.dtype}: cast them to one dtype")
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(
                f"the last dimension of {name} is not contiguous (strides {x.stride()}): call .contiguous()"
            )
    kind = q.device.type
    if kind not in (*scheme.dtypes, "meta"):
        served = " and ".join(scheme.dtypes)
        raise NotImplementedError(f"q is on {q.device}: only {served} have {scheme.label} attention kernels")
    allowed = dict.fromkeys(x for on, types in scheme.dtypes.items() if kind in (on, "meta") for x in types)
    if q.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise TypeError(f"q is {q.dtype}: the {kind} kernels take {names}; cast, or run under torch.autocast")
    b, hq, _, d = q.shape
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k is {_shape(k)} but v is {_shape(v)}: they must have one shape [B, Hkv, Tk], D may differ")
    if k.shape[0] != b or k.shape[3] != d:
        raise ValueError(f"q is {_shape(q)} but k is {_shape(k)}: batch size and head dimension must be equal")
    if k.shape[1] == 0 or hq % k.shape[1]:
        raise ValueError(f"{hq} query heads are not a multiple of {k.shape[1]} key/value heads")
    d = max(d, v.shape[3])
    if d % 8 or not 8 <= d <= scheme.max_head_dim:
        raise NotImplementedError(
            f"head dimension {d}: must be a multiple of 8, at most {scheme.max_head_dim}; pad it, or use SDPA"
        )
    if (cu_seqlens_q is None) != (cu_seqlens_k is None):
        raise ValueError("cu_seqlens_q and cu_seqlens_k go together: pass both or neither")
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return
    if b != 1:
        raise ValueError(f"packed sequences need B = 1, got B = {b}: flatten the batch into the token dimension")
    for name, edges in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if edges.ndim != 1 or edges.shape[0] < 1 or edges.dtype != torch.int32 or edges.device != q.device:
            raise ValueError(
                f"{name} is {edges.dtype} {_shape(edges)} on {edges.device}: expected int32 [N + 1] on {q.device}"
            )
        if not edges.is_contiguous():
            raise ValueError(f"{name} is not contiguous: call .contiguous()")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_q {_shape(cu_seqlens_q)} and cu_seqlens_k {_shape(cu_seqlens_k)} differ in length"
        )


def _sdpa_is_replaced() -> bool:
    """True inside torch's `context_parallel`, which puts a function of its own in place of SDPA."""
    return (torch.nn.functional.scaled_dot_product_attention.__module__ or "").startswith("torch.distributed.tensor")


def _shape(x: Tensor) -> str:
    return str(list(x.shape))

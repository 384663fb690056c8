"""The interface of flash-attn-4 in plain torch, with the demands of the real one, for machines that cannot have it."""

from collections.abc import Iterator

import torch
from torch import Tensor


class Flash4:
    """flash_attn.cute.interface, FP64 inside. `calls`: what was called, and whether deterministic was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, bool]] = []

    def _flash_attn_fwd(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        softmax_scale=None, causal=False, return_lse=False,
    ):  # fmt: skip
        self.calls.append(("forward", False))
        _demand((q, k, v), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
        out, lse = [], []
        for _, (q_, k_, v_) in _parts(q, k, v, cu_seqlens_q, cu_seqlens_k):
            scores = _scores(q_, k_, softmax_scale, causal)
            lse.append(scores.logsumexp(-1))
            out.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_))
        out, lse = torch.cat(out).to(q.dtype), torch.cat(lse, dim=1).float()
        if cu_seqlens_q is None:
            out, lse = out.unflatten(0, q.shape[:2]), lse.unflatten(1, q.shape[:2]).transpose(0, 1).contiguous()
        return out, lse if return_lse else None, None, None, None

    def _flash_attn_bwd(
        self, q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, cu_seqlens_q=None,
        cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, deterministic=False, dq=None, dk=None, dv=None,
    ):  # fmt: skip
        self.calls.append(("backward", deterministic))
        _demand((q, k, v, dq, dk, dv), (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k))
        assert (dq.shape, dk.shape, dv.shape) == (q.shape, k.shape, v.shape)
        assert out.shape == dout.shape == (*q.shape[:-1], v.shape[-1]) and out.dtype == dout.dtype == q.dtype
        *rows, tokens, heads, _ = q.shape
        assert lse.shape == (*rows, heads, tokens) and lse.dtype == torch.float32
        if rows:
            out, dout, lse = out.flatten(0, 1), dout.flatten(0, 1), lse.transpose(0, 1).flatten(1)
        gradients = [[], [], []]
        for queries, (q_, k_, v_) in _parts(q, k, v, cu_seqlens_q, cu_seqlens_k):
            o, d_o = out[queries].double(), dout[queries].double()
            probabilities = (_scores(q_, k_, softmax_scale, causal) - lse[:, queries, None]).exp()
            d_p = torch.einsum("qhd,khd->hqk", d_o, v_) - (o * d_o).sum(-1).T[..., None]
            d_s = probabilities * d_p * softmax_scale
            gradients[0].append(torch.einsum("hqk,khd->qhd", d_s, k_))
            gradients[1].append(torch.einsum("hqk,qhd->khd", d_s, q_))
            gradients[2].append(torch.einsum("hqk,qhd->khd", probabilities, d_o))
        for target, parts in zip((dq, dk, dv), gradients, strict=True):
            groups = heads // target.shape[-2]
            target.copy_(torch.cat(parts).unflatten(1, (-1, groups)).sum(2).view(target.shape))
        return dq, dk, dv


def _demand(tensors: tuple[Tensor, ...], cu: tuple[Tensor | None, ...], longest: tuple[int | None, ...]) -> None:
    assert all(x.dtype in (torch.bfloat16, torch.float16) and x.dtype == tensors[0].dtype for x in tensors)
    assert all(x.stride(-1) == 1 and x.ndim == (4 if cu[0] is None else 3) for x in tensors)
    for x, starts, most in zip(tensors, cu, longest, strict=False):
        if starts is not None:
            assert starts.dtype == torch.int32 and starts.stride(0) == 1 and type(most) is int
            assert (starts[0], starts[-1]) == (0, len(x)) and starts.diff().max() <= most


def _parts(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, cu_k: Tensor | None
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Where the queries of each document are, and its q, k, v [tokens, Hq, D]."""
    if cu_q is None:
        cu_q, cu_k = (torch.arange(len(x) + 1) * x.shape[1] for x in (q, k))
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        yield slice(a, b), [x.double() for x in (q[a:b], k[c:d], v[c:d])]


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    ahead = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1 + len(k) - len(q))
    return scores.masked_fill(ahead, -torch.inf) if causal else scores

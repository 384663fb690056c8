"""The scheme that was published, SageBwd, as Triton kernels: preset `paper` of sagetrain/ops/reference.py on a GPU.

Method: `forward` and `backward` compute what `paper_forward` and `paper_backward` do, rounding at the same places with
the same scales: of Q and dO one for 128 tokens, of K (without its mean) and V one for 64, of P in the forward one for
each row of 64 keys, of P and dS in the backward one for 128 queries x 64 keys, all to the nearest integer. Six products
are `tl.dot` of int8 with int32 sums, each tile's with its scales then added in FP32; dO V^T has 16-bit operands.
    quantise   x -> int8, in both orders [T, D] and [D, T], for Hopper's int8 products take operands only along what is
               summed; and what else needs each row once: q . mean(k), dO . O
    forward    a program for 128 queries, over the keys that they see
    keys       dK, dV: a program for 64 keys of a KV head, over all queries of the heads that share it
    queries    dQ: a program for 128 queries, over the keys; S, P and dS once more, so that nothing is added atomically
Choice: short rather than quick. Lengths are padded to 128 with zeros, so int8 tiles need no mask; what is beyond the
end has P = 0 (an LSE of infinity for queries, the mask for keys). D is 64 or 128: others are refused.
Cost: seven products in the backward where FlashAttention has five, a mask on every tile, two maxima over a whole tile
each step. Differs from the reference by the order of FP32 sums, and by the nearest integer where a product's last bit
decides that. NaN or Inf in q, k or v makes the outputs of its tile NaN, in dO its dV.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sagetrain.ops.reference import AMAX_MAX, AMAX_MIN, LOG2E, PAPER

LEAST, MOST = tl.constexpr(AMAX_MIN), tl.constexpr(AMAX_MAX)
LN2 = tl.constexpr(1 / LOG2E)
PADDED = 128  # what lengths are a multiple of, once quantised: of both tiles
LAUNCH = {  # by D. Shared memory a block on 9.0: 32, 93 and 72 KB, or 64, 185 and 112 KB
    64: {"forward": (8, 3), "keys": (4, 2), "queries": (8, 3)},
    128: {"forward": (8, 3), "keys": (8, 2), "queries": (8, 2)},
}


@triton.jit
def nearest(x):
    """The integers nearest to |x| <= 127, halves to the even one: 1.5 * 2^23 more leaves no digit behind the point, and
    then the low byte is the integer."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def tile_amax(x):
    return tl.max(tl.max(tl.abs(x), 1), 0)


@triton.jit
def visible(rows, columns, tk, offset, CAUSAL: tl.constexpr):
    return columns <= rows + offset if CAUSAL else (columns < tk) & (rows >= 0)


@triton.jit
def quantise_kernel(
    x, y, x8, x8t, scales, dots, xb, xh, xt, yb, yh, yt, heads, tokens, padded,
    HOW: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // heads, bh % heads
    rows, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    inside = (rows < tokens)[:, None]
    value = tl.load(x + b * xb + h * xh + rows[:, None] * xt + d[None, :], inside, other=0.0).to(tl.float32)
    if HOW != "alone":
        other = tl.load(y + b * yb + h * yh + rows[:, None] * yt + d[None, :], inside, other=0.0).to(tl.float32)
        if HOW == "minus":
            value -= other
        else:
            tl.store(dots + bh * padded + rows, tl.sum(value * other, 1))
    amax = tile_amax(tl.where(value == value, value, float("inf")))
    scale = tl.where(amax < float("inf"), tl.minimum(tl.maximum(amax, LEAST), MOST), float("nan")) / 127.0
    tl.store(scales + bh * tl.num_programs(0) + tl.program_id(0), scale)
    whole = nearest(tl.minimum(tl.maximum(tl.div_rn(value, tl.zeros_like(value) + scale), -127.0), 127.0))
    tl.store(x8 + (bh * padded + rows)[:, None] * D + d[None, :], whole)
    tl.store(x8t + (bh * D + d)[None, :] * padded + rows[:, None], whole)


@triton.jit
def forward_kernel(
    q8, k8, v8t, q_scales, k_scales, v_scales, shifts, o, lse, lse2, ob, oh, ot, heads, tq, tk, q_padded, k_padded,
    factor, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)  # those that see most first
    rows, columns, d = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, D)
    kv, offset = bh // GROUP, tk - tq
    q = tl.load(q8 + (bh * q_padded + rows)[:, None] * D + d[None, :])
    q_scale = tl.load(q_scales + bh * tl.num_programs(0) + tile) * factor
    k_base, v_base = k8 + kv * k_padded * D, v8t + kv * D * k_padded
    k_scales, v_scales = k_scales + kv * (k_padded // KEYS), v_scales + kv * (k_padded // KEYS)
    m = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    acc = tl.zeros([QUERIES, D], tl.float32)
    end = tl.minimum(tk, (tile + 1) * QUERIES + offset) if CAUSAL else tk
    for start in range(0, end, KEYS):
        keys = start + columns
        k = tl.load(k_base + keys[None, :] * D + d[:, None])
        s = tl.dot(q, k).to(tl.float32) * (q_scale * tl.load(k_scales + start // KEYS))
        s = tl.where(visible(rows[:, None], keys[None, :], tk, offset, CAUSAL), s, -float("inf"))
        m_tile = tl.max(s, 1)
        m_new = tl.maximum(m, m_tile)
        finite = tl.where(m_new == -float("inf"), 0.0, m_new)
        before, now = tl.exp2(m - finite), tl.exp2(m_tile - finite)
        p = tl.exp2(s - tl.where(m_tile == -float("inf"), 0.0, m_tile)[:, None])
        v = tl.load(v_base + d[None, :] * k_padded + keys[:, None])
        pv = tl.dot(nearest(p * 127.0), v).to(tl.float32)
        acc = acc * before[:, None] + pv * (now * (tl.load(v_scales + start // KEYS) / 127.0))[:, None]
        total = total * before + now * tl.sum(p, 1)
        m = m_new
    inside = rows < tq
    log = m + tl.log2(total)
    shift = tl.load(shifts + bh * q_padded + rows) * scale
    tl.store(lse2 + bh * tq + rows, log, inside)
    tl.store(lse + bh * tq + rows, log * LN2 + shift, inside)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    o_base = o + (bh // heads) * ob + (bh % heads) * oh
    tl.store(o_base + rows[:, None] * ot + d[None, :], acc.to(o.dtype.element_ty), inside[:, None])


@triton.jit
def keys_kernel(
    q8, q8t, k8, do8t, v, d_o, q_scales, k_scales, do_scales, lse2, deltas, d_k, d_v, vb, vh, vt, ob, oh, ot,
    gb, gh, gt, heads, tq, tk, q_padded, k_padded, factor, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """All tiles transposed, [keys, queries]: P^T and dS^T are operands as they are."""
    tile, kv = tl.program_id(0), tl.program_id(1).to(tl.int64)
    keys, rows, d = tile * KEYS + tl.arange(0, KEYS), tl.arange(0, QUERIES), tl.arange(0, D)
    kv_heads, offset = heads // GROUP, tk - tq
    b, h, inside = kv // kv_heads, kv % kv_heads, (keys < tk)[:, None]
    k = tl.load(k8 + (kv * k_padded + keys)[:, None] * D + d[None, :])
    k_scale = tl.load(k_scales + kv * (k_padded // KEYS) + tile) * factor
    v_tile = tl.load(v + b * vb + h * vh + keys[:, None] * vt + d[None, :], inside, other=0.0)
    dk_acc, dv_acc = tl.zeros([KEYS, D], tl.float32), tl.zeros([KEYS, D], tl.float32)
    first = tl.maximum(tile * KEYS - offset, 0) // QUERIES * QUERIES if CAUSAL else 0
    for bh in range(kv * GROUP, (kv + 1) * GROUP):
        do_base = d_o + b * ob + (bh % heads) * oh
        scale_base = bh * (q_padded // QUERIES)
        for start in range(first, tq, QUERIES):
            queries = start + rows
            real = queries < tq
            q = tl.load(q8 + (bh * q_padded + queries)[None, :] * D + d[:, None])
            q_scale = tl.load(q_scales + scale_base + start // QUERIES)
            s = tl.dot(k, q).to(tl.float32) * (k_scale * q_scale)
            log = tl.load(lse2 + bh * tq + queries, real, other=float("inf"))
            p = tl.exp2(s - log[None, :])
            p = tl.where(visible(queries[None, :], keys[:, None], tk, offset, CAUSAL), p, 0.0)
            do_tile = tl.load(do_base + queries[None, :] * ot + d[:, None], real[None, :], other=0.0)
            d_s = p * (tl.dot(v_tile, do_tile) - tl.load(deltas + bh * q_padded + queries)[None, :])
            p_amax, ds_amax = tl.maximum(tile_amax(p), LEAST), tl.maximum(tile_amax(d_s), LEAST)
            do_rows = tl.load(do8t + (bh * D + d)[None, :] * q_padded + queries[:, None])
            dv_scale = p_amax / 127.0 * tl.load(do_scales + scale_base + start // QUERIES)
            dv_acc += tl.dot(nearest(p * (127.0 / p_amax)), do_rows).to(tl.float32) * dv_scale
            q_rows = tl.load(q8t + (bh * D + d)[None, :] * q_padded + queries[:, None])
            dk_acc += tl.dot(nearest(d_s * (127.0 / ds_amax)), q_rows).to(tl.float32) * (ds_amax / 127.0 * q_scale)
    place = b * gb + h * gh + keys[:, None] * gt + d[None, :]
    tl.store(d_k + place, (dk_acc * scale).to(d_k.dtype.element_ty), inside)
    tl.store(d_v + place, dv_acc.to(d_v.dtype.element_ty), inside)


@triton.jit
def queries_kernel(
    q8, k8, k8t, v, d_o, q_scales, k_scales, lse2, deltas, d_q, vb, vh, vt, ob, oh, ot, gb, gh, gt,
    heads, tq, tk, q_padded, k_padded, factor, scale, GROUP: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    tile, bh = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1).to(tl.int64)
    rows, columns, d = tile * QUERIES + tl.arange(0, QUERIES), tl.arange(0, KEYS), tl.arange(0, D)
    kv, offset, inside = bh // GROUP, tk - tq, rows < tq
    b, h = bh // heads, bh % heads
    q = tl.load(q8 + (bh * q_padded + rows)[:, None] * D + d[None, :])
    q_scale = tl.load(q_scales + bh * tl.num_programs(0) + tile) * factor
    do_tile = tl.load(d_o + b * ob + h * oh + rows[:, None] * ot + d[None, :], inside[:, None], other=0.0)
    log = tl.load(lse2 + bh * tq + rows, inside, other=float("inf"))[:, None]
    delta = tl.load(deltas + bh * q_padded + rows)[:, None]
    k_base, kt_base, v_base = k8 + kv * k_padded * D, k8t + kv * D * k_padded, v + b * vb + h // GROUP * vh
    k_scales += kv * (k_padded // KEYS)
    acc = tl.zeros([QUERIES, D], tl.float32)
    end = tl.minimum(tk, (tile + 1) * QUERIES + offset) if CAUSAL else tk
    for start in range(0, end, KEYS):
        keys = start + columns
        k_scale = tl.load(k_scales + start // KEYS)
        s = tl.dot(q, tl.load(k_base + keys[None, :] * D + d[:, None])).to(tl.float32) * (q_scale * k_scale)
        p = tl.exp2(s - log)
        p = tl.where(visible(rows[:, None], keys[None, :], tk, offset, CAUSAL), p, 0.0)
        v_tile = tl.load(v_base + keys[None, :] * vt + d[:, None], (keys < tk)[None, :], other=0.0)
        d_s = p * (tl.dot(do_tile, v_tile) - delta)
        amax = tl.maximum(tile_amax(d_s), LEAST)
        k_rows = tl.load(kt_base + d[None, :] * k_padded + keys[:, None])
        acc += tl.dot(nearest(d_s * (127.0 / amax)), k_rows).to(tl.float32) * (amax / 127.0 * k_scale)
    place = b * gb + h * gh + rows[:, None] * gt + d[None, :]
    tl.store(d_q + place, (acc * scale).to(d_q.dtype.element_ty), inside[:, None])


def padded(tokens: int) -> int:
    return -(-tokens // PADDED) * PADDED


def quantise(x: Tensor, rows: int, y: Tensor | None = None, how: str = "alone") -> tuple[Tensor, ...]:
    """`x [B, H, T, D]`, or `x - y` (how: "minus"), with one scale for each `rows` of a head: int8 `[B, H, T', D]`,
    the same `[B, H, D, T']`, the scales, and of "dot" the rows' x . y `[B, H, T']`. T' is T padded."""
    b, h, t, d = x.shape
    x8, x8t = (x.new_empty(b, h, *shape, dtype=torch.int8) for shape in ((padded(t), d), (d, padded(t))))
    scales, dots = (x.new_empty(b, h, n, dtype=torch.float32) for n in (padded(t) // rows, padded(t)))
    y = x if y is None else y
    strides = *x.stride()[:3], *y.stride()[:3]
    quantise_kernel[(padded(t) // rows, b * h)](
        x, y, x8, x8t, scales, dots, *strides, h, t, padded(t), HOW=how, D=d, ROWS=rows, num_warps=4
    )
    return x8, x8t, scales, dots


def operands(q: Tensor, k: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Q and K quantised, and K's mean `[B, Hq, 1, D]`."""
    mean = k.mean(-2, keepdim=True, dtype=torch.float32)
    k_parts = quantise(k, PAPER.keys, mean.expand(k.shape), "minus")
    mean = mean.repeat_interleave(q.shape[1] // k.shape[1], 1)
    return quantise(q, PAPER.queries, mean.expand(q.shape), "dot"), k_parts, mean


def options(kernel: str, q: Tensor, k: Tensor, is_causal: bool) -> dict[str, int | bool]:
    group, d = q.shape[1] // k.shape[1], q.shape[3]
    shape = {"GROUP": group, "CAUSAL": is_causal, "D": d, "QUERIES": PAPER.queries, "KEYS": PAPER.keys}
    return shape | dict(zip(("num_warps", "num_stages"), LAUNCH[d][kernel], strict=True))


def check(q: Tensor) -> None:
    if q.shape[-1] not in LAUNCH:
        raise NotImplementedError(f"head dimension {q.shape[-1]}: the Triton kernels of `published` take 64 and 128")


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """o like q, and `[B, Hq, Tq]` its LSE, and that of the smoothed scores to base 2. Shapes of sagetrain.attention."""
    check(q)
    (b, hq, tq, _), tk = q.shape, k.shape[2]
    (q8, _, q_scales, shifts), (k8, _, k_scales, _), _ = operands(q, k)
    _, v8t, v_scales, _ = quantise(v, PAPER.keys)
    o, (lse, lse2) = torch.empty_like(q), (q.new_empty(b, hq, tq, dtype=torch.float32) for _ in range(2))
    forward_kernel[(padded(tq) // PAPER.queries, b * hq)](
        q8, k8, v8t, q_scales, k_scales, v_scales, shifts, o, lse, lse2, *o.stride()[:3], hq, tq, tk,
        padded(tq), padded(tk), scale * LOG2E, scale, **options("forward", q, k, is_causal),
    )  # fmt: skip
    return o, lse, lse2


def backward(
    d_o: Tensor, d_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse2: Tensor, scale: float,
    is_causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q (laid out as o), k and v (both as v), from what `forward` was given and gave."""
    (b, hq, tq, _), (hkv, tk) = q.shape, k.shape[1:3]
    d_o = d_o if d_o.stride(-1) == 1 else d_o.contiguous()
    (q8, q8t, q_scales, _), (k8, k8t, k_scales, _), k_mean = operands(q, k)
    _, do8t, do_scales, deltas = quantise(d_o, PAPER.queries, o, "dot")
    if d_lse is not None:
        d_lse = torch.where(lse2 == -torch.inf, 0.0, d_lse)  # of queries that see no key
        deltas[..., :tq] -= d_lse
    d_q, d_k, d_v = torch.empty_like(o), torch.empty_like(v), torch.empty_like(v)
    shape = hq, tq, tk, padded(tq), padded(tk), scale * LOG2E, scale
    strides = *v.stride()[:3], *d_o.stride()[:3]
    keys_kernel[(padded(tk) // PAPER.keys, b * hkv)](
        q8, q8t, k8, do8t, v, d_o, q_scales, k_scales, do_scales, lse2, deltas, d_k, d_v, *strides,
        *d_k.stride()[:3], *shape, **options("keys", q, k, is_causal),
    )  # fmt: skip
    queries_kernel[(padded(tq) // PAPER.queries, b * hq)](
        q8, k8, k8t, v, d_o, q_scales, k_scales, lse2, deltas, d_q, *strides, *d_q.stride()[:3], *shape,
        **options("queries", q, k, is_causal),
    )  # fmt: skip
    if d_lse is not None:
        d_q = torch.empty_like(d_q).copy_(d_q.float() + scale * d_lse[..., None] * k_mean)
    return d_q, d_k, d_v

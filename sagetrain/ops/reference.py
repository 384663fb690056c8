"""Attention in plain torch: exact, and the INT8 presets, step by step.

Method
    `exact` is softmax(scale * Q K^T) V in FP64 (or any dtype), differentiable by autograd. `paper` follows Algorithms 1
    and 2 of SageBwd (arXiv 2505.11594, 2603.02170). `sage` is what the CPU kernels compute, `sage_sm80` and `sage_sm90`
    what those for GPUs do: the same seven matmuls in the same precisions, but every scale lies along an axis that is
    *not* contracted, Q and K are rotated, and V is smoothed (docs/numerics.md gives the reasons and the measurements).
Choice
    An INT8 matmul of int8 operands with scales is written here as an FP32 matmul of `scale * round(x / scale)`. The
    rounding happens exactly where a kernel rounds; the sums differ from INT32 sums by FP32 rounding only.
Cost
    Dense: O(Tq * Tk) memory per head. A yardstick, not a way to train. Runs on any device.

Shapes: one sequence at a time, `q [H, Tq, D]`, `k, v [H, Tk, D]` with the KV heads already expanded; the public
functions take the shapes of `sagetrain.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from sagetrain.ops.signs import drawn, signs

LOG2E = math.log2(math.e)
AMAX_MIN, AMAX_MAX = 2.0**-100, 2.0**55  # keeps scales and their products finite for any finite input
SMALLEST = 2.0**-126  # rows of dO below it count as zero
SCORES = {"cpu": 2**20, "cuda": 2**27}  # at a time, of several rows of a batch: on a CPU what its caches hold
STEP = 2531  # near 4096 times the golden ratio, whose multiples spread evenly however many; odd, so all 4096 come
# Below this, a hundredth of the largest, numbers of so many levels are dithered: above, the nearest integer has no bias
# to speak of and less noise, which O and dK of channels that move together cannot spare. Halves, where it changes.
DITHERED_BELOW = {127: 1.5, 255: 2.5}
OPERANDS = ("q", "k", "v", "p", "p_dv", "do_dv", "ds_dq", "ds_dk")  # of the INT8 products: p is that of O


@dataclass(frozen=True)
class Preset:
    """Where a preset rounds. `forward_keys`: keys in a forward tile; `queries`, `keys`: rows of a backward tile;
    `shared_key_scales`: of K not one scale per token, but one for 16 of every 64 (`shared_amax`).
    `token_gradients`: dO of dV has one scale per token, which joins P before that is rounded, not one per channel.
    `exact`, `dithered`: of OPERANDS those that are not rounded, and those whose small numbers are rounded up or down by
    a threshold (`thresholds`) instead of to the nearest integer; with `dithers_large` all their numbers."""

    name: str
    forward_keys: int
    queries: int
    keys: int
    rotate: bool = True
    shared_key_scales: bool = False
    token_gradients: bool = False
    exact: frozenset[str] = frozenset()
    dithered: frozenset[str] = frozenset()
    dithers_large: bool = False

    def integers(self, operand: str, x: Tensor, levels: int = 127, content: Tensor | None = None) -> Tensor:
        """The integers, at most `levels`, that stand for `x [.., rows, columns]`, held in floats.

        content: of `thresholds`; without, the first number of a row.
        """
        if operand not in self.exact:
            if operand in self.dithered:
                below = math.inf if self.dithers_large else DITHERED_BELOW[levels]
                added = thresholds(x[..., :1] if content is None else content, x.shape[-1])
                x = x + torch.where(x.abs() < below, added, 0.0)
            x = x.round()
        return x.clamp(-levels, levels)


PAPER = Preset("paper", forward_keys=64, queries=128, keys=64, rotate=False)
SAGE = Preset("sage", forward_keys=32, queries=64, keys=64, dithered=frozenset({"p", "p_dv", "ds_dq", "ds_dk"}))
# `sage` as the kernels sm80 and sm90 compute it
SAGE_SM80 = replace(SAGE, name="sage_sm80", forward_keys=128, dithers_large=True)
SAGE_SM90 = replace(SAGE_SM80, name="sage_sm90", shared_key_scales=True, token_gradients=True)
PRESETS = {preset.name: preset for preset in (PAPER, SAGE, SAGE_SM80, SAGE_SM90)}


# ---------------------------------------------------------------------------------------------- rounding


def tile_amax(x: Tensor, rows: int, columns: int) -> Tensor:
    """Largest value in each `rows x columns` tile of the last two dimensions, spread back over the tile."""
    height, width = x.shape[-2:]
    pad = (0, -width % columns, 0, -height % rows)
    tiles = torch.nn.functional.pad(x, pad, value=-math.inf)
    tiles = tiles.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows)).amax((-3, -1))
    return tiles.repeat_interleave(rows, -2).repeat_interleave(columns, -1)[..., :height, :width]


def shared_amax(x: Tensor) -> Tensor:
    """Largest value `[.., T, 1]` of each token's group in `x [.., T, D]`: of 64, those of the same token / 2 % 4."""
    groups = torch.nn.functional.pad(x.amax(-1), (0, -x.shape[-2] % 64), value=-math.inf).unflatten(-1, (-1, 8, 4, 2))
    return groups.amax((-3, -1), keepdim=True).expand_as(groups).flatten(-4)[..., : x.shape[-2], None]


def int8_scale(x: Tensor, rows: int, columns: int) -> Tensor:
    """Scale that maps each tile's largest magnitude to 127. NaN where the tile is not finite."""
    return scale_of(tile_amax(x.abs(), rows, columns))


def scale_of(amax: Tensor) -> Tensor:
    """Scale that maps these largest magnitudes to 127. NaN where one is not finite."""
    return torch.where(amax.isfinite(), amax.clamp(AMAX_MIN, AMAX_MAX), math.nan) / 127


def thresholds(content: Tensor, columns: int) -> Tensor:
    """What numbers `[.., rows, columns]` are raised by before they are rounded to the nearest integer, -1/2 to 1/2.

    So every number is right on average. Without, most of them are not where they are much smaller than 1, as those of P
    and dS are: they all become 0. Neighbours in a row get thresholds that are spread evenly. A row begins with the last
    12 bits of its float `content [.., rows, 1]`, in which the whole sequence has a say: so the same two tokens at the
    same places are not rounded in the same way each time, and the same call is. Exact: odd multiples of 2^-13.
    """
    column = torch.arange(columns, dtype=torch.int32, device=content.device)
    wrapped = (content.contiguous().view(torch.int32) + column * STEP) << 20
    return wrapped.float() * 2.0**-32 + 2.0**-13


def int8(x: Tensor, scale: Tensor) -> Tensor:
    """The integers -127..127 that stand for `x / scale`, held in floats."""
    return (x / scale).round().clamp(-127, 127)


def round_tiles(x: Tensor, rows: int, columns: int) -> Tensor:
    """`x` after INT8 rounding with one scale per tile."""
    scale = int8_scale(x, rows, columns)
    return int8(x, scale) * scale


def floor_log2(x: Tensor) -> Tensor:
    """Exponent of the positive numbers `x`, in floats; NaN and Inf stay."""
    return torch.where(x.isfinite(), torch.frexp(x).exponent - 1.0, x)


def centre_of(v: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    """What `v [.., T, D]` is centred by in the backward, in `dtype`: its mean `[.., 1, D]`, or what is nearest to it of
    the numbers of which all values are 1/2 to 2, for then every difference is exact (Sterbenz); 0 where there is none.
    These are (|mean| + amax) / 2 to 2 (|mean| - amax), there are some up to amax = 0.6 |mean|, and rounding wants a
    margin. A rounding error that values have in common is no noise."""
    size, amax = mean.abs(), (v - mean).abs().amax(-2, keepdim=True)
    centre = torch.minimum(size, 1.95 * (size - amax)).clamp(max=torch.finfo(dtype).max)
    return torch.where(amax <= 0.58 * size, (mean.sign() * centre).to(dtype).to(v.dtype), 0.0)


def hadamard(size: int, like: Tensor) -> Tensor:
    """Sylvester's Hadamard matrix: entries +-1, symmetric, H H = size * I."""
    h = like.new_ones(1, 1)
    while len(h) < size:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def padded_head_dim(head_dim: int) -> int:
    """64 or 128: the tile that holds `head_dim` channels."""
    return 64 if head_dim <= 64 else 128


def rotate(x: Tensor, signs: Tensor) -> Tensor:
    """`x [.., D] -> (x / Dp) diag(signs [.., Dp]) H [.., Dp]`: spreads what a few channels have, and what many have in
    common, over all of them; undone by `unrotate`."""
    size = signs.shape[-1]
    padded = torch.nn.functional.pad(x / size, (0, size - x.shape[-1]))
    return (padded * signs) @ hadamard(size, x)


def unrotate(x: Tensor, signs: Tensor, head_dim: int) -> Tensor:
    return ((x @ hadamard(x.shape[-1], x)) * signs)[..., :head_dim]


def signs_of(k_mean: Tensor) -> Tensor:
    """The signs of each head's channels, `[H, 1, Dp]`: drawn by its mean key `[H, 1, D]`."""
    return signs(padded_head_dim(k_mean.shape[-1]), k_mean)[drawn(k_mean)][:, None]


# ---------------------------------------------------------------------------------------------- one sequence


def visible(tq: int, tk: int, is_causal: bool, device: torch.device) -> Tensor:
    """`[Tq, Tk]` True where query i sees key j; causal is aligned bottom-right."""
    mask = torch.ones(tq, tk, dtype=torch.bool, device=device)
    return mask.tril(tk - tq) if is_causal else mask


def _softmax_tiles(
    s: Tensor, mask: Tensor, tile: int, apart: float | Tensor = -math.inf
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Base-2 softmax pieces: `p` against the key tile's own maximum, the factor to the row's, row sum, base-2 LSE.

    apart: the score `[.., Tq, 1]` of a key that is in no tile, but in the row's maximum, sum and LSE.
    """
    s, apart = torch.where(mask, s, -math.inf), torch.as_tensor(apart, dtype=s.dtype, device=s.device)
    m_tile = tile_amax(s, 1, tile)
    m = torch.maximum(s.amax(-1, keepdim=True), apart)
    p = torch.where(m_tile == -math.inf, 0.0, torch.exp2(s - m_tile))
    factor = torch.where(m_tile == -math.inf, 0.0, torch.exp2(m_tile - m))
    total = (p * factor).sum(-1, keepdim=True) + torch.where(apart == -math.inf, 0.0, torch.exp2(apart - m))
    return p, factor, total, m + torch.log2(total)


def paper_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> dict[str, Tensor]:
    """Algorithm 1: per-block Q, K, V; per-token P; K smoothed."""
    t, d = PAPER, q.shape[-1]
    k_mean = k.mean(-2, keepdim=True)
    q_hat = round_tiles(q, t.queries, d)
    k_hat = round_tiles(k - k_mean, t.keys, d)
    v_hat = round_tiles(v, t.keys, d)
    p, factor, total, lse2 = _softmax_tiles(q_hat @ k_hat.mT * (scale * LOG2E), mask, t.forward_keys)
    p_hat = round_tiles(p, 1, t.forward_keys)
    return {"o": (p_hat * factor) @ v_hat / total, "lse2": lse2, "k_mean": k_mean, "q_hat": q_hat, "k_hat": k_hat}


def paper_backward(
    d_o: Tensor, d_lse: Tensor, o: Tensor, v: Tensor, saved: dict[str, Tensor], mask: Tensor, scale: float
) -> dict[str, Tensor]:
    """Algorithm 2: every operand but dO and V of dP per block."""
    t, d = PAPER, v.shape[-1]
    q_hat, k_hat = saved["q_hat"], saved["k_hat"]
    p = torch.where(mask, torch.exp2(q_hat @ k_hat.mT * (scale * LOG2E) - saved["lse2"]), 0.0)
    d_v = round_tiles(p, t.queries, t.keys).mT @ round_tiles(d_o, t.queries, d)
    delta = (d_o * o).sum(-1, keepdim=True) - d_lse
    d_s = p * (d_o @ v.mT - delta)
    d_s_hat = round_tiles(d_s, t.queries, t.keys)
    d_q = scale * (d_s_hat @ k_hat + d_lse * saved["k_mean"])
    return {"d_q": d_q, "d_k": scale * d_s_hat.mT @ q_hat, "d_v": d_v, "d_s": d_s}


def sage_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, preset: Preset) -> dict[str, Tensor]:
    """Q and K rotated, a scale per token (K: or 16); V centred, a scale per channel and key tile; P against its tile's
    maximum, 8 unsigned bits. The first key is in no tile, its P and value are not rounded."""
    gain = padded_head_dim(q.shape[-1]) if preset.rotate else 1  # Dp * rotate(q) . rotate(k) = q . k
    k_mean, v_mean = k.mean(-2, keepdim=True), v.mean(-2, keepdim=True)
    turn = partial(rotate, signs=signs_of(k_mean)) if preset.rotate else (lambda x: x)
    q_turned, k_turned = turn(q), turn(k) - turn(k_mean)
    width = q_turned.shape[-1]
    q_scale, k_scale = (int8_scale(x, 1, width)[..., :1] for x in (q_turned, k_turned))
    if preset.shared_key_scales:
        k_scale = scale_of(shared_amax(k_turned.abs()))
    q8, k8 = preset.integers("q", q_turned / q_scale), preset.integers("k", k_turned / k_scale)
    others = torch.arange(k.shape[-2], device=k.device) > 0
    v_others = torch.where(others[:, None], v - v_mean, 0.0)
    v_scale = int8_scale(v_others, preset.forward_keys, 1)
    v_hat = preset.integers("v", v_others / v_scale) * v_scale
    v_mean = v_mean + (v_others - v_hat).mean(-2, keepdim=True)  # what rounding lost on average comes back for free
    s = (q8 @ k8.mT) * k_scale.mT * (q_scale * (gain * scale * LOG2E))
    first = torch.where(mask[..., :1], s[..., :1], -math.inf)
    p, factor, total, lse2 = _softmax_tiles(s, mask & others, preset.forward_keys, first)
    p_hat = preset.integers("p", p * 255, 255, q @ k_mean.mT) / 255
    v_first = (v[..., :1, :] - v_mean).clamp(-AMAX_MAX, AMAX_MAX)
    o = (p_hat * factor) @ v_hat / total + torch.exp2(first - lse2) * v_first + v_mean
    return {"o": o, "lse2": lse2, "s": s, "k_mean": k_mean, "v_mean": v_mean,
            "q8": q8, "q_scale": q_scale, "k8": k8, "k_scale": k_scale}  # fmt: skip


def row_weights(d_o: Tensor, d_lse: Tensor, preset: Preset) -> tuple[Tensor, Tensor, Tensor]:
    """What moves between P and dO: rho, the unit of each tile of queries, and which rows have any dO; `[.., Tq, 1]`.

    Within a tile all is in units of its largest gradient, so that nothing depends on the size of dO. dO / rho and
    rho * P leave every product as it is, and rows with large gradients no longer set everybody's scale: rho is the root
    of the row's largest number, as a power of two, or all of it. A row without dO has no say in the scales of dV.
    """
    amax = d_o.abs().amax(-1, keepdim=True)
    alive = ~(amax < SMALLEST)  # NaN too
    unit = tile_amax(floor_log2(torch.maximum(amax, d_lse.abs()).clamp(min=SMALLEST)), preset.queries, 1)
    root = torch.exp2(((floor_log2(amax.clamp(min=SMALLEST)) - unit) / 2).floor())
    unit = torch.exp2(unit)
    return torch.where(alive, amax / unit if preset.token_gradients else root, 1.0), unit, alive


def sage_backward(
    d_o: Tensor, d_lse: Tensor, o: Tensor, v: Tensor, saved: dict[str, Tensor], mask: Tensor, scale: float,
    preset: Preset, operand_dtype: torch.dtype,
) -> dict[str, Tensor]:  # fmt: skip
    """Natural scales: per row of dS for dQ, per column for dK and of P for dV; dP in the operands' own 16 bits."""
    q8, q_scale, k8, k_scale = (saved[name] for name in ("q8", "q_scale", "k8", "k_scale"))
    v_centre = centre_of(v, saved["v_mean"], operand_dtype)
    d_o = torch.where(mask.any(-1, keepdim=True), d_o, 0.0)
    rho, unit, alive = row_weights(d_o, d_lse, preset)
    delta = ((d_o * (o - v_centre)).sum(-1, keepdim=True) - d_lse) / unit / rho
    d_o = d_o / unit / rho
    p = torch.where(mask, torch.exp2(saved["s"] - saved["lse2"]), 0.0) * rho

    p_alive = torch.where(alive, p, 0.0)
    column_max = tile_amax(p_alive, preset.queries, 1).clamp(min=AMAX_MIN)
    p_hat = preset.integers("p_dv", p_alive / column_max * 255, 255, saved["lse2"]) / 255 * column_max
    do_scale = int8_scale(d_o, *((1, d_o.shape[-1]) if preset.token_gradients else (preset.queries, 1)))
    d_v = p_hat.mT @ (preset.integers("do_dv", d_o / do_scale) * do_scale * unit)

    d_p = d_o @ (v - v_centre).to(operand_dtype).to(v.dtype).mT
    d_s = torch.where(mask, p * (d_p - delta), 0.0)
    by_row, by_column = d_s * k_scale.mT, d_s * q_scale
    row_scale, column_scale = int8_scale(by_row, 1, preset.keys), int8_scale(by_column, preset.queries, 1)
    by_row = preset.integers("ds_dq", by_row / row_scale, content=saved["lse2"]) * row_scale
    by_column = preset.integers("ds_dk", by_column / column_scale, content=saved["lse2"]) * column_scale
    d_q, d_k = unit * by_row @ k8, (unit * by_column).mT @ q8
    if preset.rotate:
        turns = signs_of(saved["k_mean"])
        d_q, d_k = (unrotate(x, turns, v.shape[-1]) for x in (d_q, d_k))
    return {"d_q": scale * (d_q + d_lse * saved["k_mean"]), "d_k": scale * d_k, "d_v": d_v, "d_s": unit * d_s}


# ---------------------------------------------------------------------------------------------- whole calls


def sequences(
    q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[tuple[int, slice, slice]]:
    """(batch, query tokens, key tokens) of every sequence that has both."""
    if cu_seqlens_q is None or cu_seqlens_k is None:
        yield from ((b, slice(0, q.shape[2]), slice(0, k.shape[2])) for b in range(q.shape[0]))
        return
    edges_q, edges_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(edges_q) - 1):
        if edges_q[i] < edges_q[i + 1] and edges_k[i] < edges_k[i + 1]:
            yield 0, slice(edges_q[i], edges_q[i + 1]), slice(edges_k[i], edges_k[i + 1])


def exact(
    q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False, scale: float | None = None,
    cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None, dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Exact attention in `dtype`. Shapes as `sagetrain.attention`; returns (o, lse) in `dtype`; differentiable."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    o, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf)
    for b, rows, keys in sequences(q, k, cu_seqlens_q, cu_seqlens_k):
        qs, ks, vs = q[b, :, rows], *(x[b, :, keys].repeat_interleave(group, 0) for x in (k, v))
        mask = visible(qs.shape[1], ks.shape[1], is_causal, q.device)
        alive = mask.any(-1, keepdim=True)
        s = torch.where(mask, scale * qs @ ks.mT, -math.inf)
        s = torch.where(alive, s, 0.0)  # rows that see nothing: any finite score, then zeroed
        o[b, :, rows] = torch.where(alive, s.softmax(-1) @ vs, 0.0)
        lse[b, :, rows] = torch.where(alive[:, 0], s.logsumexp(-1), -math.inf)
    return o, lse


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts to where x is; None without autocast (meta, for one, has none)."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else None


def _in_its_own_types(run: Callable) -> Callable:
    """`run(ctx, tensor, ..)` without autocast, which would make products BF16 that are FP32 here."""

    @wraps(run)
    def without(ctx: Any, x: Tensor, *others: Any) -> Any:
        with torch.autocast(x.device.type, enabled=False) if autocast_dtype(x) else nullcontext():
            return run(ctx, x, *others)

    return without


class _Reference(torch.autograd.Function):
    @staticmethod
    @_in_its_own_types
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, preset: Preset, is_causal: bool, scale: float,
                cu_q: Tensor | None, cu_k: Tensor | None, record: list | None) -> tuple[Tensor, Tensor]:  # fmt: skip
        group = q.shape[1] // k.shape[1]
        o, lse = torch.zeros_like(q), q.new_full(q.shape[:3], -math.inf, dtype=torch.float32)
        ctx.pieces = []
        for b, rows, keys in sequences(q, k, cu_q, cu_k):
            qs, ks, vs = q[b, :, rows].float(), *(x[b, :, keys].float().repeat_interleave(group, 0) for x in (k, v))
            mask = visible(qs.shape[1], ks.shape[1], is_causal, q.device)
            run = paper_forward if preset.name == "paper" else sage_forward
            saved = run(qs, ks, vs, mask, scale, *(() if preset.name == "paper" else (preset,)))
            alive = mask.any(-1, keepdim=True)
            o[b, :, rows] = torch.where(alive, saved.pop("o"), 0.0).to(q.dtype)
            shift = scale * (qs @ saved["k_mean"].mT)  # the true LSE has the key mean's share
            lse[b, :, rows] = torch.where(alive, saved["lse2"] / LOG2E + shift, -math.inf)[..., 0]
            ctx.pieces.append((b, rows, keys, mask, saved))
        ctx.save_for_backward(q, k, v, o)
        ctx.options = preset, scale, group, record
        return o, lse

    @staticmethod
    @_in_its_own_types
    def backward(ctx: Any, d_o: Tensor, d_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, o = ctx.saved_tensors
        preset, scale, group, record = ctx.options
        d_q, d_k, d_v = (torch.zeros_like(x) for x in (q, k, v))
        for b, rows, keys, mask, saved in ctx.pieces:
            zero = torch.zeros((), device=q.device)
            grad_lse = zero if d_lse is None else torch.where(mask.any(-1), d_lse[b, :, rows], 0.0).float()[..., None]
            operands = (d_o[b, :, rows].float(), grad_lse, o[b, :, rows].float(),
                        v[b, :, keys].float().repeat_interleave(group, 0), saved, mask, scale)  # fmt: skip
            grads = paper_backward(*operands) if preset.name == "paper" else sage_backward(*operands, preset, q.dtype)
            if record is not None:
                record.append(grads["d_s"])
            d_q[b, :, rows] = grads["d_q"].to(q.dtype)
            for target, name in ((d_k, "d_k"), (d_v, "d_v")):
                target[b, :, keys] = grads[name].unflatten(0, (-1, group)).sum(1).to(q.dtype)
        return d_q, d_k, d_v, *(None,) * 6


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, preset: str | Preset = "sage", is_causal: bool = False,
    scale: float | None = None, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    return_lse: bool = False, record: list | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`sagetrain.attention` in plain torch, by the preset named (`PRESETS`); differentiable once.

    `record`: a list that receives dS `[Hq, Tq, Tk]` of each sequence during the backward.
    """
    chosen = PRESETS[preset] if isinstance(preset, str) else preset
    if dtype := autocast_dtype(q):
        q, k, v = (x.to(dtype) for x in (q, k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    rest = chosen, is_causal, scale, cu_seqlens_q, cu_seqlens_k, record
    if cu_seqlens_q is None and record is None and len(q) > 1:  # rows of a batch are heads like any other
        size = max(1, SCORES.get(q.device.type, 2**20) // max(1, q[0, :, :, 0].numel() * k.shape[2]))
        parts = zip(*(x.split(size) for x in (q, k, v)), strict=True)
        calls = [(len(x[0]), _Reference.apply(*(y.flatten(0, 1)[None] for y in x), *rest)) for x in parts]
        o, lse = (torch.cat([y[i].unflatten(1, (b, -1))[0] for b, y in calls]) for i in (0, 1))
    else:
        o, lse = _Reference.apply(q, k, v, *rest)
    return (o, lse) if return_lse else o


def ds_rowsum_residual(
    q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, *, preset: str = "sage", is_causal: bool = True
) -> float:
    """How far the rows of dS are from summing to zero under a preset: ||row sums|| / ||dS|| (unitless, 0 is exact).

    The leak that arXiv 2609.34272 traces instability to. Shapes as `sagetrain.attention`; one head at a time, so that
    memory stays at Tq * Tk floats.
    """
    group, scale, width = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5, max(q.shape[-1], v.shape[-1])
    q, k, v, d_o = (pad(x, (0, width - x.shape[-1])) for x in (q, k, v, d_o))  # as `sagetrain.attention` pads
    leak = total = 0.0
    for h in range(q.shape[1]):
        qh, kh, vh = (x[:, i : i + 1].detach() for x, i in ((q, h), (k, h // group), (v, h // group)))
        record: list[Tensor] = []
        with torch.enable_grad():
            o = attention(qh.requires_grad_(), kh, vh, preset=preset, is_causal=is_causal, scale=scale, record=record)
        o.backward(d_o[:, h : h + 1])
        leak += sum(float(d_s.sum(-1).square().sum()) for d_s in record)
        total += sum(float(d_s.square().sum()) for d_s in record)
    return math.sqrt(leak / total) if total else 0.0

"""Cases and the error ratio: how every attention kernel is judged.

A kernel's error is the relative L2 distance to exact FP64 attention, for the output and each gradient, and it is judged
against what the same scheme costs in plain torch (`plain`, which rounds where the kernel rounds): no
tolerance is set by hand. RATIO is the project's bar (docs/numerics.md, "What must hold").
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
from torch import Tensor

import sagetrain
from sagetrain.ops import reference, schemes

RATIO = 1.5  # a kernel may have 1.5 times the error of the plain reference of its preset
NAMES = ("o", "d_q", "d_k", "d_v")


@dataclass(frozen=True)
class Case:
    """One call. `sigma` scales q and k; `kind` shapes the values (`KINDS`); `cu_q`, `cu_k` pack sequences.

    The values do not depend on `device`: they are made on the CPU.
    """

    b: int = 1
    hq: int = 2
    hkv: int = 1
    tq: int = 130
    tk: int = 130
    d: int = 64
    is_causal: bool = True
    dtype: torch.dtype = torch.bfloat16
    sigma: float = 1.0
    kind: str = "normal"
    cu_q: tuple[int, ...] | None = None
    cu_k: tuple[int, ...] | None = None
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        packed = f"-packed{len(self.cu_q) - 1}" if self.cu_q else ""
        causal = "causal" if self.is_causal else "full"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"b{self.b}-h{self.hq}.{self.hkv}-t{self.tq}.{self.tk}-d{self.d}"
        return f"{shape}-{causal}-{dtype}-{self.kind}{self.sigma:g}{packed}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, d_o of the case's kind (`KINDS` says what each is)."""
        g = torch.Generator().manual_seed(self.seed)
        q = torch.randn(self.b, self.hq, self.tq, self.d, generator=g) * self.sigma
        k, v = (torch.randn(self.b, self.hkv, self.tk, self.d, generator=g) for _ in range(2))
        k = k * self.sigma
        d_o = torch.randn(self.b, self.hq, self.tq, self.d, generator=g)
        if self.kind not in KINDS:
            raise ValueError(f"unknown kind {self.kind!r}")
        q, k, v, d_o = KINDS[self.kind](self, g, q, k, v, d_o)
        q, k, v, d_o = (x.to(self.dtype).to(self.device) for x in (q, k, v, d_o))
        return q, k, v, d_o

    def spans(self) -> list[slice]:
        """The query tokens of every sequence that has some."""
        edges = self.cu_q or (0, self.tq)
        return [slice(a, b) for a, b in itertools.pairwise(edges) if a < b]

    @property
    def options(self) -> dict:
        edges = {n: None if e is None else torch.tensor(e, dtype=torch.int32, device=self.device)
                 for n, e in (("cu_seqlens_q", self.cu_q), ("cu_seqlens_k", self.cu_k))}  # fmt: skip
        return {"is_causal": self.is_causal, **edges}


# ------------------------------------------------------------------------------------------------- kinds of values
# Each takes (case, generator, q, k, v, d_o), all standard normal but for sigma, and gives the four back.

Values = tuple[Tensor, Tensor, Tensor, Tensor]


def outlier(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """Three channels of k eight times larger."""
    k[..., [1, case.d // 4, case.d // 2]] *= 8
    return q, k, v, d_o


def biased(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """k and v have a large mean."""
    k, v = (x + size * torch.randn(case.b, case.hkv, 1, case.d, generator=g) for x, size in ((k, 5), (v, 3)))
    return q, k, v, d_o


def heavy(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """Rows of d_o log-normal."""
    return q, k, v, d_o * torch.exp(1.5 * torch.randn(case.b, case.hq, case.tq, 1, generator=g))


def sink(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """Nearly all weight is on the first key of each sequence, which the queries' mean meets, and its value is tiny."""
    mean = torch.randn(case.d, generator=g).sign()
    first = [0] if case.cu_k is None else [i for i in case.cu_k[:-1] if i < case.tk]
    k[:, :, first] += 11 / case.d**0.5 * mean  # scores of 11
    v[:, :, first] *= 0.02
    return q + mean, k, v, d_o


def small(case: Case, d_o: Tensor) -> Tensor:
    """d_o as small as a mean loss leaves it; in float16 as it comes, since there the loss is scaled up by as much."""
    return d_o if case.dtype == torch.float16 else d_o * 2.0**-20


def without(rows: Tensor, d_o: Tensor) -> Tensor:
    return torch.where(rows[:, None], 0.0, d_o)


def masked(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """A prompt that is no target: of each sequence's d_o the first 60% of the rows are zero."""
    rows = torch.zeros(case.tq, dtype=torch.bool)
    for span in case.spans():
        rows[span.start : span.start + int(0.6 * (span.stop - span.start))] = True
    return q, k, v, without(rows, small(case, d_o))


def last_rows(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """A mean loss: the last row of each sequence's d_o is zero, since its token predicts nothing, the others small."""
    rows = torch.zeros(case.tq, dtype=torch.bool)
    rows[[span.stop - 1 for span in case.spans()]] = True
    return q, k, v, without(rows, small(case, d_o))


def silent(tokens: int, seed: int = 0) -> Tensor:
    """`[tokens]` bool: 30% at random, both sides of each edge of a tile, one tile of 64 rows and one of 128.

    The first five tokens stay: a row whose d_o has neighbours, whatever the length."""
    rows = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.3
    edge = torch.arange(tokens) % 64
    rows |= (edge == 0) | (edge == 63)
    rows[64:128] = rows[256:384] = True
    rows[:5] = False
    return rows


def zeros(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """Rows of d_o that are zero where they may hurt (`silent`), the others small."""
    rows = torch.zeros(case.tq, dtype=torch.bool)
    for span in case.spans():
        rows[span] = silent(span.stop - span.start, case.seed)
    return q, k, v, without(rows, small(case, d_o))


def turning(t: int, frequencies: Tensor) -> Tensor:
    """`[t, D]`: cosines, then sines of the tokens' angles, by frequency `[D / 2]` in radians per token."""
    angle = torch.outer(torch.arange(t), frequencies)
    return torch.cat([angle.cos(), angle.sin()], -1)


def coherent(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """Channels that move together, each a little faster than its neighbour."""
    frequencies = (0.02 + 0.3 * torch.arange(case.d // 2)) / 40
    return *(0.5 * x + 2 * turning(x.shape[-2], frequencies) for x in (q, k)), v, d_o


def dominant(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """One frequency in all channels."""
    frequencies = torch.full((case.d // 2,), 1 / 40)
    return *(0.5 * x + 2 * turning(x.shape[-2], frequencies) for x in (q, k)), v, d_o


def equal(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """One value in all channels of a token, and noise. Their sum over the channels is as large as `coherent`'s."""
    return *(0.5 * x + 2**0.5 * turning(x.shape[-2], torch.tensor([1 / 40]))[:, :1] for x in (q, k)), v, d_o


def rotary(x: Tensor, theta: float) -> Tensor:
    """Rotary embedding as transformers' Llama has it, channel i with i + D/2."""
    t, d = x.shape[-2:]
    cos, sin = turning(t, theta ** (-torch.arange(0, d, 2) / d)).chunk(2, -1)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def rope(theta: float) -> Callable[..., Values]:
    def biases(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
        """Rotary embedding of q and k that have a large bias in each head."""
        q, k = (rotary(x + 3 * torch.randn(case.b, x.shape[1], 1, case.d, generator=g), theta) for x in (q, k))
        return q, k, v, d_o

    return biases


def pair(case: Case, g: torch.Generator, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor) -> Values:
    """Rotary embedding of q and k that have a bias of eight in one pair of channels: one frequency dominates."""
    bias = torch.zeros(case.d)
    bias[[case.d // 16, case.d // 16 + case.d // 2]] = 8
    return *(rotary(x + bias, 1e4) for x in (q, k)), v, d_o


PLAIN_KINDS: dict[str, Callable[..., Values]] = {
    "normal": lambda case, g, *tensors: tensors,
    "outlier": outlier,
    "biased": biased,
    "heavy": heavy,
    "sink": sink,
    "uniform": lambda case, g, q, k, v, d_o: (0.1 * q, 0.1 * k, v, d_o),  # near-equal attention weights
}
GRADIENT_KINDS = {"masked": masked, "meanloss": last_rows, "zeros": zeros}  # what training makes of d_o
COHERENT_KINDS = {
    "coherent": coherent, "dominant": dominant, "equal": equal, "rope": rope(1e4), "rope5e5": rope(5e5), "pair": pair,
}  # fmt: skip
KINDS = PLAIN_KINDS | GRADIENT_KINDS | COHERENT_KINDS


@dataclass(frozen=True, eq=False)
class Given(Case):
    """A case with tensors of its own instead of random ones."""

    given: tuple[Tensor, ...] = ()

    def tensors(self) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in self.given)


def given(case: Case, *tensors: Tensor) -> Given:
    """`case` with these q, k, v, d_o; their shapes and dtypes must be the case's."""
    return Given(**{field.name: getattr(case, field.name) for field in fields(Case)}, given=tensors)


def packed(case: Case, lengths_q: list[int], lengths_k: list[int], lead: int = 0, tail: int = 0) -> Case:
    """`case` with packed sequences of these lengths; `lead` and `tail` tokens before and after belong to none."""
    cu_q, cu_k = (tuple(itertools.accumulate(lengths, initial=lead)) for lengths in (lengths_q, lengths_k))
    return replace(case, b=1, tq=cu_q[-1] + tail, tk=cu_k[-1] + tail, cu_q=cu_q, cu_k=cu_k)


# ------------------------------------------------------------------------------------------- numbers of few steps
# Cases in which P and dS, of keys that many queries see, are so small that to the nearest integer all would be 0.

NEAREST = partial(reference.attention, preset=replace(reference.SAGE, dithered=frozenset()))


def of_logits(logits: Tensor, kind: Tensor, v: Tensor, dtype: torch.dtype, device: str) -> Given:
    """A case of keys that are of a few kinds `[Tk]`, with these logits `[Tq, kinds]` but for random last digits.

    v `[Tk]`: in channel 1, where all of d_o is 1. The queries have another channel in common."""
    (tq, kinds), tk, d = logits.shape, len(kind), 64
    q, values, d_o = (torch.zeros(n, d) for n in (tq, tk, tq))
    last = 0.01 * torch.randn(tq, kinds, generator=torch.Generator().manual_seed(0))
    q[:, :kinds] = ((logits + last) * 2**13).round() / 2**13  # in FP32 so few digits that q . mean(k) is exact
    q[:, -1], values[:, 1], d_o[:, 1] = 7, v, 1
    case = Case(hq=1, tq=tq, tk=tk, is_causal=False, dtype=dtype, device=device)
    return given(case, *(x[None, None].to(device, dtype) for x in (q, d**0.5 * torch.eye(d)[kind], values, d_o)))


def small_in_rows(steps: float, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Given:
    """Two keys share each query; 20 others have so many steps of P, fewer of dS, and pull O and dQ the same way."""
    kind = torch.tensor([0, 1] + 20 * [2] + 42 * [3])  # the last, which no query sees, leave the values no mean
    logits, v = torch.tensor([0.0, 0.0, math.log(steps / 255), -30.0]), torch.tensor([1.0, -1.0, 1.0, -20 / 42])
    return of_logits(logits.expand(64, -1), kind, v[kind], dtype, device)


def small_in_columns(steps: float, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Given:
    """One query has half of its weight on key 1, the others so many steps of P, more of dS, and all pull alike."""
    logits = torch.tensor([[0.0, 0.0]] + 63 * [[0.0, math.log(steps / 510)]])
    return of_logits(logits, torch.arange(2), torch.tensor([0.0, 1.0]), dtype, device)


# ------------------------------------------------------------------------------------------------------ judging


def run(attend: Callable[..., Tensor], case: Case) -> dict[str, Tensor]:
    """Output and gradients of `attend(q, k, v, **case.options)` by name."""
    q, k, v, d_o = case.tensors()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o = attend(*inputs, **case.options)
    return dict(zip(NAMES, (o.detach(), *torch.autograd.grad(o, inputs, d_o.to(o.dtype))), strict=True))


def exact(case: Case) -> dict[str, Tensor]:
    """The same in FP64."""
    q, k, v, d_o = (x.double() for x in case.tensors())
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, _ = reference.exact(*inputs, **case.options)
    grads = (
        torch.autograd.grad(o, inputs, d_o) if o.requires_grad else map(torch.zeros_like, inputs)
    )  # no sequence at all
    return dict(zip(NAMES, (o.detach(), *grads), strict=True))


def error(got: Tensor, truth: Tensor) -> float:
    """Relative L2 error against FP64; absolute where the truth is zero."""
    truth, got = truth.detach().double(), got.detach().double()
    norm, difference = truth.norm(), (got - truth).norm()
    return float(difference / norm) if norm else float(difference)


def preset_of(device: torch.device | str, scheme: str | None = None) -> reference.Preset:
    """The preset that the scheme's kernel for a device computes; the default scheme's where none is named."""
    return reference.PRESETS[schemes.get(scheme).preset(sagetrain.kernel_name(device, scheme))]


def plain(q: Tensor, k: Tensor, v: Tensor, preset: str | reference.Preset | None = None, **options: object) -> Tensor:
    """The plain reference, by the preset of the device unless another is given."""
    return reference.attention(q, k, v, preset=preset or preset_of(q.device), **options)


def check(
    attend: Callable[..., Tensor], case: Case, preset: str | reference.Preset | None = None, least: float = 0.0
) -> None:
    """Asserts that every result of `attend` is finite and within RATIO of the reference's own error, or of `least`.

    The rounding of the inputs' dtype is the least in any case, since a result cannot be closer than that. Where the
    reference itself keeps no digit (an error above 1, e.g. of gradients behind a saturated softmax), finite is enough.
    """
    truth = exact(case)
    got = run(attend, case)
    same = run(lambda *x, **o: plain(*x, preset=preset, **o), case)
    for name in NAMES:
        assert got[name].isfinite().all(), f"{case}: {name} is not finite"
        rounding = torch.finfo(case.dtype).eps
        ours = error(same[name], truth[name])
        bar = RATIO * max(ours, rounding, least)
        assert ours > 1 or error(got[name], truth[name]) <= bar, (
            f"{case}: {name} error {error(got[name], truth[name]):.2e} > {bar:.2e}"
        )


def check_lse(attend: Callable[..., tuple[Tensor, Tensor]], case: Case, preset: str | None = None) -> None:
    """Asserts the same of LSE where it is finite, and of the gradients of a loss on both it and the output.

    The loss is as small as d_o is."""
    q, k, v, d_o = case.tensors()
    weight = torch.randn(d_o.shape[:3], generator=torch.Generator().manual_seed(case.seed + 1)).to(case.device)
    weight *= d_o.float().square().mean().sqrt()  # so that neither drowns the other
    calls = {
        attend: case.dtype,
        lambda *x, **o: plain(*x, preset=preset, **o): case.dtype,
        lambda *x, return_lse, **o: reference.exact(*x, **o): torch.float64,
    }
    results = []
    for call, dtype in calls.items():
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        o, lse = call(*inputs, return_lse=True, **case.options)
        alive = lse > -torch.inf
        loss = (o * d_o).sum() + (lse[alive] * weight[alive]).sum()
        results.append((lse, alive, torch.autograd.grad(loss, inputs)))
    (got, alive, grads), (expected, _, same), (truth, alive_truth, exact_grads) = results
    assert got.dtype == torch.float32 and torch.equal(alive, alive_truth), f"{case}: lse is infinite elsewhere"
    found, bar = error(got[alive], truth[alive]), RATIO * error(expected[alive], truth[alive])
    assert found <= bar, f"{case}: lse error {found:.2e} > {bar:.2e}"
    for name, a, b, c in zip(NAMES[1:], grads, same, exact_grads, strict=True):
        found, bar = error(a, c), RATIO * max(error(b, c), torch.finfo(case.dtype).eps)
        assert found <= bar, f"{case}: {name} error with a gradient of lse {found:.2e} > {bar:.2e}"


def check_first_token(attend: Callable[..., Tensor], case: Case) -> None:
    """Asserts that a row that sees only the first token of its sequence gets its value. The case: causal, as many
    queries as keys."""
    q, k, v, _ = case.tensors()
    o, edges = attend(q, k, v, **case.options).float(), case.cu_k or (0, case.tk)
    for start, end in itertools.pairwise(edges):
        values = v[:, :, start:end].float().repeat_interleave(case.hq // case.hkv, 1)
        first, summed = values[:, :, 0], torch.finfo(torch.float32).eps * values.abs().amax()  # with the mean, in FP32
        off = ((o[:, :, start] - first).abs() - torch.finfo(case.dtype).eps * first.abs()).max()
        assert off < 8 * summed, f"{case}: the first token's value is off by {off:.2e}"


SINKS = [
    Case(kind="sink", tq=700, tk=700),
    Case(kind="sink", tq=1100, tk=1100, d=128, hq=4, hkv=2),
    packed(Case(kind="sink", d=40), [600, 900], [600, 900], lead=3),
]


def deterministic(*tensors: Tensor, **options: object) -> Tensor:
    """`sagetrain.attention` whose backward, too, sums in one order."""
    return sagetrain.attention(*tensors, deterministic=True, **options)


def same(got: Tensor, wanted: Tensor, to_the_bit: bool = True) -> bool:
    """Whether two results are equal (but for the sign of zero), or as near as two orders of an FP32 sum leave them.

    The order moves a sum by far less than a rounding of 16 bits, so it shows only where the two lie on either side of a
    rounding edge: one value in 64 at most may differ by its last bit, eps / 8 of all in L2.
    """
    if to_the_bit:
        return torch.equal(got, wanted)
    finite = wanted.isfinite()
    rounding = torch.finfo(wanted.dtype).eps / 8
    return torch.equal(got.isfinite(), finite) and error(got[finite], wanted[finite]) <= rounding


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor], what: object = "", to_the_bit: bool = True) -> None:
    """Asserts that of two results of `run`; of the output to the bit in any case."""
    for name in wanted:
        assert same(got[name], wanted[name], to_the_bit or name == "o"), f"{what}: {name} differs"


def variants(case: Case, **changes: list) -> list[Case]:
    """`case` with one field changed at a time."""
    return [replace(case, **{name: value}) for name, values in changes.items() for value in values]

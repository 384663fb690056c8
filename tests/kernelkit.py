"""Cases and the error ratio: how every attention kernel is judged.

A kernel's error is the relative L2 distance to exact FP64 attention, for the output and each gradient, and it is judged
against what the same scheme costs in plain torch (`reference.attention`, which rounds where the kernel rounds): no
tolerance is set by hand. RATIO is the project's bar (docs/numerics.md, "What must hold").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sagetrain.attention import reference

RATIO = 1.5  # a kernel may have 1.5 times the error of the plain reference of its preset
NAMES = ("o", "d_q", "d_k", "d_v")


@dataclass(frozen=True)
class Case:
    """One call. `sigma` scales q and k; `kind` shapes the values (see `tensors`); `cu_q`, `cu_k` pack sequences."""

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

    def __str__(self) -> str:
        packed = f"-packed{len(self.cu_q) - 1}" if self.cu_q else ""
        causal = "causal" if self.is_causal else "full"
        dtype = str(self.dtype).removeprefix("torch.")
        shape = f"b{self.b}-h{self.hq}.{self.hkv}-t{self.tq}.{self.tk}-d{self.d}"
        return f"{shape}-{causal}-{dtype}-{self.kind}{self.sigma:g}{packed}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v, d_o. Kinds: normal; outlier (three channels of k eight times larger); biased (k and v have a large
        mean); heavy (rows of d_o log-normal); uniform (near-equal attention weights)."""
        g = torch.Generator().manual_seed(self.seed)
        q = torch.randn(self.b, self.hq, self.tq, self.d, generator=g) * self.sigma
        k, v = (torch.randn(self.b, self.hkv, self.tk, self.d, generator=g) for _ in range(2))
        k = k * self.sigma
        d_o = torch.randn(self.b, self.hq, self.tq, self.d, generator=g)
        if self.kind == "outlier":
            k[..., [1, self.d // 4, self.d // 2]] *= 8
        elif self.kind == "biased":
            k += 5 * torch.randn(self.b, self.hkv, 1, self.d, generator=g)
            v += 3 * torch.randn(self.b, self.hkv, 1, self.d, generator=g)
        elif self.kind == "heavy":
            d_o *= torch.exp(1.5 * torch.randn(self.b, self.hq, self.tq, 1, generator=g))
        elif self.kind == "uniform":
            q, k = 0.1 * q, 0.1 * k
        elif self.kind != "normal":
            raise ValueError(f"unknown kind {self.kind!r}")
        q, k, v, d_o = (x.to(self.dtype) for x in (q, k, v, d_o))
        return q, k, v, d_o

    @property
    def options(self) -> dict:
        edges = {n: None if e is None else torch.tensor(e, dtype=torch.int32)
                 for n, e in (("cu_seqlens_q", self.cu_q), ("cu_seqlens_k", self.cu_k))}  # fmt: skip
        return {"is_causal": self.is_causal, **edges}


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


def check(attend: Callable[..., Tensor], case: Case, preset: str = "sage") -> None:
    """Asserts that every result of `attend` is finite and within RATIO of the reference's own error.

    Both are given the rounding of the inputs' dtype on top, since a result cannot be closer than that.
    """
    truth = exact(case)
    got = run(attend, case)
    same = run(lambda *x, **o: reference.attention(*x, preset=preset, **o), case)
    for name in NAMES:
        assert got[name].isfinite().all(), f"{case}: {name} is not finite"
        rounding = torch.finfo(case.dtype).eps
        bar = RATIO * max(error(same[name], truth[name]), rounding)
        assert error(got[name], truth[name]) <= bar, (
            f"{case}: {name} error {error(got[name], truth[name]):.2e} > {bar:.2e}"
        )


def variants(case: Case, **fields: list) -> list[Case]:
    """`case` with one field changed at a time."""
    return [replace(case, **{name: value}) for name, values in fields.items() for value in values]

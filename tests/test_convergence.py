"""INT8 attention trains as exact attention does: step by step, from the same weights, on the same batches.

benchmarks/parity.py has the measure and its bars. That the measure can fail is shown with attentions that are wrong in
one way each: all of them would have passed for "the loss falls as well".
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sagetrain
from benchmarks import parity


class Tamper(torch.autograd.Function):
    """x; its gradient becomes change(gradient)."""

    @staticmethod
    def forward(ctx, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.change = change
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.change(grad), None


def kernel(*tensors: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    return sagetrain.attention(*tensors, return_lse=True, **options)


def gradient(**changes: Callable[[Tensor], Tensor]) -> parity.Attend:
    """The kernel with other gradients of q, k, v."""

    def attend(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
        tensors = {"q": q, "k": k, "v": v}
        return kernel(*(Tamper.apply(x, changes[n]) if n in changes else x for n, x in tensors.items()), **options)

    return attend


def noise(grad: Tensor) -> Tensor:
    """A tenth of the gradient's size, other numbers at every call."""
    return grad + 0.1 * grad.square().mean().sqrt() * torch.randn_like(grad)


def heads_exchanged(q: Tensor, k: Tensor, v: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    """The first two query heads get each other's output."""
    o, lse = kernel(q, k, v, **options)
    order = [1, 0, *range(2, q.shape[1])]
    return o[:, order], lse[:, order]


def scale_off(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: object) -> tuple[Tensor, Tensor]:
    return kernel(q, k, v, scale=1.02 * scale, **options)


def sees_the_next(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, **options: object) -> tuple[Tensor, Tensor]:
    """Query i sees key i + 1 too."""
    if not is_causal:
        return kernel(q, k, v, **options)
    early = kernel(q[:, :, :-1], k, v, is_causal=True, **options)
    return tuple(torch.cat(x, 2) for x in zip(early, kernel(q[:, :, -1:], k, v, **options), strict=True))


def sees_not_itself(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, **options: object) -> tuple[Tensor, Tensor]:
    """Query i sees keys up to i - 1; the first one its own all the same."""
    if not is_causal:
        return kernel(q, k, v, **options)
    first = kernel(q[:, :, :1], k[:, :, :1], v[:, :, :1], **options)
    late = kernel(q[:, :, 1:], k[:, :, :-1], v[:, :, :-1], is_causal=True, **options)
    return tuple(torch.cat(x, 2) for x in zip(first, late, strict=True))


def lse_without_mean(q: Tensor, k: Tensor, v: Tensor, scale: float, **options: object) -> tuple[Tensor, Tensor]:
    """LSE of the centred keys, as the kernel has it inside: right by itself, wrong for whoever merges parts by it."""
    o, lse = kernel(q, k, v, scale=scale, **options)
    mean = k.mean(2, keepdim=True).repeat_interleave(q.shape[1] // k.shape[1], 1)
    return o, lse - scale * (q * mean).sum(-1)


# The attention, and what has to be reported of it among other things.
MUTANTS: dict[str, tuple[parity.Attend, str]] = {
    "dQ is zero": (gradient(q=torch.zeros_like), "1.q_proj: angle"),
    "dK is zero": (gradient(k=torch.zeros_like), "1.k_proj: angle"),
    "dV is 3% short": (gradient(v=lambda grad: 0.97 * grad), "1.v_proj: norm"),
    "noise of a tenth": (gradient(q=noise, k=noise, v=noise), "1.q_proj: angle"),
    "two heads exchanged": (heads_exchanged, "all: loss"),
    "scale 2% off": (scale_off, "1.q_proj: norm"),
    "sees the next token": (sees_the_next, "all: loss"),
    "sees not itself": (sees_not_itself, "all: loss"),
    "LSE without the mean of K": (lse_without_mean, "0.q_proj: angle"),
}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    arms = parity.arms() | {name: attend for name, (attend, _) in MUTANTS.items()}
    return parity.measure(arms, parity.SIZES["tiny"], steps=41, every=8)


@pytest.fixture(scope="module")
def found(rows: list[dict]) -> parity.Summary:
    return parity.summary(rows)


def test_the_model_learns_what_needs_attention(rows):
    """By the text's own letters alone, each as likely as in the text, it could not: that is its entropy."""
    text = torch.frombuffer(bytearray(parity.names()), dtype=torch.uint8)
    share = torch.bincount(text.long()) / len(text)
    assert parity.exact_losses(rows)[-1] < -torch.xlogy(share, share).sum() / 2


def test_a_step_in_int8_is_that_of_exact_attention(found):
    assert not parity.failures(found)


@pytest.mark.gpu
def test_a_step_on_the_gpu_is_that_of_exact_attention():
    """At every step: where the kernel rounds elsewhere than the reference, the two do not share their luck."""
    assert not parity.failures(parity.summary(parity.measure(parity.arms(), parity.SIZES["tiny"], 41, 1, "cuda")))


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_the_measure_sees_what_is_wrong(found, mutant):
    over = parity.failures(found, mutant)
    assert any(line.startswith(f"text, {MUTANTS[mutant][1]}") for line in over), over

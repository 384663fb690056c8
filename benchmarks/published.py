"""Runs with the published scheme, and with exact attention plus noise: what INT8 attention is worth comparing with.

    python -m benchmarks.published recipe=parity_120m data.document_boundaries=false attention=published [key=value ...]
    python -m benchmarks.published recipe=parity_120m attention=noisy [key=value ...]

Method: `published` is SageBwd as its authors describe it (preset `paper` of sagetrain/ops/reference.py), a scheme like
any other: Triton kernels on a GPU (published_kernels.py), the reference itself on a CPU. `noisy` is a BF16 attention
with noise in its output (noisy.py). Both get their names here, then the command line of sagetrain takes over. It is for
one run: the arms that a recipe compares are left out (compare.arms=null), and others refused.
Choice: saved for the backward are Q and K as they came, which it quantises once more, and the LSE: as much memory as
INT8 of both in two orders would be, and less code. Rows of one sequence each: packed and padded ones are refused.
Cost: forward + backward .7 to .8 of FlashAttention-2's speed on an H200 (docs/LOG.md). On a CPU the backward runs the
reference's forward again. `command` in run.json says `python -m sagetrain`, and means this.
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import torch
from torch import Tensor

from benchmarks import noisy
from sagetrain import __main__ as command_line
from sagetrain.ops import library, reference, schemes

SHARED = "float scale, bool is_causal, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool deterministic"


def whole_rows(cu_seqlens_q: Tensor | None) -> None:
    if cu_seqlens_q is not None:
        raise NotImplementedError(
            "attention `published` takes whole rows only, and got packed or padded sequences (cu_seqlens): rows of one "
            "length without padding, in pre-training data.document_boundaries=false; or choose another attention"
        )


def forward_cpu(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    whole_rows(cu_seqlens_q)
    o, lse = reference.attention(q, k, v, preset="paper", is_causal=is_causal, scale=scale, return_lse=True)
    return torch.empty_like(q).copy_(o), lse, q.clone(), k.clone(), torch.zeros_like(lse)  # no use for an LSE here


def backward_cpu(
    d_o: Tensor, d_lse: Tensor | None, v: Tensor, o: Tensor, q: Tensor, k: Tensor, lse2: Tensor, scale: float,
    is_causal: bool, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    def differentiate() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        results = reference.attention(*leaves, preset="paper", is_causal=is_causal, scale=scale, return_lse=True)
        gradients = d_o, torch.zeros_like(lse2) if d_lse is None else d_lse
        return torch.autograd.grad(results, leaves, gradients)

    with ThreadPoolExecutor(1) as another:  # an op runs below autograd, where this thread records nothing
        found = another.submit(differentiate).result()
    return tuple(torch.empty_like(like).copy_(x) for like, x in zip((o, v, v), found, strict=True))


def forward_cuda(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool,
    cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from benchmarks import published_kernels

    whole_rows(cu_seqlens_q)
    with torch.cuda.device(q.device):
        o, lse, lse2 = published_kernels.forward(q, k, v, scale, is_causal)
    return o, lse, q.clone(), k.clone(), lse2


def backward_cuda(
    d_o: Tensor, d_lse: Tensor | None, v: Tensor, o: Tensor, q: Tensor, k: Tensor, lse2: Tensor, scale: float,
    is_causal: bool, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None, deterministic: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    from benchmarks import published_kernels

    with torch.cuda.device(q.device):
        return published_kernels.backward(d_o, d_lse, q, k, v, o, lse2, scale, is_causal)


def saved(q: Tensor, k: Tensor, cu_seqlens_q: Tensor | None) -> tuple[Tensor, ...]:
    return torch.empty_like(q), torch.empty_like(k), q.new_empty(q.shape[:3], dtype=torch.float32)


def kernel_name(device: torch.device) -> str:
    if device.type == "cpu":
        return "reference"
    if device.type != "cuda" or find_spec("triton") is None:
        raise RuntimeError(f"attention `published` on device '{device}': only cpu and, with triton, cuda are supported")
    return "triton"


OPS = torch.library.Library("published", "DEF")
OPS.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {SHARED}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
OPS.define(
    "attention_backward(Tensor d_o, Tensor? d_lse, Tensor v, Tensor o, Tensor q, Tensor k, Tensor lse2, "
    f"{SHARED}) -> (Tensor, Tensor, Tensor)"
)
for device, forward, backward in (("CPU", forward_cpu, backward_cpu), ("CUDA", forward_cuda, backward_cuda)):
    OPS.impl("attention_forward", forward, device)
    OPS.impl("attention_backward", backward, device)

SCHEME = schemes.Scheme(
    name="published",
    label="SageBwd",
    forward=library.define("published::attention", saved),
    kernel_name=kernel_name,
    preset=lambda kernel: "paper",
    dtypes={"cpu": (*schemes.FLOATS, torch.float32), "cuda": schemes.FLOATS},
)


def register() -> None:
    """Makes `published` a scheme and `noisy` an attention of transformers. Raises ValueError for a name that is
    taken."""
    schemes.register(SCHEME)
    noisy.register()


def main() -> None:
    register()
    words = sys.argv[1:]
    if not words or set(words) & {"-h", "--help"}:
        print(__doc__)
        command_line.main(words)
        return
    if arms := [word for word in words if word.startswith("compare.arms=") and word != "compare.arms=null"]:
        sys.exit(f"{arms[0]}: benchmarks.published makes one run; what compares several is python -m sagetrain.compare")
    names = (SCHEME.name, noisy.NAME)
    named = {f"attention={name}": (f"attention.name={name}", f"attention.implementation={name}") for name in names}
    command_line.main(["compare.arms=null", *(word for given in words for word in named.get(given, (given,)))])


if __name__ == "__main__":
    main()

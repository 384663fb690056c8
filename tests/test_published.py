"""The arms of benchmarks/published.py: the published scheme is the reference's `paper`, the noise is noise alone.

Its Triton kernels run on a GPU only, or in Triton's interpreter where that is installed: TRITON_INTERPRET=1.
"""

import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface

import sagetrain
from benchmarks import noisy, published
from sagetrain.__main__ import compose
from sagetrain.integrations import bf16
from sagetrain.ops import reference, schemes
from sagetrain.training.train import run
from tests.kernelkit import Case, error, plain
from tests.kernelkit import run as results_of
from tests.tiny import RUN

interpreted = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
NAMES = (published.SCHEME.name, noisy.NAME)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    published.register()
    yield
    del schemes.SCHEMES["published"]
    for interface, name in ((i, n) for i in (AttentionInterface, AttentionMaskInterface) for n in NAMES):
        del interface._global_mapping[name]


def published_attention(*tensors: Tensor, **options) -> Tensor:
    return sagetrain.attention(*tensors, scheme="published", **options)


def paper(*tensors: Tensor, **options) -> Tensor:
    return plain(*tensors, preset="paper", **options)


# ------------------------------------------------------------------------------------------------ published


@pytest.mark.parametrize("case", [Case(b=2, hq=6, hkv=2), Case(tq=40, tk=90, is_causal=False)], ids=str)
def test_on_a_cpu_it_is_the_reference(case: Case) -> None:
    ours, theirs = results_of(published_attention, case), results_of(paper, case)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert sagetrain.kernel_name("cpu", "published") == "reference"


def test_its_lse_has_a_gradient_and_its_results_their_layout() -> None:
    q, k, v, _ = Case(hq=4, hkv=2).tensors()
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = []
    for attend in (published_attention, paper):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, lse = attend(*leaves, is_causal=True, return_lse=True)
        found.append([o, lse, *torch.autograd.grad(lse.sum() + o.sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and found[0][0].stride() == q.stride()


def test_compiled_as_one_graph() -> None:
    leaves = [x.requires_grad_() for x in Case(tq=40, tk=40).tensors()[:3]]
    results = []
    for attend in (published_attention, torch.compile(published_attention, fullgraph=True, backend="aot_eager")):
        o = attend(*leaves, is_causal=True)
        results.append([o, *torch.autograd.grad(o.float().square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_its_ops_are_what_they_say() -> None:
    q, k, v, _ = Case(b=2, hq=4, hkv=2, tq=24, tk=24).tensors()
    forward, backward = (getattr(torch.ops.published, f"attention_{name}") for name in ("forward", "backward"))
    rest = 0.125, True, None, None, False
    torch.library.opcheck(forward, (*(x.clone().requires_grad_() for x in (q, k, v)), *rest))
    o, lse, *saved = forward(q, k, v, *rest)
    torch.library.opcheck(backward, (torch.randn_like(o), torch.randn_like(lse), v, o, *saved, *rest))


def test_packed_rows_are_refused() -> None:
    edges = (0, 60, 130)
    case = Case(cu_q=edges, cu_k=edges)
    with pytest.raises(NotImplementedError, match="whole rows only.*data.document_boundaries=false"):
        published_attention(*case.tensors()[:3], **case.options)


KERNEL_CASES = [
    Case(tq=1, tk=1),
    Case(hq=3, tq=129, tk=129),
    Case(hq=2, tq=70, tk=150, d=128, is_causal=False),
    Case(hq=2, tq=200, tk=140),  # the first queries see no key
    Case(b=2, hq=6, hkv=2, tq=300, tk=300, d=128, kind="biased"),
    Case(b=2, hq=12, hkv=4, tq=1000, tk=1000, sigma=2),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", schemes.FLOATS, ids=str)
@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_kernels_are_the_reference(case: Case, dtype: torch.dtype) -> None:
    case = replace(case, dtype=dtype, device="cuda")
    assert sagetrain.kernel_name("cuda", "published") == "triton"
    close(results_of(published_attention, case), results_of(paper, case))


@pytest.mark.gpu
def test_on_a_gpu_its_lse_has_a_gradient_too() -> None:
    q, k, v, _ = Case(hq=4, hkv=2, tq=200, tk=140, device="cuda").tensors()
    found = []
    for attend in (published_attention, paper):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        lse = attend(*leaves, is_causal=True, return_lse=True)[1]
        weights = torch.where(lse.isfinite(), torch.linspace(-1, 1, lse.numel(), device="cuda").view_as(lse), 0.0)
        found.append([lse.nan_to_num(neginf=0.0), *torch.autograd.grad(lse, leaves, weights)])
    assert all(error(a, b) < 1e-2 for a, b in zip(*found, strict=True))


@pytest.mark.skipif(not interpreted, reason="needs triton and TRITON_INTERPRET=1")
@pytest.mark.parametrize("case", KERNEL_CASES[:4], ids=str)
def test_interpreted_kernels_are_the_reference(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import published_kernels as kernels

    case = replace(case, dtype=torch.float16)  # the interpreter cannot multiply bfloat16

    def attend(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, **_) -> Tensor:
        return Interpreted.apply(q, k, v, is_causal)

    class Interpreted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
            o, _, lse2 = kernels.forward(q, k, v, q.shape[-1] ** -0.5, is_causal)
            ctx.save_for_backward(q, k, v, o, lse2)
            ctx.is_causal = is_causal
            return o

        @staticmethod
        def backward(ctx, d_o: Tensor) -> tuple[Tensor | None, ...]:
            scale = d_o.shape[-1] ** -0.5
            return *kernels.backward(d_o, None, *ctx.saved_tensors, scale, ctx.is_causal), None

    close(results_of(attend, case), results_of(paper, case))


def close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Up to the order of sums, and integers that it decides; of one key d_q and d_k are the rounding of a zero."""
    for name in wanted:
        size = max(float(wanted[name].double().norm()), 1e-4 * float(wanted["d_v"].double().norm()))
        difference = found[name].double() - wanted[name].double()
        assert float(difference.norm()) < 1e-2 * size, name
        assert abs(float(difference.mean())) < 1e-3 * size / wanted[name].numel() ** 0.5, name


# ------------------------------------------------------------------------------------------------ noisy


def with_and_without_noise(packed: bool) -> list[list[Tensor]]:
    """[o [B, T, H, D], gradients of q, k, v] of `noisy` and of the arm below it, as transformers calls them."""
    q, k, v, d_o = Case(b=2, hq=4, hkv=2, tq=300, tk=300, dtype=torch.float32, kind="biased").tensors()
    edges = torch.tensor([0, 200, 450, 600], dtype=torch.int32)
    options = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges} if packed else {}
    leaves = [x.requires_grad_() for x in (q, k, v)]
    found = []
    for attend in (AttentionInterface()["noisy"], bf16.ARMS["sdpa"].make()[0]):
        o, _ = attend(None, *leaves, None, scaling=0.125, is_causal=True, **options)
        found.append([o.detach(), *torch.autograd.grad(o, leaves, d_o.transpose(1, 2))])
    return found


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
def test_noise_of_its_size_and_exact_gradients(packed: bool) -> None:
    torch.manual_seed(0)
    (o, *gradients), (truth, *exact) = with_and_without_noise(packed)
    noise, rms = o - truth, truth.square().mean((1, 3), keepdim=True).sqrt()
    size = noise.square().mean((1, 3), keepdim=True).sqrt() / rms
    torch.testing.assert_close(size, torch.full_like(size, noisy.SIZE), rtol=0.03, atol=0)  # in each row's each head
    assert abs(float((noise / rms).mean())) < 4 * noisy.SIZE / noise.numel() ** 0.5
    assert all(torch.equal(a, b) for a, b in zip(gradients, exact, strict=True))
    again = with_and_without_noise(packed)[0][0]
    assert 1.2 < error(again, o) / error(o, truth) < 1.6  # another one at each call


def test_noise_is_drawn_in_a_compiled_graph_too() -> None:
    q, k, v, _ = Case(b=2, hq=4, hkv=2).tensors()
    attend = AttentionInterface()["noisy"]
    compiled = torch.compile(lambda *x: attend(None, *x, None, is_causal=True)[0], fullgraph=True, backend="aot_eager")
    truth = reference.exact(q, k, v, is_causal=True)[0].transpose(1, 2)
    first, second = compiled(q, k, v), compiled(q, k, v)
    assert first.dtype == q.dtype and error(first, truth) == pytest.approx(noisy.SIZE, rel=0.1)
    assert 1.2 < error(second, first) / noisy.SIZE < 1.6


def test_checkpointing_draws_it_again() -> None:
    o = torch.randn(1, 20, 2, 64, requires_grad=True)
    grown = checkpoint(lambda x: noisy.with_noise(x).exp(), o, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(grown.sum(), o)[0], grown.detach())


# ------------------------------------------------------------------------------------------------ runs


def test_recipes_take_them(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(500)))
    losses = {}
    for name in ("bf16", *NAMES):
        arm = ["data.document_boundaries=false", "probe.every=2", f"data.path={text}", f"out={tmp_path / name}"]
        arm += [] if name == "bf16" else [f"attention.name={name}", f"attention.implementation={name}"]
        (path,) = run(compose([*RUN, *arm]))
        info = json.loads((path / "run.json").read_text())
        header, *rows = [line.split(",") for line in (path / "metrics.csv").read_text().splitlines()]
        losses[name] = [float(row[header.index("loss")]) for row in rows]
        if name != "bf16":
            ran = {"published": "published (reference)", "noisy": f"SDPA flash, noise of {noisy.SIZE}"}[name]
            assert (info["arm"], info["attention"], info["status"]) == (name, ran, "finished")
            assert losses[name] == pytest.approx(losses["bf16"], rel=0.01) and losses[name] != losses["bf16"]


def test_the_command_registers_and_leaves_the_comparison_out(tmp_path: Path, monkeypatch, capsys) -> None:
    given = []
    monkeypatch.setattr(published, "register", lambda: given.append("registered"))
    monkeypatch.setattr(published.command_line, "main", given.append)
    monkeypatch.setattr(sys, "argv", ["published", "recipe=parity_120m", "attention.name=published"])
    published.main()
    assert given[0] == "registered" and compose(given[1]).compare.arms is None
    for name in NAMES:
        monkeypatch.setattr(sys, "argv", ["published", "recipe=parity_120m", f"attention={name}"])
        published.main()
        assert dict(compose(given[-1]).attention) == {"name": name, "implementation": name}
    monkeypatch.setattr(sys, "argv", ["published", "--help"])
    published.main()
    assert given[-1] == ["--help"] and f"attention={noisy.NAME} " in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["published", "recipe=parity_120m", "attention=noisy", "compare.arms=[bf16,fa4]"])
    with pytest.raises(SystemExit, match=r"compare.arms=\[bf16,fa4\]: .* makes one run"):
        published.main()

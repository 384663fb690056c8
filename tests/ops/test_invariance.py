"""What the gradients must not depend on: the absolute size of d_o, and rows of it that are zero.

A mean loss leaves d_o of 1e-3 to 1e-7, and every last token, masked prompt and padding row leaves a row of zeros. The
same tests judge every scheme of the reference and every kernel.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import sagetrain
from sagetrain.ops import reference
from tests.kernelkit import (
    GRADIENT_KINDS,
    NAMES,
    RATIO,
    Case,
    check,
    check_lse,
    deterministic,
    error,
    exact,
    given,
    packed,
    run,
    same,
    silent,
)

T = 400
ISAS = ("avx512_vnni", "avx2", "portable")
GPU_KERNELS = ("sm80", "sm90")
KERNELS = [
    *(pytest.param(f"cpu/{isa}", id=isa) for isa in ISAS),
    *(pytest.param(f"cuda/{name}", id=name, marks=pytest.mark.gpu) for name in GPU_KERNELS),
]
POWERS = {torch.float32: (-40, -17, -1, 3, 20), torch.bfloat16: (-40, -17, -1, 3, 20), torch.float16: (-6, -1, 3, 6)}


def kernel(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable, str]:
    """(attention, device) of the kernel named; skips where this machine cannot run it."""
    device, which = name.split("/")
    if device == "cpu":
        monkeypatch.setenv("SAGETRAIN_CPU_ISA", which)
    try:
        chosen = sagetrain.kernel_name(device)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    if device == "cuda" and chosen != which:  # a process keeps the GPU kernel that it chose first
        pytest.skip(f"this process runs {chosen}: test_the_other_gpu_kernel has one for {which}")
    return deterministic, device


@pytest.fixture(params=[*(pytest.param(f"preset/{name}", id=name) for name in reference.PRESETS), *KERNELS])
def arm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable, str]:
    """(attention, device) of every preset and kernel."""
    kind, name = request.param.split("/")
    if kind == "preset":
        return lambda *x, **o: reference.attention(*x, preset=name, **o), "cpu"
    return kernel(request.param, monkeypatch)


@pytest.fixture(params=KERNELS)
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Callable, str]:
    return kernel(request.param, monkeypatch)


def gradients(attend: Callable, case: Case, d_o: Tensor, d_lse: Tensor | None, powers: tuple[int, ...]) -> list:
    """Gradients of q, k and v for d_o (and d_lse) times each power of two."""
    inputs = [x.requires_grad_() for x in case.tensors()[:3]]
    o, lse = attend(*inputs, return_lse=True, **case.options)
    outputs, given = ((o,), (d_o,)) if d_lse is None else ((o, lse), (d_o, d_lse))
    for power in powers:  # exactly so many times larger, or the test would measure itself
        assert torch.equal(d_o * 2.0**power / 2.0**power, d_o)
    return [
        torch.autograd.grad(outputs, inputs, [x * 2.0**power for x in given], retain_graph=True) for power in powers
    ]


def gradient_of_lse(case: Case, d_o: Tensor) -> Tensor:
    """As large as d_o, zero in every third row: rows of d_o and of this are zero together, alone, or not."""
    size = d_o.float().square().mean().sqrt() or 1
    d_lse = torch.randn(d_o.shape[:3], generator=torch.Generator().manual_seed(7)).to(case.device) * size
    d_lse[..., ::3] = 0
    return d_lse


@pytest.mark.parametrize("lse", [False, True], ids=["", "lse"])
@pytest.mark.parametrize("kind", ["normal", "heavy", *GRADIENT_KINDS, "none"])
@pytest.mark.parametrize("dtype", list(POWERS), ids=str)
def test_only_the_exponent_of_the_gradients_follows_that_of_d_o(arm, dtype, kind, lse):
    attend, device = arm
    if device == "cuda" and dtype == torch.float32:
        dtype, d = torch.bfloat16, 128  # GPU kernels take 16 bits: the other head dimension instead
    else:
        d = 64
    case = Case(tq=T, tk=T, d=d, dtype=dtype, kind="normal" if kind == "none" else kind, device=device)
    d_o = case.tensors()[3]
    if dtype == torch.float16:
        d_o = ((d_o.float() * 2**10).round() / 2**10).half()  # no digit is lost at the lowest power
    d_o = d_o * (kind != "none")
    d_lse = gradient_of_lse(case, d_o) if lse else None
    tiny = torch.finfo(dtype).tiny
    base, *others = gradients(attend, case, d_o, d_lse, (0, *POWERS[dtype]))
    for power, grads in zip(POWERS[dtype], others, strict=True):
        for name, got, one in zip(NAMES[1:], grads, base, strict=True):
            wanted = one * 2.0**power
            normal = (one.abs() > tiny) & (wanted.abs() > tiny)
            assert torch.equal(got[normal], wanted[normal]), f"{name} for d_o times 2^{power}"
            assert ((got - wanted)[~normal].abs() <= tiny).all(), f"{name} for d_o times 2^{power}, around zero"


def rows_of(case: Case, *rows: Tensor) -> list[Case]:
    """`case` with d_o zero outside each selection of query rows, and the case of those rows alone, by turns."""
    q, k, v, d_o = case.tensors()
    pairs = []
    for kept in rows:
        pairs.append(given(case, q, k, v, torch.where(kept[:, None].to(d_o.device), d_o, 0.0)))
        few = [x[:, :, kept].contiguous() for x in (q, d_o)]
        pairs.append(given(replace(case, tq=int(kept.sum())), few[0], k, v, few[1]))
    return pairs


@pytest.mark.parametrize("which", ["silent", "one", "prompt"])
@pytest.mark.parametrize("size", [1, 2.0**-20])
def test_a_row_without_gradient_has_no_say(arm, which, size):
    """As if its query were not there: nothing gets worse than that is, by RATIO."""
    attend, device = arm
    kept = torch.ones(T, dtype=torch.bool)
    kept[{"silent": silent(T), "one": slice(T - 1, T), "prompt": slice(0, T // 5 * 3)}[which]] = False
    case = Case(tq=T, tk=300, is_causal=False, dtype=torch.bfloat16, device=device)
    q, k, v, d_o = case.tensors()
    whole, rest = rows_of(given(case, q, k, v, d_o * size), kept)
    got, alone, truth = run(attend, whole), run(attend, rest), exact(rest)
    assert not got["d_q"][:, :, ~kept].any()
    for name in NAMES:
        found = error(got[name][:, :, kept] if name in ("o", "d_q") else got[name], truth[name])
        bar = RATIO * max(error(alone[name], truth[name]), torch.finfo(case.dtype).eps)
        assert found <= bar, f"{name}: {found:.2e} > {bar:.2e}"


def test_a_whole_tile_without_gradient_leaves_no_trace(compiled):
    """Tiles of 64 or 128 queries: the other tiles are the same without it. A GPU may add them in another order."""
    attend, device = compiled
    kept = torch.ones(T, dtype=torch.bool)
    kept[128:256] = False
    case = Case(tq=T, tk=300, is_causal=False, dtype=torch.bfloat16, device=device)
    got, alone = (run(attend, c) for c in rows_of(case, kept))
    assert torch.equal(got["d_q"][:, :, kept], alone["d_q"])
    for name in ("d_k", "d_v"):
        assert same(got[name], alone[name], to_the_bit=device == "cpu"), name


@pytest.mark.parametrize("kind", list(GRADIENT_KINDS))
def test_what_training_makes_of_d_o_is_as_accurate_as_the_preset(compiled, kind):
    """And so with a gradient of LSE, which rows without d_o may have. Causal, full and packed."""
    attend, device = compiled
    base = Case(hq=4, hkv=2, tq=T, tk=T, kind=kind, device=device)
    for case in (base, replace(base, d=128, is_causal=False), packed(base, [1, 0, 130, 269], [1, 0, 130, 269], 3, 5)):
        check(attend, case)
        check_lse(attend, case)


# ----------------------------------------------------------------------------------------------- what V is centred by

DTYPES = {"cpu": (torch.bfloat16, torch.float16, torch.float32), "cuda": (torch.bfloat16, torch.float16)}
CENTRED = Case(b=2, hq=4, hkv=2, tq=T, tk=T)
LONG = Case(hq=4, hkv=2, tq=2600, tk=2600)  # the CUDA kernels' means are of samples, and a block has many tiles to add
LENGTHS = [130, 0, 200, 5]
PACKED = packed(Case(hq=4, hkv=2, d=80), LENGTHS, LENGTHS, 3, 5)


def sequences(case: Case, x: Tensor) -> list[Tensor]:
    """`[H, T, D]` of each sequence, of what belongs to its keys."""
    return list(x) if case.cu_k is None else [x[0, :, a:b] for a, b in itertools.pairwise(case.cu_k)]


def sequence_of_key(case: Case) -> Tensor:
    """`[Tk, 1]`: its number, of a packed case."""
    inner = torch.tensor((case.cu_k or ())[1:-1], dtype=torch.int64, device=case.device)
    return torch.bucketize(torch.arange(case.tk, device=case.device), inner, right=True)[:, None]


def centres(case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the kernel saves for the backward to centre V by, `[sequences, Hkv, 1, D]`."""
    edges = case.options["cu_seqlens_q"], case.options["cu_seqlens_k"]
    return torch.ops.sagetrain.attention_forward(q, k, v, 0.125, True, *edges, False)[-1][1, :, :, None]


@pytest.mark.parametrize(
    "case",
    [CENTRED, replace(CENTRED, d=40), replace(CENTRED, d=128), LONG, PACKED],
    ids=["64", "40", "128", "long", "packed"],
)
def test_what_the_backward_centres_v_by_leaves_no_rounding(compiled, case):
    """V less its mean, in 16 bits, would be off by the same for many values: an error of dP that delta has not, so rows
    of dS would no longer sum to zero, in the same way in every sequence. Channels of large means are centred, of small
    ones not, and where one value alone is far from the mean, the first or the last, not either."""
    device = compiled[1]
    for dtype in DTYPES[device]:
        of_type = replace(case, dtype=dtype, device=device)
        q, k, v, _ = of_type.tensors()
        kind = torch.arange(case.d, device=device) % 5
        v = (v + torch.tensor([0.3, 20.0, -30.0, 40.0, 40.0], device=device)[kind]).to(dtype)
        for x in sequences(of_type, v):
            x[:, :1, kind == 3] = 0.01
            x[1, -1:, kind == 4] = -1.0
        for x, centre in zip(sequences(of_type, v.float()), centres(of_type, q, k, v), strict=True):
            if not x.numel():
                assert not centre.any()
                continue
            step = max(x.shape[-2] // 512, 1) if device == "cuda" else 1  # of samples: csrc/common/means.cuh
            mean = x[:, ::step].mean(-2, keepdim=True)  # the kernel's is not saved, and other in its last digits
            rtol = max(torch.finfo(dtype).eps, 1e-3)
            torch.testing.assert_close(centre, reference.centre_of(x, mean, dtype), rtol=rtol, atol=0)
            small, large, negative, first, last = (centre[..., kind == i] for i in range(5))
            assert not small.any() and not first.any() and not last[1].any()
            assert (large > 15).all() and (negative < -25).all() and (last[0] > 35).all()
            centred = x - centre
            assert dtype == torch.float32 or torch.equal(centred.to(dtype).float(), centred)


def test_v_is_centred_by_its_mean_or_near_it_or_not_at_all(compiled):
    """As far away as all of its values are between half and twice of what it is centred by, the reference alike."""
    device = compiled[1]
    alternating = torch.arange(T) % 2 * 2 - 1.0
    spread, wanted = [14, 18.5, 19], [32, 1.95 * (32 - 18.5), 0]
    channels = [sign * (32 + x * alternating) for sign in (1, -1) for x in spread]
    for tiny in (0, T // 2, T - 1):
        channels.append(torch.full((T,), 40.0))
        channels[-1][tiny] = 0.01
    wanted = torch.tensor([*wanted, *(-x for x in wanted), 0, 0, 0, *15 * [0]], device=device)
    for dtype in DTYPES[device]:
        v = torch.nn.functional.pad(torch.stack(channels, -1), (0, 15))[None, None].to(device, dtype)
        of_reference = reference.centre_of(v.float(), v.float().mean(-2, keepdim=True), dtype).flatten()
        assert torch.equal(of_reference.to(dtype).float(), of_reference)
        of_kernel = centres(Case(), torch.zeros_like(v), torch.zeros_like(v), v).flatten()
        for found in (of_reference, of_kernel):  # FP32: a sum has its own last digits
            torch.testing.assert_close(found, wanted.to(dtype).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("ratio", [1.65, 2.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [CENTRED, replace(CENTRED, d=128), PACKED], ids=["64", "128", "packed"])
def test_gradients_where_v_has_a_large_mean(compiled, case, dtype, ratio):
    """So many times the largest distance from it: just too small to be centred by, too small to be centred by itself,
    and large. dO has a mean too: all that a row of dP and delta have in common adds up, and has to cancel."""
    attend, device = compiled
    case = replace(case, dtype=dtype, device=device)
    q, k, v, d_o = (x.float() for x in case.tensors())
    mean = ratio * v.abs().amax(-2, keepdim=True)
    mean[:, 1] *= -1
    v = torch.where(sequence_of_key(case) < 2, v + mean, v - mean)
    check(attend, given(case, *(x.to(dtype) for x in (q, k, v, 1 + 0.05 * d_o))))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_v_is_centred_by_head_and_sequence(compiled, dtype):
    """Each as if it were alone. What one is centred by would round values of another."""
    attend, device = compiled
    case = replace(PACKED, dtype=dtype, device=device)
    q, k, v, d_o = case.tensors()
    large = 0.5 / torch.finfo(dtype).eps  # normal values beside it have a step of 1/2
    means = torch.tensor([[large, 0, 0, 0], [0, 0, -large, 0.0]], device=device)  # [head, sequence]
    v = (v + means[:, sequence_of_key(case)]).to(dtype)
    got = run(attend, given(case, q, k, v, d_o))
    for (start, end), head in itertools.product(itertools.pairwise(case.cu_k), range(2)):
        if start == end:
            continue
        heads = {"q": slice(2 * head, 2 * head + 2), "kv": slice(head, head + 1)}
        tensors = [x[:, heads[which], start:end] for x, which in ((q, "q"), (k, "kv"), (v, "kv"), (d_o, "q"))]
        one = Case(hq=2, hkv=1, tq=end - start, tk=end - start, d=case.d, dtype=dtype, device=device)
        for name, alone in run(attend, given(one, *tensors)).items():
            found = got[name][:, heads["q" if name in ("o", "d_q") else "kv"], start:end]
            assert same(found, alone, to_the_bit=False), f"{name} of head {head} and tokens {start} to {end}"


def test_a_mean_beyond_the_largest_half_is_taken_for_that(compiled):
    """A mean of samples, with what rounding lost in each tile, may be larger than every value."""
    attend, device = compiled
    case = Case(hq=1, tq=64, tk=4096, dtype=torch.float16, device=device, is_causal=False)
    q, k, v, d_o = case.tensors()
    v[:] = 65504 - 96
    v[:, :, ::8] = 65504  # the samples
    v[:, :, 5::128] -= 4864
    check(attend, given(case, q, k, v, d_o / 1024))
    one = torch.full((1, 1), 65504.0)
    assert reference.centre_of(one, one + 20, torch.float16) == 65504


@pytest.mark.parametrize("size", [2.0**-40, 2.0**10, 2.0**40])
def test_where_lse_alone_has_a_gradient_values_have_no_say(compiled, size):
    """However large they are: dP is 0 then, and not what a factor for it that is infinite would make of it."""
    attend, device = compiled
    case = Case(hq=2, hkv=1, tq=200, tk=200, dtype=torch.bfloat16, device=device)
    q, k, v, _ = case.tensors()
    found = []
    for values in v, size * v:
        inputs = [x.clone().requires_grad_() for x in (q, k, values)]
        found.append(torch.autograd.grad(attend(*inputs, return_lse=True, **case.options)[1].sum(), inputs))
    (d_q, d_k, d_v), (expected_q, expected_k, _) = reversed(found)
    assert error(d_q, expected_q) < 1e-2 and error(d_k, expected_k) < 1e-2 and not d_v.any()


@pytest.mark.gpu
@pytest.mark.skipif(bool(os.environ.get("SAGETRAIN_GPU_KERNEL")), reason="this is the run with one kernel")
@pytest.mark.parametrize("which", GPU_KERNELS)
def test_the_other_gpu_kernel(which):
    """The tests above, in a process whose kernel is `which`, where that is not this one's and the GPU can run it."""
    if sagetrain.kernel_name("cuda") == which:
        pytest.skip("the tests above ran it")

    def python(*command: str) -> subprocess.CompletedProcess:
        options = {"cwd": Path(__file__).parents[2], "env": os.environ | {"SAGETRAIN_GPU_KERNEL": which}, "text": True}
        return subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)

    can = python("-c", "import sagetrain; sagetrain.kernel_name('cuda')")
    if can.returncode and "no INT8 attention kernel" in can.stdout:
        pytest.skip(can.stdout.strip().splitlines()[-1])
    assert can.returncode == 0, can.stdout
    done = python("-m", "pytest", "-p", "no:cacheprovider", __file__, "-k", f"{which} and not other")
    assert done.returncode == 0 and "passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-6000:]

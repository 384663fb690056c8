"""The numbers of the CUDA kernels: every shape, dtype, kind of values and memory layout.

The bars are kernelkit's: exact FP64 on the same GPU is the truth, the plain reference's own error the yardstick. Where
rounding has no say (layouts, neighbours, tokens of no sequence) the same bits are asked for. What a CUDA op owes torch
and the machine is in test_gpu_runtime.py.
"""

import itertools
import math
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import numpy
import pytest
import torch
from torch import Tensor

import sagetrain
from sagetrain.ops import reference
from tests.kernelkit import (
    KINDS,
    NAMES,
    NEAREST,
    RATIO,
    SINKS,
    Case,
    assert_same,
    check,
    check_first_token,
    check_lse,
    deterministic,
    error,
    exact,
    given,
    packed,
    plain,
    preset_of,
    run,
    same,
    small_in_columns,
    small_in_rows,
    variants,
)  # fmt: skip

DEVICE = "cuda"
pytestmark = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16
BASE = Case(b=2, hq=4, hkv=2, tq=200, tk=200, device=DEVICE)
ONE = Case(hq=1, hkv=1, device=DEVICE)
both_backwards = pytest.mark.parametrize("attend", [sagetrain.attention, deterministic])


def case_of(tq: int, tk: int | None = None, d: int = 64, group: int = 2, **options: object) -> Case:
    """Queries (and keys) of a length. Short ones get many heads: an error over few numbers would be a game of dice."""
    tk = tk or tq
    hkv = max(1, min(math.ceil(128 / min(tq, tk)), 2**16 // max(tq, tk)))
    return Case(tq=tq, tk=tk, d=d, hq=group * hkv, hkv=hkv, device=DEVICE, **options)


DICE = random.Random(0)
MANY = [DICE.choice([0, 1, 5, 64, 100, 128, 130, 200]) for _ in range(40)]
TINY = [DICE.randint(0, 3) for _ in range(300)]
PACKED = [
    packed(BASE, [1, 0, 64, 235], [1, 0, 64, 235]),
    packed(BASE, [50, 0, 130], [1, 74, 70], lead=7, tail=10),  # the second has keys but no query
    packed(BASE, [70, 70, 60, 3], [0, 90, 0, 1], lead=3, tail=1),  # two have no key
    packed(replace(BASE, hkv=4), [0, 200, 0], [0, 150, 0]),
    packed(replace(BASE, hkv=1), [1500, 1, 127, 129, 300], [1500, 1, 127, 129, 300]),
    packed(BASE, MANY, [DICE.choice([n, n, 0, 3, 257]) for n in MANY], lead=1),
    packed(BASE, TINY, TINY[::-1], tail=200),
    packed(BASE, [0, 0], [0, 0], lead=100, tail=30),  # nothing at all
]
LENGTHS = [1, 2, 63, 64, 65, 127, 128, 129, 130, 200, 255, 257, 333, 511, 513, 1000, 2048]
RECTANGLES = [(1, 5000), (5000, 1), (300, 100), (100, 300), (64, 65), (129, 1), (2, 130), (1000, 77), (128, 640),
              (640, 128)]  # fmt: skip


def grid() -> list[Case]:
    cases = []
    for d, is_causal in itertools.product((64, 128), (True, False)):
        base, options = replace(BASE, d=d, is_causal=is_causal), {"d": d, "is_causal": is_causal}
        cases += variants(base, kind=list(KINDS), sigma=[3.0], hkv=[1, 4], hq=[8])
        cases += variants(replace(base, dtype=FP16), kind=list(KINDS), sigma=[3.0])
        cases += [case_of(t, **options) for t in LENGTHS]
        cases += [case_of(tq, tk, kind="biased", **options) for tq, tk in RECTANGLES]
        cases += [replace(case, dtype=dtype, **options) for case in PACKED for dtype in (BF16, FP16)]
    for d in (8, 40, 72, 96, 120):
        kinds = ("normal", "outlier", "biased", "zeros", "coherent")
        cases += [case_of(150, 170, d=d, dtype=dtype, kind=kind) for dtype in (BF16, FP16) for kind in kinds]
        cases += [replace(PACKED[1], d=d, is_causal=is_causal) for is_causal in (True, False)]
    return cases


LARGE = [
    Case(b=3, hq=8, hkv=2, tq=1000, tk=1100, d=128, sigma=3.0, dtype=FP16, kind="heavy", device=DEVICE),
    replace(ONE, hq=70000, hkv=70000, tq=3, tk=3),  # more heads than the second dimension of a grid can have
    replace(ONE, hq=2, tq=4096, tk=4096),
    replace(ONE, hq=2, tq=4096, tk=4096, d=128, dtype=FP16),
    replace(ONE, hq=2, hkv=2, tq=4096, tk=4000, d=128, is_causal=False, kind="outlier"),
    replace(ONE, tq=8192, tk=8192, is_causal=False, kind="biased", dtype=FP16),
    replace(ONE, hq=2, tq=8192, tk=8192, d=128, kind="heavy"),
    replace(ONE, tq=16384, tk=16384, sigma=3.0),
    replace(ONE, tq=16000, tk=16384, d=128),
]


@both_backwards
@pytest.mark.parametrize("case", [*grid(), *LARGE], ids=str)
def test_error_is_that_of_the_preset(case, attend):
    check(attend, case)


@st.composite
def any_case(draw: Callable) -> Case:
    lengths = st.integers(1, 150) | st.integers(1, 600)
    sigma, kind = draw(st.sampled_from([(0.1, "normal"), (3.0, "normal"), *((1.0, kind) for kind in KINDS)]))
    case = case_of(
        draw(lengths), draw(lengths), d=8 * draw(st.integers(1, 16)), group=draw(st.integers(1, 4)),
        dtype=draw(st.sampled_from([BF16, FP16])), sigma=sigma, kind=kind, seed=draw(st.integers(0, 9)),
        is_causal=draw(st.booleans()),
    )  # fmt: skip
    if draw(st.booleans()):
        return replace(case, b=draw(st.integers(1, 3)))
    n = draw(st.integers(1, 5))
    edges = (st.lists(st.integers(0, t), min_size=n + 1, max_size=n + 1) for t in (case.tq, case.tk))
    cu_q, cu_k = (tuple(sorted(draw(e))) for e in edges)
    return replace(case, cu_q=cu_q, cu_k=cu_k, hq=4 * case.hq, hkv=4 * case.hkv)


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(any_case(), st.sampled_from([sagetrain.attention, deterministic]))
def test_any_shape(case, attend):
    """Against the reference with the kernel's own tiles: what coarser tiles cost depends on the shape, and is held to
    the preset's error by the grid above. The smallest shapes have so few roundings that their error is a matter of
    luck (over seeds, 3e-3 to 8e-3 of dV for 58 tokens of 8 channels): none is held to less than an INT8 step."""
    check(attend, case, replace(preset_of(DEVICE), forward_keys=128), least=1 / 127)


@pytest.mark.parametrize("case", [
    replace(BASE, tq=1000, tk=1000), replace(BASE, tq=900, tk=1300, d=128, is_causal=False),
    replace(BASE, tq=3000, tk=3000, d=128, dtype=FP16, kind="biased"), PACKED[4],
], ids=str)  # fmt: skip
@both_backwards
def test_no_few_wrong_rows_hide_in_the_norm_of_all(case, attend):
    """Every 64 tokens of every head, by themselves, are within RATIO of the reference's error there."""

    def blocks(x: Tensor) -> Tensor:
        return torch.cat([part.norm(dim=(-2, -1)).flatten() for part in x.double().split(64, 2)])

    truth, got, expected = exact(case), run(attend, case), run(plain, case)
    for name, true in truth.items():
        rounding = torch.finfo(case.dtype).eps * blocks(true)
        bar = RATIO * torch.maximum(blocks(expected[name] - true), rounding)
        assert (blocks(got[name] - true) <= bar).all(), name


@pytest.mark.parametrize("case", [
    case_of(200), case_of(333, 450, d=128, group=4, dtype=FP16), case_of(300, 170, d=40, is_causal=False),
    *PACKED[:7], replace(PACKED[1], kind="biased", sigma=2.0, d=128), replace(PACKED[4], is_causal=False, dtype=FP16),
], ids=str)  # fmt: skip
@both_backwards
def test_lse_is_the_true_one_and_differentiable(case, attend):
    check_lse(attend, case)


@pytest.mark.parametrize("case", [
    BASE, PACKED[1], PACKED[5], case_of(100, 300, d=72, dtype=FP16),
    replace(BASE, hkv=1, tq=333, tk=333, d=128, is_causal=False, kind="outlier", dtype=FP16),
], ids=str)  # fmt: skip
def test_gpu_and_cpu_agree_within_their_rounding(case):
    """Independent rounding errors add in squares; where the two round alike they are closer."""
    truth, expected = exact(case), run(plain, case)
    got, cpu = run(sagetrain.attention, case), run(sagetrain.attention, replace(case, device="cpu"))
    for name in NAMES:
        other, rounding = cpu[name].to(DEVICE), torch.finfo(case.dtype).eps
        ours, theirs = (max(error(x, truth[name]), rounding) for x in (expected[name], other))
        assert error(got[name], other) <= math.hypot(RATIO * ours, theirs), name


@pytest.fixture(scope="module")
def sm80_process() -> Iterator[ProcessPoolExecutor]:
    """A process that runs the kernel sm80: each keeps the one that it chose first."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, os.putenv, ("SAGETRAIN_GPU_KERNEL", "sm80")) as pool:
        assert pool.submit(sagetrain.kernel_name, DEVICE).result() == "sm80"
        yield pool


def forward(case: Case) -> list[numpy.ndarray]:
    """o and lse of the case, as float32."""
    q, k, v, _ = case.tensors()
    return [x.float().cpu().numpy() for x in sagetrain.attention(q, k, v, return_lse=True, **case.options)]


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability()[0] != 9,
    reason="two kernels run on compute capability 9 only",
)
@pytest.mark.parametrize("case", [
    BASE, *PACKED, case_of(2048), case_of(1000, 300, d=72, dtype=FP16), case_of(1500, d=128, is_causal=False),
    case_of(700, d=128, kind="outlier"),
], ids=str)  # fmt: skip
def test_sm90_agrees_with_sm80(case, sm80_process):
    """The same queries, values and tiles of P; but 16 keys share a scale that in sm80 each has for itself. So what
    differs is the rounding of K: no more than all rounding costs."""
    q, k, v, _ = case.tensors()
    o, lse = sagetrain.attention(q, k, v, return_lse=True, **case.options)
    other, other_lse = (torch.from_numpy(x).to(DEVICE) for x in sm80_process.submit(forward, case).result())
    expected, expected_lse = plain(q, k, v, return_lse=True, **case.options)
    truth, true_lse = reference.exact(q, k, v, **case.options)
    assert error(o, other) <= RATIO * max(error(expected, truth), torch.finfo(BF16).eps)
    seen = true_lse > -math.inf
    for x in (lse, other_lse):
        assert torch.equal(seen, x > -math.inf)
    difference, rounding = (lse - other_lse)[seen].norm(), (expected_lse - true_lse)[seen].norm()
    halves = torch.finfo(FP16).eps * seen.sum() ** 0.5  # sm80 sums P in halves
    assert difference <= RATIO * rounding + halves


def test_scale_is_honoured():
    q, k, v, _ = replace(BASE, dtype=FP16).tensors()
    truth, _ = reference.exact(q, k, v, scale=0.3)
    bar = RATIO * error(plain(q, k, v, scale=0.3), truth)
    assert error(sagetrain.attention(q, k, v, scale=0.3), truth) <= bar


# ------------------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize(("scales", "dtype"), [
    ((1e2, 1e2, 1, 1), BF16), ((1e2, 1e2, 1, 1), FP16), ((1, 1, 1e4, 1), BF16), ((1, 1, 1e4, 1), FP16),
    ((1, 1, 1, 1e4), BF16), ((1, 1, 1, 1e3), FP16), ((10, 10, 1e4, 1e4), BF16), ((1, 1, 1e15, 1e15), BF16),
    ((1, 1, 1, 1e-6), BF16), ((1, 1, 1, 1e-6), FP16), ((1, 1, 1, 1e-7), FP16), ((1, 1, 1, 1e-30), BF16),
    ((1, 1, 1e-6, 1), FP16), ((1e-6, 1, 1, 1), FP16), ((0, 1, 1, 1), BF16), ((1, 0, 1, 1), FP16),
    ((1, 1, 0, 1), FP16), ((1, 1, 1, 0), BF16), ((0, 0, 0, 0), BF16),
], ids=str)  # fmt: skip
@both_backwards
def test_magnitudes_of_q_k_v_and_d_o(scales, dtype, d, attend):
    case = replace(BASE, tq=300, tk=300, d=d, dtype=dtype)
    check(attend, given(case, *(x * s for x, s in zip(case.tensors(), scales, strict=True))))


@both_backwards
@pytest.mark.parametrize("rows", [1, 8, 40])
@pytest.mark.parametrize("d", [64, 128])
def test_rows_of_very_different_size_in_one_tile(d, rows, attend):
    """q, k or d_o of a few tokens 2^-20 of the others', or zero: the small rows' own gradients keep their digits."""
    case = replace(BASE, tq=300, tk=300, d=d)
    for which, factor in itertools.product((0, 1, 3), (2.0**-20, 0.0)):
        tensors = list(case.tensors())
        tensors[which] = tensors[which].clone()
        tensors[which][:, :, 7 : 7 + 3 * rows : 3] *= factor
        odd = given(case, *tensors)
        check(attend, odd)
        truth, got, expected = exact(odd), run(attend, odd), run(plain, odd)
        for name in NAMES:
            x, y, z = (r[name][:, :, 7 : 7 + 3 * rows : 3] for r in (got, expected, truth))
            bar = RATIO * max(error(y, z), torch.finfo(case.dtype).eps)
            assert error(x, z) <= bar, f"{name}, {which} times {factor}: {error(x, z):.2e} > {bar:.2e}"


@pytest.mark.parametrize(
    ("name", "build"),
    [("o", small_in_rows), ("d_q", small_in_rows), ("d_k", small_in_columns), ("d_v", small_in_columns)],
)
@both_backwards
def test_small_numbers_are_right_on_average(name, build, attend):
    """Of P and dS, in each product: to the nearest integer all that are less than half a step would be 0."""
    case = build(0.4, FP16, DEVICE)
    keys = 1 if build is small_in_columns else slice(None)
    truth, nearest, got = (x[name][:, :, keys] for x in (exact(case), run(NEAREST, case), run(attend, case)))
    lost = error(nearest, truth)
    assert error(got, truth) < lost / 2, f"{error(got, truth):.2e}, to the nearest {lost:.2e}"


@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_of_very_large_scores_see_their_largest(is_causal):
    """A single key has all the weight, whatever digits a float has left for the others."""
    q = torch.randn(1, 1, 200, 64, generator=torch.Generator().manual_seed(0)).sign()
    k, v = q + 0.1 * q.flip(-1), torch.randn(1, 1, 200, 64, generator=torch.Generator().manual_seed(1))
    sizes = [1e2, 1e3] + [1e4, 1e6] * (sagetrain.kernel_name(DEVICE) == "sm90")
    for size in sizes:  # base-2 scores of 1e5 to 1e7, and beyond what a float holds to a unit
        case = given(
            replace(ONE, tq=200, tk=200, is_causal=is_causal), *(x.to(DEVICE, BF16) for x in (q * size, k * size, v, v))
        )
        q_, k_, v_, _ = case.tensors()
        o, lse = sagetrain.attention(q_, k_, v_, return_lse=True, **case.options)
        assert error(o, v_) < 0.02, size
        assert error(lse, reference.exact(q_, k_, v_, **case.options)[1]) < 0.02, size


@pytest.mark.parametrize("case", SINKS, ids=str)
def test_the_first_tokens_value_is_not_rounded(case):
    check_first_token(sagetrain.attention, replace(case, device=DEVICE))


@pytest.mark.parametrize("d", [64, 128])
@both_backwards
def test_keys_that_a_row_does_not_see_have_no_say_in_its_largest_score(d, attend):
    """The first row sees only the first key, which is far from its query, and long beside the keys that follow."""
    q = 5.0 * torch.randn(1, d, generator=torch.Generator().manual_seed(0)).sign().expand(130, d)
    k = torch.cat([-20 * q[:1], q[1:] * torch.linspace(0, 1, 129)[:, None]])
    v, d_o = torch.randn(2, 130, d, generator=torch.Generator().manual_seed(1))
    case = given(replace(ONE, d=d, hq=1), *(x[None, None].to(DEVICE, BF16) for x in (q, k, v, d_o)))
    truth, got = exact(case), run(attend, case)
    assert error(got["o"][:, :, 0], truth["o"][:, :, 0]) < 0.02
    assert error(got["d_v"][:, :, 0], truth["d_v"][:, :, 0]) < 0.02
    true_lse, lse, expected = (
        call(*case.tensors()[:3], return_lse=True, **case.options)[1]
        for call in (lambda *x, return_lse, **o: reference.exact(*x, **o), attend, plain)
    )
    assert error(lse, true_lse) <= RATIO * error(expected, true_lse)


@pytest.mark.parametrize("is_causal", [True, False])
@both_backwards
def test_a_scale_of_zero_makes_attention_the_mean(is_causal, attend):
    case = replace(BASE, is_causal=is_causal)
    q, k, v, d_o = (x.requires_grad_() for x in case.tensors())
    o, lse = attend(q, k, v, is_causal=is_causal, scale=0.0, return_lse=True)
    o.backward(d_o)
    count = torch.arange(1, 201, device=DEVICE).expand_as(lse) if is_causal else torch.full_like(lse, 200)
    values = v.detach().double().repeat_interleave(2, 1)
    mean = values.cumsum(2) / count[..., None] if is_causal else values.mean(2, keepdim=True).expand_as(values)
    assert error(o, mean) < 0.02 and torch.allclose(lse, count.log().float(), atol=0.02)
    assert not q.grad.any() and not k.grad.any() and v.grad.isfinite().all()


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e4, 1e30])
@pytest.mark.parametrize("t", [1, 70, 300])
def test_constant_inputs_stay_finite(value, t):
    q, k, v = (torch.full((1, 2, t, 64), value, dtype=BF16, device=DEVICE, requires_grad=True) for _ in range(3))
    o = sagetrain.attention(q, k, v, is_causal=True)
    o.backward(torch.ones_like(o))
    assert all(x.isfinite().all() for x in (o, q.grad, k.grad, v.grad))
    assert error(o, torch.full_like(o, value)) <= torch.finfo(BF16).eps  # an average of equal values is that value


@pytest.mark.parametrize(
    "case", [PACKED[1], replace(PACKED[1], d=128, is_causal=False), PACKED[2], PACKED[5], PACKED[7]], ids=str
)
@both_backwards
def test_tokens_of_no_sequence_and_rows_that_see_nothing(case, attend):
    """o = 0, LSE = -inf, zero gradients; NaN in a token of no sequence reaches nobody."""
    q, k, v, d_o = case.tensors()
    clean = run(attend, case)
    dead_q, dead_k = (torch.ones(t, dtype=torch.bool, device=DEVICE) for t in (case.tq, case.tk))
    for (q0, q1), (k0, k1) in zip(itertools.pairwise(case.cu_q), itertools.pairwise(case.cu_k), strict=True):
        missing = (q1 - q0) - (k1 - k0)  # causal: so many rows stand before the first key
        dead_q[q0:q1] = torch.arange(q1 - q0, device=DEVICE) < missing if case.is_causal else k0 == k1
        dead_k[k0:k1] = q0 == q1
    assert dead_q.any() and not clean["o"][:, :, dead_q].any() and not clean["d_q"][:, :, dead_q].any()
    assert dead_k.any() and not clean["d_k"][:, :, dead_k].any() and not clean["d_v"][:, :, dead_k].any()
    _, lse = attend(q, k, v, return_lse=True, **case.options)
    assert (lse[:, :, dead_q] == -torch.inf).all() and lse[:, :, ~dead_q].isfinite().all()
    for x, edges in ((q, case.cu_q), (k, case.cu_k), (v, case.cu_k), (d_o, case.cu_q)):
        x[:, :, : edges[0]] = x[:, :, edges[-1] :] = math.nan
    assert_same(run(attend, given(case, q, k, v, d_o)), clean, case, attend is deterministic)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", ["q", "k", "v", "d_o"])
@pytest.mark.parametrize("case", [replace(BASE, tq=300, tk=300), packed(BASE, [100, 101, 99], [100, 101, 99])], ids=str)
@pytest.mark.parametrize("token", [0, 50])
@both_backwards
def test_non_finite_input_shows_where_it_matters_and_nowhere_else(case, which, bad, token, attend):
    """In head 1 of the last batch entry (of the middle sequence). Query heads 0 and 1 share key head 0, 2 and 3 key
    head 1."""
    clean, tensors = run(attend, case), dict(zip(("q", "k", "v", "d_o"), case.tensors(), strict=True))
    tensors[which][-1, 1, (case.cu_q[1] if case.cu_q else 0) + token, 3] = bad
    broken = given(case, *tensors.values())
    got, truth = run(attend, broken), exact(broken)
    heads_q, heads_kv = ([1], [0]) if which in ("q", "d_o") else ([2, 3], [1])
    sequence = slice(*case.cu_q[1:3]) if case.cu_q else slice(None)
    for name in NAMES:
        reached = torch.zeros_like(got[name], dtype=torch.bool)
        reached[-1, heads_q if name in ("o", "d_q") else heads_kv, sequence] = True
        assert same(got[name][~reached], clean[name][~reached], attend is deterministic or name == "o"), name
    assert not got["o"][~truth["o"].isfinite()].isfinite().any()
    assert (which == "d_o") == got["o"].isfinite().all()
    assert not all(got[name].isfinite().all() for name in NAMES[1:])


@pytest.mark.parametrize("which", ["k", "v"])
def test_non_finite_tokens_show_between_the_samples_of_the_means(which):
    """Means of long sequences are of every n-th token: a token between them is seen all the same."""
    case = case_of(5000, d=128)
    tensors = dict(zip(("q", "k", "v", "d_o"), case.tensors(), strict=True))
    tensors[which][:, :, 4001] = math.nan
    o = sagetrain.attention(tensors["q"], tensors["k"], tensors["v"], is_causal=True)
    assert not o[:, :, 4001:].isfinite().any()


def test_a_key_that_is_not_finite_reaches_no_row_that_sees_neither_it_nor_keys_of_its_scale():
    """Rows that see no key at all, though others of their block do, and rows before a key that no mean has."""
    q, k, v, _ = replace(ONE, tq=200, tk=100).tensors()
    k[0, 0, 50, 3] = math.nan
    o, lse = sagetrain.attention(q, k, v, is_causal=True, return_lse=True)
    assert not o[0, :, :100].any() and (lse[0, :, :100] == -math.inf).all() and not o[0, 0, 150:].isfinite().any()
    q, k, v, _ = case_of(5000, d=128).tensors()
    k[:, :, 4039] = math.nan
    o = sagetrain.attention(q, k, v, is_causal=True)
    assert o[:, :, :4038].isfinite().all() and not o[:, :, 4039:].isfinite().any()


@pytest.mark.parametrize("d", [64, 128])
def test_means_of_samples_are_as_good_as_of_all_tokens(d):
    """Values that drift along a long sequence, far from zero."""
    base = replace(case_of(6000, d=d), hq=2, hkv=1)
    q, k, v, d_o = base.tensors()
    drift = torch.linspace(-1, 1, 6000, device=DEVICE)[:, None] + 4
    check(sagetrain.attention, given(base, q, (k + drift).to(k.dtype), (v + drift).to(v.dtype), d_o))


# ------------------------------------------------------------------------------------------------------------ layouts


def inside(x: Tensor, tokens: int, channels: int, offset: int) -> Tensor:
    """x as a view into a buffer of NaN that has more tokens and channels."""
    b, h, t, d = x.shape
    buffer = x.new_full((b, h, t + tokens, d + channels), math.nan)
    return buffer[:, :, offset : offset + t, offset : offset + d].copy_(x)


LAYOUTS = {
    "tokens before heads": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),  # as Hugging Face models make it
    "batch after tokens": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "padded rows": lambda x: inside(x, 130, 64, 0),
    "rows of odd length, not on 16 bytes": lambda x: inside(x, 3, 3, 1),
    "rows of 16 bytes, not on 16 bytes": lambda x: inside(x, 3, 8, 1),
}
SHAPES = [
    BASE, PACKED[1], replace(PACKED[1], d=40, dtype=FP16),
    replace(BASE, hq=3, hkv=3, tq=130, tk=300, d=128, dtype=FP16, is_causal=False),
]  # fmt: skip


@both_backwards
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_strides_and_alignment_do_not_matter(case, layout, attend):
    tensors = [LAYOUTS[layout](x) for x in case.tensors()]
    assert_same(run(attend, given(case, *tensors)), run(attend, case), case, attend is deterministic)


def test_slices_of_one_projection():
    q, k, v, d_o = BASE.tensors()
    fused = torch.cat([x.transpose(1, 2) for x in (q, k, v)], 2).transpose(1, 2)
    assert_same(run(deterministic, given(BASE, *fused.split([4, 2, 2], 1), d_o)), run(deterministic, BASE))


@pytest.mark.parametrize("expand", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_expanded_inputs_and_gradients(expand):
    """Dimensions with stride zero, as a sum (all of them) or a mean over tokens leaves them."""
    case = replace(BASE, b=3, hkv=4, d=128)
    q, k, v, d_o = case.tensors()
    for dim in expand:
        d_o = d_o.narrow(dim, 0, 1)
    expanded = (q[:1].expand_as(q), k[:, :1].expand_as(k), v[:, :1].expand_as(v), d_o.expand_as(q))
    dense = given(case, *(x.contiguous() for x in expanded))
    assert_same(run(deterministic, given(case, *expanded)), run(deterministic, dense))


@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 0, 5), (1, 5, 0)])
def test_empty_batch_queries_or_keys(shape):
    b, tq, tk = shape
    q, k, v = (torch.randn(b, 2, t, 64, device=DEVICE).to(BF16).requires_grad_() for t in (tq, tk, tk))
    o, lse = sagetrain.attention(q, k, v, return_lse=True)
    o.sum().backward()
    assert o.shape == q.shape and not o.any() and (lse == -torch.inf).all()
    assert all(x.grad.shape == x.shape and not x.grad.any() for x in (q, k, v))


def test_no_sequence_at_all():
    q = torch.randn(1, 2, 5, 64, device=DEVICE).to(BF16).requires_grad_()
    edges = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    o = sagetrain.attention(q, q, q, cu_seqlens_q=edges, cu_seqlens_k=edges)
    o.sum().backward()
    assert not o.any() and not q.grad.any()

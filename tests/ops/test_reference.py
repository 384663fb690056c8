"""The reference against finite differences, closed forms, and the project's accuracy bars."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import accuracy
from sagetrain.ops import reference
from sagetrain.ops.signs import PATTERNS, drawn, signs
from tests.kernelkit import COHERENT_KINDS, GRADIENT_KINDS, NAMES, RATIO, Case, error, exact, given, plain, run


def test_exact_gradients_match_finite_differences():
    q, k, v = (torch.randn(1, h, 5, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    assert torch.autograd.gradcheck(lambda *x: reference.exact(*x, is_causal=True), (q, k, v))


@pytest.fixture(params=list(reference.PRESETS))
def unrounded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> reference.Preset:
    """Every preset with no operand rounded to 8 bits."""
    monkeypatch.setattr(reference, "int8", lambda x, scale: x / scale)  # what `paper` rounds by
    return replace(reference.PRESETS[request.param], exact=frozenset(reference.OPERANDS))


@pytest.mark.parametrize("is_causal", [True, False])
def test_preset_gradients_are_those_of_attention_when_rounding_vanishes(unrounded, is_causal):
    """With 8-bit rounding replaced by none, every preset must be attention itself, in all four results and the LSE."""
    case = Case(b=2, hq=4, hkv=2, tq=70, tk=90, d=40, is_causal=is_causal, dtype=torch.float32)
    truth = exact(case)
    got = run(partial(reference.attention, preset=unrounded), case)
    for name in NAMES:
        assert error(got[name], truth[name]) < 1e-5, name


def test_lse_and_its_gradient_when_rounding_vanishes(unrounded):
    case = Case(tq=50, tk=70, dtype=torch.float32, kind="biased")
    q, k, v, _ = case.tensors()
    weight = torch.randn(1, 2, 50)
    results = {}
    for name, call in (
        ("exact", reference.exact),
        ("preset", partial(reference.attention, preset=unrounded, return_lse=True)),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        _, lse = call(*inputs, **case.options)
        results[name] = lse, *torch.autograd.grad((lse * weight).sum(), inputs[:2])
    for a, b in zip(results["preset"], results["exact"], strict=True):
        assert error(a, b) < 1e-5


KINDS = ["normal", "sigma 3", "outlier", "biased", "heavy", "sink", *GRADIENT_KINDS, *COHERENT_KINDS]


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_sage_is_better_than_published(d, is_causal, kind):
    """The accuracy bars of docs/numerics.md, on FP32 results: their own rounding does not hide the scheme's.

    0.6x of the published error for every gradient; 0.8x at sigma 3, of channels that move together and of a sink. O is
    held to 0.8x throughout: what is left of its error is 8 bits of P and V, which both presets share (docs/numerics.md
    has the measured ratios). But of a sink O, dQ and dK are a tenth of it: its value is rounded there and is not here,
    and nor is what else its rows see by the scale of its weight.
    """
    case = Case(tq=1024, tk=1024, d=d, is_causal=is_causal, dtype=torch.float32)
    case = replace(case, sigma=3.0) if kind == "sigma 3" else replace(case, kind=kind)
    truth = exact(case)
    sage, paper = (run(lambda *x, p=p, **o: reference.attention(*x, preset=p, **o), case) for p in ("sage", "paper"))
    ratios = {name: error(sage[name], truth[name]) / error(paper[name], truth[name]) for name in NAMES}
    loose = kind in ("sigma 3", "sink") or kind in COHERENT_KINDS
    bars = {name: 0.8 if loose or name == "o" else 0.6 for name in NAMES}
    if kind == "sink":
        bars |= dict.fromkeys(("o", "d_q", "d_k"), 0.1)
    assert all(ratios[name] <= bars[name] for name in NAMES), ratios


def test_activations_are_judged_by_kv_head():
    """By what is computed of that head alone, with d_o's own scale and zero rows."""
    case = Case(hq=4, hkv=2, tq=150, tk=150, kind="masked", dtype=torch.float32)
    tensors = dict(zip(("q", "k", "v", "d_o"), case.tensors(), strict=True))
    rows = accuracy.activations({3: tensors}, "cpu", torch.float32)
    assert len(rows) == 2 * 4
    one = given(replace(case, hq=2, hkv=1), *(x.chunk(2, 1)[1].contiguous() for x in case.tensors()))
    truth, paper = exact(one), run(lambda *x, **o: plain(*x, preset="paper", **o), one)
    for row, name in zip(rows[4:], NAMES, strict=True):
        assert row["case"] == "activations, layer 3, head 1" and row["result"] == name
        assert row["paper_error"] == pytest.approx(error(paper[name], truth[name]), abs=1e-5)


@pytest.mark.parametrize("tokens", [1, 63, 64, 150])
def test_shared_scales_are_those_of_the_group(tokens):
    x = torch.rand(2, tokens, 8)
    group = [(i // 64, i // 2 % 4) for i in range(tokens)]
    for i, amax in enumerate(reference.shared_amax(x).unbind(1)):
        assert torch.equal(amax[:, 0], x[:, [g == group[i] for g in group]].amax((1, 2)))


@pytest.mark.parametrize("sigma", [1, 3])
def test_shared_scales_cost_less_than_a_kernel_may(sigma):
    """`sage_sm90` is itself within RATIO of `sage`; and it is not the same."""
    case = Case(hq=2, hkv=1, tq=1024, tk=1024, sigma=sigma, dtype=torch.float32)
    truth, sage, shared = exact(case), run(plain, case), run(lambda *x, **o: plain(*x, preset="sage_sm90", **o), case)
    for name in NAMES:
        assert error(shared[name], truth[name]) / error(sage[name], truth[name]) <= RATIO, name
        assert not torch.equal(shared[name], sage[name]), name  # of dV the sign of the difference is luck
    assert error(shared["o"], truth["o"]) > error(sage["o"], truth["o"])


@pytest.mark.parametrize("scores", [2**20, 2 * 4 * 70 * 70])
def test_rows_of_a_batch_are_computed_as_alone(scores, monkeypatch):
    """All at a time, and two."""
    monkeypatch.setitem(reference.SCORES, "cpu", scores)
    case = Case(b=5, hq=4, hkv=2, tq=70, tk=70)
    together, tensors = run(plain, case), case.tensors()
    for row in range(case.b):
        alone = run(plain, given(replace(case, b=1), *(x[row : row + 1] for x in tensors)))
        assert all(error(together[name][row : row + 1], alone[name]) < 1e-3 for name in NAMES)


def test_the_signs_are_those_of_the_kernels():
    header = (Path(__file__).parents[2] / "csrc" / "signs.h").read_text()
    words = [int(word, 16) for word in re.findall(r"0x[0-9a-f]{16}", header)]
    assert [low | high << 64 for low, high in zip(words[::2], words[1::2], strict=True)] == list(PATTERNS)


def test_each_sequence_and_head_draws_other_signs():
    """All patterns come, whatever the size of the mean keys is; the same mean key draws the same."""
    k_mean = torch.randn(4000, 1, 64) * 2.0 ** torch.randint(-20, 5, (4000, 1, 1))
    found = drawn(k_mean)
    assert found.bincount(minlength=32).min() > 4000 / 32 / 2 and len(PATTERNS) == 32
    assert torch.equal(drawn(k_mean), found) and torch.equal(drawn(k_mean[..., :2]), found)


@pytest.mark.parametrize("size", [64, 128])
def test_no_two_rotations_are_the_same(size):
    """But for the order of the channels, in which they would round alike."""
    every = signs(size, torch.zeros(1))
    alike = (every[:, None] * every) @ reference.hadamard(size, every)
    alike[range(32), range(32)] = 0
    assert alike.abs().max() <= size * 0.75


def test_thresholds_are_exact_and_spread_evenly():
    """Odd multiples of 2^-13, each once among 4096 neighbours; few neighbours leave no gap twice their share."""
    content = torch.randn(3, 50, 1)
    found = reference.thresholds(content, 2 * 4096).double() * 2**13
    every = torch.arange(-4095, 4096, 2).double().expand(3, 50, -1)
    for start in (0, 777, 4096):
        assert torch.equal(found[..., start : start + 4096].sort().values, every)
    for count in (16, 32, 64):
        few = found[..., 999 : 999 + count].sort().values
        gaps = torch.cat([few.diff(), few[..., :1] + 8192 - few[..., -1:]], -1)
        assert gaps.max() < 2 * 8192 / count
    assert len({tuple(row) for row in found[..., :2].flatten(0, 1).tolist()}) > 140  # by the content, not the place
    assert torch.equal(reference.thresholds(content, 2 * 4096).double() * 2**13, found)


@pytest.mark.parametrize(("operand", "levels"), [("p", 255), ("p_dv", 255), ("ds_dq", 127), ("ds_dk", 127)])
def test_small_numbers_are_right_on_average_and_others_nearest(operand, levels):
    below = reference.DITHERED_BELOW[levels]
    small = torch.cat([torch.rand(40, 1) * below, -torch.rand(40, 1) * below])
    integers = partial(reference.SAGE.integers, operand, levels=levels, content=torch.randn(80, 1))
    found = integers(small.expand(-1, 4096))
    assert ((found.mean(-1, keepdim=True) - small).abs() < 1 / 4096).all()
    assert ((found - small).abs() < 1).all()
    large = torch.cat([torch.linspace(below, levels, 79), torch.tensor([levels])])[:, None].expand(-1, 4096)
    for signed in (large, -large, 0 * large):
        assert torch.equal(integers(signed), signed.round())
    assert integers(torch.full((80, 5), torch.nan)).isnan().all()


@pytest.mark.parametrize("preset", list(reference.PRESETS))
def test_autocast_casts_the_inputs_and_leaves_the_maths_alone(preset):
    """Its products in BF16 would be another rounding, of integers too, and in the backward as well."""
    q, k, v, d_o = Case(dtype=torch.float32).tensors()

    def results(dtype: torch.dtype, autocast: bool) -> tuple[torch.Tensor, ...]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            o = reference.attention(*inputs, preset=preset, is_causal=True)
            return o, *(x.bfloat16() for x in torch.autograd.grad(o, inputs, d_o.to(o.dtype)))

    for cast, wanted in zip(results(torch.float32, True), results(torch.bfloat16, False), strict=True):
        assert cast.dtype == torch.bfloat16 and torch.equal(cast, wanted)


def test_meta_tensors_have_shapes_and_no_autocast():
    q = torch.empty(1, 2, 7, 64, device="meta", requires_grad=True)
    o = reference.attention(q, q, q)
    o.sum().backward()
    assert o.shape == q.shape == q.grad.shape


def test_ds_rowsum_residual_is_small_and_real():
    q, k, v, d_o = Case(hq=4, hkv=2).tensors()
    residual, paper = (reference.ds_rowsum_residual(q, k, v, d_o, preset=name) for name in ("sage", "paper"))
    assert 0 < residual < 0.2 and 0 < paper < 0.2 and residual != paper
    assert reference.ds_rowsum_residual(q, k, v, torch.zeros_like(d_o)) == 0
    assert 0 < reference.ds_rowsum_residual(q, k, v[..., :32], d_o[..., :32]) < 0.2  # values of another width

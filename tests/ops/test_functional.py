"""`sagetrain.attention` as a user calls it: right on every shape, and refusing the rest in words."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

import sagetrain
from sagetrain.ops import reference
from tests.kernelkit import KINDS, Case, check, check_lse, error, exact, run, variants

BASE = Case()
GRID = [
    BASE,
    *variants(BASE, d=[8, 40, 72, 128], tq=[1, 65, 257], tk=[1, 200], is_causal=[False], b=[3],
              kind=list(KINDS)[1:], sigma=[3.0], dtype=[torch.float16, torch.float32]),
    Case(b=2, hq=6, hkv=2, tq=100, tk=300, d=128, is_causal=False, kind="biased"),
    Case(tq=300, tk=100),  # causal with more queries than keys: the first 200 rows see nothing
    Case(hq=4, hkv=4, tq=300, tk=300, cu_q=(0, 1, 1, 65, 300), cu_k=(0, 1, 1, 65, 300)),
    Case(hq=4, hkv=1, tq=200, tk=150, is_causal=False, cu_q=(10, 60, 60, 190), cu_k=(5, 6, 80, 150)),
    Case(tq=200, tk=150, cu_q=(0, 0, 200, 200), cu_k=(0, 0, 150, 150)),
]  # fmt: skip


@pytest.mark.parametrize("case", GRID, ids=str)
def test_error_is_that_of_the_preset(case):
    check(sagetrain.attention, case)


@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(st.data())
def test_any_shape(data):
    hkv, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    case = Case(
        b=data.draw(st.integers(1, 2)), hq=hkv * group, hkv=hkv,
        tq=data.draw(st.integers(1, 150)), tk=data.draw(st.integers(1, 150)), d=8 * data.draw(st.integers(1, 16)),
        is_causal=data.draw(st.booleans()), sigma=data.draw(st.sampled_from([0.1, 1.0, 3.0])),
        dtype=data.draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32])),
        kind=data.draw(st.sampled_from(["normal", "outlier", "biased", "heavy"])), seed=data.draw(st.integers(0, 9)),
    )  # fmt: skip
    if data.draw(st.booleans()):
        n = data.draw(st.integers(1, 4))
        edges = [
            tuple(sorted(data.draw(st.lists(st.integers(0, t), min_size=n + 1, max_size=n + 1))))
            for t in (case.tq, case.tk)
        ]
        case = replace(case, b=1, cu_q=edges[0], cu_k=edges[1])
    check(sagetrain.attention, case)


@pytest.mark.parametrize("case", [BASE, Case(tq=70, tk=190, kind="biased", sigma=2.0), Case(tq=90, tk=40)], ids=str)
def test_lse_is_the_true_one_and_differentiable(case):
    check_lse(sagetrain.attention, case)


def test_strides_need_no_copy_and_do_not_matter():
    q, k, v, d_o = BASE.tensors()
    plain = run(sagetrain.attention, BASE)

    def transposed(x: Tensor) -> Tensor:  # memory order [B, T, H, D], as Hugging Face models make it
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    fused = torch.cat([q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)], 2).transpose(1, 2).detach()
    for inputs in ([transposed(x) for x in (q, k, v)], list(fused.split([BASE.hq, BASE.hkv, BASE.hkv], 1))):
        inputs = [x.detach().requires_grad_() for x in inputs]
        o = sagetrain.attention(*inputs, is_causal=True)
        assert torch.equal(o, plain["o"])
        for name, grad in zip(("d_q", "d_k", "d_v"), torch.autograd.grad(o, inputs, transposed(d_o)), strict=True):
            assert torch.equal(grad, plain[name])
    assert sagetrain.attention(*(transposed(x) for x in (q, k, v))).stride() == transposed(q).stride()


def test_expanded_keys_and_expanded_gradients():
    q, k, v, _ = Case(hq=4, hkv=4).tensors()
    k, v = k[:, :1].expand(-1, 4, -1, -1), v[:, :1].expand(-1, 4, -1, -1)
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    sagetrain.attention(*inputs, is_causal=True).sum().backward()
    dense = [x.detach().contiguous().requires_grad_() for x in (q, k, v)]
    sagetrain.attention(*dense, is_causal=True).sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(inputs, dense, strict=True))


def test_inputs_are_not_modified_and_calls_repeat_to_the_bit():
    case = Case(b=2, hq=4, hkv=2, tq=333, tk=333)
    before = case.tensors()
    first, second = (
        run(sagetrain.attention, case),
        run(lambda *x, **o: sagetrain.attention(*x, deterministic=True, **o), case),
    )
    assert all(torch.equal(first[n], second[n]) for n in first)
    q, k, v, _ = (x.clone() for x in before)
    sagetrain.attention(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), before, strict=False))


@pytest.mark.parametrize(("width", "v_width"), [(64, 40), (24, 16), (40, 72)])
def test_values_of_another_width(width, v_width):
    """Narrower or wider values (latent attention): to the bit what zeros beside them give, at q's own scale."""
    wide = max(width, v_width)
    q, k, v, d_o = (x.detach() for x in replace(BASE, d=wide).tensors())
    q[..., width:], k[..., width:], v[..., v_width:], d_o[..., v_width:] = 0, 0, 0, 0
    found = []
    for w, vw, scale in ((width, v_width, None), (wide, wide, width**-0.5)):
        inputs = [x[..., :w].clone().requires_grad_() for x in (q, k)] + [v[..., :vw].clone().requires_grad_()]
        o, lse = sagetrain.attention(*inputs, is_causal=True, return_lse=True, scale=scale)
        found.append((o, lse, *torch.autograd.grad(o, inputs, d_o[..., :vw])))
    assert found[0][0].shape[-1] == v_width
    assert all(torch.equal(a, b[..., : a.shape[-1]]) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_number_of_threads_changes_nothing_but_rounding(threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        check(sagetrain.attention, Case(tq=300, tk=300))
    finally:
        torch.set_num_threads(before)


def test_python_threads_at_once_and_a_fork():
    """Four threads get the bits of one; a child forked after the parent's first call can call, too (with one thread:
    torch's own pool does not survive a fork, SDPA hangs there as well)."""
    q, *_ = Case(hq=4, hkv=4, tq=300, tk=300, dtype=torch.float32).tensors()

    def call(_: object = None) -> Tensor:
        x = q.clone().requires_grad_()
        return torch.autograd.grad(sagetrain.attention(x, x, x, is_causal=True).square().sum(), x)[0]

    wanted = call()
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(wanted, got) for got in pool.map(call, range(40)))
    if (child := os.fork()) == 0:
        torch.set_num_threads(1)
        with torch.no_grad():
            os._exit(0 if sagetrain.attention(q, q, q).isfinite().all() else 1)
    for _ in range(2400):
        if (found := os.waitpid(child, os.WNOHANG))[0]:
            break
        time.sleep(0.1)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hangs")
    assert os.waitstatus_to_exitcode(found[1]) == 0


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_constant_and_extreme_inputs_stay_finite(value, dtype):
    q, k, v = (torch.full((1, 2, 70, 64), value, dtype=dtype, requires_grad=True) for _ in range(3))
    o = sagetrain.attention(q, k, v, is_causal=True)
    o.backward(torch.ones_like(o))
    assert all(x.isfinite().all() for x in (o, q.grad, k.grad, v.grad))
    # An average of equal values is that value, but for summing T of them in FP32 and rounding once to the dtype.
    bar = max(q.shape[2] * torch.finfo(torch.float32).eps, torch.finfo(dtype).eps)
    assert error(o, torch.full_like(o, value)) <= bar


@pytest.mark.parametrize("magnitude", [1e4, 1e15, 1e30])
def test_large_random_inputs_never_give_nan(magnitude):
    q, k, v, _ = Case(dtype=torch.float32).tensors()
    o = sagetrain.attention(q * magnitude, k * magnitude, v * magnitude, is_causal=True)
    assert o.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("token", [0, 40])
def test_non_finite_input_shows_where_it_matters(bad, which, token):
    """What it makes NaN in exact attention is not finite here either; other batch entries and heads are untouched."""
    q, k, v, _ = Case(b=2, hq=2, hkv=2, tq=80, tk=80).tensors()
    clean = sagetrain.attention(q, k, v, is_causal=True)
    (q, k, v)[which][0, 1, token, 3] = bad
    o = sagetrain.attention(q, k, v, is_causal=True)
    truth, _ = reference.exact(q, k, v, is_causal=True)
    assert not truth.isfinite().all() and not o[~truth.isfinite()].isfinite().any()
    assert torch.equal(o[1], clean[1]) and torch.equal(o[0, 0], clean[0, 0])


def test_rows_that_see_nothing():
    case = Case(tq=90, tk=40)
    q, k, v, d_o = case.tensors()
    inputs = [x.requires_grad_() for x in (q, k, v)]
    o, lse = sagetrain.attention(*inputs, is_causal=True, return_lse=True)
    o.backward(d_o)
    assert (o[:, :, :50] == 0).all() and (lse[:, :, :50] == -torch.inf).all() and (q.grad[:, :, :50] == 0).all()
    k.detach()[:, :, 20, 3] = torch.nan
    o, lse = sagetrain.attention(q, k, v, is_causal=True, return_lse=True)
    assert (o[:, :, :50] == 0).all() and (lse[:, :, :50] == -torch.inf).all() and not o[:, :, 70:].isfinite().any()


def test_empty_batch_queries_or_keys():
    for b, tq, tk in ((0, 5, 5), (1, 0, 5), (1, 5, 0)):
        q, k, v = (torch.randn(b, 2, t, 64, requires_grad=True) for t in (tq, tk, tk))
        o = sagetrain.attention(q, k, v)
        o.sum().backward()
        assert o.shape == q.shape and (o == 0).all() and k.grad.shape == k.shape


def test_autocast_casts_as_sdpa_does():
    q, k, v = (x.float() for x in BASE.tensors()[:3])
    with torch.autocast("cpu", torch.bfloat16):
        o = sagetrain.attention(q, k, v.bfloat16())
    assert o.dtype == torch.bfloat16 and torch.equal(o, sagetrain.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def test_meta_tensors_have_shapes_and_no_autocast():
    """torch refuses to say whether autocast is on for a device that has none."""
    q, k, v = (torch.empty(x.shape, device="meta", requires_grad=True) for x in Case(tq=7, tk=9).tensors()[:3])
    o, lse = sagetrain.attention(q, k, v, return_lse=True)
    assert (o.shape, lse.shape, o.device.type) == (q.shape, q.shape[:3], "meta")
    o.sum().backward()
    assert k.grad.shape == k.shape


def test_scale_is_honoured():
    case = replace(BASE, dtype=torch.float32)
    q, k, v, _ = case.tensors()
    truth, _ = reference.exact(q, k, v, scale=0.3)
    assert error(sagetrain.attention(q, k, v, scale=0.3), truth) < 1.5 * error(
        reference.attention(q, k, v, scale=0.3), truth
    )
    assert error(sagetrain.attention(q, k, v), truth) > 0.05  # the default is another scale


def _edges(q: list[int], k: list[int] | None = None) -> dict:
    """cu_seqlens arguments; the same edges for q and k unless told otherwise."""
    return {f"cu_seqlens_{x}": torch.tensor(e, dtype=torch.int32) for x, e in (("q", q), ("k", k or q))}


def _args(**change: object) -> dict:
    q, k, v, _ = BASE.tensors()
    return {"q": q, "k": k, "v": v} | change


@pytest.mark.parametrize(("change", "kind", "words"), [
    ({"q": torch.zeros(2, 130, 64)}, ValueError, "expected 4 dimensions"),
    ({"q": torch.zeros(1, 2, 130, 64)}, TypeError, "cast them to one dtype"),
    ({x: torch.zeros(1, 2, 8, 64, dtype=torch.float64) for x in "qkv"}, TypeError, "kernels take"),
    ({"k": torch.zeros(1, 1, 130, 64, device="meta")}, ValueError, "one device"),
    ({"k": torch.zeros(1, 1, 9, 64).bfloat16()}, ValueError, "one shape"),
    ({x: torch.zeros(2, 1, 130, 64).bfloat16() for x in "kv"}, ValueError, "batch size and head dimension"),
    ({"v": torch.zeros(1, 1, 130, 136).bfloat16()}, NotImplementedError, "head dimension 136.*at most 128"),
    ({x: torch.zeros(1, 3, 130, 64).bfloat16() for x in "kv"}, ValueError, "not a multiple of 3 key/value heads"),
    ({x: torch.zeros(1, 2, 8, 12).bfloat16() for x in "qkv"}, NotImplementedError, "multiple of 8"),
    ({x: torch.zeros(1, 2, 8, 136).bfloat16() for x in "qkv"}, NotImplementedError, "at most 128"),
    ({"q": torch.zeros(1, 2, 64, 130).bfloat16().mT}, ValueError, "contiguous"),
    ({"scale": -0.1}, ValueError, "must not be negative"),
    ({"scale": float("nan")}, ValueError, "must not be negative"),
    ({"cu_seqlens_q": torch.tensor([0, 130])}, ValueError, "go together"),
    ({f"cu_seqlens_{x}": torch.tensor([0, 130]) for x in "qk"}, ValueError, "int32"),
    (_edges([0, 131], [0, 130]), RuntimeError, "within 0..130"),
    (_edges([0, 90, 40, 130]), RuntimeError, "non-decreasing"),
    (_edges([-1, 130]), RuntimeError, "within 0..130"),
    (_edges([0, 1, 2], [0, 1, 2, 3]), ValueError, "differ in length"),
    ({x: torch.zeros(2, 2, 8, 64) for x in "qkv"} | _edges([0, 8]), ValueError, "need B = 1"),
])  # fmt: skip
def test_bad_arguments_are_refused_in_words(change, kind, words):
    with pytest.raises(kind, match=words):
        sagetrain.attention(**_args(**change))


def test_double_backward_is_refused():
    q, k, v = (torch.randn(1, 1, 8, 64, requires_grad=True) for _ in range(3))
    (grad,) = torch.autograd.grad(sagetrain.attention(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward"):
        grad.sum().backward()


def test_kernel_name():
    assert sagetrain.kernel_name("cpu").startswith("cpu/")
    with pytest.raises(RuntimeError, match="only cpu and cuda"):
        sagetrain.kernel_name("mps")
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="no CUDA"):
            sagetrain.kernel_name("cuda")


CHANGE = """
import os, torch, sagetrain
def asked(name):
    os.environ["SAGETRAIN_GPU_KERNEL"] = name
    try: return torch.ops.sagetrain.kernel_name(0)
    except RuntimeError as refusal: return str(refusal)
print(asked("sm70") == asked("sm71"), asked("sm72"))
"""


def test_a_process_asks_for_one_gpu_kernel():
    """The first: the backward of another would read what this one saved. Needs no GPU, but a build with its kernels."""
    said = subprocess.check_output([sys.executable, "-c", CHANGE], cwd=Path(__file__).parents[2], text=True)
    if "no CUDA kernels" in said:
        pytest.skip("built without CUDA")
    assert said.startswith("True") and "'sm70' (SAGETRAIN_GPU_KERNEL)" in said


def test_exact_agrees_with_sdpa():
    q, k, v, _ = Case(hq=2, hkv=2, dtype=torch.float32).tensors()
    truth = exact(Case(hq=2, hkv=2, dtype=torch.float32))["o"]
    assert error(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True), truth) < 1e-6

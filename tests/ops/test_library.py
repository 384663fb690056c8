"""The ops in torch's machinery: opcheck, compile, checkpointing, modules, what is saved, memory."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import sagetrain
from tests.kernelkit import Case, run

ops = torch.ops.sagetrain
CASE = Case(b=2, hq=4, hkv=2, tq=40, tk=40)


class Attend(nn.Module):
    """Two attentions in one graph, with weights, as a model would have them."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 64)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q = self.project(q)
        return sagetrain.attention(sagetrain.attention(q, k, v, is_causal=True), k, v)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed):
    q, k, v, _ = Case(hq=4, hkv=2, tq=24, tk=24).tensors()
    edges = torch.tensor([0, 7, 7, 24], dtype=torch.int32) if packed else None
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(ops.attention_forward, (*inputs, 0.125, True, edges, edges, False))
    o, _, *saved = ops.attention_forward(q, k, v, 0.125, True, edges, edges, False)
    for d_lse in (None, torch.randn(1, 4, 24)):
        arguments = (torch.randn_like(o), d_lse, v, o, *saved, 0.125, True, edges, edges, False)
        torch.library.opcheck(ops.attention_backward, arguments)


def test_compile_fullgraph_with_dynamic_shapes():
    module = Attend().bfloat16()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for t in (40, 56):
        q, k, v, d_o = Case(b=2, hq=4, hkv=2, tq=t, tk=t).tensors()
        results = []
        for call in (module, compiled):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            o = call(*inputs)
            results.append((o, *torch.autograd.grad(o, [*inputs, *module.parameters()], d_o)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_compile_with_inductor():
    q, k, v, _ = CASE.tensors()

    @torch.compile(fullgraph=True)
    def call(q, k, v):
        return (sagetrain.attention(q * 1.5, k, v, is_causal=True) + 1).sum()

    grads = []
    for function in (call, call._torchdynamo_orig_callable):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        function(*inputs).backward()
        grads.append([x.grad for x in inputs])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


def test_activation_checkpointing_is_the_same_to_the_bit():
    plain = run(sagetrain.attention, CASE)
    kept = run(lambda *x, **o: checkpoint(sagetrain.attention, *x, use_reentrant=False, **o), CASE)
    assert all(torch.equal(plain[n], kept[n]) for n in plain)


def test_modules_copy_and_pickle():
    module = Attend().bfloat16()
    q, k, v, _ = CASE.tensors()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(q, k, v), module(q, k, v))
    assert pickle.loads(pickle.dumps(sagetrain.attention)) is sagetrain.attention


def test_inference_mode_and_partial_gradients():
    q, k, v, _ = CASE.tensors()
    with torch.inference_mode():
        o = sagetrain.attention(q, k, v)
    v.requires_grad_()
    (d_v,) = torch.autograd.grad(sagetrain.attention(q, k, v).sum(), v)
    assert torch.equal(o, sagetrain.attention(q, k, v)) and d_v.abs().sum() > 0


def test_what_is_saved():
    """Q8, K8, their scales, LSE, the means, V and O: nothing quadratic, nothing twice."""
    case = Case(hq=8, hkv=2, tq=256, tk=256)
    q, k, v, _ = (x.requires_grad_() for x in case.tensors())
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        sagetrain.attention(q, k, v)
    got = sum(x.numel() * x.element_size() for x in saved)
    rows = case.hq * case.tq + case.hkv * case.tk
    values = rows * case.d  # Q8 and K8
    sixteen_bit = 2 * (case.hq * case.tq + case.hkv * case.tk) * case.d  # O and V
    constants = 4 * (rows + case.hq * case.tq) + 2 * 4 * case.hkv * case.d  # scales, LSE, means
    assert got == values + sixteen_bit + constants


def test_memory_is_linear_in_tokens():
    """Scratch and saved tensors grow with T, not T^2: 8 times the tokens, at most 9 times the bytes torch hands out."""
    peaks = []
    for t in (512, 4096):
        q, k, v = (torch.randn(1, 1, t, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
        with torch.profiler.profile(profile_memory=True) as profile:
            sagetrain.attention(q, k, v).sum().backward()
        peaks.append(sum(max(e.self_cpu_memory_usage, 0) for e in profile.events()))
    assert peaks[1] <= 9 * peaks[0]

"""FlashAttention-4 as ops: exact gradients, whole graphs, results that checkpointing keeps.

On a CPU the package is that of tests/flashkit.py; what stands on a GPU is in the tests marked so and in test_bf16.py.
"""

import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sagetrain.integrations import bf16, flash4
from sagetrain.ops import reference
from sagetrain.training.layers import checkpoint_layers, compile_layers, compiled, compiled_anew
from tests.flashkit import Flash4
from tests.kernelkit import RATIO, error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = 2
DOCUMENTS = [(7, 2, 1, 14), (10, 10, 4), (24,), (3, 20, 1), (1, 1, 1, 1, 20)]


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Flash4:
    made = Flash4()
    monkeypatch.setitem(sys.modules, "flash_attn.cute.interface", made)
    monkeypatch.setitem(bf16.ARMS, "fa4", bf16.ARMS["fa4"]._replace(lacks=lambda device: ""))
    return made


def starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def tensors(packed: bool, heads: int = 2, kv_heads: int = 2, v_width: int = 16) -> list[Tensor]:
    """q, k, v: two rows of 24 tokens, or one of four documents with more keys than queries in the second."""
    generator = torch.Generator().manual_seed(0)
    rows = ((24,), (27,)) if packed else ((2, 24), (2, 24))
    shapes = (*rows[0], heads, 16), (*rows[1], kv_heads, 16), (*rows[1], kv_heads, v_width)
    return [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]


def lengths(packed: bool) -> dict[str, Any]:
    if not packed:
        return {}
    documents = {"cu_seqlens_q": starts(7, 2, 1, 14), "cu_seqlens_k": starts(7, 5, 1, 14)}
    return documents | {"max_seqlen_q": 14, "max_seqlen_k": 14}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("heads", "kv_heads", "v_width"), [(2, 2, 16), (4, 2, 16), (4, 1, 8)])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_exact_gradients(packed: bool, heads: int, kv_heads: int, v_width: int, causal: bool, flash: Flash4) -> None:
    q, k, v = inputs = tensors(packed, heads, kv_heads, v_width)
    options = lengths(packed)
    out = flash4.attention(q, k, v, softmax_scale=0.3, causal=causal, deterministic=causal, **options)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    got = out, *torch.autograd.grad(out, inputs, d_out)
    assert flash.calls == [("forward", False), ("backward", causal)]

    wide = [x[None] if packed else x for x in (q, k, functional.pad(v, (0, 16 - v_width)))]
    documents = {key: x for key, x in options.items() if key.startswith("cu")}
    exact, _ = reference.exact(*(x.transpose(1, 2) for x in wide), is_causal=causal, scale=0.3, **documents)
    exact = exact.transpose(1, 2)[..., :v_width].view(out.shape)
    for x, truth in zip(got, (exact, *torch.autograd.grad(exact, inputs, d_out.double())), strict=True):
        assert error(x, truth) <= RATIO * torch.finfo(torch.bfloat16).eps


def test_what_has_no_gradient(flash: Flash4) -> None:
    """The log-sum-exp, and what is read by nobody that has a gradient for it."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> None:
            return None

    q, k, v = tensors(packed=False)
    out, lse = flash4.forward(q, k, v, None, None, None, None, 0.3, True, False)
    assert out.requires_grad and not lse.requires_grad
    assert torch.autograd.grad(Stop.apply(out).sum(), q, allow_unused=True) == (None,)
    assert flash.calls == [("forward", False)]


def check_ops(inputs: list[Tensor], packed: bool) -> None:
    """Of contiguous tensors and of tensors that are strided as a model's are, with the heads before the tokens."""
    cu = [x.to(inputs[0].device) for x in (starts(7, 2, 1, 14), starts(7, 5, 1, 14))] if packed else [None, None]
    how = *cu, *((14, 14) if packed else (None, None)), 0.3, True, False
    for q, k, v in (inputs, [x.transpose(-3, -2).contiguous().transpose(-3, -2) for x in inputs]):
        torch.library.opcheck(flash4.forward, (*(x.detach().requires_grad_() for x in (q, k, v)), *how))
        out, lse = flash4.forward(q, k, v, *how)
        torch.library.opcheck(flash4.backward, (torch.randn_like(out), q, k, v, out, lse, *how))


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_opcheck(packed: bool, flash: Flash4) -> None:
    check_ops([x.detach() for x in tensors(packed, heads=4, v_width=8)], packed)


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_opcheck_of_the_package(packed: bool) -> None:
    if missing := bf16.ARMS["fa4"].lacks(CUDA):
        pytest.skip(f"fa4 needs {missing}")
    inputs = [x.detach().repeat_interleave(4, dim=-1) for x in tensors(packed, heads=4)]  # D = 64
    check_ops([x.to(CUDA) for x in inputs], packed)


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_a_function_that_uses_the_arm_is_one_graph(packed: bool, flash: Flash4) -> None:
    attend = AttentionInterface()[bf16.choose("bf16_fa4", CPU)]

    def function(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        return attend(nn.Module(), 2 * q, k, v, **options)[0].tanh()

    torch.compiler.reset()
    compiled_anew()
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    inputs = [x.detach().transpose(1, 2).requires_grad_() for x in tensors(packed=False, heads=4)]
    for document in ((7, 2, 1, 14, 24), (30, 18), (5, 9, 34)):
        cu, most = starts(*document), max(document)
        longest = {"max_length_q": most, "max_length_k": most}
        options = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu} | longest if packed else {}
        results = []
        for call in (fast, function):
            out = call(*inputs, **options)
            results.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert not torch._dynamo.utils.counters["graph_break"]
    assert flash.calls == 6 * [("forward", False), ("backward", False)]


def model(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    config = AutoConfig.for_model("llama", **sizes, num_attention_heads=4, num_key_value_heads=2)
    net = AutoModelForCausalLM.from_config(config, attn_implementation=bf16.choose("bf16_fa4", CPU)).bfloat16()
    checkpoint_layers(net, kind)
    return net.train()


def step(net: PreTrainedModel, document: tuple[int, ...]) -> list[Tensor]:
    """One row of documents of these lengths: loss and gradients."""
    tokens = torch.randint(264, (1, sum(document)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in document])[None]
    batch = {"input_ids": tokens, "labels": tokens, "position_ids": positions}
    batch |= {"cu_seq_lens_q": starts(*document), "cu_seq_lens_k": starts(*document)}
    loss = net(**batch, max_length_q=max(document), max_length_k=max(document), use_cache=False).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("fast", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("kind", "again"), [("none", 0), ("attention_saved", 0), ("full", LAYERS)])
def test_layers_hold_it_whole_and_keep_its_result(kind: str, again: int, fast: bool, flash: Flash4) -> None:
    plain, net = model("none"), model(kind)
    torch.compiler.reset()
    compiled_anew()
    if fast:
        compile_layers(net)
    for document in DOCUMENTS:
        wanted = step(plain, document)
        flash.calls.clear()
        found = step(net, document)
        names = [name for name, _ in flash.calls]
        assert (names.count("forward"), names.count("backward")) == (LAYERS + again, LAYERS)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(a, b) or (fast and error(a, b) <= 4 * torch.finfo(torch.bfloat16).eps)
    if fast:
        assert compiled()["graph_breaks"] == []


def test_a_package_that_is_called_otherwise_is_refused(flash: Flash4, monkeypatch: pytest.MonkeyPatch) -> None:
    package, module, _, capability = bf16.FLASH[4]
    monkeypatch.setitem(bf16.FLASH, 4, (package, module, lambda: True, capability))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    lacks = bf16._lacks_flash(4)
    assert lacks(CUDA) == ""

    def renamed(q, k, v, out, dout, lse, softmax_scale, is_causal, **options):
        """`causal` has another name."""

    for changes, what in (
        ({"_flash_attn_fwd": flash._flash_attn_fwd}, "has no attribute '_flash_attn_bwd'"),
        ({"_flash_attn_fwd": flash._flash_attn_fwd, "_flash_attn_bwd": renamed}, "'is_causal'"),
    ):
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**changes))
        assert lacks(CUDA).startswith("a flash-attn-4 that is called as 4.0.0b") and what in lacks(CUDA)
    monkeypatch.setitem(sys.modules, module, None)
    assert lacks(CUDA).startswith("a flash-attn-4 that loads here (ModuleNotFoundError")

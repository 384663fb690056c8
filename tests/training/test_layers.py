"""Checkpointing and compiling by layers: the numbers of a run without, the recomputing that was asked for."""

import subprocess
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sagetrain.integrations import bf16
from sagetrain.ops import schemes
from sagetrain.training.layers import checkpoint_layers, compile_layers, compiled, compiled_anew, layers

LAYERS = 4
FORWARD = schemes.get().forward


def model(attention: str = schemes.DEFAULT) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=264,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=LAYERS,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


class Calls(TorchDispatchMode):
    """Counts the calls of an op."""

    def __init__(self, op) -> None:
        super().__init__()
        self.op, self.count = op, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is self.op
        return function(*args, **(kwargs or {}))


def step(net: PreTrainedModel, tokens: Tensor, **options) -> list[Tensor]:
    loss = net(input_ids=tokens, labels=tokens, use_cache=False, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(net.parameters()))]


def batch(*lengths: int) -> dict[str, Tensor]:
    """One row of documents of these lengths."""
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    longest = {"max_length_q": max(lengths), "max_length_k": max(lengths)}
    return {"position_ids": positions, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu} | longest


@pytest.mark.parametrize(
    ("kind", "every", "calls"),
    [
        ("none", 1, LAYERS),
        ("attention_saved", 1, LAYERS),
        ("full", 1, 2 * LAYERS),
        ("full", 2, LAYERS + LAYERS // 2),
        ("full", 3, LAYERS + 2),
    ],
)
def test_what_is_recomputed(kind: str, every: int, calls: int) -> None:
    tokens = torch.randint(264, (2, 48))
    wanted = step(model(), tokens)
    net = model()
    checkpoint_layers(net, kind, every)
    with Calls(FORWARD) as counted:
        found = step(net, tokens)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert counted.count == calls


def test_the_linear_layers_are_recomputed_where_attention_is_saved() -> None:
    tokens = torch.randint(264, (1, 48))
    counts = []
    for kind in ("none", "attention_saved"):
        net = model()
        checkpoint_layers(net, kind)
        with Calls(torch.ops.aten.mm.default) as counted:
            step(net, tokens)
        counts.append(counted.count)
    assert counts[1] >= counts[0] + 6 * LAYERS  # 7 in a layer; the last one's result is not needed


def test_attention_of_sdpa_is_saved_too() -> None:
    net, op = model(bf16.choose("bf16_sdpa", torch.device("cpu"))), torch.ops.aten
    checkpoint_layers(net, "attention_saved")
    with Calls(op._scaled_dot_product_flash_attention_for_cpu.default) as counted:
        step(net, torch.randint(264, (2, 48)))
    assert counted.count == LAYERS


def test_ops_that_we_define_are_saved_whatever_else_is_imported() -> None:
    program = "from sagetrain.training.layers import attention_ops; print(*attention_ops())"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert {"sagetrain.fa4_forward.default", "sagetrain.attention_forward.default"} < set(said.split())


@pytest.mark.parametrize("kind", ["none", "attention_saved", "full"])
def test_compiled_with_other_documents_in_every_batch(kind: str, request: pytest.FixtureRequest) -> None:
    if kind != "attention_saved":  # one by Inductor
        request.getfixturevalue("uncompiled")
    torch.compiler.reset()
    plain, net = model(), model()
    checkpoint_layers(net, kind)
    compile_layers(net)
    graphs = []
    for lengths in ((32, 32), (10, 44, 10), (64,), (5, 9, 30, 20), (1, 63), (20, 24, 20)):
        tokens = torch.randint(264, (1, 64))
        wanted = step(plain, tokens, **batch(*lengths))
        for a, b in zip(step(net, tokens, **batch(*lengths)), wanted, strict=True):
            assert (a - b).norm() <= 2e-2 * b.norm() + 1e-6  # other fusions, and INT8 may round to the neighbour
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[-2] == graphs[-3], graphs


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize(("kind", "calls"), [("attention_saved", LAYERS), ("full", LAYERS + LAYERS // 2)])
def test_graphs_made_in_the_midst_of_an_accumulation_are_whole(
    kind: str, calls: int, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """BF16 weights whose gradients are FP32, as memory=24gb has them. The graphs as they are, without Inductor."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, net = (model().to(torch.bfloat16) for _ in range(2))
    for weight in (*plain.parameters(), *net.parameters()):
        weight.grad_dtype = torch.float32
    checkpoint_layers(net, kind, every=2)
    compile_layers(net)
    for number, lengths in enumerate(((32, 32), (10, 44, 10), (5, 9, 30, 20))):  # the second compiles anew
        tokens = torch.randint(264, (1, 64 if packed else 16 * len(lengths)))
        options = {"labels": tokens, "use_cache": False} | (batch(*lengths) if packed else {})
        plain(tokens, **options).loss.backward()
        with profile() if number == 2 else nullcontext() as seen:
            net(tokens, **options).loss.backward()
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4  # of layers with and without a checkpoint
    assert sum(x.count for x in seen.key_averages() if x.key == FORWARD.name()) == calls  # not compiled: more
    for weight, wanted in zip(net.parameters(), plain.parameters(), strict=True):
        assert weight.grad.dtype == torch.float32 and torch.equal(weight.grad, wanted.grad)


def test_an_error_leaves_the_gradients_where_they_were() -> None:
    net = model().to(torch.bfloat16)
    compile_layers(net)
    for weight in net.parameters():
        weight.grad_dtype = torch.float32
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
    with pytest.raises(TypeError):
        layers(net)[0]()
    assert all(weight.grad is not None for weight in net.parameters())


def test_all_layers_share_a_graph() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    compiled_anew()
    assert compiled() == {}
    net = model()
    compile_layers(net)
    step(net, torch.randint(264, (1, 64)))
    took = compiled()
    assert took["graph_breaks"] == []
    assert took["graphs"] == 2 and 0 <= took["graphs_cached"] <= 2 and 0 < took["compile_s"] < 600  # forward, backward
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Linear has no layers"):
        layers(torch.nn.Linear(2, 2))

"""The loss without the logits of all tokens: torch's own value and gradients, in any type, with less memory."""

import inspect

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sagetrain.training import loss
from sagetrain.training.loss import IGNORE, can_fuse, fuse, fused_loss

SHAPE = {
    "vocab_size": 264,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture(autouse=True)
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK", 16)


def inputs(tokens: int, vocabulary: int = 100, bias: bool = False, width: int = 32) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(tokens)
    leaves = [torch.randn(tokens, width), torch.randn(vocabulary, width)] + [torch.randn(vocabulary)] * bias
    labels = torch.randint(vocabulary, (tokens,))
    labels[::7] = IGNORE
    return [x.requires_grad_() for x in leaves], labels


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, bias: Tensor | None = None) -> Tensor:
    logits = functional.linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return functional.cross_entropy(logits, labels, reduction="sum") / divisor


def results(compute, leaves: list[Tensor], labels: Tensor, factor: float = 1.0) -> list[Tensor]:
    hidden, weight, *bias = leaves
    value = compute(hidden, weight, labels, torch.tensor(33.0), *bias)
    return [value, *torch.autograd.grad(value * factor, leaves)]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 16, 17, 50, 64])
def test_value_and_gradients(tokens: int, bias: bool) -> None:
    leaves, labels = inputs(tokens, bias=bias)
    for ours, torchs in zip(results(fused_loss, leaves, labels, 3.0), results(plain, leaves, labels, 3.0), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ignored", [slice(None, None, 3), slice(None)], ids=["some", "all"])
def test_what_a_gpu_compiles_is_what_a_cpu_computes(dtype: torch.dtype, ignored: slice) -> None:
    torch.manual_seed(0)
    logits, labels = (10 * torch.randn(20, 50)).to(dtype), torch.randint(50, (20,))
    labels[ignored] = IGNORE
    found = [(each, logits.clone()) for each in (loss._to_gradient, loss._to_gradient_eager)]
    totals = [compute(gradient, labels) for compute, gradient in found]
    torch.testing.assert_close(*totals)
    torch.testing.assert_close(*(gradient for _, gradient in found))


def test_no_target_at_all() -> None:
    leaves, labels = inputs(20)
    for x in results(fused_loss, leaves, torch.full_like(labels, IGNORE)):
        assert torch.equal(x, torch.zeros_like(x))


def test_autocast_costs_what_it_costs_torch() -> None:
    leaves, labels = inputs(64)
    exact = results(plain, [x.detach().double().requires_grad_() for x in leaves], labels)
    with torch.autocast("cpu", torch.bfloat16):
        ours, torchs = results(fused_loss, leaves, labels), results(plain, leaves, labels)
    assert [x.dtype for x in ours] == [torch.float32] * 3
    for a, b, c in zip(ours, torchs, exact, strict=True):
        assert (a - c).norm() <= 1.1 * (b - c).norm() + 1e-6 * c.norm()


def test_the_loss_is_fp32_where_bf16_is_the_default() -> None:
    leaves, labels = inputs(64)
    leaves = [x.detach().bfloat16().requires_grad_() for x in leaves]
    wanted = results(fused_loss, leaves, labels)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for trainer.precision=bf16-true
    try:
        value, *gradients = results(fused_loss, leaves, labels)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip([value, *gradients], wanted, strict=True))
    assert value.dtype == torch.float32 and [x.dtype for x in gradients] == [torch.bfloat16] * 2


def test_never_more_than_a_chunk_of_logits() -> None:
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple | list) else (out,):
                if isinstance(x, Tensor) and x.shape[-1:] == (1000,):
                    self.rows = max(self.rows, x.numel() // 1000)
            return out

    leaves, labels = inputs(256, 1000, width=8)
    for compute, rows in ((fused_loss, 16), (plain, 256)):
        with Largest() as largest:
            results(compute, leaves, labels)
        assert largest.rows == rows


def test_no_gradient_is_computed_where_none_is_wanted() -> None:
    leaves, labels = inputs(20)
    with torch.no_grad():
        value = fused_loss(leaves[0], leaves[1], labels, torch.tensor(33.0))
    torch.testing.assert_close(value, plain(*leaves, labels, torch.tensor(33.0)))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_head_or_frozen_layers_cost_no_product(frozen: int) -> None:
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function in (torch.ops.aten.mm.default, torch.ops.aten.mm.out, torch.ops.aten.addmm_.default)
            return function(*args, **(kwargs or {}))

    leaves, labels = inputs(16)
    divisor, counts = torch.tensor(33.0), []
    wanted = torch.autograd.grad(fused_loss(*leaves, labels, divisor), leaves)[1 - frozen]
    for freeze in (False, True):
        leaves[frozen].requires_grad_(not freeze)
        with Products() as products:
            value = fused_loss(*leaves, labels, divisor)
        counts.append(products.count)
    assert counts == [3, 2]
    assert torch.equal(torch.autograd.grad(value, leaves[1 - frozen])[0], wanted)


def test_a_gradient_in_fp32_of_a_weight_in_bf16_is_not_rounded() -> None:
    leaves, labels = inputs(50)
    hidden, weight = (x.detach().bfloat16().requires_grad_() for x in leaves)
    weight.grad_dtype = torch.float32
    fused_loss(hidden, weight, labels, torch.tensor(33.0)).backward()
    assert weight.grad.dtype == torch.float32 and not torch.equal(weight.grad, weight.grad.bfloat16().float())
    assert hidden.grad.dtype == torch.bfloat16


def test_a_second_backward_of_one_graph_is_refused() -> None:
    leaves, labels = inputs(20)
    value = fused_loss(*leaves, labels, torch.tensor(33.0))
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def model(kind: str, dtype: torch.dtype = torch.float32, **settings) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE | settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=dtype).train()


@pytest.mark.parametrize(("kind", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("phi", False)])
def test_a_fused_model_has_the_loss_and_gradients_it_had(kind: str, tied: bool) -> None:
    net = model(kind, tie_word_embeddings=tied)
    tokens = torch.randint(264, (2, 24))
    labels = tokens.clone()
    labels[:, 5:8] = IGNORE

    def step(**options) -> list[Tensor]:
        value = net(input_ids=tokens, labels=labels, use_cache=False, **options).loss
        return [value, *torch.autograd.grad(value, list(net.parameters()))]

    options = ({}, {"num_items_in_batch": torch.tensor(7.0)}, {"num_items_in_batch": 7})
    before, logits = [step(**o) for o in options], net(input_ids=tokens).logits
    assert can_fuse(net)
    fuse(net)
    for ours, own in zip([step(**o) for o in options], before, strict=True):
        for a, b in zip(ours, own, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert torch.equal(net(input_ids=tokens).logits, logits)
    assert "attention_mask" in inspect.signature(net.forward).parameters  # generate() looks for it there


@pytest.mark.parametrize("asked", ["shift_labels", "ignore_index", "output_hidden_states", "return_dict"])
def test_what_the_fused_loss_does_not_do_the_model_does(asked: str) -> None:
    net, tokens = model("llama"), torch.randint(264, (2, 24))
    tokens[:, ::5] = 7
    given = {"shift_labels": tokens, "ignore_index": 7, "output_hidden_states": True, "return_dict": False}
    options = {asked: given[asked]}
    own = net(input_ids=tokens, labels=tokens, **options)
    fuse(net)
    found = net(input_ids=tokens, labels=tokens, **options)
    assert type(found) is type(own) and torch.equal(found[0], own[0])
    changes_loss = asked in ("shift_labels", "ignore_index")
    assert torch.isclose(found[0], net(input_ids=tokens, labels=tokens).loss) != changes_loss


def test_a_head_of_zeros_can_be_tried() -> None:
    net = model("llama", tie_word_embeddings=False)
    torch.nn.init.zeros_(net.lm_head.weight)
    assert can_fuse(net)


@pytest.mark.parametrize(
    ("kind", "settings", "can"),
    [
        ("llama", {}, True),
        ("llama", {"dtype": torch.bfloat16}, True),
        ("gemma2", {}, False),  # logits are capped
        ("gemma2", {"final_logit_softcapping": None}, True),
        ("granite", {"logits_scaling": 3.0}, False),
        ("cohere", {}, False),  # logits are scaled
        ("mixtral", {"output_router_logits": True, "num_local_experts": 2}, False),  # a second term
        ("mixtral", {"num_local_experts": 2}, True),
    ],
)
def test_which_models_can_be_fused(kind: str, settings: dict, can: bool) -> None:
    net = model(kind, **settings)
    assert can_fuse(net) is can
    assert (
        net.training and net.config._attn_implementation == "eager" and not net.get_output_embeddings()._forward_hooks
    )

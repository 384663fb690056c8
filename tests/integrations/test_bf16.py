"""The BF16 arms: no mask where none is needed, the numbers of SDPA with an explicit mask, and the truth about what ran.

Numbers: the error of logits and gradient against FP64 with an explicit mask is at most `RATIO` times the error of
transformers' own `sdpa` in the same dtype, or the rounding of that dtype.
"""

import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import transformers as hub
from torch import Tensor, nn
from torch.nn import functional

from sagetrain.integrations import bf16
from sagetrain.integrations import huggingface as hf
from tests.flashkit import Flash4
from tests.kernelkit import RATIO, error

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LENGTHS = {1: [[7, 2, 1, 14]], 2: [[24], [10, 10, 4]]}
IDS = torch.randint(1, 61, (2, 24), generator=torch.Generator().manual_seed(1))


def build(implementation: str, **changes: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 512}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = hub.LlamaConfig(**(options | heads | {"initializer_range": 0.15, "pad_token_id": 0} | changes))
    return hub.AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()


def packed(rows: int) -> dict[str, Any]:
    """input_ids [rows, 24] of documents, with all that data/collate.py gives."""
    lengths = LENGTHS[rows]
    cu = torch.tensor([0, *(n for row in lengths for n in row)]).cumsum(0).int()
    places = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    longest = int(cu.diff().max())
    return {"input_ids": IDS[:rows], "position_ids": places, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu,
            "max_length_q": longest, "max_length_k": longest}  # fmt: skip


def padded(side: str) -> dict[str, Any]:
    mask = torch.ones_like(IDS)
    mask[0, :9] = 0
    mask = mask if side == "left" else mask.flip(1)
    return {"input_ids": IDS, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(0)}


BATCHES = {
    "plain": lambda: {"input_ids": IDS},
    "packed, one row": lambda: packed(1),
    "packed, two rows": lambda: packed(2),
    "padded left": lambda: padded("left"),
    "padded right": lambda: padded("right"),
}


def results(model: nn.Module, batch: dict[str, Any], run: Callable[..., Any] | None = None) -> tuple[Tensor, Tensor]:
    """Logits and gradient of the loss at real tokens."""
    batch = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    logits = (model if run is None else run)(**batch, use_cache=False).logits
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    loss = functional.cross_entropy(logits[real].double(), batch["input_ids"][real])
    grads = torch.autograd.grad(loss, list(model.parameters()))
    return logits.detach()[real], torch.cat([g.flatten() for g in grads])


def compiled(model: nn.Module, graphs: list) -> Callable[..., Any]:
    """The model in one graph, of which every version is put into `graphs`."""
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend=lambda graph, _: (graphs.append(graph), graph)[1])


def check(arm: str, batch: dict[str, Any], device: torch.device, dtype: torch.dtype, fast: bool = False) -> None:
    names = ("input_ids", "attention_mask", "position_ids")
    explicit = {k: v for k, v in batch.items() if k in names}  # transformers' sdpa makes its mask from these
    truth = results(build("sdpa").to(device).double(), explicit)
    theirs = results(build("sdpa").to(device, dtype), explicit)
    bf16.forget()
    torch.compiler.reset()
    model = build(bf16.choose(arm, device)).to(device, dtype)
    ours = results(model, batch, torch.compile(model) if fast else None)
    for got, same, exact in zip(ours, theirs, truth, strict=True):
        assert error(got, exact) <= RATIO * max(error(same, exact), torch.finfo(dtype).eps)


# ------------------------------------------------------------------------------------------------ on a CPU


@pytest.mark.parametrize("batch", BATCHES)
def test_sdpa_is_sdpa_with_an_explicit_mask(batch: str) -> None:
    check("bf16_sdpa", BATCHES[batch](), CPU, torch.float32)
    assert bf16.ran("bf16_sdpa")[1] is None


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("batch", ["plain", "packed, two rows"])
def test_sdpa_compiled(batch: str) -> None:
    check("bf16_sdpa", BATCHES[batch](), CPU, torch.float32, fast=True)
    what = "SDPA flash" + (batch != "plain") * ", one call for each document"
    assert bf16.ran("bf16_sdpa") == (what, None)


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """Keyword arguments of every call of scaled_dot_product_attention."""
    seen, real = [], functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda *a, **k: (seen.append(k), real(*a, **k))[1])
    return seen


@pytest.mark.parametrize("batch", BATCHES)
def test_no_mask_reaches_sdpa(batch: str, calls: list[dict[str, Any]]) -> None:
    model = build(bf16.choose("bf16", CPU))
    model(**BATCHES[batch](), use_cache=False)
    assert calls and all(call["attn_mask"] is None and call["is_causal"] is True for call in calls)
    calls.clear()
    model(IDS, attention_mask=torch.ones_like(IDS), use_cache=False)
    assert len(calls) == 2 and all(call["attn_mask"] is None and call["is_causal"] is True for call in calls)


def test_no_mask_reaches_sdpa_compiled() -> None:
    graphs = []
    run = compiled(build(bf16.choose("bf16", CPU)), graphs)
    run(IDS, use_cache=False)
    (graph,) = graphs
    nodes = [n for n in graph.graph.nodes if "scaled_dot_product_attention" in str(n.target)]
    assert [(n.kwargs["attn_mask"], n.kwargs["is_causal"]) for n in nodes] == [(None, True)] * 2


def test_the_mask_that_a_gpu_needs_for_documents() -> None:
    cu_q, cu_k = torch.tensor([0, 3, 3, 9, 12]), torch.tensor([0, 5, 6, 10, 16])  # two rows of 6 queries and 8 keys
    for causal in (False, True):
        got = bf16._same_document(hf.Sequences(causal, cu_q.int(), cu_k.int(), None, None), 2, 6, 8)
        whole = torch.zeros(12, 16, dtype=torch.bool)
        for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1), cu_k.unfold(0, 2, 1), strict=True):
            block = torch.ones(int(b - a), int(d - c), dtype=torch.bool)
            whole[a:b, c:d] = block.tril(int(d - c - b + a)) if causal else block
        assert torch.equal(got[0, 0], whole[:6, :8]) and torch.equal(got[1, 0], whole[6:, 8:])


def test_decoding_with_a_cache_is_that_of_sdpa() -> None:
    mask = padded("left")["attention_mask"]
    models = [build(name).eval() for name in (bf16.choose("bf16_sdpa", CPU), "sdpa")]
    options = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    assert torch.equal(*(model.generate(IDS, **options) for model in models))


def test_validation_is_watched_too() -> None:
    with torch.inference_mode():
        build(bf16.choose("bf16_sdpa", CPU)).eval()(**packed(2), use_cache=False)


def test_handicaps_are_said() -> None:
    name = bf16.choose("bf16_sdpa", CPU)
    bf16.forget()
    windowed = hub.MistralConfig(vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
                                 num_attention_heads=2, num_key_value_heads=2, sliding_window=8)  # fmt: skip
    exact, ours = (hub.AutoModelForCausalLM.from_config(windowed, attn_implementation=n) for n in ("sdpa", name))
    ours.load_state_dict(exact.state_dict())
    assert torch.equal(ours(IDS, use_cache=False).logits, exact(IDS, use_cache=False).logits)
    assert bf16.ran(name) == ("SDPA with a dense mask", bf16.DENSE)
    with pytest.raises(NotImplementedError, match="cu_seq_lens with windows.*attn_implementation='sdpa'"):
        ours(**packed(2), use_cache=False)
    bf16.forget()
    q = torch.randn(1, 2, 8, 32)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hub.AttentionInterface()[name](nn.Module(), q, q, q)
    assert bf16.ran(name) == ("SDPA math", bf16.MATH)
    bf16.forget()
    assert bf16.ran("sage_int8") == ("sage_int8", None)
    assert "nobody watched" in bf16.ran("eager")[1]


# ------------------------------------------------------------------------------------------------ packages, pretended


def varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, scale: float, causal: bool
) -> Tensor:
    """What flash_attn_varlen_func computes, and its demands. [tokens, H, D]."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert (cu_q[0], cu_q[-1]) == (0, len(q)) and cu_q.diff().max() <= max_q and cu_k.diff().max() <= max_k
    parts = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1).tolist(), cu_k.unfold(0, 2, 1).tolist(), strict=True):
        mask = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - b + a) if causal else None
        part = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
        parts.append(functional.scaled_dot_product_attention(*part, mask, scale=scale, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


operator = torch.library.custom_op("sagetrain_tests::varlen", varlen, mutates_args=())
operator.register_fake(lambda q, *_: torch.empty_like(q))


def package(attend: Callable[..., Tensor]) -> Any:
    def flash_attn_varlen_func(
        q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, deterministic
    ):  # fmt: skip
        return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal)

    def flash_attn_func(q, k, v, *, softmax_scale, causal, deterministic):
        rows, tokens = q.shape[:2]
        cu = torch.arange(rows + 1, dtype=torch.int32) * tokens
        flat = (x.flatten(0, 1) for x in (q, k, v))
        return attend(*flat, cu, cu, tokens, tokens, softmax_scale, causal).unflatten(0, (rows, tokens)), None

    return types.SimpleNamespace(flash_attn_func=flash_attn_func, flash_attn_varlen_func=flash_attn_varlen_func)


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    """As in torch 2.11: no grouped heads; causal is a window."""
    assert q.shape[1] == k.shape[1] and window_size in ((-1, 0), (-1, -1))
    return varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size == (-1, 0))


def varlen_attn_with_groups(q, k, v, *lengths, scale, window_size, enable_gqa):
    """As in torch 2.13."""
    assert enable_gqa is True
    return varlen(q, k, v, *lengths, scale, window_size == (-1, 0))


@pytest.fixture
def pretend(monkeypatch) -> Callable[..., str]:
    """Makes an arm that needs a GPU or a package run on what stands above; returns its name for transformers."""

    def arm(name: str, torchs: Callable[..., Tensor] = varlen_attn, flash: Callable[..., Tensor] = varlen) -> str:
        for version, (_, module, *_) in bf16.FLASH.items():
            monkeypatch.setitem(sys.modules, module, Flash4() if version == 4 else package(flash))
        monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", torchs)
        monkeypatch.setitem(bf16.ARMS, name, bf16.ARMS[name]._replace(lacks=lambda device: ""))
        return bf16.PREFIX + name

    return arm


@pytest.mark.parametrize("arm", ["fa2", "fa3", "fa4", "varlen"])
@pytest.mark.parametrize("batch", BATCHES)
def test_varlen_arms(arm: str, batch: str, pretend: Callable[..., str]) -> None:
    check(pretend(arm), BATCHES[batch](), CPU, torch.bfloat16)
    what = "torch varlen_attn" if arm == "varlen" else f"FlashAttention-{arm[-1]}"
    assert bf16.ran(arm) == ("SDPA flash" if (arm, batch) == ("varlen", "plain") else what, None)


def test_varlen_with_grouped_heads(pretend: Callable[..., str]) -> None:
    check(pretend("varlen", torchs=varlen_attn_with_groups), BATCHES["packed, two rows"](), CPU, torch.bfloat16)


@pytest.mark.parametrize("widths", [(24, 16), (16, 24)])
def test_values_of_another_width(widths: tuple[int, int], pretend: Callable[..., str]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, 24, d, generator=generator).bfloat16() for d in (*widths[:1] * 2, widths[1]))
    options = {name: packed(2)[name] for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
    names = [bf16.choose(name, CPU) for name in ("bf16_sdpa", pretend("fa3"))]
    wanted, got = (hub.AttentionInterface()[name](nn.Module(), q, k, v, **options)[0] for name in names)
    assert got.shape == (2, 24, 2, widths[1]) and error(got, wanted) <= torch.finfo(torch.bfloat16).eps


def test_half_precision_is_asked_for_and_autocast_gives_it(pretend: Callable[..., str]) -> None:
    model = build(bf16.choose(pretend("fa2"), CPU))
    with pytest.raises(TypeError, match="attention=fa2 takes bfloat16.*trainer.precision=bf16-mixed"):
        model(IDS)
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS)


@pytest.mark.parametrize(("arm", "learned"), [("fa3", 2), ("sage_int8", 1)])
def test_other_documents_are_learned_once(arm: str, learned: int, pretend: Callable[..., str]) -> None:
    """The number of documents, and the longest where it matters, differ from batch to batch: two known, all known."""
    graphs = []
    name = arm if arm == "sage_int8" else bf16.choose(pretend(arm, flash=operator), CPU)
    run = compiled(build(name, num_hidden_layers=1).bfloat16(), graphs)
    with torch.no_grad():
        for starts in ([10, 34], [9, 30], [3, 5, 20, 31], [30, 40], [7], range(1, 48), [8, 16, 32]):
            run(**with_borders(starts), use_cache=False)
    assert len(graphs) <= 1 + learned


def with_borders(starts: Iterable[int]) -> dict[str, Any]:
    cu = torch.tensor(sorted({0, *starts, 24, 48}), dtype=torch.int32)
    places = torch.cat([torch.arange(n) for n in cu.diff().tolist()]).view(2, 24)
    longest = int(cu.diff().max())
    return packed(2) | {"position_ids": places, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu,
                        "max_length_q": longest, "max_length_k": longest}  # fmt: skip


def test_what_cannot_run_is_refused_with_what_it_needs(monkeypatch) -> None:
    assert bf16.choose("bf16", CPU) == bf16.choose("bf16_sdpa", CPU) == "bf16_sdpa"
    assert bf16.choose("eager", CPU) == "eager" and bf16.choose("bf16_what", CPU) == "bf16_what"
    for name in set(bf16.ARMS) - {"sdpa"}:
        with pytest.raises(ValueError, match=f"attention={name} needs a CUDA GPU.*attention=bf16 takes.*: sdpa"):
            bf16.choose(bf16.PREFIX + name, CPU)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="attention=fa4 needs a CUDA GPU of compute capability 9.0"):
        bf16.choose("bf16_fa4", CUDA)
    for name, needed in (("fa2", "flash-attn"), ("fa3", "flash-attn-3")):
        with pytest.raises(ValueError, match=f"attention={name} needs the package {needed} \\(pip install"):
            bf16.choose(f"bf16_{name}", CUDA)


def test_report_of_a_cpu() -> None:
    said = "attention=bf16 is sdpa; here: sdpa; fa2, fa3, varlen, flex, sdpa_cudnn: needs a CUDA GPU"
    assert bf16.report(CPU).startswith(said) and "fa4: needs a CUDA GPU of compute capability 9.0" in bf16.report(CPU)


def test_the_best_is_chosen_in_order(monkeypatch) -> None:
    there = {name: False for name in bf16.ORDER}
    for name in there:
        lacks = lambda device, name=name: "" if there[name] else "something"  # noqa: E731
        monkeypatch.setitem(bf16.ARMS, name, bf16.ARMS[name]._replace(lacks=lacks))
    for name in reversed(("fa4", "fa3", "fa2", "varlen", "flex", "sdpa")):
        there[name] = True
        assert bf16.best(CUDA) == name


# ------------------------------------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("arm", bf16.ARMS)
def test_arms_on_a_gpu(arm: str, batch: str, fast: bool) -> None:
    if missing := bf16.ARMS[arm].lacks(CUDA):
        with pytest.raises(ValueError, match="attention=bf16 takes"):
            bf16.choose(bf16.PREFIX + arm, CUDA)
        assert "package" in missing
        return
    check(bf16.PREFIX + arm, BATCHES[batch](), CUDA, torch.bfloat16, fast)
    what, handicap = bf16.ran(arm)
    masked = arm.startswith("sdpa") and batch != "plain"
    assert handicap == (bf16.DENSE if masked else None), what


@pytest.mark.gpu
def test_full_precision_on_a_gpu_is_not_on_the_math_backend() -> None:
    check("bf16_sdpa", BATCHES["plain"](), CUDA, torch.float32)
    assert bf16.ran("sdpa")[1] is None


@pytest.mark.gpu
def test_compiled_plain_rows_reach_fused_kernels() -> None:
    """With a padding mask of ones too when it is not compiled; the profiler sees which operator ran."""
    for arm, wanted in (("sdpa", {"flash", "cudnn"}), ("sdpa_cudnn", {"cudnn"}), ("varlen", {"flash", "cudnn"})):
        model = build(bf16.choose(bf16.PREFIX + arm, CUDA)).to(CUDA, torch.bfloat16)
        torch.compiler.reset()
        run = torch.compile(model)
        run(IDS.to(CUDA), use_cache=False).logits.sum().backward()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            run(IDS.to(CUDA), use_cache=False)
        names = [e.key for e in seen.key_averages() if "attention" in e.key and "aten::" in e.key]
        assert names and all(any(w in name for w in wanted) for name in names), names

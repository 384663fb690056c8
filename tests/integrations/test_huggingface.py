"""The Hugging Face plug: masks are exact, numbers are those of the kernel, everything else is refused.

Two measures. *Masks*: a padded or packed batch against each of its rows run alone through the very same implementation;
they may differ by what FP32 matmuls of another batch size round differently, so by far less than INT8 costs at all
(`SAME`). *Numbers*: the error against `sdpa` in FP32 is at most `RATIO` times what the plain-torch emulation of the
same maths costs in the same model.
"""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers as hub
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from sagetrain.integrations import huggingface as hf
from sagetrain.ops import reference, schemes
from tests.kernelkit import RATIO, error

NAME = schemes.DEFAULT
ATTEND = hub.AttentionInterface()[NAME]
SAME = 0.05  # of the error that INT8 makes in that model
VOCABULARY = 61
IDS = torch.randint(1, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(1))
FAMILIES = {
    "llama": (hub.LlamaConfig, {}),
    "qwen2": (hub.Qwen2Config, {}),
    "qwen3": (hub.Qwen3Config, {}),
    "mistral": (hub.MistralConfig, {"sliding_window": None}),
    "mistral, window without effect": (hub.MistralConfig, {"sliding_window": 24}),
}


def emulation(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: object, scaling: float, **__: object):
    """Plain causal attention by the reference: the error that the maths has by itself."""
    return reference.attention(query, key, value, is_causal=True, scale=scaling).transpose(1, 2), None


@pytest.fixture(autouse=True, scope="module")
def emulation_registered() -> Iterator[None]:
    hub.AttentionInterface.register("emulation", emulation)
    hub.AttentionMaskInterface.register("emulation", hf.sage_mask)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only wait for each other's threads
    yield
    torch.set_num_threads(threads)
    for interface in (hub.AttentionInterface, hub.AttentionMaskInterface):
        del interface._global_mapping["emulation"]


def build(implementation: str = NAME, config: type = hub.LlamaConfig, **changes: object) -> hub.PreTrainedModel:
    """Two layers, 4 query and 2 key heads of dimension 32; the same weights for every implementation."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    options = {**sizes, **heads, "initializer_range": 0.15, "pad_token_id": 0, **changes}
    return hub.AutoModelForCausalLM.from_config(config(**options), attn_implementation=implementation)


def results(model: hub.PreTrainedModel, logits: list[Tensor], rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits [t, V] of each row [t] -> (all of them [tokens, V], gradient of the summed next-token loss)."""
    pairs = zip(logits, rows, strict=True)
    loss = sum(nn.functional.cross_entropy(y[:-1], row[1:], reduction="sum") for y, row in pairs)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat(logits).detach(), torch.cat([g.flatten() for g in gradients])


def check_same_as_alone(rows: list[Tensor], run: Callable[[hub.PreTrainedModel], list[Tensor]]) -> None:
    """`run(model)` gives the logits [t, V] of each row out of a padded or packed batch."""
    alone, together = {}, {}
    for name in (NAME, "sdpa"):
        model = build(name)
        alone[name] = results(model, [model(row[None], use_cache=False).logits[0] for row in rows], rows)
        together[name] = results(model, run(model), rows)
    for i in range(2):  # logits, gradient
        cost = error(alone[NAME][i], alone["sdpa"][i])
        assert error(together[NAME][i], alone[NAME][i]) <= SAME * cost
        assert error(together[NAME][i], together["sdpa"][i]) <= RATIO * cost


@pytest.mark.parametrize("family", FAMILIES)
def test_families_train_like_sdpa(family: str) -> None:
    config, changes = FAMILIES[family]
    models = (build(name, config, **changes) for name in (NAME, "emulation", "sdpa"))
    found = [results(model, list(model(IDS, use_cache=False).logits), list(IDS)) for model in models]
    for got, same_maths, exact in zip(*found, strict=True):  # logits, gradient
        assert 0 < error(got, exact) <= RATIO * error(same_maths, exact)


def test_half_precision_and_autocast() -> None:
    exact = build("sdpa")(IDS).logits
    for dtype in (torch.bfloat16, torch.float16):
        cast = [build(name).to(dtype)(IDS).logits for name in (NAME, "emulation")]
        assert cast[0].dtype == dtype and error(cast[0], exact) <= RATIO * error(cast[1], exact)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = [build(name)(IDS).logits for name in (NAME, "emulation")]
    assert error(mixed[0], exact) <= RATIO * error(mixed[1], exact)


def test_switched_saved_copied_and_evaluated_models_are_the_same(tmp_path) -> None:
    model = build()
    wanted = model(IDS).logits
    switched = build("sdpa")
    switched.set_attn_implementation(NAME)
    model.save_pretrained(tmp_path)
    loaded = hub.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME)
    for other in (switched, loaded, copy.deepcopy(model), model.eval()):
        with torch.no_grad():
            assert torch.equal(other(IDS).logits, wanted)


def test_gradient_checkpointing_changes_nothing() -> None:
    model, mask = build(), torch.ones_like(IDS)
    mask[0, :5] = 0
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        logits = model.train()(IDS, attention_mask=mask).logits
        gradients.append(results(model, list(logits), list(IDS))[1])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_padding(side: str) -> None:
    rows = [IDS[0], IDS[1, :9], IDS[2, :2]]
    before = [0 if side == "right" else (24 - len(r)) // (1 if side == "left" else 2) for r in rows]
    ids, mask = torch.zeros(2, 4, 24, dtype=torch.long)  # the last row is all padding
    for b, (row, start) in enumerate(zip(rows, before, strict=True)):
        ids[b, start : start + len(row)], mask[b, start : start + len(row)] = row, 1

    def run(model: hub.PreTrainedModel) -> list[Tensor]:
        logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0)).logits
        assert logits.isfinite().all()
        return [logits[b, start : start + len(row)] for b, (row, start) in enumerate(zip(rows, before, strict=True))]

    check_same_as_alone(rows, run)


@pytest.mark.parametrize("how", ["cu_seq_lens", "position_ids", "both"])
def test_packing(how: str) -> None:
    lengths = [7, 2, 1, 14]
    rows = list(IDS[0].split(lengths))
    packed: dict[str, object] = {"position_ids": torch.cat([torch.arange(n) for n in lengths])[None]}
    boundaries = torch.tensor([0, 7, 9, 10, 24, 24])  # an empty document at the end, as padded boundaries have it
    varlen = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 14, "max_length_k": 14}

    def run(model: hub.PreTrainedModel) -> list[Tensor]:
        ours = model.config._attn_implementation == NAME
        options = packed | (varlen if how != "position_ids" and ours else {})
        # transformers looks at position_ids only without a cache; cu_seq_lens need no such care
        return list(model(IDS[:1], use_cache=ours and how == "cu_seq_lens", **options).logits[0].split(lengths))

    check_same_as_alone(rows, run)


def test_packing_of_several_rows_by_position_ids() -> None:
    positions = torch.stack([torch.arange(24), torch.arange(24) % 10])
    rows = [IDS[0], *IDS[1].split(10)]

    def run(model: hub.PreTrainedModel) -> list[Tensor]:
        logits = model(IDS[:2], position_ids=positions, use_cache=False).logits
        return [logits[0], *logits[1].split(10)]

    check_same_as_alone(rows, run)


CONFIG = hub.LlamaConfig(attn_implementation=NAME)


def plan_of(positions: Tensor | None = None, mask: Tensor | None = None, tokens: int = 24) -> Tensor | None:
    rows = len(positions if mask is None else mask)
    return create_causal_mask(CONFIG, torch.empty(rows, tokens, 0), mask, None, positions)


@pytest.mark.parametrize(
    "positions, starts",
    [
        (torch.arange(24)[None] + 5, None),  # an offset is not packing
        (torch.arange(24)[None].expand(2, -1), None),
        (torch.arange(24)[None] % 12, [0, 12, 24]),
        (torch.cat((torch.arange(4), torch.arange(4, 24) + 3))[None], [0, 4, 24]),  # sdpa, too, splits at a gap
        (torch.zeros(1, 24, dtype=torch.long), list(range(25))),
        (torch.stack((torch.arange(24), torch.arange(24) % 23)), [0, 24, 47, 48]),
    ],
)
def test_packing_is_detected_exactly(positions: Tensor, starts: list[int] | None) -> None:
    plan = plan_of(positions)
    assert (plan if plan is None else plan[:, 0, 0].tolist()) == (starts if starts is None else [starts, starts])


def test_attention_of_a_padded_batch_is_each_row_alone_to_the_bit() -> None:
    """Same q, k, v: nothing but the mask is between the two, so no bit may differ, gradients included."""
    generator = torch.Generator().manual_seed(2)
    q, k, v, d = (torch.randn(5, h, 40, 32, generator=generator) for h in (4, 2, 2, 4))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    ends = [(0, 40), (3, 40), (0, 17), (39, 40), (40, 40)]  # (first, last) real token; the last row has none
    mask = torch.stack([(torch.arange(40) >= a) & (torch.arange(40) < b) for a, b in ends])
    output, _ = ATTEND(nn.Module(), *inputs, plan_of(mask=mask, tokens=40))
    weight = d.transpose(1, 2) * mask[:, :, None, None]
    got = torch.autograd.grad(output, inputs, weight)
    assert output.isfinite().all() and all(g.isfinite().all() for g in got)
    for b, (first, last) in enumerate(ends):
        row = [x[b : b + 1, :, first:last] for x in inputs]
        if first < last:
            one, _ = ATTEND(nn.Module(), *row)
            assert torch.equal(one[0], output[b, first:last])
            for g, wanted in zip(got, torch.autograd.grad(one, row, weight[b : b + 1, first:last]), strict=True):
                assert torch.equal(g[b : b + 1, :, first:last], wanted)
                assert not g[b, :, :first].any() and not g[b, :, last:].any()


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_decoding_with_a_cache(static: bool) -> None:
    """Prompt in two chunks, then token by token, padded left or right: as one forward over everything."""
    mask = torch.ones_like(IDS)
    mask[0, :6], mask[1, :15], mask[2, 14:] = 0, 0, 0
    positions = (mask.cumsum(-1) - 1).clamp(0)
    steps, found = [0, 10, 20, 21, 22, 23, 24], []
    for name in (NAME, "sdpa"):
        model = build(name).eval()
        cache = hub.StaticCache(model.config, max_cache_len=32) if static else hub.DynamicCache(config=model.config)
        with torch.no_grad():
            whole = model(IDS, attention_mask=mask, position_ids=positions).logits
            parts = []
            for a, b in zip(steps[:-1], steps[1:], strict=True):
                options = {"attention_mask": mask[:, :b], "position_ids": positions[:, a:b]}
                parts.append(model(IDS[:, a:b], past_key_values=cache, **options).logits)
        found.append([x[mask.bool()] for x in (whole, torch.cat(parts, dim=1))])
    (whole, parts), (exact_whole, exact_parts) = found
    assert error(parts, exact_parts) <= RATIO * error(whole, exact_whole)


@pytest.mark.parametrize("implementation", [None, "static"])
def test_generate(implementation: str | None) -> None:
    """The logits of every step are those of `sdpa` on the tokens that were generated."""
    mask = torch.ones_like(IDS)
    mask[0, :6], mask[1, :23] = 0, 0
    model, exact = build(), build("sdpa")
    made = model.generate(
        IDS, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, do_sample=False, output_logits=True,
        return_dict_in_generate=True, cache_implementation=implementation, disable_compile=True,
    )  # fmt: skip
    mask = nn.functional.pad(mask, (0, 8), value=1)
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(0)}
    with torch.no_grad():
        wanted, whole = (m(made.sequences, **options).logits[:, 23:-1] for m in (exact, model))
    assert error(torch.stack(made.logits, dim=1), wanted) <= RATIO * error(whole, wanted)


def test_encoder_with_padding() -> None:
    def encoder(name: str) -> hub.BertModel:
        torch.manual_seed(0)
        config = hub.BertConfig(vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
                            intermediate_size=64, initializer_range=0.15)  # fmt: skip
        config._attn_implementation = name
        return hub.BertModel(config, add_pooling_layer=False).eval()

    mask = torch.ones_like(IDS)
    mask[1, 9:], mask[2, :20] = 0, 0
    with torch.no_grad():
        models = [encoder(name) for name in (NAME, "sdpa")]
        padded = [m(IDS, attention_mask=mask).last_hidden_state for m in models]  # pads see the real tokens, too
        plain = [m(IDS).last_hidden_state for m in models]
    assert 0 < error(*padded) <= RATIO * error(*plain)


def test_cross_attention_is_full() -> None:
    module = nn.Module()
    module.is_causal = False
    q, k, v = (torch.randn(2, 4, t, 32, generator=torch.Generator().manual_seed(t)) for t in (5, 9, 9))
    wanted = hf.attention(q, k, v, scale=0.3).transpose(1, 2)
    assert torch.equal(ATTEND(module, q, k, v, scaling=0.3)[0], wanted)
    assert torch.equal(ATTEND(nn.Module(), q, k, v, is_causal=False, scaling=0.3)[0], wanted)


def compiled(model: Callable, backend: str) -> Callable:
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=True, backend=backend)


def test_compile_plain_and_packed_in_one_graph() -> None:
    model = build(num_hidden_layers=1)
    fast = compiled(model, "aot_eager")
    boundaries = torch.tensor([0, 7, 9, 24], dtype=torch.int32)
    varlen = {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 15, "max_length_k": 15}
    packed = varlen | {"position_ids": torch.cat([torch.arange(n) for n in (7, 2, 15)])[None], "use_cache": False}
    for ids, options in ((IDS, {"use_cache": False}), (IDS[:1], packed)):
        eager, graph = (results(model, list(run(ids, **options).logits), list(ids)) for run in (model, fast))
        exact = build("sdpa", num_hidden_layers=1)
        theirs = exact(ids, use_cache=False, position_ids=options.get("position_ids")).logits
        wanted = results(exact, list(theirs), list(ids))
        for got, same, sdpa in zip(graph, eager, wanted, strict=True):
            assert error(got, same) <= SAME * error(same, sdpa)


def test_compiled_padding_and_decoding() -> None:
    model = build(num_hidden_layers=1).eval()
    fast, mask = compiled(model, "eager"), torch.ones_like(IDS)
    mask[0, :6], mask[1, 20:] = 0, 0
    with torch.no_grad():
        wanted = model(IDS, attention_mask=mask).logits
        assert torch.equal(fast(IDS, attention_mask=mask).logits[mask.bool()], wanted[mask.bool()])
        steps = []
        for run in (model, fast):
            cache = hub.StaticCache(config=model.config, max_cache_len=32)
            model(IDS[:, :20], attention_mask=mask[:, :20], past_key_values=cache)
            steps.append(run(IDS[:, 20:21], attention_mask=mask[:, :21], past_key_values=cache).logits)
    assert torch.equal(steps[0][0], steps[1][0])  # row 1 ends in padding: any number will do


def test_compiled_packing_by_position_ids_alone_stops_the_program() -> None:
    fast, positions = compiled(build(num_hidden_layers=1), "eager"), torch.arange(24)[None] % 12
    with pytest.raises(RuntimeError, match="pass cu_seq_lens_q and cu_seq_lens_k"):
        fast(IDS[:1], position_ids=positions, use_cache=False)
    with pytest.raises(RuntimeError, match="pass cu_seq_lens_q and cu_seq_lens_k"):
        fast(IDS[:1], position_ids=positions, attention_mask=torch.ones(1, 24), use_cache=False)

    def layer(q: Tensor, positions: Tensor) -> Tensor:  # of a model that does not hand position_ids to its layers
        return ATTEND(nn.Module(), q, q, q, plan_of(positions))[0]

    q = torch.randn(1, 2, 24, 32)
    fast = compiled(layer, "eager")
    assert torch.equal(fast(q, torch.arange(24)[None]), layer(q, torch.arange(24)[None]))
    with pytest.raises(RuntimeError, match="pass cu_seq_lens_q and cu_seq_lens_k"):
        fast(q, positions)


HALF = torch.arange(24)[None] % 12
ENDS = torch.tensor([0, 12, 24])
PADDING = (torch.arange(24) > 3)[None].long()
HOLE = torch.stack((torch.arange(24) != 3, torch.arange(24) >= 0))


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"position_ids": HALF}, ValueError, "position_ids restart.*use_cache=False"),
        ({"position_ids": HALF, "attention_mask": torch.ones(1, 24)}, ValueError, "restart.*pass cu_seq_lens_q"),
        ({"position_ids": HALF, "attention_mask": PADDING}, ValueError, "position_ids restart"),
        ({"attention_mask": HOLE}, ValueError, "one unbroken run.*holes.*sdpa"),
        ({"attention_mask": torch.ones(1, 1, 24, 24)}, NotImplementedError, "\\(1, 1, 24, 24\\).*2D attention_mask"),
        ({"attention_mask": torch.ones(1, 24, 24)}, NotImplementedError, "\\(1, 24, 24\\).*2D attention_mask"),
        ({"output_attentions": True}, NotImplementedError, "argument output_attentions.*sdpa"),
        ({"softcap": 50.0}, NotImplementedError, "argument softcap"),
        ({"s_aux": torch.zeros(4)}, NotImplementedError, "argument s_aux"),
        ({"head_mask": torch.ones(4)}, NotImplementedError, "argument head_mask"),
        ({"position_bias": torch.ones(1, 4, 24, 24)}, NotImplementedError, "argument position_bias"),
        ({"something_new": 1}, NotImplementedError, "argument something_new"),
        ({"sliding_window": 8}, NotImplementedError, "sliding window.*of 8 tokens over 24 keys.*sliding_window=None"),
        ({"cu_seq_lens_q": ENDS}, ValueError, "give both"),
        ({"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS, "attention_mask": PADDING}, ValueError, "padding or past keys"),
    ],
)
def test_what_is_not_honoured_is_refused(options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build(num_hidden_layers=1)(IDS[: 2 if options.get("attention_mask") is HOLE else 1], **options)


def test_refused_models() -> None:
    with pytest.raises(NotImplementedError, match="sliding window.*of 8 tokens over 24 keys.*sliding_window=None"):
        build(config=hub.MistralConfig, sliding_window=8)(IDS)
    with pytest.raises(NotImplementedError, match="dropout \\(0.1\\).*config.attention_dropout=0.0"):
        build(attention_dropout=0.1).train()(IDS)
    build(attention_dropout=0.1).eval()(IDS)


def test_a_full_sliding_cache_is_refused() -> None:
    model = build(config=hub.MistralConfig, sliding_window=24).eval()
    cache = hub.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(NotImplementedError, match="sliding window"):
            model(IDS[:, :1], past_key_values=cache)


@pytest.mark.parametrize("create", [create_causal_mask, create_sliding_window_causal_mask])
def test_custom_patterns_are_refused(create: Callable) -> None:
    config = hub.MistralConfig(attn_implementation=NAME, sliding_window=24)
    embeddings, positions = torch.empty(1, 24, 0), torch.arange(24)[None]
    with pytest.raises(NotImplementedError, match="custom mask patterns"):
        create(config, embeddings, None, None, positions, and_mask_function=lambda b, h, q, k: k != 3)
    blocks = torch.full((1, 24), -1)
    blocks[0, 4:8] = 0
    for mask in (None, torch.ones(1, 24)):
        with pytest.raises(ValueError, match="look ahead inside blocks"):
            create(config, embeddings, mask, None, positions, block_sequence_ids=blocks)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    model = build().eval()
    cache = hub.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="covers 1 tokens, but with the cache there are 25"):
            model(IDS[:, :1], attention_mask=torch.ones(4, 1), past_key_values=cache)
    q = torch.randn(2, 4, 24, 32)
    for wrong in (plan_of(mask=PADDING), plan_of(HALF[:, :20], tokens=20)):
        with pytest.raises(NotImplementedError, match="mask"):
            ATTEND(nn.Module(), q, q, q, wrong)

"""A second scheme, registered here: it works everywhere a scheme is named, without an edit elsewhere.

The toy computes exact attention in FP32 and keeps only LSE and the inputs, in a shape of its own.
"""

import importlib
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, LlamaConfig

import sagetrain
from benchmarks import common, tables
from sagetrain.__main__ import compose
from sagetrain.compare import report
from sagetrain.integrations import huggingface
from sagetrain.ops import library, reference, schemes
from sagetrain.training.train import run
from tests.kernelkit import Case, error, exact
from tests.kernelkit import run as results_of
from tests.tiny import MODEL

calls = {"forward": 0, "backward": 0}


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool, cu_q: Tensor | None, cu_k: Tensor | None):
    options = {"is_causal": is_causal, "scale": scale, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    o, lse = reference.exact(*(x.float() for x in (q, k, v)), dtype=torch.float32, **options)
    return o.to(q.dtype), lse


def forward(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool,
    cu_q: Tensor | None, cu_k: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    calls["forward"] += 1
    with torch.no_grad():
        o, lse = attend(q, k, v, scale, is_causal, cu_q, cu_k)
    return torch.empty_like(q).copy_(o), lse, q.clone(), k.clone()


def backward(
    d_o: Tensor, d_lse: Tensor | None, v: Tensor, o: Tensor, q: Tensor, k: Tensor, scale: float, is_causal: bool,
    cu_q: Tensor | None, cu_k: Tensor | None, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    calls["backward"] += 1

    def differentiate() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        o, lse = attend(*leaves, scale, is_causal, cu_q, cu_k)
        return torch.autograd.grad([o, lse], leaves, [d_o, torch.zeros_like(lse) if d_lse is None else d_lse])

    with ThreadPoolExecutor(1) as another:  # this thread stands below autograd, where nothing is recorded
        return another.submit(differentiate).result()


def define(name: str, saved: Callable[..., tuple[Tensor, ...]]) -> tuple[torch.library.Library, library.Op]:
    """The toy's two ops in a namespace, and the function of both; `saved` is what they are said to save."""
    shared = "float scale, bool is_causal, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool deterministic"
    ops = torch.library.Library(name, "DEF")
    ops.define(f"attention_forward(Tensor q, Tensor k, Tensor v, {shared}) -> (Tensor, Tensor, Tensor, Tensor)")
    ops.define(
        "attention_backward(Tensor d_o, Tensor? d_lse, Tensor v, Tensor o, Tensor q, Tensor k, "
        f"{shared}) -> (Tensor, Tensor, Tensor)"
    )
    ops.impl("attention_forward", forward, "CPU")
    ops.impl("attention_backward", backward, "CPU")
    return ops, library.define(f"{name}::attention", saved)


@pytest.fixture(scope="module", autouse=True)
def toy() -> schemes.Scheme:
    ops, attention = define("toy", lambda q, k, cu: (torch.empty_like(q), torch.empty_like(k)))
    scheme = schemes.Scheme(
        name="toy",
        label="TOY",
        forward=attention,
        kernel_name=lambda device: f"{device.type}/toy",
        preset=lambda kernel: "paper",
        dtypes={"cpu": (torch.float32, torch.bfloat16)},
        max_head_dim=256,
    )
    yield schemes.register(scheme)
    del schemes.SCHEMES["toy"]
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping["toy"]
    ops._destroy()


def test_its_name_is_its_own() -> None:
    with pytest.raises(ValueError, match="there is a scheme 'toy' already"):
        schemes.register(schemes.get("toy"))
    with pytest.raises(ValueError, match="unknown scheme 'toi': choose from sage_int8, toy"):
        sagetrain.attention(*Case().tensors()[:3], scheme="toi")


@pytest.mark.parametrize("edges", [None, (0, 40, 40, 130)])
def test_attention_by_name(edges) -> None:
    case = Case(hq=4, hkv=2, dtype=torch.float32, cu_q=edges, cu_k=edges)
    found = results_of(lambda *x, **options: sagetrain.attention(*x, scheme="toy", **options), case)
    truth = exact(case)
    assert max(error(found[name], truth[name]) for name in truth) < 1e-5
    assert sagetrain.kernel_name("cpu", "toy") == "cpu/toy"


@pytest.mark.parametrize("name", [["toy"], {}, 7, schemes.INT8], ids=["list", "dict", "int", "scheme"])
def test_what_is_no_name_is_unknown(name: object) -> None:
    with pytest.raises(ValueError, match="unknown scheme .*: choose from sage_int8, toy"):
        sagetrain.attention(*Case().tensors()[:3], scheme=name)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "a, b"}, "letters, digits and underscores"),  # reports list names with commas
        ({"name": "paged|toy"}, "letters, digits and underscores"),  # transformers has an opinion on both
        ({"name": "flash_toy"}, "no 'flash'"),
        ({"name": "bf16_sdpa"}, "no 'bf16'"),  # would be overwritten by the arm
        ({"name": 5}, "letters, digits and underscores"),
        ({"dtypes": {}}, "expected a device type"),
        ({"dtypes": {"quantum": (torch.float32,)}}, "expected a device type"),
        ({"dtypes": {"cuda:0": (torch.float32,)}}, "expected a device type"),
        ({"dtypes": {"cpu": torch.float32}}, "a tuple of torch dtypes"),
        ({"dtypes": {"cpu": ("float32",)}}, "a tuple of torch dtypes"),
        ({"max_head_dim": 100}, "max_head_dim is 100, expected a multiple of 8"),
        ({"max_head_dim": 0}, "max_head_dim is 0"),
    ],
    ids=str,
)
def test_one_that_could_not_be_used_is_none(toy: schemes.Scheme, fields: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(toy, **({"name": "another"} | fields))


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_name_of_transformers_leaves_no_trace(toy: schemes.Scheme, name: str) -> None:
    before = dict(AttentionInterface().items())
    with pytest.raises(ValueError, match="transformers has an attention of that name"):
        schemes.register(replace(toy, name=name))
    assert name not in schemes.SCHEMES and dict(AttentionInterface().items()) == before


def test_the_plug_can_be_loaded_again(toy: schemes.Scheme) -> None:
    importlib.reload(huggingface)
    schemes.register(replace(toy, name="later"))
    assert "later" in AttentionInterface().valid_keys()
    del schemes.SCHEMES["later"]
    for interface in (AttentionInterface, AttentionMaskInterface):
        del interface._global_mapping["later"]


@pytest.mark.parametrize(
    ("name", "saved"),
    [
        ("few", lambda q, k, cu: (torch.empty_like(q),)),
        ("shape", lambda q, k, cu: (torch.empty_like(q), k.new_empty(3))),
        ("type", lambda q, k, cu: (torch.empty_like(q), torch.empty_like(k, dtype=torch.int8))),
    ],
)
def test_saving_what_is_not_stated_is_refused(name: str, saved: Callable[..., tuple[Tensor, ...]]) -> None:
    """Only compiled code goes by what is stated, and there it would be other memory than the backward reads."""
    ops, attention = define(f"toy_{name}", saved)
    q, k, v, _ = Case(dtype=torch.float32).tensors()
    with pytest.raises(ValueError, match=f"toy_{name}::attention_forward saves .* but `saved` says"):
        attention(q.requires_grad_(), k, v, 0.1, True, None, None, False)
    ops._destroy()


def test_its_own_limits_are_checked() -> None:
    q, k, v, _ = Case(d=192, dtype=torch.float32).tensors()
    assert sagetrain.attention(q, k, v, scheme="toy").shape == q.shape
    with pytest.raises(NotImplementedError, match="head dimension 192"):
        sagetrain.attention(q, k, v)
    with pytest.raises(TypeError, match="the cpu kernels take float32, bfloat16"):
        sagetrain.attention(q.half(), k.half(), v.half(), scheme="toy")


def test_compiled_as_one_graph() -> None:
    q, k, v, _ = Case(dtype=torch.float32).tensors()
    leaves = [x.requires_grad_() for x in (q, k, v)]
    compiled = torch.compile(lambda *x: sagetrain.attention(*x, scheme="toy"), fullgraph=True, backend="aot_eager")
    plain = sagetrain.attention(*leaves, scheme="toy")
    torch.testing.assert_close(compiled(*leaves), plain)
    wanted = torch.autograd.grad(plain.sum(), leaves)
    torch.testing.assert_close(torch.autograd.grad(compiled(*leaves).sum(), leaves), wanted)


def test_transformers_takes_it_packed_and_padded() -> None:
    config = LlamaConfig(
        vocab_size=61, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="toy", dtype=torch.float32)
    ids, mask = torch.randint(0, 61, (2, 24)), torch.ones(2, 24, dtype=torch.long)
    mask[1, 10:] = 0
    before = dict(calls)
    loss = model(ids, attention_mask=mask, labels=ids.where(mask > 0, -100)).loss
    loss.backward()
    assert calls == {name: count + 2 for name, count in before.items()}
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(ids, attention_mask=mask, labels=ids.where(mask > 0, -100)).loss, loss)


def test_a_strategy_takes_it() -> None:
    strategy = StrategyRegistry.get("sage_ddp").__class__(attention="toy")
    assert strategy.attention == "toy"


def test_a_recipe_takes_it_with_probe_and_report(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(500)))
    words = ["recipe=quickstart", "compare.arms=null", "trainer.accelerator=cpu", "trainer.precision=32-true", *MODEL]
    words += ["data.seq_len=32", "data.batch_size=2", "trainer.max_steps=4", f"data.path={text}", "probe.every=2"]
    toy = ["attention.name=toy", "attention.implementation=toy"]
    runs = [
        run(compose([*words, *more, f"out={tmp_path / name}"]))[0]
        for name, more in (("bf16", ["attention=bf16"]), ("toy", toy))
    ]
    info = json.loads((runs[1] / "run.json").read_text())
    assert (info["attention"], info["kernel"], info["handicap"]) == ("toy (cpu/toy)", "cpu/toy", None)
    assert "probe/grad_cosine" in (runs[1] / "metrics.csv").read_text().partition("\n")[0]
    comparison = report(runs, tmp_path / "report")
    assert comparison.baseline == "bf16" and [comparison.label(arm.name) for arm in comparison.others] == ["TOY"]


@pytest.mark.parametrize(("benchmark", "options"), [("accuracy", "--activations FILE"), ("parity", "--steps 1")])
def test_a_benchmark_takes_it(benchmark: str, options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of its own kernel in a file of its own; the default's are as they were, without a column for the scheme."""
    torch.save({0: dict(zip(("q", "k", "v", "d_o"), Case().tensors(), strict=True))}, tmp_path / "model.pt")
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    words = options.replace("FILE", str(tmp_path / "model.pt")).split()
    monkeypatch.setattr("sys.argv", [benchmark, "--scheme", "toy", *words])
    importlib.import_module(f"benchmarks.{benchmark}").main()
    (path,) = tmp_path.glob("*.csv")
    rows = tables.read(path)
    assert path.name == f"{benchmark}-toy-cpu-toy.csv" and tables.newest(rows, benchmark) == rows
    assert {(row["scheme"], row["kernel"]) for row in rows} == {("toy", "cpu/toy")}
    exact = [float(row["kernel_error"]) < 1e-4 for row in rows if row.get("measure") != "loss"]
    assert exact and all(exact)
    assert "scheme" not in common.conditions("cpu") and "toy" not in common.kernel_file(benchmark, "cpu").name

"""INT8 attention's error in the gradient is noise and little bias: benchmarks/bias.py, on a tiny Llama.

The model has learnt for 60 steps, since at random weights there is no bias to find. `paper`, the published scheme, has
nearly twenty times the kernel's, and so shows that the bar can be missed.
"""

import csv
import json
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import bias, parity, tables
from sagetrain.__main__ import compose
from sagetrain.data.corpus import build_tokenizer
from sagetrain.ops import reference
from sagetrain.training.train import run
from tests.tiny import RUN

BAR = 1 / 8  # of the bias of `paper`; without thresholds the kernel misses it
SIZE = parity.SIZES["tiny"]
BATCHES = 64

Found = dict[tuple[str, str], list[dict]]


@pytest.fixture(scope="module")
def learnt() -> tuple[nn.Module, list[bias.Batch]]:
    """A model after 60 steps, and batches that it has not seen."""
    model, source = parity.build(SIZE, "cpu"), parity.batches(parity.names(), SIZE, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=SIZE.lr)
    for _ in range(60):
        ids = next(source)
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    return model, [[(ids, ids)] for ids in islice(source, BATCHES)]


def measured(learnt: tuple[nn.Module, list[bias.Batch]], arms: dict[str, bias.Attend], batches: int = BATCHES) -> Found:
    found: Found = {}
    for row in bias.measure(learnt[0], learnt[1][:batches], arms):
        found.setdefault((row["arm"], row["part"]), []).append(row)
    return found


def test_the_kernel_has_an_eighth_of_the_published_schemes_bias_at_most(learnt) -> None:
    found = measured(learnt, {name: bias.attention(name) for name in ("sage_int8", "paper", "bf16")})
    for part in bias.PARTS:
        kernel, paper, bf16 = (found[name, part][-1]["bias"] for name in ("sage_int8", "paper", "bf16"))
        assert kernel < BAR * paper, part
        assert paper > 0.02 and abs(bf16) < 0.001, part
    assert found["paper", "all"][-1]["each"] < 4 * found["sage_int8", "all"][-1]["each"]  # of a single step it is less


def test_bias_stays_and_noise_falls_out(learnt) -> None:
    generator = torch.Generator().manual_seed(0)

    def noisy(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return bias.sdpa(q, k, v + (0.05 * torch.randn(v.shape, generator=generator)).to(v.dtype), **options)

    def biased(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
        return bias.sdpa(q, k, 1.05 * v, **options)

    found = measured(learnt, {"noisy": noisy, "biased": biased, "exact": bias.sdpa}, 32)
    noise, systematic, none = (found[name, "all"] for name in ("noisy", "biased", "exact"))
    assert noise[-1]["error"] < 0.35 * noise[0]["error"] and abs(noise[-1]["bias"]) < 0.2 * noise[-1]["each"]
    assert systematic[-1]["bias"] == pytest.approx(systematic[-1]["error"], rel=0.1) and systematic[-1]["bias"] > 0.02
    assert 0 < systematic[-1]["along"] < systematic[-1]["bias"] and abs(noise[-1]["along"]) < 0.002
    assert none[-1]["error"] < 0.002
    assert [row["tokens"] // (2 * SIZE.tokens) for row in noise] == [1, 2, 4, 8, 16, 32]


def test_the_estimates_are_those_of_vectors_of_known_bias_and_noise() -> None:
    generator, n, size = torch.Generator().manual_seed(0), 50, 20_000
    g = 1 + 0.5 * torch.randn(n, size, generator=generator)
    e = 0.02 + 0.1 * torch.randn(n, size, generator=generator)
    e[:, ::2] -= 0.04  # so of the bias of 0.02 nothing is along g; a tenth of g is
    e += 0.1 * g

    def found(n: int) -> dict[str, float]:
        pairs = [(x[:n], y[:n]) for x, y in ((g, g), (e, e), (e, g))]
        return bias.estimates(n, *(float(z) for x, y in pairs for z in (x.sum(0) @ y.sum(0), (x * y).sum())))

    assert found(n)["bias"] == pytest.approx((0.02**2 + 0.1**2) ** 0.5, rel=0.02) and found(n)["error"] > 0.102
    assert found(n)["along"] == pytest.approx(0.1, rel=0.02)
    assert found(n)["noise"] == pytest.approx(0.5 / n**0.5, rel=0.02)
    assert found(2)["noise"] == pytest.approx(0.5 / 2**0.5, rel=0.02)


def test_most_of_it_is_small_probabilities_that_become_zero(learnt) -> None:
    """With one maximum for many keys, as on a GPU, more of them do; a threshold instead of the nearest does not."""
    tile = replace(reference.SAGE_SM90, dithered=frozenset(), dithers_large=False)
    arms = {
        how: partial(reference.attention, preset=replace(tile, **{how: frozenset({"p"})}))
        for how in ("exact", "dithered")
    }
    found = measured(learnt, arms | {"nearest": partial(reference.attention, preset=tile)})
    nearest, dithered, exact = (found[name, "all"][-1] for name in ("nearest", "dithered", "exact"))
    assert exact["bias"] < 0.6 * nearest["bias"] and dithered["bias"] < 0.7 * nearest["bias"]
    assert dithered["each"] < 1.15 * nearest["each"]


@pytest.mark.parametrize("name", [
    "paper", "sage:p=exact", "sage_sm90:p=nearest,ds_dq=dithered", "sage_int8", "bf16",
    "sage:q=dithered,k=dithered,v=dithered,do_dv=dithered", "sage_int8@forward", "sage:p=exact@backward", "noise=0.01",
])  # fmt: skip
def test_names_of_attentions(name: str) -> None:
    q = torch.randn(1, 2, 40, 64, requires_grad=True)
    bias.attention(name)(q, q, q, is_causal=True, scale=0.1).sum().backward()
    assert q.grad.isfinite().all()


def test_a_half_has_one_ones_output_and_the_others_gradients() -> None:
    q, k, v, d_o = torch.randn(4, 1, 2, 100, 64, generator=torch.Generator().manual_seed(0))

    def results(name: str) -> list[Tensor]:
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        attend = bias.exact if name == "exact" else bias.attention(name)
        o = attend(*inputs, is_causal=True, scale=0.125)
        return [o.detach(), *torch.autograd.grad(o, inputs, d_o)]

    exact, paper = results("exact"), results("paper")
    for name, output, gradients in (("paper@forward", paper, exact), ("paper@backward", exact, paper)):
        for found, wanted in zip(results(name), [output[0], *gradients[1:]], strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert (exact[0] - paper[0]).abs().max() > 1e-3 and (exact[1] - paper[1]).abs().max() > 1e-3

    noise = bias.noisy(q, k, v, size=0.02, is_causal=True) - bias.exact(q, k, v, is_causal=True)
    assert float(noise.norm() / exact[0].norm()) == pytest.approx(0.02, rel=0.05) and abs(float(noise.mean())) < 2e-4


def test_an_operand_is_rounded_as_its_name_says() -> None:
    found = bias.attention("sage_sm90:p=nearest,ds_dq=exact,q=dithered").keywords["preset"]
    assert found.dithered == reference.SAGE_SM90.dithered - {"p", "ds_dq"} | {"q"} and found.exact == {"ds_dq"}


@pytest.mark.parametrize(
    "name", ["sdpa", "sage:p", "sage:x=exact", "paper2", "sage_int8:p=exact", "paper@both", "noise"]
)
def test_other_names_are_refused_with_the_choices(name: str) -> None:
    with pytest.raises(ValueError, match=r"choose from .*paper|one of q, k"):
        bias.attention(name)


def test_parts_of_a_micro_batch_weigh_as_their_targets_do(learnt) -> None:
    """Examples each by themselves give what they give as padded rows of one part, which mean over all targets."""
    (ids, _), lengths = learnt[1][0][0], (30, 50, 41, 12)
    parts, padded, labels = [], ids[:1].repeat(4, 1)[:, :50], torch.full((4, 50), -100)
    for i, (length, prompt) in enumerate(zip(lengths, (29, 20, 35, 2), strict=True)):
        padded[i, :length] = ids[0, i : i + length]
        labels[i, prompt:length] = padded[i, prompt:length]
        parts.append((padded[i : i + 1, :length], labels[i : i + 1, :length]))
    found, wanted = (
        list(bias.measure(learnt[0], [batch, learnt[1][1]], {"bf16": bias.sdpa}))
        for batch in (parts, [(padded, labels)])
    )
    assert any(row["noise"] for row in wanted)
    for x, y in zip(found, wanted, strict=True):
        assert x["noise"] == pytest.approx(y["noise"], rel=1e-5) if y["noise"] else not x["noise"]  # sums in FP32


@pytest.fixture
def asked(tmp_path: Path, monkeypatch) -> tuple[str, str]:
    """A run, and a file of 40 questions."""
    monkeypatch.chdir(tmp_path)
    question = {"subject": "logic", "question": "Which?", "choices": ["this", "that", "both", "none"], "answer": 2}
    text = tmp_path / "mmlu.jsonl"
    text.write_text("".join(json.dumps(question | {"question": f"Which of {i}?"}) + "\n" for i in range(40)))
    run(compose([*RUN, "trainer.max_steps=2", f"out={tmp_path / 'run'}"]))
    return str(tmp_path / "run"), str(text)


def test_examples_of_a_task_are_those_of_fine_tuning(asked: tuple[str, str]) -> None:
    model, text = asked
    name = bias.load(model)[1]
    tokenizer = build_tokenizer(name)

    def read(seq_len: int, size: int, tokens: int) -> list[bias.Batch]:
        return list(bias.examples("mmlu", name, [text], seq_len, size, tokens, "cpu"))

    batches = read(256, 3, 1)
    assert [len(batch) for batch in batches] == [3, 3]  # two at least
    for ids, labels in batches[0] + batches[1]:
        prompt, answer = (tokenizer.decode(ids[0][here]) for here in (labels[0] < 0, labels[0] >= 0))
        assert "about logic" in prompt and prompt.endswith("Answer:") and answer.lstrip().startswith("C")
        assert torch.equal(labels[labels >= 0], ids[labels >= 0])
    for (long, _), (short, labels) in zip(batches[0], read(40, 3, 1)[0], strict=True):
        cut = 40 - int(long[0, 0] == tokenizer.bos_token_id)
        assert short.shape == (1, 40) and torch.equal(short[:, -cut:], long[:, -cut:]) and (labels >= 0).any()
        assert torch.equal(short[:, : 40 - cut], long[:, : 40 - cut])
    assert 2000 <= sum(ids.numel() for batch in read(256, 2, 2000) for ids, _ in batch) < 2000 + 2 * 256
    with pytest.raises(ValueError, match="the text has 40 examples"):  # none held out; said before anything is measured
        read(256, 4, 2**22)


def test_rows_of_a_task_stand_apart(asked: tuple[str, str], tmp_path: Path, monkeypatch) -> None:
    """From those of a text of the same name, in the file and in tables."""
    model, text = asked
    same = ["--seq-len", "256", "--batch-size", "4", "--attention", "bf16"]
    monkeypatch.setattr(bias, "kernel_file", lambda *_: tmp_path / "bias-cpu.csv")
    bias.main([model, "--text", text, "--task", "mmlu", "--tokens", "1K", *same])
    rows = list(csv.DictReader((tmp_path / "bias-cpu.csv").open()))
    assert {row["task"] for row in rows} == {"mmlu"} and int(rows[-1]["tokens"]) >= 1024
    plain = tmp_path / "plain" / Path(text).name
    plain.parent.mkdir()
    plain.write_text(json.dumps({"text": "All that is gold does not glitter. " * 400}))
    monkeypatch.setenv("SAGETRAIN_COMMIT", "0" * 12)  # rows of another commit would
    bias.main([model, "--text", str(plain), "--tokens", "2K", *same])
    assert [row for row in csv.DictReader((tmp_path / "bias-cpu.csv").open()) if row["task"]] == rows
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match="rows of several cases: say task=$"):
        tables.bias("bias-cpu", model="run")
    assert "BF16" in tables.bias("bias-cpu", model="run", task="mmlu")


def test_a_run_is_measured(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("All that is gold does not glitter. " * 400)
    run(compose([*RUN, "trainer.max_steps=2", f"out={tmp_path / 'run'}"]))
    words = [str(tmp_path / "run"), "--text", str(text), "--seq-len", "64", "--batch-size", "2", "--layers"]
    monkeypatch.setattr(bias, "kernel_file", lambda *_: tmp_path / "bias-cpu.csv")
    for _ in range(2):  # the second takes the first one's place
        bias.main([*words, "--tokens", "1K", "--attention", "bf16", "sage:p=exact"])
    assert "tokens 1024  arm sage:p=exact  part layer 0" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "bias-cpu.csv").open()))
    parts = {row["part"] for row in rows}
    assert parts == {*bias.PARTS, *(f"layer {i}" for i in range(len(parts) - 4))} and "layer 0" in parts
    assert len(rows) == 4 * 2 * len(parts) and rows[-1]["text"] == "text.txt"  # after 1, 2, 4, 8 micro-batches
    with pytest.raises(ValueError, match="at least 2, and the text has"):
        bias.main([*words, "--tokens", "4M", "--no-save"])

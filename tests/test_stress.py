"""Training where it is hard: what counts as a failure, how hard it begins, and that a run that fails has its row."""

import csv
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import sagetrain
from benchmarks import jobs, stress
from tests.launch import SAGETRAIN, Program
from tests.tiny import pretrained

STEPS = np.arange(1, 201)
FALLING = 4 + 4 * np.exp(-STEPS / 50)  # 6.6 after 20 steps of warm-up
CALM = np.ones(200)


def found(loss: np.ndarray, norm: np.ndarray = CALM) -> dict[str, Any]:
    return stress.stability(STEPS[: len(loss)], loss, norm[: len(loss)], warmup=20)


def test_a_loss_that_falls_does_not_fail() -> None:
    assert found(FALLING) == {"worst": "0.00000", "fails": "", "grad_norm_max": "1", "not_finite": 0}


def test_a_loss_that_rises_and_comes_back_does_not_fail() -> None:
    spike = FALLING.copy()
    spike[100:120] = 9
    assert found(spike)["fails"] == ""
    assert float(found(spike)["worst"]) == pytest.approx(9 - FALLING[90:100].mean(), abs=1e-4)
    spike[50] = 15  # one step alone, which the mean takes for a tenth
    assert float(found(spike)["worst"]) == pytest.approx(9 - FALLING[90:100].mean(), abs=1e-4)


def test_a_loss_that_stays_high_fails_where_that_began() -> None:
    spike = FALLING.copy()
    spike[60:80], spike[150:] = 20, 9
    norm = CALM.copy()
    norm[5], norm[152] = 90, 70
    row = found(spike, norm)
    level = FALLING[10:20].mean() + 0.1  # steps 11 to 20
    first = next(n for n in range(1, 11) if (9 * n + FALLING[140 + n : 150].sum()) / 10 > level)
    assert row["fails"] == 150 + first
    assert row["grad_norm_max"] == "70" and row["not_finite"] == 0  # warm-up has no part in the norm
    assert float(row["worst"]) == pytest.approx(20 - FALLING[50:60].mean(), abs=1e-4)


def test_neither_noise_nor_a_last_step_is_a_failure() -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (100, 200))
    assert sum(found(6 + each)["fails"] != "" for each in noise) < 5  # a loss that does not fall at all
    late = FALLING.copy()
    late[-10:] = 20  # the mean is above from the second of them on
    assert found(late)["fails"] == ""
    late[-11:] = 20
    assert found(late)["fails"] == 191


@pytest.mark.parametrize("end", [10, 20, 120])
@pytest.mark.parametrize("of", ["loss", "norm"])
def test_a_step_that_is_not_finite_fails(end: int, of: str) -> None:
    """In warm-up, at its end, and after it; a run ends there."""
    curves = {"loss": FALLING[:end].copy(), "norm": CALM[:end].copy()}
    curves[of][-1] = np.nan
    row = found(**curves)
    assert row["fails"] == end and row["not_finite"] == 1
    assert row["worst"] == ("0.00000" if end > 20 else "") and row["grad_norm_max"] == ("1" if end > 20 else "")


def test_of_the_layers_the_largest_is_told() -> None:
    """At the first and the last probe; an error, of all probes."""
    columns = {f"probe/sigma_{x}_layer{i}": (None, np.array([i + 1, 9, 5 - i])) for x in "qk" for i in (0, 1)}
    columns |= {f"probe/d{x}_error_layer{i}": (None, np.array([0.1, 0.2 + i, 0.1])) for x in "qk" for i in (0, 1)}
    both = {"sigma_q_first": "2", "sigma_q_last": "5", "dq_error": "1.2"}
    both |= {name.replace("q", "k"): value for name, value in both.items()}
    assert stress.probed(SimpleNamespace(columns=columns)) == both
    assert stress.probed(SimpleNamespace(columns={})) == dict.fromkeys(both, "")


@pytest.mark.parametrize("sigma", [5, 10])
def test_q_and_k_are_scaled_in_every_layer(sigma: float, tmp_path: Path) -> None:
    """As the scaled model gives them, for tokens that it was not scaled with, too."""
    model = AutoModelForCausalLM.from_pretrained(pretrained(tmp_path))
    ids = torch.randint(264, (4, 1, 512), generator=torch.Generator().manual_seed(0))
    stress.scale(model, ids[0], sigma)
    given: dict[str, float] = {}
    for name, part in model.named_modules():
        if name.endswith("_proj"):
            part.register_forward_hook(lambda *x, name=name: given.__setitem__(name, float(x[2].std())))
    for each, within in ((ids[0], 1e-3), (ids[1], 0.1)):
        with torch.no_grad():
            model(each)
        near = {name for name, value in given.items() if value == pytest.approx(sigma, rel=within)}
        assert near == {f"model.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in "qk"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Results go to a folder of the test's; commands are forks. The options of a small benchmark."""
    monkeypatch.setattr(stress, "conditions", lambda device: {"device": device, "kernel": "cpu/x"})
    monkeypatch.setattr(stress, "kernel_file", lambda name, device: tmp_path / "results" / f"{name}-cpu-x.csv")

    def command(words: list[str], **_: Any) -> SimpleNamespace:
        program = SAGETRAIN.replace("'sagetrain'", repr(words[2]))
        return SimpleNamespace(returncode=Program(program, *words[3:], folder=tmp_path).ends())

    monkeypatch.setattr(jobs.subprocess, "run", command)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{i} and {i} is {i + i}. " * 5}) + "\n" for i in range(300)))
    words = ["--data", str(text), "--model", str(pretrained(tmp_path / "model")), "--seeds", "1"]
    words += [f"model.config.{size}_size={n}" for size, n in (("hidden", 64), ("intermediate", 64))]
    words += ["model.config.num_hidden_layers=2", "model.config.num_attention_heads=2", "trainer.max_steps=6"]
    words += ["model.config.num_key_value_heads=1", "optim.warmup_steps=2", "data.seq_len=64", "data.batch_size=2"]
    words += ["probe.every=1", "data.val_documents=9", "trainer.limit_val_batches=1", "trainer.precision=32-true"]
    return words


def test_weights_are_the_same_whenever_they_are_drawn(here: list[str], tmp_path: Path) -> None:
    cfg = stress.compose([*stress.RECIPE, *stress.RUN, *here[6:], "model.config.vocab_size=264"])
    text, tokenizer = Path(here[1]), here[3]
    one, two, scaled = (
        load_file(stress.llama(tmp_path / name, cfg, tokenizer, text, sigma) / "model.safetensors")
        for name, sigma in (("one", None), ("two", None), ("scaled", 5.0))
    )
    same = {name for name, weight in one.items() if torch.equal(weight, two[name])}
    assert same == set(one)
    moved = {name for name, weight in one.items() if not torch.equal(weight, scaled[name])}
    assert moved == {name for name in one if "q_proj" in name or "k_proj" in name}


@pytest.mark.parametrize(
    ("info", "error"),
    [
        ('{"status": "failed", "error": "OutOfMemoryError: CUDA"}', RuntimeError),
        ('{"status": "stopped", "error": ""}', RuntimeError),
        ('{"status": "fail', ValueError),
    ],
)
@pytest.mark.parametrize("status", [0, 1])
def test_what_is_no_result_ends_the_benchmark(info: str, error: type, status: int, tmp_path: Path) -> None:
    def command(words: list[str], **_: Any) -> SimpleNamespace:
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "run.json").write_text(info)
        return SimpleNamespace(returncode=status)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(error, match="run"):
        patch.setattr(jobs.subprocess, "run", command)
        stress.train(jobs.slots(1), tmp_path / "run", "sagetrain")


def test_an_error_begins_nothing_more() -> None:
    begun = []
    with pytest.raises(RuntimeError, match="first"), jobs.pool(jobs.slots(1)) as threads:
        first = threads.submit(time.sleep, 0.3)
        waiting = [threads.submit(begun.append, i) for i in range(9)]
        raise RuntimeError("first")
    assert first.done() and not begun and all(each.cancelled() for each in waiting)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["seed=7"], "seed=7: this is for the benchmark to set"),
        (["attention.name=x", "optim.lr=1"], "attention.name=x: this"),
        (["model.config.model_type=qwen3"], "model_type=qwen3: this is for the benchmark to set"),
        (["--seeds", "0"], "0 is less than 1"),
        (["--data", "nothing.jsonl"], "nothing.jsonl does not exist"),
        (["--settings", "sigma1", "--arms", "bf16", "published"], "only: sigma1 with data.document_boundaries=false"),
        (["--arms", "noisy"], "bf16 has to be among them"),
    ],
)
def test_what_cannot_be_asked(
    words: list[str], said: str, here: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        stress.main(["--out", str(tmp_path / "out"), *here, *words])
    assert not (tmp_path / "out").exists()
    assert said in capsys.readouterr().err


def rows_of(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results" / "stress-cpu-x.csv").open()))


def test_hard_settings_give_rows_and_curves(
    here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(tmp_path / "out"), "--settings", "sigma5", "sinks", *here]
    stress.main(words)
    rows = rows_of(tmp_path)
    assert [(row["setting"], row["model"], row["arm"], row["lr"]) for row in rows] == [
        ("sigma5", "llama-sigma5", "bf16", "0.002"), ("sigma5", "llama-sigma5", "sage_int8", "0.002"),
        ("sinks", "model", "bf16", "0.0002"), ("sinks", "model", "sage_int8", "0.0002"),
    ]  # fmt: skip
    assert all(row["steps"] == "6" and row["status"] == "finished" and row["val_loss"] for row in rows)
    assert not rows[0]["sigma_q_first"] and not rows[0]["dq_error"]
    assert [float(rows[1][f"sigma_{x}_first"]) for x in "qk"] == pytest.approx([5, 5], rel=0.1)
    assert float(rows[3]["sigma_q_first"]) < 2 and 0 < float(rows[3]["dk_error"]) < 0.2
    curves = list(csv.DictReader((tmp_path / "results" / "stress-sigma5-cpu-x" / "metrics.csv").open()))
    assert [(row["arm"], row["step"]) for row in curves[::6]] == [("bf16", "1"), ("sage_int8", "1")]
    assert sum(float(row["loss"]) for row in curves[1:6]) / 5 == pytest.approx(float(rows[0]["train_loss"]), abs=1e-4)

    def full(*_: Any, stdout: Any, **__: Any) -> SimpleNamespace:
        stdout.write("a line\nthe disk is full\n\n")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(jobs.subprocess, "run", full)
    stress.main(words)  # nothing is run again
    (tmp_path / "out" / "sigma10").mkdir()
    (tmp_path / "out" / "sigma10" / "bf16-seed0.txt").write_text("of another time\n")
    with pytest.raises(RuntimeError, match="status 1: .*bf16-seed0.txt has what it said, last: the disk is full$"):
        stress.main([*words[:2], "--settings", "sigma10", *here])
    for other in (["optim.lr=1e-3"], ["--tokenizer", str(tmp_path / "other")]):
        pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="has runs of (given|tokenizer) .*: choose another folder"):
            stress.main([*words[:5], *here, *other])
    with pytest.raises(ValueError, match="has runs of model .*: choose another folder"):
        stress.main([*words[:3], "sinks", *here[:3], str(tmp_path / "other"), "--tokenizer", *here[3:]])
    tokenizer = ["--tokenizer", here[3], *here[:2], *here[4:]]
    stress.main(["--out", str(tmp_path / "other"), "--settings", "sinks", *tokenizer])
    out = capsys.readouterr().out
    assert "sinks: skipped" in out and "sigma5 bf16-seed0: begins" in out and "sinks sage_int8-seed0: finished" in out


def test_qk_norm_is_the_control_with_norms(here: list[str], tmp_path: Path) -> None:
    stress.main(["--out", str(tmp_path / "out"), "--settings", "sigma1", "qknorm", *here])
    assert [(row["setting"], row["model"], row["model_type"], row["lr"]) for row in rows_of(tmp_path)] == [
        (name, f"llama-{name}", kind, "0.002")
        for name, kind in (("sigma1", "llama"), ("qknorm", "qwen3"))
        for _ in ("bf16", "sage_int8")
    ]
    folders = [tmp_path / "out" / f"llama-{name}" for name in ("sigma1", "qknorm")]
    plain, normed = (load_file(folder / "model.safetensors") for folder in folders)
    norms = {f"model.layers.{i}.self_attn.{x}_norm.weight" for i in (0, 1) for x in "qk"}
    assert set(normed) - set(plain) == norms
    assert all(torch.equal(weight, normed[name]) for name, weight in plain.items())
    plain, normed = (json.loads((folder / "config.json").read_text()) for folder in folders)
    same = ("head_dim", "rms_norm_eps", "rope_parameters", "attention_bias", "tie_word_embeddings")
    assert [plain[key] for key in same] == [normed[key] for key in same]


def test_many_tokens_a_step_by_all_arms(here: list[str], tmp_path: Path) -> None:
    """What is given stands above what the setting changes; the rest of that holds."""
    words = ["--out", str(tmp_path / "out"), "--settings", "tokens1m", *here, "trainer.accumulate_grad_batches=3"]
    stress.main([*words, "--arms", *stress.ARMS])
    rows = rows_of(tmp_path)
    assert {(row["setting"], row["model"], row["lr"], row["steps"]) for row in rows} == {
        ("tokens1m", "llama-sigma1", "0.001", "6")
    }
    assert [(row["arm"], row["attention"]) for row in rows] == [
        ("bf16", "SDPA flash"), ("sage_int8", f"sage_int8 ({sagetrain.kernel_name('cpu')})"),
        ("noisy", "SDPA flash, noise of 0.016"), ("published", "published (reference)"),
    ]  # fmt: skip
    assert all(row["status"] == "finished" and row["tokens_per_step"] == "384" for row in rows)
    losses = [float(row["train_loss"]) for row in rows]
    assert max(losses) - min(losses) < 0.02
    for run in (tmp_path / "out" / "tokens1m").glob("*-seed0"):
        assert "document_boundaries: false" in (run / "config.yaml").read_text()
    stress.main([*words, "--arms", "bf16", "--seeds", "2"])
    comparison = tmp_path / "results" / "stress-tokens1m-cpu-x" / "comparison.json"
    assert "shared a device" not in comparison.read_text()
    stress.main([*words, "--arms", "bf16", "--jobs", "2"])  # what else there is stays among rows and curves
    assert "Runs shared a device" in json.loads(comparison.read_text())["notes"][-1]
    runs = [*((arm, "0") for arm in stress.ARMS), ("bf16", "1")]
    assert [(row["arm"], row["seed"]) for row in rows_of(tmp_path)] == runs and rows_of(tmp_path)[:4] == rows
    curves = csv.DictReader((tmp_path / "results" / "stress-tokens1m-cpu-x" / "metrics.csv").open())
    assert sorted((row["arm"], row["seed"]) for row in curves)[::6] == sorted(runs)


def test_a_setting_of_a_million_tokens_a_step() -> None:
    cfg = stress.compose([*stress.RECIPE, *stress.RUN, *stress.SETTINGS["tokens1m"][2], "model.tokenizer=x"])
    tokens = cfg.data.seq_len * cfg.data.batch_size * cfg.trainer.accumulate_grad_batches
    assert (tokens, cfg.trainer.max_steps, cfg.optim.warmup_steps) == (1_048_576, 100, 30)


def test_sigma_is_what_a_setting_says() -> None:
    assert [stress.WEIGHTS[stress.SETTINGS[f"sigma{n}"][0]][0] for n in (1, 5, 10)] == [None, 5, 10]


@pytest.mark.parametrize("word", ["model.config.qk_norm=true", "model.config.mlp_bias=true", "optim.lr=abc"])
def test_a_word_that_no_model_has_takes_no_folder(word: str, here: list[str], tmp_path: Path) -> None:
    """The second is one that a Llama has."""
    with pytest.raises(ValueError, match=r"not a setting of a (llama|qwen3) model|could not convert"):
        stress.main(["--out", str(tmp_path / "out"), "--settings", "qknorm", *here, word])
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_finite_is_a_row(here: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--out", str(tmp_path / "out"), "--settings", "lr3x", *here, "optim.lr=1e30"]
    stress.main(words)
    rows = rows_of(tmp_path)
    assert [(row["model"], row["arm"], row["lr"], row["status"], row["not_finite"]) for row in rows] == [
        ("llama-sigma1", arm, "3e+30", "failed", "1") for arm in ("bf16", "sage_int8")
    ]
    for row in rows:
        assert row["steps"] == "6" and 1 < int(row["fails"]) < 6 and int(row["tokens"]) == int(row["fails"]) * 128
    monkeypatch.setattr(jobs.subprocess, "run", lambda *_, **__: pytest.fail("it was run again"))
    stress.main(words)


def test_of_what_a_command_said_before_nothing_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "said.txt").write_text("of another time\n")
    monkeypatch.setattr(jobs.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=-9))
    with pytest.raises(RuntimeError, match="status -9: .*said.txt has what it said, last: nothing$"):
        jobs.command(jobs.slots(1), tmp_path / "said.txt", "sagetrain")

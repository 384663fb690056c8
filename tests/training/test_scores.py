"""eval.json: it holds what was asked, is refused before the questions where it cannot be kept, and loses nothing."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from sagetrain.data import ByteTokenizer
from sagetrain.errors import is_bad_input
from sagetrain.evaluation import scores
from sagetrain.evaluation.tasks import Files, build

pytest.importorskip("lm_eval")

from sagetrain import evaluate as command  # noqa: E402
from sagetrain.evaluation import harness  # noqa: E402
from tests.training import test_evaluate  # noqa: E402
from tests.training.test_evaluate import HUB, LOCAL, Known, built, model_of, write  # noqa: E402

data, known, train = test_evaluate.data, test_evaluate.known, test_evaluate.train  # fixtures


@pytest.fixture(autouse=True)
def own_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness.datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


# ------------------------------------------------------------------------------------------------ what was asked


def test_digest_tells_what_was_asked(tmp_path: Path) -> None:
    def of(task: str, records: list[dict[str, Any]], limit: int | None = None) -> str:
        return harness.digest(build(task, Files([write(tmp_path / "x.jsonl", records)], []), 0), limit)

    for task, records in HUB.items():
        assert of(task, records) == of(task, records) != of(task, records[1:])
    gsm8k, mmlu = HUB["gsm8k"], HUB["mmlu"]
    assert of("gsm8k", gsm8k, 2) == of("gsm8k", gsm8k[:2]) != of("gsm8k", gsm8k[2:])  # the same number
    assert of("gsm8k", [gsm8k[0] | {"answer": "#### 1"}]) != of("gsm8k", gsm8k[:1])  # the same question
    assert of("mmlu", mmlu[:2]) == of("mmlu", mmlu[1::-1])  # subjects in another order
    assert of("mmlu", [mmlu[0] | {"answer": 0}]) != of("mmlu", mmlu[:1])


@pytest.mark.parametrize("task", HUB)
def test_files_and_the_hub_have_one_digest(task: str, tmp_path: Path) -> None:
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    records = [record for record in HUB[task] if record.get("subject") in (None, "anatomy")]
    name = "mmlu/default/mmlu_anatomy.yaml" if task == "mmlu" else test_evaluate.ASKED[task].defined
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / name, resolve_func=True)
    config.pop("tag", None)
    splits = dict.fromkeys(("train", "dev", "validation", "test"), datasets.Dataset.from_list(records))
    hub = ConfigurableTask(config=config | {"num_fewshot": 0, "custom_dataset": lambda **_: splits})
    local = build(task, Files([write(tmp_path / "x.jsonl", records)], []), 0)
    assert harness.digest(local) == harness.digest(hub)


def test_a_limit_that_leaves_out_nothing_is_none(data: Path, known: type[Known]) -> None:
    tasks = built(data, "gsm8k", "mmlu")
    found = harness.evaluate(model_of(), ByteTokenizer(), tasks, quiet=True, limit=3)
    assert [found[task]["limit"] for task in ("gsm8k", "mmlu")] == [3, None]  # 4 questions, 3 of a subject
    assert found["mmlu"]["digest"] == harness.digest(tasks["mmlu"]) and found["mmlu"]["n"] == 4
    assert found["gsm8k"]["digest"] == harness.digest(tasks["gsm8k"], 3) != harness.digest(tasks["gsm8k"])


def _unfinished(folder: Path) -> None:
    """As if it was killed at its end."""
    path = folder / "run.json"
    path.write_text(path.read_text().replace('"finished"', '"failed"'))


def test_a_run_that_goes_on_with_other_questions_is_evaluated_anew(train, data: Path) -> None:
    folder = train("hellaswag")
    (first,) = (of["sage_int8"]["hellaswag"] for of in scores.read(folder).values())
    (folder / scores.FILE).write_text((folder / scores.FILE).read_text().replace('"n": 3', '"n": 33'))
    _unfinished(folder)
    train("hellaswag")
    assert scores.read(folder)["4"]["sage_int8"]["hellaswag"]["n"] == 33  # as it was
    _unfinished(folder)
    write(data / "hellaswag-val.jsonl.xz", LOCAL["hellaswag"][::-1])
    train("hellaswag")
    again = scores.read(folder)["4"]["sage_int8"]["hellaswag"]
    assert again["n"] == 2 and again["digest"] != first["digest"]


# ------------------------------------------------------------------------------------------------ refused in time


@pytest.mark.parametrize("text, said", [
    ('{"4": {"sdpa"', "cannot be read: "),
    ("\ud800", "cannot be read: "),
    ("[]", "holds list, no mapping of steps"),
    ('{"last": {}}', "step 'last' is no whole number"),
    ('{"4": []}', "step 4 is list, no mapping"),
    ('{"4": {"sdpa": 5}}', "step 4, sdpa is int, no mapping"),
    ('{"4": {"sdpa": {"drop": {"n": 4}}}}', 'step 4, sdpa, drop has no "scores"'),
    ('{"4": {"sdpa": {"drop": {"scores": [1]}}}}', 'step 4, sdpa, drop has no "scores"'),
], ids=range(8))  # fmt: skip
def test_a_damaged_file_is_named_and_left_alone(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / scores.FILE
    file.write_bytes(text.encode(errors="surrogatepass"))
    for reads in (scores.read, scores.check, lambda folder: scores.keep(folder, 4, "sdpa", {"drop": {"scores": {}}})):
        with pytest.raises(ValueError) as raised:
            reads(tmp_path)
        assert str(raised.value).startswith(f"{file}: {said}") and is_bad_input(raised.value)
    assert file.read_bytes() == text.encode(errors="surrogatepass")


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A folder of transformers."""
    model_of().save_pretrained(tmp_path / "model")
    harness.for_transformers(ByteTokenizer()).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def evaluate(data: Path, known: type[Known], capsys: pytest.CaptureFixture):
    """Runs the command; its exit status, and what it said after transformers."""

    def go(model: str, *words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = command.main([model, "--tasks", "drop", "--data", str(data), "--device", "cpu", *words])
        said = capsys.readouterr()
        return status, said.out, said.err

    return go


def test_a_folder_that_cannot_be_written_is_refused_before_the_questions(
    model: str, evaluate, known: type[Known], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    status, _, said = evaluate(model, "--out", str(tmp_path / "out"))
    assert status == 2 and said.count("\n") == 1 and known.computed == 0
    assert f"--out {tmp_path / 'out'}: " in said and "No space left" in said


def test_a_damaged_file_is_refused_before_the_questions(model: str, evaluate, known: type[Known], tmp_path: Path):
    (tmp_path / scores.FILE).write_text("{")
    status, _, said = evaluate(model, "--out", str(tmp_path))
    assert status == 2 and said.count("\n") == 1 and f"{tmp_path / scores.FILE}: cannot be read" in said
    assert known.computed == 0


def test_a_run_with_a_damaged_file_is_refused_before_training(train, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / scores.FILE).write_text('{"4": []}')
    with pytest.raises(ValueError, match=r"out/eval.json: step 4 is list"):
        train("hellaswag")
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_a_folder_has_scores_of_one_model(model: str, evaluate, known: type[Known], tmp_path: Path, monkeypatch):
    other, out = tmp_path / "other", tmp_path / "out"
    model_of(seed=1).save_pretrained(other)
    harness.for_transformers(ByteTokenizer()).save_pretrained(other)
    assert evaluate(model, "--out", str(out))[0] == 0
    before, known.computed = (out / scores.FILE).read_bytes(), 0
    status, _, said = evaluate(str(other), "--out", str(out))
    assert (status, said) == (2, f"sagetrain: error: --out {out} has scores of {model}: choose another folder\n")
    assert known.computed == 0 and (out / scores.FILE).read_bytes() == before
    monkeypatch.chdir(tmp_path)
    assert evaluate("model", "--out", str(out), "--attention", "sdpa")[0] == 0  # named in another way
    assert set(scores.read(out)["0"]) == {"sage_int8", "sdpa"}


# ------------------------------------------------------------------------------------------------ nothing is lost


def test_several_may_look_at_once_whether_scores_can_be_written(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert not any(threads.map(lambda _: scores.check(tmp_path), range(2000)))
    assert not list(tmp_path.iterdir())


def test_answers_stay_until_the_scores_are_kept(
    model: str, evaluate, known: type[Known], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        status, shown, said = evaluate(model, "--out", str(tmp_path / "out"))
    assert status == 2 and "drop" in shown and "f1" in shown  # the table
    assert "No space left on device" in said and "the answers are kept" in said and "Traceback" not in said
    assert not list((tmp_path / "out").glob("*.json")) and not list((tmp_path / "out").glob(".*.partial"))
    assert known.computed == 3
    assert evaluate(model, "--out", str(tmp_path / "out"))[0] == 0 and known.computed == 3  # none asked again
    assert scores.read(tmp_path / "out")["0"]["sage_int8"]["drop"]["model"] == model
    evaluate(model, "--out", str(tmp_path / "out"))
    assert known.computed == 6  # then they are gone


def _keep_each(folder: Path, first: int, gate: Any) -> None:
    gate.wait()
    for step in range(first, first + 60, 2):
        scores.keep(folder, step, "sdpa", {"drop": {"scores": {"f1": 0.5}}})


def test_two_that_write_at_once_lose_nothing(tmp_path: Path) -> None:
    fork = multiprocessing.get_context("fork")
    gate = fork.Barrier(2)
    both = [fork.Process(target=_keep_each, args=(tmp_path, first, gate)) for first in (0, 1)]
    for each in both:
        each.start()
    for each in both:
        each.join()
    assert [each.exitcode for each in both] == [0, 0]
    assert list(scores.read(tmp_path)) == [str(step) for step in range(60)]
    assert {path.name for path in tmp_path.iterdir()} == {"eval.json", ".eval.json.lock"}


@pytest.mark.parametrize("damage", ["no database", "torn"])
def test_damaged_answers_are_asked_anew(damage: str, data: Path, known: type[Known], capsys) -> None:
    model, tasks = model_of(seed=11), built(data, "hellaswag", "gsm8k")
    path = harness.answers_of(model, ByteTokenizer(), None)

    def fails(found: scores.Scores) -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        harness.evaluate(model, ByteTokenizer(), tasks, quiet=True, keep=fails)
    whole = path.read_bytes()
    path.write_bytes(b"garbage" * 999 if damage == "no database" else whole[:4096] + b"\xff" * (len(whole) - 4096))
    known.computed = 0
    capsys.readouterr()
    found = harness.evaluate(model, ByteTokenizer(), tasks, title="m", quiet=True)
    assert known.computed == 16 and found["gsm8k"]["n"] == 4 and not path.exists()
    assert capsys.readouterr().err == "m: its kept answers are damaged and asked anew\n"


def test_another_buffer_is_another_model() -> None:
    model = model_of()
    model.register_buffer("scale", torch.ones(()))
    before = harness.fingerprint(model)
    assert before == harness.fingerprint(model)
    model.scale.mul_(2)
    assert before != harness.fingerprint(model)

"""Evaluation: it asks what training showed and what the harness asks, scores what is known, goes on after a kill, and
leaves a run as it was."""

from __future__ import annotations

import csv
import json
import lzma
import math
import os
import random
import re
import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig

import sagetrain  # noqa: F401 (registers sage_int8)
from sagetrain.__main__ import compose
from sagetrain.data import ByteTokenizer, build_tokenizer
from sagetrain.data.files import read_records
from sagetrain.data.tasks import TASKS, _begun, _rows
from sagetrain.errors import is_bad_input
from sagetrain.evaluation import scores
from sagetrain.evaluation.tasks import ASKED, Files, build, find, leaves
from sagetrain.integrations import bf16
from sagetrain.training.signals import Stopped
from sagetrain.training.train import run
from tests.ranks import train_each
from tests.tiny import ALONE, MODEL, TEMPLATES, THINKS, pretrained

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.model import LM  # noqa: E402
from lm_eval.api.task import ConfigurableTask  # noqa: E402
from lm_eval.tasks._yaml_loader import load_yaml  # noqa: E402

from sagetrain import evaluate as command  # noqa: E402
from sagetrain.evaluation import harness  # noqa: E402

DATE = {"day": "", "month": "", "year": ""}


def drop(question: str, *spans: str, number: str = "", **more: Any) -> dict[str, Any]:
    none = {"number": [], "date": [], "spans": []}
    answer = {"number": number, "date": DATE, "spans": list(spans)}
    record = {"query_id": "q", "passage": "A beat B and C by 20 yards.", "question": question, "answer": answer}
    return record | {"validated_answers": none} | more


HUB = {  # records as the hub has them
    "gsm8k": [{"question": f"What is {n} + {n}? ", "answer": f"Twice.\n#### {2 * n:,}"} for n in (9, 500, 3, 4)],
    "mmlu": [
        {"question": f" Which, {n}? ", "subject": subject, "choices": ["w", "x ", "y", "z"], "answer": answer}
        for n, (subject, answer) in enumerate([("anatomy", 1), ("virology", 3), ("anatomy", 0), ("anatomy", 1)])
    ],
    "hellaswag": [
        {"ind": 1, "activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "source_id": "a",
         "endings": ["runs [step] off.", "stirs the soup in a pot for an hour.", "no", "so"], "label": "1"},
        {"ind": 2, "activity_label": "Pets", "ctx_a": "[header] Wash a cat [title] Fill a tub. [step]", "ctx_b": "",
         "endings": ["[substeps] Dry it with a towel which is soft.", "Go  on.", "no", "so"], "label": "2",
         "source_id": "b"},
        {"ind": 3, "activity_label": "Ski", "ctx_a": "Ann skis in Bern.", "ctx_b": "the man in a BIG hat",
         "endings": ["falls.", "sings about the mountains he has seen.", "no", "so"], "label": "0", "source_id": "c"},
    ],
    "drop": [
        drop("Who lost?", "B", "C"),
        drop("By how many yards?", number="20",
             validated_answers={"number": [""], "date": [DATE], "spans": [["20 yards"]]}),
        drop("Who won? ", "A"),
    ],
}  # fmt: skip
LOCAL = HUB | {  # and as plain files may have them
    "hellaswag": [
        {k: v for k, v in record.items() if k in ("activity_label", "endings")}
        | {"ctx": f"{record['ctx_a']} {record['ctx_b']}".strip(), "label": int(record["label"])}
        for record in HUB["hellaswag"][::2]
    ],
    "drop": [
        {k: v for k, v in record.items() if k in ("passage", "question")} | {"answers": answers}
        for record, answers in zip(HUB["drop"], (["B and C"], ["20", "20 yards"], ["A"]), strict=True)
    ],
}


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with (lzma.open if path.suffix == ".xz" else open)(path, "wt") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of all tasks, with examples."""
    names = {
        "gsm8k": ("test", "train"),
        "mmlu": ("test", "dev"),
        "hellaswag": ("val", "train"),
        "drop": ("dev", "train"),
    }
    for task, splits in names.items():
        for split in splits:
            write(tmp_path / "data" / f"{task}-{split}.jsonl.xz", HUB[task])
    return tmp_path / "data"


def model_of(attention: str = "sage_int8", seed: int = 0, positions: int = 1024) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=positions, initializer_range=0.2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=bf16.choose(attention, torch.device("cpu")))


def built(data: Path | str, *tasks: str, few_shot: int = 0) -> dict[str, Any]:
    return {task: build(task, files, few_shot) for task, files in find(tasks, str(data), few_shot).items()}


# ------------------------------------------------------------------------------------------------ what is asked


def requests(task: Any) -> Iterator[list[tuple[Any, ...]]]:
    """Of each document: what the model is asked, as the harness makes it of a task."""
    for leaf in leaves(task):
        leaf.set_fewshot_seed(harness.SEED)
        leaf.build_all_requests()
        by_document: dict[int, list[tuple[Any, ...]]] = {}
        for instance in leaf.instances:
            by_document.setdefault(instance.doc_id, []).append(instance.args)
        yield from by_document.values()


def of_the_harness(task: str, records: list[dict[str, Any]], few_shot: int) -> list[list[tuple[Any, ...]]]:
    """The same from the harness's own templates for these records, laid out as the hub's."""
    import datasets

    folder = Path(lm_eval.__file__).parent / "tasks"
    subjects = dict.fromkeys(record["subject"] for record in records) if task == "mmlu" else [None]
    found = []
    for subject in subjects:
        path = folder / (f"mmlu/default/mmlu_{subject}.yaml" if subject else ASKED[task].defined)
        chosen = [record for record in records if record.get("subject") == subject]
        splits = dict.fromkeys(("train", "dev", "validation", "test"), datasets.Dataset.from_list(chosen))
        config = load_yaml(path, resolve_func=True)
        config.pop("tag", None)
        how = {"num_fewshot": few_shot, "custom_dataset": lambda s=splits, **_: s}
        found.extend(requests(ConfigurableTask(config=config | how)))
    return found


@pytest.mark.parametrize("few_shot", [0, 1])
@pytest.mark.parametrize("task", scores.METRICS)
def test_asks_what_the_harness_asks(task: str, few_shot: int, tmp_path: Path) -> None:
    if task == "drop" and few_shot:
        pytest.skip("the harness shows names of fields as the answer of an example")
    file = write(tmp_path / "x.jsonl", HUB[task])
    ours = list(requests(build(task, Files([file], [file]), few_shot)))
    assert ours == of_the_harness(task, HUB[task], few_shot)
    assert len(ours) == len(HUB[task])


@pytest.mark.parametrize("layout", [HUB, LOCAL], ids=["hub", "local"])
@pytest.mark.parametrize("task", scores.METRICS)
def test_asks_what_training_showed(task: str, layout: dict[str, Any], tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", layout[task])
    shown = sorted("".join(TASKS[task].text(record, "")[1:]) for record in layout[task])
    rights = {"mmlu": "answer", "hellaswag": "label"}
    records = layout[task]
    if task == "mmlu":  # by subject
        records = sorted(records, key=lambda record: record["subject"])
    asked = list(requests(build(task, Files([file], []), 0)))
    if task in rights:
        pairs = zip(asked, records, strict=True)
        assert sorted("".join(args[int(record[rights[task]])]) for args, record in pairs) == shown
    else:
        assert all(text.startswith(args[0][0]) for text, args in zip(shown, sorted(asked), strict=True))


@pytest.mark.parametrize("task", scores.METRICS)
@pytest.mark.parametrize("template", [TEMPLATES["llama"], THINKS, ALONE], ids=["llama", "thinks", "alone"])
def test_a_conversation_is_asked_as_training_showed_it(task: str, template: str, tmp_path: Path) -> None:
    base = pretrained(tmp_path / "model")
    tokenizer, file = build_tokenizer(str(base)), write(tmp_path / "x.jsonl", HUB[task])
    tokenizer.chat_template = template
    model = AutoModelForCausalLM.from_pretrained(base)
    in_turns = harness.Model(model, tokenizer, harness.Told("", quiet=True), None).apply_chat_template
    asked, choices = set(), set()
    shown = list(_rows(TASKS[task], tokenizer, ((str(i), x) for i, x in enumerate(HUB[task])), True))
    for leaf in leaves(build(task, Files([file], []), 0)):
        leaf.build_all_requests(apply_chat_template=True, fewshot_as_multiturn=True, chat_template=in_turns)
        asked |= {instance.args[0] for instance in leaf.instances}
        if task in ("mmlu", "hellaswag"):
            choices |= {f"{''.join(instance.args)}<|end|>" for instance in leaf.instances}
    assert asked == {tokenizer.decode(row["ids"][: row["prompt"]]) for row in shown}
    if choices:
        assert {tokenizer.decode(row["ids"]) for row in shown} <= choices


@pytest.mark.skipif("SAGE_DATA" not in os.environ, reason="SAGE_DATA names a folder of the real data sets")
@pytest.mark.parametrize("task", scores.METRICS)
def test_asks_what_the_harness_asks_of_real_rows(task: str, tmp_path: Path) -> None:
    (source,) = find([task], os.environ["SAGE_DATA"], 0)[task].asked
    records = [record for _, record, _ in islice(read_records(source), 0, None, 50)]
    if task == "hellaswag":
        records = [record | dict(zip(("ctx_a", "ctx_b"), _begun(record["ctx"]), strict=True)) for record in records]
    if task == "drop":
        records = [drop(record["question"], record["answers"][0], passage=record["passage"]) for record in records]
    file = write(tmp_path / "x.jsonl", records)
    assert list(requests(build(task, Files([file], []), 0))) == of_the_harness(task, records, 0)


def test_examples_come_before_the_question(data: Path) -> None:
    context = next(requests(built(data, "drop", few_shot=2)["drop"]))[0][0]
    assert context.count("A beat B and C by 20 yards.") == 3 and " yards? 20\n\n" in context
    context = next(requests(built(data, "mmlu", few_shot=1)["mmlu"]))[0][0]
    assert context.count("multiple choice") == 1 and context.count("Answer:") == 2


def test_files_are_found_by_task_and_split(data: Path, tmp_path: Path) -> None:
    found = find(["gsm8k", "mmlu"], str(data), 1)
    assert found["mmlu"] == Files([data / "mmlu-test.jsonl.xz"], [data / "mmlu-dev.jsonl.xz"])
    one = write(tmp_path / "hub" / "main" / "test-00000.jsonl", HUB["gsm8k"])
    assert find(["gsm8k", "drop"], {"gsm8k": str(tmp_path / "hub")}, 0) == {"gsm8k": Files([one], []), "drop": None}


def test_what_is_missing_is_named(data: Path) -> None:
    (data / "drop-train.jsonl.xz").unlink()
    with pytest.raises(
        FileNotFoundError, match="no train split of drop.*; name the files: drop=FILE drop.few_shot=FILE"
    ):
        find(["drop"], str(data), 2)
    (data / "drop-dev.jsonl.xz").unlink()
    with pytest.raises(FileNotFoundError, match="no validation split of drop.*; name the file: drop=FILE$"):
        find(["drop"], str(data), 2)
    with pytest.raises(ValueError, match="--data: name the file of drop: drop=FILE"):
        find(["drop"], {"drop": None}, 0)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--device", "gpu"], "--device: 'gpu' is none of cpu, cuda, cuda:1"),
        (["--device", "meta"], "--device: 'meta' is none of cpu, cuda, cuda:1"),
        ([], "holds adapters and no model: name the run they are of, or what python -m sagetrain.export RUN FOLDER "),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    words: list[str], said: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "adapter_config.json").touch()
    assert command.main([str(tmp_path), "--tasks", "drop", "--data", str(data), *words]) == 2
    assert re.fullmatch(f"sagetrain: error: .*{said}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("task", "record", "said"),
    [
        ("gsm8k", HUB["gsm8k"][0] | {"answer": "It is 4."}, "ends in no '#### NUMBER', so no answer could be right"),
        ("gsm8k", HUB["gsm8k"][0] | {"answer": "$4,000.00"}, None),
        ("drop", drop("Who?", 1, 2), None),
        ("drop", drop("Who?", "a\ud800"), None),
        ("mmlu", HUB["mmlu"][0] | {"subject": "a\ud800"}, None),
    ],
)
def test_records_that_training_reads(task: str, record: dict[str, Any], said: str | None, tmp_path: Path) -> None:
    """Are asked, or refused in a line."""
    file = write(tmp_path / f"{task}.jsonl", [record])
    if said:
        with pytest.raises(ValueError, match=said):
            build(task, Files([file], []), 0)
    else:
        (leaf,) = leaves(build(task, Files([file], []), 0))
        assert len(leaf.test_docs()) == 1


def test_validated_answers_of_the_hub_are_alternatives_where_that_shows(tmp_path: Path) -> None:
    def asked(*spans: str, types: tuple[str, ...]) -> dict[str, Any]:
        record = {"passage": "P", "question": "Q", "answers_spans": {"spans": spans, "types": types}}
        (leaf,) = leaves(build("drop", Files([write(tmp_path / "drop.jsonl", [record])], []), 0))
        (document,) = leaf.test_docs()
        return document

    one = asked("4", "four yards", "4", types=("number", "span", "number"))
    assert one["answers"] == [["4"], ["four yards"]] and one["target"] == " 4"
    both = asked("Ann", "Bob", types=("span", "span"))
    assert both["answers"] == [["Ann", "Bob"]] and both["target"] == " Ann and Bob"


def test_a_template_that_writes_no_question_is_refused_before_any_is_asked(data: Path) -> None:
    tokenizer = harness.for_transformers(ByteTokenizer())
    for template in "{{ raise_exception('no') }}", "{% for m in messages %}{{ m.content + 1 }}{% endfor %}", "{% if %}":
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match="refuses a question and its answer"):
            harness.evaluate(model_of(), tokenizer, built(data, "drop"), quiet=True, chat_template=True)


def test_a_tokenizer_that_ends_every_text_is_refused(data: Path) -> None:
    tokenizer = harness.for_transformers(ByteTokenizer())
    tokenizer._tokenizer.post_processor = TemplateProcessing("$A e", special_tokens=[("e", tokenizer.eos_token_id)])
    with pytest.raises(ValueError, match="puts tokens behind a text, so questions would not be those of training"):
        harness.evaluate(model_of(), tokenizer, built(data, "drop"), quiet=True)


# ------------------------------------------------------------------------------------------------ scores


class Known(LM):
    """Answers that are known, instead of a model's. SAID: to a question with this in it."""

    SAID = {
        "9 + 9": " It is 18.\n#### 18",
        "500 +": "So\n#### 1000.",
        "3 + 3": " The answer is 6",
        "4 + 4": " 9\n#### 9",
        "Who lost": " C B",
        "How many": "",
        "how many": " 20 yards",
        "Who won": " The a!",
    }
    max_length, max_gen_toks = 1024, 256
    computed = 0

    def __init__(self, model: Any, tokenizer: Any, told: harness.Told, dtype: Any, **_: Any) -> None:
        super().__init__()
        self.tokenizer, self.told = tokenizer, told

    def _answer(self, kind: str, asked: Any, answer: Any) -> Any:
        type(self).computed += 1
        self.cache_hook.add_partial(kind, asked.args, answer)
        return answer

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        with self.told.of("", len(requests)):
            return [self._answer("loglikelihood", one, (self._likes(*one.args), False)) for one in requests]

    @staticmethod
    def _likes(context: str, answer: str) -> float:
        if context.endswith("Answer:"):
            return -1.0 if answer == " B" else -2.0
        return {True: -30.0, False: -10.0}[len(answer) > 20] - 0.1 * len(answer.split())

    def generate_until(self, requests: Any) -> list[str]:
        said = [next(text for key, text in self.SAID.items() if key in one.args[0]) for one in requests]
        with self.told.of("", len(requests)):
            return [self._answer("generate_until", *pair) for pair in zip(requests, said, strict=True)]

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        raise NotImplementedError

    def tok_encode(self, text: str) -> list[int]:
        return list(text.encode())


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> type[Known]:
    monkeypatch.setattr(harness, "Model", Known)
    monkeypatch.setattr(Known, "computed", 0)
    return Known


def error(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def test_scores_are_those_of_known_answers(data: Path, known: type[Known]) -> None:
    found = harness.evaluate(model_of(), ByteTokenizer(), built(data, *scores.METRICS), quiet=True)
    each = {
        "gsm8k": {"strict_match": [1, 1, 0, 0], "flexible_extract": [1, 1, 1, 0]},
        "hellaswag": {"acc": [0, 1, 1], "acc_norm": [1, 0, 0]},
        "drop": {"em": [0, 1, 1], "f1": [0.33, 1, 1]},
    }
    for task, metrics in each.items():
        for metric, values in metrics.items():
            assert found[task]["scores"][metric] == pytest.approx(sum(values) / len(values)), (task, metric)
            assert found[task]["stderr"][metric] == pytest.approx(error(values)), (task, metric)
    assert found["mmlu"]["scores"] == {"acc": 0.5}  # 2 of 3 and 0 of 1: by size, not by subject
    assert found["mmlu"]["subjects"] == {"anatomy": pytest.approx(2 / 3), "virology": 0}
    assert {task: of["n"] for task, of in found.items()} == {"gsm8k": 4, "mmlu": 4, "hellaswag": 3, "drop": 3}
    assert {task: of["version"] for task, of in found.items()} == {"gsm8k": 3, "mmlu": 1, "hellaswag": 1, "drop": 3}
    assert all(set(of["scores"]) == set(scores.METRICS[task]) for task, of in found.items())


def test_limit(data: Path, known: type[Known]) -> None:
    found = harness.evaluate(model_of(), ByteTokenizer(), built(data, "gsm8k", "mmlu"), quiet=True, limit=1)
    assert (found["gsm8k"]["n"], found["mmlu"]["n"], found["gsm8k"]["limit"]) == (1, 2, 1)
    assert found["gsm8k"]["stderr"]["strict_match"] is None


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """The answers of the next evaluation, by the kind of request."""
    kept: dict[str, list[Any]] = {}

    class Watched(harness.Kept):
        def _shared(self, kind: str, requests: Any) -> list[Any]:
            kept[kind] = super()._shared(kind, requests)
            return kept[kind]

    monkeypatch.setattr(harness, "Kept", Watched)
    monkeypatch.setattr(harness.Model, "max_gen_toks", 24)
    return kept


@pytest.fixture(scope="module")
def taught() -> dict[str, torch.Tensor]:
    """Weights that know the answers to HUB by heart."""
    tokenizer, model = ByteTokenizer(), model_of("sdpa")
    texts = ["".join(TASKS[task].text(record, "")[1:]) for task in HUB for record in HUB[task]]
    ids = [torch.tensor([*tokenizer.encode(text), tokenizer.eos_token_id]) for text in texts]
    rows = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)
    labels = rows.masked_fill(rows == tokenizer.pad_token_id, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(input_ids=rows, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss < 0.2
    return model.state_dict()


def test_logits_of_prompts_are_left_out() -> None:
    """The choices' own are what all of them would be, wherever rows have zeros."""
    model, widths = model_of("sdpa"), []
    model.register_forward_hook(lambda *done: widths.append(done[2].logits.shape[1]))
    lm = harness.Model(model, harness.for_transformers(ByteTokenizer()), harness.Told("", True), None, batch_size=2)
    asked = [
        (("", str(n)), prompt, choice)
        for n, (prompt, choice) in enumerate(
            [
                ([7] * 40, [3, 0]),
                ([8] * 40, [0, 0, 0]),
                ([9, 0, 0, 0], [0]),
                ([0, 0], [5, 4]),
                ([1], [2]),
                ([0], [0, 0]),
            ]
        )
    ]
    few, greedy = zip(*lm._loglikelihood_tokens(asked), strict=True)
    assert widths == [2 + 3, 4, 2]  # zeros at the end and the longest choice, of 42, 4 and 2 tokens
    lm.keeps = False
    all_, all_greedy = zip(*lm._loglikelihood_tokens(asked), strict=True)
    assert few == pytest.approx(all_) and greedy == all_greedy


def test_logits_of_prompts_are_left_out_with_adapters() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(model_of("sdpa"), peft.LoraConfig(target_modules=["q_proj"]))
    assert harness.Model(model, harness.for_transformers(ByteTokenizer()), harness.Told("", True), None).keeps


def test_choices_are_scored_in_fp32_by_products_in_bf16() -> None:
    """Log-likelihoods of BF16 would often tie."""
    model, seen = model_of("sdpa"), set()
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *done: seen.add(done[2].dtype))
    told, tokenizer = harness.Told("", True), harness.for_transformers(ByteTokenizer())
    lm = harness.Model(model, tokenizer, told, torch.bfloat16, batch_size=2)
    scores = torch.tensor([score for score, _ in lm._loglikelihood_tokens([(("", ""), [7, 8], [n]) for n in range(9)])])
    assert seen == {torch.bfloat16} and not torch.equal(scores, scores.bfloat16().float())


@pytest.mark.parametrize("tasks", [["gsm8k"], ["mmlu"], ["drop", "hellaswag"]], ids=str)
def test_the_largest_batch_is_found(tasks: list[str], data: Path, answers: dict[str, list[Any]]) -> None:
    model, tokenizer = model_of("sdpa", positions=200), ByteTokenizer()
    found, one = (
        harness.evaluate(model, tokenizer, built(data, *tasks), batch_size=size, quiet=True) for size in ("auto", 1)
    )
    assert {task: of["scores"] for task, of in found.items()} == {task: of["scores"] for task, of in one.items()}


def test_a_choice_longer_than_the_model_is_refused(data: Path) -> None:
    with pytest.raises(ValueError, match="a choice has [0-9]+ tokens, and the model has no more than 20 positions"):
        harness.evaluate(model_of("sdpa", positions=20), ByteTokenizer(), built(data, "hellaswag"), quiet=True)


def test_the_batch_is_sought_with_all_logits(data: Path, answers: dict[str, list[Any]]) -> None:
    model, widths = model_of("sdpa", positions=200), []
    model.register_forward_hook(lambda *done: widths.append(done[2].logits.shape[1]))
    harness.evaluate(model, ByteTokenizer(), built(data, "mmlu"), batch_size="auto", quiet=True)
    assert widths[0] == max(widths) > 100


def test_two_evaluations_of_a_model_at_a_time(data: Path, known: type[Known]) -> None:
    path = harness.answers_of(model := model_of(), tokenizer := ByteTokenizer(), None)
    with harness._owned(path) as first, harness._owned(path) as second:
        assert first == path != second
        harness.evaluate(model, tokenizer, built(data, "gsm8k"), quiet=True)
    with harness._owned(path) as again:
        assert again == path


@pytest.mark.parametrize("task, change, said", [
    ("mmlu", {"choices": list("abcdefghijk")}, "has 11 texts, and more than 10 have no letter"),
    ("mmlu", {"subject": 5}, "'subject'"),
    ("hellaswag", {"endings": ["a", "[step]", "b", "c"], "label": 0}, "'endings' has one without a word"),
    ("drop", {"validated_answers": ["x"]}, "'validated_answers' must hold answers"),
    ("drop", {"validated_answers": {"number": ["1"], "spans": []}}, "lists of different lengths"),
])  # fmt: skip
def test_odd_records_are_named(task: str, change: dict[str, Any], said: str, tmp_path: Path) -> None:
    file = write(tmp_path / "odd.jsonl", [HUB[task][0], HUB[task][0] | change])
    with pytest.raises(ValueError, match=rf"odd.jsonl:2: .*{said}") as raised:
        build(task, Files([file], []), 0)
    assert is_bad_input(raised.value)


def test_fewer_questions_do_not_replace_all(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for limit in (2, None, 3):
        scores.keep(tmp_path, 5, "sdpa", {task: {"scores": {}, "limit": limit} for task in ("drop", f"mmlu{limit}")})
    held = scores.read(tmp_path)["5"]["sdpa"]
    assert held["drop"]["limit"] is None and held["mmlu3"]["limit"] == 3
    assert "keeps its scores of all questions: drop" in capsys.readouterr().out.replace("\n", " ")


def test_a_conversation_gets_no_bos_that_training_left_out(tmp_path: Path) -> None:
    """Of a template that writes none, and a tokenizer that puts one before every text."""
    folder = pretrained(tmp_path)
    tokenizer = build_tokenizer(str(folder))
    tokenizer.chat_template = tokenizer.chat_template.replace("{{ bos_token }}", "").replace("{{bos_token}}", "")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Say"}], tokenize=False)
    assert not text.startswith(tokenizer.bos_token) and tokenizer(text).input_ids[0] == tokenizer.bos_token_id
    seen = []

    class Watched(harness.Model):
        def _model_call(self, ids: torch.Tensor) -> torch.Tensor:
            seen.append(ids)
            return super()._model_call(ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "Model", Watched)
        file = write(tmp_path / "mmlu.jsonl", HUB["mmlu"])
        model = AutoModelForCausalLM.from_pretrained(folder)
        harness.evaluate(
            model, tokenizer, {"mmlu": build("mmlu", Files([file], []), 0)}, chat_template=True, quiet=True
        )
    assert seen and all((ids[:, 0] != tokenizer.bos_token_id).all() for ids in seen)


def test_a_batch_too_large_for_the_gpu_says_what_to_turn(data: Path, known: type[Known], monkeypatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 24.05 GiB. GPU 0 has ...")

    monkeypatch.setattr(Known, "generate_until", full)
    with pytest.raises(RuntimeError, match="CUDA out of memory at batch size 64: .*eval.batch_size") as raised:
        harness.evaluate(model_of(), ByteTokenizer(), built(data, "gsm8k"), batch_size=64, quiet=True)
    assert is_bad_input(raised.value)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("attention", ["sdpa", "sage_int8"])
def test_a_model_that_knows_the_answers(
    attention: str, batch_size: int, taught: dict[str, torch.Tensor], data: Path, answers: dict[str, list[Any]]
) -> None:
    """Rows have several lengths, so each answer hangs on padding, mask, cache of keys, and on where a row ends."""
    model, tokenizer, tasks = model_of(attention), ByteTokenizer(), built(data, *scores.METRICS)
    model.load_state_dict(taught)
    found = harness.evaluate(model, tokenizer, tasks, batch_size=batch_size, quiet=True)
    assert {task: of["scores"] for task, of in found.items()} == {
        "gsm8k": {"strict_match": 1, "flexible_extract": 1},
        "mmlu": {"acc": 1},
        "hellaswag": {"acc": 1, "acc_norm": 1},
        "drop": {"em": pytest.approx(2 / 3), "f1": pytest.approx((0.25 + 1 + 1) / 3)},  # "B and C" is one span
    }
    assert attention in found["drop"]["attention"].lower()
    model.set_attn_implementation("eager")
    likely = [likely for likely, _ in answers["loglikelihood"]]
    harness.evaluate(model, tokenizer, tasks, batch_size=1, quiet=True)
    exact = [likely for likely, _ in answers["loglikelihood"]]
    assert likely == pytest.approx(exact, **({"rel": 1e-4} if attention == "sdpa" else {"rel": 0.1, "abs": 0.02}))


def test_byte_tokenizer_for_the_harness() -> None:
    ours, theirs = ByteTokenizer(), harness.for_transformers(ByteTokenizer())
    for text in "plain\n  text", "Zoë ✓ 漢字 \x00\x7f", "<eos", "":
        assert theirs.encode(text) == ours.encode(text) and theirs.decode(theirs.encode(text)) == text
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.eos_token_id, ours.pad_token_id)
    assert theirs.decode([65, 256, 66, 257], skip_special_tokens=True) == "AB"


# ------------------------------------------------------------------------------------------------ killed


def test_goes_on_where_it_was_killed(data: Path, known: type[Known]) -> None:
    model, tasks = model_of(seed=7), built(data, "hellaswag", "gsm8k")
    kept = harness.answers_of(model, ByteTokenizer(), None)
    kept.unlink(missing_ok=True)
    whole = harness.evaluate(model, ByteTokenizer(), tasks, quiet=True)
    total, known.computed = known.computed, 0
    assert total == 16 and not kept.exists()

    if (child := os.fork()) == 0:

        class Killed(Known):
            def _answer(self, *given: Any) -> Any:
                if type(self).computed == 9:
                    self.cache_hook.dbdict.commit()  # its thread writes
                    os.kill(os.getpid(), signal.SIGKILL)
                return super()._answer(*given)

        harness.Model = Killed
        harness.evaluate(model, ByteTokenizer(), tasks, quiet=True)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert kept.exists()
    again = harness.evaluate(model, ByteTokenizer(), tasks, quiet=True)
    assert known.computed == total - 9 and not kept.exists()
    assert {task: of["scores"] for task, of in again.items()} == {task: of["scores"] for task, of in whole.items()}


def test_another_model_has_other_answers() -> None:
    model, tokenizer = model_of(), ByteTokenizer()
    names = [harness.answers_of(model, tokenizer, None)]
    assert names[0] == harness.answers_of(model_of(), tokenizer, None)
    names.append(harness.answers_of(model, tokenizer, torch.bfloat16))
    names.append(harness.answers_of(model, tokenizer, None, rank=1))
    model.set_attn_implementation("sdpa")
    names.append(harness.answers_of(model, tokenizer, None))
    model.config.rms_norm_eps = 1e-3  # what no weight says
    names.append(harness.answers_of(model, tokenizer, None))
    model.generation_config.eos_token_id = 10
    names.append(harness.answers_of(model, tokenizer, None))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] *= 1.001
    names.append(harness.answers_of(model, tokenizer, None))
    with torch.no_grad():
        weight = model.model.layers[1].mlp.up_proj.weight
        weight[[0, 1]] = weight[[1, 0]]
    names.append(harness.answers_of(model, tokenizer, None))
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------------------------------------ in a run

TINY = [
    "model=quickstart",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.limit_val_batches=0",
    "probe.every=0",
    *MODEL,
    "data.seq_len=512",
    "data.batch_size=2",
    "data.val_fraction=0",
    "trainer.accumulate_grad_batches=1",
    "trainer.max_steps=4",
    "trainer.enable_progress_bar=false",
    "checkpoint.every_n_steps=0",
]


@pytest.fixture
def train(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs a recipe on its task's training file; the run directory. An answer has 16 tokens, not 256."""
    monkeypatch.setattr(harness.Model, "max_gen_toks", 16)

    def go(task: str, *changes: str, out: str = "out") -> Path:
        file = data / f"{task}-{'dev' if task == 'mmlu' else 'train'}.jsonl.xz"
        evaluated = [f"eval.tasks=[{task}]", f"eval.data={data}", f"data.path={file}", f"out={tmp_path / out}"]
        (folder,) = run(compose([f"recipe={task}_finetune", *TINY, *evaluated, *changes]))
        return folder

    return go


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def status(folder: Path) -> str:
    return json.loads((folder / "run.json").read_text())["status"]


@pytest.mark.parametrize("task", scores.METRICS)
def test_recipe_evaluates_and_trains_as_without(task: str, train, data: Path, capsys) -> None:
    folder = train(task, "eval.every_n_steps=2", "eval.limit=2")
    held = scores.read(folder)
    assert list(held) == ["2", "4"]
    found = held["4"]["sage_int8"][task]
    assert found["data"] == str(find([task], str(data), 0)[task].asked[0])
    assert (found["limit"], found["few_shot"]) == (2, 0) and found["attention"].startswith("sage_int8 (")
    written = rows(folder)
    for row in written:
        for metric in scores.METRICS[task]:
            held_there = held.get(row["step"], {"sage_int8": {task: {"scores": {metric: None}}}})
            value = held_there["sage_int8"][task]["scores"][metric]
            assert row[f"eval/{task}/{metric}"] == ("" if value is None else str(value))
    plain = rows(train(task, "eval.tasks=[]", out="plain"))
    for column in "loss", "grad_norm", "lr":
        assert [row[column] for row in written] == [row[column] for row in plain]

    # The same weights, read from the checkpoint, get the same scores.
    (folder / scores.FILE).unlink()
    assert command.main([str(folder), "--tasks", task, "--data", str(data), "--limit", "2", "--device", "cpu"]) == 0
    assert scores.read(folder)["4"]["sage_int8"][task]["scores"] == found["scores"]
    assert found["n"] == (3 if task == "mmlu" else 2)
    assert f"{100 * next(iter(found['scores'].values())):.2f}%" in capsys.readouterr().out


@pytest.mark.parametrize(("chat", "precision"), [(False, "32-true"), (True, "bf16-mixed"), (False, "bf16-true")])
def test_run_with_adapters_is_asked_as_it_was_trained(chat: bool, precision: str, data: Path, tmp_path: Path) -> None:
    base = pretrained(tmp_path / "base")
    (folder,) = run(compose([
        "recipe=hellaswag_finetune", f"model.path={base}", "model.lora.r=4", "optim.lr=0.05", "optim.warmup_steps=0",
        f"data.path={data / 'hellaswag-train.jsonl.xz'}", "data.val_fraction=0", f"data.chat_template={chat}",
        "data.batch_size=2", "trainer.accumulate_grad_batches=1", "trainer.max_steps=3", "trainer.limit_val_batches=0",
        "trainer.accelerator=cpu", f"trainer.precision={precision}", "trainer.enable_progress_bar=false",
        "probe.every=0", "checkpoint.every_n_steps=0", "eval.tasks=[hellaswag]", f"eval.data={data}",
        f"out={tmp_path / 'out'}",
    ]))  # fmt: skip
    in_run = scores.read(folder)["3"]["sage_int8"]["hellaswag"]
    assert in_run["chat_template"] is chat
    (folder / scores.FILE).unlink()
    assert command.main([str(folder), "--tasks", "hellaswag", "--data", str(data), "--device", "cpu"]) == 0
    alone = scores.read(folder)["3"]["sage_int8"]["hellaswag"]
    assert all(alone[what] == in_run[what] for what in ("chat_template", "attention", "precision", "scores"))


DROPOUT = ["attention=sdpa", "model.checkpointing=full", "+model.config.attention_dropout=0.2"]


@pytest.mark.parametrize("how", [["model.compile=true"], DROPOUT], ids=["compiled", "dropout"])
def test_steps_after_an_evaluation_are_those_without(how: list[str], train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it has layers made for training, and draws random numbers. Graphs run as they are, uncompiled."""
    real, graphs = torch.compile, []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(graph)
        return graph

    def draws(model: Any, *given: Any, **options: Any) -> Any:
        assert torch.rand(1) + np.random.rand() + random.random() >= 0
        return evaluate(model, *given, **options)

    evaluate = harness.evaluate
    monkeypatch.setattr(harness, "evaluate", draws)
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **{**k, "backend": backend}))
    runs, made = [], []
    for task in ("gsm8k", ""):
        torch.compiler.reset()
        more = [f"eval.tasks=[{task}]", "eval.every_n_steps=1", "eval.limit=1"]
        runs.append(rows(train("gsm8k", *how, *more, out=f"out{task}")))
        made.append(len(graphs))
        graphs.clear()
    evaluated, plain = runs
    assert made[0] == made[1] and (made[0] > 0) == (how != DROPOUT)  # none for an evaluation's many lengths
    assert [row["loss"] for row in evaluated] == [row["loss"] for row in plain]
    assert all(row["eval/gsm8k/strict_match"] for row in evaluated)


@pytest.mark.slow
def test_ranks_share_the_questions(data: Path, tmp_path: Path) -> None:
    words = [f"data.path={data / 'hellaswag-train.jsonl.xz'}", f"eval.data={data}", f"out={tmp_path / 'out'}"]
    words += ["eval.tasks=[hellaswag,drop]", "eval.batch_size=2", "strategy=ddp", "trainer.devices=2"]
    words += [word if "batch_size" not in word else "data.batch_size=1" for word in TINY]
    train_each([["recipe=hellaswag_finetune", *words]], tmp_path)
    shared = scores.read(tmp_path / "out")["4"]["sage_int8"]
    options = ["--tasks", "hellaswag", "drop", "--data", str(data), "--device", "cpu", "--out", str(tmp_path / "alone")]
    assert command.main([str(tmp_path / "out"), *options]) == 0
    alone = scores.read(tmp_path / "alone")["4"]["sage_int8"]
    for task, of in alone.items():
        assert (shared[task]["scores"], shared[task]["n"]) == (of["scores"], of["n"]) and of["n"] == 3


def test_signal_breaks_an_evaluation_off(train, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(told: harness.Told) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        before(told)

    before = harness.Told.answered
    monkeypatch.setattr(harness.Told, "answered", answered)
    every = ["eval.every_n_steps=2", "eval.limit=2"]
    with pytest.raises(Stopped, match="after step 2; its checkpoint"):
        train("drop", *every)
    with pytest.raises(Stopped, match="SIGTERM while it was evaluated; it is trained and saved, and the same command"):
        train("drop", "eval.limit=2", "trainer.max_steps=1", out="at the end")
    monkeypatch.setattr(harness.Told, "answered", before)
    folder = train("drop", *every)
    assert list(scores.read(folder)) == ["2", "4"]
    assert [bool(row["eval/drop/f1"]) for row in rows(folder)] == [False, True, False, True]
    assert [row["loss"] for row in rows(folder)] == [row["loss"] for row in rows(train("drop", *every, out="whole"))]


def test_killed_at_its_end_a_run_is_evaluated_when_it_goes_on(train, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("no more")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="no more"):
        patched.setattr(harness, "evaluate", fails)
        train("hellaswag")
    folder = train("hellaswag")
    assert list(scores.read(folder)) == ["4"] and status(folder) == "finished"
    assert [bool(row["eval/hellaswag/acc"]) for row in rows(folder)] == [False, False, False, True]
    assert [row["step"] for row in rows(folder)] == ["1", "2", "3", "4"]


@pytest.mark.parametrize("changes, said", [
    (["eval.tasks=[gsm8k,gms8k]"], "eval.tasks: unknown task 'gms8k'; choose from gsm8k, mmlu, hellaswag, drop"),
    (["eval.data=nowhere"], "eval.data: no file or folder nowhere"),
    (["eval.data={gsm8k: nowhere.jsonl}"], "eval.data: no file or folder nowhere.jsonl"),
    (["eval.tasks=[drop]", "eval.data=conf"], "holds no validation split of drop"),
    (["eval.few_shot=9"], "few_shot=9: there are 4 examples of gsm8k"),
    (["eval.tasks=gsm8k"], "eval.tasks=gsm8k: give a list, eval.tasks=[gsm8k]"),
    (["eval.batch_size=0"], "eval.batch_size=0: give a number of rows, at least 1, or auto"),
    (["eval.batch_size=true"], "eval.batch_size=True: give a number of rows, at least 1, or auto"),
    (["eval.limit=0"], "eval.limit=0: give a whole number, at least 1"),
    (["strategy=fsdp2"], "eval.tasks: this strategy shards the weights"),
    (["strategy=deepspeed", "strategy.stage=3"], "eval.tasks: this strategy shards the weights"),
])  # fmt: skip
def test_is_refused_before_training(changes: list[str], said: str, train, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError)) as refused:
        train("gsm8k", *changes)
    assert said in str(refused.value) and is_bad_input(refused.value)
    assert not (tmp_path / "out" / "metrics.csv").exists()


def test_no_network_is_said_before_training(train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(ValueError, match="mmlu: its data is not to be had from the hub; name local files") as refused:
        train("mmlu", "eval.data=null")
    assert is_bad_input(refused.value) and not (tmp_path / "out" / "metrics.csv").exists()


def test_missing_package_is_said_before_training(train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from sagetrain.training import evaluation

    monkeypatch.setattr(evaluation, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"no package lm_eval: pip install 'sagetrain\[eval\]'"):
        train("gsm8k")


# ------------------------------------------------------------------------------------------------ the command


def test_a_folder_of_transformers(data: Path, tmp_path: Path, capsys) -> None:
    folder, out = str(tmp_path / "model"), tmp_path / "scores"
    model_of().save_pretrained(folder)
    harness.for_transformers(ByteTokenizer()).save_pretrained(folder)
    capsys.readouterr()
    with_files = ["--data", f"hellaswag={data / 'hellaswag-val.jsonl.xz'}", "--out", str(out), "--device", "cpu"]
    for attention in "sage_int8", "sdpa":
        assert command.main([folder, "--tasks", "hellaswag", *with_files, "--attention", attention]) == 0
    held = scores.read(out)["0"]
    assert set(held) == {"sage_int8", "sdpa"} and "SDPA" in held["sdpa"]["hellaswag"]["attention"]
    said = capsys.readouterr()
    assert "acc_norm" in said.out and said.err.splitlines() == ["model: choices scored 0/12"] * 2


def test_progress_is_told_in_whole_batches_and_not_too_often(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(harness.time, "monotonic", lambda: now[0])
    told = harness.Told("m")
    with told.of("answers", 8):
        for _ in range(4):  # batches of two that take six seconds
            told.batch()
            now[0] += 6
            told.answered(), told.answered()
    assert capsys.readouterr().err.splitlines() == ["m: answers 0/8", "m: answers 4/8, 12 s left"]


@pytest.mark.parametrize("words, said", [
    (["no/where/at/all", "--tasks", "gsm8k"], "no/where/at/all"),
    (["x", "--tasks", "mmmlu"], "--tasks: unknown task 'mmmlu'"),
    (["x", "--tasks", "gsm8k", "--data", "a", "b"], "--data: give one folder, or TASK=FILE for each task"),
    (["x", "--tasks", "gsm8k", "--data", "gsm=b"], "--data: unknown task 'gsm'"),
    (["x", "--tasks", "gsm8k", "--data", "gsm8k={data}/gsm8k-test.jsonl.xz", "--few-shot", "2"], "gsm8k.few_shot=FILE"),
    (["x", "--tasks", "gsm8k", "--attention", "int8"], "--attention: unknown attention 'int8'"),
])  # fmt: skip
def test_command_refuses_in_one_line(words: list[str], said: str, data: Path, capsys) -> None:
    words = [word.format(data=data) for word in words]
    words += [] if "--data" in words else ["--data", str(data)]
    assert command.main(words) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1


def test_too_few_positions_for_an_answer(data: Path) -> None:
    with pytest.raises(ValueError, match="an answer may have 256 tokens"):
        harness.evaluate(model_of(positions=256), ByteTokenizer(), built(data, "gsm8k"), quiet=True)

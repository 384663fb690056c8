"""The four tasks as lm-evaluation-harness takes them: from local files, or its own from the hub.

Method: from local files the text of a question is that of fine-tuning (sagetrain/data/tasks.py), in both layouts of a
record that it reads, so what is trained on is formatted as what is evaluated; metrics, filters, where generation stops
and the version are read from the harness's own definition of the task. From the hub the harness's task is untouched.
Both ask the same: tests compare the requests, character for character. MMLU is a task for each subject, and its score
the mean weighted by their size.
Choice: without examples (few-shot) unless asked for, since training is. Examples are GSM8K's and the others' train
split, of MMLU the first of the subject's dev split, as the harness takes them. Only where its template of DROP puts
names of fields for the answer of an example, ours gives the answer.
Cost: answers of DROP in files that hold them as texts join several spans by "and"; they are scored as one span, which
is milder than the harness with the hub's spans.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from sagetrain.data.corpus import clean
from sagetrain.data.files import FORMATS, read_records
from sagetrain.data.tasks import LETTERS, TASKS, Record, get_index, get_list, spans_of, without_markup
from sagetrain.errors import asked_for
from sagetrain.evaluation.scores import METRICS

EXAMPLES = ".few_shot"  # after the name of a task: its examples
Document = dict[str, Any]
Source = Mapping[str, str] | str | None


class Files(NamedTuple):
    """Local files of a task."""

    asked: list[Path]
    examples: list[Path]


class Asked(NamedTuple):
    """How the files of a task call themselves, and where the harness defines it."""

    split: str
    examples: str
    defined: str


VALIDATION = "validation|valid|val|dev"
ASKED = {
    "gsm8k": Asked("test", "train", "gsm8k/gsm8k.yaml"),
    "mmlu": Asked("test", "dev", "mmlu/default/_default_template_yaml"),
    "hellaswag": Asked(VALIDATION, "train", "hellaswag/hellaswag.yaml"),
    "drop": Asked(VALIDATION, "train", "drop/default.yaml"),
}


def check_tasks(tasks: Sequence[str], what: str) -> list[str]:
    """`tasks`, each once. Raises ValueError for one that is unknown; `what` is what asked for it."""
    for task in tasks:
        if task not in METRICS:
            raise ValueError(f"{what}: unknown task {task!r}; choose from {', '.join(METRICS)}")
    return list(dict.fromkeys(tasks))


def find(tasks: Sequence[str], data: Source, few_shot: int, what: str = "--data") -> dict[str, Files | None]:
    """The files of each task, None for one whose data is the hub's.

    data: None (all from the hub), a folder that holds files of all tasks (`gsm8k-test.jsonl.xz`, or
    `gsm8k/test.parquet`), or a file or folder by task, of examples as `gsm8k.few_shot`; other tasks are the hub's.
    Raises ValueError and FileNotFoundError for what names no file.
    """
    if data is None:
        return dict.fromkeys(tasks)
    named = {} if isinstance(data, str) else dict(data)
    for name in named:
        check_tasks([name.removesuffix(EXAMPLES)], what)
    found: dict[str, Files | None] = {}
    for task in tasks:
        folder = data if isinstance(data, str) else None
        if folder is None and task not in named:
            found[task] = None
            continue
        asked = ASKED[task]
        files = _files(task, folder, named, asked.split, what)
        examples = _files(task, folder, named, asked.examples, what, EXAMPLES) if few_shot else []
        found[task] = Files(files, examples)
    return found


def _files(
    task: str, folder: str | None, named: Mapping[str, str], split: str, what: str, kind: str = ""
) -> list[Path]:
    name = f"{task}{kind}"
    path = named.get(name)
    where = Path(path or folder or "").expanduser()
    if path is None and folder is None:
        asked = f"examples of {task} are asked for (few-shot); name their file" if kind else f"name the file of {task}"
        raise ValueError(f"{what}: {asked}: {name}=FILE")
    if where.is_file():
        if not where.name.endswith(FORMATS):
            raise ValueError(f"{what}: {where} is of no known format; supported: {', '.join(FORMATS)}")
        return [where]
    if not where.is_dir():
        raise FileNotFoundError(f"{what}: no file or folder {where}")
    words = [split] if path else [task, split]
    inside = sorted(file for file in where.rglob("*") if file.name.endswith(FORMATS) and file.is_file())
    inside = [file for file in inside if file.relative_to(where).parts[0][0] != "."]
    files = [file for file in inside if all(_says(word, file.relative_to(where)) for word in words)]
    if not files:
        names = f"name the files: {task}=FILE {name}=FILE" if kind else f"name the file: {name}=FILE"
        raise FileNotFoundError(
            f"{what}: {where} holds no {split.partition('|')[0]} split of {task}, which would be named like "
            f"{task}-{split.partition('|')[0]}.jsonl; {names}"
        )
    return files


def _says(word: str, path: Path) -> bool:
    return bool(re.search(rf"(^|[-._ 0-9/])({word})([-._ 0-9/]|$)", path.as_posix().lower()))


# ------------------------------------------------------------------------------------------------ records


def _gsm8k(record: Record, where: str) -> Document:
    _, prompt, answer = TASKS["gsm8k"].read(record, where)
    if not re.search(r"#### *[-\d]|^ *[-$\d.,]+$", answer):
        raise ValueError(f"{where}: field 'answer' ends in no '#### NUMBER', so no answer could be right")
    return {"prompt": prompt, "target": answer[1:]}


def _mmlu(record: Record, where: str) -> Document:
    _, prompt, answer = TASKS["mmlu"].read(record, where)
    head, _, prompt = prompt.partition("\n\n")
    letters = list(LETTERS[: len(get_list(record, "choices", where))])
    place = {"subject": clean(str(record.get("subject") or "all")), "head": f"{head}\n\n"}
    return place | {"prompt": prompt, "choices": letters, "target": letters.index(answer[1:])}


def _hellaswag(record: Record, where: str) -> Document:
    _, prompt, _ = TASKS["hellaswag"].read(record, where)
    choices = [without_markup(ending) for ending in get_list(record, "endings", where)]
    if not all(choices):
        raise ValueError(f"{where}: field 'endings' has one without a word; repair or remove it")
    right = get_index(record, "label", len(choices), where)
    return {"prompt": prompt, "choices": choices, "target": right}


def _drop(record: Record, where: str) -> Document:
    _, prompt, answer = TASKS["drop"].read(record, where)
    return {"prompt": prompt, "target": answer, "answers": _accepted(record, where)}


def _accepted(record: Record, where: str) -> list[list[str]]:
    """The spans of each accepted answer to a question of DROP."""
    from lm_eval.tasks.drop.utils import parse_answer

    if "answers" in record:
        return [[text] for text in get_list(record, "answers", where)]
    if isinstance(spans := record.get("answers_spans"), Mapping):
        return spans_of(spans, where)
    others = record.get("validated_answers") or []
    if isinstance(others, Mapping):  # one list a field, as `datasets` has it
        if len({len(values) for values in others.values()}) > 1:
            raise ValueError(f"{where}: field 'validated_answers' has lists of different lengths")
        others = [dict(zip(others, row, strict=True)) for row in zip(*others.values(), strict=True)]
    if not all(isinstance(other, Mapping) for other in others):
        raise ValueError(f"{where}: field 'validated_answers' must hold answers like that of field 'answer'")
    answers = dict.fromkeys(parse_answer(_whole(answer)) for answer in (record["answer"], *others))
    return [list(spans) for spans in answers]


def _whole(answer: Record) -> Document:
    """An answer with all fields: some files leave out those that are empty."""
    number, date = answer.get("number"), answer.get("date") or {}
    date = {part: date.get(part) or "" for part in ("day", "month", "year")}
    spans = [clean(str(span)) for span in answer.get("spans") or []]
    return {"number": "" if number is None else number, "spans": spans, "date": date}


DOCUMENT: dict[str, Callable[[Record, str], Document]] = {
    "gsm8k": _gsm8k,
    "mmlu": _mmlu,
    "hellaswag": _hellaswag,
    "drop": _drop,
}


def documents(task: str, files: Sequence[Path]) -> list[Document]:
    """What is asked, of every record. Raises ValueError, with file and line, for a record that lacks something."""
    records = ((record, f"{file}:{number}") for file in files for number, record, _ in read_records(file))
    found = [DOCUMENT[task](record, where) for record, where in records]
    if not found:
        raise ValueError(f"{', '.join(map(str, files))}: no records of {task}")
    return found


# ------------------------------------------------------------------------------------------------ the harness's tasks


def build(task: str, files: Files | None, few_shot: int) -> Any:
    """A task (of MMLU the group of its subjects) of the harness. Raises ValueError for data that cannot be had."""
    with _without_log():
        return _from_hub(task, few_shot) if files is None else _from_files(task, files, few_shot)


def _from_files(task: str, files: Files, few_shot: int) -> Any:
    asked = documents(task, files.asked)
    examples = documents(task, files.examples) if few_shot else []
    if task != "mmlu":
        return _task(task, task, asked, examples, few_shot)
    from lm_eval.api.group import Group
    from lm_eval.config.group import AggMetricConfig

    group = Group("mmlu", aggregate_metric_list=[AggMetricConfig("acc", weight_by_size=True)])
    for subject in dict.fromkeys(document["subject"] for document in asked):
        of_subject = ([one for one in some if one["subject"] == subject] for some in (asked, examples))
        group.add(_task(task, f"mmlu_{subject}", *of_subject, few_shot))
    return group


def _task(task: str, name: str, asked: list[Document], examples: list[Document], few_shot: int) -> Any:
    import datasets
    import lm_eval
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    if len(examples) < few_shot:
        raise ValueError(f"few_shot={few_shot}: there are {len(examples)} examples of {name}")
    defined = load_yaml(Path(lm_eval.__file__).parent / "tasks" / ASKED[task].defined, resolve_func=True)
    splits = {"asked": datasets.Dataset.from_list(asked), "examples": datasets.Dataset.from_list(examples)}
    texts = {"doc_to_text": "prompt", "doc_to_target": "target", "description": asked[0].get("head", "")}
    choices = {"doc_to_choice": "choices"} if "choices" in asked[0] else {}
    data = {
        "custom_dataset": lambda **_: splits,
        "test_split": "asked",
        "fewshot_split": "examples" if few_shot else None,
        "num_fewshot": few_shot,
    }
    no = dict.fromkeys(("training_split", "validation_split", "process_docs", "dataset_path", "dataset_name"))
    dropped = ("tag", "doc_to_decontamination_query", "should_decontaminate")
    kept = {key: value for key, value in defined.items() if key not in dropped}
    return ConfigurableTask(config=kept | no | data | texts | choices | {"task": name})


def _from_hub(task: str, few_shot: int) -> Any:
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / Path(ASKED[task].defined).parent
    with asked_for(f"{task}: its data is not to be had from the hub; name local files instead (eval.data, or --data)"):
        built = TaskManager(include_path=folder, include_defaults=False).load(task)
    for each in built["tasks"].values():
        each.set_config(key="num_fewshot", value=few_shot)
    return built["groups"].get(task) or built["tasks"][task]


@contextmanager
def _without_log() -> Iterator[None]:
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def leaves(task: Any) -> Iterator[Any]:
    """The tasks of a group, or the task itself."""
    yield from task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]

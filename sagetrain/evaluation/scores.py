"""eval.json: the scores of a model, by optimizer step, attention and task.

    {"200": {"sage_int8": {"gsm8k": {
        "scores": {"strict_match": 0.31, "flexible_extract": 0.32},   between 0 and 1
        "stderr": {"strict_match": 0.013, "flexible_extract": 0.013},
        "n": 1319,                          questions
        "digest": "8c1d6f0e2b7a9354",       of the questions, their choices and answers
        "version": 3.0,                     of the harness's task
        "few_shot": 0, "limit": null, "chat_template": false,
        "data": "hub"                       or the local file
        "model": "outputs/run",             as it was named
        "attention": "sage_int8 (cpu_int8)",   what really ran
        "precision": "32-true", "batch_size": 8, "seconds": 412.0, "versions": {...}}}}}

The step is that of the weights, 0 of a model that no run here trained. The attention is the name it was asked for by (a
file of conf/attention; a run's own arm). The same step, attention and task evaluated again replaces what was there, but
a limited number of questions never replaces all of them. A limit that leaves out none is null.
Several processes may write at once: one waits for the other's lock (`flock`), where the file system has locks.
MMLU has its subjects' scores in "subjects" besides.
In metrics.csv a run's own scores are columns eval/TASK/METRIC.
"""

import fcntl
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sagetrain.terminal import console
from sagetrain.training.folder import write

# What is scored, under the harness's own names. Of GSM8K the two filters of one metric (exact_match).
METRICS = {
    "gsm8k": ("strict_match", "flexible_extract"),
    "mmlu": ("acc",),
    "hellaswag": ("acc", "acc_norm"),
    "drop": ("em", "f1"),
}
FILE = "eval.json"
Scores = dict[str, dict[str, Any]]  # by task


def columns(tasks: Sequence[str]) -> tuple[str, ...]:
    """Of metrics.csv."""
    return tuple(f"eval/{task}/{metric}" for task in dict.fromkeys(tasks) for metric in METRICS[task])


def row(scores: Scores) -> dict[str, float]:
    """The values of `columns`."""
    return {f"eval/{task}/{metric}": x for task, of in scores.items() for metric, x in of["scores"].items()}


def read(folder: Path) -> dict[str, dict[str, Scores]]:
    """What eval.json in `folder` holds; nothing where there is none. Raises ValueError, with the file and what is wrong
    with it, where it does not hold scores."""
    path = folder / FILE
    try:
        held = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # of no right to read it, no JSON, or no text
        raise ValueError(f"{path}: cannot be read: {error}; repair it or move it away") from error
    if wrong := next(_wrong(held), None):
        raise ValueError(f"{path}: {wrong}; repair it or move it away")
    return held


def _wrong(held: Any) -> Iterator[str]:
    """What does not have the shape of scores."""
    if not isinstance(held, Mapping):
        yield f"holds {type(held).__name__}, no mapping of steps"
        return
    for step, arms in held.items():
        if not step.isdecimal():
            yield f"step {step!r} is no whole number"
        for what, of in (f"step {step}", arms), *((f"step {step}, {arm}", of) for arm, of in _items(arms)):
            if not isinstance(of, Mapping):
                yield f"{what} is {type(of).__name__}, no mapping"
        for arm, tasks in _items(arms):
            for task, of in _items(tasks):
                values = of.get("scores") if isinstance(of, Mapping) else None
                if not isinstance(values, Mapping) or not all(isinstance(x, int | float) for x in values.values()):
                    yield f'step {step}, {arm}, {task} has no "scores" that are numbers'


def _items(of: Any) -> Sequence[tuple[str, Any]]:
    return list(of.items()) if isinstance(of, Mapping) else []


def check(folder: Path) -> dict[str, dict[str, Scores]]:
    """Make `folder` if need be, and see that scores can be written there. Returns what it holds.

    Raises ValueError for an eval.json that does not hold scores, OSError where nothing can be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held, trial = read(folder), folder / f".{FILE}.trial"
    trial.write_bytes(b"{}")
    trial.unlink(missing_ok=True)  # another evaluation's may be the same file
    return held


def keep(folder: Path, step: int, attention: str, scores: Scores) -> Path:
    """Add scores to eval.json in `folder`, but none of fewer questions in the place of all. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        held = read(folder)
        there = held.setdefault(str(step), {}).setdefault(attention, {})
        limited = [task for task, of in scores.items() if of.get("limit")]
        whole = [task for task in limited if task in there and not there[task].get("limit")]
        there.update({task: of for task, of in scores.items() if task not in whole})
        held = dict(sorted(held.items(), key=lambda item: int(item[0])))
        write(folder / FILE, json.dumps(held, indent=2) + "\n")
    if whole:
        console().print(f"{folder / FILE} keeps its scores of all questions: {', '.join(whole)}", soft_wrap=True)
    return folder / FILE


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time, from reading to writing."""
    with open(folder / f".{FILE}.lock", "w") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def table(scores: Scores) -> Any:
    """For the terminal, in percent."""
    from rich.table import Table

    shown = Table("task", "metric", "score", "± standard error", "n", "few-shot")
    for task, of in scores.items():
        for metric, value in of["scores"].items():
            error = f"{100 * of['stderr'][metric]:.2f}" if of["stderr"][metric] else "too few to say"
            shown.add_row(task, metric, f"{100 * value:.2f}%", error, f"{of['n']:,}", str(of["few_shot"]))
    return shown

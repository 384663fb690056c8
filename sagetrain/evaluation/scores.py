"""eval.json: the scores of a model, by optimizer step, attention and task.

    {"200": {"sage_int8": {"gsm8k": {
        "scores": {"strict_match": 0.31, "flexible_extract": 0.32},   between 0 and 1
        "stderr": {"strict_match": 0.013, "flexible_extract": 0.013},
        "n": 1319,                          questions
        "version": 3.0,                     of the harness's task
        "few_shot": 0, "limit": null, "chat_template": false,
        "data": "hub"                       or the local file
        "model": "outputs/run",             as it was named
        "attention": "sage_int8 (cpu_int8)",   what really ran
        "precision": "32-true", "batch_size": 8, "seconds": 412.0, "versions": {...}}}}}

The step is that of the weights, 0 of a model that no run here trained. The attention is the name it was asked for by (a
file of conf/attention; a run's own arm). The same step, attention and task evaluated again replaces what was there, but
a limited number of questions never replaces all of them.
MMLU has its subjects' scores in "subjects" besides.
In metrics.csv a run's own scores are columns eval/TASK/METRIC.
"""

import json
from collections.abc import Sequence
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
    """What eval.json in `folder` holds; nothing where there is none."""
    path = folder / FILE
    return json.loads(path.read_text()) if path.exists() else {}


def keep(folder: Path, step: int, attention: str, scores: Scores) -> Path:
    """Add scores to eval.json in `folder`, but none of fewer questions in the place of all. Returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    held = read(folder)
    there = held.setdefault(str(step), {}).setdefault(attention, {})
    whole = [task for task, of in scores.items() if of.get("limit") and task in there and not there[task].get("limit")]
    if whole:
        console().print(f"{folder / FILE} keeps its scores of all questions: {', '.join(whole)}", soft_wrap=True)
    there.update({task: of for task, of in scores.items() if task not in whole})
    held = dict(sorted(held.items(), key=lambda item: int(item[0])))
    write(folder / FILE, json.dumps(held, indent=2) + "\n")
    return folder / FILE


def table(scores: Scores) -> Any:
    """For the terminal, in percent."""
    from rich.table import Table

    shown = Table("task", "metric", "score", "± standard error", "n", "few-shot")
    for task, of in scores.items():
        for metric, value in of["scores"].items():
            error = f"{100 * of['stderr'][metric]:.2f}" if of["stderr"][metric] else "too few to say"
            shown.add_row(task, metric, f"{100 * value:.2f}%", error, f"{of['n']:,}", str(of["few_shot"]))
    return shown

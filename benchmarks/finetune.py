"""Fine-tuning by the recipes, INT8 against BF16 by seeds: loss and score of each task, before and after.

    python -m benchmarks.finetune --model FOLDER --data FOLDER --out FOLDER [--tasks gsm8k ...] [--seeds 3] [--jobs 1]
                                  [key=value ...]

FOLDER of --data holds the four data sets as one file each (SOURCES). GSM8K is trained on its train split and evaluated
on its test split. The others are split here, a fifth for evaluation, by a hash of what examples share (the passage, the
context, the question), so their scores are those of this split and not the published benchmark's.
Method: every run is a command of its own, `python -m sagetrain recipe=TASK_finetune`, evaluated by the recipe with its
own attention; then its weights are evaluated with the attention of the other arm (BF16 there is SDPA). The model before
is evaluated with each arm's own. --jobs of them run at a time on each GPU; `key=value` goes to all runs. The same
command goes on where it was stopped, and does not repeat what is done. The rows of a task are written when all its
runs are done, and the curves of all to results/MODEL-TASK-<kernel>/metrics.csv (python -m benchmarks.plot draws them).
Choice: one row for each run and metric, in results/finetune-<kernel>.csv: settings (those given), n (questions),
train_loss (mean of the last tenth of the steps), val_loss (the last), before and after (own attention), other (after,
with the other arm's). What the commands said is in FOLDER of --out, TASK/ARM-seedN.txt.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import lzma
from itertools import product
from pathlib import Path
from queue import Queue
from statistics import mean
from typing import Any

import torch

from benchmarks.common import conditions, kernel_file, write
from benchmarks.jobs import command, pool, positive, same_as_before, slots
from benchmarks.losses import curves
from benchmarks.tables import TAIL
from sagetrain.evaluation.scores import METRICS, read

SOURCES = {  # the file that is trained on, the one that is evaluated (None: split), what examples share
    "gsm8k": ("gsm8k-train.jsonl.xz", "gsm8k-test.jsonl.xz", ""),
    "hellaswag": ("hellaswag-val.jsonl.xz", None, "ctx"),
    "mmlu": ("mmlu-test.jsonl.xz", None, "question"),
    "drop": ("drop-dev.jsonl.xz", None, "passage"),
}
ARMS = {"bf16": "sage_int8", "sage_int8": "sdpa"}  # and what else it is evaluated with
# A small model has room for larger micro-batches than the recipes', which are for a billion weights: examples in one,
# and how many make a step (together as the recipe has it).
MICRO = {"gsm8k": (32, 1), "hellaswag": (128, 1), "mmlu": (128, 1), "drop": (32, 4)}
# Questions asked at once: of answers that are written the more, the faster; of choices 512 are too many for a GPU's
# memory with --jobs 4.
ASKED = {"gsm8k": 512, "hellaswag": 64, "mmlu": 64, "drop": 512}
EVALUATED = 0.2  # of a file that is split


def split(task: str, data: Path, out: Path) -> tuple[Path, Path]:
    """The files to train on and to evaluate."""
    source, asked, shared = SOURCES[task]
    if asked:
        return data / source, data / asked
    files = out / f"{task}-train.jsonl", out / f"{task}-eval.jsonl"
    parts: tuple[list[str], list[str]] = [], []
    with lzma.open(data / source, "rt") as lines:
        for line in lines:
            digest = hashlib.sha256(json.loads(line)[shared].encode()).digest()
            parts[int.from_bytes(digest[:8]) < EVALUATED * 2**64].append(line)
    for file, part in zip(files, parts, strict=True):
        file.write_text("".join(part))
    return files


class Work:
    """What is run for one task; commands share the GPUs through `slots`."""

    def __init__(self, task: str, options: argparse.Namespace, slots: Queue[str]) -> None:
        self.task, self.options, self.slots = task, options, slots
        self.batch_size = options.batch_size or ASKED[task]
        self.out = options.out / task
        self.out.mkdir(parents=True, exist_ok=True)
        self.train, self.asked = split(task, options.data, self.out)

    def command(self, name: str, *words: str) -> None:
        command(self.slots, self.out / f"{name}.txt", *words)

    def evaluate(self, name: str, model: Path, step: str, attention: str, out: Path) -> None:
        if self.task in read(out).get(step, {}).get(attention, {}):
            return
        template = [] if step != "0" else ["--chat-template" if self.options.chat_template else "--no-chat-template"]
        limit = ["--limit", str(self.options.limit)] if self.options.limit else []
        self.command(
            name, "sagetrain.evaluate", str(model), "--tasks", self.task, "--data", f"{self.task}={self.asked}",
            "--attention", attention, "--batch-size", str(self.batch_size), "--out", str(out),
            *template, *limit,
        )  # fmt: skip

    def before(self, attention: str) -> None:
        self.evaluate("before", self.options.model, "0", attention, self.out / f"before-{attention}")

    def run(self, arm: str, seed: int) -> None:
        name = f"{arm}-seed{seed}"
        run, template = self.out / name, str(self.options.chat_template).lower()
        if not (facts := run / "run.json").exists() or json.loads(facts.read_text())["status"] != "finished":
            limit, (examples, micro) = self.options.limit or "null", MICRO[self.task]
            step = {
                "data.batch_size": examples,
                "trainer.accumulate_grad_batches": micro,
                "trainer.val_check_interval": 100 * micro,
            }
            given = {word.partition("=")[0] for word in self.options.settings}
            self.command(
                name, "sagetrain", f"recipe={self.task}_finetune", f"attention={arm}", f"seed={seed}", f"out={run}",
                f"model.path={self.options.model}", f"data.path={self.train}", f"data.chat_template={template}",
                f"eval.tasks=[{self.task}]", f"eval.data={{{self.task}: {self.asked}}}", f"eval.limit={limit}",
                f"eval.batch_size={self.batch_size}", "checkpoint.keep=weights",
                *(f"{key}={value}" for key, value in step.items() if key not in given), *self.options.settings,
            )  # fmt: skip
        step = str(json.loads(facts.read_text())["steps"])
        self.evaluate(name, run, step, ARMS[arm], run)

    def rows(self, arm: str, seed: int) -> list[dict[str, Any]]:
        run = self.out / f"{arm}-seed{seed}"
        last = json.loads((run / "run.json").read_text())["steps"]
        with (run / "metrics.csv").open(newline="") as file:
            steps = list(csv.DictReader(file))
        train = [float(step["loss"]) for step in steps]
        validated = [step["val_loss"] for step in steps if step.get("val_loss")]
        after = read(run)[str(last)]
        before = read(self.out / f"before-{arm}")["0"][arm][self.task]
        own, other = after[arm][self.task], after[ARMS[arm]][self.task]
        what = {
            "model": self.options.model.name, "task": self.task, "steps": last,
            "settings": " ".join(self.options.settings), "chat_template": self.options.chat_template,
            "arm": arm, "seed": seed,
        }  # fmt: skip
        losses = {
            "train_loss": round(mean(train[-max(1, len(train) // TAIL) :]), 5),
            "val_loss": round(float(validated[-1]), 5) if validated else "",
        }
        return [
            what
            | {"metric": metric, "n": own["n"]}
            | losses
            | {
                name: round(of["scores"][metric], 5)
                for name, of in (("before", before), ("after", own), ("other", other))
            }
            for metric in METRICS[self.task]
        ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a folder of Hugging Face's format")
    parser.add_argument("--data", type=Path, required=True, help="a folder with the files of SOURCES")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--tasks", nargs="+", choices=SOURCES, default=list(SOURCES))
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each arm")
    parser.add_argument("--jobs", type=positive, default=1, help="at a time, on each GPU")
    parser.add_argument("--limit", type=int, help="the first questions only (of MMLU of each subject)")
    parser.add_argument("--batch-size", type=int, help="of the evaluation; default: ASKED has it for each task")
    parser.add_argument("--chat-template", action="store_true", help="examples and questions as conversations")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="for all runs")
    options = parser.parse_args(arguments)
    for name in ("model", "data", "out"):
        setattr(options, name, getattr(options, name).expanduser().absolute())
    free = slots(options.jobs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held = conditions(device)
    same_as_before(options.out, options, ("model", "data", "limit", "chat_template", "settings"), held)
    runs = list(product(range(options.seeds), ARMS))
    with pool(free) as threads:
        begun = []
        for task in options.tasks:
            work = Work(task, options, free)
            promises = [threads.submit(work.run, arm, seed) for seed, arm in runs]
            begun.append((work, promises + [threads.submit(work.before, arm) for arm in ARMS]))
        for work, promises in begun:
            for promise in promises:
                promise.result()
            rows = [held | row for seed, arm in runs for row in work.rows(arm, seed)]
            file = kernel_file("finetune", device)
            write(rows, file)
            name = file.stem.replace("finetune", f"{options.model.name.lower()}-{work.task}", 1)
            curves([str(work.out / f"{arm}-seed{seed}") for seed, arm in runs], file.with_name(name))


if __name__ == "__main__":
    main()

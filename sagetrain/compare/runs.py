"""Reads run directories: `run.json`, `config.yaml`, `metrics.csv` and `eval.json` of one training run.

Method: every cell that the comparison uses is parsed once, at reading time, so that a corrupt file is named with its
line before anything is computed. An empty cell means "not measured" and is left out of its series; `nan` and `inf`
are values. Scores of a run's own attention in eval.json (also of `python -m sagetrain.evaluate RUN`) count like those
in metrics.csv, and in their place at the same step: how they were asked stands beside them.
Choice: a step that was logged twice (a run killed and resumed) counts once, the later row. A torn last line is normal
for a run that was killed or still runs, so it is dropped and noted there; in a finished run it is an error.
Cost: all rows are held in memory as text, about 10 MB per 100,000 rows of 10 columns.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from sagetrain.evaluation import scores
from sagetrain.ops.schemes import SCHEMES
from sagetrain.training.folder import RENAMED

Series = tuple[np.ndarray, np.ndarray]  # steps (int64, strictly increasing), values (float64)
STATUSES = ("running", "finished", "stopped", "failed")
EVAL = "eval/"  # TASK/METRIC
NUMERIC = ("tokens", "loss", "grad_norm", "tokens_per_s", "step_ms", "data_wait", "val_loss")
NUMERIC_GROUPS = ("probe/", EVAL)
REQUIRED = {"recipe": str, "arm": str, "seed": int, "status": str, "steps": int}
ASKED = {
    "n": "number of questions",
    "digest": "questions",
    "version": "harness's version",
    "few_shot": "examples before a question",
    "chat_template": "chat template",
}
EMPTY: Series = (np.empty(0, np.int64), np.empty(0))


class Run:
    """One run directory. Raises FileNotFoundError or ValueError that names the file, the line and what is wrong.

    `info` is run.json, `config` config.yaml ({} if there is none); `rows` maps a step to its cells, as in `header`.
    `kind` is the attention, `arm` what the run counts as in a comparison (see arms.py). `asked`: of each task and step
    in eval.json, how (ASKED).
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.notes = Path(path), list[str]()
        self.info = _read_info(self.path / "run.json")
        self.recipe, self.kind, self.seed = (self.info[key] for key in ("recipe", "arm", "seed"))
        self.arm = self.kind
        self.finished = self.info["status"] == "finished"
        plan = self.info.get("max_steps") or -1
        self.planned = plan if plan > 0 else self.info["steps"] if self.finished else None
        self.config = self._read_config(self.path / "config.yaml")
        self._read_metrics(self.path / "metrics.csv")
        self.asked: dict[str, dict[int, dict[str, Any]]] = {}
        self._read_scores()
        self.last_step = int(self.columns["loss"][0][-1])
        self.progress = f"{self.last_step:,}" + (f" of {self.planned:,}" if self.planned else "")

    @property
    def name(self) -> str:
        """Unique within a comparison, whatever the folder is called."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def is_ours(self) -> bool:
        """Whether it ran one of our schemes, which the others are there to be held against."""
        attention = self.config.get("attention")
        name = attention.get("implementation") if isinstance(attention, dict) else None
        return (name or self.kind) in SCHEMES

    @property
    def place(self) -> str:
        """What it ran on: speeds of different places do not compare."""
        trainer = self.config.get("trainer")
        several = {key: trainer[key] for key in ("devices", "num_nodes") if trainer.get(key, 1) != 1} if trainer else {}
        return ", ".join([str(self.info.get("device")), *(f"trainer.{key}={value}" for key, value in several.items())])

    def series(self, column: str, until: int | None = None) -> Series:
        """Measured (steps, values) of a column, up to and including step `until`; empty where nothing was measured."""
        steps, values = self.columns.get(column, EMPTY)
        end = len(steps) if until is None else int(np.searchsorted(steps, until, side="right"))
        return steps[:end], values[:end]

    def how_asked(self, task: str, until: int) -> dict[str, Any]:
        """How the questions were asked whose scores are the last up to step `until`, as far as eval.json tells."""
        scored = [self.series(name, until)[0] for name in self.columns if name.startswith(f"{EVAL}{task}/")]
        last = max((int(steps[-1]) for steps in scored if len(steps)), default=None)
        return self.asked.get(task, {}).get(last, {})

    def _read_config(self, file: Path) -> dict[str, Any]:
        if not file.exists():
            self.notes.append("config.yaml is missing: settings were not compared")
            return {}
        return _read_mapping(file, yaml.safe_load)

    def _read_metrics(self, file: Path) -> None:
        text = _read_text(file)
        if not text.strip():
            raise ValueError(f"{file}: empty, no step was logged yet")
        if not text.endswith("\n"):
            if self.finished:
                raise ValueError(f"{file}: the last line is cut off, although run.json says finished")
            text = text[: text.rfind("\n") + 1]
            self.notes.append("metrics.csv: its half-written last line was left out")
        header, *lines = list(csv.reader(text.splitlines())) or [[]]
        self.header = [RENAMED.get(column, column) for column in header]
        if "step" not in self.header or "loss" not in self.header or len(set(self.header)) < len(self.header):
            raise ValueError(
                f"{file}: the header must name step and loss, and no column twice: {','.join(self.header)}"
            )
        rows: dict[int, tuple[int, list[str]]] = {}
        for number, cells in enumerate(lines, start=2):
            if len(cells) != len(self.header):
                raise ValueError(f"{file}: line {number} has {len(cells)} cells, the header has {len(self.header)}")
            step = _number(cells[self.header.index("step")], file, number, "step")
            if not step.is_integer() or step < 0:
                raise ValueError(f"{file}: line {number}: step {step} is not a count")
            rows[int(step)] = (number, cells)
        self.rows = {step: cells for step, (_, cells) in sorted(rows.items())}
        self.columns: dict[str, Series] = {}
        for index, column in enumerate(self.header):
            if column in NUMERIC or column.startswith(NUMERIC_GROUPS):
                filled = [(step, *rows[step]) for step in self.rows if rows[step][1][index].strip()]
                values = [_number(cells[index], file, number, column) for _, number, cells in filled]
                if filled:
                    self.columns[column] = (np.array([step for step, *_ in filled]), np.array(values))
        if "loss" not in self.columns:
            raise ValueError(f"{file}: no loss was logged yet; compare the run once it has trained a few steps")

    def _read_scores(self) -> None:
        found: dict[str, dict[int, float]] = {}
        for step, arms in scores.read(self.path).items():
            for task, of in arms.get(self.kind, {}).items():
                self.asked.setdefault(task, {})[int(step)] = {key: of.get(key) for key in ASKED}
                for metric, value in of["scores"].items():
                    found.setdefault(f"{EVAL}{task}/{metric}", {})[int(step)] = float(value)
        for column, values in found.items():
            steps, there = self.columns.get(column, EMPTY)
            values = dict(zip(steps.tolist(), there.tolist(), strict=True)) | values
            ordered = sorted(values.items())
            self.columns[column] = (np.array([s for s, _ in ordered]), np.array([x for _, x in ordered]))


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Runs in the given directories, each a run or a parent of runs (up to two levels down); no run counts twice.

    Raises FileNotFoundError that names every mistyped path, ValueError for a corrupt run.
    """
    paths = [Path(path).expanduser() for path in paths]
    if not paths:
        raise ValueError("no runs given; name run directories (with a run.json) or parents of them")
    if missing := [path for path in paths if not path.is_dir()]:
        raise FileNotFoundError("; ".join(_missing(path) for path in missing))
    return [Run(found) for found in dict.fromkeys(found.resolve() for path in paths for found in _expand(path))]


def _missing(path: Path) -> str:
    if path.exists():
        return f"{path} is a file, not a run directory"
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=3)
    return f"no such directory: {path}" + (f" (did you mean {' or '.join(close)}?)" if close else "")


def _expand(path: Path) -> list[Path]:
    if (path / "run.json").exists():
        return [path]
    found = sorted(file.parent for pattern in ("*/run.json", "*/*/run.json") for file in path.glob(pattern))
    torn = [c.parent for c in path.glob("*/config.yaml") if not any(r.is_relative_to(c.parent) for r in found)]
    if (path / "config.yaml").exists() and not found:
        torn.append(path)
    if torn:
        raise FileNotFoundError(
            f"{torn[0] / 'run.json'} is missing: {torn[0].name} is a half-written run; finish it or move it away"
        )
    if not found:
        raise FileNotFoundError(f"{path} is neither a run (it has no run.json) nor a parent of runs")
    return found


def _read_text(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: the run directory is half-written or not a run")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text (byte {error.start}): the file is corrupt") from error


def _read_mapping(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        found = parse(_read_text(file))
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: not valid {file.suffix[1:].upper()} (half-written?): {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: holds {type(found).__name__}, no mapping of names to values")
    return found


def _read_info(file: Path) -> dict[str, Any]:
    info = _read_mapping(file, json.loads)
    if missing := [key for key in REQUIRED if key not in info]:
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    for key, kind in REQUIRED.items():
        if not isinstance(info[key], kind):
            raise ValueError(f"{file}: {key!r} is {info[key]!r}, expected {kind.__name__}")
    if info["status"] not in STATUSES:
        raise ValueError(f"{file}: status is {info['status']!r}, expected one of {', '.join(STATUSES)}")
    return info


def _number(cell: str, file: Path, line: int, column: str) -> float:
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"{file}: line {line}: {column} is {cell!r}, not a number") from None

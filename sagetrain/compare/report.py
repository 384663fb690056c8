"""Writes what a comparison found: report.html (one self-contained page), metrics.csv (all rows), comparison.json.

Choice: Jinja2 (it comes with torch) fills the page, plotly.js draws it. The page loads nothing and runs no script but
the two whose hashes its content policy names, whatever runs and arms are called. Each file is replaced in one move, so
that a report being read, or an interrupted one, is never half of a file.
Cost: 5 MB a page, nearly all of it plotly.js as its Python package brings it.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from plotly.offline import get_plotlyjs

from sagetrain.compare import figures, tables
from sagetrain.compare.runs import Run, find_runs
from sagetrain.compare.stats import Comparison
from sagetrain.training.folder import write

PAGE, SCRIPT = (Path(__file__).with_name(name) for name in ("page.html", "page.js"))  # the first a Jinja2 template
OURS = "comparison.json"  # where it lies, the other files are ours too, so it is written first
# Of run.json: shown elsewhere, or of no use here.
APART = ("name", "arm", "seed", "status", "command", "error", "traceback", "wandb_id")


def report(runs: Iterable[str | Path], out: str | Path, baseline: str | None = None) -> Comparison:
    """Compares run directories (or parents of them) and writes report.html, metrics.csv and comparison.json into `out`.

    Those of an earlier comparison are replaced. Raises FileNotFoundError or ValueError, before anything is written, for
    runs that cannot be read or compared, and where files of somebody else would be overwritten.
    """
    comparison, out = Comparison(find_runs(runs), baseline), Path(out).expanduser()
    if (out / "run.json").exists():
        raise ValueError(f"{out} is a run: a report would overwrite its metrics.csv; choose another folder with --out")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; choose another folder with --out")
    files = {
        OURS: json.dumps(comparison.as_dict(), indent=2, allow_nan=False) + "\n",
        "metrics.csv": _all_rows(comparison.runs),
        "report.html": render(comparison),
    }
    if not (out / OURS).exists() and (theirs := [name for name in files if (out / name).exists()]):
        raise ValueError(
            f"{out / theirs[0]} is of no comparison (there is no {OURS} beside it), and a report would overwrite it; "
            "move it away, or choose another folder: python -m sagetrain.compare RUN... --out FOLDER"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        write(out / name, text.encode(errors="replace"))  # a command line may hold no text
    return comparison


def render(comparison: Comparison) -> str:
    """The page as HTML text."""
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    runs, said = comparison.runs, {tables.said(arm) for arm in comparison.others}
    unsure = not said or said - {"yes", "better"} or comparison.mismatches or comparison.cut_short
    unsure = unsure or any(arm.inside and not comparison.as_well(arm) for arm in comparison.others)
    worse = "no" in said | {tables.said(score) for score in comparison.scores}
    tone = "bad" if worse else "open" if unsure else "good"
    found = list(figures.panels(comparison))
    told = [(title, caption, *figures.values(figure)) for title, caption, figure in found]
    tokens = [figures.tokens_at(run, [comparison.common_step]) for run in runs]  # at the last step that all reached
    end = [comparison.common_step, *(tokens[0] or ())] if comparison.cut_short else None
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        comparison=comparison,
        title=", ".join(sorted({run.recipe for run in runs})),
        names=", ".join(comparison.label(arm.name) for arm in comparison.arms),
        tone=tone,
        columns=tables.ARMS,
        rows=list(zip(comparison.arms, tables.arm_cells(comparison), strict=True)),
        score_columns=tables.SCORES,
        scores=list(zip(comparison.scores, tables.score_cells(comparison), strict=True)),
        looks=figures.looks(comparison),
        several=figures.several_seeds(comparison),
        smoothing=figures.SMOOTHING,
        smoothed=figures.SMOOTHED,
        has_tokens=all(tokens),
        panels=[dict(zip(("title", "caption", "header", "rows"), panel, strict=True)) for panel in told],
        curves={"panels": [figure for *_, figure in found], "end": end},
        scripts=[_script(text) for text in (get_plotlyjs(), SCRIPT.read_text(encoding="utf-8"))],
        conditions=_conditions(comparison),
        runs=runs,
        finals={run.path: arm.finals[run.seed] for arm in comparison.arms for run in arm.runs},
    )


def _script(text: str) -> dict[str, str]:
    """A script and what the content policy calls it."""
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return {"text": text, "hash": f"'sha256-{digest}'"}


def _conditions(comparison: Comparison) -> dict[str, list[str]]:
    """What the runs ran on and with: what their run.json say, each name with its distinct values over all runs."""
    found: dict[str, list[str]] = {}
    for run in comparison.runs:
        for key, value in run.info.items():
            if key in APART or value in (None, {}):
                continue
            if isinstance(value, dict):
                text = ", ".join(f"{name} {version}" for name, version in value.items() if version)
            else:
                text = f"{value:,}" if isinstance(value, int | float) else str(value)
            text = f"{comparison.label(run.arm)}: {text}" if key in ("kernel", "attention", "handicap") else text
            if text not in found.setdefault(key.replace("_", " "), []):
                found[key.replace("_", " ")].append(text)
    return {"compared": [f"up to step {comparison.common_step:,}"], **found}


def _all_rows(runs: list[Run]) -> str:
    """All rows of all runs as CSV, recipe, arm and seed first; a column that a run lacks is empty there."""
    columns = dict.fromkeys(["recipe", "arm", "seed", *(column for run in runs for column in run.header)])
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for run in runs:
        named = {"recipe": run.recipe, "arm": run.arm, "seed": run.seed}
        writer.writerows(named | dict(zip(run.header, cells, strict=True)) for cells in run.rows.values())
    return out.getvalue()

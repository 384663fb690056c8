"""Runs of training by their losses: a row for each, and the curves of all in one folder.

    python -m sagetrain recipe=parity_120m compare.arms=null attention=bf16 seed=1 out=RUN ...
    python -m benchmarks.losses NAME RUN [RUN ...]           # runs, or parents of them
    python -m benchmarks.plot benchmarks/results/NAME-<kernel>

Rows go to results/losses-<kernel>.csv: what a run was, and its losses: train_loss is the mean of the last tenth of the
steps (five at least), as in sagetrain.compare, val_loss the last that was measured. Curves go to
results/NAME-<kernel>: what sagetrain.compare writes, in eight digits, metrics.csv of all steps without the columns of
single layers, probe.csv of the steps that were probed, with them, and of comparison.json what it found, without where
the runs lie. So name all runs of NAME, also those of the last time: one that has its row keeps its date and commit,
which is said.
Choice: runs of hours are made one at a time, on whatever machine there is. So all a row says of the machine is what
run.json has; the commit is that of this checkout (or SAGETRAIN_COMMIT), unless --commit says with which they were made.
"""

from __future__ import annotations

import argparse
import csv
import json
from math import ceil
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from benchmarks.common import RESULTS, conditions, write
from benchmarks.tables import read
from sagetrain.compare import report
from sagetrain.compare.runs import Run, find_runs
from sagetrain.compare.stats import LEAST_ROWS, TAIL

MADE = ("date", "commit")  # of a row: when and with what


def row(run: Run) -> dict[str, Any]:
    """What one run was and came to."""
    settings, versions = OmegaConf.create(run.config), run.info.get("versions", {})
    losses = run.columns["loss"][1]
    validated = run.columns.get("val_loss", ((), ()))[1]
    return {
        "device": run.info["device"], "torch": versions.get("torch", ""), "sagetrain": versions.get("sagetrain", ""),
        "recipe": run.recipe, "model_type": OmegaConf.select(settings, "model.config.model_type"),
        "parameters": run.info["parameters"], "tokens_per_step": run.info["tokens_per_step"],
        "lr": OmegaConf.select(settings, "optim.lr"), "arm": run.kind, "attention": run.info["attention"],
        "seed": run.seed, "steps": run.last_step, "tokens": int(run.columns["tokens"][1][-1]),
        "train_loss": f"{mean(losses[-max(LEAST_ROWS, ceil(len(losses) / TAIL)):]):.5f}",
        "val_loss": f"{validated[-1]:.5f}" if len(validated) else "",
        "grad_norm": f"{np.nanmedian(run.columns['grad_norm'][1]):.4g}",
        "tokens_per_s": f"{median(run.columns['tokens_per_s'][1]):.0f}", "peak_gib": run.info.get("peak_gib", ""),
    }  # fmt: skip


def kept(row: dict[str, Any], before: list[dict[str, str]]) -> dict[str, Any]:
    """The row as it stands, where all but its date and commit are as before; columns that it lacks say nothing."""
    said = {column: "" if cell is None else str(cell) for column, cell in row.items() if column not in MADE}
    return next((old for old in before if all(old.get(column, "") in ("", cell) for column, cell in said.items())), row)


def curves(runs: list[str], folder: Path, *notes: str) -> None:
    """Writes metrics.csv of a folder, the curves of all runs, comparison.json, with further notes, and probe.csv where
    one was probed."""
    with TemporaryDirectory() as compared:
        report(runs, compared)
        found = json.loads((Path(compared) / "comparison.json").read_text("utf-8"))
        with (Path(compared) / "metrics.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
    of_layers = [column for column in rows[0] if "_layer" in column]
    folder.mkdir(parents=True, exist_ok=True)
    _write(rows, [column for column in rows[0] if column not in of_layers], folder / "metrics.csv")
    found = {key: found[key] for key in ("baseline", "common_step", "band", "arms", "verdict", "notes")}
    found["notes"] += notes
    (folder / "comparison.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    (folder / "probe.csv").unlink(missing_ok=True)
    if probed := [row for row in rows if any(row[column] for column in of_layers)]:
        probe = [column for column in rows[0] if column.startswith("probe/")]
        _write(probed, ["arm", "seed", "step", "tokens", *probe], folder / "probe.csv")
    print(f"curves of {len(runs)} runs -> {folder}")


def _write(rows: list[dict[str, str]], columns: list[str], target: Path) -> None:
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({column: _short(row[column]) for column in columns} for row in rows)


def _short(cell: str) -> str:
    try:
        return cell if cell.lstrip("-").isdigit() else f"{float(cell):.8g}"
    except ValueError:
        return cell


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("name", help="of the runs together")
    parser.add_argument("runs", nargs="+", help="run directories, or parents of them")
    parser.add_argument("--kernel", help="that the device of the runs has, e.g. sm90; default: this machine's")
    parser.add_argument("--commit", help="with which the runs were made; default: this one")
    options = parser.parse_args(arguments)
    here = conditions("cuda" if torch.cuda.is_available() else "cpu")
    held = {
        "date": here["date"],
        "kernel": options.kernel or here["kernel"],
        "commit": options.commit or here["commit"],
    }
    runs = find_runs(options.runs)
    folder = RESULTS / f"{options.name}-{held['kernel'].replace('/', '-')}"
    for run in runs:
        if not run.finished:
            raise ValueError(f"{run.path} has not finished: its status is {run.info['status']}")
    file = RESULTS / f"losses-{held['kernel'].replace('/', '-')}.csv"
    before = read(file) if file.exists() else []
    rows = [kept(held | {"name": options.name} | row(run), before) for run in runs]
    if standing := [each["commit"] for each in rows if each in before]:
        print(f"{len(standing)} of {len(rows)} rows stand as they were, of commit {', '.join(dict.fromkeys(standing))}")
    curves([str(run.path) for run in runs], folder)
    write(rows, file)


if __name__ == "__main__":
    main()

"""`python -m sagetrain.compare RUN RUN... [--out FOLDER] [--baseline ARM]`: prints the table and writes the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sagetrain.compare import Comparison, markdown, report, terminal
from sagetrain.errors import refused
from sagetrain.terminal import console, print_anything


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what is wrong."""
    print_anything()
    parser = argparse.ArgumentParser(
        prog="python -m sagetrain.compare", description="Compare training runs and write a report."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run directory, or a parent of run directories")
    where = "the parent if one is given, else ./comparison"
    parser.add_argument("--out", metavar="FOLDER", help=f"folder of the report (default: {where})")
    default = "bf16, else the first that is no scheme of ours"
    parser.add_argument("--baseline", metavar="ARM", help=f"arm to hold the others against (default: {default})")
    text = "print the tables in Markdown, for a pull request"
    parser.add_argument("--markdown", action="store_true", help=text)
    where = "send a dashboard and a report to Weights & Biases, where the runs are (needs wandb-workspaces)"
    parser.add_argument("--wandb", metavar="ENTITY/PROJECT", help=where)
    options = parser.parse_args(arguments)
    first = Path(options.runs[0]).expanduser()
    parent = first if len(options.runs) == 1 and not (first / "run.json").exists() else "comparison"
    out = Path(options.out or parent).expanduser()
    try:
        comparison = report(options.runs, out, options.baseline)
        sent = _publish(comparison, options.wandb) if options.wandb else []
    except Exception as error:
        return refused(error)
    if options.markdown:
        print(markdown(comparison), end="")
    else:
        console().print(terminal(comparison))
        for text in [*comparison.mismatches, *comparison.notes]:
            console().print("note:", text)
    for text in [f"report: {out / 'report.html'}", *sent]:
        console(stderr=options.markdown).print(text, soft_wrap=True)
    return 0


def _publish(comparison: Comparison, target: str) -> list[str]:
    try:
        from sagetrain.compare.dashboard import publish
    except ModuleNotFoundError as error:
        raise ValueError(f"--wandb: no package {error.name}: pip install 'sagetrain[wandb]'") from error
    found = publish(comparison, target)
    names = zip(("dashboard", "W&B report"), found, strict=True) if found else ()
    return [f"{name}: {url}" for name, url in names] or ["offline: send the runs and this comparison by wandb sync"]


if __name__ == "__main__":
    sys.exit(main())

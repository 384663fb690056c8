"""`python -m sagetrain.compare RUN RUN... [--out DIR] [--baseline ARM]`: prints the table and writes the report."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console

from sagetrain.compare import report
from sagetrain.paths import home


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m sagetrain.compare", description="Compare training runs and write a report."
    )
    parser.add_argument(
        "runs", nargs="+", type=home, metavar="RUN", help="run directory, or a parent of run directories"
    )
    parser.add_argument(
        "--out", type=home, help="folder of the report (default: the parent if one is given, else ./comparison)"
    )
    parser.add_argument("--baseline", metavar="ARM", help="arm that the others are held against (default: bf16)")
    options = parser.parse_args(arguments)
    paths = options.runs
    out = options.out or (paths[0] if len(paths) == 1 and not (paths[0] / "run.json").exists() else Path("comparison"))
    try:
        comparison = report(paths, out, options.baseline)
    except (ValueError, OSError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return 2
    console = Console()
    console.print(comparison.table())
    for text in [*comparison.mismatches, *comparison.notes]:
        console.print("note:", text, markup=False, highlight=False)
    console.print(f"report: {out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Several ways of training, same seeds and data, held against each other: curves, gaps, the seed band, a report.

`report(runs, out)` reads run directories (or parents of them) and writes report.html, metrics.csv and comparison.json.
"""

import sys

from sagetrain.extras import needs

# `python -m sagetrain.compare` imports this package first, and Python calls the program "-m" until it has.
with needs("train", command=sys.argv[:1] == ["-m"]):
    from sagetrain.compare.report import report
    from sagetrain.compare.runs import Run, find_runs
    from sagetrain.compare.stats import Arm, Comparison, Score
    from sagetrain.compare.tables import markdown, terminal

__all__ = ["Arm", "Comparison", "Run", "Score", "find_runs", "markdown", "report", "terminal"]

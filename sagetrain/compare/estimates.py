"""Means, intervals and spreads of numbers from several seeds, and curves on the steps they share.

What the comparison (stats.py) makes of them stands there.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import numpy as np

from sagetrain.compare.runs import EMPTY, Series

T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t by degrees of freedom


def window_mean(steps: np.ndarray, values: np.ndarray, width: float, rows: int = 1) -> np.ndarray:
    """Trailing mean: at step s over the values of steps in (s - width, s], but over at least `rows` rows if there are.

    A window that holds a value that is not finite gives NaN. Float64, same length as `values`.
    """
    end = np.arange(1, len(steps) + 1)
    start = np.clip(np.minimum(np.searchsorted(steps, steps - width, side="right"), end - rows), 0, None)
    finite = np.isfinite(values)
    total = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    bad = np.concatenate([[0], np.cumsum(~finite)])
    return np.where(bad[end] > bad[start], np.nan, (total[end] - total[start]) / (end - start))


def on_common_steps(curves: list[Series]) -> tuple[np.ndarray, np.ndarray]:
    """Steps that all the curves share, and their values there: [curves, steps]."""
    if not curves:
        return EMPTY[0], np.empty((0, 0))
    steps = reduce(np.intersect1d, [curve[0] for curve in curves])
    return steps, np.stack([values[np.searchsorted(own, steps)] for own, values in curves])


def mean_interval(values: list[float]) -> tuple[float, float] | None:
    """The 95% interval of the mean, by Student's t; None for fewer than two values.

    Many values have the last quantile of the table, which makes their interval a little too wide.
    """
    if len(values) < 2:
        return None
    quantile = T975[min(len(values) - 1, len(T975)) - 1]
    mean, reach = float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean - reach, mean + reach


def is_inside(gap: float, band: float, interval: tuple[float, float] | None) -> bool | None:
    """Whether a gap is inside the band; None: it is outside, but nothing says that it is more than chance."""
    chance = interval is None or interval[0] <= 0 <= interval[1]
    return True if abs(gap) <= band else None if chance else False


def spread(values: dict[int, float]) -> float | None:
    """max - min over seeds; None for a single seed, and where a value is not finite."""
    found = list(values.values())
    return float(np.ptp(found)) if len(found) > 1 and np.isfinite(found).all() else None


def paired(values: dict[int, float], base: dict[int, float]) -> tuple[list[int], float | None, Any]:
    """The seeds of both, the mean over them of value - base, and its 95% interval."""
    seeds = sorted(values.keys() & base.keys())
    gaps = [values[seed] - base[seed] for seed in seeds]
    return seeds, float(np.mean(gaps)) if gaps else None, mean_interval(gaps)

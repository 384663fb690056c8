"""The numbers of a comparison as tables: for a terminal, for a pull request, and as cells for the page."""

from __future__ import annotations

import math
import re

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sagetrain.compare.stats import Arm, Comparison, Score

ARMS = ("arm", "seeds", "final loss", "gap", "band", "inside?", "tokens/s", "ratio")
SCORES = ("score", "arm", "mean", "spread", "gap", "band", "inside?")


def said(of: Arm | Score) -> str:
    """Whether its gap is inside the band, in a word."""
    return "better" if of.better else {True: "yes", False: "no", None: "unknown"}[of.inside]


def arm_cells(comparison: Comparison) -> list[list[str]]:
    """A row per arm as text, columns as in ARMS; ASCII, but for names."""
    rows = []
    for arm in comparison.arms:
        seeds = ", ".join(str(run.seed) for run in arm.runs)
        base = arm.name == comparison.baseline
        gap, inside = ("baseline", "-") if base else (_show(arm.gap, "+.4f"), said(arm))
        speed = [_show(arm.tokens_per_s, ",.0f"), _show(arm.speed_ratio, ".2f", "x")]
        band = _band(comparison.band)
        rows.append([comparison.label(arm.name), seeds, f"{arm.loss:.4f}", gap, band, inside, *speed])
    return rows


def score_cells(comparison: Comparison) -> list[list[str]]:
    """A row per score and arm as text, columns as in SCORES."""
    rows = []
    for score in comparison.scores:
        base = score.arm == comparison.baseline
        gap, inside = ("baseline", "-") if base else (_show(score.gap, "+.4f"), said(score))
        numbers = [f"{score.mean:.4f}", _show(score.spread, ".4f"), gap, _band(score.band), inside]
        rows.append([score.name, comparison.label(score.arm), *numbers])
    return rows


def terminal(comparison: Comparison) -> Group:
    """Names are shown as they are: no markup is read in them."""
    title, verdict = Text(_title(comparison)), Text("\n".join(comparison.sentences()))
    table = Table(title=title, caption=verdict, caption_justify="left", padding=0)  # the arms' names need the room
    _fill(table, ARMS, arm_cells(comparison), names=1)
    scores = Table(padding=0)
    _fill(scores, SCORES, score_cells(comparison), names=2)
    return Group(*([scores] if comparison.scores else []), table)  # the verdict comes last


def markdown(comparison: Comparison) -> str:
    """For a comment of a pull request: the tables, what follows from them, and what to mind."""
    parts = [f"**{_plain(_title(comparison))}**", _markdown(ARMS, arm_cells(comparison), names=1)]
    if comparison.scores:
        parts.append(_markdown(SCORES, score_cells(comparison), names=2))
    parts += map(_plain, comparison.sentences())
    parts.append("\n".join(f"- {_plain(text)}" for text in [*comparison.mismatches, *comparison.notes]))
    return "\n\n".join(filter(None, parts)) + "\n"


def _title(comparison: Comparison) -> str:
    return f"{', '.join(sorted({run.recipe for run in comparison.runs}))}, step {comparison.common_step:,}"


def _fill(table: Table, columns: tuple[str, ...], rows: list[list[str]], names: int) -> None:
    """names: of the first so many columns, which may take several lines."""
    for i, column in enumerate(columns):
        if i < names:
            table.add_column(column, overflow="fold")
        else:
            table.add_column(column, justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*map(Text, cells))


def _markdown(columns: tuple[str, ...], rows: list[list[str]], names: int) -> str:
    sides = ["---"] * names + ["---:"] * (len(columns) - names)
    lines = [columns, sides, *([_plain(cell) for cell in cells] for cells in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _plain(text: str) -> str:
    """Text of which Markdown makes nothing: no table, no HTML, no link, nobody mentioned."""
    escaped = re.sub(r"([\\`*_~<>|\[\]])", r"\\\1", " ".join(text.split()))
    return escaped.replace("@", "@\u200b")


def _band(band: float | None) -> str:
    return "unknown" if band is None else f"{band:.4f}"


def _show(value: float | None, form: str, unit: str = "") -> str:
    return format(value, form) + unit if value is not None and math.isfinite(value) else "-"

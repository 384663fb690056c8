"""The panels of the report: matplotlib figures as inline SVG.

Method: each panel is its own small figure, so that the page has two columns of them on a screen and one on a phone.
Text stays text (searchable, sharp); three sentinel colours become CSS variables, so that dark mode reaches the
pictures.
Cost: a curve is drawn with at most POINTS points, so that the report of very long runs stays below a few MB.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable, Iterable, Iterator

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from sagetrain.compare.runs import EMPTY, Run, Series
from sagetrain.compare.stats import Arm, Comparison, on_common_steps, window_mean

BF16 = "#6482a6"
COLOURS = ("#e8772e", "#2e9e6b", "#a15cc0", "#d1495b", "#1b9aaa", "#b08900")
INK, GRID, SHADE = "#27313d", "#dfe4ea", "#c9d3df"  # sentinels for var(--ink), var(--grid), var(--shade)
POINTS, SMOOTH = 600, 50  # points drawn per curve; curves are smoothed over 1/SMOOTH of their steps
STYLE = {
    **{name: INK for name in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color", "axes.edgecolor")},
    **{f"axes.{name}": False for name in ("spines.top", "spines.right", "formatter.useoffset")},
    **{"svg.fonttype": "none", "svg.hashsalt": "sagetrain", "text.parse_math": False, "legend.frameon": False},
    **{"axes.grid": True, "grid.color": GRID, "font.size": 10.5, "legend.fontsize": 9.5},
}
NATS = "loss (nats per token)"
PROBE = "Drift probe: the same weights and held batch under both kinds of attention."
ZERO = "Rows of dS sum to zero in exact arithmetic; what is left is error."
Draw = Callable[[Axes, Comparison], None]


def colours(comparison: Comparison) -> dict[str, str]:
    """Colour per arm: its own for bf16, in order for the others, our schemes first."""
    others = sorted((arm for arm in comparison.arms if arm.name != "bf16"), key=lambda arm: not arm.runs[0].is_ours)
    return {"bf16": BF16} | {arm.name: COLOURS[i % len(COLOURS)] for i, arm in enumerate(others)}


def panels(comparison: Comparison) -> Iterator[tuple[str, str, str]]:
    """Title, caption and <svg> element of each picture for which the runs have measurements, in reading order."""
    measured = {name for run in comparison.runs for name in run.columns}
    if any(arm.pairs for arm in comparison.others):
        measured.add("gap")
    held_out, norm = _curves_of("val_loss", sparse=True), _curves_of("grad_norm", log=True)
    speed, cosine = _curves_of("tokens_per_s", zero=True), _curves_of("probe/grad_cosine", sparse=True)
    rowsum = _curves_of("probe/ds_rowsum", sparse=True, log=True)
    several = any(len(arm.runs) > 1 for arm in comparison.arms)
    seeds = "Thin lines: one per seed, smoothed; bold: their mean." if several else "Smoothed."
    base = comparison.short(comparison.baseline)
    band = f"one {base} seed, so its band is unknown" if comparison.band is None else f"shaded: ± the {base} seed band"
    difference = f"Against the {base} run of the same seed, mean over a tenth of the steps; it ends at the table's gap"
    medians = ["The table gives medians.", *comparison.without_ratio()]
    rows: list[tuple[str, str, str, str, Draw]] = [
        ("loss", "Training loss", seeds, NATS, _draw_loss),
        ("gap", "Difference in loss", f"{difference}; {band}.", "difference (nats per token)", _draw_difference),
        ("grad_norm", "Gradient norm", seeds, "gradient norm", norm),
        ("tokens_per_s", "Speed", " ".join([seeds, *medians]), "tokens per second", speed),
        ("val_loss", "Validation loss", "Measured on held-out data.", NATS, held_out),
        ("probe/loss_lowbit", "Probe: loss gap", PROBE, "low-bit − BF16 (nats per token)", _draw_probe_gap),
        ("probe/grad_cosine", "Probe: gradient agreement", f"{PROBE} 1: they point the same way.", "cosine", cosine),
        ("probe/ds_rowsum", "Probe: dS row-sum residual", ZERO, "residual", rowsum),
    ]
    for needs, title, caption, unit, draw in rows:
        if needs in measured:
            yield title, caption, _svg(title, unit, comparison, draw)
    for arm, which in itertools.product(comparison.arms, "qk"):
        names = {name for run in arm.runs for name in run.columns if name.startswith(f"probe/sigma_{which}_layer")}
        if names:
            title = f"Probe: sigma of {which}, {comparison.label(arm.name)}"
            caption = "Standard deviation in each layer, mean over seeds."
            yield title, caption, _svg(title, f"sigma of {which}", comparison, _layers_of(arm, names))


def _svg(title: str, unit: str, comparison: Comparison, draw: Draw) -> str:
    """The <svg> element: ids unique in the page, sentinel colours as CSS variables, its size left to the page."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.0, 3.7), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=unit)
        draw(axes, comparison)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
        axes.margins(x=0.01)
        if comparison.cut_short:
            axes.axvline(comparison.common_step, color=INK, lw=0.8, ls=":")
        if axes.get_legend_handles_labels()[0] and not axes.get_legend():
            axes.legend()
        out = io.StringIO()
        unwritten = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=unwritten)
    svg = out.getvalue()[out.getvalue().index("<svg") :]
    svg = re.sub(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 role="img">', svg, count=1)
    prefix = re.sub(r"\W+", "-", title)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    for colour, name in ((INK, "ink"), (GRID, "grid"), (SHADE, "shade")):
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def _smoothed(run: Run, column: str) -> Series:
    steps, values = run.series(column)
    return steps, window_mean(steps, values, run.last_step / SMOOTH)


def _thin(curve: Series) -> Series:
    """At most POINTS of its points, what is not finite as a hole."""
    keep = np.unique(np.linspace(0, len(curve[0]) - 1, min(len(curve[0]), POINTS)).astype(int))
    return curve[0][keep], np.where(np.isfinite(curve[1]), curve[1], np.nan)[keep]


def _mean(curves: list[Series], until: int) -> Series:
    steps, values = on_common_steps(curves)
    keep = steps <= until
    return (steps[keep], values[:, keep].mean(axis=0)) if keep.any() else EMPTY


def _draw_arm(
    axes: Axes, comparison: Comparison, arm: Arm, curves: list[Series], text: str = "", sparse: bool = False
) -> None:
    """Thin lines per seed and their mean in bold. text: behind the name of the arm."""
    colour, curves = colours(comparison)[arm.name], [curve for curve in curves if len(curve[0])]
    for curve in curves if len(curves) > 1 else []:
        axes.plot(*_thin(curve), color=colour, lw=0.8, alpha=0.5)
    if curves:
        mean = _thin(_mean(curves, comparison.common_step) if len(curves) > 1 else curves[0])
        width = 3.6 if arm.name == comparison.baseline else 1.8  # it shows below a curve that covers it
        mark = "o" if sparse or len(mean[0]) < 3 else ""
        axes.plot(*mean, color=colour, lw=width, label=comparison.label(arm.name) + text, marker=mark, ms=2 + width)


def _curves_of(column: str, sparse: bool = False, log: bool = False, zero: bool = False) -> Draw:
    """Draws a column of all runs: smoothed unless `sparse`, `log` where it spans enough, from 0 with `zero`."""

    def draw(axes: Axes, comparison: Comparison) -> None:
        for arm in comparison.arms:
            curves = [run.series(column) if sparse else _smoothed(run, column) for run in arm.runs]
            _draw_arm(axes, comparison, arm, curves, sparse=sparse)
        if log and axes.dataLim.ymax > 3 * axes.dataLim.minposy:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if zero:
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.5g}")

    return draw


def _draw_loss(axes: Axes, comparison: Comparison) -> None:
    _curves_of("loss")(axes, comparison)
    entropies = {run.info["unigram_entropy"] for run in comparison.runs if run.info.get("unigram_entropy")}
    for entropy in sorted(entropies):
        axes.axhline(entropy, color=INK, lw=1, ls=(0, (5, 4)), label=f"unigram entropy {entropy:.2f}")
    shown, first = list(entropies), []
    for run in comparison.runs:
        steps, values = _thin(_smoothed(run, "loss"))
        shown += list(values[(steps >= comparison.common_step / SMOOTH) & np.isfinite(values)])
        first += list(values[:1][np.isfinite(values[:1])])
    highest = 1.05 * min(max(shown, default=np.inf), max([*first, *entropies], default=np.inf))
    if axes.get_ylim()[1] > highest:  # neither the first steps nor a run that blows up may flatten the rest
        axes.set_ylim(top=highest)


def _draw_difference(axes: Axes, comparison: Comparison) -> None:
    steps, band = _thin(comparison.band_curve())
    base, settled = comparison.baseline, comparison.common_step / 10
    if len(steps):
        text = f"{comparison.short(base)} seed band"
        axes.fill_between(steps, -band, band, color=SHADE, alpha=0.55, lw=0, label=text)
    axes.axhline(0, color=colours(comparison)[base], lw=1.5)
    shown = [band[steps >= settled]]
    for arm in (arm for arm in comparison.others if arm.gap is not None):
        curves = comparison.differences(arm)
        _draw_arm(axes, comparison, arm, curves, f": {arm.gap:+.4f}")
        shown += [np.abs(values[at >= settled]) for at, values in curves]
    sizes = np.concatenate(shown)
    if (sizes := sizes[np.isfinite(sizes)]).any():  # the first tenth, where losses fall fast, may leave the picture
        axes.set_ylim(-1.3 * sizes.max(), 1.3 * sizes.max())


def _draw_probe_gap(axes: Axes, comparison: Comparison) -> None:
    axes.axhline(0, color=INK, lw=0.8)
    for arm in comparison.arms:
        pairs = [on_common_steps([run.series("probe/loss_lowbit"), run.series("probe/loss_bf16")]) for run in arm.runs]
        gaps = [(steps, both[0] - both[1]) for steps, both in pairs]
        _draw_arm(axes, comparison, arm, gaps, sparse=True)


def _layers_of(arm: Arm, names: Iterable[str]) -> Draw:
    def draw(axes: Axes, comparison: Comparison) -> None:
        layers = sorted((int(re.sub(r"\D", "", name)), name) for name in names)
        named = {layers[int(i)] for i in np.linspace(0, len(layers) - 1, min(len(layers), 6))}
        axes.set_prop_cycle(color=matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers))))
        for layer, column in layers:
            curve = _mean([run.series(column) for run in arm.runs if column in run.columns], comparison.common_step)
            text = f"layer {layer}" if (layer, column) in named else None
            axes.plot(*_thin(curve), lw=1.5, marker="o", ms=2.5, label=text)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))

    return draw

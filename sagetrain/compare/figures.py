"""The panels of the report, as figures that plotly.js draws.

Method: every curve comes with x in steps and in tokens and with y for each choice of smoothing, computed here, where it
is tested; page.js picks among them and hides what is switched off.
Choice: Okabe and Ito's colours, which colour-blind readers tell apart, and a dash for each arm besides.
Cost: a curve has at most POINTS points, so that the report of very long runs stays below a few MB beside plotly.js.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from typing import Any

import numpy as np
from plotly.colors import sample_colorscale

from sagetrain.compare.estimates import on_common_steps, window_mean
from sagetrain.compare.runs import EVAL, Run, Series
from sagetrain.compare.stats import Arm, Comparison

BF16, COLOURS = "#0072b2", ("#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("", "9,5", "2,4", "9,4,2,4", "16,5", "16,4,2,4")  # as many as no divisor of COLOURS: 30 arms look different
GREY, SHADE = "#888888", "rgba(128, 140, 155, 0.3)"
POINTS = 600
SMOOTHING = {"none": 0, "2% of the steps": 0.02, "10% of the steps": 0.1}
SMOOTHED = 1  # the choice that the page begins with
NATS = "loss (nats per token)"
PROBE = "Drift probe: the same weights and held batch under both kinds of attention."
OF_LAYERS = {  # what the probe says of each layer: its columns, but for _layerN, and how they are called
    "probe/sigma_q": ("sigma of q", "Standard deviation"),
    "probe/sigma_k": ("sigma of k", "Standard deviation"),
    "probe/dq_error": ("error of dQ", "Relative distance from FP32 attention"),
    "probe/dk_error": ("error of dK", "Relative distance from FP32 attention"),
}
ZERO = "Rows of dS sum to zero in exact arithmetic; what is left is error."
Curve = tuple[np.ndarray, np.ndarray]  # steps, values [steps, choices of smoothing]
Figure = dict[str, Any]  # data and layout, as plotly.js takes them
Draw = Callable[[Comparison], Figure]


def looks(comparison: Comparison) -> dict[str, tuple[str, str]]:
    """Colour and dash per arm: its own for bf16, in order for the others, our schemes first."""
    others = sorted((arm for arm in comparison.arms if arm.name != "bf16"), key=lambda arm: not arm.runs[0].is_ours)
    own = {arm.name: (COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]) for i, arm in enumerate(others)}
    return {"bf16": (BF16, "")} | own


def panels(comparison: Comparison) -> Iterator[tuple[str, str, Figure]]:
    """Title, caption and figure of each panel for which the runs have measurements, in reading order."""
    measured = {name for run in comparison.runs for name in run.columns}
    if any(arm.pairs for arm in comparison.others):
        measured.add("gap")
    held_out, norm = _curves_of("val_loss", sparse=True), _curves_of("grad_norm", log=True)
    speed, cosine = _curves_of("tokens_per_s", zero=True), _curves_of("probe/grad_cosine", sparse=True)
    rowsum = _curves_of("probe/ds_rowsum", sparse=True, log=True)
    seeds = "Thin lines: one per seed; bold: their mean." if several_seeds(comparison) else ""
    base = comparison.short(comparison.baseline)
    band = f"one {base} seed, so its band is unknown" if comparison.band is None else f"shaded: ± the {base} seed band"
    difference = f"Against the {base} run of the same seed, mean over a tenth of the steps; it ends at the table's gap"
    medians = ["The table gives medians.", *comparison.without_ratio()]
    rows: list[tuple[str, str, str, str, Draw]] = [
        ("loss", "Training loss", seeds, NATS, _loss),
        ("gap", "Difference in loss", f"{difference}; {band}.", "difference (nats per token)", _difference),
        ("grad_norm", "Gradient norm", seeds, "gradient norm", norm),
        ("tokens_per_s", "Speed", " ".join([seeds, *medians]).strip(), "tokens per second", speed),
        ("val_loss", "Validation loss", "Measured on held-out data.", NATS, held_out),
        ("probe/loss_lowbit", "Probe: loss gap", PROBE, "low-bit − BF16 (nats per token)", _probe_gap),
        ("probe/grad_cosine", "Probe: gradient agreement", f"{PROBE} 1: they point the same way.", "cosine", cosine),
        ("probe/ds_rowsum", "Probe: dS row-sum residual", ZERO, "residual", rowsum),
    ]
    for needs, title, caption, unit, draw in rows:
        if needs in measured:
            yield title, caption, _figure(unit, comparison, draw)
    for name in dict.fromkeys(score.name for score in comparison.scores):
        if any(len(run.series(EVAL + name)[0]) > 1 for run in comparison.runs):
            yield f"Score: {name}", "", _figure("score", comparison, _curves_of(EVAL + name, sparse=True))
    for arm, (column, (what, caption)) in itertools.product(comparison.arms, OF_LAYERS.items()):
        names = {name for run in arm.runs for name in run.columns if name.startswith(f"{column}_layer")}
        if names:
            title = f"Probe: {what}, {comparison.label(arm.name)}"
            yield title, f"{caption} in each layer, mean over seeds.", _figure(what, comparison, _layers_of(arm, names))


def values(figure: Figure, most: int = 10) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table that says what a figure draws, for whoever cannot see it or point at it."""
    bold = [trace for trace in figure["data"] if trace["meta"]["told"] and trace["meta"]["x"][0]]
    at = np.unique(np.concatenate([trace["meta"]["x"][0] for trace in bold])) if bold else np.empty(0, int)
    rows = []
    for step in at[np.unique(np.linspace(0, len(at) - 1, min(len(at), most)).astype(int))]:
        row = [f"{step:,}"]
        for trace in bold:
            index = int(np.searchsorted(trace["meta"]["x"][0], step, side="right")) - 1
            value = trace["meta"]["y"][min(SMOOTHED, len(trace["meta"]["y"]) - 1)][index] if index >= 0 else None
            row.append("–" if value is None else f"{value:,.5g}")
        rows.append(row)
    return ["step", *(trace["meta"]["told"] for trace in bold)], rows


def several_seeds(comparison: Comparison) -> bool:
    return any(len(arm.runs) > 1 for arm in comparison.arms)


def _figure(unit: str, comparison: Comparison, draw: Draw) -> Figure:
    figure = draw(comparison)
    layout = {"xaxis": {}, "yaxis": {}, "shapes": []} | figure["layout"]
    layout["yaxis"] = {"title": {"text": unit}} | layout["yaxis"]
    return {"data": figure["data"], "layout": layout}


def _level(y: float, colour: str, text: str = "") -> dict[str, Any]:
    """A horizontal line over the whole width."""
    line = {"color": colour, "width": 1.5 if not text else 1, "dash": "dash" if text else "solid"}
    label = {"label": {"text": text, "textposition": "start", "font": {"size": 11}}} if text else {}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line} | label


def _smoothed(run: Run, column: str) -> Curve:
    steps, found = run.series(column)
    return steps, np.stack([window_mean(steps, found, run.last_step * share) for share in SMOOTHING.values()], axis=1)


def _plain(series: Series) -> Curve:
    """A curve that is not smoothed, whatever is chosen."""
    return series[0], series[1][:, None]


def _trace(curve: Curve, run: Run, name: str, told: str = "", arm: str = "", **style: Any) -> dict[str, Any]:
    """What plotly.js draws of at most POINTS points; what is not finite is a hole.

    run: whose tokens its steps are. arm: what hides it when switched off. told: its column in the table of values,
    which one seed of several has not.
    """
    keep = np.unique(np.linspace(0, len(curve[0]) - 1, min(len(curve[0]), POINTS)).astype(int))
    steps, found = curve[0][keep], curve[1][keep].T
    y = [[float(f"{value:.6g}") if np.isfinite(value) else None for value in choice] for choice in found]
    x = [steps.tolist(), tokens_at(run, steps)]
    meta = {"x": x, "y": y, "told": told, "arm": arm}
    # plotly.js reads some HTML in names
    pointed = {} if style.get("hoverinfo") == "skip" else {"hovertemplate": "%{y}"}
    return {"type": "scatter", "name": escape(name), "meta": meta} | pointed | style


def tokens_at(run: Run, steps: Sequence[int] | np.ndarray) -> list[int] | None:
    """Tokens seen by then, None where they were not recorded."""
    at, tokens = run.series("tokens")
    return np.interp(steps, at, tokens).astype(int).tolist() if len(at) else None


def _mean(curves: list[Curve], until: int) -> Curve:
    steps, found = on_common_steps(curves)
    keep = steps <= until
    return steps[keep], found[:, keep].mean(axis=0)


def _arm(comparison: Comparison, arm: Arm, curves: list[Curve], sparse: bool = False) -> list[dict[str, Any]]:
    """Thin lines per seed and their mean in bold."""
    colour, dash = looks(comparison)[arm.name]
    pairs = [(run, curve) for run, curve in zip(arm.runs, curves, strict=True) if len(curve[0])]
    if not pairs:
        return []
    name, run = comparison.short(arm.name), pairs[0][0]
    mean = _mean([curve for _, curve in pairs], comparison.common_step) if len(pairs) > 1 else pairs[0][1]
    width = 4 if arm.name == comparison.baseline else 2  # it shows below a curve that covers it
    line = {"color": colour, "dash": ",".join(f"{x}px" for x in dash.split(",")) if dash else "solid"}
    mode = "lines+markers" if sparse or len(mean[0]) < 3 else "lines"
    bold = {"line": line | {"width": width}, "mode": mode, "marker": {"size": 4 + width}}
    thin = {"line": {"color": colour, "width": 1}, "opacity": 0.5, "mode": mode, "marker": {"size": 3}}
    thin["hoverinfo"] = "skip"  # the list of many seeds would cover the picture
    seeds = [_trace(curve, of, f"{name}, seed {of.seed}", arm=arm.name, **thin) for of, curve in pairs]
    whole = "mean" if len(pairs) > 1 else f"seed {run.seed}"
    return (seeds if len(pairs) > 1 else []) + [_trace(mean, run, f"{name}, {whole}", name, arm.name, **bold)]


def _curves_of(column: str, sparse: bool = False, log: bool = False, zero: bool = False) -> Draw:
    """Draws a column of all runs: smoothed unless `sparse`, `log` where it spans enough, from 0 with `zero`."""

    def draw(comparison: Comparison) -> Figure:
        data: list[dict[str, Any]] = []
        for arm in comparison.arms:
            curves = [_plain(run.series(column)) if sparse else _smoothed(run, column) for run in arm.runs]
            data += _arm(comparison, arm, curves, sparse)
        found = np.concatenate([run.series(column)[1] for run in comparison.runs])
        found = found[np.isfinite(found) & (found > 0)]
        wide = log and len(found) and found.max() > 3 * found.min()
        axis = {"type": "log", "dtick": "D2", "tickformat": "~g"} if wide else {"rangemode": "tozero"} if zero else {}
        return {"data": data, "layout": {"yaxis": axis}}

    return draw


def _loss(comparison: Comparison) -> Figure:
    figure = _curves_of("loss")(comparison)
    entropies = {run.info["unigram_entropy"] for run in comparison.runs if run.info.get("unigram_entropy")}
    figure["layout"]["shapes"] = [_level(x, GREY, f"unigram entropy {x:.2f}") for x in sorted(entropies)]
    shown, first = list(entropies), []
    for run in comparison.runs:
        steps, found = run.series("loss")[0], _smoothed(run, "loss")[1][:, SMOOTHED]
        shown += list(found[(steps >= comparison.common_step / 50) & np.isfinite(found)])
        first += list(found[:1][np.isfinite(found[:1])])
    highest = 1.05 * min(max(shown, default=np.inf), max([*first, *entropies], default=np.inf))
    whole = [found for run in comparison.runs for found in run.series("loss")[1] if np.isfinite(found)]
    if max(whole, default=0.0) > highest:  # neither the first steps nor a run that blows up may flatten the rest
        lowest = min([*whole, *entropies])
        figure["layout"]["yaxis"] = {"range": [lowest - 0.05 * (highest - lowest), highest]}
    return figure


def _difference(comparison: Comparison) -> Figure:
    steps, band = comparison.band_curve()
    base, settled = comparison.baseline, comparison.common_step / 10
    run, shown = comparison.arms[0].runs[0], [band[steps >= settled]]
    data: list[dict[str, Any]] = []
    if len(steps):
        text, edge = f"{comparison.short(base)} seed band", {"mode": "lines", "line": {"width": 0, "color": GREY}}
        data.append(_trace(_plain((steps, -band)), run, text, hoverinfo="skip", **edge))
        data.append(_trace(_plain((steps, band)), run, f"± {text}", text, fill="tonexty", fillcolor=SHADE, **edge))
    for arm in (arm for arm in comparison.others if arm.gap is not None):
        curves = dict(zip(arm.pairs, comparison.differences(arm), strict=True))
        paired = [curves.get(run.seed, (np.empty(0, int), np.empty(0))) for run in arm.runs]
        data += _arm(comparison, arm, [_plain(curve) for curve in paired])
        shown += [np.abs(found[at >= settled]) for at, found in curves.values()]
    sizes, axis = np.concatenate(shown), {}
    if (sizes := sizes[np.isfinite(sizes)]).any():  # the first tenth, where losses fall fast, may leave the picture
        axis = {"range": [-1.3 * sizes.max(), 1.3 * sizes.max()]}
    return {"data": data, "layout": {"yaxis": axis, "shapes": [_level(0, looks(comparison)[base][0])]}}


def _probe_gap(comparison: Comparison) -> Figure:
    data: list[dict[str, Any]] = []
    for arm in comparison.arms:
        pairs = [on_common_steps([run.series("probe/loss_lowbit"), run.series("probe/loss_bf16")]) for run in arm.runs]
        data += _arm(comparison, arm, [_plain((steps, both[0] - both[1])) for steps, both in pairs], sparse=True)
    return {"data": data, "layout": {"shapes": [_level(0, GREY)]}}


def _layers_of(arm: Arm, names: Iterable[str]) -> Draw:
    def draw(comparison: Comparison) -> Figure:
        layers = sorted((int(re.sub(r"\D", "", name)), name) for name in names)
        named = {int(i) for i in np.linspace(0, len(layers) - 1, min(len(layers), 6))}
        colours = sample_colorscale("Viridis", np.linspace(0, 0.92, len(layers)).tolist())
        data = []
        for i, ((layer, column), colour) in enumerate(zip(layers, colours, strict=True)):
            runs = [run for run in arm.runs if column in run.columns]
            curve = _mean([_plain(run.series(column)) for run in runs], comparison.common_step)
            style = {"mode": "lines+markers", "line": {"color": colour, "width": 1.5}, "marker": {"size": 4}}
            style["hovertemplate"] = "%{x}: %{y}"
            text = f"layer {layer}"
            data.append(_trace(curve, runs[0], text, text, arm.name, showlegend=i in named, **style))
        # below the buttons of the panel
        return {"data": data, "layout": {"showlegend": True, "hovermode": "closest", "legend": {"y": 0.88}}}

    return draw

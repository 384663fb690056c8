"""A comparison on Weights & Biases: what only a comparison knows as a run, a dashboard of all runs, and a report.

Method: the runs are there already (logger=wandb, or `wandb sync` of what ran offline) and are found by the ids that
their run.json hold. The gaps and the seed band over the steps, and the tables, go up as one more run; the dashboard
overlays the arms, mean and range over their seeds (where settings tell arms apart, each run), and the report says the
verdict above the same panels.
Limits: tested are the dashboard as it is built and what an offline run holds. A report cannot even be built without a
login, and only the service can prove that it takes both and shows them as meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unicodedata import category

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from sagetrain.compare import tables
from sagetrain.compare.estimates import on_common_steps
from sagetrain.compare.figures import OF_LAYERS, looks, tokens_at
from sagetrain.compare.runs import EVAL
from sagetrain.compare.stats import Comparison

CURVES = {  # section of the dashboard -> its panels, title by metric
    "Training": {"train/loss": "Training loss", "val/loss": "Validation loss", "train/grad_norm": "Gradient norm"},
    "Speed and memory": {
        "speed/tokens_per_s": "Tokens per second", "speed/mfu": "MFU", "speed/step_ms": "Step, ms",
        "memory/peak_gib": "Peak memory, GiB",
    },
    "Probe": {
        "probe/grad_cosine": "Gradient agreement", "probe/ds_rowsum": "dS row-sum residual",
        "probe/sigma_q_max": "Largest sigma of q", "probe/sigma_k_max": "Largest sigma of k",
        "probe/dq_error_max": "Largest error of dQ", "probe/dk_error_max": "Largest error of dK",
    },
}  # fmt: skip
SYMBOLS = ("So", "Sk", "Sm", "Sc", "Cs")  # in the name of a dashboard the package refuses them, '=' too
BY_LAYER = [f"{name}_by_layer" for name in OF_LAYERS]


def publish(comparison: Comparison, target: str) -> list[str]:
    """Sends everything to ENTITY/PROJECT. Returns the addresses of dashboard and report; none when offline.

    Raises ValueError for another target, and where Weights & Biases refuses.
    """
    entity, _, project = target.partition("/")
    if not entity or not project or "/" in project:
        raise ValueError(f"--wandb: {target!r} is not ENTITY/PROJECT")
    loggers = {run.name: (run.config.get("logger") or {}).get("_target_") for run in comparison.runs if run.config}
    if elsewhere := [name for name, logger in loggers.items() if not str(logger).endswith("WandbLogger")]:
        raise ValueError(f"--wandb: {', '.join(elsewhere)} did not log to Weights & Biases (logger=wandb)")
    with _refusals():
        own = send(comparison, entity, project)
    if own.offline:
        return []
    dashboard = workspace(comparison, entity, project, own.id)
    with _refusals():
        dashboard.save()
        page = report(comparison, entity, project, own.id)  # which needs a login, too
        page.save()
    return [dashboard.url, page.url]


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # its errors have no common kind
        raise ValueError(f"Weights & Biases refused: {error}. Try wandb login") from error


def send(comparison: Comparison, entity: str, project: str) -> Any:
    """One run with the gap of each arm, the band, and the tables. Returns it, finished."""
    recipe = ", ".join(sorted({run.recipe for run in comparison.runs}))
    curves = {f"gap/{comparison.short(arm.name)}": comparison.differences(arm) for arm in comparison.others}
    here = {"dir": Path.cwd()}  # by itself it takes where the first run of the process was
    with wandb.init(entity=entity, project=project, name=f"comparison: {recipe}", job_type="comparison", **here) as run:
        run.define_metric("*", step_metric="tokens")
        rows: dict[int, dict[str, float]] = {}
        for name, pairs in curves.items():
            steps, gaps = on_common_steps(pairs)
            for step, gap in zip(steps.tolist(), gaps.T, strict=True):
                rows.setdefault(step, {})[name] = float(gap.mean())
        for step, band in zip(*(values.tolist() for values in comparison.band_curve()), strict=True):
            rows.setdefault(step, {}).update({"band/above": band, "band/below": -band})
        tokens = tokens_at(comparison.arms[0].runs[0], sorted(rows)) or sorted(rows)
        for at, step in zip(tokens, sorted(rows), strict=True):
            run.log(rows[step] | {"tokens": at, "trainer/global_step": step})
        last = {"arms": wandb.Table(columns=list(tables.ARMS), data=tables.arm_cells(comparison))}
        if comparison.scores:
            last["scores"] = wandb.Table(columns=list(tables.SCORES), data=tables.score_cells(comparison))
        run.log(last)
    return run


def ids(comparison: Comparison, own: str) -> list[str]:
    return [str(run.info["wandb_id"]) for run in comparison.runs if run.info.get("wandb_id")] + [own]


def sections(comparison: Comparison) -> dict[str, list[Any]]:
    """The panels of dashboard and report by the title of their section."""
    colours = {arm: colour for arm, (colour, _) in looks(comparison).items()}
    gaps = {f"gap/{comparison.short(arm.name)}": colours[arm.name] for arm in comparison.others}
    drawn = gaps | dict.fromkeys(("band/above", "band/below"), "#888888")
    gap = wr.LinePlot(
        title="Difference in loss, and the seed band (grey)", x="tokens", y=[*gaps, "band/above", "band/below"],
        line_colors=drawn, line_marks=dict.fromkeys(("band/above", "band/below"), "dashed"),
    )  # fmt: skip
    found = {"Verdict": [wr.MarkdownPanel(markdown=tables.markdown(comparison)), gap]}
    overlaid = partial(_overlaid, by_arm=not comparison.named)
    found |= {title: [overlaid(*panel) for panel in panels.items()] for title, panels in CURVES.items()}
    found["Probe"].append(wr.MediaBrowser(media_keys=BY_LAYER))
    if names := dict.fromkeys(score.name for score in comparison.scores):
        found["Scores"] = [overlaid(EVAL + name, name) for name in names]
    return found


def workspace(comparison: Comparison, entity: str, project: str, own: str) -> ws.Workspace:
    """The dashboard. own: the id of the comparison's run."""
    made = [ws.Section(name=title, panels=panels, is_open=True) for title, panels in sections(comparison).items()]
    arms = ", ".join(comparison.short(arm.name) for arm in comparison.arms)
    name = "SageTrain: " + "".join(" " if category(char) in SYMBOLS else char for char in arms)
    chosen = ws.RunsetSettings(filters=expr.And(ws.Metric("ID").isin(ids(comparison, own))))
    settings = ws.WorkspaceSettings(x_axis="tokens")
    return ws.Workspace(entity, project, name=name, sections=made, settings=settings, runset_settings=chosen)


def report(comparison: Comparison, entity: str, project: str, own: str) -> wr.Report:
    """The same panels on a page of text that begins with the verdict."""
    first, *others = sections(comparison).items()
    blocks: list[Any] = [wr.MarkdownBlock(tables.markdown(comparison))]
    chosen = f"ID in {ids(comparison, own)!r}"
    for title, panels in [(first[0], first[1][1:]), *others]:
        runs = wr.Runset(entity=entity, project=project, filters=chosen)
        blocks += [wr.H2(title), wr.PanelGrid(runsets=[runs], panels=panels)]
    title = ", ".join(comparison.short(arm.name) for arm in comparison.arms)
    return wr.Report(project=project, entity=entity, title=title, blocks=blocks)


def _overlaid(metric: str, title: str, by_arm: bool) -> wr.LinePlot:
    """One line for each arm: mean over its seeds, shaded from the least to the most. Else one for each run: attention
    alone would average arms that settings tell apart."""
    grouped = {"groupby": wr.Config("attention.name"), "groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
    return wr.LinePlot(title=title, x="tokens", y=[metric], **(grouped if by_arm else {}))

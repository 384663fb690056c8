"""The statistics of a comparison: is the gap between two ways of training larger than what a change of seed does?

Method: the final loss of a run is its mean over the last 10% of the steps (at least 5 rows), of an arm the mean over
its seeds. Runs with the same seed see the same weights and batches, so the gap is the mean over paired seeds of arm -
baseline: what the seed does to both cancels. The yardstick is the baseline's seed-to-seed band, max - min over its
seeds of the final loss: an arm whose gap is inside trains as well, if the 95% interval of the gap (Student's t over the
paired seeds) does not reach above the band; else, and with one pair, which has no interval, the sentence says that it
is inside, and which gap the seeds do not rule out. A gap outside is a finding only where the interval leaves out zero;
else it may be chance, and there is no verdict.
Choice: band and interval, as training can be chaotic: then a change of rounding moves a run as far as another seed
does, and by the band alone four of ten equal arms of two seeds fail. A trailing mean of the same width draws the
difference curve, so that its right end is the number in the table. A gap that is small but grows is no parity: the
trend is what the gap gains from the middle of the run to its end, by a straight line through the paired difference of
each step's loss, and is said where its interval leaves out zero. Scores (accuracy, F1) are held against the baseline
in the same way, each run by its last one.
Limits: a band of two seeds is a rough estimate of chance, of one seed none at all; both are said beside the verdict.
Two seeds seldom tell a gap outside the band from chance: their interval is 3.6 times as wide as that of three. Whoever
adds seeds until there is a verdict takes chance for a finding more often than the 5% say. The band widens with seeds
(max - min), so with many a gap inside may be small while its interval leaves out zero: the sentence says so. Arms share
the baseline's runs, so where one of these goes wrong all gaps move, and of three arms one has an interval without zero
by chance more often than the 5%.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sagetrain.compare.arms import FREE, name_arms
from sagetrain.compare.estimates import is_inside, mean_interval, on_common_steps, paired, spread, window_mean
from sagetrain.compare.runs import ASKED, EMPTY, EVAL, Run, Series
from sagetrain.ops.schemes import SCHEMES
from sagetrain.paths import settings

TAIL, LEAST_ROWS = 10, 5  # the final loss is over the last 1/TAIL of the steps, but at least LEAST_ROWS rows
MOST_SETTINGS = 12  # differing settings that are listed one by one
IDENTITY = {
    "recipe": "recipe",
    "parameters": "model size",
    "unigram_entropy": "unigram entropy of the data",
}
CONDITIONS = {"device": "device", "versions": "versions", "git_commit": "commit"}
UNKNOWN = "its record does not tell how its attention ran"
TOKENIZER = "model.tokenizer"
DATA_SETTINGS = ("data.", TOKENIZER)  # losses on other data do not compare, whatever the arms are called
# Reported by what they did, not by what was set: the attention and the number of steps.
NOT_LISTED = ("attention.", "trainer.max_steps")


@dataclass(frozen=True, eq=False)
class Arm:
    """One way of training: final loss per seed and what follows from it (nats; None = these runs cannot tell)."""

    name: str
    runs: list[Run]
    finals: dict[int, float]
    loss: float
    tokens_per_s: float | None
    speed_spread: float = 1.0  # the fastest of its runs over the slowest
    speed_ratio: float | None = None
    handicap: str | None = None  # why its speed is no measure of its attention
    pairs: list[int] = field(default_factory=list)
    gap: float | None = None
    interval: tuple[float, float] | None = None  # the 95% interval of the gap
    inside: bool | None = None
    trend: float | None = None  # what the gap gains in the second half of the run
    trend_interval: tuple[float, float] | None = None

    @property
    def better(self) -> bool:
        """Outside the band, and lower."""
        return self.inside is False and math.isfinite(self.loss) and self.gap is not None and self.gap < 0


@dataclass(frozen=True, eq=False)
class Score:
    """One metric of an evaluation, of one arm (None = these runs cannot tell)."""

    name: str  # TASK/METRIC
    arm: str
    values: dict[int, float]  # by seed
    band: float | None  # that of the baseline
    gap: float | None = None
    interval: tuple[float, float] | None = None
    inside: bool | None = None

    @property
    def better(self) -> bool:
        """Outside the band, and higher."""
        return self.inside is False and math.isfinite(self.mean) and self.gap is not None and self.gap > 0

    @property
    def mean(self) -> float:
        return float(np.mean(list(self.values.values())))

    @property
    def spread(self) -> float | None:
        """Largest minus smallest over the seeds."""
        return spread(self.values)


class Comparison:
    """What a set of runs says about its arms, up to the last step that all of them reached.

    `named`: the settings that tell arms of one attention apart.
    `baseline=None` takes the arm `bf16`, else the first that is no scheme of ours, else the first; ValueError for an
    arm that is not there, and for two runs that no setting tells apart.
    """

    def __init__(self, runs: list[Run], baseline: str | None = None) -> None:
        self.named, numbered = name_arms(runs)
        self.runs = runs
        self.baseline = self._baseline(baseline)
        names = sorted(dict.fromkeys(run.arm for run in runs), key=lambda name: name != self.baseline)
        self.runs = sorted(runs, key=lambda run: (names.index(run.arm), run.seed))
        self.common_step = min(run.last_step for run in runs)
        self.mismatches = list(self._mismatches())
        arms = [self._arm(name) for name in names]
        base = arms[0]
        self.band = spread(base.finals)
        self.arms = [base, *(self._against(arm, base) for arm in arms[1:])]
        self.scores = list(self._scores())
        self.notes = [*numbered, *self._notes()]

    @property
    def others(self) -> list[Arm]:
        """The arms that are held against the baseline."""
        return self.arms[1:]

    @property
    def cut_short(self) -> bool:
        """Whether the runs are compared up to an earlier step than planned for some of them."""
        return not all(run.finished and run.last_step == self.common_step for run in self.runs)

    def trailing(self, run: Run) -> Series:
        """The loss as a trailing mean over a tenth of the compared steps; its last value is the run's final loss."""
        steps, values = run.series("loss", self.common_step)
        return steps, window_mean(steps, values, self.common_step / TAIL, LEAST_ROWS)

    def differences(self, arm: Arm) -> list[Series]:
        """Per paired seed: trailing loss of the arm - trailing loss of the baseline, on the steps both logged."""
        base = {run.seed: run for run in self.arms[0].runs}
        paired = [run for run in arm.runs if run.seed in arm.pairs]
        curves = [on_common_steps([self.trailing(run), self.trailing(base[run.seed])]) for run in paired]
        return [(steps, both[0] - both[1]) for steps, both in curves]

    def _trend(self, arm: Arm, base: Arm) -> tuple[float | None, tuple[float, float] | None]:
        """The trend of its gap and the 95% interval, over the paired seeds whose losses are finite and enough."""
        others, found, half = {run.seed: run for run in base.runs}, [], self.common_step / 2
        for run in (run for run in arm.runs if run.seed in others):
            steps, both = on_common_steps([x.series("loss", self.common_step) for x in (run, others[run.seed])])
            late = steps > half
            if late.sum() >= LEAST_ROWS and np.isfinite(both[:, late]).all():
                found.append(float(np.polyfit(steps[late], both[0, late] - both[1, late], 1)[0]) * half)
        return (float(np.mean(found)), mean_interval(found)) if found else (None, None)

    def band_curve(self) -> Series:
        """max - min over the baseline's seeds of the trailing loss, per step; empty where the band is unknown."""
        if self.band is None:
            return EMPTY
        steps, values = on_common_steps([self.trailing(run) for run in self.arms[0].runs])
        return steps, np.ptp(values, axis=0)

    def short(self, arm: str) -> str:
        """The name of an arm as readers see it; the arm `bf16` is called what it was where it ran in FP32."""
        runs = [run for run in self.runs if run.arm == arm]
        kind, full = runs[0].kind, any(str(run.info.get("precision", "")).startswith("32") for run in runs)
        names = {"bf16": "FP32" if full else "BF16"} | {name: scheme.label for name, scheme in SCHEMES.items()}
        return names.get(kind, kind) + arm.removeprefix(kind)

    def label(self, arm: str) -> str:
        """The name with what really ran behind it, where that is on record and is no kernel of ours."""
        runs = [run for run in self.runs if run.arm == arm and not run.is_ours]
        kind = runs[0].kind if runs else ""
        recorded = (run.info.get("attention") or run.info.get("kernel") for run in runs)  # old records have the latter
        names = (re.sub(rf"^{re.escape(kind)} \((.*)\)$", r"\1", str(name)) for name in recorded if name)
        ran = ", ".join(dict.fromkeys(names))
        return f"{self.short(arm)} ({ran})" if ran not in ("", kind) else self.short(arm)

    def sentences(self) -> list[str]:
        """The verdict in plain language, one sentence per arm that is held against the baseline."""
        if not self.others:
            (arm,) = self.arms
            what = f"{self.label(arm.name)} (final loss {arm.loss:.4f} nats)"
            return [f"No verdict on {what}: there is no other arm to hold it against."]
        prefix = "These runs are not the same experiment: more than the arm differs. " if self.mismatches else ""
        if self.cut_short:
            longest = max((run.planned for run in self.runs if run.planned), default=None)
            prefix += f"Up to step {self.common_step:,}{f' of {longest:,}' if longest else ''}: "
        said = [prefix + self._sentence(arm) for arm in self.others]
        said += [self._scores_apart(score) for score in self.scores if score.inside is False]
        if any(str(run.info.get("precision", "")).startswith("32") for run in self.runs):
            said.append("Everything but our attention ran in FP32 (trainer.precision=32-true), the arm bf16 too.")
        return said + self.without_ratio()

    def _scores_apart(self, score: Score) -> str:
        how, base = "higher" if score.better else "lower", self.label(self.baseline)
        return (
            f"{self.label(score.arm)} scores {how} than {base} on {score.name}: by {abs(score.gap):.4f}, outside the "
            f"seed-to-seed band of {score.band:.4f}."
        )

    def without_ratio(self) -> list[str]:
        """Why speeds that were measured are given no ratio."""
        measured = [arm for arm in self.others if arm.tokens_per_s and self.arms[0].tokens_per_s]
        return list(dict.fromkeys(filter(None, (self.no_ratio(arm, self.arms[0]) for arm in measured))))

    def no_ratio(self, arm: Arm, base: Arm) -> str | None:
        """Why the speeds of two arms are given no ratio; None where there is no reason."""
        for one in (base, arm):
            if one.handicap:
                return f"No speed ratio with {self.label(one.name)}: {one.handicap}."
        places = sorted({run.place for run in [*base.runs, *arm.runs]})
        if len(places) > 1:
            return f"No speed ratio between different devices: {'; '.join(places)}."
        apart, within = arm.tokens_per_s / base.tokens_per_s, max(arm.speed_spread, base.speed_spread)
        if within > max(apart, 1 / apart):
            return (
                f"No speed ratio with {self.label(arm.name)}: the speed of equal runs differs by up to "
                f"{within:.2f} times, more than that of the arms."
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """The numbers of the table as strict JSON values: a number that is not finite becomes null."""
        arms = {}
        for arm in self.arms:
            final = {"final_loss": _finite(arm.loss), "final_losses": {s: _finite(x) for s, x in arm.finals.items()}}
            against = {
                "paired_seeds": arm.pairs,
                "gap": _finite(arm.gap),
                "inside_band": arm.inside,
                "better": arm.better,
            }
            against["gap_interval"] = arm.interval and [_finite(end) for end in arm.interval]
            against |= {"gap_trend": arm.trend, "gap_trend_interval": arm.trend_interval and list(arm.trend_interval)}
            speed = {"tokens_per_s": arm.tokens_per_s, "speed_ratio": arm.speed_ratio, "handicap": arm.handicap}
            scores = {score.name: _score(score) for score in self.scores if score.arm == arm.name}
            scores = {"scores": scores} if scores else {}
            arms[arm.name] = {"label": self.label(arm.name)} | final | against | speed | scores
        runs = {r.name: {"path": str(r.path), "status": r.info["status"], "last_step": r.last_step} for r in self.runs}
        said = {"verdict": self.sentences(), "mismatches": self.mismatches, "notes": self.notes}
        shared = {"baseline": self.baseline, "common_step": self.common_step, "band": self.band}
        return shared | {"arms": arms, "runs": runs} | said

    def _baseline(self, asked: str | None) -> str:
        """The name of the arm that the others are held against."""
        names = list(dict.fromkeys(run.arm for run in self.runs))
        if asked is None:
            first = [run.arm for run in self.runs if run.kind == "bf16"]
            return [*first, *(run.arm for run in self.runs if not run.is_ours), *names][0]
        found = [name for name in names if asked in (name, self.label(name))]
        found = found or list(dict.fromkeys(run.arm for run in self.runs if run.kind == asked))
        if len(found) != 1:
            what = "several runs" if found else "no run"
            raise ValueError(f"{what} of the baseline arm {asked!r}; these runs have the arms {', '.join(names)}")
        return found[0]

    def _arm(self, name: str) -> Arm:
        runs = [run for run in self.runs if run.arm == name]
        finals = {run.seed: float(self.trailing(run)[1][-1]) for run in runs}
        series = [run.series("tokens_per_s", self.common_step)[1] for run in runs]
        series = [speeds[np.isfinite(speeds)] for speeds in series if np.isfinite(speeds).any()]
        speed = float(np.median(np.concatenate(series))) if series else None
        medians = [float(np.median(speeds)) for speeds in series]
        spread = max(medians) / min(medians) if medians else 1.0
        told = (run.info.get("handicap", None if run.is_ours else UNKNOWN) for run in runs)
        handicap = next((str(reason) for reason in told if reason), None)
        return Arm(name, runs, finals, float(np.mean(list(finals.values()))), speed, spread, handicap=handicap)

    def _against(self, arm: Arm, base: Arm) -> Arm:
        (pairs, gap, interval), inside = paired(arm.finals, base.finals), None
        if not math.isfinite(arm.loss):
            inside = False if math.isfinite(base.loss) else None
        elif gap is not None and self.band is not None:
            inside = is_inside(gap, self.band, interval)
        comparable = arm.tokens_per_s and base.tokens_per_s and not self.no_ratio(arm, base)
        ratio = arm.tokens_per_s / base.tokens_per_s if comparable else None
        trend, reach = self._trend(arm, base)
        found = {"gap": gap, "interval": interval, "inside": inside, "trend": trend, "trend_interval": reach}
        return replace(arm, pairs=pairs, speed_ratio=ratio, **found)

    def _scores(self) -> Iterator[Score]:
        for column in dict.fromkeys(name for run in self.runs for name in run.columns if name.startswith(EVAL)):
            found: dict[str, dict[int, float]] = {arm.name: {} for arm in self.arms}
            for run in self.runs:
                if len(values := run.series(column, self.common_step)[1]):
                    found[run.arm][run.seed] = float(values[-1])
            name, base = column.removeprefix(EVAL), found[self.baseline]
            band = spread(base)
            for arm, values in found.items():
                _, gap, interval = paired(values, base) if arm != self.baseline else ([], None, None)
                inside = None if gap is None or band is None else is_inside(gap, band, interval)
                if values:
                    yield Score(name, arm, values, band, gap, interval, inside)

    def as_well(self, arm: Arm) -> bool:
        """Whether it trains as well as the baseline: inside the band, with an interval that does not reach above."""
        return bool(arm.inside and arm.interval and arm.interval[1] <= self.band)

    def _sentence(self, arm: Arm) -> str:
        name, base, short = self.label(arm.name), self.label(self.baseline), self.short(self.baseline)
        once = " (one run of each)" if len(arm.runs) == len(self.arms[0].runs) == 1 else ""
        speed = f" It runs at {arm.speed_ratio:.2f} times the speed of {base}{once}." if arm.speed_ratio else ""
        for one in (arm, self.arms[0]):
            if not math.isfinite(one.loss):
                seeds = ", ".join(str(seed) for seed, loss in one.finals.items() if not math.isfinite(loss))
                return f"{self.label(one.name)} diverged: its final loss is not a finite number (seed {seeds})."
        if arm.gap is None:
            return f"{name} and {base} have no seed in common, so no gap can be given.{speed}"
        seeds = f"{len(arm.pairs)} paired seed{'s' if len(arm.pairs) > 1 else ''}"
        where = f"final loss {abs(arm.gap):.4f} nats {'above' if arm.gap > 0 else 'below'}"
        if self.band is None:
            why = f"one {short} seed gives no seed-to-seed band; run at least three (compare.seeds=3)"
            return f"{name} has a {where} {base} ({seeds}); whether that is more than chance is unknown: {why}.{speed}"
        if arm.interval:
            seeds += f", 95% interval {arm.interval[0]:+.4f} to {arm.interval[1]:+.4f}"
        sure = arm.interval and not arm.interval[0] <= 0 <= arm.interval[1]
        band = f"{'inside' if arm.inside else 'outside'} the {short} seed-to-seed band of {self.band:.4f}"
        if arm.inside is None:
            why = "their interval holds zero" if arm.interval else "one pair has no interval"
            seeds_more = 2 * max(len(one.runs) for one in (arm, self.arms[0]))
            more = f"these seeds cannot tell it from chance: {why}; run more (compare.seeds={seeds_more})"
            return f"No verdict on {name}: {where} {base} ({seeds}), {band}, but {more}.{self._trend_said(arm)}{speed}"
        if arm.inside and not self.as_well(arm):
            left = "one pair rules out nothing"
            if arm.interval:
                zero = "the interval leaves out zero, and " if sure else ""
                left = f"{zero}these seeds do not rule out a gap of {arm.interval[1]:+.4f}"
            return f"{name} ends {band}: {where} {base} ({seeds}); {left}.{self._trend_said(arm)}{speed}"
        small = "; the gap is small, but its 95% interval leaves out zero" if arm.inside and sure and arm.gap else ""
        what = "trains as well as" if arm.inside else "ends lower than" if arm.better else "does not train as well as"
        return f"{name} {what} {base}: {where} ({seeds}), {band}{small}.{self._trend_said(arm)}{speed}"

    @staticmethod
    def _trend_said(arm: Arm) -> str:
        if not arm.trend_interval or arm.trend_interval[0] <= 0 <= arm.trend_interval[1]:
            return ""
        low, high = arm.trend_interval
        return f" In the second half of the run the gap changed by {arm.trend:+.4f} ({low:+.4f} to {high:+.4f})."

    def _mismatches(self) -> Iterator[str]:
        """What differs between the runs although it has to be the same for a like-for-like comparison."""
        for key, what in IDENTITY.items():
            recorded = {run.name: run.info[key] for run in self.runs if run.info.get(key) is not None}
            yield from self._difference(what, recorded)
        yield from self._difference("number of steps", {run.name: run.planned for run in self.runs if run.planned})
        for seed in sorted({run.seed for run in self.runs}):
            same = [run for run in self.runs if run.seed == seed]
            steps, tokens = on_common_steps([run.series("tokens", self.common_step) for run in same])
            if len(steps):
                seen = {run.name: int(count) for run, count in zip(same, tokens[:, -1], strict=True)}
                yield from self._difference(f"number of tokens up to step {steps[-1]:,}", seen)
        for task in dict.fromkeys(task for run in self.runs for task in run.asked):
            how = {run.name: run.how_asked(task, self.common_step) for run in self.runs}
            for key, what in ASKED.items():
                told = {name: asked[key] for name, asked in how.items() if asked.get(key) is not None}
                if key != "digest" or len({asked.get("n") for asked in how.values() if asked}) == 1:  # said already
                    yield from self._difference(f"{what} of {task}", told)
        given = {run.name: settings(run.config, FREE) for run in self.runs if run.config}
        told = {name for name in self.named if not name.startswith(DATA_SETTINGS)}  # by the names of the arms
        keys = {key for flat in given.values() for key in flat if not key.startswith(NOT_LISTED)} - told
        keys = sorted(keys, key=lambda key: (key != TOKENIZER, key))  # first, so that it is never left out
        each = ({name: flat.get(key) for name, flat in given.items()} for key in keys)
        found = [text for key, values in zip(keys, each, strict=True) for text in self._difference(key, values)]
        if found and found[0].startswith(f"{TOKENIZER} "):
            found[0] += ". Losses are per token, so their gap means nothing unless these cut text alike"
        yield from found[:MOST_SETTINGS]
        if len(found) > MOST_SETTINGS:
            yield f"{len(found) - MOST_SETTINGS} more settings differ; see config.yaml of each run"

    def _notes(self) -> Iterator[str]:
        for run in self.runs:
            if not run.finished:
                why = f" ({run.info['error']})" if run.info.get("error") else ""
                yield f"{run.name} is unfinished: {run.info['status']}, step {run.progress}{why}"
            steps, values = run.series("loss")
            if not np.isfinite(values).all():
                yield f"{run.name}: the loss is not finite at step {steps[~np.isfinite(values)][0]:,}"
            yield from (f"{run.name}: {note}" for note in run.notes)
        if any(run.last_step > self.common_step for run in self.runs):
            yield f"Everything is compared up to step {self.common_step:,}, the last that all runs reached."
        for name in dict.fromkeys(score.name for score in self.scores):
            steps = {run.name: run.series(EVAL + name, self.common_step)[0][-1:] for run in self.runs}
            yield from self._difference(f"step of {name}", {run: at[0] for run, at in steps.items() if len(at)})
        yield from self._without_scores()
        for key, what in CONDITIONS.items():
            yield from self._difference(what, {run.name: run.info.get(key) for run in self.runs})
        if self.band is not None and len(self.arms[0].runs) == 2:
            yield "The band comes from two seeds, which is a rough estimate of chance; more seeds make it firmer."
        if len(self.others) > 1:
            base = self.short(self.baseline)
            yield f"All gaps are to the same runs of {base}: where one of these goes wrong, all move."

    def _without_scores(self) -> Iterator[str]:
        """Which runs were not yet evaluated where all are compared, of tasks that some run was evaluated on."""
        scored = [column for run in self.runs for column in run.columns if column.startswith(EVAL)]
        for task, column in {column.split("/")[1]: column for column in scored}.items():
            first = {run.name: next(iter(run.series(column)[0]), None) for run in self.runs}
            late = {name: step for name, step in first.items() if step is None or step > self.common_step}
            said = [name + (f" (its first is of step {step:,})" if step else "") for name, step in late.items()]
            if said:
                yield f"No scores of {task} up to step {self.common_step:,}: {', '.join(said)}"

    @staticmethod
    def _difference(what: str, values: dict[str, Any]) -> Iterator[str]:
        groups: dict[str, list[str]] = {}
        for name, value in values.items():
            groups.setdefault("not set" if value is None else str(value), []).append(name)
        if len(groups) > 1:
            yield f"{what} differs: " + "; ".join(f"{value} ({', '.join(names)})" for value, names in groups.items())


def _score(score: Score) -> dict[str, Any]:
    values = {seed: _finite(value) for seed, value in score.values.items()}
    against = {"gap": _finite(score.gap), "gap_interval": score.interval and [_finite(end) for end in score.interval]}
    return (
        {"mean": _finite(score.mean), "values": values, "band": score.band}
        | against
        | {"inside_band": score.inside, "better": score.better}
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None

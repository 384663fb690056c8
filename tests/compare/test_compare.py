"""sagetrain.compare: statistics on hand-computed numbers, the report's content, the command line, and bad input."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import yaml
from plotly.offline import get_plotlyjs
from rich.console import Console

from sagetrain.compare import Comparison, Run, find_runs, markdown, report, terminal
from sagetrain.compare.__main__ import main
from sagetrain.compare.estimates import T975, is_inside, mean_interval, window_mean
from sagetrain.compare.figures import SMOOTHING, looks
from sagetrain.compare.tables import arm_cells, score_cells
from sagetrain.evaluation.scores import keep

STEPS = 20  # so that a tenth is 2 rows and the rule "at least 5 rows" decides


def write_run(parent: Path, arm: str, seed: int, losses: list, *, columns: dict | None = None, **changes) -> Path:
    """A run directory as training writes it; `columns` maps further columns to values (None: not measured).

    `changes` go into run.json, but for `config` (into config.yaml) and `tokens` (per step, into metrics.csv).
    """
    path = parent / f"{arm}-seed{seed}".replace("/", "_")
    path.mkdir(parents=True)
    tokens = changes.pop("tokens", 64)
    config = {"recipe": "tiny", "seed": seed, "out": str(path), "attention": {"name": arm}, "data": {"seq_len": 64}}
    (path / "config.yaml").write_text(yaml.safe_dump(config | changes.pop("config", {})), "utf-8")
    info = {"name": path.name, "recipe": "tiny", "arm": arm, "seed": seed, "status": "finished", "steps": len(losses)}
    info |= {"max_steps": len(losses), "tokens_per_step": 64, "wandb_id": f"id{seed}{arm}", "parameters": 1234}
    info |= {"kernel": "sdpa", "device": "cpu", "versions": {"torch": "2.13.0"}, "handicap": None}
    info["attention"] = "SDPA flash"
    info |= {"command": f"python -m sagetrain recipe=tiny attention={arm} seed={seed}"}
    (path / "run.json").write_text(json.dumps(info | changes), "utf-8")
    columns = {"tokens_per_s": [100.0 * (1 + (arm != "bf16"))] * len(losses)} | (columns or {})
    with open(path / "metrics.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "tokens", "loss", *columns])
        for index, loss in enumerate(losses):
            extra = ["" if values[index] is None else values[index] for values in columns.values()]
            writer.writerow([index + 1, tokens * (index + 1), loss, *extra])
    return path


def falling(end: float, steps: int = STEPS) -> list[float]:
    """A loss that falls and whose last five values lie evenly around `end`, which is their mean."""
    return [end + 1 - index / steps for index in range(steps - 5)] + [end + d / 100 for d in (-2, -1, 0, 1, 2)]


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """Two arms, two seeds: finals 2.0 and 2.1 for BF16 (band 0.1), 2.03 and 2.11 for INT8 (gap (0.03 + 0.01) / 2)."""
    for arm, ends in (("bf16", (2.0, 2.1)), ("sage_int8", (2.03, 2.11))):
        for seed, end in enumerate(ends):
            write_run(tmp_path / "runs", arm, seed, falling(end), unigram_entropy=3.125)
    return tmp_path / "runs"


def printed(comparison: Comparison) -> str:
    """The table as a terminal shows it."""
    console = Console(width=100, file=io.StringIO())
    console.print(terminal(comparison))
    return console.file.getvalue()


def one_line_error(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """Runs the command, which has to fail with status 2 and one line that holds no traceback."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("sagetrain: error: ")
    return captured.err


class Page(HTMLParser):
    """Collects the text of a page and every attribute, and checks that tags are closed in order."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.attributes, self.tags, self.open = "", [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_statistics_by_hand(parent: Path):
    comparison = Comparison(find_runs([parent]))
    base, int8 = comparison.arms
    assert (base.name, int8.name, comparison.baseline, comparison.common_step) == ("bf16", "sage_int8", "bf16", STEPS)
    assert base.finals == pytest.approx({0: 2.0, 1: 2.1}) and base.loss == pytest.approx(2.05)
    assert comparison.band == pytest.approx(0.1)
    assert int8.gap == pytest.approx(0.02) and int8.pairs == [0, 1] and int8.inside is True
    assert int8.interval == pytest.approx((0.02 - 0.12706, 0.02 + 0.12706), abs=1e-5)
    assert (base.tokens_per_s, int8.tokens_per_s, int8.speed_ratio) == (100.0, 200.0, 2.0)
    (sentence,) = comparison.sentences()
    assert sentence.startswith(
        "INT8 ends inside the BF16 seed-to-seed band of 0.1000: final loss 0.0200 nats above BF16 (SDPA flash) "
        "(2 paired seeds, 95% interval -0.1071 to +0.1471); these seeds do not rule out a gap of +0.1471. "
    )
    assert "2.00 times the speed" in sentence and comparison.mismatches == []


@pytest.mark.parametrize(
    ("gap", "by_seed"),
    [(0.02, 0.004), (-0.02, 0.004), (-0.04, 0.04)],  # 95%: ± .01, .01 and .099, below the band of .1
)
def test_a_gap_that_seeds_rule_out_is_not_named(gap: float, by_seed: float, tmp_path: Path):
    for seed, base in enumerate((2.0, 2.05, 2.1)):
        write_run(tmp_path, "bf16", seed, falling(base))
        write_run(tmp_path, "sage_int8", seed, falling(base + gap + by_seed * (seed - 1)))
    (sentence,) = report([tmp_path], tmp_path / "out").sentences()
    assert "INT8 trains as well as BF16" in sentence and "rule out" not in sentence


def test_one_pair_inside_the_band_rules_out_nothing(tmp_path: Path):
    for seed in (0, 1):
        write_run(tmp_path, "bf16", seed, falling(2.0 + seed / 10))
    write_run(tmp_path, "sage_int8", 0, falling(2.09))
    (sentence,) = report([tmp_path], tmp_path / "out").sentences()
    assert (
        "INT8 ends inside" in sentence and "0.0900 nats above" in sentence and "one pair rules out nothing" in sentence
    )
    assert 'verdict open"' in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_an_interval_that_leaves_out_zero_and_reaches_outside(tmp_path: Path):
    """Above by .09 give or take .05 (95%), with a band of .1."""
    for seed, base in enumerate((2.0, 2.05, 2.1)):
        write_run(tmp_path, "bf16", seed, falling(base))
        write_run(tmp_path, "sage_int8", seed, falling(base + 0.09 + 0.02 * (seed - 1)))
    (sentence,) = report([tmp_path], tmp_path / "out").sentences()
    assert sentence.startswith("INT8 ends inside the BF16") and "small" not in sentence
    assert "; the interval leaves out zero, and these seeds do not rule out a gap of +0.1397." in sentence
    assert 'verdict open"' in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_baseline_that_ran_in_fp32_is_not_called_bf16(tmp_path: Path):
    for arm, end in (("bf16", 2.0), ("sage_int8", 2.01)):
        write_run(tmp_path, arm, 0, falling(end), precision="32-true")
    comparison = report([tmp_path / "bf16-seed0", tmp_path / "sage_int8-seed0"], tmp_path / "out")
    verdict, note = comparison.sentences()
    assert "FP32 (SDPA flash)" in verdict and "BF16" not in verdict and "trainer.precision=32-true" in note
    assert "FP32 (SDPA flash)" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_final_loss_is_the_last_tenth_once_that_is_five_rows(tmp_path: Path):
    losses = [9.0] * 90 + [float(index) for index in range(10)]
    comparison = Comparison([Run(write_run(tmp_path, "bf16", 0, losses))])
    assert comparison.arms[0].loss == pytest.approx(4.5)


def test_difference_curve_ends_at_the_gap_and_band_curve_at_the_band(parent: Path):
    comparison = Comparison(find_runs([parent]))
    ends = [values[-1] for _, values in comparison.differences(comparison.others[0])]
    assert np.mean(ends) == pytest.approx(comparison.others[0].gap)
    assert comparison.band_curve()[1][-1] == pytest.approx(comparison.band)


def test_window_mean_against_a_plain_loop():
    steps = np.array([1, 2, 5, 6, 7, 20])
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    for width, rows in ((0, 1), (3, 1), (3, 2), (100, 1), (0, 9)):
        expected = []
        for index, step in enumerate(steps):
            inside = [v for s, v in zip(steps, values, strict=True) if step - width < s <= step]
            expected.append(np.mean(inside if len(inside) >= rows else values[max(0, index + 1 - rows) : index + 1]))
        # the empty window of width 0 keeps its own row
        assert window_mean(steps, values, width, rows) == pytest.approx(expected)


def test_outside_the_band_both_ways(tmp_path: Path):
    for seed in (0, 1):
        write_run(tmp_path, "bf16", seed, falling(2.0 + 0.01 * seed))
        write_run(tmp_path, "worse", seed, falling(2.5))
        write_run(tmp_path, "better", seed, falling(1.5))
    comparison = Comparison(find_runs([tmp_path]))
    assert [arm.name for arm in comparison.arms] == ["bf16", "better", "worse"]
    assert [arm.inside for arm in comparison.others] == [False, False]
    assert [cells[5] for cells in arm_cells(comparison)] == ["-", "better", "no"]
    assert [arm.better for arm in comparison.others] == [True, False]
    assert "All gaps are to the same runs of BF16: where one of these goes wrong, all move." in comparison.notes
    tones = {}
    for only in ("better", "worse"):
        report([path for path in tmp_path.iterdir() if path.name.startswith(("bf16", only))], tmp_path / f"out-{only}")
        tones[only] = re.search('verdict (.*)"', (tmp_path / f"out-{only}" / "report.html").read_text("utf-8"))[1]
    assert tones == {"better": "good", "worse": "bad"}
    assert [arm.gap for arm in comparison.others] == pytest.approx([-0.505, 0.495])
    # 12.706 * std(0.5, 0.49) / sqrt(2) = 0.0635
    assert comparison.others[1].interval == pytest.approx((0.495 - 0.06353, 0.495 + 0.06353), abs=1e-5)
    better, worse = comparison.sentences()
    assert better.startswith("better (SDPA flash) ends lower than BF16 (SDPA flash)")
    assert worse.startswith("worse (SDPA flash) does not train as well as BF16 (SDPA flash)")
    assert "0.4950 nats above (2 paired seeds, 95% interval +0.4315 to +0.5585), outside the BF16" in worse


def test_inside_the_band_with_an_interval_that_leaves_out_zero(tmp_path: Path):
    for seed, base in enumerate((2.0, 2.1, 2.2)):
        write_run(tmp_path, "bf16", seed, falling(base))
        write_run(tmp_path, "sage_int8", seed, falling(base + 0.05 + 0.001 * seed))
    (sentence,) = report([tmp_path], tmp_path / "out").sentences()
    assert "INT8 trains as well as BF16" in sentence
    assert "0.2000; the gap is small, but its 95% interval leaves out zero." in sentence


@pytest.mark.parametrize("offsets", [(0, 0, 0), (9, -1, 0)])  # the second: outside the band, or chance, so no verdict
@pytest.mark.parametrize("gains", [(0.2, 0.22, 0.18), (0.2, -0.2, 0.1)])
def test_a_gap_that_grows_is_said(tmp_path: Path, gains: tuple[float, ...], offsets: tuple[float, ...]):
    """By 0.2 per 100 steps from the first on, of 100; or by as much as chance."""
    noise = np.random.default_rng(0).normal(0, 0.3, 100)
    for seed, gain in enumerate(gains):
        write_run(tmp_path, "bf16", seed, list(3 + noise + seed))
        write_run(tmp_path, "sage_int8", seed, list(3 + noise + seed + offsets[seed] + gain * np.arange(100) / 100))
    comparison = Comparison(find_runs([tmp_path]))
    (arm,), halves = comparison.others, [gain / 2 for gain in gains]
    assert arm.trend == pytest.approx(np.mean(halves)) and arm.trend_interval == pytest.approx(mean_interval(halves))
    told = comparison.as_dict()["arms"]["sage_int8"]
    assert told["gap_trend"] == arm.trend and tuple(told["gap_trend_interval"]) == arm.trend_interval
    said = "In the second half of the run the gap changed by +0.1000 (+0.0752 to +0.1248)."
    assert (said in " ".join(comparison.sentences())) == (gains[1] > 0)
    assert ("No verdict" in " ".join(comparison.sentences())) == any(offsets)


def test_outside_the_band_but_maybe_by_chance(tmp_path: Path):
    """Two equal arms, measured: training is chaotic, and another rounding would have moved FP32 as far."""
    for seed, (base, int8) in enumerate([(2.1291, 2.1621), (2.1442, 2.1566)]):
        write_run(tmp_path, "bf16", seed, falling(base))
        write_run(tmp_path, "sage_int8", seed, falling(int8))
    comparison = report([tmp_path], tmp_path / "out")
    (sentence,) = comparison.sentences()
    assert sentence == (
        "No verdict on INT8: final loss 0.0227 nats above BF16 (SDPA flash) (2 paired seeds, 95% interval -0.1082 to "
        "+0.1536), outside the BF16 seed-to-seed band of 0.0151, but these seeds cannot tell it from chance: their "
        "interval holds zero; run more (compare.seeds=4). It runs at 2.00 times the speed of BF16 (SDPA flash)."
    )
    assert comparison.others[0].inside is None and arm_cells(comparison)[1][5] == "unknown"
    int8 = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))["arms"]["sage_int8"]
    assert int8["inside_band"] is None and int8["gap_interval"] == pytest.approx([-0.1082, 0.1536], abs=1e-4)
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert 'class="card verdict open"' in page and '<td class="unknown">unknown' in page and sentence in page


def test_one_pair_outside_the_band_is_no_finding(tmp_path: Path):
    for seed in (0, 1):
        write_run(tmp_path, "bf16", seed, falling(2.0 + seed / 100))
    write_run(tmp_path, "sage_int8", 0, falling(2.5))
    comparison = Comparison(find_runs([tmp_path]))
    assert comparison.others[0].inside is None and comparison.others[0].interval is None
    (sentence,) = comparison.sentences()
    assert "(1 paired seed), outside" in sentence and "one pair has no interval; run more" in sentence


def test_quantiles_against_the_density_of_student_t():
    for degrees, quantile in enumerate(T975, 1):
        t = np.linspace(-quantile, quantile, 20001)
        density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2) / math.sqrt(degrees * math.pi)
        density *= math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2)
        area = ((density[1:] + density[:-1]) / 2 * np.diff(t)).sum()
        assert area == pytest.approx(0.95, abs=5e-5)


@pytest.mark.parametrize("seeds", [2, 3, 4, 12])
def test_equal_arms_are_seldom_told_apart_and_unequal_ones_are(seeds: int):
    """Nothing but chance between the arms, as if a seed had no effect: where the band alone is wrong most often."""
    base, arm = np.random.default_rng(0).standard_normal((2, 4000, seeds))

    def apart(gaps: np.ndarray, bands: np.ndarray) -> float:
        """How many in one of the cases are called worse or better."""
        judged = [is_inside(g.mean(), band, mean_interval(list(g))) for g, band in zip(gaps, bands, strict=True)]
        return sum(inside is False for inside in judged) / len(judged)

    bands = np.ptp(base, axis=1)
    assert apart(arm - base, bands) <= 0.05
    assert 0.03 < apart(arm - base, 0 * bands) < 0.06  # of the interval alone: 5%, a little less for many seeds
    assert apart(arm - base + 40, bands) > 0.9


def test_report_is_self_contained_and_complete(parent: Path, tmp_path: Path):
    comparison = report([parent], tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    own = html.replace(get_plotlyjs(), "")
    page = Page(own)
    assert "://" not in own and "@import" not in own and "url(" not in own
    assert not {"link", "iframe", "img", "object"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name in ("href", "src") or name.startswith("on")]
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    for run in comparison.runs:
        assert run.name in page.text and run.info["command"] in page.text
    for text in ("Training loss", "Difference in loss", "Speed", "± the BF16 seed band", "torch 2.13.0"):
        assert text in page.text
    assert comparison.sentences()[0] in page.text
    assert "Validation loss" not in page.text and "Probe" not in page.text and "Gradient norm" not in page.text


def test_only_the_scripts_of_the_report_may_run(parent: Path, tmp_path: Path):
    report([parent], tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="(.*?)">', html)
    policy = dict(rule.strip().split(" ", 1) for rule in unescape(policy).split(";"))
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert policy["default-src"] == "'none'" and len(scripts) == 2
    assert policy["script-src"] == " ".join(f"'sha256-{digest}'" for digest in digests)


def curves(folder: Path) -> dict[str, go.Figure]:
    """The figures of a report by title, as plotly reads them: it refuses what plotly.js would not draw."""
    html = (folder / "report.html").read_text("utf-8")
    (text,) = re.findall(r'<script type="application/json" id="curves">(.*?)</script>', html, re.DOTALL)
    titles = re.findall(r'<figure class="card"><h3>(.*?)</h3>', html)
    return dict(zip(titles, map(go.Figure, json.loads(text)["panels"]), strict=True))


def test_figures_hold_the_numbers(parent: Path, tmp_path: Path):
    comparison = report([parent], tmp_path)
    figures = curves(tmp_path)
    assert list(figures) == ["Training loss", "Difference in loss", "Speed"]
    loss, difference, speed = figures.values()
    assert [trace.name for trace in loss.data if trace.meta["arm"] == "bf16"] == [
        "BF16, seed 0", "BF16, seed 1", "BF16, mean"]  # fmt: skip
    mean = loss.data[2].meta
    assert mean["x"] == [list(range(1, STEPS + 1)), [64 * step for step in range(1, STEPS + 1)]]
    assert mean["y"][0] == pytest.approx([np.mean([falling(2.0)[i], falling(2.1)[i]]) for i in range(STEPS)], abs=1e-4)
    assert len(mean["y"]) == len(SMOOTHING)
    smooth = window_mean(np.arange(1, STEPS + 1), np.array(mean["y"][0]), 0.1 * STEPS)
    assert mean["y"][2] == pytest.approx(smooth.tolist(), abs=1e-4)
    (entropy,) = loss.layout.shapes
    assert entropy.y0 == 3.125 and entropy.label.text == "unigram entropy 3.12"
    low, high, *arms = difference.data
    assert high.fill == "tonexty" and low.meta["y"][0][-1] == pytest.approx(-comparison.band)
    assert high.meta["y"][0][-1] == pytest.approx(comparison.band) and high.name == "± BF16 seed band"
    assert arms[-1].meta["y"][0][-1] == pytest.approx(comparison.others[0].gap) and difference.layout.shapes[0].y0 == 0
    widths = {trace.meta["arm"]: trace.line.width for trace in speed.data if trace.meta["told"]}
    assert widths["bf16"] > widths["sage_int8"] and speed.layout.yaxis.rangemode == "tozero"


def test_every_arm_looks_different(tmp_path: Path):
    for name in ("bf16", *map("arm{:02}".format, range(29))):
        write_run(tmp_path, name, 0, falling(2.0))
    comparison = Comparison(find_runs([tmp_path]))
    assert len(set(looks(comparison).values())) == 30


def test_values_of_a_panel_stand_in_a_table(parent: Path, tmp_path: Path):
    report([parent], tmp_path)
    page = (tmp_path / "report.html").read_text("utf-8")
    table = page[page.index("<summary>Values") : page.index("</details>")]
    assert re.findall("<th>(.*?)</th>", table) == ["step", "BF16", "INT8"]
    assert re.findall("<td>(.*?)</td>", table)[-3:] == ["20", "2.07", "2.09"]
    assert table.count("<tr>") == 11


@pytest.mark.parametrize("column", ["probe/loss_lowbit", "probe/loss_int8"])
def test_panels_of_sparse_columns(tmp_path: Path, column: str):
    sparse = [None if index % 5 else 1.0 + index for index in range(STEPS)]
    probe = {
        name: sparse for name in ("probe/loss_bf16", "probe/grad_cosine", "probe/ds_rowsum", "probe/sigma_q_layer0")
    }
    probe |= {column: [None if value is None else value + 0.5 for value in sparse], "val_loss": sparse}
    probe |= {"probe/sigma_q_layer10": sparse, "grad_norm": [0.1 * (index + 1) for index in range(STEPS)]}
    write_run(tmp_path, "sage_int8", 0, falling(2.0), columns=probe)
    comparison = report([tmp_path], tmp_path / "out")
    steps, values = comparison.runs[0].series("val_loss")
    assert steps.tolist() == [1, 6, 11, 16] and values.tolist() == [1.0, 6.0, 11.0, 16.0]
    text = Page((tmp_path / "out" / "report.html").read_text("utf-8")).text
    for title in ("Validation loss", "Probe: loss gap", "Probe: gradient agreement", "Probe: dS row-sum residual"):
        assert title in text
    assert "Probe: sigma of q, INT8" in text and "layer 10" in text and "Probe: sigma of k" not in text
    figures = curves(tmp_path / "out")
    assert figures["Gradient norm"].layout.yaxis.type == "log" and figures["Training loss"].layout.yaxis.type is None
    (gap,) = figures["Probe: loss gap"].data
    assert gap.meta["x"][0] == [1, 6, 11, 16] and gap.meta["y"] == [[0.5] * 4] and gap.mode == "lines+markers"
    assert [trace.name for trace in figures["Probe: sigma of q, INT8"].data] == ["layer 0", "layer 10"]


def test_metrics_csv_and_json_hold_everything(parent: Path, tmp_path: Path):
    write_run(parent, "sage_int8", 2, falling(2.0), columns={"val_loss": [None] * (STEPS - 1) + [2.5]})
    comparison = report([parent], tmp_path)
    with open(tmp_path / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:4] == ["recipe", "arm", "seed", "step"] and len(rows) == 5 * STEPS
    last = rows[-1]
    assert (last["recipe"], last["arm"], last["seed"], last["step"]) == ("tiny", "sage_int8", "2", str(STEPS))
    assert last["val_loss"] == "2.5" and rows[0]["val_loss"] == ""
    numbers = json.loads((tmp_path / "comparison.json").read_text("utf-8"))
    assert numbers["band"] == comparison.band and numbers["arms"]["sage_int8"]["gap"] == comparison.others[0].gap
    assert numbers["arms"]["sage_int8"]["paired_seeds"] == [0, 1] and len(numbers["runs"]) == 5
    assert numbers["arms"]["bf16"]["final_losses"] == pytest.approx({"0": 2.0, "1": 2.1})


def test_table_for_the_terminal(parent: Path):
    text = printed(Comparison(find_runs([parent])))
    for cell in ("BF16", "INT8", "2.0500", "2.0700", "+0.0200", "0.1000", "yes", "200", "2.00x"):
        assert cell in text


def test_one_seed_has_no_band(tmp_path: Path):
    write_run(tmp_path, "bf16", 3, falling(2.0))
    write_run(tmp_path, "sage_int8", 3, falling(2.01))
    comparison = report([tmp_path], tmp_path / "out")
    assert comparison.band is None and comparison.others[0].inside is None
    assert comparison.others[0].gap == pytest.approx(0.01)
    assert "unknown: one BF16 seed gives no seed-to-seed band" in comparison.sentences()[0]
    assert "its band is unknown" in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_picture_of_a_run_that_blows_up_or_never_had_a_loss(tmp_path: Path):
    write_run(tmp_path, "bf16", 0, falling(2.0))
    write_run(tmp_path, "sage_int8", 0, [*falling(2.0)[:-2], 1e9, math.nan])
    write_run(tmp_path, "other", 0, [math.nan, math.inf])
    comparison = report([tmp_path], tmp_path / "out")
    assert comparison.common_step == 2 and [arm.inside for arm in comparison.others] == [False, None]
    Page((tmp_path / "out" / "report.html").read_text("utf-8"))
    loss = curves(tmp_path / "out")["Training loss"]
    holes = {trace.meta["arm"]: [y is None for y in trace.meta["y"][0]] for trace in loss.data}
    assert holes["other"] == [True, True] and holes["sage_int8"][-2:] == [False, True]
    assert loss.layout.yaxis.range[1] < 10


def test_seeds_that_do_not_pair(tmp_path: Path):
    for seed, arm in enumerate(("bf16", "bf16", "sage_int8")):
        write_run(tmp_path, arm, seed, falling(2.0))
    comparison = Comparison(find_runs([tmp_path]))
    assert comparison.others[0].gap is None and comparison.others[0].inside is None
    assert "no seed in common" in comparison.sentences()[0]


@pytest.mark.parametrize("status", ["failed", "stopped", "running"])
def test_unfinished_run_is_compared_up_to_the_common_step(parent: Path, status: str):
    write_run(parent, "sage_int8", 2, falling(2.0)[:12], status=status, max_steps=STEPS, error="OSError: disk full")
    with open(parent / "sage_int8-seed2" / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("13,832,2.")  # killed while it wrote
    comparison = report([parent], parent)
    assert comparison.common_step == 12 and comparison.cut_short
    assert comparison.arms[0].finals[0] == pytest.approx(np.mean(falling(2.0)[7:12]))
    assert comparison.sentences()[0].startswith("Up to step 12 of 20: ")
    notes = " ".join(comparison.notes)
    assert (
        f"sage_int8-seed2 is unfinished: {status}, step 12 of 20 (OSError: disk full)" in notes
        and "half-written last line" in notes
    )
    html = (parent / "report.html").read_text("utf-8")
    assert "Dotted" in html and "disk full" in html


def test_resumed_run_counts_a_step_once(tmp_path: Path):
    path = write_run(tmp_path, "bf16", 0, [5.0, 4.0, 3.0])
    with open(path / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("2,128,4.5,100\n3,192,3.5,100\n")
    steps, losses = Run(path).series("loss")
    assert steps.tolist() == [1, 2, 3] and losses.tolist() == [5.0, 4.5, 3.5]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_divergence_is_said(tmp_path: Path, value: float):
    for seed in (0, 1):
        write_run(tmp_path, "bf16", seed, falling(2.0 + seed / 10))
        write_run(tmp_path, "sage_int8", seed, [*falling(2.0)[:-2], value, value] if seed else falling(2.0))
    comparison = Comparison(find_runs([tmp_path]))
    assert comparison.others[0].inside is False
    assert "INT8 diverged" in comparison.sentences()[0] and "(seed 1)" in comparison.sentences()[0]
    assert any("sage_int8-seed1: the loss is not finite at step 19" in note for note in comparison.notes)
    assert arm_cells(comparison)[1][2:4] == ["nan", "-"]  # no "+nan"
    numbers = json.loads(json.dumps(comparison.as_dict(), allow_nan=False))
    assert numbers["arms"]["sage_int8"]["final_loss"] is None


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"recipe": "other"}, "recipe differs: tiny (bf16-seed0); other (sage_int8-seed0)"),
        ({"max_steps": 40}, "number of steps differs: 20 (bf16-seed0); 40 (sage_int8-seed0)"),
        ({"tokens": 128}, "number of tokens up to step 20 differs: 1280 (bf16-seed0); 2560 (sage_int8-seed0)"),
        ({"config": {"data": {"seq_len": 128}}}, "data.seq_len differs: 64 (bf16-seed0); 128 (sage_int8-seed0)"),
        ({"config": {"optim": {"lr": 0.1}}}, "optim.lr differs: not set (bf16-seed0); 0.1 (sage_int8-seed0)"),
    ],
)
def test_not_the_same_experiment_is_said_loudly(tmp_path: Path, changes: dict, expected: str):
    write_run(tmp_path, "bf16", 0, falling(2.0))
    write_run(tmp_path, "sage_int8", 0, falling(2.0), **changes)
    comparison = Comparison(find_runs([tmp_path]))
    assert len(comparison.mismatches) == 1 and expected in comparison.mismatches[0]
    assert comparison.sentences()[0].startswith("These runs are not the same experiment")


def test_losses_of_several_tokenizers_do_not_compare(tmp_path: Path, capsys: pytest.CaptureFixture):
    other = {"data": {f"option{i}": i for i in range(20)}}  # more settings than are listed
    write_run(tmp_path, "bf16", 0, falling(2.0), config={"model": {"tokenizer": "byte"}})
    write_run(tmp_path, "sage_int8", 0, falling(2.0), config={"model": {"tokenizer": "gpt2"}} | other)
    assert main([str(tmp_path)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "note: model.tokenizer differs: byte (bf16-seed0); gpt2 (sage_int8-seed0). Losses are per token" in said


def test_text_from_runs_is_escaped_and_mismatches_stand_out(tmp_path: Path):
    write_run(tmp_path, "bf16", 0, falling(2.0), command="python <script>alert(1)</script> [/red]")
    write_run(tmp_path, "<b>$x$[red]", 0, falling(2.0), recipe="a&b[/red]")
    comparison = report([tmp_path], tmp_path / "out")
    assert "<b>$x$[red]" in printed(comparison) and "a&b[/red], tiny, step 20" in printed(comparison)
    html = (tmp_path / "out" / "report.html").read_text("utf-8").replace(get_plotlyjs(), "")
    page = Page(html)
    assert "<script>alert" not in html and "<b>" not in html and html.count("<script") == 3
    assert {trace.name for trace in curves(tmp_path / "out")["Speed"].data} >= {"&lt;b&gt;$x$[red], seed 0"}
    assert "Not the same experiment" in page.text and "recipe differs: tiny" in page.text


def test_command_line(parent: Path, tmp_path: Path):
    command = [sys.executable, "-m", "sagetrain.compare"]
    done = subprocess.run([*command, parent], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "INT8 ends inside the BF16 seed-to-seed band" in done.stdout and str(parent / "report.html") in done.stdout
    assert {"report.html", "metrics.csv", "comparison.json"} <= {file.name for file in parent.iterdir()}


@pytest.mark.parametrize("name", ["metrics.csv", "report.html"])
def test_only_files_of_a_comparison_are_overwritten(parent: Path, tmp_path: Path, name: str, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runs = [parent / "bf16-seed0", parent / "sage_int8-seed0"]
    (file := tmp_path / "comparison" / name).parent.mkdir()
    file.write_text("mine")
    assert f"comparison/{name} is of no comparison" in one_line_error(capsys, *runs)
    assert file.read_text() == "mine" and len(list(file.parent.iterdir())) == 1
    file.unlink()
    assert main([str(run) for run in runs]) == main([str(run) for run in runs]) == 0  # an earlier one of ours


def test_command_line_paths(parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    runs = [str(parent / name) for name in ("bf16-seed0", "sage_int8-seed0")]
    assert main(runs) == 0 and (tmp_path / "comparison" / "report.html").exists()
    assert main([*runs, str(parent), str(parent.parent), "--out", "all", "--baseline", "sage_int8"]) == 0
    numbers = json.loads((tmp_path / "all" / "comparison.json").read_text("utf-8"))
    assert numbers["baseline"] == "sage_int8" and len(numbers["runs"]) == 4


def test_command_line_names_mistakes(parent: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    error = one_line_error(capsys, parent / "bf16-sed0", tmp_path / "nowhere" / "x", parent / "bf16-seed0")
    assert "bf16-sed0 (did you mean bf16-seed0" in error and "nowhere" in error
    assert "is a file" in one_line_error(capsys, parent / "bf16-seed0" / "run.json")
    (tmp_path / "empty").mkdir()
    assert "neither a run" in one_line_error(capsys, tmp_path / "empty")
    assert "arms bf16, sage_int8" in one_line_error(capsys, parent, "--baseline", "fp16")
    assert "is a run" in one_line_error(capsys, parent, "--out", parent / "bf16-seed0")
    assert "is a file" in one_line_error(capsys, parent, "--out", parent / "bf16-seed0" / "run.json")
    assert not (parent / "report.html").exists()
    write_run(tmp_path / "again", "bf16", 0, falling(2.0))
    twice = one_line_error(capsys, parent, tmp_path / "again")
    assert "two runs of arm 'bf16' and seed 0 that differ in no setting" in twice and "again" in twice


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("run.json", None, "run.json is missing"),
        ("run.json", '{"name": "x", "arm"', "run.json: not valid JSON"),
        ("run.json", "[]", "run.json: holds list"),
        ("run.json", '{"arm": "bf16", "seed": 0, "status": "finished"}', "run.json: recipe, steps missing"),
        ("run.json", '{"recipe": "r", "arm": "a", "seed": "0", "status": "failed", "steps": 1}', "'seed' is '0'"),
        ("run.json", '{"recipe": "r", "arm": "a", "seed": 0, "status": "done", "steps": 1}', "status is 'done'"),
        ("config.yaml", "a: [1", "config.yaml: not valid YAML"),
        ("config.yaml", "", "config.yaml: holds NoneType, no mapping"),
        ("metrics.csv", None, "metrics.csv is missing"),
        ("metrics.csv", "", "metrics.csv: empty"),
        ("metrics.csv", "step,tokens\n1,2\n", "the header must name step and loss"),
        ("metrics.csv", "step,loss,x,x\n1,2,3,4\n", "no column twice: step,loss,x,x"),
        ("metrics.csv", "step,loss\n", "no loss was logged yet"),
        ("metrics.csv", "step,loss\n1,\n", "no loss was logged yet"),
        ("metrics.csv", "step,loss\n1,2.0\n2\n", "line 3 has 1 cells, the header has 2"),
        ("metrics.csv", "step,loss\n1,2.0\n2,x\n", "line 3: loss is 'x', not a number"),
        ("metrics.csv", "step,loss\n1.5,2.0\n", "line 2: step 1.5 is not a count"),
        ("metrics.csv", "step,loss\nnan,2.0\n", "line 2: step nan is not a count"),
        ("metrics.csv", "step,loss\n1,2.0\n2,1.", "the last line is cut off"),
        ("metrics.csv", b"step,loss\n\xff\xfe", "metrics.csv: not UTF-8"),
        ("eval.json", "{", "eval.json: cannot be read"),
        ("eval.json", '{"5": {"sage_int8": {"drop": {}}}}', 'eval.json: step 5, sage_int8, drop has no "scores"'),
        ("eval.json", '{"5": {"sage_int8": {"drop": {"scores": {"em": "x"}}}}}', 'no "scores" that are numbers'),
        ("eval.json", '{"x": {}}', "eval.json: step 'x' is no whole number"),
    ],
)
def test_corrupt_files_are_named(parent: Path, capsys: pytest.CaptureFixture, file: str, content, expected: str):
    target = parent / "sage_int8-seed1" / file
    target.touch()
    target.unlink() if content is None else target.write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    error = one_line_error(capsys, parent)
    assert expected in error and str(target) in error


def scored(parent: Path, arm: str, seed: int, *scores: float | None, **changes) -> Path:
    """A run with an accuracy at steps 10 and 20, or at 10 alone; changes as `write_run`."""
    at = dict(zip((9, 19), scores, strict=False))
    column = [at.get(index) for index in range(STEPS)]
    return write_run(parent, arm, seed, falling(2.0), columns={"eval/gsm8k/strict_match": column}, **changes)


def test_scores_by_hand(tmp_path: Path):
    for seed, (base, int8) in enumerate([(0.30, 0.31), (0.34, 0.33), (0.32, 0.33)]):
        scored(tmp_path, "bf16", seed, 0.1, base)
        scored(tmp_path, "sage_int8", seed, 0.1, int8)
    comparison = report([tmp_path], tmp_path / "out")
    base, int8 = comparison.scores
    assert base.mean == pytest.approx(0.32) and base.spread == base.band == pytest.approx(0.04)
    assert int8.mean == pytest.approx(0.97 / 3) and int8.spread == pytest.approx(0.02)
    # gaps 0.01, -0.01, 0.01: mean 1/300, deviation 0.011547, interval ± 4.303 * 0.011547 / sqrt(3)
    assert int8.gap == pytest.approx(1 / 300) and int8.inside is True
    assert int8.interval == pytest.approx((1 / 300 - 0.028687, 1 / 300 + 0.028687), abs=1e-5)
    cells = ["gsm8k/strict_match", "INT8", "0.3233", "0.0200", "+0.0033", "0.0400", "yes"]
    shown = printed(comparison)
    page = Page((tmp_path / "out" / "report.html").read_text("utf-8").replace(get_plotlyjs(), "")).text
    for cell in cells:
        assert cell in shown and cell in page
    assert "| " + " | ".join(cells).replace("_", r"\_") + " |" in markdown(comparison)
    numbers = json.loads((tmp_path / "out" / "comparison.json").read_text("utf-8"))["arms"]["sage_int8"]["scores"]
    assert numbers["gsm8k/strict_match"]["values"] == {"0": 0.31, "1": 0.33, "2": 0.33}
    assert numbers["gsm8k/strict_match"]["gap"] == int8.gap and numbers["gsm8k/strict_match"]["inside_band"] is True
    curve = curves(tmp_path / "out")["Score: gsm8k/strict_match"].data[-1].meta
    assert curve["x"][0] == [10, 20] and curve["y"][0] == pytest.approx([0.1, 0.97 / 3], abs=1e-5)


def asked(run: Path, step: int, score: float, arm: str = "sage_int8", **how: object) -> None:
    """What `python -m sagetrain.evaluate RUN` leaves."""
    of = {"scores": {"em": score}, "n": 100, "digest": "a1", "version": 3, "few_shot": 0, "chat_template": False} | how
    keep(run, step, arm, {"drop": of})


def test_scores_of_the_command_count_as_those_of_the_recipe(tmp_path: Path):
    for arm, score in (("bf16", 0.2), ("sage_int8", 0.3)):
        for seed in range(2):
            run = scored(tmp_path / "runs", arm, seed, 0.1, 0.4)
            asked(run, 10, 0.9, arm)
            asked(run, 20, score + seed / 2, arm)
            asked(run, 20, 0.8, "sdpa")  # not the run's own
            keep(run, 20, arm, {"gsm8k": {"scores": {"strict_match": 0.7}, "n": 7}})  # instead of metrics.csv's
    comparison = report([tmp_path / "runs"], tmp_path / "out")
    found = {(score.name, score.arm): list(score.values.values()) for score in comparison.scores}
    assert found["drop/em", "bf16"] == [0.2, 0.7] and found["drop/em", "sage_int8"] == [0.3, 0.8]
    assert found["gsm8k/strict_match", "bf16"] == [0.7, 0.7]
    assert comparison.mismatches == [] and comparison.notes == Comparison(find_runs([tmp_path / "runs"])).notes


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"n": 50, "digest": "c3"}, "number of questions of drop differs: 100 (bf16-seed0); 50 (sage_int8-seed0)"),
        ({"digest": "c3"}, "questions of drop differs: a1 (bf16-seed0); c3 (sage_int8-seed0)"),
        ({"version": 4}, "harness's version of drop differs: 3 (bf16-seed0); 4 (sage_int8-seed0)"),
        ({"few_shot": 3}, "examples before a question of drop differs: 0 (bf16-seed0); 3 (sage_int8-seed0)"),
        ({"chat_template": True}, "chat template of drop differs: False (bf16-seed0); True (sage_int8-seed0)"),
    ],
)
def test_scores_of_other_questions_are_another_experiment(tmp_path: Path, how: dict, said: str):
    for arm, changes in (("bf16", {}), ("sage_int8", how)):
        asked(write_run(tmp_path, arm, 0, falling(2.0)), STEPS, 0.5, arm, **changes)
    comparison = Comparison(find_runs([tmp_path]))
    assert comparison.mismatches == [said]
    assert comparison.sentences()[0].startswith("These runs are not the same experiment")


def test_old_scores_without_a_digest_are_no_other_questions(tmp_path: Path):
    for arm, digest in (("bf16", None), ("sage_int8", "a1")):
        asked(write_run(tmp_path, arm, 0, falling(2.0)), STEPS, 0.5, arm, digest=digest)
    assert Comparison(find_runs([tmp_path])).mismatches == []


def test_how_it_was_asked_is_that_of_the_score_that_counts(tmp_path: Path):
    """One run is evaluated past the common step in another way, and one at a step that eval.json does not have."""
    for arm, losses in (("bf16", falling(2.0)), ("sage_int8", falling(2.0)[:12])):
        asked(write_run(tmp_path, arm, 0, losses, status="stopped", max_steps=20), 10, 0.5, arm)
    asked(tmp_path / "bf16-seed0", 20, 0.7, "bf16", n=50, digest="c3")
    comparison = Comparison(find_runs([tmp_path]))
    assert comparison.common_step == 12 and comparison.mismatches == []
    assert [score.mean for score in comparison.scores] == [0.5, 0.5]
    late = scored(tmp_path / "late", "bf16", 1, 0.1, 0.4)
    keep(late, 10, "bf16", {"gsm8k": {"scores": {"strict_match": 0.1}, "n": 7}})
    (run,) = find_runs([late])
    assert run.how_asked("gsm8k", 10)["n"] == 7 and run.how_asked("gsm8k", 20) == {}


def test_an_arm_that_diverged_is_not_better(tmp_path: Path):
    for seed in range(4):
        write_run(tmp_path, "bf16", seed, falling(2.0 + 0.001 * seed))
        write_run(tmp_path, "sage_int8", seed, falling(1.9 + 0.001 * seed) if seed < 3 else [math.nan] * STEPS)
    comparison = report([tmp_path], tmp_path / "out")
    assert arm_cells(comparison)[1][5] == "no"
    assert 'verdict bad"' in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_a_higher_score_is_the_better_one(tmp_path: Path):
    for seed in range(2):
        scored(tmp_path, "bf16", seed, None, 0.3 + 0.01 * seed)
        scored(tmp_path, "sage_int8", seed, None, 0.4 + 0.01 * seed)
        scored(tmp_path, "sdpa_math", seed, None, 0.2 + 0.01 * seed)
    comparison = report([tmp_path], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text("utf-8").replace(get_plotlyjs(), "")
    assert page.count('class="better">better<') == page.count('class="no">no<') == 1
    assert {cells[1]: cells[6] for cells in score_cells(comparison)} == {
        "BF16 (SDPA flash)": "-", "INT8": "better", "sdpa_math (SDPA flash)": "no",
    }  # fmt: skip
    text = " ".join(comparison.sentences())
    assert "INT8 scores higher than BF16 (SDPA flash) on gsm8k/strict_match: by 0.1000, outside" in text
    assert "sdpa_math (SDPA flash) scores lower" in text and 'verdict bad"' in page
    for seed in range(2):
        shutil.rmtree(tmp_path / f"sdpa_math-seed{seed}")
    report([tmp_path], tmp_path / "out")
    assert 'verdict good"' in (tmp_path / "out" / "report.html").read_text("utf-8")


def test_scores_that_not_every_run_has(tmp_path: Path):
    scored(tmp_path, "bf16", 0, 0.1, 0.3)
    scored(tmp_path, "sage_int8", 0, 0.2)
    write_run(tmp_path, "other", 0, falling(2.0))
    comparison = report([tmp_path], tmp_path / "out")
    base, int8 = comparison.scores
    assert (base.arm, int8.arm, int8.gap, int8.inside) == ("bf16", "sage_int8", pytest.approx(-0.1), None)
    assert "step of gsm8k/strict_match differs: 20 (bf16-seed0); 10 (sage_int8-seed0)" in comparison.notes
    assert "No scores of gsm8k up to step 20: other-seed0" in comparison.notes
    assert comparison.mismatches == []


def test_scores_of_no_run_up_to_the_step_where_one_stopped(tmp_path: Path):
    scored(tmp_path, "bf16", 0, None, 0.3)
    write_run(tmp_path, "sage_int8", 0, falling(2.0)[:12], status="stopped", max_steps=STEPS)
    comparison = Comparison(find_runs([tmp_path]))
    assert comparison.scores == []
    said = "No scores of gsm8k up to step 12: bf16-seed0 (its first is of step 20), sage_int8-seed0"
    assert said in comparison.notes


def test_markdown_for_a_pull_request(parent: Path, capsys: pytest.CaptureFixture):
    write_run(parent, "x|y`<b>@z", 0, falling(2.0), recipe="tiny\n# large")
    assert main([str(parent), "--markdown"]) == 0
    said = capsys.readouterr()
    title, table, *verdict = said.out.split("\n\n")
    assert title == "**tiny, tiny # large, step 20**" and "report.html" in said.err
    assert table.splitlines() == [
        "| arm | seeds | final loss | gap | band | inside? | tokens/s | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| BF16 (SDPA flash) | 0, 1 | 2.0500 | baseline | 0.1000 | - | 100 | - |",
        "| INT8 | 0, 1 | 2.0700 | +0.0200 | 0.1000 | yes | 200 | 2.00x |",
        "| x\\|y\\`\\<b\\>@\u200bz (SDPA flash) | 0 | 2.0000 | +0.0000 | 0.1000 | yes | 200 | 2.00x |",
    ]
    assert "INT8 ends inside the BF16 seed-to-seed band" in verdict[0] and "- recipe differs: tiny" in verdict[-1]

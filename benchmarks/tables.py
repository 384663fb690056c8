"""README's and docs' tables and ratios, made of the rows in benchmarks/results: no number stands in two versions.

    python -m benchmarks.tables            # write them again, after a benchmark has added rows
    python -m benchmarks.tables --check    # name what differs from the rows; a part of `make test`

Method: a page says where a number goes and what it is, and this program writes it between the two comments:

    <!-- speed: attention-sm90 device=H100 part=both mask=causal t=8192+ -->
    ... a table ...
    <!-- end -->
    reaches <!-- ratio: attention-sm90 device=H100 part=both d=64 mask=causal t=8192 peer=fa4 -->0.90x<!-- end -->

The first word is a function of KINDS, the second a file of benchmarks/results, the rest chooses rows: `column=value`,
`column=one,other`, `column=8192+` (at least); of a device a part of its name does. Shapes give b, hq, hkv, t, d.

Choice: of every case the newest row of a device (the last in the file) is what is shown, and all that a file keeps:
`newest` is what common.write leaves in it. Older rows are in git's history. A ratio is how many times as fast as the
peer we are, of the milliseconds in the two rows; a peer that was measured at another commit is named below its table.

Cost: nothing but the standard library, so that it runs wherever Python does.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from pathlib import Path
from statistics import mean, median, stdev

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, str]

# Benchmark -> the columns that name a case, and those that name a row of it. A case is measured as a whole.
CASES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attention": (("shape", "mask", "backend"), ()),
    "passes": (("shape", "direction"), ("pass",)),
    "pretrain": (("recipe", "tokens", "data", "checkpointing", "precision", "linear", "optimizer", "attention"), ()),
    "finetune": (("model", "task", "steps"), ("arm", "seed", "metric")),
    "losses": (("name", "lr", "arm", "seed"), ()),
    "stress": (("setting", "model", "text", "steps", "tokens_per_step", "lr", "settings"), ("arm", "seed")),
    "accuracy": (("case", "d", "tokens", "dtype"), ("result",)),
    "bias": (("model", "text", "task", "seq_len", "batch_size", "arm"), ("tokens", "part")),
    "ablation": (("case", "d", "tokens"), ("variant",)),
    "parity": (("size", "tokens", "steps", "every", "text", "batch"), ("part", "measure")),
    "mma_overlap": (("mix per group, a scheduler",), ("warps_per_scheduler",)),
}
OURS = "sage_int8"
PEERS = {
    "sdpa_flash": "FA2", "sdpa_cudnn": "cuDNN", "fa4": "FA4", "cudnn_fp8": "cuDNN FP8",
    "sdpa_fp32": "SDPA FP32", "sdpa_bf16": "SDPA BF16", "sage_int8_deterministic": "`deterministic`",
    "varlen": "torch varlen", "flex": "FlexAttention", "sdpa": "SDPA", "fa2": "FA2, own package", "fa3": "FA3",
}  # fmt: skip
TRAINED = {  # arms, in order
    "bf16": "BF16", "flex": "BF16 by FlexAttention", "fa4": "BF16 by FlashAttention-4", OURS: "INT8",
    "noisy": "BF16 with noise", "published": "published scheme",
}  # fmt: skip
NAMES = TRAINED | PEERS  # of backends
ARMS = PEERS | TRAINED  # of arms
PARTS = {  # of a step, and the columns of benchmarks.pretrain that have them; the first three are attention
    "attention forward": ("ms_attention_forward",), "backward": ("ms_attention_backward",),
    "quantise": ("ms_quantise",), "linear layers": ("ms_products",), "loss": ("ms_loss",),
    "the rest": ("ms_other", "ms_copies", "ms_optimizer"), "idle": ("ms_idle",),
}  # fmt: skip
OUTPUTS = {"o": "O", "d_q": "dQ", "d_k": "dK", "d_v": "dV"}
TAIL = 10  # a run's final loss is over the last tenth of its steps, as in sagetrain.compare


# ------------------------------------------------------------------------------------------------------------- rows


def newest(rows: list[Row], benchmark: str) -> list[Row]:
    """Of every case of every device, the rows of the commit that was measured last; of equal rows the last."""
    if benchmark not in CASES:
        raise ValueError(
            f"benchmark {benchmark!r} is none of {', '.join(CASES)}: tables.CASES says what a case of it is"
        )
    case, item = (("device", *columns) for columns in CASES[benchmark])

    def name(row: Row, columns: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(str(row.get(column, "")) for column in columns)

    last = {name(row, case): row.get("commit") for row in rows}
    kept: dict[tuple, Row] = {}
    for row in rows:
        if row.get("commit") == last[name(row, case)]:
            key = name(row, case) + name(row, item)
            kept.pop(key, None)
            kept[key] = row
    return list(kept.values())


def read(path: Path) -> list[Row]:
    """All rows of a file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fits(value: str, wanted: str) -> bool:
    """Whether a cell is what the page asks for: `a`, `a,b`, or `8192+`."""
    if wanted.endswith("+"):
        return float(value) >= float(wanted[:-1])
    return value in wanted.split(",")


def chosen(file: str, wanted: dict[str, str]) -> list[Row]:
    """The newest rows of a file that fit; the parts of their shape are columns, and for part=both both_ms is `ms` (of
    rows that have no column `part` of their own).

    Of a recipe's step `ms` is all of it.
    """
    rows = newest(read(RESULTS / f"{file}.csv"), file.split("-")[0])
    wanted, found = dict(wanted), []
    device, part = wanted.pop("device", ""), None
    if not any("part" in row for row in rows):
        part = wanted.pop("part", None)
    for row in rows:
        sizes = re.findall(r"\d+", row.get("shape", ""))
        row = dict(zip(("b", "hq", "hkv", "t", "d"), sizes, strict=False)) | row if len(sizes) == 5 else row
        if part:
            row["ms"] = row.get(f"{part}_ms") or row.get(f"{part}_bytes", "")
        row.setdefault("ms", row.get("step_ms", ""))
        if device in row["device"] and all(fits(row[column], value) for column, value in wanted.items()):
            found.append(row)
    if not found:
        raise ValueError(f"no row of {file}.csv has device={device or 'any'} {wanted}")
    if len(devices := {row["device"] for row in found}) > 1:
        raise ValueError(f"{file}.csv has rows of {len(devices)} devices: say device=, one of {sorted(devices)}")
    return found


def by_case(rows: list[Row]) -> dict[tuple[str, ...], dict[str, Row]]:
    """Case without the backend -> backend -> row."""
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        key = tuple(row.get(column, "") for column in ("shape", "mask", *CASES["pretrain"][0][:-1]))
        cases.setdefault(key, {})[row.get("backend") or row["attention"]] = row
    return cases


def peers_of(rows: list[Row], wanted: str | None) -> list[str]:
    """The peers that a page asks for; by default all that were measured, in the order of PEERS."""
    if wanted:
        return wanted.split(",")
    there = {row.get("backend") or row["attention"] for row in rows}
    return [peer for peer in PEERS if peer in there and not peer.startswith(OURS)]


def times(ours: Row, peer: Row | None) -> float | None:
    """How many times as fast as the peer we are."""
    return float(peer["ms"]) / float(ours["ms"]) if peer and peer["ms"] else None


# -------------------------------------------------------------------------------------------------------------- text


def digits(value: float) -> str:
    """Three significant digits, as 0.0356, 1.66, 12.2, 159, 1,983."""
    places = max(0, 2 - int(f"{value:e}".split("e")[1]))
    return f"{value:,.{places}f}"


def span(values: list[float], form: Callable[[float], str]) -> str:
    """`0.90x`, or `0.88x to 0.94x` where they differ as written."""
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def as_ratio(value: float) -> str:
    return f"{value:.2f}x"


def markdown(head: list[str], lines: list[list[str]], note: str = "") -> str:
    """A table as a block of its own, and a line below it; blank lines, for no comment may touch a table everywhere."""
    table = [head, ["---"] * len(head), *lines]
    lines = [f"| {' | '.join(cells)} |" for cells in table] + (["", note] if note else [])
    return "\n".join(["", "", *lines, "", ""])


def label(row: Row) -> str:
    """`H32/8 D64 T8192`: query and key heads, head dimension, tokens; more than one row and no causal mask are said."""
    heads = row["hq"] if row["hq"] == row["hkv"] else f"{row['hq']}/{row['hkv']}"
    batch = "" if row["b"] == "1" else f"B{row['b']} "
    return f"{batch}H{heads} D{row['d']} T{row['t']}" + (", full" if row["mask"] == "full" else "")


def origin(rows: list[Row], peers: list[str]) -> str:
    """The commit of our rows, and of the peers that were measured at another."""
    commits: dict[str, list[str]] = {}
    for row in rows:
        name = row.get("backend") or row["attention"]
        if name in (OURS, *peers) and PEERS.get(name, "") not in commits.setdefault(row["commit"], []):
            commits[row["commit"]].append(PEERS.get(name, ""))
    ours = next(commit for commit, names in commits.items() if "" in names)
    others = [f"{', '.join(names)} at {commit}" for commit, names in commits.items() if commit != ours]
    return f"Measured at commit {'; '.join([ours, *others])}."


# ------------------------------------------------------------------------------------------------- kinds of numbers


def speed(file: str, peer: str | None = None, **wanted: str) -> str:
    """Table: our milliseconds by case, and of each peer how many times its speed that is (its milliseconds)."""
    rows = chosen(file, wanted)
    peers = peers_of(rows, peer)
    found = [case for case in by_case(rows).values() if OURS in case]
    found.sort(key=lambda c: [int(c[OURS][k]) for k in ("b", "d")] + [c[OURS]["mask"], int(c[OURS]["t"])])
    lines = []
    for case in found:
        cells = [label(case[OURS]), digits(float(case[OURS]["ms"]))]
        for name in peers:
            ratio = times(case[OURS], case.get(name))
            cells.append(f"{as_ratio(ratio)} ({digits(float(case[name]['ms']))})" if ratio else "–")
        lines.append(cells)
    return markdown(["", "INT8, ms", *(PEERS[name] for name in peers)], lines, origin(rows, peers))


def ratios(file: str, peer: str | None = None, named: bool = True, **wanted: str) -> str:
    """Phrase: `1.81x to 2.07x FA2, 1.11x cuDNN`, over all cases that fit."""
    rows, said = chosen(file, wanted), []
    for name in peers_of(rows, peer):
        found = [times(case[OURS], case.get(name)) for case in by_case(rows).values() if OURS in case]
        if found := [ratio for ratio in found if ratio]:
            said.append(span(found, as_ratio) + (f" {PEERS[name]}" if named else ""))
    if not said:
        raise ValueError(f"nothing to compare in {file}.csv with {wanted}")
    return ", ".join(said)


def ratio(file: str, peer: str, **wanted: str) -> str:
    """Phrase: `0.88x to 0.94x` the speed of one peer."""
    return ratios(file, peer, named=False, **wanted)


def value(file: str, column: str, **wanted: str) -> str:
    """Phrase: what a column holds, `0.48` or `0.38 to 0.50`."""
    return span([float(row[column]) for row in chosen(file, wanted) if row[column]], digits)


def over(file: str, column: str, of: str, **wanted: str) -> str:
    """Phrase: a column by another of the same row, `0.19x to 0.40x`."""
    return span([float(row[column]) / float(row[of]) for row in chosen(file, wanted)], as_ratio)


def passes(file: str, **wanted: str) -> str:
    """Table: microseconds of every kernel of a call, and what the main one reaches of its bound."""
    rows = chosen(file, wanted)
    names, lines = list(dict.fromkeys(row["pass"] for row in rows)), []
    bound = any(row["share_of_bound"] for row in rows)
    for _, group in groupby(rows, lambda row: row["shape"]):
        us = {row["pass"]: row for row in group}
        cells = [digits(float(us[name]["us"])) for name in names]
        shares = [digits(float(row["share_of_bound"])) for row in us.values() if row["share_of_bound"]]
        total = digits(sum(float(row["us"]) for row in us.values()))
        lines.append([label(us[names[0]] | {"mask": "causal"}), *cells, total, *shares])
    head = ["us", *(f"`{name}`" for name in names), "all", *(["of the bound"] if bound else [])]
    return markdown(head, lines, f"Measured at commit {rows[-1]['commit']}.")


def where(row: Row) -> str:
    """`8,192 packed`: the row of tokens that a step of benchmarks.pretrain was given."""
    return f"{int(row['tokens']):,} {row['data']}"


def step(file: str, **wanted: str) -> str:
    """Table: a recipe's step by length, data and attention, ours first; the last column has our tokens/s by theirs."""
    rows, lines, notes = chosen(file, wanted), [], {}
    for case in by_case(rows).values():
        ran = [row for row in case.values() if row["ms"]]
        for row in sorted(ran, key=lambda row: (row["attention"] != OURS, float(row["ms"]))):
            name = NAMES[row["attention"]]
            if row["attention"] == "sdpa":
                name = f"{name}'s choice: {row['ran'].removeprefix('SDPA ')}"
            if row["handicap"]:
                name, notes[f"\\* {row['handicap']}."] = f"{name} \\*", None
            ours = row["attention"] == OURS
            cells = [
                where(row) if ours else "",
                name,
                digits(float(row["tokens_per_s"])),
                digits(float(row["micro_ms"])),
            ]
            cells += [f"{float(row['mfu']):.0%}", f"{float(row['peak_gib']):.1f}"]
            lines.append([*cells, "" if ours else as_ratio(times(case[OURS], row))])
    for row in rows:
        if row["refused"]:
            notes[f"Refused: {re.split(r': | [(]|;', row['refused'])[1]}."] = None
    head = ["", "", "tokens/s", "micro-batch, ms", "MFU", "peak, GiB", "INT8"]
    return markdown(head, lines, " ".join([*notes, origin(rows, peers_of(rows, None))]))


def breakdown(file: str, **wanted: str) -> str:
    """Table: milliseconds of a micro-batch and an update by what the kernels do, of ours and of the fastest other."""
    rows, lines = chosen(file, wanted), []
    for case in by_case([row for row in rows if row["ms"] and row.get("ms_products")]).values():
        others = [row for name, row in case.items() if name != OURS and not row["handicap"]]
        if OURS not in case or not others:
            continue
        for row in (case[OURS], min(others, key=lambda row: float(row["ms"]))):
            ms = [sum(float(row.get(column) or 0) for column in columns) for columns in PARTS.values()]
            busy, attention = sum(ms) - ms[-1], sum(ms[:3])
            cells = [where(row) if row["attention"] == OURS else "", NAMES[row["attention"]]]
            cells += [digits(x) if x else "–" for x in ms] + [digits(sum(ms))]
            lines.append([*cells, f"{attention / busy:.0%}", as_ratio(busy / (busy - attention))])
    head = ["ms", "", *PARTS, "all", "attention, of the kernels", "were it free"]
    return markdown(head, lines, origin(rows, peers_of(rows, None)))


def group_of(row: Row) -> str:
    """What a case of benchmarks.accuracy is about; channels that move together have the bar of sigma 3."""
    if row["case"].startswith("activations"):
        return "a real model's activations"
    if row["case"].startswith("sigma"):
        return row["case"].split(",")[0]
    return "channels that move together" if row["bar"] == "0.8" else "other kinds and shapes"


def errors(file: str, **wanted: str) -> str:
    """Table: the kernel's error over that of the published scheme (and over that of its plain reference)."""
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in chosen(file, wanted):
        groups.setdefault(group_of(row), {}).setdefault(row["result"], []).append(row)
    lines = []
    for name, by_result in groups.items():
        cells = []
        for result in OUTPUTS:
            paper = [float(row["kernel_error"]) / float(row["paper_error"]) for row in by_result[result]]
            plain = [float(row["kernel_x_sage"]) for row in by_result[result]]
            middle = f", median {as_ratio(median(paper))}" if name.startswith("a real") else ""
            cells.append(f"{span(paper, as_ratio)}{middle} ({span(plain, as_ratio)})")
        lines.append([name, *cells])
    return markdown(["error, of the published scheme's (of the reference's)", *OUTPUTS.values()], lines)


def accuracy(file: str, **wanted: str) -> str:
    """Table: errors of the published scheme, the preset and the kernel by case (`over`: above the aim)."""
    lines = []
    for (case, d), group in groupby(chosen(file, wanted), lambda row: (row["case"], row["d"])):
        cells = []
        for row in group:
            three = " / ".join(f"{float(row[f'{who}_error']):.4f}" for who in ("paper", "sage", "kernel"))
            over = " over" if float(row["sage_x_paper"]) > float(row["bar"]) else ""
            cells.append(f"{three} ({as_ratio(float(row['sage_x_paper']))}{over})")
        lines.append([case, d, *cells])
    return markdown(["case", "D", "O: paper / sage / kernel", "dQ", "dK", "dV"], lines)


def bias(file: str, **wanted: str) -> str:
    """Table: bias of the gradient, all of it and by projection, and a micro-batch's error, after the most tokens.
    INT8 and BF16 come before other arms. What single layers have stays in the rows."""
    found: dict[str, dict[str, Row]] = {}
    rows = chosen(file, wanted)
    case = [column for column in CASES["bias"][0] if column != "arm" and column in rows[0]]
    if several := [column for column in case if len({row[column] for row in rows}) > 1]:
        raise ValueError(f"{file}.csv has rows of several cases: say {'=, '.join(several)}=")
    most = max(int(row["tokens"]) for row in rows)
    for row in sorted(rows, key=lambda row: row["arm"] not in ARMS):
        if int(row["tokens"]) == most:
            found.setdefault(row["arm"], {})[row["part"]] = row
    parts = [part for part in next(iter(found.values())) if not part.startswith("layer ")]
    lines = [
        [
            ARMS.get(arm, f"`{arm}`"),
            *(digits(float(of[part]["bias"])) for part in parts),
            digits(float(of["all"]["each"])),
        ]
        for arm, of in found.items()
    ]
    head = ["", *(f"bias, {part}" for part in parts), "error of one micro-batch"]
    commits: dict[str, list[str]] = {}
    for of, line in zip(found.values(), lines, strict=True):
        commits.setdefault(of["all"]["commit"], []).append(line[0])
    (first, _), *others = commits.items()
    note = "".join(f"; {' and '.join(arms)} at {commit}" for commit, arms in others)
    return markdown(head, lines, f"After {most:,} tokens, at commit {first}{note}.")


def overlap(file: str, **wanted: str) -> str:
    """Table: cycles of a scheduler for a mix of instructions, two mixes a line."""
    cells = [[row["mix per group, a scheduler"], row["cycles_per_group"]] for row in chosen(file, wanted)]
    cells += [["", ""]] * (len(cells) % 2)
    half = len(cells) // 2
    return markdown(["mix", "cycles"] * 2, [a + b for a, b in zip(cells[:half], cells[half:], strict=True)])


def trained(folder: str) -> dict[str, dict[int, dict[str, float]]]:
    """Arm -> seed -> final loss, median tokens/s and number of steps of the runs in a folder's metrics.csv."""
    runs: dict[str, dict[int, list[Row]]] = {}
    for row in read(RESULTS / folder / "metrics.csv"):
        runs.setdefault(row["arm"], {}).setdefault(int(row["seed"]), []).append(row)

    def summary(rows: list[Row]) -> dict[str, float]:
        last = int(rows[-1]["step"])
        final = mean(float(row["loss"]) for row in rows if int(row["step"]) > last - last / TAIL)
        return {"loss": final, "steps": last, "tokens": int(rows[-1]["tokens"])}

    found = {arm: {seed: summary(rows) for seed, rows in seeds.items()} for arm, seeds in runs.items()}
    for arm, seeds in runs.items():
        speeds = [float(row["tokens_per_s"]) for rows in seeds.values() for row in rows if row["tokens_per_s"]]
        for seed in seeds:
            found[arm][seed]["speed"] = median(speeds)
    return found


def loss(folder: str, speed: str = "yes") -> str:
    """Table: final loss of the arms, the gap by seeds, how far BF16 is from itself with another seed, tokens/s (not
    with speed=no: of runs that shared a GPU).

    Without BF16 the first arm is what the others are held against.
    """
    arms, lines = trained(folder), []
    first = "bf16" if "bf16" in arms else next(iter(arms))
    base = arms[first]
    band = width(run["loss"] for run in base.values())
    for arm, runs in arms.items():
        gap = mean(run["loss"] - base[seed]["loss"] for seed, run in runs.items())
        run, (attention, *settings) = next(iter(runs.values())), arm.split(" ")
        cells = [" ".join([ARMS.get(attention, attention), *settings]), str(len(runs)), f"{run['steps']:.0f}"]
        cells += [f"{mean(run['loss'] for run in runs.values()):.4f}", "" if arm == first else f"{gap:+.4f}"]
        seeds = f"{band:.4f}" if arm == first and len(base) > 1 else ""
        lines.append([*cells, seeds, *([f"{run['speed']:,.0f}"] if speed == "yes" else [])])
    head = ["", "seeds", "steps", "final loss", "gap", "seed to seed", *(["tokens/s"] if speed == "yes" else [])]
    return markdown(head, lines)


def probe(folder: str) -> str:
    """Table of the drift probe (docs/pretraining.md) by tokens, of a folder's probe.csv: means over the runs of its one
    arm, of layers the largest. Five of its steps, the first and the last among them."""
    steps: dict[int, list[Row]] = {}
    for row in read(RESULTS / folder / "probe.csv"):
        steps.setdefault(int(row["tokens"]), []).append(row)
    if len(arms := {row["arm"] for rows in steps.values() for row in rows}) != 1:
        raise ValueError(f"{folder}/probe.csv has {len(arms)} arms {sorted(arms)}: one has a table")
    tokens, lines = sorted(steps), []
    for at in sorted({tokens[round(i * (len(tokens) - 1) / 4)] for i in range(5)}):
        cells = [mean(float(row[f"probe/{name}"]) for row in steps[at]) for name in ("grad_cosine", "ds_rowsum")]
        for name in ("sigma_q", "sigma_k", "dq_error", "dk_error"):
            columns = [column for column in steps[at][0] if column.startswith(f"probe/{name}_layer")]
            cells.append(mean(max(float(row[column]) for column in columns) for row in steps[at]))
        lines.append([f"{at / 1e6:.0f}M", f"{cells[0]:.5f}", *(digits(cell) for cell in cells[1:])])
    head = ["tokens", "cosine", "row sums of dS", "σ of q", "σ of k", "error of dQ", "error of dK"]
    return markdown(head, lines)


def finetune(file: str, of: str, **wanted: str) -> str:
    """Table of fine-tuned models by task: `of` is `score` (in percent, by metric) or `loss` (of validation).

    Mean and standard deviation over seeds; the gap is INT8's to BF16's of the same seed, of scores with both evaluated
    by BF16 attention: what training made, and not what the attention adds while it is asked.
    """
    cases: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in sorted(chosen(file, wanted), key=lambda row: int(row["seed"])):
        case = (row["task"], row["metric"]) if of == "score" else (row["task"],)
        cases.setdefault(case, {}).setdefault(row["arm"], []).append(row)
    if of == "loss":  # the same in the rows of every metric
        cases = {
            case: {arm: [row for row in rows if row["metric"] == rows[0]["metric"]] for arm, rows in arms.items()}
            for case, arms in cases.items()
        }
    lines = []
    for (task, *metric), arms in cases.items():
        bf16, int8 = arms["bf16"], arms[OURS]
        if [row["seed"] for row in bf16] != [row["seed"] for row in int8]:
            raise ValueError(f"{task}: the arms have other seeds")
        if of == "loss":
            lines.append([task, str(len(int8)), *(spread(rows, "val_loss") for rows in (bf16, int8))])
            lines[-1].append(spread(int8, "val_loss", bf16))
        else:
            before = [f"{100 * float(rows[0]['before']):.1f}" for rows in (bf16, int8)]
            cells = [f"{task}, {metric[0]}", f"{int(int8[0]['n']):,}", " / ".join(dict.fromkeys(before))]
            cells += [spread(bf16, "after"), spread(int8, "after"), spread(bf16, "other"), spread(int8, "other")]
            lines.append([*cells, spread(int8, "other", bf16, "after")])
    if of == "loss":
        return markdown(["", "seeds", "BF16", "INT8", "INT8 - BF16"], lines)
    other = ["BF16, evaluated with INT8", "INT8, evaluated with SDPA", "INT8 - BF16, neither evaluated with INT8"]
    return markdown(["", "questions", "before", "BF16", "INT8", *other], lines)


def losses(file: str, **wanted: str) -> str:
    """Table of runs by learning rate and arm: losses, mean and standard deviation over seeds, and the median of the
    gradient norm. The gap is that of validation to BF16 of the same rate, over the seeds that both have."""
    cases: dict[tuple[float, str], dict[str, Row]] = {}
    for row in chosen(file, wanted):
        cases.setdefault((float(row["lr"]), row["arm"]), {})[row["seed"]] = row
    lines = []
    for (lr, arm), runs in sorted(cases.items(), key=lambda case: (case[0][0], in_order(case[0][1]))):
        base = {} if arm == "bf16" else cases.get((lr, "bf16"), {})
        gap = above(runs, base, "val_loss")
        cells = [ARMS.get(arm, arm), f"{lr:g}", ", ".join(sorted(runs))]
        cells += [spread(list(runs.values()), column) for column in ("train_loss", "val_loss")]
        lines.append([*cells, gap, digits(median(float(row["grad_norm"]) for row in runs.values()))])
    return markdown(["", "learning rate", "seeds", "training loss", "validation loss", "gap", "gradient norm"], lines)


def stress(file: str, **wanted: str) -> str:
    """Table of hard settings by arm: training loss, mean and standard deviation over the seeds that finished; its gap
    to BF16 over those that both arms finished; how far BF16 is from itself with another seed; of all runs the largest
    rise, and those that failed, with the steps at which they did."""
    settings: dict[str, dict[str, dict[str, Row]]] = {}
    for row in sorted(chosen(file, wanted), key=lambda row: int(row["seed"])):
        runs = settings.setdefault(row["setting"], {}).setdefault(row["arm"], {})
        if runs.setdefault(row["seed"], row) is not row:
            raise ValueError(
                f"{file}.csv has {row['setting']} more than once: say steps=, lr=, model=, text= or settings="
            )
    lines = []
    for setting, arms in settings.items():
        base: dict[str, Row] = {}
        for arm, runs in sorted(arms.items(), key=lambda arm: in_order(arm[0])):
            whole = {seed: row for seed, row in runs.items() if row["status"] == "finished"}
            cells = [setting, ARMS.get(arm, arm), str(len(runs))]
            cells += [spread(list(whole.values()), "train_loss") if whole else "", above(whole, base, "train_loss")]
            if arm == "bf16":
                base = whole
            band = f"{width(float(row['train_loss']) for row in whole.values()):.4f}" if len(whole) > 1 else ""
            rises = [float(row["worst"]) for row in runs.values() if row["worst"]]
            failed = [row["fails"] for row in runs.values() if row["fails"]]
            cells += [band if arm == "bf16" else "", digits(max(rises)) if rises else ""]
            lines.append([*cells, f"{len(failed)}, at step {', '.join(failed)}" if failed else "0"])
    return markdown(["", "", "seeds", "training loss", "gap", "seed to seed", "largest rise", "failed"], lines)


def in_order(arm: str) -> tuple[int, str]:
    """Sorts arms: BF16 first, as the baseline, then those of TRAINED, then others."""
    return list(TRAINED).index(arm) if arm in TRAINED else len(TRAINED), arm


def width(values: Iterable[float]) -> float:
    """How far the largest is from the smallest."""
    values = list(values)
    return max(values) - min(values)


def above(runs: dict[str, Row], base: dict[str, Row], column: str) -> str:
    """`spread` of what a column is above that of `base`, over the seeds that both have; empty where there are none."""
    both = [seed for seed in sorted(runs) if seed in base]
    return spread([runs[seed] for seed in both], column, [base[seed] for seed in both]) if both else ""


def spread(rows: list[Row], column: str, base: list[Row] | None = None, of_base: str | None = None) -> str:
    """`31.2 ± 0.4`: mean and standard deviation of a column, or of what it is above that (or `of_base`) of `base`; of
    one value only that.

    Scores are in percent.
    """
    scale, places = (1, 4) if column.endswith("loss") else (100, 1)
    values = [scale * float(row[column]) for row in rows]
    if base:
        values = [value - scale * float(row[of_base or column]) for value, row in zip(values, base, strict=True)]
    text = f"{mean(values):{'+' if base else ''}.{places}f}"
    return f"{text} ± {stdev(values):.{places}f}" if len(values) > 1 else text


def compared(folder: str, what: str, arm: str = OURS) -> str:
    """Phrase: what sagetrain.compare found of an arm beside the baseline's runs of the same seeds, and 95% of it,
    of a folder's comparison.json: `gap`, or `gap_trend`, what the gap gains in the second half of the steps. Or
    `band`: the baseline's highest less its lowest seed."""
    comparison = json.loads((RESULTS / folder / "comparison.json").read_text("utf-8"))
    if what == "band":
        return f"{comparison['band']:.4f}"
    found = comparison["arms"][arm]
    low, high = found[f"{what}_interval"]
    return f"{found[what]:+.4f} (95%: {low:+.4f} to {high:+.4f})"


def apart(file: str, arm: str, base: str, column: str = "train_loss", **wanted: str) -> str:
    """Phrase: what a column is with one arm above what it is with another, mean and standard deviation over the seeds
    that both have."""
    runs = {name: {row["seed"]: row for row in chosen(file, wanted | {"arm": name})} for name in (arm, base)}
    if found := above(runs[arm], runs[base], column):
        return found
    raise ValueError(f"no seed in {file}.csv has both {arm} and {base}")


def typical(folder: str, column: str) -> str:
    """Phrase: the median of a column over all steps of the runs in a folder's metrics.csv."""
    return digits(median(float(row[column]) for row in read(RESULTS / folder / "metrics.csv") if row[column]))


KINDS: dict[str, Callable[..., str]] = {
    f.__name__: f
    for f in (
        speed, ratios, ratio, value, over, passes, step, breakdown, errors, accuracy, bias, overlap, loss,
        finetune, losses, probe, stress, typical, compared, apart,
    )
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- pages

MARK = re.compile(rf"(<!-- ({'|'.join(KINDS)}): ([^>]*?) -->)(.*?)(<!-- end -->)", re.DOTALL)


def made(kind: str, options: str) -> str:
    """The text for one mark. Raises ValueError, which names it, where the rows or its own words do not give one."""
    try:
        file, *words = options.split()
        return KINDS[kind](file, **dict(word.split("=", 1) for word in words))
    except (ValueError, TypeError, LookupError, OSError, StopIteration) as error:
        said = f"no column {error}" if isinstance(error, KeyError) else f"{error}"
        raise ValueError(f"<!-- {kind}: {options} --> cannot be made: {said or type(error).__name__}") from error


def faults(page: str) -> Iterator[str]:
    """What is wrong with a page's marks: text that is not what the rows say, or that nobody would check or see."""
    if lost := re.search(r"<!--.*?(-->|$)", MARK.sub("", page), re.DOTALL):
        yield f"{lost[0]} is no mark: <!-- KIND: FILE column=value ... -->text<!-- end -->"
    for mark, kind, options, text, _ in MARK.findall(page):
        try:
            right = made(kind, options)
        except ValueError as error:
            yield str(error)
            continue
        if text != right:
            yield f"{mark} has {first_difference(text, right)}"
        if "\n" not in right and re.search(rf"^ *{re.escape(mark)}", page, re.MULTILINE):
            yield f"{mark} begins a line, and so ends the paragraph: put a word before it"


def written(page: str) -> str:
    """The page with every mark's text made again."""
    return MARK.sub(lambda found: found[1] + made(found[2], found[3]) + found[5], page)


def first_difference(text: str, right: str) -> str:
    """`1.10x (1.84)` where the rows say ...: the first line that differs."""
    lines, rights = text.strip().split("\n"), right.strip().split("\n")
    for line, other in zip(lines + [""] * len(rights), rights, strict=False):
        if line != other:
            return f"{line!r}, the rows say {other!r}"
    return f"{len(lines)} lines, the rows give {len(rights)}"


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        print(__doc__)
        return 2
    found = []
    for path in pages():
        page, name = path.read_text(), path.relative_to(ROOT)
        if arguments:
            found += [f"{name}: {fault}" for fault in faults(page)]
            continue
        try:
            new = written(page)
        except ValueError as error:
            found.append(f"{name}: {error}")
            continue
        if new != page:
            path.write_text(new)
            print(f"{name}: written")
    if found and arguments:
        found.append("python -m benchmarks.tables writes them again from benchmarks/results")
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

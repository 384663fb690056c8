"""Pictures of benchmarks/results, drawn from the rows and nothing else.

python -m benchmarks.plot benchmarks/results/attention-sm90.csv             # beside it, as .png
python -m benchmarks.plot benchmarks/results/quickstart-50m-sm90            # loss.png in the folder
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from math import ceil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.tables import ARMS, PEERS, TAIL, TRAINED, newest, read

COLOURS = {
    "sage_int8": "#e07a1f", "sage_int8_deterministic": "#f6d0ab", "sage_int8_fp32": "#f0b27a",
    "sdpa_fp32": "#8fa3b8", "sdpa_bf16": "#4a6785",
    "sdpa_flash": "#b7c4d1", "sdpa_cudnn": "#7f95ab", "fa4": "#3f5b78", "cudnn_fp8": "#76a08a",
}  # fmt: skip
OF_ARMS = {  # beside BF16
    "sage_int8": COLOURS["sage_int8"], "noisy": "#76a08a", "published": "#9c5a8c", "fa4": "#2e8a99", "flex": "#555555",
}  # fmt: skip
NAMES = PEERS | {  # of backends
    "sage_int8": "SageTrain INT8", "sage_int8_fp32": "SageTrain INT8, FP32 tensors",
    "sage_int8_deterministic": "SageTrain INT8, deterministic",
    "sdpa_flash": "FlashAttention-2", "sdpa_cudnn": "cuDNN BF16", "fa4": "FlashAttention-4",
}  # fmt: skip


def arm_name(arm: str) -> str:
    """`SageTrain INT8, model.linear=float8`: the attention and the settings that an arm is named by."""
    attention, _, settings = arm.partition(" ")
    name = NAMES["sage_int8"] if attention == "sage_int8" else ARMS.get(attention, attention)
    return ", ".join([name, *([settings] if settings else [])])


def save(figure: plt.Figure, target: Path) -> Path:
    figure.savefig(target, dpi=150)
    plt.close(figure)
    print(target)
    return target


def attention(path: Path, device: str | None = None) -> Path:
    """Rate by length, a column per heads and D: forward above, forward + backward below. Higher is better.

    The newest row of each case of one device: the one whose name has `device` in it, else that of the last row. Of a
    GPU one causal sequence by its length (the tables have the rest), of a CPU all. A backend that refuses stands there
    by that word. On sm90 `deterministic` runs the same kernel, and is left out.
    """
    rows = newest(read(path), "attention")
    if not rows or "both_ms" not in rows[0]:
        raise SystemExit(f"{path} has no rows of benchmarks.attention: such a file, or a folder of curves, is drawn")
    device = next(row["device"] for row in reversed(rows) if (device or "") in row["device"])
    rows = [row for row in rows if row["device"] == device]
    on_gpu = rows[0]["kernel"].startswith("sm")
    if rows[0]["kernel"] == "sm90":
        rows = [row for row in rows if row["backend"] != "sage_int8_deterministic"]
    panels: dict[tuple[str, ...], dict[tuple[int, str], dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        b, hq, hkv, t, d = row["shape"].split("x")
        if not on_gpu or (b == "1" and row["mask"] == "causal"):
            panels[hq, hkv, d][int(t), row["mask"]][row["backend"]] = row
    there = {row["backend"] for row in rows}
    names = [name for name in COLOURS if name in there]
    unit, name_of_unit = (1e3, "TFLOP/s") if on_gpu else (1.0, "GFLOP/s")

    figure, axes = plt.subplots(
        2, len(panels), squeeze=False, sharey="row", sharex="col", layout="constrained", figsize=(10, 5.6)
    )
    bar = 0.86 / len(names)
    text = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7}
    for column, ((hq, hkv, d), cases) in enumerate(panels.items()):
        for line, (key, title) in enumerate((("forward", "forward"), ("both", "forward + backward"))):
            axis = axes[line, column]
            for i, case in enumerate(sorted(cases)):
                for j, name in enumerate(names):
                    row, place = cases[case].get(name), i + (j - (len(names) - 1) / 2) * bar
                    if row is None:
                        continue
                    if not row[f"{key}_gflops"]:
                        axis.text(place, 0, " refused", color="#999999", **text)
                        continue
                    rate = float(row[f"{key}_gflops"]) / unit
                    axis.bar(place, rate, 0.92 * bar, color=COLOURS[name])
                    ink = {"color": "#b35c0c", "fontweight": "bold"} if name == "sage_int8" else {"color": "#333333"}
                    axis.text(place, rate, f" {rate:.0f}", **text, **ink)
            ticks = [f"{t:,}" if on_gpu else f"{t:,} {mask}" for t, mask in sorted(cases)]
            axis.set_xticks(range(len(ticks)), ticks)
            axis.margins(y=0.16)
            axis.tick_params(axis="both", length=0, labelsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e6e6e6", lw=0.7)
            axis.set_axisbelow(True)
            if line == 0:
                heads = hq if hq == hkv else f"{hq}/{hkv}"
                axis.set_title(f"{heads} heads, D = {d}{', causal' if on_gpu else ''}", fontsize=9.5)
            else:
                axis.set_xlabel("tokens", fontsize=8.5)
            if column == 0:
                axis.set_ylabel(f"{title}, {name_of_unit}", fontsize=8.5)
    legend = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name]) for name in names]
    labels = [NAMES[name] for name in names]
    figure.legend(legend, labels, loc="outside lower center", ncols=len(names), frameon=False, fontsize=8.5)
    figure.suptitle(
        f"Attention on {device}, kernels of {rows[0]['kernel']}: median, all passes included, higher is better",
        fontsize=10.5,
    )
    return save(figure, path.with_suffix(".png"))


def arms_of(folder: Path) -> tuple[dict[str, dict[str, list[float]]], str, list[str]]:
    """Losses by arm and seed of a folder's metrics.csv, the arm that the others are held against, and those. Raises
    SystemExit for arms, seeds or lengths that do not go together."""
    runs: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read(folder / "metrics.csv"):
        runs[row["arm"]][row["seed"]].append(float(row["loss"]))
    first = "bf16" if "bf16" in runs else next(iter(runs))
    others = [arm for arm in runs if arm != first]
    if not 1 <= len(others) <= len(OF_ARMS):
        raise SystemExit(f"{folder} has the arms {', '.join(runs)}: two to {len(OF_ARMS) + 1} are drawn")
    alone = {arm: sorted(set(runs[arm]) - set(runs[first])) for arm in others}
    if wrong := [f"{arm} seed {', '.join(seeds)}" for arm, seeds in alone.items() if seeds]:
        raise SystemExit(f"{folder} has {'; '.join(wrong)}, and no {first} of that seed")
    if not any(all(seed in runs[arm] for arm in others) for seed in runs[first]):
        raise SystemExit(f"{folder} has no seed of all of {', '.join(runs)}")
    if len(lengths := {len(losses) for seeds in runs.values() for losses in seeds.values()}) > 1:
        raise SystemExit(f"{folder} has runs of {', '.join(map(str, sorted(lengths)))} steps: one length is drawn")
    return runs, first, others


def loss(folder: Path) -> Path:
    """Loss of a folder's runs (metrics.csv), a thin line per seed and an arm's mean over the seeds that all arms have,
    over a tenth of the steps.

    Below, the difference of the arms with the same seed, beside what another seed does to BF16. Without BF16 the first
    arm is what the others are held against.
    """
    runs, first, others = arms_of(folder)
    of_all = [seed for seed in runs[first] if all(seed in runs[arm] for arm in others)]
    attentions = {arm: arm.partition(" ")[0] for arm in runs}
    free, colours = dict(OF_ARMS), {}
    for arm in sorted(others, key=lambda arm: attentions[arm] not in OF_ARMS):
        colours[arm] = free.pop(attentions[arm] if attentions[arm] in free else next(iter(free)))
    width = max(5, ceil(len(next(iter(runs[first].values()))) / TAIL))
    smooth = {
        arm: {s: [statistics.mean(x[max(0, i - width + 1) : i + 1]) for i in range(len(x))] for s, x in seeds.items()}
        for arm, seeds in runs.items()
    }
    base, steps = smooth[first], range(1, len(next(iter(smooth[first].values()))) + 1)
    figure, (above, below) = plt.subplots(
        2, 1, sharex=True, layout="constrained", figsize=(6.4, 4.6), gridspec_kw={"height_ratios": (2, 1)}
    )
    for arm in (first, *others):
        colour, style = (COLOURS["fa4"], "-") if arm == first else (colours[arm], "--")
        for seed in smooth[arm].values():
            above.plot(steps, seed, color=colour, lw=0.8, alpha=0.5)
        mean = [statistics.mean(values) for values in zip(*(smooth[arm][seed] for seed in of_all), strict=True)]
        above.plot(steps, mean, style, color=colour, lw=2, label=arm_name(arm))
    spread = [max(values) - min(values) for values in zip(*base.values(), strict=True)]
    if len(base) > 1:
        below.fill_between(
            steps, [-x for x in spread], spread, color="#c9d3df", lw=0, label=f"{arm_name(first)}, seed to seed"
        )
    words = {arm: TRAINED.get(name, name) for arm, name in attentions.items()}
    if len(set(attentions.values())) < len(runs):
        words = {arm: arm.partition(" ")[2] or name for arm, name in words.items()}
    shown = [spread]
    for arm in others:
        named = f"{words[arm]} − {words[first]}, same seed" if len(others) == 1 else None
        for number, (seed, values) in enumerate(smooth[arm].items()):
            shown.append([ours - theirs for ours, theirs in zip(values, base[seed], strict=True)])
            below.plot(steps, shown[-1], color=colours[arm], lw=1.2, label=None if number else named)
    settled = max(abs(x) for values in shown for x in values[len(steps) // TAIL :])
    ends = [end(x for values in shown[1:] for x in values) for end in (min, max)]
    below.set_ylim(min(-1.2 * settled, 1.1 * ends[0]), max(2 * settled, 1.1 * ends[1]))  # room for the legend above
    above.set_ylabel("loss, nats per token", fontsize=8.5)
    below.set_ylabel("difference" if len(others) == 1 else f"difference to\n{words[first]}", fontsize=8.5)
    below.set_xlabel("step", fontsize=8.5)
    for axis in (above, below):
        axis.tick_params(length=0, labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e6e6e6", lw=0.7)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8.5, loc="upper right", ncols=2)
        axis.margins(x=0.01)
    return save(figure, folder / "loss.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", type=Path)
    parser.add_argument("--device", help="a part of its name; default: that of the last row")
    arguments = parser.parse_args()
    if absent := [str(where) for where in arguments.paths if not where.exists()]:
        parser.error(f"{', '.join(absent)}: there is no such file or folder")
    for where in arguments.paths:
        if where.is_dir():
            loss(where)
        else:
            attention(where, arguments.device)

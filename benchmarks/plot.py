"""Pictures of benchmarks/results, drawn from the CSV rows and nothing else: python -m benchmarks.plot FILE.csv"""

from __future__ import annotations

import csv
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {
    "sage_int8": "#e07a1f", "sage_int8_deterministic": "#f6d0ab", "sage_int8_fp32": "#f0b27a",
    "sdpa_fp32": "#8fa3b8", "sdpa_bf16": "#4a6785",
    "sdpa_flash": "#b7c4d1", "sdpa_cudnn": "#7f95ab", "fa4": "#3f5b78", "cudnn_fp8": "#76a08a",
}  # fmt: skip


def attention(path: Path) -> Path:
    """Rate by length, a panel per heads, D and mask: forward above, forward + backward below. Higher is better.

    Takes the newest row of each case among those of the last row's device and commit. A backend that refused a case
    stands there by that word.
    """
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    last = {
        (r["shape"], r["mask"], r["backend"]): r
        for r in rows
        if (r["device"], r["commit"]) == (rows[-1]["device"], rows[-1]["commit"])
    }
    names = list(dict.fromkeys(backend for *_, backend in last))
    panels: dict[tuple[str, ...], list[int]] = defaultdict(list)  # (B, Hq, Hkv, D, mask) -> lengths
    for shape, mask, _ in last:
        b, hq, hkv, t, d = shape.split("x")
        if int(t) not in panels[b, hq, hkv, d, mask]:
            panels[b, hq, hkv, d, mask].append(int(t))
    on_gpu = max(float(r["forward_gflops"] or 0) for r in last.values()) > 1e4
    unit, name_of_unit = (1e3, "TFLOP/s") if on_gpu else (1.0, "GFLOP/s")

    widths = [len(lengths) + 0.3 for lengths in panels.values()]
    figure, axes = plt.subplots(
        2, len(panels), squeeze=False, sharey="row", sharex="col", layout="constrained",
        figsize=(max(8.0, 1.0 + 0.24 * len(names) * sum(widths)), 6.4), gridspec_kw={"width_ratios": widths},
    )  # fmt: skip
    bar = 0.86 / len(names)
    text = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7}
    for column, ((b, hq, hkv, d, mask), lengths) in enumerate(panels.items()):
        lengths.sort()
        for line, (key, title) in enumerate((("forward", "forward"), ("both", "forward + backward"))):
            axis = axes[line, column]
            for j, name in enumerate(names):
                for i, t in enumerate(lengths):
                    row = last.get((f"{b}x{hq}x{hkv}x{t}x{d}", mask, name))
                    place = i + (j - (len(names) - 1) / 2) * bar
                    if row is None or not row[f"{key}_gflops"]:
                        if row is not None:
                            axis.text(place, 0, " refused", color="#999999", **text)
                        continue
                    rate = float(row[f"{key}_gflops"]) / unit
                    axis.bar(place, rate, 0.92 * bar, color=COLOURS.get(name, "#cccccc"))
                    axis.text(place, rate, f" {rate:.0f}", color="#333333", **text)
            axis.set_xticks(range(len(lengths)), [f"T = {t}" if len(lengths) == 1 else str(t) for t in lengths])
            axis.set_xlim(-0.6, len(lengths) - 0.4)
            axis.margins(y=0.16)
            axis.tick_params(axis="x", length=0)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(axis="y", color="#e6e6e6", lw=0.7)
            axis.set_axisbelow(True)
            if line == 0:
                heads = hq if hq == hkv else f"{hq}/{hkv}"
                axis.set_title(f"{'' if b == '1' else f'B {b}, '}{heads} heads, D {d}\n{mask}", fontsize=9)
            elif len(lengths) > 1:
                axis.set_xlabel("tokens")
            if column == 0:
                axis.set_ylabel(f"{title}\n{name_of_unit}")
            else:
                axis.spines["left"].set_visible(False)
                axis.tick_params(axis="y", length=0)
    legend = [plt.Rectangle((0, 0), 1, 1, color=COLOURS.get(name, "#cccccc")) for name in names]
    figure.legend(legend, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"Attention on {rows[-1]['device']} (median, higher is better)", fontsize=11)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    print(target)
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        attention(Path(name))

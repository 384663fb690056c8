"""Pictures of benchmarks/results, drawn from the CSV rows and nothing else: python -m benchmarks.plot FILE.csv"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

COLOURS = {"sage_int8": "#e07a1f", "sage_int8_fp32": "#f0b27a", "sdpa_fp32": "#8fa3b8", "sdpa_bf16": "#4a6785"}


def attention(path: Path) -> Path:
    """Milliseconds by shape and mask, forward and forward + backward; the last commit's rows in the file."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    last = {
        (r["shape"], r["mask"], r["backend"]): r
        for r in rows
        if (r["device"], r["commit"]) == (rows[-1]["device"], rows[-1]["commit"])
    }
    cases = list(dict.fromkeys((shape, mask) for shape, mask, _ in last))
    names = list(dict.fromkeys(backend for *_, backend in last))
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.9 + 0.28 * len(cases) * len(names)), sharey=True)
    for axis, key, title in zip(axes, ("forward_ms", "both_ms"), ("forward", "forward + backward"), strict=True):
        for i, name in enumerate(names):
            values = [float(last[(*case, name)][key]) for case in cases]
            places = [c * (len(names) + 1) + i for c in range(len(cases))]
            axis.plot(values, places, "o", ms=8, color=COLOURS.get(name), label=name)
            for value, place in zip(values, places, strict=True):
                text = {"textcoords": "offset points", "va": "center", "fontsize": 8}
                axis.annotate(f"{value:.0f}", (value, place), (8, 0), **text)
        axis.set_title(title)
        axis.set_xlabel("milliseconds (median, log scale)")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", color="#dddddd", lw=0.7)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    axes[0].set_yticks(
        [c * (len(names) + 1) + (len(names) - 1) / 2 for c in range(len(cases))], [f"{s}\n{m}" for s, m in cases]
    )
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"Attention, B x Hq x Hkv x T x D, on {rows[-1]['device']}", fontsize=11)
    figure.subplots_adjust(left=0.13, right=0.98, bottom=0.2, top=0.86, wspace=0.06)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=130)
    plt.close(figure)
    print(target)
    return target


if __name__ == "__main__":
    for name in sys.argv[1:]:
        attention(Path(name))

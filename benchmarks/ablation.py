"""What each choice of the `sage` preset is worth: the reference with one choice changed at a time.

    python -m benchmarks.ablation        # T = 2048, D = 64, causal; rows of docs/LOG.md

Relative L2 errors of O, dQ, dK, dV against FP64, as in accuracy.py.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

from benchmarks.common import RESULTS, conditions, write
from sagetrain.ops import reference
from tests.kernelkit import NAMES, Case, error, exact, run

VARIANTS = {
    "sage": reference.SAGE,
    "no rotation": replace(reference.SAGE, rotate=False),
    "forward tile of 64 keys": replace(reference.SAGE, forward_keys=64),
    "forward tile of 128 keys": replace(reference.SAGE, forward_keys=128),
    "backward tile of 128 queries": replace(reference.SAGE, queries=128),
    "backward tile of 128 keys": replace(reference.SAGE, keys=128),
    "paper": reference.PAPER,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    start, rows = conditions("cpu"), []
    for kind in ("normal", "outlier", "heavy", "uniform"):
        case = Case(hq=2, hkv=2, tq=args.tokens, tk=args.tokens, kind=kind, dtype=torch.float32)
        truth = exact(case)
        for name, preset in VARIANTS.items():
            got = run(lambda *x, p=preset, **o: reference.attention(*x, preset=p, **o), case)
            errors = {part: round(error(got[part], truth[part]), 5) for part in NAMES}
            rows.append(start | {"case": kind, "d": case.d, "tokens": args.tokens, "variant": name} | errors)
            print(
                f"{kind:8} {name:29} " + "  ".join(f"{part} {value:.4f}" for part, value in errors.items()), flush=True
            )
    if not args.no_save:
        write(rows, RESULTS / "ablation-cpu.csv")


if __name__ == "__main__":
    main()

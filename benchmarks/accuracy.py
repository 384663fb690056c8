"""Error of the presets and of the compiled kernel, against exact FP64: the table of docs/numerics.md.

    python -m benchmarks.accuracy                   # T = 2048, 4 heads, about ten minutes on 2 cores
    python -m benchmarks.accuracy --device cuda     # the GPU kernel, under a minute; BF16, or --dtype float16

Relative L2 error of O, dQ, dK, dV for D = 64 and 128, causal and full, GQA, ragged lengths, sigma(q, k) = 1 and 3,
outlier channels, biased K and V, heavy-tailed dO rows, near-uniform attention. Inputs and results are FP32 on the CPU,
so that the rounding of a 16-bit result does not hide the scheme's error; GPU kernels take 16 bits only, and there the
presets round their results as the kernel does. The bars: `sage` at most 0.6x of `paper` at sigma 1 and 0.8x at sigma 3
(judged in FP32); the kernel at most 1.5x of the plain reference of its preset.
The `sage_*` columns are of the preset that the kernel computes: `sage_sm90` for that of compute capability 9.0, in its
rows from commit de9119df602f on.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch

import sagetrain
from benchmarks.common import RESULTS, conditions, kernel_file, write
from tests.kernelkit import NAMES, RATIO, Case, error, exact, plain, run


def cases(t: int, device: str, dtype: torch.dtype) -> list[tuple[str, Case]]:
    base = Case(hq=4, hkv=4, tq=t, tk=t, dtype=dtype, device=device)
    grid = [
        (f"sigma {s}, {'causal' if c else 'full'}", replace(base, sigma=s, is_causal=c))
        for s in (1, 3)
        for c in (True, False)
    ]
    kinds = [(kind, replace(base, kind=kind)) for kind in ("outlier", "biased", "heavy", "uniform")]
    shapes = [("GQA 4/1", replace(base, hkv=1)), ("ragged", replace(base, tq=t - 37, tk=t + 91))]
    return [(name, replace(c, d=d)) for d in (64, 128) for name, c in grid + kinds + shapes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, on a GPU bfloat16"
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    start, rows, lines = conditions(args.device), [], []
    for name, case in cases(args.tokens, args.device, getattr(torch, dtype)):
        truth = exact(case)
        results = {"kernel": run(sagetrain.attention, case)}
        results["paper"] = run(lambda *x, **o: plain(*x, preset="paper", **o), case)
        results["sage"] = run(plain, case)  # as the kernel for this device computes it
        cells = []
        for part in NAMES:
            paper, sage, kernel = (error(results[n][part], truth[part]) for n in ("paper", "sage", "kernel"))
            bar = 0.8 if case.sigma == 3 else 0.6
            rows.append(start | {
                "case": name, "d": case.d, "tokens": args.tokens, "dtype": dtype, "result": part,
                "paper_error": round(paper, 5), "sage_error": round(sage, 5), "kernel_error": round(kernel, 5),
                "sage_x_paper": round(sage / paper, 3), "bar": bar,
                "kernel_x_sage": round(kernel / sage, 3), "kernel_bar": RATIO,
            })  # fmt: skip
            cells.append(
                f"{paper:.4f} / {sage:.4f} / {kernel:.4f} ({sage / paper:.2f}x{'' if sage <= bar * paper else ' over'})"
                + ("" if kernel <= RATIO * sage else f" kernel over: {kernel / sage:.2f}x")
            )
        lines.append(f"| {name} | {case.d} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    print("\n| case | D | O: paper / sage / kernel | dQ | dK | dV |\n|---|---|---|---|---|---|\n" + "\n".join(lines))
    if not args.no_save:
        write(rows, RESULTS / "accuracy-cpu.csv" if args.device == "cpu" else kernel_file("accuracy", args.device))


if __name__ == "__main__":
    main()

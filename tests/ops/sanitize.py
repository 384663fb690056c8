"""A few small, awkward calls, forward and backward once each, for compute-sanitizer (pytest does not see it).

    python tests/ops/sanitize.py                                     # seconds; also checks the numbers
    compute-sanitizer --tool memcheck --padding 4096 python tests/ops/sanitize.py
    compute-sanitizer --tool racecheck python tests/ops/sanitize.py packed
    compute-sanitizer --tool initcheck python tests/ops/sanitize.py
    compute-sanitizer --tool synccheck python tests/ops/sanitize.py

A word selects the cases with it in their name; compute-sanitizer's own `--error-exitcode 1` makes findings count.
`--device cpu` tries the script itself where there is no GPU.

Every tensor is an allocation of its own (no caching), so that one byte too far is seen and fresh memory counts as not
initialised. Inputs are made on the CPU and results judged there, which leaves next to no kernels of torch in between.
"""

import argparse
import itertools
import os
import sys
from dataclasses import replace
from pathlib import Path

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # torch reads it when it allocates for the first time
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402

import sagetrain  # noqa: E402
from tests.kernelkit import NAMES, RATIO, Case, deterministic, error, exact, given, packed, plain, preset_of, run  # noqa: E402

BASE = Case(hq=2, hkv=1, tq=130, tk=130)
CASES = {
    "causal": BASE,
    "causal, d 128, fp16": replace(BASE, d=128, dtype=torch.float16),
    "full, d 40, fp16": replace(BASE, d=40, is_causal=False, tq=200, tk=300, dtype=torch.float16),
    "full, d 128, longer than a tile": replace(BASE, hq=1, d=128, is_causal=False, tq=65, tk=300),
    "causal, more queries than keys": replace(BASE, tq=200, tk=70, d=96),
    "one query": replace(BASE, b=2, hq=4, hkv=2, tq=1, tk=257),
    "one token": replace(BASE, tq=1, tk=1, d=8),
    "packed": packed(BASE, [1, 0, 64, 70], [1, 0, 64, 70], lead=3, tail=5),
    "packed, one-sided, d 128, fp16": packed(
        replace(BASE, d=128, is_causal=False, dtype=torch.float16), [40, 0, 130], [0, 33, 129], tail=1
    ),
    "packed, nothing": packed(BASE, [0, 0], [0, 0], lead=2, tail=2),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="")
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    for name, case in CASES.items():
        if args.word not in name:
            continue
        results = {"dense": case.tensors()}
        if case is BASE:  # rows of odd length, the first not on 16 bytes: the last row ends where the allocation does
            results["strided"] = [torch.nn.functional.pad(x, (1, 0)) for x in case.tensors()]
        for (layout, tensors), attend in itertools.product(results.items(), (sagetrain.attention, deterministic)):
            tensors = [x.to(args.device)[..., -case.d :] for x in tensors]
            got = run(attend, given(replace(case, device=args.device), *tensors))
            got = {n: x.cpu() for n, x in got.items()}  # waits for the kernels
            expected = run(lambda *x, **o: plain(*x, preset=preset_of(args.device), **o), case)
            truth = exact(case)
            what = f"{name}, {layout}, {attend.__name__}"
            for n in NAMES:
                bar = RATIO * max(error(expected[n], truth[n]), torch.finfo(case.dtype).eps)
                found = error(got[n], truth[n])
                assert got[n].isfinite().all() and found <= bar, f"{what}: {n} error {found:.2e} > {bar:.2e}"
            print(f"{what}: ok", flush=True)


if __name__ == "__main__":
    main()

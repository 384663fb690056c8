"""Device time of every kernel of an attention call: what quantisation takes beside the main loops.

    python -m benchmarks.passes                          # the shapes of docs/sm90-*.md, a few seconds
    python -m benchmarks.passes --shapes 1x32x8x8192x64

Method: torch's profiler, median over the calls, forward and backward apart; causal, BF16, memory as in attention.py.
One row per kernel, in benchmarks/results/passes-<kernel>.csv. What sm80 sets to zeros by memset is no kernel: no row.

Columns: `us`; and for the forward's main kernel `bound_us` and `share_of_bound`: the time that the exponentials alone
take, 16 a clock and multiprocessor at the highest clock that the device reports (docs/sm90-forward.md), over `us`.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections import defaultdict
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

import sagetrain
from benchmarks.common import conditions, kernel_file, write

SHAPES = ["1x32x8x8192x64", "1x32x8x16384x64", "1x16x16x8192x128", "1x16x16x16384x128"]  # B x Hq x Hkv x T x D
CALLS = 9


def kernel_times(call: Callable[[], object]) -> dict[str, float]:
    """Median microseconds of our kernels by name, without namespaces and template arguments; each runs once a call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(CALLS):
            call()
        torch.cuda.synchronize()
    times = defaultdict(list)
    for event in profiler.events():
        name = re.search(r"sagetrain::.*?(\w+)_kernel[<(]", event.name)
        if name and event.device_type.name == "CUDA" and event.device_time_total:
            times[name[1]].append(event.device_time_total)
    return {name: statistics.median(values) for name, values in times.items()}


def exponential_bound(shape: tuple[int, ...]) -> float:
    """Microseconds that the exponentials of a causal forward take the special function units."""
    b, hq, _, t, _ = shape
    device = torch.cuda.get_device_properties(0)
    return b * hq * t * (t + 1) / 2 / (16 * device.multi_processor_count * device.clock_rate * 1e-3)  # clock_rate: kHz


def measure(shape: tuple[int, ...]) -> list[dict]:
    b, hq, hkv, t, d = shape
    torch.manual_seed(0)
    q, k, v, d_o = (
        torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for h in (hq, hkv, hkv, hq)
    )
    with torch.no_grad():
        forward = kernel_times(lambda: sagetrain.attention(q, k, v, is_causal=True))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    o = sagetrain.attention(*leaves, is_causal=True)
    backward = kernel_times(lambda: torch.autograd.grad(o, leaves, d_o, retain_graph=True))
    rows = [{"direction": "forward", "pass": name, "us": round(us, 1)} for name, us in forward.items()]
    for row in rows:
        if row["pass"] == "forward":
            bound = exponential_bound(shape)
            row |= {"bound_us": round(bound, 1), "share_of_bound": round(bound / row["us"], 3)}
    return rows + [{"direction": "backward", "pass": name, "us": round(us, 1)} for name, us in backward.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="BxHqxHkvxTxD")
    args = parser.parse_args()
    start, rows = conditions("cuda"), []
    for shape in args.shapes:
        for row in measure(tuple(map(int, shape.split("x")))):
            rows.append(start | {"shape": shape} | row)
            share = f"{row['share_of_bound']} of its bound" if "share_of_bound" in row else ""
            print(f"{shape:20} {row['direction']:9} {row['pass']:16} {row['us']:8.1f} us  {share}", flush=True)
    write(rows, kernel_file("passes", "cuda"))


if __name__ == "__main__":
    main()

"""Speed of attention, forward and forward + backward, against the best BF16/FP32 attention on the same device.

    python -m benchmarks.attention                      # the CPU grid of the README
    python -m benchmarks.attention --shapes 1x32x8x8192x64 --device cuda

Backends are interleaved round by round in one process, each measured with everything it needs (quantisation and
smoothing included), medians reported. Rows go to benchmarks/results/attention-<kernel>.csv, a picture beside them.
FLOPs: forward 4 B H T^2 D, half of it when causal; backward 2.5 times the forward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import sagetrain
from benchmarks import plot
from benchmarks.common import RESULTS, conditions, write


@dataclass(frozen=True)
class Backend:
    """`call(q, k, v, is_causal)`; `dtype` of its inputs; the devices it runs on."""

    name: str
    dtype: torch.dtype
    devices: tuple[str, ...]
    call: Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def sdpa(*backends: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    def call(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        if not backends:
            return attend(q, k, v, is_causal=is_causal, enable_gqa=True)
        with sdpa_kernel(list(backends)):
            return attend(q, k, v, is_causal=is_causal, enable_gqa=True)

    return call


BACKENDS = [
    Backend("sage_int8", torch.bfloat16, ("cpu", "cuda"), lambda q, k, v, c: sagetrain.attention(q, k, v, is_causal=c)),
    Backend("sage_int8_fp32", torch.float32, ("cpu",), lambda q, k, v, c: sagetrain.attention(q, k, v, is_causal=c)),
    Backend("sdpa_fp32", torch.float32, ("cpu",), sdpa()),
    Backend("sdpa_bf16", torch.bfloat16, ("cpu",), sdpa()),
    Backend("sdpa_flash", torch.bfloat16, ("cuda",), sdpa(SDPBackend.FLASH_ATTENTION)),
    Backend("sdpa_cudnn", torch.bfloat16, ("cuda",), sdpa(SDPBackend.CUDNN_ATTENTION)),
]
SHAPES = {
    "cpu": ["1x32x32x2048x64", "1x16x16x2048x128"],
    "cuda": ["1x32x8x8192x64", "1x32x8x16384x64", "1x16x16x8192x128"],
}


def measure(
    backends: list[Backend], shape: tuple[int, ...], is_causal: bool, device: str, rounds: int
) -> dict[str, dict]:
    """Median milliseconds by backend: {"forward", "both"}; one warm-up, then `rounds` interleaved rounds."""
    b, hq, hkv, t, d = shape
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    torch.manual_seed(0)
    source = [torch.randn(b, h, t, d) for h in (hq, hkv, hkv, hq)]
    inputs = {x.name: [s.to(device, x.dtype) for s in source] for x in backends}
    times: dict[str, dict[str, list[float]]] = {x.name: {"forward": [], "both": []} for x in backends}
    for step in range(rounds + 1):
        for x in backends:
            q, k, v, d_o = inputs[x.name]
            wait()
            start = time.perf_counter()
            with torch.no_grad():
                x.call(q, k, v, is_causal)
            wait()
            middle = time.perf_counter()
            leaves = [y.detach().requires_grad_() for y in (q, k, v)]
            torch.autograd.grad(x.call(*leaves, is_causal), leaves, d_o)
            wait()
            if step:
                times[x.name]["forward"].append(1e3 * (middle - start))
                times[x.name]["both"].append(1e3 * (time.perf_counter() - middle))
    return {name: {k: statistics.median(v) for k, v in t.items()} for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", help="B x Hq x Hkv x T x D, e.g. 1x32x8x8192x64")
    parser.add_argument("--masks", nargs="+", default=["causal", "full"], choices=["causal", "full"])
    parser.add_argument("--backends", nargs="+", choices=[x.name for x in BACKENDS])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    backends = [x for x in BACKENDS if args.device in x.devices and (args.backends is None or x.name in args.backends)]
    rows = []
    for text in args.shapes or SHAPES[args.device]:
        shape = tuple(int(n) for n in text.split("x"))
        b, hq, _, t, d = shape
        for mask in args.masks:
            result = measure(backends, shape, mask == "causal", args.device, args.rounds)
            flop = 4 * b * hq * t * t * d / (2 if mask == "causal" else 1)
            base = {k: {n: result[n][k] for n in result if not n.startswith("sage")} for k in ("forward", "both")}
            for name, times in result.items():
                row = conditions(args.device) | {"backend": name, "shape": text, "mask": mask, "rounds": args.rounds}
                for key, work in (("forward", flop), ("both", 3.5 * flop)):
                    row |= {f"{key}_ms": round(times[key], 2), f"{key}_gflops": round(work / times[key] / 1e6, 1)}
                    row |= {f"{key}_x_{n}": round(base[key][n] / times[key], 3) for n in base[key]}
                rows.append(row)
                speed = f"forward {times['forward']:9.1f} ms   forward+backward {times['both']:9.1f} ms"
                print(f"{text:>18} {mask:6} {name:15} {speed}", flush=True)
    if not args.no_save:
        path = RESULTS / f"attention-{sagetrain.kernel_name(args.device).replace('/', '-')}.csv"
        write(rows, path)
        plot.attention(path)


if __name__ == "__main__":
    main()

"""Speed of attention, forward and backward, and what it keeps between them, against the best attention on the device.

    python -m benchmarks.attention                      # the grid of docs/cpu.md
    python -m benchmarks.attention --device cuda        # under three minutes on an H100
    python -m benchmarks.attention --device cuda --shapes 1x32x8x8192x64 --masks causal --backends sage_int8 sdpa_cudnn

Method: backends are interleaved round by round in one process, each measured with everything it needs (quantisation
and smoothing included), medians reported. Tensors are [B, H, T, D] views of [B, T, H, D] memory, as Hugging Face models
make them; on a GPU the time is the device's own (`common.laps`). The peers are in peers.py, how to install them in
docs/install.md. One that refuses a shape gets a row that says why; one that is not installed is named and left out.

Columns: `forward_ms` without gradients; `backward_ms`; `both_ms`, the forward that keeps what the backward needs, and
the backward. FLOPs: forward 4 B H T^2 D, half of it when causal; backward 2.5 times the forward.
    saved_bytes         memory that the forward keeps for the backward
    saved_extra_bytes   the part of it that is not q, k, v or o
    cosine              lowest cosine similarity of O, dQ, dK, dV with those of the first peer: a check, no accuracy

Rows go to benchmarks/results/attention-<kernel>.csv, a picture beside them (where matplotlib is missing:
python -m benchmarks.plot FILE, later and anywhere).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend

import sagetrain
from benchmarks import peers
from benchmarks.common import conditions, kernel_file, laps, write


@dataclass(frozen=True)
class Backend:
    """`make()` gives `call(q, k, v, is_causal)`; `dtype` of its inputs; the devices it runs on."""

    name: str
    dtype: torch.dtype
    devices: tuple[str, ...]
    make: Callable[[], peers.Call]

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("sage")


def sage(deterministic: bool = False) -> peers.Call:
    return lambda q, k, v, is_causal: sagetrain.attention(q, k, v, is_causal=is_causal, deterministic=deterministic)


BACKENDS = [
    Backend("sage_int8", torch.bfloat16, ("cpu", "cuda"), sage),
    Backend("sage_int8_deterministic", torch.bfloat16, ("cuda",), lambda: sage(deterministic=True)),
    Backend("sage_int8_fp32", torch.float32, ("cpu",), sage),
    Backend("sdpa_fp32", torch.float32, ("cpu",), peers.sdpa),
    Backend("sdpa_bf16", torch.bfloat16, ("cpu",), peers.sdpa),
    Backend("sdpa_flash", torch.bfloat16, ("cuda",), lambda: peers.sdpa(SDPBackend.FLASH_ATTENTION)),
    Backend("sdpa_cudnn", torch.bfloat16, ("cuda",), lambda: peers.sdpa(SDPBackend.CUDNN_ATTENTION)),
    Backend("fa4", torch.bfloat16, ("cuda",), peers.fa4),
    Backend("cudnn_fp8", torch.float8_e4m3fn, ("cuda",), peers.cudnn_fp8),
]
MASKS = ("causal", "full")
LENGTHS = (1024, 2048, 4096, 8192, 16384)
CASES = {  # shape (B x Hq x Hkv x T x D) and mask
    "cpu": list(product(("1x32x32x2048x64", "1x16x16x2048x128"), MASKS)),
    "cuda": [
        (f"1x{heads}x{t}x{d}", mask)
        for heads, d in (("32x8", 64), ("16x16", 128))
        for mask, lengths in (("causal", LENGTHS), ("full", (8192,)))
        for t in lengths
    ]
    + [("8x32x8x1024x64", "causal"), ("8x16x16x1024x128", "causal")],  # short rows, 8192 tokens in all
}
WORK = {"forward": 1.0, "backward": 2.5, "both": 3.5}


def first_pass(
    call: peers.Call, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, is_causal: bool
) -> tuple[dict[str, int], list[Tensor]]:
    """Warms `call` up -> (bytes that its forward kept for its backward, [o, d_q, d_k, d_v])."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return x.detach()  # an output that is its own saved value would never be freed

    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with saved_tensors_hooks(keep, lambda x: x):
        o = call(*leaves, is_causal)
    model = {x.untyped_storage().data_ptr() for x in (*leaves, o)}
    extra = sum(size for place, size in kept.items() if place not in model)
    gradients = torch.autograd.grad(o, leaves, d_o)
    return {"saved_bytes": sum(kept.values()), "saved_extra_bytes": extra}, [o.detach(), *gradients]


def steps(call: peers.Call, q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, is_causal: bool) -> Iterator[str]:
    """The laps of one round."""
    with torch.no_grad():
        call(q, k, v, is_causal)
    yield "forward"
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = call(*leaves, is_causal)
    yield "keeping forward"
    torch.autograd.grad(o, leaves, d_o)
    yield "backward"


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """The lowest cosine similarity of the pairs (free of scale: FP8 results come multiplied by theirs)."""
    pairs = [(x.flatten().float(), y.flatten().float()) for x, y in zip(a, b, strict=True)]
    return min(float(x @ y / (x.norm() * y.norm())) for x, y in pairs)


def measure(
    calls: dict[Backend, peers.Call], shape: tuple[int, ...], is_causal: bool, device: str, rounds: int
) -> dict[str, dict[str, float | str]]:
    """By backend: median milliseconds {"forward", "backward", "both"} and what first_pass says, or {"refused": why}.

    One pass and one round to warm up, then `rounds` interleaved rounds.
    """
    b, hq, hkv, t, d = shape
    torch.manual_seed(0)
    source = [torch.randn(b, t, h, d, device=device).transpose(1, 2) for h in (hq, hkv, hkv, hq)]
    found: dict[str, dict[str, float | str]] = {}
    results: dict[str, list[Tensor]] = {}
    ready: dict[str, Callable[[], Iterator[str]]] = {}
    for x, call in calls.items():
        inputs = [s.to(x.dtype) for s in source]
        try:
            found[x.name], results[x.name] = first_pass(call, *inputs, is_causal)
        except Exception as error:  # whatever type the peer refuses with
            if x.is_ours:
                raise
            found[x.name] = {"refused": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
            continue
        ready[x.name] = lambda call=call, inputs=inputs: steps(call, *inputs, is_causal)
    yardstick = next((results[x.name] for x in calls if x.name in results and not x.is_ours), None)
    for name, result in results.items():
        found[name] |= {} if yardstick is None else {"cosine": round(cosine(result, yardstick), 5)}
    results.clear()
    times: dict[str, list[dict[str, float]]] = {name: [] for name in ready}
    for step in range(rounds + 1):
        for name, work in ready.items():
            lap = laps(work(), device)
            if step:
                times[name].append(lap | {"both": lap["keeping forward"] + lap["backward"]})
    for name, laps_of in times.items():
        found[name] |= {key: statistics.median(lap[key] for lap in laps_of) for key in WORK}
    return found


def row(result: dict, peer_results: dict[str, dict], flop: float) -> dict[str, float | str]:
    """The measured columns of one backend: times, rates, and how many times faster than each peer it is."""
    if "refused" in result:
        return {"refused": result["refused"]}
    columns: dict[str, float | str] = {}
    for key, work in WORK.items():
        rate = work * flop / result[key] / 1e6
        columns |= {f"{key}_ms": round(result[key], 4), f"{key}_gflops": round(rate, 1)}
        columns |= {f"{key}_x_{n}": round(p[key] / result[key], 3) for n, p in peer_results.items() if key in p}
    return columns | {key: result[key] for key in ("saved_bytes", "saved_extra_bytes", "cosine") if key in result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", nargs="+", help="B x Hq x Hkv x T x D, e.g. 1x32x8x8192x64")
    parser.add_argument("--masks", nargs="+", choices=MASKS)
    parser.add_argument("--backends", nargs="+", choices=[x.name for x in BACKENDS])
    parser.add_argument("--rounds", type=int, help="default: 7, on a GPU 15")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rounds = args.rounds or (15 if args.device == "cuda" else 7)
    calls = {}
    for x in BACKENDS:
        if args.device in x.devices and (args.backends is None or x.name in args.backends):
            try:
                calls[x] = x.make()
            except Exception as error:  # not installed, or not with this torch
                if args.backends:
                    raise
                print(f"{x.name} is left out: {type(error).__name__}: {error}", flush=True)
    cases = [c for c in CASES[args.device] if args.masks is None or c[1] in args.masks]
    if args.shapes:
        cases = list(product(args.shapes, args.masks or MASKS))
    start, rows = conditions(args.device), []
    for text, mask in cases:
        shape = tuple(int(n) for n in text.split("x"))
        b, hq, _, t, d = shape
        flop = 4 * b * hq * t * t * d / (2 if mask == "causal" else 1)
        results = measure(calls, shape, mask == "causal", args.device, rounds)
        peer_results = {x.name: results[x.name] for x in calls if not x.is_ours}
        for name, result in results.items():
            case = {"backend": name, "shape": text, "mask": mask, "layout": "BTHD", "rounds": rounds}
            rows.append(start | case | row(result, peer_results, flop))
            said = f"refused: {result.get('refused')}"
            if "refused" not in result:
                said = "   ".join(f"{key} {result[key]:9.3f} ms" for key in WORK)
                said += f"   saved {result['saved_bytes'] / 2**20:7.1f} MiB   cosine {result.get('cosine', 1):.4f}"
            print(f"{text:>18} {mask:6} {name:23} {said}", flush=True)
    if args.no_save:
        return
    path = kernel_file("attention", args.device)
    write(rows, path)
    try:
        from benchmarks import plot
    except ImportError as error:
        print(f"no picture here ({error}); anywhere else: python -m benchmarks.plot {path}")
    else:
        plot.attention(path)


if __name__ == "__main__":
    main()

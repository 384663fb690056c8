"""Speed and memory of a recipe's training step, attention by attention, and where its time goes.

    python -m benchmarks.pretrain --set data.path=FILE model.tokenizer=FOLDER   # a GPU: 8K and 16K, packed and plain
    python -m benchmarks.pretrain --lengths 16384 --arms sage_int8 varlen --set memory=24gb data.path=FILE
    python -m benchmarks.pretrain --device cpu --recipe quickstart --lengths 64 --rounds 1 --no-save

`--set` takes overrides of the recipe, so what is measured is what the recipe trains: its model with random weights, its
loss, compilation, checkpointing and optimizer, real rows of its data. "packed" rows are filled with documents that do
not see each other, "plain" rows are one causal sequence each.

Method: one model serves all arms, which differ in the name of the attention only; each round every arm computes the
same two micro-batches (the second adds to gradients that are there) and an update. Times are medians over the rounds,
of the device between CUDA events. A step is that of the recipe, with all its micro-batches:

    step_ms = first_ms + (trainer.accumulate_grad_batches - 1) * micro_ms + optimizer_ms

Left out are what a run does besides: it clips the gradient, copies batches to the device, logs and saves.

Arms are those of conf/attention; for plain rows also `sdpa_flash` (FlashAttention-2 as torch has it). An arm that
cannot run is a row with its reason. Each has compiled layers of its own (`compile_apart`).

Columns: first_ms, micro_ms, optimizer_ms, step_ms, tokens_per_s, mfu (docs/pretraining.md has the formula), x_<arm>
(how many times its tokens/s), peak_gib (of a step, weights and moments included), loss (of the first micro-batch before
any update), compile_s (the first micro-batch), graph_breaks (a place counts for every function that it breaks, and each
time one is compiled), ran (what really computed attention), handicap (why it is no baseline).
With --breakdown: ms_<kind>, a micro-batch and an update by what their kernels do, from torch's profiler; ms_idle is
what is left of the time on the clock, which the profiler makes longer.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch.nn.attention import SDPBackend
from transformers import AutoModelForCausalLM

import sagetrain.data
from benchmarks import peers
from benchmarks.common import conditions, kernel_file, laps, write
from sagetrain.__main__ import compose
from sagetrain.integrations import bf16
from sagetrain.ops import schemes
from sagetrain.training.checks import check_settings
from sagetrain.training.flops import model_flops, peak_flops
from sagetrain.training.layers import compile_layers
from sagetrain.training.module import model_config, optimizer_of, prepare
from sagetrain.training.train import attention_file

PLAIN_PEERS = {  # arm -> what it runs, and what makes it; called here with no mask, so that nobody needs to watch them
    "sdpa_flash": ("SDPA FlashAttention-2", lambda: peers.sdpa(SDPBackend.FLASH_ATTENTION)),
}
ARMS = {
    "packed": ("sage_int8", "fa4", "fa3", "fa2", "varlen", "flex", "sdpa"),
    "plain": ("sage_int8", "fa4", "sdpa_flash", "sdpa_cudnn", "sdpa"),
}
KINDS = {  # of kernels, by their names; the first that matches
    "attention backward": r"sagetrain.*backward_kernel|triton_tem.*flex_attention.*backward|sdpa.*bprop|bwd",
    "attention forward": r"sagetrain.*forward_kernel|triton_tem.*flex_attention|flash.*fwd|fmha.*fwd|sdpa.*fprop",
    "quantise": r"sagetrain",
    "products": r"nvjet|gemm|cutlass|xmma|cublas",
    "copies": r"^Mem",
}
SPANS = {"loss": "loss", "Optimizer.step": "optimizer"}  # beginning of a span's name -> whose all within it is


def implementation(arm: str, data: str, device: torch.device) -> str:
    """The name for transformers of an arm. Raises what its library raises where it cannot run."""
    if data == "plain" and arm in PLAIN_PEERS and device.type == "cuda":
        return peer(arm)
    return bf16.choose(OmegaConf.load(attention_file(arm)).implementation, device)


def plain_name(arm: str) -> str:
    """transformers takes any name with "flash" in it for a package to load."""
    return f"plain_{arm.replace('flash', 'fa2')}"


def ran(how: str) -> tuple[str, str | None]:
    """What computed attention since bf16.forget(), and why it is no baseline or None."""
    direct = {plain_name(arm): what for arm, (what, _) in PLAIN_PEERS.items()}
    return (direct[how], None) if how in direct else bf16.ran(how)


def peer(arm: str) -> str:
    """Registers one of PLAIN_PEERS, which takes no mask."""
    from transformers import AttentionInterface, AttentionMaskInterface

    call, name = PLAIN_PEERS[arm][1](), plain_name(arm)

    def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **_: Any) -> tuple[Any, None]:
        if mask is not None:
            raise RuntimeError(f"{arm} was given a mask tensor: it would measure something else")
        q, k, v = (x.to(torch.bfloat16) for x in (q, k, v))
        return call(q, k, v, True).transpose(1, 2), None

    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, lambda *args, **options: None)
    return name


def build(cfg: DictConfig, device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """The recipe's model, prepared as the recipe prepares it, and its optimizer."""
    check_settings(cfg)
    dtype = torch.bfloat16 if cfg.trainer.precision == "bf16-true" else torch.float32
    torch.manual_seed(cfg.seed)
    with device:
        model = AutoModelForCausalLM.from_config(model_config(cfg.model), dtype=dtype).train()
    prepare(model, OmegaConf.merge(cfg.model, {"compile": False}))
    if cfg.model.compile:
        compile_apart(model)
    groups = [{"params": list(model.parameters()), "weight_decay": cfg.optim.weight_decay}]
    return model, optimizer_of(cfg.optim, groups, fused=device.type == "cuda")


def compile_apart(model: torch.nn.Module) -> None:
    """Compiles the layers anew for each attention.

    Dynamo finds what it compiled by the code of a function, and takes the pieces of a layer that one attention broke
    for the next one too: nothing in those around the attention says which it was. Hence a backend for each.
    """
    backends: dict[str, Any] = defaultdict(lambda: partial(torch._dynamo.lookup_backend("inductor")))

    def by_attention(forward: Callable[..., Any]) -> Callable[..., Any]:
        compiled = cache(lambda attention: torch.compile(forward, backend=backends[attention]))
        return lambda *args, **inputs: compiled(model.config._attn_implementation)(*args, **inputs)

    compile_layers(model, by_attention)


def batches(cfg: DictConfig, count: int, device: torch.device) -> list[dict[str, Any]]:
    tokenizer = sagetrain.data.build_tokenizer(cfg.model.tokenizer)
    stream = sagetrain.data.build(cfg.data, tokenizer, cfg.data.seq_len, cfg.seed, cfg.data.batch_size).stream
    found = [batch for batch, _ in zip(stream.batches(stream.start, 0, 1), range(count), strict=False)]
    return [{key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in batch.items()} for batch, _ in found]


class Arm:
    """One attention on the shared model."""

    def __init__(self, name: str, how: str, model: torch.nn.Module, optimizer: Any, precision: str) -> None:
        self.name, self.how, self.model, self.optimizer = name, how, model, optimizer
        self.device, self.mixed = next(model.parameters()).device.type, precision == "bf16-mixed"
        self.times: dict[str, list[float]] = defaultdict(list)
        self.peak, self.found = 0.0, {}

    def micro(self, batch: dict[str, Any]) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.mixed):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        return loss.detach()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, pair: list[dict[str, Any]]) -> Iterator[str]:
        self.model.set_attn_implementation(self.how)
        self.micro(pair[0])
        yield "first"
        self.micro(pair[1])
        yield "micro"
        self.update()
        yield "optimizer"

    def warm_up(self, pair: list[dict[str, Any]]) -> None:
        """Compiles; no update, so that the loss is that of the initial weights."""
        self.model.set_attn_implementation(self.how)
        bf16.forget()
        breaks = torch._dynamo.utils.counters["graph_break"]
        breaks.clear()
        begun = time.perf_counter()
        loss = self.micro(pair[0])
        self.found = {"loss": round(float(loss), 5), "compile_s": round(time.perf_counter() - begun, 1)}
        self.found["ran"], self.found["handicap"] = ran(self.how)
        self.micro(pair[1])
        self.found["graph_breaks"] = sum(breaks.values())
        self.optimizer.zero_grad(set_to_none=True)

    def round(self, pair: list[dict[str, Any]]) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for name, ms in laps(self.step(pair), self.device).items():
            self.times[name].append(ms)
        if self.device == "cuda":
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() / 2**30)

    def breakdown(self, pair: list[dict[str, Any]]) -> dict[str, float]:
        """Milliseconds of one micro-batch and one update by what the kernels do."""
        self.model.set_attn_implementation(self.how)
        self.micro(pair[0])
        torch.cuda.synchronize()
        with torch.profiler.profile() as seen:
            begun = time.perf_counter()
            self.micro(pair[1])
            self.update()
            torch.cuda.synchronize()
            wall = 1e3 * (time.perf_counter() - begun)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(path))
            events = json.loads(path.read_text())["traceEvents"]
        found = by_kind(events)
        return found | {"idle": max(0.0, wall - sum(found.values()))}


def by_kind(events: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds on the GPU by KINDS and SPANS, of a trace's events.

    torch's profiler gives a kernel to the innermost span that launched it, and a span that has none does not show on
    the GPU: hence the optimizer's own name for its step, not a span around it.
    """
    found: dict[str, float] = defaultdict(float)
    spans = [
        (event["ts"], event["ts"] + event["dur"], kind)
        for event in events
        for begins, kind in SPANS.items()
        if event.get("cat") == "gpu_user_annotation" and event["name"].startswith(begins)
    ]
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            within = (kind for start, end, kind in spans if start <= event["ts"] < end)
            named = (kind for kind, names in KINDS.items() if re.search(names, event["name"], re.IGNORECASE))
            found[next(within, None) or next(named, "other")] += event["dur"] / 1e3
    return dict(found)


def spanned(model: torch.nn.Module) -> None:
    """Has the profiler show what the loss takes."""
    head = model.get_output_embeddings()
    forward = head.forward

    def within(*args: Any, **options: Any) -> Any:
        with torch.profiler.record_function("loss"):
            return forward(*args, **options)

    head.forward = within


def measure(cfg: DictConfig, data: str, names: list[str], rounds: int, device: torch.device, breakdown: bool) -> list:
    """The rows of one length and kind of data; refusals have a reason."""
    torch.compiler.reset()
    model, optimizer = build(cfg, device)
    spanned(model)
    rows = batches(cfg, 2 * (rounds + 1), device)
    pairs = [rows[i : i + 2] for i in range(0, len(rows), 2)]
    arms, found = [], []
    for name in names:
        try:
            arm = Arm(name, implementation(name, data, device), model, optimizer, cfg.trainer.precision)
            arm.warm_up(pairs[0])
        except Exception as error:
            if name in schemes.SCHEMES:
                raise
            optimizer.zero_grad(set_to_none=True)
            found.append({"attention": name, "refused": " ".join(f"{type(error).__name__}: {error}".split())[:200]})
            print(f"{name} refused: {found[-1]['refused']}", flush=True)
            continue
        arms.append(arm)
    for number, pair in enumerate(pairs):
        for arm in random.Random(number).sample(arms, len(arms)):  # else each follows one that heats or cools the GPU
            arm.round(pair)
            if number == 0:  # the optimizer's first update makes its state, and may compile
                arm.times.clear()
    many, tokens = cfg.trainer.get("accumulate_grad_batches", 1), rows[0]["input_ids"].numel()
    flops, peak = statistics.mean(float(model_flops(model, row)) for row in rows), peak_flops(device)
    for arm in arms:
        first, micro, update = (statistics.median(arm.times[name]) for name in ("first", "micro", "optimizer"))
        step = first + (many - 1) * micro + update
        row = {"attention": arm.name, "first_ms": first, "micro_ms": micro, "optimizer_ms": update, "step_ms": step}
        row |= {"tokens_per_s": 1e3 * many * tokens / step, "peak_gib": arm.peak or ""}
        row["mfu"] = 1e3 * many * flops / step / peak if peak else ""
        if breakdown:
            row |= {f"ms_{kind.replace(' ', '_')}": ms for kind, ms in arm.breakdown(pairs[0]).items()}
        found.append({k: round(x, 3) if isinstance(x, float) else x for k, x in row.items()} | arm.found)
    speeds = {row["attention"]: row["tokens_per_s"] for row in found if "tokens_per_s" in row}
    for row in found:
        if row["attention"] in schemes.SCHEMES:
            row |= {
                f"x_{name}": round(speeds[row["attention"]] / x, 3)
                for name, x in speeds.items()
                if name != row["attention"]
            }
    del model, optimizer, arms
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the recipe")
    parser.add_argument("--recipe", default="llama1b_pretrain")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192, 16384], help="data.seq_len")
    parser.add_argument("--data", nargs="+", default=["packed", "plain"], choices=["packed", "plain"])
    parser.add_argument("--arms", nargs="+", help="names in conf/attention, and sdpa_flash")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds: at least 1")
    device = torch.device(args.device)
    torch._dynamo.config.recompile_limit = 64  # one graph for each arm and kind of lengths
    start = conditions(args.device)
    for length in args.lengths:
        for data in args.data:
            boundaries = f"data.document_boundaries={str(data == 'packed').lower()}"
            given = [
                f"recipe={args.recipe}",
                "compare.arms=null",
                *args.set,
                f"data.seq_len={length}",
                boundaries,
            ]
            cfg = compose(given)
            if cfg.trainer.precision == "auto":
                cfg.trainer.precision = "bf16-mixed" if args.device == "cuda" else "32-true"
            case = {"recipe": args.recipe, "tokens": length, "data": data, "rounds": args.rounds}
            case |= {"checkpointing": cfg.model.checkpointing, "precision": cfg.trainer.precision}
            case |= {"linear": cfg.model.linear or "", "optimizer": cfg.optim.kind}
            names = args.arms or list(ARMS[data])
            rows = measure(cfg, data, names, args.rounds, device, args.breakdown)
            for row in rows:
                print(f"{length:>6} {data:>6} " + "  ".join(f"{k} {x}" for k, x in row.items() if x != ""), flush=True)
            if not args.no_save:
                write([start | case | row for row in rows], kernel_file("pretrain", args.device))


if __name__ == "__main__":
    main()

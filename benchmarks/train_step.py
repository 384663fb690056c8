"""Time and memory of a whole training step with INT8 attention, SDPA and FlashAttention-4: Llama-3.2-1B or a slice.

    python -m benchmarks.train_step                             # H100, 2 layers, 1 x 8192 and 1 x 16384 tokens
    python -m benchmarks.train_step --layers 16
    python -m benchmarks.train_step --device cpu --layers 1 --shapes 1x128 --rounds 1 --no-save \\
        --set hidden_size=128 intermediate_size=256 num_attention_heads=2 num_key_value_heads=1 vocab_size=512

Method: the model of conf/model/llama1b.yaml with fewer layers (tied embeddings, the full vocabulary), random weights in
FP32 and autocast to BF16, as the recipes train it; transformers' own loss; torch.compile(fullgraph=True); fused AdamW,
not compiled. All arms share one model and one optimizer, so that each arm's peak memory is its own, and are interleaved
round by round; they differ in the name of the attention only, through the same Hugging Face interface. No arm gets a
mask tensor (one causal sequence a row needs none): transformers itself hands SDPA one when it is compiled, which flash
refuses and cuDNN pays for. FlashAttention-4 (docs/install.md says how to install it; without that it is refused) is an
operator of the graph like the others. A step is the forward, backward, update and zeroing of gradients, on random
tokens.

Columns: ms (median), tokens_per_s, x_<arm> (how many times faster than it), peak_mib (weights, gradients and optimizer
state included), loss (nats, before the first update: the same weights for every arm), fullgraph (False: the graph
breaks, and the step ran in pieces), attention_op (what really ran, as the profiler saw it), compile_s.

Cost: the loss takes FP32 logits, 4 bytes x tokens x 128,256 and as much for their gradient: 2 x 8.4 GB at 16384 tokens
unless the compiler fuses them away. Rows go to benchmarks/results/train_step-<kernel>.csv.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from benchmarks import peers
from benchmarks.common import conditions, kernel_file, laps, write
from sagetrain.paths import CONF_DIR

SDPA = {  # arm -> the backend that it forces
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
ARMS = {"cuda": ("sage_int8", "sdpa_flash", "sdpa_cudnn", "fa4"), "cpu": ("sage_int8", "sdpa_flash")}


def implementation(arm: str) -> str:
    """The arm's name for transformers, which takes any name with "flash" in it for a package to load."""
    return arm.replace("flash", "fa2")


def register(arm: str, run: Callable[..., tuple[Tensor, None]]) -> None:
    """Makes the arm an attention of transformers, without masks. run: as attention functions of transformers are."""

    def attend(
        module: nn.Module, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if attention_mask is not None:
            raise RuntimeError(f"{arm} was given a mask tensor: it would measure something else")
        return run(module, q, k, v, None, **kwargs)

    AttentionInterface.register(implementation(arm), attend)
    AttentionMaskInterface.register(implementation(arm), lambda *args, **kwargs: None)


def register_all() -> None:
    """transformers' own `sdpa`, on one backend and no other; and FlashAttention-4, if it is there."""

    def sdpa(backend: SDPBackend) -> Callable[..., tuple[Tensor, None]]:
        def run(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            with sdpa_kernel(backend):
                return sdpa_attention_forward(*args, **kwargs)

        return run

    for name, backend in SDPA.items():
        register(name, sdpa(backend))
    try:
        fa4 = peers.fa4_compilable()
    except ImportError as error:
        reason = f"{type(error).__name__}: {error}"

        def fa4(*args: Any) -> Tensor:
            raise ImportError(reason)

    def run(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: None, **kwargs: Any) -> tuple[Tensor, None]:
        return fa4(*(x.transpose(1, 2).to(torch.bfloat16) for x in (q, k, v))), None

    register("fa4", run)


def build(layers: int, changes: dict[str, Any], device: str) -> nn.Module:
    """Llama-3.2-1B by conf/model/llama1b.yaml with `layers` layers, random FP32 weights, in training mode."""
    settings = yaml.safe_load((CONF_DIR / "model" / "llama1b.yaml").read_text())["config"]
    if "hidden_size" in changes or "num_attention_heads" in changes:
        settings.pop("head_dim")
    config = AutoConfig.for_model(**(settings | {"num_hidden_layers": layers} | changes))
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()


class Arm:
    """One attention: what it runs, and what was found out about it on the way."""

    def __init__(self, name: str, model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor) -> None:
        self.name, self.model, self.optimizer, self.tokens = name, model, optimizer, tokens
        self.device = tokens.device.type
        self.compiled: Callable | None = None
        self.found: dict[str, Any] = {}
        self.ms: list[float] = []
        self.peak = 0

    def loss(self) -> Tensor:
        self.model.set_attn_implementation(implementation(self.name))
        with torch.autocast(self.device, torch.bfloat16):
            return self.compiled(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss

    def warm_up(self) -> None:
        """Compiles, in one graph if that can be; no update, so that the loss is that of the initial weights."""
        start = time.perf_counter()
        for fullgraph in (True, False):
            self.compiled = torch.compile(self.model, fullgraph=fullgraph, dynamic=False)
            try:
                loss = self.loss()
                break
            except torch._dynamo.exc.Unsupported as error:
                if not fullgraph:
                    raise
                print(f"{self.name}: the graph breaks, so it is compiled in pieces: {error}", flush=True)
        loss.backward()
        self.found = {
            "fullgraph": fullgraph,
            "compile_s": round(time.perf_counter() - start, 1),
            "loss": round(loss.item(), 5),
        }
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            self.loss()
        names = {e.key.split("::")[-1] for e in seen.key_averages() if "::" in e.key and "attention" in e.key}
        self.found["attention_op"] = " ".join(sorted(names)) or "none seen"
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> Iterator[str]:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        yield "step"

    def round(self, counts: bool) -> None:
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        ms = laps(self.step(), self.device)["step"]
        if counts:
            self.ms.append(ms)
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() if self.device == "cuda" else 0)


def measure(model: nn.Module, names: list[str], shape: tuple[int, int], rounds: int, device: str) -> list[dict]:
    """The measured columns of each arm for micro-batches of `shape` (rows, tokens in a row); refusals have a reason."""
    torch.compiler.reset()  # sizes are constants of the graphs; those of another shape only cost guards
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(model.config.vocab_size, shape, device=device)
    arms, refused = [], []
    for name in names:
        arm = Arm(name, model, optimizer, tokens)
        try:
            arm.warm_up()
        except Exception as error:
            if name == "sage_int8":
                raise
            optimizer.zero_grad(set_to_none=True)
            refused.append({"attention": name, "refused": " ".join(f"{type(error).__name__}: {error}".split())[:200]})
            print(f"{name} refused: {refused[-1]['refused']}", flush=True)
            continue
        arms.append(arm)
    for number in range(rounds + 1):
        for arm in arms:
            arm.round(counts=number > 0)
    medians = {arm.name: statistics.median(arm.ms) for arm in arms}
    rows = []
    for arm in arms:
        ms = medians[arm.name]
        rows.append({"attention": arm.name, "ms": round(ms, 2), "tokens_per_s": round(tokens.numel() / ms * 1e3)})
        rows[-1] |= {f"x_{n}": round(other / ms, 3) for n, other in medians.items() if n != "sage_int8"}
        rows[-1] |= {"peak_mib": round(arm.peak / 2**20) if arm.peak else ""} | arm.found
    return rows + refused


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shapes", nargs="+", default=["1x8192", "1x16384"], help="rows x tokens of a micro-batch")
    parser.add_argument("--backends", nargs="+", choices=["sage_int8", *SDPA, "fa4"])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="changes to the model's shape")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    register_all()
    model = build(args.layers, {k: yaml.safe_load(v) for k, v in (x.split("=", 1) for x in args.set)}, args.device)
    parameters = sum(p.numel() for p in model.parameters())
    start = conditions(args.device) | {"model": " ".join(["llama1b", *args.set]), "layers": args.layers}
    print(f"{parameters / 1e6:.0f} M parameters", flush=True)
    rows = []
    for text in args.shapes:
        shape = tuple(int(n) for n in text.split("x"))
        found = measure(model, args.backends or list(ARMS[args.device]), shape, args.rounds, args.device)
        rows += [start | {"shape": text, "rounds": args.rounds} | r for r in found]
        for r in found:
            print(f"{text:>8} " + "  ".join(f"{k} {v}" for k, v in r.items()), flush=True)
    if not args.no_save:
        write(rows, kernel_file("train_step", args.device))


if __name__ == "__main__":
    main()

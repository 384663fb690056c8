"""What of an attention's error in the gradient is bias, which stays however many tokens a step has.

    python -m benchmarks.bias MODEL --text FILE [--tokens 4M] [--attention sage_int8 bf16 paper sage:p=exact]
    python -m benchmarks.bias RUN --text FILE     # a run of ours, or one of its checkpoints
    python -m benchmarks.bias MODEL --task mmlu --text FILE     # examples of a task, as fine-tuning has them

Method: at fixed weights the gradient g of the mean loss is summed over micro-batches, with exact attention and with
each of the others; e is the difference of the two. The model is in FP32; every attention gets what it gets in training,
its inputs and the gradient of its output in BF16, and rounds its results to BF16. The exact one computes in FP32
between. Noise of n micro-batches grows with the root of n, the sums with n, and what stays of e is bias. After 1, 2, 4,
... micro-batches a row says, of the whole gradient, of the query, key and value projections' of all layers, and with
--layers of each layer's:

    error     ||sum e|| / ||sum g||
    bias      its limit for many: the square root of (||sum e||^2 - sum ||e||^2) / (||sum g||^2 - sum ||g||^2), which
              takes out the noise that is still in the sums; negative where noise alone would have made more
    along     of the bias what the gradient is too long by, -0.01: 1% too short; the same estimate of (e . g) / ||g||^2
    noise     of the gradient itself: the distance of sum g / n from its limit, over the limit
    each      the error of one micro-batch

MODEL is a folder or hub id of transformers, or what sagetrain.export reads. An attention is a scheme, `bf16` (torch's
SDPA), or a preset of sagetrain/ops/reference.py, of which operands may be `exact`, `dithered` or rounded to the
`nearest` instead of as the preset has them: `sage_sm90:p=exact`, `sage_sm90:ds_dq=nearest,ds_dk=nearest`. What of it
comes from where: NAME@forward has the output of NAME and the gradients of exact attention, NAME@backward the exact
output and the gradients of NAME; `noise=0.015` is exact attention with Gaussian noise in its output, 0.015 of the root
mean square of a head's, and so what a model makes of any error of that size that is right on average.
Choice: rows of T tokens, causal over all of the row, cut from the text as pre-training cuts them. With --task rows are
the examples of its file as fine-tuning has them, each by itself: those of a micro-batch have no padding and do not see
each other, and all their targets weigh the same (micro-batches do too, however many targets they have). One of more
than T tokens loses the beginning of its prompt, or is left out where no prompt would be left.
Cost: a forward and backward in FP32 for each attention; presets hold T x T scores of all heads. Memory: a copy of the
gradient for each attention, and two more. Rows go to benchmarks/results/bias-<kernel>.csv at the end, and where it is
interrupted (Ctrl-C) those that there are.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

import sagetrain
from benchmarks.attend import register
from benchmarks.common import conditions, kernel_file, write
from benchmarks.jobs import positive
from benchmarks.noisy import with_noise
from sagetrain.data.corpus import build_tokenizer
from sagetrain.data.loader import targets
from sagetrain.data.pretrain import build_pretrain
from sagetrain.data.tasks import TASKS, build_task
from sagetrain.ops import reference, schemes
from sagetrain.training import export

Attend = Callable[..., Tensor]  # (q, k, v, is_causal=, scale=) -> o; shapes as `sagetrain.attention`
Batch = list[tuple[Tensor, Tensor]]  # of each part of a micro-batch: ids and labels [rows, tokens]
PARTS = {"all": "", "q": ".q_proj.", "k": ".k_proj.", "v": ".v_proj."}  # and what the names of its parameters have
EXACT = "exact"
ROUNDINGS = ("exact", "dithered", "nearest")


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    group = q.shape[1] // k.shape[1]
    return scaled_dot_product_attention(q, *(x.repeat_interleave(group, 1) for x in (k, v)), **options)


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return sdpa(q.float(), k.float(), v.float(), **options)


def noisy(q: Tensor, k: Tensor, v: Tensor, *, size: float, **options: Any) -> Tensor:
    return with_noise(exact(q, k, v, **options).transpose(1, 2), size).transpose(1, 2)


def half(q: Tensor, k: Tensor, v: Tensor, *, attend: Attend, forward: bool, **options: Any) -> Tensor:
    """The output of `attend` with the gradients of exact attention, or (not `forward`) the other way round."""
    found, truth = attend(q, k, v, **options), exact(q, k, v, **options)
    value, gradient = (found, truth) if forward else (truth, found)
    return gradient + (value - gradient).detach()


def attention(name: str) -> Attend:
    """The attention of a name (module docstring). Raises ValueError for any other."""
    whole, at, part = name.partition("@")
    if at and part in ("forward", "backward"):
        return partial(half, attend=attention(whole), forward=part == "forward")
    if re.fullmatch(r"noise=\d*\.?\d+", name):
        return partial(noisy, size=float(name.removeprefix("noise=")))
    if name == "bf16":
        return sdpa
    if name in schemes.SCHEMES:
        return partial(sagetrain.attention, scheme=name)
    base, _, changes = name.partition(":")
    if base not in reference.PRESETS:
        raise ValueError(
            f"attention {name!r}: choose from {', '.join(['bf16', 'noise=SIZE', *schemes.SCHEMES, *reference.PRESETS])}"
        )
    preset = reference.PRESETS[base]
    for change in filter(None, changes.split(",")):
        operand, _, how = change.partition("=")
        if operand not in reference.OPERANDS or how not in ROUNDINGS:
            raise ValueError(
                f"attention {name!r}: {change!r} is not one of {', '.join(reference.OPERANDS)} ="
                f"{' or ='.join(ROUNDINGS)}"
            )
        kinds = {kind: getattr(preset, kind) - {operand} for kind in ("exact", "dithered")}
        preset = replace(preset, **kinds | ({how: kinds[how] | {operand}} if how in kinds else {}))
    return partial(reference.attention, preset=preset)


class Sum:
    """Sum of vectors x, one for each parameter, and of their products `[parameters]` with others: x . x, x . g."""

    def __init__(self, like: list[Tensor]) -> None:
        self.total = [torch.zeros_like(x) for x in like]
        self.products = torch.zeros(2, len(like), dtype=torch.float64, device=like[0].device)

    def add(self, vectors: list[Tensor], g: list[Tensor]) -> None:
        torch._foreach_add_(self.total, vectors)
        self.products += torch.stack([dots(vectors, vectors), dots(vectors, g)])

    def of(self, chosen: Tensor, g: Sum) -> list[float]:
        """(sum x) . (sum x), sum x . x, (sum x) . (sum g), sum x . g, over the parameters chosen."""
        found = dots(self.total, self.total), self.products[0], dots(self.total, g.total), self.products[1]
        return [float(x[chosen].sum()) for x in found]


def dots(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    return torch.stack([torch.dot(x.flatten(), y.flatten()) for x, y in zip(xs, ys, strict=True)]).double()


def estimates(
    n: int, g: float, g_each: float, e: float, e_each: float, along: float, along_each: float
) -> dict[str, float | str]:
    """The columns of a row, of n gradients g and errors e: the squared length of their sum, the sum of squared lengths;
    along: the product of both sums, and the sum of products.

    Times n (n - 1), the mean's squared length without its noise is g - g_each, and that noise's is g_each - g / n.
    """
    found: dict[str, float | str] = {
        "error": math.sqrt(e / g),
        "bias": "",
        "along": "",
        "noise": "",
        "each": math.sqrt(e_each / g_each),
    }
    if n > 1 and (signal := g - g_each) > 0:
        bias = (e - e_each) / signal
        found |= {
            "bias": math.copysign(math.sqrt(abs(bias)), bias),
            "along": (along - along_each) / signal,
            "noise": math.sqrt(max(g_each - g / n, 0) / signal),
        }
    return found


def measure(
    model: nn.Module, batches: Iterable[Batch], arms: dict[str, Attend], dtype: torch.dtype = torch.bfloat16,
    layers: bool = False,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows {tokens, arm, part, error, bias, along, noise, each} (module docstring) after 1, 2, 4, ... of the batches
    and the last; at least two. dtype: of what the arms get and give.
    """
    for name, attend in {EXACT: exact, **arms}.items():
        causal = partial(attend, is_causal=True)
        register(f"bias_{name}", lambda _, q, k, v, scale, of=causal: of(q, k, v, scale=scale), dtype)
    parameters = {name: x for name, x in model.named_parameters() if x.requires_grad}
    parts = PARTS | {f"layer {i}": f"layers.{i}." for i in range(model.config.num_hidden_layers if layers else 0)}
    chosen = {part: torch.tensor([word in name for name in parameters]) for part, word in parts.items()}
    like = list(parameters.values())
    sum_of_exact, errors = Sum(like), {name: Sum(like) for name in arms}

    def gradient(name: str, batch: Batch) -> list[Tensor]:
        model.set_attn_implementation(f"bias_{name}")
        count, total = sum(targets(labels) for _, labels in batch), None
        for ids, labels in batch:
            share = targets(labels) / count  # rather than num_items_in_batch, which not every model knows
            loss = model(input_ids=ids, labels=labels, use_cache=False).loss * share
            found = [g.detach() for g in torch.autograd.grad(loss, like, materialize_grads=True)]
            if total is None:
                total = found
            else:
                torch._foreach_add_(total, found)
        return total

    def rows(n: int, tokens: int) -> Iterator[dict[str, Any]]:
        for part, these in chosen.items():
            if not these.any():
                continue
            for name, error in errors.items():
                found = estimates(n, *sum_of_exact.of(these, sum_of_exact)[:2], *error.of(these, sum_of_exact))
                yield {"tokens": tokens, "arm": name, "part": part} | found

    n = tokens = 0
    for batch in batches:
        truth = gradient(EXACT, batch)
        sum_of_exact.add(truth, truth)
        for name, error in errors.items():
            found = gradient(name, batch)
            torch._foreach_sub_(found, truth)
            error.add(found, truth)
        n, tokens = n + 1, tokens + sum(ids.numel() for ids, _ in batch)
        if n & (n - 1) == 0:
            yield from rows(n, tokens)
    if n & (n - 1):
        yield from rows(n, tokens)


def load(model: str) -> tuple[nn.Module, str]:
    """A model in FP32 and its tokenizer's name, of a run or of transformers."""
    if run := export.run_of(model):
        return export.load(model)[0].float(), OmegaConf.load(run / "config.yaml").model.tokenizer
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), model


def batches(tokenizer: str, text: list[str], seq_len: int, size: int, tokens: int, device: str) -> Iterator[Batch]:
    """Micro-batches of one part, ids `[size, seq_len]`, `tokens` of them in all, the same ones always."""
    stream = build_pretrain(build_tokenizer(tokenizer), seq_len, 0, size, None, path=text)
    rows = stream.rows(0)
    count = tokens // (seq_len * size)
    if count < 2 or count * size > len(rows):
        raise ValueError(
            f"{tokens} tokens are {count} micro-batches of {size} x {seq_len}: at least 2, and the text has "
            f"{len(rows) // size}"
        )
    for first in range(0, count * size, size):
        ids = torch.stack([torch.from_numpy(rows[i][0]).long() for i in range(first, first + size)]).to(device)
        yield [(ids, ids)]


def examples(
    kind: str, tokenizer: str, text: list[str], seq_len: int, size: int, tokens: int, device: str
) -> Iterator[Batch]:
    """Micro-batches of `size` parts, an example of task `kind` each, the fewest that have `tokens`; the same always."""
    stream = build_task(
        kind, build_tokenizer(tokenizer), seq_len, 0, 1, path=text, val_fraction=0.0, too_long="truncate"
    )
    parts, taken = [], 0
    for row, _ in stream.batches(stream.start, 0, 1):
        parts.append((row["input_ids"], row["labels"]))
        taken += row["input_ids"].numel()
        if taken >= tokens and len(parts) % size == 0 and len(parts) > size:
            break
    else:
        raise ValueError(
            f"{tokens} tokens in micro-batches of {size} examples, at least 2 of them: the text has {len(parts)} "
            f"examples, {taken} tokens"
        )
    for first in range(0, len(parts), size):
        yield [(ids.to(device), labels.to(device)) for ids, labels in parts[first : first + size]]


def amount(text: str) -> int:
    """'4M' -> 4 * 2^20; 'K' is 2^10."""
    unit = {"K": 2**10, "M": 2**20}.get(text[-1:].upper(), 1)
    return int(float(text.rstrip("kKmM")) * unit)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a run, one of its checkpoints, a folder or hub id of transformers")
    parser.add_argument("--text", nargs="+", required=True, help="files, as data.path of pre-training, or of --task")
    parser.add_argument("--task", choices=TASKS, help="of fine-tuning, whose examples the files have")
    parser.add_argument("--attention", nargs="+", default=[schemes.DEFAULT, "bf16", "paper"])
    parser.add_argument(
        "--tokens", type=amount, default=2**20, help="in all, e.g. 256K or 4M; of a task or a little more"
    )
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=positive, default=8, help="rows, or examples, of a micro-batch")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", action="store_true", help="rows of each layer, too")
    parser.add_argument("--name", help="of the model, in the rows; default: the last part of its path")
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(arguments)
    arms = {name: attention(name) for name in args.attention}
    model, tokenizer = load(args.model)
    made = partial(examples, args.task) if args.task else batches
    source = made(tokenizer, args.text, args.seq_len, args.batch_size, args.tokens, args.device)
    start = conditions(args.device) | {
        "model": args.name or Path(args.model).name, "text": " ".join(Path(file).name for file in args.text),
        "task": args.task or "", "seq_len": args.seq_len, "batch_size": args.batch_size,
    }  # fmt: skip
    torch.manual_seed(0)  # of `noise`
    saved = []
    try:
        for row in measure(model.to(args.device), source, arms, layers=args.layers):
            row = {key: f"{value:.3e}" if isinstance(value, float) else value for key, value in row.items()}
            saved.append(start | row)
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    finally:
        if saved and not args.no_save:  # at once: the first rows of a commit take the place of all of the one before
            write(saved, kernel_file("bias", args.device))


if __name__ == "__main__":
    main()

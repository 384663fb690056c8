"""How far one training step in INT8 is from the same step with exact attention: its loss and its gradients.

    python -m benchmarks.parity                               # a tiny Llama on the CPU, under a minute
    python -m benchmarks.parity --device cuda --size 100m     # the GPU kernel in a model of 100M, BF16 inputs
    python -m benchmarks.parity --text FILE --steps 500 --every 10    # any text, by bytes
    python -m benchmarks.parity --scheme NAME                 # another scheme's kernel; rows in a file of its own

Method: a model in FP32 is trained with exact (FP64) attention. Every few steps each arm computes loss and gradients of
the same batch from the same weights; so what differs is the attention's error and nothing else, at weights that no arm
has led astray. The trajectory is the exact one's because then a broken arm cannot choose where it is measured. Batches:
`text`, and `masked`, the same with the first 60% of each row no target. The first layer works on two halves of the keys
that are merged by LSE, as context parallelism does, so that LSE and its gradient count too.

Arms: `kernel` (what the device has), `reference` (its preset in plain torch), `paper` (the published scheme), `bf16`
(exact attention of inputs, output and gradients in BF16).

Measures, of the whole gradient and of each query, key and value projection's: the sine of its angle to the exact one
(sqrt(1 - cosine^2): all noise), its norm over the exact one's (bias: a factor changes no angle); and the loss minus the
exact loss. Root mean squares over the steps, since a single step's may be small by luck.

Bars (`failures`), none set by hand: each may be RATIO times the reference's, since the kernel rounds where that rounds.
What BF16 cannot tell apart is allowed in any case: its eps of angle and norm, the `bf16` arm's own difference of the
loss. And no angle may be above `paper`'s, since kernel and reference can have one fault in common (`paper`'s norm and
loss may come out exact by luck, its angle not).

Cost: dense attention in FP64, 8 bytes x heads x tokens^2 x layers x rows at least three times over. Rows go to
benchmarks/results/parity-<kernel>.csv.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import sagetrain
from benchmarks.attend import register
from benchmarks.common import conditions, kernel_file, write
from sagetrain.ops import reference, schemes
from tests.kernelkit import RATIO, plain, preset_of

Attend = Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, is_causal=, scale=) -> o, lse; as `sagetrain.attention`
Summary = dict[tuple[str, str, str], dict[str, float]]
MASKED = 0.6  # of each row of a masked batch


@dataclass(frozen=True)
class Size:
    """A Llama with grouped queries, its batches of `rows` x `tokens` bytes, and AdamW's learning rate (no warmup)."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    tokens: int
    lr: float
    rows: int = 2


SIZES = {
    "tiny": Size(2, 128, 4, 2, 256, 3e-3),
    "10m": Size(6, 384, 6, 2, 512, 1e-3),
    "100m": Size(12, 768, 12, 4, 1024, 3e-4),
}


# ------------------------------------------------------------------------------------------------------------ the arms


def exact(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return reference.exact(q, k, v, **options)


def arms(scheme: str = schemes.DEFAULT) -> dict[str, Attend]:
    """The four arms of a scheme."""
    return {
        "kernel": partial(sagetrain.attention, scheme=scheme, return_lse=True),
        "reference": lambda q, *x, **o: plain(q, *x, preset=preset_of(q.device, scheme), return_lse=True, **o),
        "paper": partial(plain, preset="paper", return_lse=True),
        "bf16": exact,
    }


def merged(attend: Attend, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention over two halves of the keys, merged by LSE."""
    half = k.shape[2] // 2
    (k1, k2), (v1, v2) = ((x[:, :, :half], x[:, :, half:]) for x in (k, v))
    early, _ = attend(q[:, :, :half], k1, v1, is_causal=True, scale=scale)
    past, past_lse = attend(q[:, :, half:], k1, v1, is_causal=False, scale=scale)
    own, own_lse = attend(q[:, :, half:], k2, v2, is_causal=True, scale=scale)
    share = torch.stack([past_lse, own_lse]).softmax(0)[..., None]
    return torch.cat([early, share[0] * past + share[1] * own], 2)


def register_arm(name: str, attend: Attend, dtype: torch.dtype) -> None:
    def of_layer(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return merged(attend, q, k, v, scale) if layer == 0 else attend(q, k, v, is_causal=True, scale=scale)[0]

    register(f"parity_{name}", of_layer, dtype)


# ------------------------------------------------------------------------------------------------- the model, the data


def build(size: Size, device: str) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=size.hidden, intermediate_size=3 * size.hidden, num_hidden_layers=size.layers,
        num_attention_heads=size.heads, num_key_value_heads=size.kv_heads, max_position_embeddings=size.tokens,
        tie_word_embeddings=True, initializer_range=size.hidden**-0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(device)


def names() -> bytes:
    """Names that come back: to predict their second half, the model has to look back, which only attention can."""
    words = [f"{chr(97 + i % 26)}{chr(97 + i * 7 % 26)}{chr(97 + i * 11 % 26)}{i % 10}" for i in range(50)]
    lines = (f"{words[i * i % 50]} + {words[i % 50]} = {words[i * i % 50]}{words[i % 50]}\n" for i in range(4000))
    return "".join(lines).encode()


def batches(text: bytes, size: Size, device: str) -> Iterator[Tensor]:
    """`[rows, tokens]` bytes from anywhere in the text, for ever the same ones."""
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    g = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(data) - size.tokens + 1, (size.rows,), generator=g).tolist()
        yield torch.stack([data[i : i + size.tokens] for i in starts]).to(device)


# --------------------------------------------------------------------------------------------------------- the measure


def parts(model: nn.Module) -> dict[str, list[str]]:
    """Name of each measured part, "all" or e.g. "0.q_proj", and the names of its parameters."""
    names = [name for name, _ in model.named_parameters()]
    found = {"all": names}
    for layer in range(model.config.num_hidden_layers):
        for x in ("q_proj", "k_proj", "v_proj"):
            found[f"{layer}.{x}"] = [f"model.layers.{layer}.self_attn.{x}.weight"]
    return found


def gradients(model: nn.Module, arm: str, tokens: Tensor, labels: Tensor) -> tuple[float, dict[str, Tensor]]:
    """Loss and the gradient of every part, in FP64, of one batch with the attention registered as `arm`."""
    model.set_attn_implementation(f"parity_{arm}")
    model.zero_grad()
    loss = model(input_ids=tokens, labels=labels, use_cache=False).loss
    loss.backward()
    grads = {name: x.grad.double().flatten() for name, x in model.named_parameters()}
    return loss.item(), {part: torch.cat([grads[n] for n in names]) for part, names in parts(model).items()}


def measure(
    arms: dict[str, Attend], size: Size, steps: int, every: int, device: str = "cpu", text: bytes | None = None
) -> list[dict]:
    """Rows {step, batch, arm, part, angle, norm, exact_loss, loss} at every so many of the steps, for each of the arms.

    angle: sine of the gradient's angle to the exact one; norm: its norm over the exact one's, minus 1; loss: the arm's
    minus the exact one's. Inputs of the arms are FP32 on a CPU and BF16 on a GPU.
    """
    dtypes = dict.fromkeys(arms, torch.float32 if device == "cpu" else torch.bfloat16) | {"bf16": torch.bfloat16}
    for name, attend in arms.items():
        register_arm(name, attend, dtypes[name])
    register_arm("exact", exact, torch.float32)
    model = build(size, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=size.lr)
    source, rows = batches(names() if text is None else text, size, device), []
    for step in range(steps):
        tokens = next(source)
        masked = tokens.clone()
        masked[:, : int(MASKED * size.tokens)] = -100
        for batch, labels in (("text", tokens), ("masked", masked)) if step % every == 0 else ():
            exact_loss, truth = gradients(model, "exact", tokens, labels)
            for arm in arms:
                loss, found = gradients(model, arm, tokens, labels)
                start = {"step": step, "batch": batch, "arm": arm, "exact_loss": exact_loss, "loss": loss - exact_loss}
                rows += [start | {"part": part} | distance(found[part], truth[part]) for part in truth]
        gradients(model, "exact", tokens, tokens)
        optimizer.step()
    return rows


def distance(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Angle and norm of a gradient; a zero has the angle 1."""
    along = torch.dot(found, truth) / truth.norm()
    across = found - along * truth / truth.norm()
    size = found.norm()
    angle = float(across.norm() / size) if size and along > 0 else 1.0
    return {"angle": angle, "norm": float(size / truth.norm()) - 1}


def summary(rows: list[dict]) -> Summary:
    """(arm, batch, part) -> root mean square over the steps of its angle, its norm and, of the part "all", its loss."""
    groups: dict[tuple[str, str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["batch"], row["part"]), []).append(row)
    return {
        key: {
            measured: math.sqrt(sum(row[measured] ** 2 for row in group) / len(group))
            for measured in ("angle", "norm", "loss")[: 3 if key[2] == "all" else 2]
        }
        for key, group in groups.items()
    }


def failures(found: Summary, arm: str = "kernel") -> list[str]:
    """What of `arm` is over its bar, in words; of a `summary` that has `reference`, `paper` and `bf16` too."""
    over = []
    for batch, part, measured in measures(found):
        value, ours, published, bf16 = (
            found[name, batch, part][measured] for name in (arm, "reference", "paper", "bf16")
        )
        least = bf16 if measured == "loss" else torch.finfo(torch.bfloat16).eps
        bar = RATIO * max(ours, least)
        if measured == "angle":
            bar = min(bar, max(published, least))
        if not value <= bar:
            over.append(f"{batch}, {part}: {measured} {value:.2e} > {bar:.2e}")
    return over


def measures(found: Summary) -> list[tuple[str, str, str]]:
    """(batch, part, measure) of all that a summary has of each arm."""
    return [(batch, part, x) for (arm, batch, part), values in found.items() if arm == "reference" for x in values]


def exact_losses(rows: list[dict]) -> list[float]:
    """Loss of exact attention on the text, step by step."""
    return list({row["step"]: row["exact_loss"] for row in rows if row["batch"] == "text"}.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=41)
    parser.add_argument("--every", type=int, default=1, help="steps from one measurement to the next")
    parser.add_argument("--text", type=Path, help="a file, read by bytes; default: names that come back")
    parser.add_argument("--scheme", default=schemes.DEFAULT, choices=list(schemes.SCHEMES))
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args()
    text = args.text.read_bytes() if args.text else None
    attentions = arms(args.scheme)
    rows = measure(attentions, SIZES[args.size], args.steps, args.every, args.device, text)
    found = summary(rows)
    losses = exact_losses(rows)
    print(f"\nexact loss {losses[0]:.3f} -> {losses[-1]:.3f}; {len(losses)} steps measured\n")
    print(f"| batch | part | measure | {' | '.join(attentions)} |\n|---|---|---|{'---|' * len(attentions)}")
    start = conditions(args.device, args.scheme) | {
        "size": args.size, "tokens": SIZES[args.size].tokens, "steps": args.steps, "every": args.every,
        "text": args.text.name if args.text else "names",
    }  # fmt: skip
    saved = []
    for batch, part, measured in measures(found):
        cells = {arm: f"{found[arm, batch, part][measured]:.2e}" for arm in attentions}
        print(f"| {batch} | {part} | {measured} | {' | '.join(cells.values())} |")
        errors = {f"{arm}_error": cell for arm, cell in cells.items()}
        saved.append(start | {"batch": batch, "part": part, "measure": measured} | errors)
    print("\n" + ("\n".join(failures(found)) or "the kernel is within every bar"))
    if not args.no_save:
        write(saved, kernel_file("parity", args.device, args.scheme))


if __name__ == "__main__":
    main()

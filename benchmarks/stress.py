"""Does INT8 attention fail earlier than BF16 where training is hard? Arms by seeds, in settings that are.

    python -m benchmarks.stress --data FILE --tokenizer FOLDER --out FOLDER [--model FOLDER] [--seeds 3] [--jobs 1]
                                [key=value ...] [--settings sigma10 ...] [--arms bf16 sage_int8 noisy ...]

    sigma1    a Llama (SHAPE; 40M parameters with a vocabulary of 32,000) as initialised: the control. The standard
              deviation of q and of k is .45
    sigma5    q_proj and k_proj of every layer scaled before training, so that it is 5, or 10, over the first row of
    sigma10   the text, before RoPE
    lr3x      the control at three times the rate
    qknorm    the control with QK-norm, an RMS norm of each head's q and k before RoPE (a Qwen3 of that shape).
              So the standard deviation is 1 to begin with
    tokens1m  the control at 1,048,576 tokens a step and half the rate, 100 steps, documents that see each other: where
              bias, which more tokens do not average out, would weigh most. Not among the settings that run by default
    sinks     the weights of --model trained on, at a tenth of the rate: SmolLM2-135M-Instruct, which has attention
              sinks with a weight of .999. Skipped, with a line that says so, without --model

The arms are BF16 and INT8, and if asked for, those of benchmarks/published.py: `noisy`, BF16 with noise in the output,
for runs of one seed part once disturbed, and that says how far; and `published`, the published scheme.

Method: every run is a command of its own, `python -m sagetrain` or `benchmarks.published`, recipe=parity_120m, with
RUN, what the setting changes, and `key=value` for all of them (before --settings); `model.config.*` is for random
weights alone. --jobs run at a time on each GPU. The same command goes on where it was stopped, and does not repeat what
is done. A loss or gradient that is not finite ends a run: that is a result here and has its row; any other error is
none and ends the benchmark when the setting's turn comes. Rows of a setting are written when all its runs are done, to
results/stress-<kernel>.csv, and the curves to results/stress-SETTING-<kernel>: of the runs asked for, and of others
that --out has. A row has the columns of benchmarks/losses.py, but for `steps`, which is how many were planned (`tokens`
says how many there were), and, after warm-up and of the loss as a mean over SMOOTH steps:

    worst     its largest rise above its lowest so far
    fails     the first step from which to the last (SMOOTH at least) it is more than MARGIN above what it was at the
              end of warm-up, or that is not finite; empty where there is none
    grad_norm_max, not_finite      the largest gradient norm; steps with a loss or a norm that is not finite
    sigma_q_first, sigma_q_last    standard deviation of q at the first and last probe, the largest of the layers; of k
    dq_error, dk_error             error of dQ and dK, the largest of layers and probes (BF16 is not probed)

Choice: the weights of a setting are drawn once, so seeds differ in the order of the data alone. A run that learns less
than it should but keeps below the loss of its warm-up does not fail; its training loss says so.
Cost: 400 steps of 16,384 tokens a run, 6.6M (tokens1m: 105M); a folder for each of WEIGHTS. What the commands said is
in FOLDER of --out, SETTING/ARM-seedN.txt.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import losses
from benchmarks.bias import batches
from benchmarks.common import conditions, kernel_file, write
from benchmarks.jobs import command, pool, positive, same_as_before, slots
from sagetrain.__main__ import compose
from sagetrain.compare.estimates import window_mean
from sagetrain.compare.runs import Run
from sagetrain.data.corpus import build_tokenizer
from sagetrain.training.folder import quoted
from sagetrain.training.module import model_config

# Of each arm the module that trains with it, and its words; those by default are the first two.
ARMS = {
    "bf16": ("sagetrain", "attention=bf16"), "sage_int8": ("sagetrain", "attention=sage_int8"),
    "noisy": ("benchmarks.published", "attention=noisy"), "published": ("benchmarks.published", "attention=published"),
}  # fmt: skip
# Folders of random weights: the standard deviation of q and k (None: as initialised), and what changes SHAPE.
WEIGHTS = {
    "llama-sigma1": (None, ()), "llama-sigma5": (5.0, ()), "llama-sigma10": (10.0, ()),
    "llama-qknorm": (None, ("model.config.model_type=qwen3",)),
}  # fmt: skip
TOKENS1M = (
    "data.document_boundaries=false", "data.batch_size=32", "trainer.accumulate_grad_batches=16",
    "trainer.max_steps=100", "optim.warmup_steps=30", "trainer.val_check_interval=400", "probe.every=20",
)  # fmt: skip
# The folder that a run starts from (None: --model), its rate, times that of the control, and what else it changes.
SETTINGS = {
    "sigma1": ("llama-sigma1", 1, ()), "sigma5": ("llama-sigma5", 1, ()), "sigma10": ("llama-sigma10", 1, ()),
    "lr3x": ("llama-sigma1", 3, ()), "qknorm": ("llama-qknorm", 1, ()), "sinks": (None, 0.1, ()),
    "tokens1m": ("llama-sigma1", 0.5, TOKENS1M),
}  # fmt: skip
RECIPE = ("recipe=parity_120m", "compare.arms=null")
SHAPE = (
    "model.config.hidden_size=512", "model.config.intermediate_size=1408", "model.config.num_hidden_layers=8",
    "model.config.num_attention_heads=8", "model.config.num_key_value_heads=4", "model.config.tie_word_embeddings=true",
)  # fmt: skip
RUN = (
    "trainer.max_steps=400", "data.seq_len=2048", "data.batch_size=8", "trainer.accumulate_grad_batches=1",
    "optim.warmup_steps=40", "trainer.val_check_interval=100", "probe.every=40", "checkpoint.keep=none",
    f"model.compile={str(torch.cuda.is_available()).lower()}",
)  # fmt: skip
FIXED = (
    "seed", "out", "resume", "attention", "model", "model.path", "model.tokenizer", "model.config.model_type",
    "data.path", "compare",
)  # fmt: skip
SMOOTH = 10
MARGIN = 0.1  # nats


@torch.no_grad()
def scale(model: nn.Module, ids: Tensor, sigma: float) -> None:
    """Scales q_proj and k_proj of each layer so that what they give for `ids [rows, tokens]` has a standard deviation
    of `sigma`. In one pass: a layer is scaled as it runs, so those after it get what they will get."""

    def hook(linear: nn.Linear, _: Any, out: Tensor) -> Tensor:
        factor = sigma / out.std()
        linear.weight.mul_(factor)
        return out * factor

    projections = [x for name, x in model.named_modules() if name.endswith((".q_proj", ".k_proj"))]
    hooks = [x.register_forward_hook(hook) for x in projections]
    model.base_model(ids, use_cache=False)
    for each in hooks:
        each.remove()


def llama(folder: Path, cfg: DictConfig, tokenizer: str, text: Path, sigma: float | None) -> Path:
    """A folder of a model of `cfg` with random weights, scaled if need be, and the tokenizer."""
    if not folder.exists():
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = AutoModelForCausalLM.from_config(model_config(cfg.model), dtype=torch.float32)
        if sigma:
            [(ids, _)] = next(batches(tokenizer, [str(text)], cfg.data.seq_len, 1, 2 * cfg.data.seq_len, "cpu"))
            scale(model, ids, sigma)
        part = folder.with_name(f"{folder.name}.part")
        model.save_pretrained(part)
        build_tokenizer(tokenizer).save_pretrained(part)
        part.rename(folder)
    return folder


def ended(run: Path) -> bool:
    """Whether a run has finished, or met a loss or gradient that was not finite. Raises ValueError for a folder that
    does not say."""
    file = run / "run.json"
    try:
        info = json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: no JSON ({error}); delete {run} to run it again") from error
    return info.get("status") == "finished" or str(info.get("error")).startswith("FloatingPointError")


def there(folder: Path) -> list[Path]:
    """The runs of a setting that a folder has, by seed and then in the order of ARMS."""
    runs = (run.name.partition("-seed") for run in folder.glob("*-seed*") if run.is_dir())
    return [folder / "".join(name) for name in sorted(runs, key=lambda name: (int(name[2]), list(ARMS).index(name[0])))]


def train(free: Queue[str], run: Path, module: str, *words: str) -> None:
    """Raises RuntimeError for a run that ends otherwise than `ended` says, whatever its exit status is."""
    if ended(run):
        return
    said = run.with_suffix(".txt")
    print(f"{run.parent.name} {run.name}: begins, {said}\n", end="", flush=True)  # one write: there are more threads
    try:
        command(free, said, module, *RECIPE, *RUN, f"out={quoted(str(run))}", *words)
        if not ended(run):
            raise RuntimeError(f"{run} has not finished, and was left with status 0: {said} has what it said")
    except RuntimeError as error:
        if not ended(run):
            print(f"{run.parent.name} {run.name}: {error}\n", end="", flush=True)
            raise
    status = json.loads((run / "run.json").read_text())["status"]
    print(f"{run.parent.name} {run.name}: {status}\n", end="", flush=True)


def stability(steps: np.ndarray, loss: np.ndarray, norm: np.ndarray, warmup: int) -> dict[str, Any]:
    """Columns (module docstring) of the loss and gradient norm `[steps]`."""
    finite = np.isfinite(loss) & np.isfinite(norm)
    smooth = np.where(finite, window_mean(steps, loss, SMOOTH), np.nan)
    late = (steps >= warmup) & np.isfinite(smooth)
    level = smooth[late][0] + MARGIN if late.any() else np.inf
    below = np.flatnonzero(smooth <= level)
    first = below[-1] + 1 if len(below) else 0
    fails = not finite[first:].all() or len(steps) - first >= SMOOTH
    return {
        "worst": f"{np.max(smooth[late] - np.minimum.accumulate(smooth[late])):.5f}" if late.any() else "",
        "fails": int(steps[first]) if first < len(steps) and fails else "",
        "grad_norm_max": f"{np.max(norm[late]):.4g}" if late.any() else "",
        "not_finite": int(np.sum(~finite)),
    }


def probed(run: Run) -> dict[str, Any]:
    """Columns of the drift probe, empty without one."""
    names = ("sigma_q", "sigma_k", "dq_error", "dk_error")
    found = {
        name: np.array([x for column, (_, x) in run.columns.items() if column.startswith(f"probe/{name}_layer")])
        for name in names  # each [layers, probes]
    }
    ends = {f"{name}_{end}": found[name][:, at].max() if found[name].size else ""
            for name in names[:2] for end, at in (("first", 0), ("last", -1))}  # fmt: skip
    cells = ends | {name: found[name].max() if found[name].size else "" for name in names[2:]}
    return {name: f"{value:.4g}" if value != "" else "" for name, value in cells.items()}


def row(run: Run) -> dict[str, Any]:
    steps, loss = run.columns["loss"]
    found = stability(steps, loss, run.columns["grad_norm"][1], run.config["optim"]["warmup_steps"])
    own = {
        "model_type": AutoConfig.from_pretrained(run.config["model"]["path"]).model_type,
        "steps": run.planned, "status": run.info["status"],
    }  # fmt: skip
    return losses.row(run) | own | found | probed(run)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="text, as data.path of pre-training")
    parser.add_argument("--out", type=Path, required=True, help="where the runs go")
    parser.add_argument("--tokenizer", help="a folder or hub id; default: that of --model")
    parser.add_argument("--model", help="of `sinks`: a folder or hub id")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[x for x in SETTINGS if x != "tokens1m"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS)[:2], help="bf16 among them")
    parser.add_argument("--seeds", type=positive, default=3, help="runs of each arm")
    parser.add_argument("--jobs", type=positive, default=1, help="at a time, on each GPU")
    parser.add_argument("given", nargs="*", metavar="key=value", help="for all runs; before --settings and --arms")
    options = parser.parse_args(arguments)
    options.tokenizer = options.tokenizer or options.model
    if not options.tokenizer:
        parser.error("give --tokenizer, or --model, whose tokenizer is taken then")
    if own := [word for word in options.given if word.split("=")[0] in FIXED or word.startswith("attention.")]:
        parser.error(f"{', '.join(own)}: this is for the benchmark to set")
    if "bf16" not in options.arms:
        parser.error("--arms: bf16 has to be among them, for the others are held against it")
    for name in ("data", "out"):
        setattr(options, name, getattr(options, name).expanduser().absolute())
    if not options.data.exists():
        parser.error(f"--data {options.data} does not exist")
    settings = list(dict.fromkeys(options.settings))
    if "sinks" in settings and not options.model:
        print("sinks: skipped, for no --model is given")
        settings.remove("sinks")
    if "sinks" in settings:
        AutoConfig.from_pretrained(options.model)  # says what is wrong with it before anything is run
    device = "cuda" if torch.cuda.is_available() else "cpu"
    held, file = conditions(device), kernel_file("stress", device)
    vocabulary = f"model.config.vocab_size={len(build_tokenizer(options.tokenizer))}"
    plain = [*RECIPE, *RUN, *SHAPE, vocabulary, *options.given]
    rate = float(compose(plain).optim.lr)
    drawn = {name: compose([*plain, *changes]) for name, (_, changes) in WEIGHTS.items()}
    for setting in settings if "published" in options.arms else ():
        if compose([*plain, *SETTINGS[setting][2], *options.given]).data.document_boundaries:
            parser.error(f"published takes whole rows only: {setting} with data.document_boundaries=false, or tokens1m")
    for cfg in drawn.values():
        model_config(cfg.model)  # says what a model has not, before a folder is taken
    same_as_before(options.out, options, ("tokenizer", "data", "given"), held)
    if "sinks" in settings:
        same_as_before(options.out / "sinks", options, ("model",), held)
    words = [f"data.path={quoted(str(options.data))}"]
    words += [word for word in options.given if not word.startswith("model.config.")]
    arms = list(dict.fromkeys(options.arms))
    free, runs, begun = slots(options.jobs), list(product(range(options.seeds), arms)), []
    with pool(free) as threads:
        for setting in settings:
            (weights, times, changes), model, folder = SETTINGS[setting], options.model, options.out / setting
            folder.mkdir(exist_ok=True)
            if weights:
                sigma, _ = WEIGHTS[weights]
                model = llama(options.out / weights, drawn[weights], options.tokenizer, options.data, sigma)
            own = ["model=pretrained", f"model.path={quoted(str(model))}", f"optim.lr={times * rate:g}"]
            start = partial(threads.submit, train, free)
            promises = [
                start(folder / f"{arm}-seed{seed}", *ARMS[arm], f"seed={seed}", *changes, *words, *own)
                for seed, arm in runs
            ]
            begun.append((setting, Path(model).name, folder, promises))
        for setting, model, folder, promises in begun:
            for promise in promises:
                promise.result()
            found = [run for run in there(folder) if ended(run)]
            name = file.stem.replace("stress", f"stress-{setting}", 1)
            notes = ["Runs shared a device: tokens/s and ratios of them say nothing."] if options.jobs > 1 else []
            losses.curves([str(run) for run in found], file.with_name(name), *notes)
            given = {"setting": setting, "model": model, "text": options.data.name, "settings": " ".join(options.given)}
            write([held | given | row(Run(run)) for run in found], file)


if __name__ == "__main__":
    main()

"""One run, or a comparison of several: from the composed configuration to finished run directories.

Method: `run(cfg)` checks everything that can be known beforehand (names, lengths, kernels, an `out` that holds another
run), then hands Lightning's Trainer the model, the data and the callbacks. A comparison is the same thing once per arm
and seed, in this process, one after the other: equal seeds give equal weights and an equal order of the data, so the
arms differ in the attention alone. Runs that are finished are skipped and interrupted ones go on from their last
checkpoint.
Choice: a run directory says all there is to know (run.json, config.yaml, metrics.csv, checkpoints/); nothing is kept
elsewhere, and one run at a time has it.
Cost: several devices without an outer launcher run one run per command, because Lightning can start its helpers only
once.
"""

import contextlib
import difflib
import gc
import json
import logging
import os
import shlex
import shutil
import subprocess
import sys
import traceback
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import sagetrain
import sagetrain.data
from sagetrain.data import files
from sagetrain.data.tables import unigram_entropy
from sagetrain.doctor import quick_bf16, versions
from sagetrain.errors import asked_for, is_bad_input
from sagetrain.evaluation.scores import columns
from sagetrain.integrations import bf16
from sagetrain.ops import schemes
from sagetrain.paths import CONF_DIR, PACKAGE_DIR, groups, settings
from sagetrain.terminal import console
from sagetrain.training import loggers
from sagetrain.training.allocator import set_allocator
from sagetrain.training.attention_record import AttentionRecord
from sagetrain.training.callbacks import Bar, LastValidation, Probe, RunLog, probe_columns
from sagetrain.training.checkpoint import Checkpoint
from sagetrain.training.checkpoint_files import (
    HostCheckpointIO,
    check_checkpoint,
    checkpoints,
    last_good,
    step_of,
)
from sagetrain.training.checks import check_settings
from sagetrain.training.evaluation import Evaluate
from sagetrain.training.evaluation import check as check_evaluation
from sagetrain.training.folder import global_rank, locked, quoted, write
from sagetrain.training.full import enough
from sagetrain.training.layers import compiled, compiled_anew
from sagetrain.training.lora import DEFAULTS as LORA
from sagetrain.training.module import CausalLM, check_length, model_config
from sagetrain.training.signals import LAUNCHER, Stopped, Watch, alone, follow_launcher

# What may change between the two commands of one run without making it another run.
FREE = ("out", "resume", "logger", "checkpoint", "compare", "eval", "trainer.enable_progress_bar")
MESSAGES = (".*does not have many workers.*", ".*srun.*", ".*treespec, LeafSpec.*", ".*across ranks is zero.*")


def run(cfg: DictConfig) -> list[Path]:
    """Train what `cfg` (conf/train.yaml with a recipe) describes. Returns the run directories.

    Raises ValueError, TypeError, NotImplementedError, OSError and their kin with one line that says what to do.
    """
    follow_launcher()
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:  # the others are started by this one or by another launcher
        os.environ[LAUNCHER] = str(os.getpid())
    set_allocator()
    _quiet()
    check_settings(cfg)
    cfg = at_home(cfg)
    out = Path(cfg.out).absolute()
    if global_rank() == 0:
        again = shlex.quote(f"out={quoted(str(out))}")
        console().print(f"run directory: {out} (after an interruption: the same command with {again})", soft_wrap=True)
    with Watch() as watch, enough(cfg):
        if cfg.compare.arms:
            return _compare(cfg, out, watch)
        return [_train(_arm(cfg, cfg.attention, cfg.seed, out), watch)]


def _compare(cfg: DictConfig, out: Path, watch: Watch) -> list[Path]:
    """Train each arm with each seed, then report."""
    plans = []
    for seed in range(cfg.seed, cfg.seed + cfg.compare.seeds):
        for name in cfg.compare.arms:
            arm = _arm(cfg, OmegaConf.load(attention_file(name)), seed, out / f"{name}-seed{seed}")
            arm.probe.every = 0  # a comparison measures the real thing
            plans.append(arm)
    _check_launch(cfg, len(plans))
    for plan in plans:
        _prepare(plan)
    with locked(out):
        runs = [_train(plan, watch, group=f"{cfg.recipe}-{out.name}") for plan in plans]
        if global_rank() == 0:
            from sagetrain.compare import report, terminal

            comparison = report(runs, out)
            console().print(terminal(comparison))
            console().print(f"report: {out / 'report.html'}", soft_wrap=True)
    return runs


def at_home(cfg: DictConfig) -> DictConfig:
    """A copy with `~` in every path replaced by the home folder (data.path and val_path: data/files.py does it), and
    with the whole path of a folder of weights, which export and evaluation read again, from wherever they are called.
    """
    cfg = cfg.copy()
    for key in ("out", "resume", "model.path", "model.tokenizer"):
        path = os.path.expanduser(str(OmegaConf.select(cfg, key)))
        if key == "model.path" and os.path.isdir(path):
            path = os.path.abspath(path)
        if path != str(OmegaConf.select(cfg, key)):
            OmegaConf.update(cfg, key, path)
    return cfg


def attention_file(arm: str) -> Path:
    """The file of an arm. Raises ValueError with the choices for an unknown name."""
    choices = groups()["attention"]
    if arm not in choices:
        close = difflib.get_close_matches(str(arm), choices, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"compare.arms: unknown arm {arm!r}, choose from {', '.join(choices)}{hint}")
    return CONF_DIR / "attention" / f"{arm}.yaml"


def _arm(cfg: DictConfig, attention: DictConfig, seed: int, out: Path) -> DictConfig:
    """The configuration of one run of a comparison (or of the only run)."""
    arm = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    OmegaConf.set_struct(arm, False)
    arm.attention, arm.seed, arm.out, arm.compare = attention, seed, str(out), {"arms": None, "seeds": 1}
    arm.checkpoint.keep = cfg.checkpoint.keep or ("none" if cfg.compare.arms else "last")
    if arm.trainer.precision == "auto":
        arm.trainer.precision = "bf16-mixed" if quick_bf16(device(cfg)) else "32-true"
    arm.attention.implementation = bf16.choose(attention.implementation, device(cfg))
    if attention.implementation not in schemes.SCHEMES:
        arm.probe.every = 0
    return arm


def _prepare(cfg: DictConfig) -> tuple[Path | None, bool]:
    """Everything that can be checked before any time is spent.

    Returns the checkpoint to go on from, if any, and whether it is that of another run.
    """
    if cfg.data.get("path"):  # before the model is looked up, which can mean the network
        files.find(cfg.data.path)
    with asked_for(f"model.path={cfg.model.path}" if cfg.model.path else "model.config"):
        check_length(model_config(cfg.model), cfg.data.seq_len)
    kernel(cfg)
    check_evaluation(cfg)
    out = Path(cfg.out)
    before = out / "config.yaml"
    if before.exists():
        if cfg.resume == "never" and global_rank() == 0:  # other ranks may meet what rank 0 has just written
            raise ValueError(f"{out} holds a run already and resume=never: choose another out=FOLDER, or resume=auto")
        old, new = (settings(OmegaConf.to_container(c, resolve=True), FREE) for c in (OmegaConf.load(before), cfg))
        changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
        if changed:
            listed = ", ".join(f"{k} was {old.get(k)!r} and is now {new.get(k)!r}" for k in changed[:3])
            raise ValueError(
                f"{out} holds a run with another configuration ({listed}): choose another out=FOLDER, with "
                f"resume={out} to go on from it where only devices, batches or the optimizer's settings differ"
            )
        if found := checkpoints(out / "checkpoints"):
            return found[0], False
    if cfg.resume not in ("auto", "never"):
        start = Path(cfg.resume)
        if of_run := (start / "checkpoints").is_dir():
            start = last_good(start / "checkpoints", _in_one_file(cfg))
        if start is None or not start.exists():
            raise FileNotFoundError(
                f"resume={cfg.resume}: no checkpoint there; give auto, never, a checkpoint or a run"
            )
        if not of_run:
            check_checkpoint(start, _in_one_file(cfg))
        _check_origin(cfg, start.resolve())
        if 0 < cfg.trainer.get("max_steps", -1) <= (step := step_of(start.resolve())):
            raise ValueError(
                f"resume={cfg.resume} is a checkpoint of step {step:,}: nothing is left to train up to "
                f"trainer.max_steps={cfg.trainer.max_steps}. Set a larger trainer.max_steps"
            )
        return start.resolve(), True
    return None, False


def _check_origin(cfg: DictConfig, checkpoint: Path) -> None:
    """Raises ValueError when the run of a checkpoint, where that still lies in it, kept its moments in another way or
    cut its text into other rows."""
    file = checkpoint.parent.parent / "config.yaml"
    theirs = OmegaConf.load(file) if file.exists() else cfg
    kept = [("optim.kind", theirs.optim.get("kind", "adamw"), cfg.optim.kind, "whose moments are of another type")]
    if cfg.data.kind == theirs.data.get("kind") == "pretrain":
        kept += [("data.seq_len", theirs.data.seq_len, cfg.data.seq_len, "so its place in the data is another here")]
    if cfg.model.get("lora") is not None and theirs.model.get("lora") is not None:
        alphas = (of.model.lora.get("alpha", LORA["alpha"]) for of in (theirs, cfg))
        kept += [("model.lora.alpha", *alphas, "by which its adapters are multiplied")]
    for key, before, now, why in kept:
        if before != now:
            raise ValueError(
                f"resume={cfg.resume}: its run has {key}={before} and this one {now}, {why}. Set {key}={before}, or "
                "start from its weights alone: python -m sagetrain.export, then model.path="
            )


def kernel(cfg: DictConfig) -> str:
    """Name of what computes attention in this run. Raises RuntimeError when no kernel serves the device."""
    if (name := cfg.attention.implementation) in schemes.SCHEMES:
        return sagetrain.kernel_name(device(cfg), name)
    return name.removeprefix(bf16.PREFIX)


def device(cfg: DictConfig) -> torch.device:
    """Where the run trains, as Lightning chooses. Raises ValueError when a GPU is asked for and torch sees none."""
    asked = cfg.trainer.accelerator
    if asked in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(f"trainer.accelerator={asked}: torch sees no CUDA device; python -m sagetrain.doctor says why")
    return torch.device("cuda" if asked in ("auto", "gpu", "cuda") and torch.cuda.is_available() else "cpu")


def _check_launch(cfg: DictConfig, runs: int) -> None:
    devices = cfg.trainer.devices  # a number, or a list with the number of each device
    alone = len(devices) == 1 if OmegaConf.is_list(devices) else devices in (1, "1")
    single = alone or (devices == "auto" and torch.cuda.device_count() < 2)
    if runs > 1 and not single and not {"TORCHELASTIC_RUN_ID", "SLURM_JOB_ID"} & os.environ.keys():
        raise ValueError(
            f"a comparison on trainer.devices={devices} needs an outer launcher: "
            f"torchrun --nproc-per-node {devices} -m sagetrain {shlex.join(sys.argv[1:])}"
        )


def _train(cfg: DictConfig, watch: Watch, group: str | None = None) -> Path:
    """Train one run, or go on with it; return its directory."""
    with locked(Path(cfg.out)):
        return _train_alone(cfg, watch, group)


def _train_alone(cfg: DictConfig, watch: Watch, group: str | None) -> Path:
    (checkpoint, anew), out = _prepare(cfg), Path(cfg.out)
    facts = _facts(cfg)
    compiled_anew()
    past = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else {}
    if past.get("status") == "finished":
        console().print(f"{facts['name']}: finished already ({past['steps']} steps), skipped")
        return out
    if checkpoint and not anew:
        checkpoint = last_good(out / "checkpoints", _in_one_file(cfg))
    if checkpoint and global_rank() == 0:
        console().print(f"{facts['name']}: going on after step {step_of(checkpoint):,} ({checkpoint})", soft_wrap=True)
    facts["wandb_id"] = past.get("wandb_id", facts["wandb_id"])
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    tokenizer = sagetrain.data.build_tokenizer(cfg.model.tokenizer)
    needed = _asked(past, checkpoint) or needed_tokens(cfg)
    data = sagetrain.data.build(cfg.data, tokenizer, cfg.data.seq_len, cfg.seed, cfg.data.batch_size, needed)
    facts["data"] = data.stream.facts
    stdlib = cfg.data.get("source") == "stdlib" and not cfg.data.get("path")
    if stdlib and cfg.model.tokenizer == "byte":  # a floor that every reader can place
        facts["unigram_entropy"] = unigram_entropy(data.stream.rows(0).table)
    module = CausalLM(cfg)
    if len(tokenizer) > module.hf_config.vocab_size:
        raise ValueError(
            f"the tokenizer {cfg.model.tokenizer!r} has {len(tokenizer)} tokens and the model only "
            f"{module.hf_config.vocab_size}: set model.tokenizer, or model.config.vocab_size={len(tokenizer)}"
        )
    layers = module.hf_config.get_text_config().num_hidden_layers
    measured = (probe_columns(layers) if cfg.probe.every else ()) + columns(cfg.eval.tasks)
    log = RunLog(out, facts, extra=measured)
    evaluation = Evaluate(log, watch, cfg, tokenizer) if cfg.eval.tasks else None
    io, last = HostCheckpointIO() if _in_one_file(cfg) else None, None if anew else checkpoint
    save = Checkpoint(out, watch=watch, io=io, last=last, anew=anew, facts=facts, **cfg.checkpoint)
    bar = Bar(log, facts["name"])
    with _recorded(log, bar, watch) as trainers:
        trainer = _trainer(cfg, log, save, bar, group, evaluation)
        trainers.append(trainer)
        if trainer.is_global_zero:
            log.write_status("running", past.get("steps", 0))
            write(out / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        with enough(cfg):
            trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
            if trainer.is_global_zero:
                save.catch_up(cfg, checkpoint)
    if global_rank() == 0:
        save.clear()
        kept = {"last": f"checkpoint in {out / 'checkpoints'}", "weights": f"weights in {out / 'weights'}"}
        ends = ((name, log.row.get(name) if log.row else None) for name in ("loss", "val_loss"))
        loss = "".join(f"{name} {value:.4f}, " for name, value in ends if isinstance(value, float))
        console().print(f"{facts['name']}: finished, {loss}{kept.get(save.keep, 'no weights kept')}", soft_wrap=True)
    del trainer, module, data
    gc.collect()
    return out


def needed_tokens(cfg: DictConfig) -> int | None:
    """Tokens that all ranks read until the last step, or a few more; None where no step is said to be the last."""
    options, env = cfg.trainer, os.environ
    devices = len(options.devices) if OmegaConf.is_list(options.devices) else options.devices
    if not str(devices).isdecimal():  # auto, -1
        devices = max(torch.cuda.device_count(), 1)
    ranks = int(devices) * options.get("num_nodes", 1)
    ranks = max(ranks, *(int(env.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_NTASKS")))
    steps, rows = options.get("max_steps", -1), cfg.data.batch_size * options.get("accumulate_grad_batches", 1)
    return steps * rows * cfg.data.seq_len * ranks if steps > 0 else None


def _asked(past: dict[str, Any], checkpoint: Path | None) -> int | None:
    """Tokens that a run that goes on had asked a hub data set for: more or fewer of them are in another order."""
    before = checkpoint and checkpoint.parent.parent / "run.json"
    if not past and before and before.exists():
        past = json.loads(before.read_text())
    return past.get("data", {}).get("asked")


@contextlib.contextmanager
def _recorded(log: RunLog, bar: Bar, watch: Watch) -> Iterator[list[L.Trainer]]:
    """Have run.json and the loggers say how a run ended, however it ends. Yields a list for its trainer."""
    trainers: list[L.Trainer] = []

    def write_down(status: str, **more: Any) -> None:
        if torch.cuda.is_initialized():
            log.facts["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        log.facts |= compiled()
        if global_rank() == 0 and trainers:
            log.write_status(status, trainers[0].global_step, **more)

    def finish(code: int) -> None:
        watch.stepping = False
        trainers.clear()
        bar.stop()
        try:
            log.close()
        except OSError:  # a full disk: of a run that failed the first error counts
            if code == 0:
                raise
        if wandb := sys.modules.get("wandb"):
            wandb.finish(exit_code=code)

    watch.on_forced_end = lambda said: write_down("stopped", error=said)
    try:
        yield trainers
    except BaseException as error:
        more = {} if isinstance(error, Stopped) or is_bad_input(error) else {"traceback": traceback.format_exc()}
        end = error
        if watch.stop and more:
            # Launchers signal a whole group of processes: a compiler that dies of it makes an error of this step.
            end = Stopped(watch.stop, f"in the middle of a step ({type(error).__name__}: {error})".splitlines()[0])
        with contextlib.suppress(OSError):  # the disk may be the very problem
            status = "stopped" if isinstance(end, Stopped) else "failed"
            write_down(status, error=f"{type(end).__name__}: {end}", **more)
        finish(code=1)
        if end is error:
            raise
        raise end from error
    write_down("finished")
    finish(code=0)


def _trainer(
    cfg: DictConfig, log: RunLog, save: Checkpoint, bar: Bar, group: str | None, evaluation: Evaluate | None
) -> L.Trainer:
    options: dict[str, Any] = OmegaConf.to_container(cfg.trainer, resolve=True)  # type: ignore[assignment]
    bars = [bar] if options.pop("enable_progress_bar", True) else []
    measures = [Probe(log, cfg.probe.every, cfg.probe.max_tokens)] if cfg.probe.every else []
    measures += [evaluation] if evaluation else []
    target = cfg.strategy.get("_target_")
    strategy = instantiate(cfg.strategy, attention=cfg.attention.implementation) if target else "auto"
    trainer = L.Trainer(
        **{"enable_checkpointing": False, "enable_model_summary": False, "use_distributed_sampler": False} | options,
        default_root_dir=cfg.out,
        strategy=strategy,
        # In this order: what is measured in a step belongs to its row, and a checkpoint comes after both.
        callbacks=[
            AttentionRecord(log, cfg.attention.implementation, bar.console),
            log,
            *bars,
            *measures,
            LastValidation(),
            save,
        ],
        plugins=[save.io] if save.io else None,
        enable_progress_bar=False,
        logger=loggers.start(cfg, log.facts, group) or False,
    )
    alone(trainer)
    return trainer


def _in_one_file(cfg: DictConfig) -> bool:
    """Whether the strategy's checkpoints are files (those of FSDP2 and DeepSpeed are folders)."""
    target = cfg.strategy.get("_target_")
    return not target or target.endswith("SageDDPStrategy")


def _facts(cfg: DictConfig) -> dict[str, Any]:
    """What run.json says about a run, whatever becomes of it."""
    where = device(cfg)
    facts = {
        "name": f"{cfg.attention.name}-seed{cfg.seed}",
        "recipe": cfg.recipe,
        "arm": cfg.attention.name,
        "seed": cfg.seed,
        "max_steps": cfg.trainer.max_steps,
        "kernel": kernel(cfg),
        "precision": cfg.trainer.precision,
        "device": torch.cuda.get_device_name() if where.type == "cuda" else f"cpu ({torch.get_num_threads()} threads)",
        "versions": versions(),
        "command": shlex.join(["python", "-m", "sagetrain", *sys.argv[1:]]),
        "wandb_id": uuid.uuid4().hex[:8],
    }
    if (PACKAGE_DIR.parent / ".git").exists() and shutil.which("git"):
        git = subprocess.run(["git", "-C", PACKAGE_DIR.parent, "rev-parse", "HEAD"], capture_output=True, text=True)
        if git.returncode == 0:
            facts["git_commit"] = git.stdout.strip()
    return facts


def _quiet() -> None:
    """Leave out what Lightning says on every run and nobody can act on."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in MESSAGES:
        warnings.filterwarnings("ignore", message)

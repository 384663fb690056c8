"""Checkpoints that survive a kill at any moment, and training that goes on from them as if nothing had happened.

Method: at a save point the state is copied to the memory of the host and training goes on; a thread writes the copy
aside (`.partial-step-N.ckpt`), flushes it to the disk, renames it to `step-N.ckpt`, and only then deletes what is older
than the checkpoint before; `last.ckpt` is a link to the newest. The next save, a signal that asked for this one and the
end of the run wait for the thread; where it failed, the next step raises that on all ranks. Folders (FSDP2, DeepSpeed)
are written while training waits. With Lightning's own state (weights, optimizer, schedule, loops, data order) goes the
state of every random number generator, so the losses after a resume are those of a run that was never stopped, bit for
bit.
Weights that are not finite are never saved, so the last checkpoint is always a good one; where the disk spoils it, the
one before is used (checkpoint_files.py). Once a step the ranks compare what signals and clocks ask for, over a process
group on the CPU, so that no device waits.
Choice: not Lightning's ModelCheckpoint, which overwrites `last.ckpt` in place and builds the whole file in memory
first, nor its AsyncCheckpointIO, whose copies stay on the device and whose errors wait for the save after.
Cost: room for three checkpoints while one is written, which is asked for before training starts, and pinned memory of
the host for one state, which torch keeps. To pin it takes longer than the copy, so where saves are to come the thread
does it while the second step and those after it run. How often this process saved, how long training stood still for it
and how long the thread wrote is in run.json (`saves`, `save_stall_s`, of it the longest `save_stall_max_s`,
`save_write_s`).
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from sagetrain.terminal import console
from sagetrain.training.checkpoint_files import HostCheckpointIO, checkpoints, flush, pin, pinned_sizes, remove, size
from sagetrain.training.export import save_weights, save_weights_of
from sagetrain.training.finite import is_finite, what_is_bad
from sagetrain.training.module import numel
from sagetrain.training.signals import Stopped, Watch, requeue

PARTIAL = ".partial-"
SLURM_LINK = "hpc_ckpt_1.ckpt"
KEEP = ("last", "weights", "none")
TORCH_WRITER = "inline_container.cc"  # in what torch.save says of a full disk, a RuntimeError


def way_back(trainer: L.Trainer) -> str:
    """What to do when numbers are not finite any more."""
    kept = next((each.last_saved() for each in trainer.callbacks if isinstance(each, Checkpoint)), None)
    if kept is None:
        return "There is no checkpoint yet: start anew with a lower optim.lr, or look at the data of that step"
    return (
        f"The last good checkpoint is kept: {kept}. Start from it with a lower optim.lr (resume=CHECKPOINT "
        "out=NEW_FOLDER), or look at the data of that step"
    )


def random_state() -> dict[str, Any]:
    """The state of every random number generator, in types that `torch.load(weights_only=True)` reads."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": [kind, keys.tolist(), *rest]}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


def settings_of_this_run(trainer: L.Trainer, module: L.LightningModule) -> None:
    """Optimizer and schedule as the configuration of this run has them, where a checkpoint brought those of another.

    What was learned stays (the moments, the number of the step); learning rate, betas, weight decay and the shape of
    the schedule are the user's.
    """
    fresh, schedule = module.configure_optimizers(), trainer.lr_scheduler_configs[0].scheduler
    schedule.base_lrs = list(fresh["lr_scheduler"]["scheduler"].base_lrs)
    schedule.lr_lambdas = fresh["lr_scheduler"]["scheduler"].lr_lambdas
    lrs = [lr * share(schedule.last_epoch) for lr, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    groups = trainer.optimizers[0].param_groups
    for group, new, lr in zip(groups, fresh["optimizer"].param_groups, lrs, strict=True):
        lr = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr  # torchao's
        group.update({key: value for key, value in new.items() if key != "params"} | {"lr": lr})


class Checkpoint(L.Callback):
    """Saves every `every_n_steps` steps, every `every_minutes` minutes (0: never), when a signal asks, and at the end.

    out: the run directory. keep: what stays of a finished run, `last` (the last checkpoint), `weights` (in Hugging
    Face's format, in `out`/weights) or `none`; with `none` and both intervals 0 nothing is ever written.
    watch: the signals. io: the trainer's, where checkpoints are files. last: the checkpoint in `out` that training goes
    on from. anew: it starts from that of another run. facts: where it is noted how long the saves took.
    """

    def __init__(
        self,
        out: Path,
        every_n_steps: int,
        every_minutes: float,
        keep: str,
        watch: Watch,
        io: HostCheckpointIO | None = None,
        last: Path | None = None,
        anew: bool = False,
        facts: dict[str, Any] | None = None,
    ) -> None:
        if keep not in KEEP:
            raise ValueError(f"checkpoint.keep={keep}: choose one of {', '.join(KEEP)}")
        self.out = out
        self.folder = out / "checkpoints"
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.watch = watch
        self.io = io
        self.last = last  # the newest that is complete, as far as this rank knows
        self.anew = anew
        self.facts = {} if facts is None else facts
        self.facts |= {"saves": 0, "save_stall_s": 0.0, "save_stall_max_s": 0.0, "save_write_s": 0.0}
        self.periodic = bool(every_n_steps or every_minutes)
        self._saved_step = self._seen = 0
        self._weights_saved = False
        self._whole = True  # the last micro-batch was the last of its step
        self._saved_time = time.monotonic()
        self._random_state: dict[str, Any] | None = None
        self._group: dist.ProcessGroup | None = None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._next: Path | None = None  # what is being written, on every rank; rank 0 has the thread's promise
        self._promise: Future | None = None
        self._pinning: list[Future] = []  # one, from the end of the first step on

    def state_dict(self) -> dict[str, Any]:
        return {"random": random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random_state = state["random"]

    @property
    def never(self) -> bool:
        return self.keep == "none" and not self.periodic

    def room(self, module: L.LightningModule) -> int:
        """Bytes that this run will write beyond what is there already."""
        copies = int(self.keep == "last")
        if self.periodic:  # the last, the one before and the next lie side by side for a moment
            copies = 3 - min(2, len(checkpoints(self.folder)))
        weights = _bytes(module, bool(getattr(module, "lora", None))) if self.keep == "weights" else 0
        return copies * _bytes_of_checkpoint(module) + weights

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raises OSError when the disk has no room for what this run will write."""
        if self.never:
            return
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_partial()
        need, free = self.room(module), shutil.disk_usage(self.out).free
        if need > free:
            raise OSError(
                f"no room for the checkpoints of this run: they need {need / 1e6:,.1f} MB and {self.folder} has "
                f"{free / 1e6:,.1f} MB free. Free some space, choose another disk with out=FOLDER, or save less: "
                "checkpoint.keep=none checkpoint.every_n_steps=0 checkpoint.every_minutes=0 saves nothing"
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raises RuntimeError when the ranks have found different checkpoints."""
        self._saved_step = self._seen = trainer.global_step
        self._saved_time = time.monotonic()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            steps = [0] * trainer.world_size
            dist.all_gather_object(steps, trainer.global_step, group=self._group)
            if len(set(steps)) > 1:
                raise RuntimeError(
                    f"the ranks start from checkpoints of different steps ({steps}): {self.folder} is not the same on "
                    "all machines"
                )
        if self.anew:
            settings_of_this_run(trainer, module)
        self.watch.stepping = True

    def on_train_batch_start(self, *_: Any) -> None:
        if self._random_state is not None:  # as late as possible: whatever the start of the run drew is undone
            set_random_state(self._random_state)
            self._random_state = None

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        step = trainer.global_step
        self._whole = step != self._seen
        if not self._whole:  # within an accumulation
            return
        self._seen = step
        if self.periodic and self.io is not None and trainer.is_global_zero and not self._pinning:
            state = module.state_dict(), [optimizer.state_dict() for optimizer in trainer.optimizers]
            self._pinning = [self._thread.submit(pin, pinned_sizes(state))]
        due = bool(self.every_n_steps) and step % self.every_n_steps == 0
        late = bool(self.every_minutes) and time.monotonic() - self._saved_time >= 60 * self.every_minutes
        self._heed(trainer, due or late or (self.keep == "last" and step == trainer.max_steps))

    def on_validation_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any, **__: Any) -> None:
        """A signal need not wait for a long validation (as long on every rank), but for one within an accumulation."""
        if self.watch.stepping and self._whole:
            self._heed(trainer)

    def _heed(self, trainer: L.Trainer, due: bool = False) -> None:
        """Do what signals or, where it is `due` on a rank, the time ask for: the same on all ranks. Raises Stopped."""
        save, self.watch.save = self.watch.save, 0
        failed = self._promise is not None and self._promise.done() and self._promise.exception() is not None
        asked = torch.tensor((self.watch.stop, save, int(due), int(failed)))
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        stop, save, due, failed = asked.tolist()
        if failed:
            self.settle(trainer)
        if (stop or save or due) and trainer.global_step != self._saved_step:
            self.save(trainer)
        if stop or save:
            self.settle(trainer)
        if save == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()
        if stop:
            where = f"; its checkpoint: {self.last}" if not self.never else ", without a checkpoint"
            raise Stopped(stop, f"after step {trainer.global_step}{where}")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What is left to write of a finished run is written whatever signal comes now: it may be all that stays."""
        if self.keep == "last" and trainer.global_step != self._saved_step:
            self.save(trainer)
        self.settle(trainer)
        if self.keep == "weights":
            save_weights(trainer, module, self.out / "weights")
            self._weights_saved = True
        self._leave(trainer)

    def catch_up(self, cfg: DictConfig, checkpoint: Path | None) -> None:
        """After training (rank 0): where it began with the last step's `checkpoint`, Lightning had nothing to train and
        called no `on_train_end`, so the weights are still to be written."""
        if self.keep == "weights" and not self._weights_saved and checkpoint is not None:
            save_weights_of(checkpoint, cfg, self.out / "weights")

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        """Whatever ends the run, the checkpoint that is being written is finished; where that fails it is said."""
        if self._promise is not None and (failed := self._promise.exception()) is not None:
            self._remove_partial()
            console(stderr=True).print(f"{self._next.name} could not be written: {failed}", soft_wrap=True)
        self._leave(trainer)

    def _leave(self, trainer: L.Trainer) -> None:
        """Nothing is left to save."""
        wait(self._pinning)  # the next run in this process does the same
        self.watch.stepping = False
        trainer.strategy.optimizers = []  # else Lightning copies their state to the host: 10 GB of a billion weights

    def clear(self) -> None:
        """After the end of a run: leave what is to be kept."""
        if self.keep == "last":
            for old in checkpoints(self.folder):
                if old != self.last:
                    remove(old)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.out / SLURM_LINK).unlink(missing_ok=True)

    def save(self, trainer: L.Trainer) -> None:
        """Save one checkpoint (never: nothing), after the one before is complete.

        Raises OSError when either fails, FloatingPointError when there is nothing finite to save.
        """
        if self.never:
            return
        begun, step = time.perf_counter(), trainer.global_step
        if not is_finite(trainer) or not trainer.lightning_module.finite():
            raise FloatingPointError(
                f"the weights, the optimizer or the gradients of step {step} are not finite, so they are not saved. "
                f"{what_is_bad(trainer, trainer.lightning_module)}{way_back(trainer)}"
            )
        self.settle(trainer)
        wait(self._pinning)  # else the copy would pin as much again; where pinning failed, it tries and says why
        self._next = self.folder / f"step-{step:08d}.ckpt"
        partial = self.folder / f"{PARTIAL}{self._next.name}"
        self._together(trainer, lambda: trainer.is_global_zero and self._check_space(trainer.lightning_module))
        self._together(trainer, lambda: trainer.save_checkpoint(partial))
        if self.io is None:
            self._together(trainer, lambda: trainer.is_global_zero and self._publish(partial, self._next, self.last))
            self.last, self._next = self._next, None
        elif trainer.is_global_zero:
            state, self.io.taken = self.io.taken, None
            self._promise = self._thread.submit(self._write, state, partial, self._next, self.last)
        self._saved_step, self._saved_time = step, time.monotonic()
        stall = time.perf_counter() - begun
        self.facts["saves"] += 1
        self.facts["save_stall_s"] = round(self.facts["save_stall_s"] + stall, 3)
        self.facts["save_stall_max_s"] = round(max(self.facts["save_stall_max_s"], stall), 3)

    def settle(self, trainer: L.Trainer) -> None:
        """Wait for the checkpoint that is being written. Raises OSError on every rank when that failed."""
        if self._next is not None:
            self._together(trainer, lambda: self._promise and self._promise.result())
            self.last, self._next, self._promise = self._next, None, None

    def last_saved(self) -> Path | None:
        """The newest complete checkpoint, waiting for the one that is being written (rank 0 only)."""
        written = self._promise is not None and self._promise.exception() is None
        return self._next if written else self.last

    def _together(self, trainer: L.Trainer, write: Callable[[], Any]) -> None:
        """Does `write` on every rank; where it fails on one, raises on all, so that none waits for another."""
        failed: BaseException | None = None
        try:
            write()
        except (OSError, RuntimeError, CheckpointException) as error:
            failed = error
        if trainer.strategy.reduce_boolean_decision(failed is None, all=True):
            return
        name, self._next, self._promise = self._next.stem, None, None
        if trainer.is_global_zero:
            self._remove_partial()
        if isinstance(failed, RuntimeError) and TORCH_WRITER not in str(failed):
            raise failed
        raise OSError(
            f"could not write the checkpoint of step {int(name.removeprefix('step-'))}: "
            f"{failed or 'another rank could not'}. The last good one is kept: {self.last or 'none yet'}. Free some "
            "space on that disk and start the same command again to go on"
        ) from failed

    def _check_space(self, module: L.LightningModule) -> None:
        """Raises OSError before a checkpoint is begun that would not find room."""
        need = _bytes_of_checkpoint(module) if self.last is None else size(self.last)
        if (free := shutil.disk_usage(self.out).free) < need:
            raise OSError(f"it needs {need / 1e6:,.1f} MB and {self.folder} has {free / 1e6:,.1f} MB free")

    def _write(self, state: dict[str, Any], partial: Path, final: Path, before: Path | None) -> None:
        begun = time.perf_counter()
        torch.save(state, partial)
        self._publish(partial, final, before)
        self.facts["save_write_s"] = round(self.facts["save_write_s"] + time.perf_counter() - begun, 3)

    def _publish(self, partial: Path, final: Path, before: Path | None) -> None:
        """Has a checkpoint that is written take its place; `before` stays, what is older or damaged goes."""
        flush(partial)
        if final.is_dir():  # a damaged one
            remove(final)
        os.replace(partial, final)
        link = self.folder / f"{PARTIAL}last"
        link.symlink_to(final.name)
        os.replace(link, self.folder / "last.ckpt")
        if SLURMEnvironment.detect():  # where Lightning's ckpt_path="hpc" looks
            link.symlink_to(Path(self.folder.name, "last.ckpt"))
            os.replace(link, self.out / SLURM_LINK)
        for old in checkpoints(self.folder):
            if old not in (final, before):
                remove(old)

    def _remove_partial(self) -> None:
        for leftover in self.folder.glob(f"{PARTIAL}*"):
            remove(leftover)


def _bytes(module: L.LightningModule, trained: bool) -> int:
    """Of the weights, or of those that are `trained`, all ranks' shares together."""
    return sum(numel(p) * p.element_size() for p in module.parameters() if p.requires_grad or not trained)


def _bytes_of_checkpoint(module: L.LightningModule) -> int:
    """With AdamW's two moments of what is trained."""
    return _bytes(module, getattr(module, "adapters_alone", False)) + 2 * _bytes(module, trained=True)

"""Checkpoints that survive a kill at any moment, and training that goes on from them as if nothing had happened.

Method: each checkpoint is written aside (`.partial-step-N.ckpt`), flushed to the disk, renamed to `step-N.ckpt`, and
only then is the previous one deleted; `last.ckpt` is a link to it. A file (one device, DDP) and a folder (FSDP2,
DeepSpeed) are treated alike. With Lightning's own state (weights, optimizer, schedule, loops, data order) goes the
state of every random number generator, so the losses after a resume are those of a run that was never stopped, bit for
bit.
Weights that are not finite are never saved, so the last checkpoint is always a good one. Once a step the ranks
compare what signals and clocks ask for, over a process group on the CPU, so that no device waits.
Choice: not Lightning's ModelCheckpoint, which overwrites `last.ckpt` in place and builds the whole file in memory
first.
Cost: room for two checkpoints while one is replaced; it is asked for before training starts.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import lightning.pytorch as L
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sagetrain.training.export import save_weights
from sagetrain.training.module import numel
from sagetrain.training.signals import Stopped, Watch, requeue

PARTIAL = ".partial-"
SLURM_LINK = "hpc_ckpt_1.ckpt"
KEEP = ("last", "weights", "none")
TORCH_WRITER = "inline_container.cc"  # in what torch.save says of a full disk, a RuntimeError


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = folder.glob("step-*.ckpt")
    return max(found, key=lambda path: int(path.stem.removeprefix("step-")), default=None)


def check_checkpoint(path: Path, in_one_file: bool) -> None:
    """Raises ValueError for what is no checkpoint of a run, or none that a strategy `in_one_file` can read."""
    if path.is_dir():
        if in_one_file:
            raise ValueError(
                f"{path} is a folder, which FSDP2 and DeepSpeed read as a checkpoint: give strategy= as that run had, "
                "or a checkpoint in one file"
            )
        return
    try:
        found = torch.load(path, map_location="meta", mmap=True, weights_only=True) if is_zipfile(path) else None
    except Exception as error:  # torch's word for it depends on what the bytes happen to be
        raise ValueError(f"{path} is no checkpoint, or it is damaged: {str(error).splitlines()[0][:200]}") from error
    if not isinstance(found, dict) or not {"state_dict", "loops", "optimizer_states"} <= found.keys():
        raise ValueError(
            f"{path} is no checkpoint of a run, or it is damaged. To start from weights alone give the folder that "
            "holds them in Hugging Face's format as model.path"
        )


def way_back(folder: Path) -> str:
    """What to do when numbers are not finite any more, for a run with its checkpoints in `folder`."""
    if (kept := newest(folder)) is None:
        return "There is no checkpoint yet: start anew with a lower optim.lr, or look at the data of that step"
    return (
        f"The last good checkpoint is kept: {kept}. Start from it with a lower optim.lr (resume=CHECKPOINT "
        "out=NEW_FOLDER), or look at the data of that step"
    )


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Have the disk keep `path`: a file, or a folder with everything in it."""
    for file in [*path.rglob("*"), path] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes straight to the path (Lightning's own builds the file in memory, then in the temporary folder) and reads
    onto the CPU by its name (Lightning's own gives a function, which quantised moments refuse)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        torch.save(checkpoint, path)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)


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


def parts(x: Any) -> Iterator[Tensor]:
    """The plain floating-point tensors in `x`: itself, a DTensor's shard, the scales of quantised moments, or none."""
    if not isinstance(x, Tensor):  # a step that is counted in Python, a DTensor's mesh
        return
    if is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            yield from parts(getattr(x, name))
    elif x.is_floating_point():
        yield x


@torch.no_grad()
def is_finite(trainer: L.Trainer) -> bool:
    """Whether the weights and the state of the optimizers, every rank's share of them, are finite."""
    weights = [getattr(weight, "ds_tensor", weight) for weight in trainer.lightning_module.parameters()]
    kept = [(weight, *state.values()) for each in trainer.optimizers for weight, state in each.state.items()]
    sums = [part.sum(dtype=torch.float64) for x in chain(weights, *kept) for part in parts(x)]
    here = all(bool(torch.isfinite(x)) for x in sums)
    return trainer.strategy.reduce_boolean_decision(here, all=True)


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
    watch: the signals. anew: the checkpoint that training starts from belongs to another run.
    """

    def __init__(
        self, out: Path, every_n_steps: int, every_minutes: float, keep: str, watch: Watch, anew: bool = False
    ) -> None:
        if keep not in KEEP:
            raise ValueError(f"checkpoint.keep={keep}: choose one of {', '.join(KEEP)}")
        self.out = out
        self.folder = out / "checkpoints"
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.watch = watch
        self.anew = anew
        self.periodic = bool(every_n_steps or every_minutes)
        self._saved_step = self._seen = 0
        self._whole = True  # the last micro-batch was the last of its step
        self._saved_time = time.monotonic()
        self._random_state: dict[str, Any] | None = None
        self._group: dist.ProcessGroup | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"random": random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random_state = state["random"]

    @property
    def never(self) -> bool:
        return self.keep == "none" and not self.periodic

    def room(self, module: L.LightningModule) -> int:
        """Bytes that this run will write beyond what is there already."""
        weights = sum(numel(p) * p.element_size() for p in module.parameters())
        whole = 3 * weights  # with AdamW's two moments
        copies = int(self.keep == "last")
        if self.periodic:  # one old and one new checkpoint lie side by side for a moment
            copies = 1 if newest(self.folder) else 2
        return copies * whole + (weights if self.keep == "weights" else 0)

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raises OSError when the disk has no room for what this run will write."""
        if self.never:
            return
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{PARTIAL}*"):
                _remove(leftover)
        need, free = self.room(module), shutil.disk_usage(self.out).free
        if need > free:
            raise OSError(
                f"no room for the checkpoints of this run: they need {need / 1e6:,.1f} MB and {self.folder} has "
                f"{free / 1e6:,.1f} MB free. Free some space, choose another disk with out=FOLDER, or save less: "
                "checkpoint.keep=none checkpoint.every_n_steps=0 checkpoint.every_minutes=0 saves nothing"
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved_step = self._seen = trainer.global_step
        self._saved_time = time.monotonic()
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
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
        asked = torch.tensor((self.watch.stop, save, int(due)))
        if self._group is not None:
            dist.all_reduce(asked, dist.ReduceOp.MAX, group=self._group)
        stop, save, _ = asked.tolist()
        if asked.any() and trainer.global_step != self._saved_step:
            self.save(trainer)
        if stop:
            where = f"; its checkpoint: {newest(self.folder)}" if not self.never else ", without a checkpoint"
            raise Stopped(stop, f"after step {trainer.global_step}{where}")
        if save == signal.SIGUSR1 and trainer.is_global_zero:
            requeue()

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """What is left to write of a finished run is written whatever signal comes now: it may be all that stays."""
        if self.keep == "last" and trainer.global_step != self._saved_step:
            self.save(trainer)
        if self.keep == "weights":
            save_weights(trainer, module, self.out / "weights")
        self.watch.stepping = False

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self.watch.stepping = False

    def clear(self) -> None:
        """After the end of a run: leave what is to be kept."""
        if self.keep != "last":
            shutil.rmtree(self.folder, ignore_errors=True)
            (self.out / SLURM_LINK).unlink(missing_ok=True)

    def save(self, trainer: L.Trainer) -> None:
        """Write one checkpoint (never: nothing). The previous one stays where it is until the new one is whole.

        Raises OSError when that fails, FloatingPointError when there is nothing finite to save.
        """
        if self.never:
            return
        step = trainer.global_step
        final = self.folder / f"step-{step:08d}.ckpt"
        partial = self.folder / f"{PARTIAL}{final.name}"
        if not is_finite(trainer) or not trainer.lightning_module.finite():
            raise FloatingPointError(
                f"the weights, the optimizer or the gradients of step {step} are not finite, so they are not saved. "
                + way_back(self.folder)
            )
        self._together(trainer, step, partial, lambda: trainer.save_checkpoint(partial))
        self._together(trainer, step, partial, lambda: trainer.is_global_zero and self._publish(partial, final))
        self._saved_step, self._saved_time = step, time.monotonic()

    def _together(self, trainer: L.Trainer, step: int, partial: Path, write: Callable[[], Any]) -> None:
        """Does `write` on every rank; where it fails on one, raises on all, so that none waits for another."""
        failed: BaseException | None = None
        try:
            write()
        except (OSError, RuntimeError, CheckpointException) as error:
            failed = error
        if trainer.strategy.reduce_boolean_decision(failed is None, all=True):
            return
        if trainer.is_global_zero:
            _remove(partial)
        if isinstance(failed, RuntimeError) and TORCH_WRITER not in str(failed):
            raise failed
        raise OSError(
            f"could not write the checkpoint of step {step}: {failed or 'another rank could not'}. The last good one "
            f"is kept: {newest(self.folder) or 'none yet'}. Free some space on that disk and start the same command "
            "again to go on"
        ) from failed

    def _publish(self, partial: Path, final: Path) -> None:
        _flush(partial)
        os.replace(partial, final)
        link = self.folder / f"{PARTIAL}last"
        link.symlink_to(final.name)
        os.replace(link, self.folder / "last.ckpt")
        if SLURMEnvironment.detect():  # where Lightning's ckpt_path="hpc" looks
            link.symlink_to(Path(self.folder.name, "last.ckpt"))
            os.replace(link, self.out / SLURM_LINK)
        for old in self.folder.glob("step-*.ckpt"):
            if old != final:
                _remove(old)

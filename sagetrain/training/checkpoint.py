"""Checkpoints that survive a kill at any moment, and training that goes on from them as if nothing had happened.

Method: each checkpoint is written aside (`.partial-step-N.ckpt`), flushed to the disk, renamed to `step-N.ckpt`, and
only then is the previous one deleted; `last.ckpt` is a link to it. A file (one device, DDP) and a folder (FSDP2,
DeepSpeed) are treated alike. With Lightning's own state (weights, optimizer, schedule, loops, data order) goes the
state of every random number generator, so the losses after a resume are those of a run that was never stopped, bit for
bit.
Choice: not Lightning's ModelCheckpoint, which overwrites `last.ckpt` in place and builds the whole file in memory
first.
Cost: room for two checkpoints while one is replaced; it is asked for before training starts.
"""

import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

PARTIAL = ".partial-"


def newest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None."""
    found = folder.glob("step-*.ckpt")
    return max(found, key=lambda path: int(path.stem.removeprefix("step-")), default=None)


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


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes straight to the path (Lightning's own builds the file in memory, then in the temporary folder)."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        torch.save(checkpoint, path)


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


class Checkpoint(L.Callback):
    """Saves every `every_n_steps` steps, every `every_minutes` minutes (0: never) and at the end of training."""

    def __init__(self, folder: Path, every_n_steps: int, every_minutes: float) -> None:
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.every_minutes = every_minutes
        self._saved_step = 0
        self._saved_time = time.monotonic()
        self._random_state: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"random": random_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._random_state = state["random"]

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Raises OSError when the disk has no room for the checkpoints of this run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if trainer.is_global_zero:
            for leftover in self.folder.glob(f"{PARTIAL}*"):
                _remove(leftover)
        # Weights and AdamW's two moments; one old and one new checkpoint lie side by side for a moment.
        size = 3 * sum(p.numel() * p.element_size() for p in module.parameters())
        need = size * (1 if newest(self.folder) else 2)
        free = shutil.disk_usage(self.folder).free
        if need > free:
            raise OSError(
                f"no room for the checkpoints of this run: they need {_size(need)} and {self.folder} has {_size(free)} "
                "free. Free some space, or choose another disk with out=FOLDER"
            )

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._saved_step, self._saved_time = trainer.global_step, time.monotonic()

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        if self._random_state is not None:  # as late as possible: whatever the start of the run drew is undone
            set_random_state(self._random_state)
            self._random_state = None

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if step == self._saved_step:  # within an accumulation, or just saved
            return
        due = bool(self.every_n_steps) and step % self.every_n_steps == 0 or step == trainer.max_steps
        if self.every_minutes and not due:  # clocks differ between ranks: the first decides
            due = trainer.strategy.broadcast(time.monotonic() - self._saved_time >= 60 * self.every_minutes)
        if due:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step != self._saved_step:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Write one checkpoint. Raises OSError when that fails; the previous one is then still there."""
        step = trainer.global_step
        final = self.folder / f"step-{step:08d}.ckpt"
        partial = self.folder / f"{PARTIAL}{final.name}"
        try:
            trainer.save_checkpoint(partial)
            trainer.strategy.barrier("checkpoint written")
            if trainer.is_global_zero:
                self._publish(partial, final)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as RuntimeError
            if trainer.is_global_zero:
                _remove(partial)
            kept = newest(self.folder)
            raise OSError(
                f"could not write the checkpoint of step {step}: {error}. The last good one is kept: "
                f"{kept or 'none yet'}. Free some space on that disk and start the same command again to go on"
            ) from error
        trainer.strategy.barrier("checkpoint in place")
        self._saved_step, self._saved_time = step, time.monotonic()

    def _publish(self, partial: Path, final: Path) -> None:
        _flush(partial)
        os.replace(partial, final)
        link = self.folder / f"{PARTIAL}last"
        link.symlink_to(final.name)
        os.replace(link, self.folder / "last.ckpt")
        for old in self.folder.glob("step-*.ckpt"):
            if old != final:
                _remove(old)

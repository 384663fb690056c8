"""A Lightning data module that resumes exactly, and the batches it hands out.

Method: a stream is a function from a position (plain types) to the batches that follow it, each with the position
after it. The data module keeps the position after the last batch that was *trained on*: Lightning fetches one batch
ahead, and an interrupted step is to be done again, so neither what was fetched nor what was started counts. Positions
are global (the same on every rank): rank r takes its slice of each global batch, so one rank's checkpoint serves all,
and a run may go on with another number of ranks. With accumulation checkpoints fall between optimizer steps, and so do
positions. A thread makes the batches of the next two steps while a step runs, and `waited` counts the seconds for which
training waited nevertheless; no worker processes, since a row takes well under a millisecond.
Kept by hand, since the stateful loaders of torchdata and `datasets` lack it: they count what was handed out, each rank
for itself, and none counts the targets of an optimizer step beforehand.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor

from sagetrain.data.collate import IGNORE
from sagetrain.data.tables import ahead

Batch = dict[str, Any]


def targets(labels: Tensor) -> Tensor:
    """Number of tokens in labels `[B, T]` that the loss counts, after the model's shift: int64 []."""
    return (labels[..., 1:] != IGNORE).sum()


class Stream:
    """Training and validation batches of one data set.

    Global batch g is rows g*B*W to (g+1)*B*W of W ranks, and rank r takes the r-th B of them. So the rows and their
    order do not depend on the number of ranks, and neither does a checkpoint.

    Args:
        name: tells data sets (and their order) apart in a checkpoint.
        rows: the rows of an epoch, the same number in each; they are permuted by (seed, epoch).
        held_out: rows for validation.
        collate: makes a batch of rows.
        batch_size: rows in a batch of one rank.
        endless: whether batches run on from epoch to epoch; if not, what does not fill one at an epoch's end is unused.
    """

    start: dict[str, Any] = {"epoch": 0, "row": 0}  # position of the first batch

    def __init__(
        self,
        name: str,
        rows: Callable[[int], Sequence[Any]],
        held_out: list[Any],
        collate: Callable[[Sequence[Any]], Batch],
        batch_size: int,
        seed: int,
        endless: bool,
        facts: dict[str, Any],
    ) -> None:
        self.name, self.held_out, self.collate = name, held_out, collate
        self.batch_size, self.endless = batch_size, endless
        self.facts = facts  # what was read, for the record of the run
        self.seed, self.rows, self._order = seed, lru_cache(2)(rows), lru_cache(2)(self._order)

    def _order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.rows(epoch)))

    def _row(self, epoch: int, place: int) -> Any:
        return self.rows(epoch)[self._order(epoch)[place]]

    def batches(self, position: dict[str, Any], rank: int, ranks: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches of one rank from `position`, each with the position after it; ends where an epoch ends, if ever."""
        size, step, count = self.batch_size, self.batch_size * ranks, len(self.rows(position["epoch"]))
        self.length(ranks)

        def place(epoch: int, row: int) -> tuple[int, int]:
            if self.endless:
                return epoch + row // count, row % count
            return (epoch, row) if row + step <= count else (epoch + 1, 0)

        epoch, row = place(**position)
        begun = epoch
        while self.endless or epoch == begun:
            mine = range(row + rank * size, row + (rank + 1) * size)
            batch = self.collate([self._row(epoch + i // count, i % count) for i in mine])
            epoch, row = place(epoch, row + step)
            yield batch, {"epoch": epoch, "row": row}

    def length(self, ranks: int) -> int | None:
        """Batches of an epoch, None when the stream has no end. Raises ValueError when an epoch has none."""
        if self.endless:
            return None
        count, step = len(self.rows(0)), self.batch_size * ranks
        if count < step:
            raise ValueError(
                f"{self.name}: {count} row(s) of training data, but one step of {ranks} rank(s) with batch_size "
                f"{self.batch_size} needs {step}"
            )
        return count // step

    def validation(self, rank: int, ranks: int) -> list[Batch]:
        """Held-out batches of one rank, as many on every rank: where rows do not go evenly among them, some ranks end
        with a batch without targets."""
        rows = len(self.held_out)
        mine = self.held_out[rank * rows // ranks : (rank + 1) * rows // ranks]
        batches = [self.collate(mine[i : i + self.batch_size]) for i in range(0, len(mine), self.batch_size)]
        most = -(-rows // ranks)
        if len(batches) < -(-most // self.batch_size):
            empty = self.collate(self.held_out[:1])
            batches.append(empty | {"labels": torch.full_like(empty["labels"], IGNORE)})
        return batches


class TextData(LightningDataModule):
    """Data module over a `Stream`. `state_dict` is small, made of plain types, and the same on every rank."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self._position = dict(stream.start)
        self.waited = 0.0  # seconds, by all who iterated over training batches
        self._in_step: tuple[dict[str, Any], Any, int] | None = None  # position after it, step counter, its count

    def train_dataloader(self) -> TrainBatches:
        """Raises:
        ValueError: a stream without end and a trainer that would never stop, or that counts its epochs; what the
            trainer cannot do with batches that move on (overfit_batches, a schedule in accumulate_grad_batches).
        """
        if self.fitting():
            self._check(self.trainer)
        return TrainBatches(self)

    def _check(self, trainer: Any) -> None:
        if self.stream.endless and trainer.limit_train_batches == 1.0:
            if trainer.max_steps < 0:
                raise ValueError("pre-training data has no end: set trainer.max_steps (or trainer.limit_train_batches)")
            if trainer.max_epochs not in (None, -1):
                raise ValueError(
                    f"trainer.max_epochs={trainer.max_epochs}: pre-training data has no end, hence no epochs. Leave it "
                    "out and set trainer.max_steps, or say with trainer.limit_train_batches how long an epoch is"
                )
        if trainer.overfit_batches:
            raise ValueError(
                f"trainer.overfit_batches={trainer.overfit_batches} is not supported: training data goes on where it "
                "stopped, so each epoch would have other batches. Give data.path a file with those documents only"
            )
        count = trainer.accumulate_grad_batches
        if type(count) is not int or count < 1:
            raise ValueError(
                f"trainer.accumulate_grad_batches={count} must be a whole number of at least 1; for a schedule over "
                "epochs use Lightning's GradientAccumulationScheduler"
            )

    def val_dataloader(self) -> list[Batch]:
        batches = self.stream.validation(*self.rank_of())
        return Batches(batches) if batches else []

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.stream.name, "position": self.position(), "rows": self._rows()}

    def _rows(self) -> int:
        """Rows of a micro-batch on all ranks."""
        return self.stream.batch_size * self.rank_of()[1]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises:
        ValueError: the checkpoint was written while reading other data, or the same in another order; or within an
            epoch of data that end, with accumulation, when a micro-batch had another number of rows: the steps of an
            epoch are counted in micro-batches, and what is left of it would be cut into the wrong steps.
        """
        if state_dict["data"] != self.stream.name:
            raise ValueError(
                f"the checkpoint was written with data [{state_dict['data']}], this run reads [{self.stream.name}]; "
                "resume with the same data and seed, or start anew (resume=never, or another output folder)"
            )
        position, before = state_dict["position"], state_dict["rows"]
        counted = self.fitting() and self.trainer.accumulate_grad_batches != 1 and not self.stream.endless
        if counted and before != self._rows() and position != self.stream.start | {"epoch": position["epoch"]}:
            raise ValueError(
                f"the checkpoint lies within an epoch of {before} rows a micro-batch on all ranks, and here they have "
                f"{self._rows()}: with trainer.accumulate_grad_batches the rest of the epoch would be cut into wrong "
                "steps. Change data.batch_size with the number of devices so that their product stays the same"
            )
        self._position, self._in_step = dict(position), None

    def position(self) -> dict[str, Any]:
        """Position after the last batch that was trained on."""
        if self._in_step is not None:
            after, steps, before = self._in_step
            if steps.processed > before:
                self._position, self._in_step = after, None
        return dict(self._position)

    def rank_of(self) -> tuple[int, int]:
        """(rank, number of ranks) among which batches are shared out, as the strategy sees it."""
        if self.trainer is not None:
            share = self.trainer.distributed_sampler_kwargs or {}
            return share.get("rank", 0), share.get("num_replicas", 1)
        return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lightning's hook: the trainer takes this batch (it may have been fetched long before).

        Raises:
            NotImplementedError: since the batch was read, a callback has changed `accumulate_grad_batches`.
        """
        if "position" in batch:
            if self._in_step:
                self._position = self._in_step[0]
            steps = self.trainer.fit_loop.epoch_loop.batch_progress.total
            after, accumulation = batch.pop("position")
            if accumulation != self.trainer.accumulate_grad_batches:
                raise NotImplementedError(
                    f"accumulate_grad_batches went from {accumulation} to {self.trainer.accumulate_grad_batches} after "
                    "a batch was read for it. It can change where an epoch of known length begins: set "
                    "trainer.limit_train_batches, or a fixed trainer.accumulate_grad_batches"
                )
            self._in_step = after, steps, steps.processed
        if self.trainer.strategy.root_device.type == "cuda":  # so that the host need not wait for the copy
            batch = {key: value.pin_memory() if isinstance(value, Tensor) else value for key, value in batch.items()}
        return batch

    def fitting(self) -> bool:
        state = self.trainer.state if self.trainer is not None else None
        return state is not None and state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING

    def hand_out(self) -> Iterator[Batch]:
        """Batches from where the data stands, optimizer step by optimizer step; where no trainer is running, a batch
        handed out is a batch used."""
        accumulation = self.trainer.accumulate_grad_batches if self.fitting() else 1
        batches = ahead(self.stream.batches(self.position(), *self.rank_of()), 2 * accumulation)
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed if self.fitting() else 0
        while step := self._timed(batches, self._left_in_step(done)):
            done += len(step)
            accumulation = self.trainer.accumulate_grad_batches if self.fitting() else 1
            count = sum(int(targets(batch["labels"])) for batch, _ in step)
            for batch, position in step:
                if self.fitting():
                    batch |= {"num_items_in_batch": count, "position": (position, accumulation)}
                else:
                    self._position = position
                yield batch

    def _timed(self, batches: Iterator[Any], count: int) -> list[Any]:
        """The next `count` batches."""
        begun = time.perf_counter()
        step = list(islice(batches, count))
        self.waited += time.perf_counter() - begun
        return step

    def _left_in_step(self, done: int) -> int:
        """Micro-batches up to the next optimizer step, `done` batches after the beginning of the epoch."""
        if not self.fitting():
            return 1
        accumulation = self.trainer.accumulate_grad_batches
        left = self.trainer.num_training_batches - done  # the last step of an epoch may be shorter
        return int(min(accumulation - done % accumulation, left if left > 0 else accumulation))


class Batches(list):
    """A list that Lightning takes as one loader (it would take a plain one as a collection of loaders)."""


class TrainBatches:
    """Iterable over training batches from where the data module stands; resumable itself (`state_dict`)."""

    def __init__(self, data: TextData) -> None:
        self.data, self.state_dict, self.load_state_dict = data, data.state_dict, data.load_state_dict

    def __iter__(self) -> Iterator[Batch]:
        return self.data.hand_out()

    def __len__(self) -> int:
        length = self.data.stream.length(self.data.rank_of()[1])
        if length is None:
            raise TypeError("a pre-training stream has no end, hence no length; set trainer.max_steps")
        return length

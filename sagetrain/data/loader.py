"""A Lightning data module that resumes exactly, and the batches it hands out.

Method: a stream is a function from a position (plain ints, strings, dicts) to the batches that follow it, each with the
position after it. The data module keeps the position after the last batch that was *trained on*: Lightning fetches one
batch ahead, and an interrupted step is to be done again, so neither what was fetched nor what was started counts.
Positions are global (the same on every rank): rank r takes its slice of each global batch, so one rank's checkpoint
serves all, and a run may go on with another number of ranks. Batches are made in the training process, no workers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch.utils.weak import WeakIdKeyDictionary

Batch = dict[str, Any]


class Stream(ABC):
    """Training and validation batches of one data set, made of rows that `collate` turns into a batch."""

    name: str  # tells data sets (and their order) apart in a checkpoint
    start: dict[str, Any]  # position of the first batch
    batch_size: int  # rows in a batch of one rank
    held_out: list[Any]  # rows for validation

    @abstractmethod
    def batches(self, position: dict[str, Any], rank: int, ranks: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        """Batches of one rank from `position`, each with the position after it; ends where an epoch ends, if ever."""

    @abstractmethod
    def length(self, ranks: int) -> int | None:
        """Batches of an epoch, None when the stream has no end."""

    @abstractmethod
    def collate(self, rows: Sequence[Any]) -> Batch: ...

    def validation(self, rank: int, ranks: int) -> list[Batch]:
        """Held-out batches of one rank, as many on every rank: rows that do not go evenly among them are left out.

        Raises:
            ValueError: fewer rows than ranks.
        """
        share = len(self.held_out) // ranks
        if self.held_out and not share:
            raise ValueError(f"{self.name}: {len(self.held_out)} validation row(s) for {ranks} ranks; hold out more")
        mine = self.held_out[rank * share : (rank + 1) * share]
        return [self.collate(mine[i : i + self.batch_size]) for i in range(0, share, self.batch_size)]


class TextData(LightningDataModule):
    """Data module over a `Stream`. `state_dict` is small, made of plain types, and the same on every rank."""

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self.stream = stream
        self._position = dict(stream.start)
        self._after = WeakIdKeyDictionary()  # input_ids of a batch on its way -> position after that batch
        self._in_step: tuple[dict[str, Any], Any, int] | None = None  # position after it, step counter, its count

    def train_dataloader(self) -> TrainBatches:
        """Raises:
        ValueError: a stream without end and a trainer that would never stop.
        """
        t = self.trainer
        if t is not None and self.stream.length(1) is None and t.max_steps < 0 and t.limit_train_batches == 1.0:
            raise ValueError("pre-training data has no end: set trainer.max_steps (or trainer.limit_train_batches)")
        return TrainBatches(self)

    def val_dataloader(self) -> list[Batch]:
        batches = self.stream.validation(*self.rank_of())
        return Batches(batches) if batches else []

    def state_dict(self) -> dict[str, Any]:
        return {"data": self.stream.name, "position": self.position()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises:
        ValueError: the checkpoint was written while reading other data, or the same in another order.
        """
        if state_dict["data"] != self.stream.name:
            raise ValueError(
                f"the checkpoint was written with data [{state_dict['data']}], this run reads [{self.stream.name}]; "
                "resume with the same data and seed, or start anew (resume=never, or another output folder)"
            )
        self._position, self._in_step = dict(state_dict["position"]), None

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
        """Lightning's hook: the trainer takes this batch (it may have been fetched long before)."""
        if self.trainer.training and self.fitting():
            if self._in_step:
                self._position = self._in_step[0]
            steps = self.trainer.fit_loop.epoch_loop.batch_progress.total
            self._in_step = self._after[batch["input_ids"]], steps, steps.processed
        return batch

    def fitting(self) -> bool:
        state = self.trainer.state if self.trainer is not None else None
        return state is not None and state.fn == TrainerFn.FITTING and state.status == TrainerStatus.RUNNING

    def hand_out(self) -> Iterator[Batch]:
        """Batches from where the data stands; where no trainer is running, a batch handed out is a batch used."""
        for batch, position in self.stream.batches(self.position(), *self.rank_of()):
            if self.fitting():
                self._after[batch["input_ids"]] = position
            else:
                self._position = position
            yield batch


class Batches(list):
    """A list that Lightning takes as one loader (it would take a plain one as a collection of loaders)."""


class TrainBatches:
    """Iterable over training batches from where the data module stands; resumable itself (`state_dict`)."""

    def __init__(self, data: TextData) -> None:
        self.data = data

    def __iter__(self) -> Iterator[Batch]:
        return self.data.hand_out()

    def __len__(self) -> int:
        length = self.data.stream.length(self.data.rank_of()[1])
        if length is None:
            raise TypeError("a pre-training stream has no end, hence no length; set trainer.max_steps")
        return length

    def state_dict(self) -> dict[str, Any]:
        return self.data.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.data.load_state_dict(state_dict)

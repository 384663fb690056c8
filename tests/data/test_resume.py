"""A run that was stopped anywhere goes on with exactly the batches an uninterrupted one sees."""

from __future__ import annotations

import json
import lzma
import threading
import time
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerState

from sagetrain.data import ByteTokenizer, build

QUIET = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)


@pytest.fixture
def cfgs(tmp_path):
    for shard in range(3):
        with lzma.open(tmp_path / f"p{shard}.jsonl.xz", "wt", encoding="utf-8") as f:
            f.writelines(json.dumps({"text": f"shard {shard} line {i} " * (1 + i % 7)}) + "\n" for i in range(11))
    with open(tmp_path / "gsm8k.jsonl", "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"}) + "\n" for i in range(23))
    return {
        "pretrain": {"kind": "pretrain", "path": str(tmp_path / "*.xz"), "val_documents": 3},
        "gsm8k": {"kind": "gsm8k", "path": str(tmp_path / "gsm8k.jsonl"), "val_fraction": 0.2},
        "packed": {"kind": "gsm8k", "path": str(tmp_path / "gsm8k.jsonl"), "val_fraction": 0, "packing": True},
    }


class Recorder(LightningModule):
    """Trains one weight and writes down what it saw; stops with an error in the middle of step `dies`."""

    def __init__(self, dies: int | None = None):
        super().__init__()
        self.weight, self.seen, self.dies = torch.nn.Parameter(torch.zeros(())), [], dies

    def training_step(self, batch, index):
        if len(self.seen) == self.dies:
            raise RuntimeError("killed")
        self.seen.append({k: v.tolist() for k, v in batch.items() if isinstance(v, torch.Tensor)})
        return self.weight * 1.0

    def validation_step(self, batch, index):
        return None

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Probe(Callback):
    """Reads a batch of its own in the middle of training, as a drift probe does."""

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        next(iter(trainer.datamodule.train_dataloader()))


def fit(folder, cfg, steps, dies=None, resume=None, **kwargs):
    module, data = Recorder(dies), build(cfg, ByteTokenizer(), 64, 3, batch_size=2)
    save = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=False)
    last = {"max_epochs": -1, "max_steps": steps, "num_sanity_val_steps": 1, "limit_val_batches": 1} | kwargs
    trainer = Trainer(default_root_dir=folder, callbacks=[save, Probe()], **last, **QUIET)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=resume)
    except RuntimeError as error:
        assert str(error) == "killed"
        trainer.save_checkpoint(folder / "interrupted.ckpt")
    return module.seen


@pytest.mark.parametrize("kind", ["pretrain", "gsm8k", "packed"])
def test_every_kill_point_resumes_exactly(kind, cfgs, tmp_path):
    steps = 14  # more than one epoch of each task
    whole = fit(tmp_path / "a", cfgs[kind], steps)
    assert len(whole) == steps and len({str(b) for b in whole}) > steps - 3  # the stream moves
    for stop in (1, 5, 8, 9, 10, 11):
        assert fit(tmp_path / "b", cfgs[kind], steps, resume=tmp_path / f"a/step={stop}.ckpt") == whole[stop:]
    part = fit(tmp_path / "c", cfgs[kind], steps, dies=6)
    assert part == whole[:6]
    assert fit(tmp_path / "d", cfgs[kind], steps, resume=tmp_path / "c/interrupted.ckpt") == whole[6:]


def test_validation_and_accumulation_do_not_move_the_stream(cfgs, tmp_path):
    whole = fit(tmp_path / "a", cfgs["pretrain"], 12)
    often = {"val_check_interval": 2, "check_val_every_n_epoch": None, "accumulate_grad_batches": 2}
    assert fit(tmp_path / "b", cfgs["pretrain"], 6, **often) == whole
    assert fit(tmp_path / "c", cfgs["pretrain"], 6, resume=tmp_path / "b/step=4.ckpt", **often) == whole[8:]


@pytest.mark.parametrize("kind", ["pretrain", "gsm8k", "packed"])
def test_resume_without_a_trainer(kind, cfgs):
    def batches(data):
        while True:
            yield from data.train_dataloader()

    run = build(cfgs[kind], ByteTokenizer(), 64, 3, 2)
    seen, states = [], [json.dumps(run.state_dict())]
    for batch, _ in zip(batches(run), range(20), strict=False):
        seen.append(batch)
        states.append(json.dumps(run.state_dict()))
    for cut in range(19):
        again = build(cfgs[kind], ByteTokenizer(), 64, 3, 2)
        again.load_state_dict(json.loads(states[cut]))
        batch = next(batches(again))
        assert all(torch.equal(torch.as_tensor(batch[k]), torch.as_tensor(seen[cut][k])) for k in batch)


def test_other_data_or_seed_is_refused(cfgs):
    state = build(cfgs["pretrain"], ByteTokenizer(), 64, 3).state_dict()
    for cfg, seed in (cfgs["pretrain"], 4), (cfgs["gsm8k"], 3), (cfgs["pretrain"] | {"val_documents": 2}, 3):
        with pytest.raises(ValueError, match="the checkpoint was written with data"):
            build(cfg, ByteTokenizer(), 64, seed).load_state_dict(state)


@pytest.mark.parametrize("kind", ["pretrain", "gsm8k"])
def test_each_row_is_seen_once_whatever_the_ranks(kind, cfgs):
    """1, then 2, then 3 ranks, with batches of 2, 1 and 2 rows: together they see what one rank sees."""
    position, got, want = {"epoch": 0, "row": 0}, [], []
    for ranks, size, steps in (1, 2, 2), (2, 1, 3), (3, 2, 1):
        stream = build(cfgs[kind], ByteTokenizer(), 64, 3, size).stream
        shares = [[*islice(stream.batches(position, rank, ranks), steps)] for rank in range(ranks)]
        for at_once in zip(*shares, strict=True):
            got += [row.tolist() for batch, _ in at_once for row in batch["labels"]]
            assert len({str(after) for _, after in at_once}) == 1  # all ranks know the same position
        position = json.loads(json.dumps(shares[0][-1][1]))
    stream = build(cfgs[kind], ByteTokenizer(), 64, 3, 1).stream
    want = [batch["labels"][0].tolist() for batch, _ in islice(stream.batches(stream.start, 0, 1), len(got))]
    length = max(map(len, got + want))  # examples are padded to the longest of their batch
    assert len(got) == 16
    assert [row + [-100] * (length - len(row)) for row in got] == [row + [-100] * (length - len(row)) for row in want]


def test_batches_are_made_ahead(cfgs):
    """The loader has the next batches ready; only where making them takes longer than training does it wait."""
    data = build(cfgs["pretrain"], ByteTokenizer(), 64, 3, 2)
    collate = data.stream.collate

    def slow(rows):
        time.sleep(0.2)
        return collate(rows)

    data.stream.collate = slow
    loader = iter(data.train_dataloader())
    next(loader)
    for pause, least, most in (0.6, 0, 0.15), (0, 0.1, 60):
        time.sleep(pause)
        next(loader), next(loader)
        before = data.waited
        for _ in range(4):
            time.sleep(pause)
            next(loader)
        assert least <= (data.waited - before) / 4 <= most
    before = threading.active_count()
    loader.close()
    assert threading.active_count() == before - 1


def test_ranks_come_from_the_strategy(cfgs):
    data = build(cfgs["pretrain"], ByteTokenizer(), 64, 3)
    alone = [b["input_ids"] for b, _ in zip(data.train_dataloader(), range(4), strict=False)]
    rank = build(cfgs["pretrain"], ByteTokenizer(), 64, 3)
    share = {"num_replicas": 2, "rank": 1}  # all that the data module asks of a trainer:
    rank.trainer = SimpleNamespace(distributed_sampler_kwargs=share, state=TrainerState(), max_steps=1)
    mine = [b["input_ids"] for b, _ in zip(rank.train_dataloader(), range(2), strict=False)]
    assert torch.equal(torch.cat(mine), torch.cat(alone[1::2]))


def test_a_pretraining_run_must_say_where_it_ends(cfgs, tmp_path):
    data = build(cfgs["pretrain"], ByteTokenizer(), 64, 3)
    with pytest.raises(ValueError, match="set trainer.max_steps"):
        Trainer(default_root_dir=tmp_path, max_epochs=1, enable_checkpointing=False, **QUIET).fit(Recorder(), data)

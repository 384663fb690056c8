"""Saving in the background, the checkpoint before the last, and what a damaged one or a full disk leads to."""

import contextlib
import csv
import io
import json
import os
import shutil
import signal
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as L
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.testing._internal.two_tensor import TwoTensor

from sagetrain.__main__ import compose
from sagetrain.errors import is_bad_input
from sagetrain.training import checkpoint, checkpoint_files
from sagetrain.training.callbacks import RunLog
from sagetrain.training.checkpoint import Checkpoint
from sagetrain.training.checkpoint_files import HostCheckpointIO, damage, last_good, on_host, pin, pinned_sizes
from sagetrain.training.export import export
from sagetrain.training.module import CausalLM
from sagetrain.training.signals import Stopped, Watch
from sagetrain.training.train import run
from tests.tiny import RUN

STEPS = 8
SAVE = torch.save


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Path]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(500)))
    every = ("checkpoint.every_n_steps=2", f"trainer.max_steps={STEPS}", "optim.warmup_steps=0")

    def go(*changes: str, out: str = "out") -> Path:
        return run(compose([*RUN, *every, f"data.path={text}", f"out={tmp_path / out}", *changes]))[0]

    return go


def losses(out: Path) -> list[str]:
    with open(out / "metrics.csv") as file:
        return [row["loss"] for row in csv.DictReader(file)]


def saved(out: Path) -> list[int]:
    return sorted(int(p.stem.removeprefix("step-")) for p in (out / "checkpoints").glob("step-*.ckpt"))


def info(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def before_step(monkeypatch: pytest.MonkeyPatch, step: int, what: Callable[[], Any]) -> None:
    train_on = CausalLM.training_step

    def training_step(self: CausalLM, batch: Any, index: int) -> torch.Tensor:
        if self.trainer.global_step + 1 == step:
            what()
        return train_on(self, batch, index)

    monkeypatch.setattr(CausalLM, "training_step", training_step)


def fails(error: BaseException) -> Callable[[], None]:
    def go() -> None:
        raise error

    return go


# --- In the background ---


def test_steps_go_on_while_a_checkpoint_is_written_with_what_was_at_its_save_point(train, monkeypatch) -> None:
    there, written, writing = {}, {}, []
    save = Checkpoint.save

    def state(trainer: L.Trainer) -> dict[str, Any]:
        optimizer = trainer.optimizers[0].state_dict()["state"]
        return trainer.lightning_module.state_dict() | {
            f"{k} {n}": x for k, v in optimizer.items() for n, x in v.items()
        }

    class At:
        trainer: L.Trainer

    def noted(self: Checkpoint, trainer: L.Trainer) -> None:
        At.trainer, step = trainer, trainer.global_step
        there[step] = {name: x.clone() for name, x in state(trainer).items()}
        save(self, trainer)

    def slow(content: Any, path: Path) -> None:
        assert not writing  # one at a time
        writing.append(path)
        begun, end = At.trainer.global_step, time.monotonic() + 240
        while begun < 60 and At.trainer.global_step < begun + 10 and time.monotonic() < end:
            time.sleep(0.01)  # a disk as slow as ten steps
        live = state(At.trainer)
        SAVE(content, path)
        found = torch.load(path, weights_only=True)
        of = found["optimizer_states"][0]["state"]
        step = found["global_step"]
        mine = found["state_dict"] | {f"{k} {n}": x for k, v in of.items() for n, x in v.items()}
        went_on = At.trainer.global_step - begun
        moved = sum(not torch.equal(live[name], there[step][name]) for name in mine)
        written[step] = mine, went_on, moved, found
        writing.clear()

    monkeypatch.setattr(Checkpoint, "save", noted)
    monkeypatch.setattr(torch, "save", slow)
    out = train("checkpoint.every_n_steps=30", "trainer.max_steps=60")
    assert sorted(written) == [30, 60]
    for step, (mine, _, _, _) in written.items():
        assert mine.keys() == there[step].keys()
        assert all(torch.equal(mine[name], there[step][name]) for name in mine)
    mine, went_on, moved, found = written[30]
    assert went_on >= 10 and moved == len(mine)  # or this proves nothing
    loops = found["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]
    assert loops["ready"] == loops["processed"] == 30
    assert any(state.get("tokens") == 30 * 64 for state in found["callbacks"].values())
    assert saved(out) == [60]


def test_how_long_training_stood_still_is_noted(train, monkeypatch) -> None:
    monkeypatch.setattr(torch, "save", lambda content, path: (time.sleep(1.0), SAVE(content, path)))
    facts = info(train(f"checkpoint.every_n_steps={STEPS}"))
    assert facts["saves"] == 1 and facts["save_write_s"] >= 1.0
    assert 0 < facts["save_stall_max_s"] == facts["save_stall_s"] < 0.8  # without the write


def test_a_long_first_save_is_not_hidden_by_later_ones(train, monkeypatch) -> None:
    seconds = iter((0.4, 0.2, 0.0, 0.0))
    monkeypatch.setattr(checkpoint_files, "on_host", lambda state: (time.sleep(next(seconds)), on_host(state))[1])
    monkeypatch.setattr(torch, "save", lambda content, path: (time.sleep(0.1), SAVE(content, path)))
    facts = info(train())
    assert facts["saves"] == 4 and facts["save_write_s"] >= 0.4
    assert 0.4 <= facts["save_stall_max_s"] <= facts["save_stall_s"] - 0.2


def test_random_numbers_go_on_where_a_run_stopped(train, monkeypatch) -> None:
    drops = ("attention=bf16", "trainer.max_steps=5")
    plain = losses(train(*drops, out="plain"))
    drops += ("model.config.attention_dropout=0.3",)
    whole = losses(train(*drops, out="whole"))
    assert not set(whole) & set(plain)
    logged = RunLog.on_train_batch_end

    def stops(self: RunLog, trainer: L.Trainer, *args: Any) -> None:
        logged(self, trainer, *args)
        if trainer.global_step == 3:
            raise KeyError("stopped")

    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(RunLog, "on_train_batch_end", stops)
        train(*drops)
    assert losses(train(*drops)) == whole


@pytest.mark.parametrize("stopped", [False, True])
def test_moments_are_not_moved_as_a_run_ends(train, monkeypatch, stopped: bool) -> None:
    """Lightning has all of a trainer's optimizers moved to the host: 10 GB of a billion weights, for nothing."""
    moved = []
    monkeypatch.setattr(
        L.strategies.strategy, "_optimizers_to_device", lambda optimizers, device: moved.append(len(optimizers))
    )
    if stopped:
        monkeypatch.setattr(Checkpoint, "on_train_batch_end", lambda *_: (_ for _ in ()).throw(Stopped(signal.SIGTERM)))
    with pytest.raises(Stopped) if stopped else contextlib.nullcontext():
        train()
    assert len(moved) > 1 and moved[-1] == 0


def test_a_copy_on_the_host_shares_nothing_and_keeps_what_is_tied() -> None:
    weight, part = torch.randn(4, 4), torch.randn(3)
    state = {
        "state_dict": OrderedDict(a=weight, tied=weight.detach(), column=weight[:, 1]),
        "moments": [TwoTensor(part, part.clone()), (part, 3, "x")],
        "lists": [1, [2, 3]],
    }
    state["state_dict"]._metadata = {"": {"version": 1}}
    copy = on_host(state)
    wanted, lists = weight.clone(), state["lists"]
    weight.zero_(), part.zero_(), lists[1].append(4), lists.append(5)
    mine = copy["state_dict"]
    assert type(mine) is OrderedDict and mine._metadata == {"": {"version": 1}} and copy["lists"] == [1, [2, 3]]
    assert torch.equal(mine["a"], wanted) and torch.equal(mine["column"], wanted[:, 1])
    assert mine["a"].data_ptr() == mine["tied"].data_ptr() != mine["column"].data_ptr()
    (moment, (plain, *rest)) = copy["moments"]
    assert isinstance(moment, TwoTensor) and rest == [3, "x"] and bool(plain.all())
    assert torch.equal(moment.a, plain) and torch.equal(moment.b, plain)


# --- Pinned memory, ahead of the first save ---


def test_as_much_is_pinned_as_a_copy_takes(monkeypatch) -> None:
    weight, part = torch.randn(4, 4), torch.randn(3)
    state = {
        "a": weight,
        "tied": weight.detach(),
        "column": weight[:, 1],
        "rest": [TwoTensor(part, part.clone()), part, 3],
    }
    copied = on_host(state)
    parts = [copied["a"], copied["column"], copied["rest"][0].a, copied["rest"][0].b]
    assert pinned_sizes(state) == []  # nothing of it is on a GPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert pinned_sizes(state) == [x.untyped_storage().nbytes() for x in parts] == [64, 16, 12, 12]


def test_all_pieces_are_held_until_the_last_is_there(monkeypatch) -> None:
    pieces, there, empty = [], [], torch.empty

    def noted(size: int, dtype: torch.dtype, pin_memory: bool) -> torch.Tensor:
        assert pin_memory
        piece = empty(size, dtype=dtype)
        pieces.append(weakref.ref(piece))
        there.append(sum(each().nbytes for each in pieces))
        return piece

    monkeypatch.setattr(torch, "empty", noted)
    pin([64, 16, 12])
    assert there == [64, 80, 92] and not any(piece() is not None for piece in pieces)


def test_memory_is_pinned_while_steps_go_on_and_the_first_copy_waits_for_it(train, monkeypatch) -> None:
    happened, step = [], CausalLM.training_step

    def slow(sizes: list[int]) -> None:
        assert sizes == []  # on a CPU
        happened.append("pin")
        end = time.monotonic() + 240
        while happened.count("step") < 6 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.3)
        happened.append("pinned")

    monkeypatch.setattr(CausalLM, "training_step", lambda *args: (happened.append("step"), step(*args))[1])
    monkeypatch.setattr(checkpoint_files, "on_host", lambda state: (happened.append("copy"), on_host(state))[1])
    monkeypatch.setattr(checkpoint, "pin", slow)
    train("checkpoint.every_n_steps=6", "trainer.max_steps=12")
    assert happened[:2] == ["step", "pin"]
    assert happened[2:] == [*["step"] * 5, "pinned", "copy", *["step"] * 6, "copy"]


def test_a_run_ends_no_sooner_than_its_pinning(train, monkeypatch) -> None:
    """The next one in this process, of a comparison, would hold as much again."""
    happened, trained = [], threading.Event()
    end, clear = Checkpoint.on_train_end, Checkpoint.clear
    monkeypatch.setattr(checkpoint, "pin", lambda _: (trained.wait(240), time.sleep(1.0), happened.append("pinned")))
    monkeypatch.setattr(Checkpoint, "on_train_end", lambda *args: (trained.set(), end(*args))[1])
    monkeypatch.setattr(Checkpoint, "clear", lambda self: (happened.append("ended"), clear(self))[1])
    train("checkpoint.every_n_steps=100", "checkpoint.keep=none")
    assert happened == ["pinned", "ended"]


def test_a_run_goes_on_where_no_memory_can_be_pinned(train, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "pin", lambda sizes: fails(RuntimeError("CUDA error: out of memory"))())
    out = train()
    assert saved(out) == [STEPS] and info(out)["status"] == "finished" and info(out)["saves"] == 4


@pytest.mark.parametrize(
    ("steps", "minutes", "keep", "first_rank", "in_one_file", "pins"),
    [
        (9, 0, "none", True, True, 1),
        (0, 9, "last", True, True, 1),
        (0, 0, "none", True, True, 0),
        (0, 0, "last", True, True, 0),  # it only saves at its end
        (9, 0, "last", False, True, 0),
        (9, 0, "last", True, False, 0),
    ],
)
def test_only_who_copies_on_the_way_pins_and_once(
    tmp_path: Path, monkeypatch, steps: int, minutes: int, keep: str, first_rank: bool, in_one_file: bool, pins: int
) -> None:
    asked: list[list[int]] = []
    monkeypatch.setattr(checkpoint, "pin", asked.append)
    callback = Checkpoint(tmp_path, steps, minutes, keep, Watch(), io=HostCheckpointIO() if in_one_file else None)
    trainer = SimpleNamespace(is_global_zero=first_rank, optimizers=[], max_steps=9, global_step=0)
    for trainer.global_step in (1, 1, 2, 3):
        callback.on_train_batch_end(trainer, torch.nn.Linear(2, 2))
    callback._thread.shutdown()
    assert len(asked) == pins


@pytest.mark.gpu
def test_the_first_save_on_a_gpu_takes_no_longer_than_the_next(train, monkeypatch) -> None:
    """Of 2 GB of weights and moments: a save pins nothing, and steps go on while memory is pinned."""
    stalls, pinned, went_on, steps = [], [], [], []
    save, step = Checkpoint.save, CausalLM.training_step

    def noted(sizes: list[int]) -> None:
        before = len(steps)
        pin(sizes)
        went_on.append(len(steps) - before)

    def timed(self: Checkpoint, trainer: L.Trainer) -> None:
        self.settle(trainer)  # how fast the disk is
        wait(self._pinning)  # and how long a step takes is not asked here
        before, begun = torch.cuda.host_memory_stats()["allocated_bytes.allocated"], time.perf_counter()
        save(self, trainer)
        stalls.append(time.perf_counter() - begun)
        pinned.append(torch.cuda.host_memory_stats()["allocated_bytes.allocated"] - before)

    monkeypatch.setattr(CausalLM, "training_step", lambda *args: (steps.append(1), step(*args))[1])
    monkeypatch.setattr(checkpoint, "pin", noted)
    monkeypatch.setattr(Checkpoint, "save", timed)
    (getattr(torch.accelerator, "empty_host_cache", None) or torch._C._host_emptyCache)()
    train(
        "trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "attention=sdpa", "optim.lr=1e-5",
        "model.config.hidden_size=2048", "model.config.intermediate_size=8192", "model.config.num_hidden_layers=3",
        "model.config.num_attention_heads=32", "model.config.initializer_range=0.02",
        "checkpoint.every_n_steps=60", "trainer.max_steps=120",
    )  # fmt: skip
    assert len(stalls) == 2 and stalls[0] < 3 * stalls[1], stalls
    assert max(pinned) < 1e6 and went_on[0] >= 5, (pinned, went_on)


def test_a_failed_write_is_raised_at_the_next_step(train, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "save", lambda *_: fails(OSError(28, "No space left on device"))())
    with pytest.raises(OSError, match="checkpoint of step 100: .*No space left.*kept: none yet") as error:
        train("trainer.max_steps=1000", "checkpoint.every_n_steps=100")
    assert is_bad_input(error.value) and info(tmp_path / "out")["steps"] < 200  # before the next save
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


def slow_half(seconds: float) -> Callable[[Any, Path], None]:
    """torch.save on a slow disk."""

    def save(content: Any, path: Path) -> None:
        file = io.BytesIO()
        SAVE(content, file)
        whole = file.getvalue()
        with open(path, "wb", buffering=0) as out:
            out.write(whole[: len(whole) // 2])
            time.sleep(seconds)
            out.write(whole[len(whole) // 2 :])

    return save


@pytest.mark.parametrize("end", ["an error", "a signal"])
def test_whatever_ends_a_run_the_checkpoint_under_way_is_finished(train, monkeypatch, tmp_path: Path, end: str) -> None:
    monkeypatch.setattr(torch, "save", slow_half(0.5))
    what = fails(KeyError("bug")) if end == "an error" else lambda: os.kill(os.getpid(), signal.SIGTERM)
    before_step(monkeypatch, 3, what)
    with pytest.raises(KeyError if end == "an error" else Stopped) as ended:
        train()
    assert saved(tmp_path / "out") == ([2] if end == "an error" else [2, 3])
    assert all(damage(path) is None for path in (tmp_path / "out" / "checkpoints").glob("step-*"))
    assert end == "an error" or "step-00000003.ckpt" in str(ended.value)


def test_a_write_that_fails_while_another_error_ends_the_run_is_said(train, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(torch, "save", lambda *_: (time.sleep(0.3), fails(OSError(28, "No space left"))()))
    before_step(monkeypatch, 3, fails(KeyError("bug")))
    with pytest.raises(KeyError):
        train()
    assert "step-00000002.ckpt could not be written: [Errno 28] No space left" in capsys.readouterr().err
    assert not list((tmp_path / "out" / "checkpoints").iterdir())


# --- The one before ---


def test_a_job_that_is_told_to_requeue_and_to_stop_in_one_step_does_both(train, monkeypatch, tmp_path: Path) -> None:
    def both() -> None:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)

    requeued: list[list[int]] = []
    monkeypatch.setattr(checkpoint, "requeue", lambda: requeued.append(saved(tmp_path / "out")))
    before_step(monkeypatch, 3, both)
    with pytest.raises(Stopped, match="SIGTERM after step 3"):
        train()
    assert requeued == [[2, 3]]


def test_the_one_before_stays_until_the_next_is_complete(train, monkeypatch) -> None:
    seen = []
    publish = Checkpoint._publish

    def watched(self: Checkpoint, *arguments: Any) -> None:
        seen.append(saved(self.out))
        publish(self, *arguments)
        seen.append(saved(self.out))

    monkeypatch.setattr(Checkpoint, "_publish", watched)
    out = train()
    assert seen == [[], [2], [2], [2, 4], [2, 4], [4, 6], [4, 6], [6, 8]] and saved(out) == [8]


def flip(path: Path) -> None:
    """One bit, in the middle of the weights."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit": flip,
    "cut off": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.fixture
def interrupted(train, monkeypatch, tmp_path: Path) -> Path:
    """A run that ended in its seventh step, with the checkpoints of steps 4 and 6."""
    with monkeypatch.context() as patch:
        before_step(patch, 7, fails(KeyError("bug")))
        with pytest.raises(KeyError):
            train()
    assert saved(tmp_path / "out") == [4, 6]
    return tmp_path / "out"


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(train, interrupted: Path, capsys, kind: str) -> None:
    folder = interrupted / "checkpoints"
    DAMAGES[kind](folder / "step-00000006.ckpt")
    with pytest.raises(ValueError, match="last.ckpt.* damaged"):
        export(interrupted, interrupted / "exported")
    capsys.readouterr()
    train()
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1 and f"damaged: {folder / 'step-00000006.ckpt'} (" in said[0]
    assert said[0].endswith(f"Going on from the checkpoint before, {folder / 'step-00000004.ckpt'}")
    assert losses(interrupted) == losses(train(out="unbroken")) and saved(interrupted) == [8]


def test_a_damaged_one_goes_when_the_next_is_complete_and_never_counts_as_the_one_before(
    train, interrupted: Path, monkeypatch
) -> None:
    flip(interrupted / "checkpoints" / "step-00000006.ckpt")
    before_step(monkeypatch, 6, fails(KeyError("bug")))
    with pytest.raises(KeyError):
        train("checkpoint.every_n_steps=5")
    assert saved(interrupted) == [4, 5]


def test_no_good_checkpoint_is_an_error_in_one_line(train, interrupted: Path, monkeypatch) -> None:
    for path in (interrupted / "checkpoints").glob("step-*"):
        flip(path)
    with pytest.raises(ValueError, match="no checkpoint of this run is whole: .*step-00000006.*step-00000004") as error:
        train()
    assert is_bad_input(error.value) and saved(interrupted) == [4, 6]


def test_another_run_starts_from_the_last_good_one_too(train, interrupted: Path) -> None:
    flip(interrupted / "checkpoints" / "step-00000006.ckpt")
    second = train(f"resume={interrupted}", out="second")
    assert info(second)["steps"] == STEPS and len(losses(second)) == STEPS - 4
    with pytest.raises(ValueError, match="step-00000006.ckpt is no checkpoint of a run, or it is damaged"):
        train(f"resume={interrupted / 'checkpoints' / 'step-00000006.ckpt'}", out="third")


def sharded(path: Path) -> None:
    dcp.save({"state_dict.w": torch.randn(1000), "step": 3}, checkpoint_id=path, no_dist=True)
    SAVE({"epoch": 0}, path / "meta.pt")


def deepspeed(path: Path) -> None:
    (path / "checkpoint").mkdir(parents=True)
    (path / "latest").write_text("checkpoint")
    SAVE({"w": torch.randn(1000)}, path / "checkpoint" / "mp_rank_00_model_states.pt")


def truncate(pattern: str) -> Callable[[Path], None]:
    return lambda path: [os.truncate(p, p.stat().st_size - 100) for p in path.glob(pattern)][0]


@pytest.mark.parametrize(
    ("make", "spoil"),
    [
        (sharded, truncate("*.distcp")),
        (sharded, truncate("meta.pt")),
        (sharded, truncate(".metadata")),
        (sharded, lambda path: next(path.glob("*.distcp")).unlink()),
        (deepspeed, truncate("checkpoint/*.pt")),
        (deepspeed, lambda path: (path / "latest").unlink()),
        (deepspeed, lambda path: shutil.rmtree(path / "checkpoint")),
    ],
)
def test_folders_are_whole_or_passed_over(tmp_path: Path, make, spoil) -> None:
    first, second = (tmp_path / f"step-0000000{i}.ckpt" for i in (1, 2))
    make(first), make(second)
    assert last_good(tmp_path, in_one_file=False) == second
    spoil(second)
    assert last_good(tmp_path, in_one_file=False) == first
    with pytest.raises(ValueError, match="is a folder, which FSDP2 and DeepSpeed read"):
        last_good(tmp_path, in_one_file=True)


# --- Room ---


@pytest.mark.parametrize(
    ("options", "there", "copies", "weights"),
    [
        ((2, 0.0, "last"), 0, 3, 0),
        ((2, 0.0, "last"), 1, 2, 0),
        ((0, 5.0, "weights"), 2, 1, 1),
        ((0, 0.0, "last"), 0, 1, 0),
        ((0, 0.0, "weights"), 0, 0, 1),
    ],
)
def test_what_a_run_will_write(tmp_path: Path, options, there: int, copies: int, weights: int) -> None:
    (tmp_path / "checkpoints").mkdir()
    for i in range(there):
        (tmp_path / "checkpoints" / f"step-0000000{i}.ckpt").touch()
    save = Checkpoint(tmp_path, *options, watch=Watch())
    assert save.room(torch.nn.Linear(10, 10, bias=False)) == (3 * copies + weights) * 400


def test_a_checkpoint_without_room_is_not_begun(train, monkeypatch, tmp_path: Path) -> None:
    begun, usage = [], shutil.disk_usage(tmp_path)
    monkeypatch.setattr(torch, "save", lambda content, path: (begun.append(path), SAVE(content, path)))

    def fuller() -> None:
        monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=300_000))

    before_step(monkeypatch, 6, fuller)
    said = r"checkpoint of step 6: it needs 0\.\d MB and .* has 0.3 MB free. The last good one is kept: .*step-00000004"
    with pytest.raises(OSError, match=said) as error:
        train()
    assert is_bad_input(error.value) and len(begun) == 2 and saved(tmp_path / "out") == [2, 4]
    assert info(tmp_path / "out")["status"] == "failed"


def test_a_full_disk_leaves_room_for_how_the_run_ended(train, monkeypatch, tmp_path: Path) -> None:
    out, write = tmp_path / "out", Path.write_bytes

    def full() -> None:
        def write_bytes(path: Path, content: bytes) -> int:
            if (out / ".reserve").exists():
                raise OSError(28, "No space left on device", str(path))
            return write(path, content)

        assert (out / ".reserve").stat().st_blocks * 512 >= 64 << 10
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        raise OSError(28, "No space left on device", str(out / "metrics.csv"))

    before_step(monkeypatch, 5, full)
    with pytest.raises(OSError, match="no space left for .*metrics.csv. What was saved is kept: free some") as error:
        train()
    monkeypatch.undo()
    assert is_bad_input(error.value) and not (out / ".reserve").exists()
    assert info(out)["status"] == "failed" and "no space left" in info(out)["error"] and info(out)["steps"] == 4
    assert losses(train()) == losses(train(out="unbroken"))


@pytest.mark.parametrize("every", [2, 0])
def test_a_run_stopped_in_its_last_step_still_leaves_its_weights(train, monkeypatch, every: int) -> None:
    """Nothing is left to train then, and the checkpoint goes when the run is finished."""
    keep = ("checkpoint.keep=weights", f"checkpoint.every_n_steps={every}")
    whole = train(*keep, out="whole")
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        before_step(patch, STEPS, lambda: signal.raise_signal(signal.SIGTERM))
        train(*keep)
    out = train(*keep)
    assert info(out)["status"] == "finished" and not saved(out)
    assert (out / "weights/model.safetensors").read_bytes() == (whole / "weights/model.safetensors").read_bytes()

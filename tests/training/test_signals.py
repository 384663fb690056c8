"""Signals to real runs: a checkpoint at the end of the step, the signal's own exit status, and no rank left behind."""

import contextlib
import json
import os
import signal
import time
from pathlib import Path

import lightning.pytorch as L
import pytest

from sagetrain.__main__ import compose
from sagetrain.paths import PACKAGE_DIR
from sagetrain.training import train
from sagetrain.training.signals import LAUNCHER, Watch, alone, is_helper, requeue
from tests.launch import SAGETRAIN, Program
from tests.tiny import MODEL

HERE = {"PYTHONPATH": str(PACKAGE_DIR.parent), "OMP_NUM_THREADS": "1"}
ENDLESS = [
    "recipe=quickstart",
    "compare.arms=null",
    "attention=bf16",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    *MODEL,
    "data.seq_len=32",
    "data.batch_size=2",
    "trainer.max_steps=100000",
    "trainer.enable_progress_bar=false",
]


@pytest.fixture
def start(tmp_path: Path):
    """Starts an endless run with the given changes in a session of its own; kills what is left of it afterwards."""
    started: list[Program] = []
    (tmp_path / "text.txt").write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(2000)))

    def go(*changes: str, **environment: str) -> Program:
        words = [*ENDLESS, f"data.path={tmp_path / 'text.txt'}", f"out={tmp_path / 'out'}", *changes]
        started.append(Program(SAGETRAIN, *words, folder=tmp_path, **HERE | environment))
        return started[-1]

    yield go
    for process in started:
        if members(process):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()


def members(process: Program) -> list[int]:
    """Processes of its session that are alive."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(session) == process.pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def second_rank(process: Program) -> int | None:
    """The process of rank 1, once it is there (a run starts others for a moment: git, a compiler)."""
    for pid in members(process):
        try:
            if b"\0LOCAL_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
                return pid
        except OSError:  # it ended meanwhile
            continue
    return None


def wait(until, seconds: float = 240) -> None:
    """For what happens soon on an idle machine; the limit is only for what never does."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def logged(out: Path) -> int:
    """Steps in metrics.csv."""
    return (out / "metrics.csv").read_text().count("\n") - 1 if (out / "metrics.csv").exists() else 0


def ends(process: Program) -> tuple[int, str]:
    """Exit status and standard error once the whole session is gone."""
    code = process.ends()
    wait(lambda: not members(process))
    return code, process.stderr.read_text()


def saved(out: Path) -> list[str]:
    return sorted(p.name for p in (out / "checkpoints").glob("step-*.ckpt"))


def check_stopped(out: Path, run: Program, signum: signal.Signals) -> str:
    """The run ended by this signal, after a whole step, with a checkpoint of that step and no process left. Gives what
    it said on standard error."""
    code, said = ends(run)
    assert code == 128 + signum, said
    info, steps = json.loads((out / "run.json").read_text()), logged(out)
    assert info["status"] == "stopped" and f"stopped by {signum.name} after step {steps}" in info["error"]
    assert (
        saved(out)[-1] == f"step-{steps:08d}.ckpt" and f"stopped by {signum.name}" in said and "Traceback" not in said
    )
    return said


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_a_signal_saves_the_step_and_ends_with_its_status(start, tmp_path: Path, signum: signal.Signals) -> None:
    out = tmp_path / "out"
    run = start()
    wait(lambda: logged(out) > 5)
    os.kill(run.pid, signum)
    check_stopped(out, run, signum)


def test_a_signal_in_a_long_validation_saves_the_last_step_and_the_same_command_goes_on(start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "docs").mkdir()
    for i in range(600):
        (tmp_path / "docs" / f"{i}.txt").write_text(f"{i} times {i} is {i * i}. " * 50)
    changes = ["data.val_documents=400", "trainer.limit_val_batches=1.0", "trainer.val_check_interval=4"]
    changes += [f"data.path={tmp_path / 'docs'}"]
    run = start(*changes)
    wait(lambda: logged(out) == 4 and time.time() - (out / "metrics.csv").stat().st_mtime > 0.3)  # it validates
    os.kill(run.pid, signal.SIGTERM)
    check_stopped(out, run, signal.SIGTERM)
    assert saved(out) == ["step-00000004.ckpt"]
    run = start(*changes)
    wait(lambda: logged(out) > 6)
    rows = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
    assert [int(row[0]) for row in rows[1:7]] == [1, 2, 3, 4, 5, 6]
    assert rows[4][rows[0].index("val_loss")] == ""  # not measured, rather than measured on the batches that were left


def test_a_signal_to_all_ranks_stops_them_after_the_same_step(start, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = start("strategy=ddp", "trainer.devices=2")
    wait(lambda: logged(out) > 5)
    for pid in (run.pid, second_rank(run)):
        os.kill(pid, signal.SIGTERM)
    check_stopped(out, run, signal.SIGTERM)


def test_a_signal_to_any_rank_stops_all_and_they_go_on_from_the_newest_whole_checkpoint(start, tmp_path: Path) -> None:
    """First to the leading rank; with the newest checkpoint damaged the same command goes on, then to the other one."""
    out, changes = tmp_path / "out", ["strategy=ddp", "trainer.devices=2", "checkpoint.every_n_steps=5"]
    run = start(*changes)
    wait(lambda: logged(out) > 12)
    run.terminate()
    check_stopped(out, run, signal.SIGTERM)
    before, newest = ((out / "checkpoints" / name) for name in saved(out))
    os.truncate(newest, newest.stat().st_size - 1000)
    inode = (out / "metrics.csv").stat().st_ino
    run = start(*changes)
    wait(lambda: (out / "metrics.csv").stat().st_ino != inode)  # cut back to the steps of the checkpoint
    wait(lambda: logged(out) > int(newest.stem.removeprefix("step-")) + 5)
    os.kill(second_rank(run), signal.SIGTERM)
    said = check_stopped(out, run, signal.SIGTERM)
    assert said.count("warning: damaged: ") == 1 and f"the checkpoint before, {before}" in said
    steps = [int(line.split(",")[0]) for line in (out / "metrics.csv").read_text().splitlines()[1:]]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("who", ["the leading rank", "another rank"])
def test_a_signal_before_the_first_step_leaves_no_rank_behind(start, who: str) -> None:
    run = start("strategy=ddp", "trainer.devices=2")
    wait(lambda: second_rank(run))  # it imports for seconds
    os.kill(run.pid if who == "the leading rank" else second_rank(run), signal.SIGTERM)
    code, _ = ends(run)
    assert code in (143, -signal.SIGKILL)  # a rank that dies while it imports has Lightning kill the others


def test_ranks_die_with_a_leading_rank_that_is_killed(start, tmp_path: Path) -> None:
    run = start("strategy=ddp", "trainer.devices=2")
    wait(lambda: logged(tmp_path / "out") > 2)
    os.kill(second_rank(run), signal.SIGSTOP)  # it cannot notice by itself, as in a collective
    run.kill()
    ends(run)


def test_slurm_has_the_job_requeued_after_a_checkpoint_and_the_run_goes_on(start, tmp_path: Path) -> None:
    out, scontrol = tmp_path / "out", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n")
    scontrol.chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NAME": "train", "NTASKS": "1", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    environment = {f"SLURM_{key}": value for key, value in slurm.items()}
    run = start(**environment, PATH=f"{scontrol.parent}:{os.environ['PATH']}")
    wait(lambda: logged(out) > 5)
    os.kill(run.pid, signal.SIGUSR1)
    wait(lambda: (tmp_path / "asked").exists())
    assert (tmp_path / "asked").read_text() == "requeue 7\n" and len(saved(out)) == 1
    assert (out / "hpc_ckpt_1.ckpt").resolve() == out / "checkpoints" / saved(out)[0]
    steps = logged(out)
    wait(lambda: logged(out) > steps + 5)
    os.kill(run.pid, signal.SIGUSR2)  # another wish for a checkpoint: no end, no second request
    first = saved(out)
    wait(lambda: saved(out) not in (first, []))
    assert saved(out)[0] == first[0]  # the one before stays
    run.terminate()
    check_stopped(out, run, signal.SIGTERM)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


@pytest.mark.parametrize("scontrol", [None, "exit 1"], ids=["absent", "refusing"])
def test_a_job_that_is_not_requeued_is_said(tmp_path: Path, monkeypatch, capsys, scontrol: str | None) -> None:
    if scontrol:
        (tmp_path / "scontrol").write_text(f"#!/bin/sh\n{scontrol}\n")
        (tmp_path / "scontrol").chmod(0o755)
    slurm = {"JOB_ID": "9", "JOB_NAME": "train", "NTASKS": "1", "ARRAY_JOB_ID": "7", "ARRAY_TASK_ID": "2"}
    for key, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{key}", value)
    monkeypatch.setenv("PATH", str(tmp_path))
    requeue()
    assert "job 7_2 is not requeued: " in capsys.readouterr().err


STUCK = """
import ctypes, sys, threading, time
from sagetrain.training import signals
signals.PATIENCE = 1.0
lock = ctypes.create_string_buffer(64)
with signals.Watch() as watch:
    watch.stepping = sys.argv[1] == "in a step"
    watch.on_forced_end = lambda said: print(said, flush=True)
    def say() -> None:
        while lock.raw[0] != 2:  # of glibc's mutexes: taken, and somebody waits
            time.sleep(0.01)
        print("ready", flush=True)
        while not (watch.stepping and watch._asked):
            time.sleep(0.01)
        print("asked", flush=True)
    threading.Thread(target=say, daemon=True).start()
    for _ in range(2):  # the second call never returns, and no handler of Python's runs meanwhile
        ctypes.CDLL(None).pthread_mutex_lock(lock)
"""


@pytest.mark.parametrize("where", ["in a step", "before it"])
def test_a_process_that_waits_in_c_ends_too(tmp_path: Path, where: str) -> None:
    process = Program(STUCK, where, folder=tmp_path, **HERE)
    wait(lambda: process.stdout.read_text() == "ready\n")
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGINT)  # a launcher passes on what the terminal sent to all: one wish
    if where == "in a step":  # only a second Ctrl-C ends a step that does not
        wait(lambda: process.stdout.read_text() == "ready\nasked\n")
        time.sleep(1.5)  # longer than AGAIN, and than PATIENCE here
        assert process.is_alive()
        os.kill(process.pid, signal.SIGINT)
    code, said = ends(process)
    recorded = process.stdout.read_text().removeprefix("ready\n").removeprefix("asked\n")
    assert code == 130 and recorded.startswith("stopped by SIGINT")
    assert f"sagetrain: {recorded}" in said


def test_a_process_that_waits_ends_even_if_nobody_reads_what_it_says(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stderr")
    pipe = os.open(tmp_path / "stderr", os.O_RDWR | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(pipe, b"x" * 4096)
    process = Program(STUCK, "before it", folder=tmp_path, **HERE)
    try:
        wait(lambda: process.stdout.read_text() == "ready\n")
        process.terminate()
        assert process.ends() == 143
    finally:
        process.kill()
        os.close(pipe)


def test_handlers_are_put_back_and_ignored_signals_stay_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        others = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        with Watch() as watch:
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            watch.stepping = True
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR2)
            wait(lambda: watch.stop == signal.SIGTERM and watch.save == signal.SIGUSR2)
        assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == others
    finally:
        signal.signal(signal.SIGHUP, before)


def test_lightning_has_what_alone_replaces() -> None:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    owners = (trainer._signal_connector, trainer.fit_loop.epoch_loop)
    names = ("register_signal_handlers", "_broadcast_sigterm_tensor")
    before = [getattr(owner, name) for owner, name in zip(owners, names, strict=True)]
    alone(trainer)
    assert all(getattr(o, n) is not b for o, n, b in zip(owners, names, before, strict=True))


@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("torchrun", [False, True])
def test_ranks_of_another_launcher_run_more_than_once(monkeypatch, tmp_path: Path, torchrun: bool, rank: str) -> None:
    """torchrun starts them, and a sweep runs twice in each: the second time is no reason to look for a parent. Nor is
    it that torchrun was started by a process that had run something itself."""
    monkeypatch.delenv(LAUNCHER, raising=False)
    monkeypatch.setenv("LOCAL_RANK", rank)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv(LAUNCHER, "1")
    monkeypatch.setattr(os, "_exit", lambda status: pytest.fail(f"ended with {status}"))
    monkeypatch.setattr(train, "check_settings", lambda cfg: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            train.run(compose([*ENDLESS, f"out={tmp_path}"]))
    assert not is_helper()
    assert torchrun or (LAUNCHER in os.environ) == (rank == "0")
    os.environ.pop(LAUNCHER, None)

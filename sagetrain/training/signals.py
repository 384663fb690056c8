"""What a signal does to a run: a checkpoint at the end of the step, then an end with the status of that signal.

Method: handlers only take note. The ranks compare notes once a step (sagetrain.training.checkpoint), so one signal to
one rank stops all of them after the same step. SIGINT, SIGTERM and SIGHUP stop the run; SIGUSR1 and SIGUSR2 save and go
on, and SIGUSR1 has Slurm requeue the job. Before the first step there is nothing to save, and the run ends at once.
Choice: a thread reads the signals too, because Python's handlers wait for the main thread and that may wait in a
collective: it ends the process when the end takes longer than `PATIENCE`, or at a second Ctrl-C. Lightning's own
handlers stay out: they broadcast from within a handler, which can hang, and once a batch, which waits for the device.
Cost: processes that Lightning started die with the one that started them (Linux).
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
from lightning.pytorch.plugins.environments import SLURMEnvironment

from sagetrain.terminal import console

STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAVE = (signal.SIGUSR1, signal.SIGUSR2)
PATIENCE = 10.0  # seconds for an end that has nothing more to save
AGAIN = 1.0  # seconds after which a second Ctrl-C is a second wish: launchers pass on what the terminal sent already
LAUNCHER = "SAGETRAIN_LAUNCHER"  # in the environment of processes that Lightning starts: the process that did


class Stopped(SystemExit):
    """A signal ended the run; the exit status is that of a process it killed (128 + its number)."""

    def __init__(self, signum: int, said: str = "outside of training") -> None:
        super().__init__(128 + signum)
        self.said = f"stopped by {signal.Signals(signum).name} {said}"

    def __str__(self) -> str:
        return self.said


def is_helper() -> bool:
    """Whether Lightning started this process for a rank of a run that another process leads."""
    env = os.environ
    return int(env.get("LOCAL_RANK", 0)) > 0 and LAUNCHER in env and "TORCHELASTIC_RUN_ID" not in env


def follow_launcher() -> None:
    """In a process that Lightning started: die with the process that did. Linux only, without effect elsewhere."""
    if not is_helper() or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ[LAUNCHER]):  # it was gone before
        os._exit(1)


def alone(trainer: L.Trainer) -> None:
    """Keep Lightning's signal handling out of this trainer."""
    trainer._signal_connector.register_signal_handlers = lambda: None
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def requeue() -> None:
    """Have Slurm queue this job again (where this process is not one of its jobs: nothing)."""
    if not SLURMEnvironment.detect():
        return
    env = os.environ
    array = "SLURM_ARRAY_JOB_ID" in env
    job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}" if array else env["SLURM_JOB_ID"]
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:  # the checkpoint is there and the job goes on
        console(stderr=True).print(f"job {job} is not requeued: {error}", soft_wrap=True)


class Watch:
    """Takes note of signals while it is entered. In other threads than the main one it sees none.

    stop, save: the signal that asked for it, 0 when none did. stepping: whether the training loop will look.
    outside: what is said of an end when it will not.
    on_forced_end: called with what happened when the process has to end here and now.
    """

    def __init__(self) -> None:
        self.stop = self.save = 0
        self.outside = "outside of training"  # what is said of an end there
        self.on_forced_end: Callable[[str], Any] = lambda said: None
        self._stepping, self._left, self._asked = False, 0.0, 0.0
        self._before: dict[int, Any] = {}
        self._thread: threading.Thread | None = None

    @property
    def stepping(self) -> bool:
        return self._stepping

    @stepping.setter
    def stepping(self, value: bool) -> None:
        self._stepping, self._left = value, time.monotonic()

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            self._read, self._write = os.pipe()
            os.set_blocking(self._write, False)
            self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            self._thread = threading.Thread(target=self._follow, name="signals", daemon=True)
            self._thread.start()
            for signum in (*STOP, *SAVE):
                before = signal.getsignal(signum)
                if before is not signal.SIG_IGN:  # nohup, or in the background of a script
                    self._before[signum] = signal.SIG_DFL if before is None else before
                    signal.signal(signum, self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        if self._thread is not None:
            for signum, before in self._before.items():
                signal.signal(signum, before)
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._write, b"\0")
            self._thread.join()
            os.close(self._read)
            os.close(self._write)

    def _note(self, signum: int, frame: Any) -> None:
        if signum in SAVE:
            self.save = signum
        elif not self.stop:
            self.stop = signum
            if not self.stepping:
                if is_helper():  # the leading process cannot know, and would wait for this one
                    with contextlib.suppress(OSError):
                        os.kill(os.getppid(), signum)
                raise Stopped(signum, self.outside)

    def _follow(self) -> None:
        asked = 0
        while True:
            ready, _, _ = select.select([self._read], [], [], 0.2 if asked else None)
            numbers = os.read(self._read, 64) if ready else b""
            if 0 in numbers:
                return
            now = time.monotonic()
            for signum in numbers:
                if signum in STOP and not asked:
                    asked, self._asked = signum, now
                elif signum == signal.SIGINT and asked and now - self._asked > AGAIN:
                    self._end(asked, "and again, at once")
            if asked and not self.stepping and now - max(self._asked, self._left) > PATIENCE:
                self._end(asked, f"and, {PATIENCE:.0f} s later, by force")

    def _end(self, signum: int, how: str) -> None:
        said = f"stopped by {signal.Signals(signum).name} {how}"
        with contextlib.suppress(Exception):
            self.on_forced_end(said)
        with contextlib.suppress(OSError):
            if select.select([], [2], [], 0)[1]:  # else nobody reads, and to write would wait
                os.write(2, f"sagetrain: {said}\n".encode())
        os._exit(128 + signum)

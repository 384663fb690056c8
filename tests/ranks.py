"""Runs on several ranks, forked from a process that has imported what they need: that takes longer than they train.

A script: python ranks.py COMMANDS trains each of them on two ranks.
"""

import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.launch import Program

LEFT_BY_RUNS = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")  # in this process; the last shuffles data
SCRIPT = f"""
import os, runpy, sys
for name in {LEFT_BY_RUNS}:
    os.environ.pop(name, None)
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def launch(script: str, folder: Path, *arguments: str) -> None:
    """Run a script to its end, which must be a good one; what it says goes to files in `folder`. What it started ends
    with it."""
    process = Program(SCRIPT, script, *arguments, folder=folder, OMP_NUM_THREADS="1")
    code = process.ends(500)
    if code is None:
        os.killpg(process.pid, signal.SIGKILL)
    assert code == 0, f"exit {code}\n{process.stdout.read_text()[-3000:]}\n{process.stderr.read_text()[-6000:]}"


def train_each(commands: list[list[str]], folder: Path) -> None:
    """Run command lines with trainer.devices=2, one after the other; the last checkpoint of each stays. What they say
    goes to files in `folder`."""
    launch(__file__, folder, json.dumps(commands))


def fork(counts: Iterable[int], work: Callable[[int], Any]) -> None:
    """Side by side and for each of `counts`, call `work` with it on as many ranks, which share what this process has
    imported. When one fails, all end, this process too."""
    os.environ["SAGETRAIN_LAUNCHER"] = str(os.getpid())
    started = 0
    for ranks in counts:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        for rank in range(ranks):
            started += 1
            if os.fork():
                continue
            try:
                if ranks > 1:
                    os.environ |= address | {"LOCAL_RANK": str(rank)}
                work(ranks)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
    for _ in range(started):
        if os.wait()[1]:
            os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    import deepspeed  # noqa: F401 (once, for all ranks)

    from sagetrain.__main__ import compose
    from sagetrain.training import checkpoint, train

    checkpoint.Checkpoint.clear = lambda self: None
    fork([2], lambda ranks: [train.run(compose(each)) for each in json.loads(sys.argv[1])])

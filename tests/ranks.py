"""Runs on several ranks with few imports, because to start a process takes longer than to train in it.

Lightning starts the second rank of `train_each` by running this script again: python ranks.py COMMANDS.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sagetrain.paths import PACKAGE_DIR


def launch(script: str, *arguments: str) -> None:
    """Run a script to its end, which must be a good one. What it started ends with it."""
    left_by_runs = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "PL_GLOBAL_SEED")  # in this process; the last shuffles data
    env = {name: value for name, value in os.environ.items() if name not in left_by_runs}
    roots = (str(PACKAGE_DIR.parent), str(Path(__file__).parents[1]))
    env |= {"PYTHONPATH": os.pathsep.join(roots), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([sys.executable, script, *arguments], env=env, start_new_session=True, **pipes)
    try:
        said, _ = process.communicate(timeout=500)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, f"exit {process.returncode}\n{said[-6000:]}"


def train_each(commands: list[list[str]]) -> None:
    """Run command lines with trainer.devices=2, one after the other; the last checkpoint of each stays."""
    launch(__file__, json.dumps(commands))


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
    from sagetrain.__main__ import compose
    from sagetrain.training import checkpoint, train

    checkpoint.Checkpoint.clear = lambda self: None
    for each in json.loads(sys.argv[1]):
        train.run(compose(each))

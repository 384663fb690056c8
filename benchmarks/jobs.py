"""Runs of a benchmark that are commands of their own: several at a time on each GPU, in a folder that one goes on with.

Method: a thread for every slot, a slot for each command that may run on a GPU; what a command says goes to a file.
Choice: a benchmark finds out by itself which of its runs are done. A folder holds runs of one question: asked.json has
what was asked, and other questions are refused.
Cost: a start of Python, and of CUDA, for each run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from typing import Any

import torch


def slots(jobs: int) -> Queue[str]:
    """CUDA_VISIBLE_DEVICES of the commands that may run at a time, `jobs` of them on each GPU."""
    gpus = ",".join(str(gpu) for gpu in range(torch.cuda.device_count()))
    free: Queue[str] = Queue()
    for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", gpus).split(",") * jobs:
        free.put(gpu)
    return free


def positive(text: str) -> int:
    """A type of argparse: how many, one at least."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


@contextmanager
def pool(free: Queue[str]) -> Iterator[ThreadPoolExecutor]:
    """A thread for every slot. An error or Ctrl-C in the block begins nothing of what still waits."""
    with ThreadPoolExecutor(free.qsize()) as threads:
        try:
            yield threads
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise


def command(free: Queue[str], said: Path, *words: str) -> None:
    """`python -m WORDS` in a slot that is free. Raises RuntimeError where it fails."""
    slot = free.get()
    try:
        with said.open("a") as file:
            begin = file.tell()
            env = os.environ | {"CUDA_VISIBLE_DEVICES": slot}
            done = subprocess.run([sys.executable, "-m", *words], stdout=file, stderr=file, env=env)
        if done.returncode:
            last = said.read_bytes()[begin:].decode(errors="replace").rstrip().rpartition("\n")[2] or "nothing"
            raise RuntimeError(f"{words[0]} ended with status {done.returncode}: {said} has what it said, last: {last}")
    finally:
        free.put(slot)


def same_as_before(folder: Path, options: argparse.Namespace, names: tuple[str, ...], held: dict[str, Any]) -> None:
    """Raises ValueError where a folder has runs with another value of these options, or of another device or commit."""
    asked = {name: str(getattr(options, name)) for name in names}
    asked |= {name: str(held.get(name)) for name in ("device", "commit")}
    path = folder / "asked.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked, indent=2) + "\n")
    elif (before := json.loads(path.read_text())) != asked:
        other = ", ".join(f"{name} {before.get(name)}" for name in asked if before.get(name) != asked[name])
        raise ValueError(
            f"{folder} has runs of {other}: choose another folder for --out, or delete this one with its runs"
        )

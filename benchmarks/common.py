"""Rows of benchmarks/results: every number carries the device, commit and versions that made it."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import sagetrain
from benchmarks.tables import RESULTS, newest
from sagetrain.ops import schemes

__all__ = ["RESULTS", "conditions", "device_name", "kernel_file", "laps", "write"]


def device_name(device: str) -> str:
    """Marketing name of the GPU, or the CPU's name, its cores and the widest instructions torch uses on it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{name} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def nvcc_version() -> str:
    """Of the nvcc that compiled the extension's kernels, as they say themselves; else of the one on PATH, else ""."""
    found = re.search(rb"release [\d.]+, V([\d.]+)", Path(sagetrain._C.__file__).read_bytes())
    if found:
        return found[1].decode()
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout if shutil.which("nvcc") else ""
    return next(iter(re.findall(r"release [\d.]+, V([\d.]+)", said)), "")


def gpu_state(device: str) -> dict[str, str]:
    """The driver, and the clocks in MHz while the GPU is busy: those of an idle one say nothing. Empty on a CPU.

    The kernel that keeps it busy only waits, so these are the clocks that it may have, not those under full power.
    """
    columns = {"driver": "driver_version", "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem"}
    if device != "cuda" or not shutil.which("nvidia-smi"):
        return dict.fromkeys(columns, "")
    query = ["nvidia-smi", f"--id=GPU-{torch.cuda.get_device_properties().uuid}", "--format=csv,noheader,nounits"]
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second, longer than nvidia-smi takes
    said = subprocess.run([*query, f"--query-gpu={','.join(columns.values())}"], capture_output=True, text=True)
    torch.cuda.synchronize()
    values = said.stdout.strip().split(", ")
    return dict(zip(columns, values, strict=True)) if len(values) == len(columns) else dict.fromkeys(columns, "")


def conditions(device: str, scheme: str = schemes.DEFAULT) -> dict[str, str]:
    """The columns that every row starts with; `scheme` is one of them unless it is the default.

    SAGETRAIN_COMMIT names the commit where the sources come without git.
    """
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", "csrc", "sagetrain"], capture_output=True, text=True
    ).stdout
    named = {} if scheme == schemes.DEFAULT else {"scheme": scheme}
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        **named,
        "kernel": sagetrain.kernel_name(device, scheme),
        "commit": os.environ.get("SAGETRAIN_COMMIT") or (commit or "none") + ("+" if dirty else ""),
        "torch": torch.__version__,
        "sagetrain": sagetrain.__version__,
        "nvcc": nvcc_version(),
    } | gpu_state(device)


def kernel_file(name: str, device: str, scheme: str = schemes.DEFAULT) -> Path:
    """Where the rows of benchmark `name` with this device's kernel go: results/<name>-<kernel>.csv.

    Those of another scheme than the default: results/<name>-<scheme>-<kernel>.csv.
    """
    words = [name, *([] if scheme == schemes.DEFAULT else [scheme]), sagetrain.kernel_name(device, scheme)]
    return RESULTS / f"{'-'.join(words).replace('/', '-')}.csv"


def laps(work: Iterator[str], device: str) -> dict[str, float]:
    """Milliseconds between the yields of `work`, by the names it yields; each name ends its lap.

    On a GPU the times are the device's own, between CUDA events. A pause of about 2 ms goes first: the launches queue
    up behind it, so that Python's time per launch is hidden, as it is inside a model whose steps run ahead of the GPU.
    """
    cuda = device == "cuda"

    def mark() -> Any:
        if not cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    if cuda:
        torch.cuda.synchronize()
        torch.cuda._sleep(4_000_000)  # cycles
    names, marks = [], [mark()]
    for name in work:
        names.append(name)
        marks.append(mark())
    if cuda:
        torch.cuda.synchronize()
    times = (a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in pairwise(marks))
    return dict(zip(names, times, strict=True))


def write(rows: list[dict], path: Path) -> None:
    """Adds rows to a CSV, in place of older ones of the same cases and device (tables.CASES).

    Columns that a row does not have stay empty, in the rows that were there before too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old: list[dict] = []
    if path.exists():
        with path.open(newline="") as file:
            old = list(csv.DictReader(file))
    columns = dict.fromkeys(column for row in old + rows for column in row)
    kept = newest(old + rows, path.stem.split("-")[0])
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(columns), restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    print(f"{len(rows)} rows -> {path}, {len(old) + len(rows) - len(kept)} older ones out")

"""Rows of benchmarks/results: every number carries the device, commit and versions that made it."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

import sagetrain

RESULTS = Path(__file__).parent / "results"


def device_name(device: str) -> str:
    """Marketing name of the GPU, or the CPU's name, its cores and the widest instructions torch uses on it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return f"{name} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"


def conditions(device: str) -> dict[str, str]:
    """The columns that every row starts with. SAGETRAIN_COMMIT names the commit where the sources come without git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "--", "csrc", "sagetrain"], capture_output=True, text=True
    ).stdout
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "kernel": sagetrain.kernel_name(device),
        "commit": os.environ.get("SAGETRAIN_COMMIT") or (commit or "none") + ("+" if dirty else ""),
        "torch": torch.__version__,
        "sagetrain": sagetrain.__version__,
    }


def write(rows: list[dict], path: Path) -> None:
    """Appends rows to a CSV; rows of the same conditions, in all columns but the measured ones, stay side by side."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} rows -> {path}")

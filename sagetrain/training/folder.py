"""The run directory: one run at a time in it, one name for it on all ranks, and files that are whole or not there.

Method: global rank 0 holds a lock (`flock` on `.lock`) for as long as it trains; the kernel releases it when the
process ends, however it ends. Files are written aside and renamed.
Choice: without `out=` the ranks of torchrun agree through its store, and those of srun are named by job and step, so
that a job that is requeued goes on.
Cost: a file system without locks (some NFS and Lustre mounts) protects nothing; a line says so.
"""

import fcntl
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore

from sagetrain.errors import asked_for
from sagetrain.terminal import console

LOCK = ".lock"
RENAMED = {"probe/loss_int8": "probe/loss_lowbit"}  # columns of metrics.csv in older run directories


def write(path: Path, content: str | bytes) -> None:
    """Replace `path` in one step, so that a reader or a kill never meets half a file."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)  # where the disk is full


def global_rank() -> int:
    """0 in one process of a run only: what launchers say of this process, before anything is set up."""
    said = [int(os.environ.get(name, 0)) for name in ("SLURM_PROCID", "NODE_RANK", "LOCAL_RANK")]
    return int(os.environ.get("RANK", max(said)))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have `folder` (made if need be) for this run alone; ranks other than 0 rely on rank 0.

    Raises RuntimeError, with who it is, when another run has it, ValueError when nothing can be written there.
    """
    if global_rank() > 0:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with asked_for(f"out={folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / LOCK, "a+")  # noqa: SIM115 (closed by the next line)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RuntimeError(
                f"{folder} is in use by another run ({file.read().strip() or 'just started'}): wait until that one "
                "ends, or choose another out=FOLDER"
            ) from None
        except OSError as error:
            console(stderr=True).print(f"{folder}: no lock there ({error.strerror}); start no second run in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
        file.flush()
        try:
            yield
        finally:
            if made and [path.name for path in folder.iterdir()] == [LOCK]:  # nothing came of it
                (folder / LOCK).unlink()
                with suppress(OSError):
                    for path in made:
                        path.rmdir()


def agreed(out: str) -> str:
    """The run directory of a command that names none: the same for all ranks. `out`: what this rank would take.

    Raises ValueError when ranks were started by something that gives them no way to agree.
    """
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), is_master=False, timeout=timedelta(minutes=5))
        return store.compare_set("sagetrain/out", "", out).decode()
    if int(env.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in env and "RANK" not in env:
        return str(Path(out).with_name(f"slurm-{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"))
    if int(env.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("these ranks cannot agree on a run directory by themselves: give all of them one out=FOLDER")
    return out


def quoted(text: str) -> str:
    """A value as Hydra's command line reads it, whatever it holds."""
    if re.fullmatch(r"[\w./:+%@-]+", text, re.ASCII):
        return text
    return "'" + re.sub(r"(\\*)'", r"\1\1\\'", re.sub(r"(\\+)\Z", r"\1\1", text)) + "'"

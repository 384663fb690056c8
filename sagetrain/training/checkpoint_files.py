"""Checkpoints on the disk: which there are, whether they are whole, and the copy of a state that is written to one.

Method: a file is whole when every part in it has the checksum that torch.save gave it and it reads as plain data
(`weights_only`). Of a folder (FSDP2, DeepSpeed) the parts have to be there in full length.
Choice: each rank looks for itself, since each reads the whole file to load it anyway; a damaged checkpoint stays where
it is until a new one is complete, so all of them see the same. A folder's bytes are not read through: it may hold many
times what a rank loads.
Cost: reading the file once more before training goes on, one or two seconds for a gigabyte in the page cache.
"""

import copy
import os
import re
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from sagetrain.terminal import console
from sagetrain.training.folder import global_rank


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in `folder`, the newest first."""
    return sorted(folder.glob("step-*.ckpt"), key=lambda path: -int(path.stem.removeprefix("step-")))


def step_of(checkpoint: Path) -> int:
    """The step in the name of a checkpoint of a run; 0 where it has another name."""
    found = re.fullmatch(r"step-(\d+)", checkpoint.stem)
    return int(found[1]) if found else 0


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint; None when it is whole."""
    try:
        if path.is_dir():
            return _damage_of_folder(path)
        if not is_zipfile(path):
            return "it is not what torch.save writes, or it is cut off"
        with ZipFile(path) as file:
            if part := file.testzip():
                return f"{part} in it differs from what was written"
        found = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # torch's and zipfile's word for it depends on what the bytes happen to be
        return str(error).partition("\n")[0][:200] or type(error).__name__
    whole = isinstance(found, dict) and {"state_dict", "loops", "optimizer_states"} <= found.keys()
    return None if whole else "it holds something else"


def _damage_of_folder(path: Path) -> str | None:
    files = list(path.rglob("*.pt"))
    if (path / ".metadata").exists():  # FSDP2
        for part in dcp.FileSystemReader(path).read_metadata().storage_data.values():
            if (path / part.relative_path).stat().st_size < part.offset + part.length:
                return f"{part.relative_path} in it is cut off"
    elif not files or not (path / (path / "latest").read_text().strip()).is_dir():  # DeepSpeed
        return "it is neither torch's nor DeepSpeed's"
    for file in files:
        ZipFile(file).close()  # its table of contents is at the end
    return None


def check_kind(path: Path, in_one_file: bool) -> None:
    """Raises ValueError for a folder where the strategy reads a checkpoint `in_one_file`."""
    if path.is_dir() and in_one_file:
        raise ValueError(
            f"{path} is a folder, which FSDP2 and DeepSpeed read as a checkpoint: give strategy= as that run had, "
            "or a checkpoint in one file"
        )


def check_checkpoint(path: Path, in_one_file: bool) -> None:
    """Raises ValueError for what is no checkpoint of a run, or none that a strategy `in_one_file` can read."""
    check_kind(path, in_one_file)
    if said := damage(path):
        raise ValueError(
            f"{path} is no checkpoint of a run, or it is damaged: {said}. To start from weights alone give the folder "
            "that holds them in Hugging Face's format as model.path"
        )


def last_good(folder: Path, in_one_file: bool) -> Path | None:
    """The newest checkpoint in `folder` that is whole, with a warning that names newer ones; None where there is none.

    Raises ValueError when all are damaged.
    """
    damaged: list[str] = []
    for path in checkpoints(folder):
        check_kind(path, in_one_file)
        if not (said := damage(path)):
            if damaged and global_rank() == 0:
                console(stderr=True).print(
                    f"warning: damaged: {'; '.join(damaged)}. Going on from the checkpoint before, {path}",
                    highlight=False, markup=False, soft_wrap=True,
                )  # fmt: skip
            return path
        damaged.append(f"{path} ({said})")
    if damaged:
        raise ValueError(
            f"no checkpoint of this run is whole: {'; '.join(damaged)}. Start anew with another out=FOLDER, or delete "
            f"{folder}"
        )
    return None


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file())


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def flush(path: Path) -> None:
    """Have the disk keep `path`: a file, or a folder with everything in it."""
    for file in [*path.rglob("*"), path] if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def on_host(state: Any) -> Any:
    """A copy of `state` in the memory of the host that shares nothing with it; what was shared within it still is.

    The device copies while the next tensors are queued (into pinned memory); the host waits once, at the end.
    """
    copies: dict[Any, Tensor] = {}
    memo = {id(x): _copied(x, copies) for x in tree_leaves(state) if isinstance(x, Tensor)}
    if torch.cuda.is_initialized():
        torch.cuda.current_stream().synchronize()
    return copy.deepcopy(state, memo)


def _copied(x: Tensor, copies: dict[Any, Tensor]) -> Tensor:
    if is_traceable_wrapper_subclass(x):  # quantised moments: not every such class knows how to copy itself
        names, context = x.__tensor_flatten__()
        inner = {name: _copied(getattr(x, name), copies) for name in names}
        return type(x).__tensor_unflatten__(inner, context, x.size(), x.stride())
    if (key := _key(x)) not in copies:
        copies[key] = x.detach().to("cpu", non_blocking=True, copy=True)
    return copies[key]


def _key(x: Tensor) -> tuple:
    """Of tied weights the same."""
    return x.device, x.data_ptr(), x.dtype, x.size(), x.stride()


def pinned_sizes(state: Any) -> list[int]:
    """Bytes of each piece of pinned memory that `on_host` asks for: one for every tensor on a GPU."""
    parts = [part for x in tree_leaves(state) if isinstance(x, Tensor) for part in _parts(x)]
    return list({_key(part): part.nbytes for part in parts if part.is_cuda}.values())


def _parts(x: Tensor) -> list[Tensor]:
    if is_traceable_wrapper_subclass(x):
        return [part for name in x.__tensor_flatten__()[0] for part in _parts(getattr(x, name))]
    return [x]


def pin(sizes: list[int]) -> None:
    """Pin memory in pieces of these `sizes`, which torch then keeps for whoever asks for as much. Without the GIL."""
    held = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
    del held  # all at once: a piece that is let go serves the next request


class HostCheckpointIO(TorchCheckpointIO):
    """Saving only takes a copy of the state, `taken`, which `Checkpoint` writes in the background. Reading is onto the
    CPU by its name (Lightning's own gives a function, which quantised moments refuse)."""

    taken: dict[str, Any] | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        self.taken = on_host(checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return torch.load(path, map_location="cpu", weights_only=True)

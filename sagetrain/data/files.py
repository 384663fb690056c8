"""Which local files a path means, and the records in them.

Method: a folder or a glob is read as the hub would read it: files that call themselves train, validation or test (by
the words of `datasets`, in their own name or in a folder's) are splits. Training takes the train split, or what carries
no such name; validation takes the validation split; test files are never taken unless they are named one by one. Where
a folder holds tables, the text beside them is documentation or a loading script, not data.
Kept by hand: records are read here and not by `datasets`, since only so can an error name the file and the line; since
it infers one schema for all records, and refuses fields that differ from file to file though nobody asks for them;
since it unpacks compressed files to the disk first; and since it takes a file named train and test for both splits.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import lzma
import re
import tokenize
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

_COMPRESSED = ("", ".xz", ".gz", ".zst")
_ROWS = (".parquet", ".arrow", ".npy")  # the last two as save_to_disk of datasets and numpy write them
TABLES = (*(".jsonl" + end for end in _COMPRESSED), *_ROWS)
FORMATS = (*TABLES, *(".txt" + end for end in _COMPRESSED), ".py")
_SPLITS = {  # the first that matches; a test file of the validation split is a test file
    "test": "test|testing|eval|evaluation",
    "validation": "validation|valid|dev|val",
    "train": "train|training",
}
_ABOUT = re.compile(r"(readme|licen[cs]e|copying|notice|authors|changelog|citation|requirements)\b", re.IGNORECASE)


@dataclass
class Files:
    """The files that a path stands for: those to read, those of the validation split, and those that are left out."""

    chosen: list[Path] = field(default_factory=list)
    validation: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)

    @property
    def some_left(self) -> bool:
        """Whether the path holds more files than are trained on."""
        return bool(self.validation or self.left_out)

    def __str__(self) -> str:
        parts = ("reads", self.chosen), ("validates on", self.validation), ("leaves out", self.left_out)
        return "; ".join(f"{what} {_listed(files)}" for what, files in parts if files)


def find(path: str | Path | Sequence[str | Path], want: str = "train") -> Files:
    """What `path` names: a file, a folder, a glob, or a list of them; `want` is the split, `train` or `validation`.

    Raises:
        FileNotFoundError: an entry names nothing.
        ValueError: what names no file, a file of an unknown format, or a folder that holds none of a known one, or of
            other splits only.
    """
    found = Files()
    for entry in path if isinstance(path, Sequence) and not isinstance(path, str) else [path]:
        if not isinstance(entry, str | Path) or not str(entry):
            raise ValueError(f"data.path holds {entry!r}, which names no file or folder")
        where = Path(entry).expanduser()
        if where.is_dir():
            inside = (p for p in where.rglob("*") if p.name.endswith(FORMATS) and not _hidden(p.relative_to(where)))
            files, beside = _data(sorted(p for p in inside if p.is_file()))
            found.left_out += beside
            _choose(files, where, want, found)
        elif where.is_file():  # may have a name that reads like a glob
            files = [where]
            found.chosen.append(where)
        else:
            there = next((parent for parent in where.parents if parent.exists()), Path())  # no pattern up to here
            pattern = Path(glob.escape(str(there)), where.relative_to(there))
            files = [p for p in map(Path, sorted(glob.glob(str(pattern), recursive=True))) if p.is_file()]
            if not files:
                raise FileNotFoundError(f"data file '{entry}' does not exist (looked in {Path.cwd()})")
            if len({_split(p.relative_to(there)) for p in files}) == 1:  # data/test-*.jsonl asks for just these
                found.chosen += files
            else:
                _choose(files, there, want, found)
        if wrong := [p for p in files if not p.name.endswith(FORMATS)] if files else [where]:
            raise ValueError(f"'{wrong[0]}' is or holds no data of a known format; supported: {', '.join(FORMATS)}")
    if not found.chosen:
        raise ValueError("data.path is an empty list; name at least one file")
    found.chosen = list(dict.fromkeys(found.chosen))
    found.left_out = [p for p in found.left_out if p not in found.chosen]
    return found


def find_validation(path: str | Path | Sequence[str | Path], trained: Files | None) -> list[Path]:
    """The validation files that `path` names. Raises ValueError if one of them is trained on, and as `find` does."""
    chosen, seen = find(path, "validation").chosen, {p.resolve() for p in trained.chosen} if trained else set()
    if both := [p for p in chosen if p.resolve() in seen]:
        raise ValueError(
            f"data.val_path names '{both[0]}', which data.path trains on: give other files, or leave data.val_path out "
            "and hold out some of the data (data.val_fraction, for pre-training data.val_documents)"
        )
    return chosen


def _choose(files: list[Path], root: Path, want: str, found: Files) -> None:
    """Sort `files` under the folder (or the beginning of a glob) `root` into `found`, by split."""
    splits: dict[str, list[Path]] = {name: [] for name in ("", *_SPLITS)}
    for file in files:
        splits[_split(file.relative_to(root))].append(file)
    chosen = splits.pop(want) or splits.pop("")
    if files and not chosen:
        held = ", ".join(f"{name} ({_listed(splits[name])})" for name in splits if splits[name])
        raise ValueError(f"'{root}' holds no {want} split, only {held}; to read these, name the files themselves")
    found.chosen += chosen
    if want == "train":
        found.validation += splits.pop("validation")
    found.left_out += sorted(file for rest in splits.values() for file in rest)


def _split(path: Path) -> str:
    """The split that a file says it is of, in its own name or in a folder's; "" where none is said. Source code has no
    splits: train.py is a program."""
    if path.suffix == ".py":
        return ""
    name = path.as_posix().lower()
    said = (split for split, words in _SPLITS.items() if re.search(rf"(^|[-._ 0-9/])({words})([-._ 0-9/]|$)", name))
    return next(said, "")


def _data(files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Data, and what lies beside it."""
    data = [p for p in files if p.name.endswith(TABLES)] or [p for p in files if not _ABOUT.match(p.name)] or files
    return data, [p for p in files if p not in set(data)]


def _hidden(path: Path) -> bool:
    """Caches, checkpoints of editors, bytecode."""
    return any(part.startswith(".") for part in path.parts) or any(part.startswith("__") for part in path.parts[:-1])


def _listed(files: Sequence[Path]) -> str:
    return ", ".join(p.name for p in files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def read_records(path: Path) -> Iterator[tuple[int, dict, int]]:
    """(number, record, bytes of the file read by then) of a file: one per line of .jsonl, per row of a table, and one
    for a whole .txt, .py (`{"text": ...}`) or .npy (`{"input_ids": ...}`).

    Raises:
        ValueError: broken JSON, text that is not UTF-8, a damaged file; names file and line.
    """
    number = 0
    try:
        with open(path, "rb") as file, _OPENERS.get(path.suffix, contextlib.nullcontext)(file) as content:
            lines = content if is_table(path) else (text.read() for text in [content])
            items = _rows(content, path.suffix) if path.suffix in _ROWS else lines
            for number, item in enumerate(items, 1):
                if isinstance(item, dict) or item.strip():
                    yield number, _parse(item, path, f"{path}:{number}"), file.tell()
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}:{number + 1}: the file is damaged or cut off ({error})") from error


def is_table(path: Path) -> bool:
    """Whether the file has a record per line or row, not one text."""
    return path.suffix in _ROWS or ".jsonl" in path.suffixes[-2:]


def _rows(file: Any, suffix: str) -> Iterator[dict]:
    try:
        if suffix == ".npy":
            yield {"input_ids": np.load(file.name, mmap_mode="r")}
            return
        batches = parquet.ParquetFile(file).iter_batches(256) if suffix == ".parquet" else pa.ipc.open_stream(file)
        for batch in batches:
            yield from batch.to_pylist()
    except (pa.ArrowException, OSError, ValueError) as error:
        raise EOFError(f"not readable as {suffix[1:]}: {error}") from error


@contextlib.contextmanager
def _zst(file: Any) -> Iterator[Any]:
    """By pyarrow, which datasets brings along: so no other package is needed."""
    try:
        yield io.BufferedReader(pa.CompressedInputStream(file, "zstd"))
    except OSError as error:
        raise EOFError(f"not readable as zst: {error}") from error


_OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".zst": _zst}


def _parse(item: Any, path: Path, where: str) -> dict:
    try:
        if not is_table(path):
            cookie = tokenize.detect_encoding(io.BytesIO(item).readline)[0] if path.suffix == ".py" else "utf-8-sig"
            return {"text": item.decode(cookie).replace("\r\n", "\n")}
        record = item if isinstance(item, dict) else json.loads(item)
    except (ValueError, SyntaxError) as error:  # UnicodeDecodeError, JSONDecodeError, a wrong coding cookie
        what = "broken JSON line" if is_table(path) else "not UTF-8 text"
        raise ValueError(f"{where}: {what} ({error}); repair or remove it") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: each line must be a JSON object, this one is a {type(record).__name__}")
    return record

"""Tables of token ids: what is read and tokenised once, with any row at hand at once.

Method: `datasets` writes a table to its cache as Arrow files, aside and under a lock, and renames it when it is whole:
of several processes one does the work while the others wait (on several nodes: one on each, or one of all where they
share the cache and its locks), and what a kill leaves behind is never read. It is mapped into memory from there, so a
later start reads no text. Its name is a hash of what it is made from: files (path, size, time of change) or the hub
data set, the tokenizer, the settings, and this package's code.
Choice: all cores tokenise in the threads of the tokenizer itself (RAYON_NUM_THREADS=N for fewer), while this process
reads the next texts and writes the last; not `num_proc`, whose processes are forks of one that has threads, signal
handlers and perhaps a GPU, share a single file out to nobody, and were no faster.
Kept by hand: rows are found by the running sum of their lengths, since a `Dataset` takes a tenth of a millisecond for a
row and copies all of it, however long; and progress, since its bar knows no end and hence no time left.
Cost: four bytes of disk a token, some sixty of memory a document and process.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sagetrain.data.corpus import frame
from sagetrain.errors import is_bad_input
from sagetrain.terminal import console

Row = dict[str, Any]  # `ids`, the token ids int32 [n], n > 0, and a few numbers, the columns
Item = TypeVar("Item")
EVERY = 10.0  # seconds between two lines about progress where there is no terminal


class Empty(ValueError):
    """Nothing to make a table of."""


class Table:
    """Rows of token ids, those of several tables of `datasets`: `lengths` of the rows, int64 `[rows]`, and `columns`,
    the numbers that go with them, `[rows]` each."""

    def __init__(self, parts: Sequence[datasets.Dataset]) -> None:
        whole = pa.concat_tables([part.data.table for part in parts])
        ids = whole.column("ids")
        self.lengths = pc.list_value_length(ids).to_numpy().astype(np.int64)
        self.columns = {name: whole.column(name).to_numpy() for name in whole.column_names if name != "ids"}
        self.chunks = [chunk.flatten().to_numpy() for chunk in ids.chunks]  # views of the files: whole rows end to end
        self._ends, self._bounds = np.cumsum(self.lengths), np.cumsum([0, *map(len, self.chunks)])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        end = self._ends[row]
        begin = end - self.lengths[row]
        chunk = np.searchsorted(self._bounds, begin, "right") - 1
        return self.chunks[chunk][begin - self._bounds[chunk] : end - self._bounds[chunk]]


def tabled(rows: Callable[[], Iterator[Row]], name: str, *made_from: Any) -> datasets.Dataset:
    """The table of what `rows()` yields, which depends on `made_from` alone.

    Raises:
        Empty: there are no rows. What `rows` raises.
        OSError: the cache cannot be written.
    """

    def some() -> Iterator[Row]:
        row = None
        for row in rows():
            yield row
        if row is None:
            raise Empty(f"data set '{name}' is empty")

    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    fingerprint = hashlib.blake2b(repr((made_from, code)).encode(), digest_size=16).hexdigest()
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        return datasets.Dataset.from_generator(some, fingerprint=fingerprint, writer_batch_size=256)
    except (OSError, datasets.exceptions.DatasetGenerationError) as failed:
        error = failed.__cause__ or failed
        if not isinstance(error, OSError) or is_bad_input(error):
            raise error from None
        raise OSError(
            f"no table of token ids of {name} in {datasets.config.HF_DATASETS_CACHE} ({error}): if that cannot be "
            "written, set HF_DATASETS_CACHE=FOLDER in the environment, with 4 bytes of room a token"
        ) from error
    finally:
        if bars:
            datasets.enable_progress_bars()


def made_by(tokenizer: Any) -> Any:
    """What tells tokenizers apart."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else (tokenizer.name_or_path, len(tokenizer))
    return type(tokenizer).__name__, hashlib.blake2b(repr(words).encode()).hexdigest(), frame(tokenizer)


def stamps(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What tells files apart without reading them."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def digest(content: bytes) -> int:
    """Tells contents apart, by 63 bits."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big") >> 1


def unigram_entropy(table: Table) -> float:
    """Entropy of the distribution of the single bytes in a table of a byte tokenizer, in nats per byte: the loss of a
    model that knows byte frequencies and nothing else."""
    counts = sum(np.bincount(chunk, minlength=256)[:256] for chunk in table.chunks)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The same items, up to `depth` of them made ahead by a thread."""
    source, end = iter(items), object()
    thread = ThreadPoolExecutor(1, thread_name_prefix="data")
    try:
        waiting = deque(thread.submit(next, source, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, source, end))
            yield item
    finally:
        thread.shutdown(cancel_futures=True)


class Meter:
    """Says how far tokenising is, how fast, and how long it still takes: in place on a terminal, else in a line every
    `EVERY` seconds.

    name: of the data. total: bytes to read, or tokens to take, `taken` of which are there.
    """

    def __init__(self, name: str, total: int | None, taken: int = 0) -> None:
        self.name, self.total, self.taken = name, total, taken
        self._console, self._since, self._said = console(stderr=True), None, 0.0
        self._status = self._console.status(f"{name}: tokenising")

    def __enter__(self) -> None:
        self._said = time.monotonic()
        self._status.start()

    def __exit__(self, *_: Any) -> None:
        self._status.stop()

    def __call__(self, tokens: int, read: int) -> None:
        """`tokens` have been made and, where bytes are counted, `read` bytes been read."""
        now, terminal, done = time.monotonic(), self._console.is_terminal, read or self.taken + tokens
        since, first, made = self._since = self._since or (now, done, tokens)
        if done > first and now - self._said > (0.2 if terminal else EVERY):
            seconds, self._said = now - since, now
            left = "" if self.total is None else f", {seconds * max(self.total - done, 0) / (done - first):.0f} s left"
            share = "" if self.total is None else f" {done / self.total:.0%},"
            said = f"{self.name}: tokenised{share} {(tokens - made) / seconds:,.0f} tokens/s{left}"
            self._status.update(said) if terminal else self._console.print(said, soft_wrap=True)

"""Tables of token ids: what is read and tokenised once, with any row at hand at once.

Method: of small data (64 MiB of files) a table is made in memory at each start. Of more, `datasets` writes it to its
cache as an Arrow file, with a progress bar and under a lock, so that of several processes one does the work; it is
mapped into memory from there, and a later start reads no text. Its name in the cache is a hash of what it is made from:
the files (path, size, time of change) or the hub data set, the tokenizer, the settings, and this package's code.
Choice: small data does without, since importing `datasets` takes two seconds and finding a row in it a tenth of a
millisecond; so rows are found here, by the running sum of their lengths. Cost: four bytes of disk a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sagetrain.data.corpus import frame, say

Row = dict[str, Any]  # `ids`, the token ids int32 [n], n > 0, and a few numbers, the columns
LARGE = 2**26  # bytes


class Table:
    """Rows of token ids: `chunks` are whole rows laid end to end, `lengths` those of the rows, int64 `[rows]`."""

    def __init__(self, chunks: list[np.ndarray], lengths: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        self.chunks, self.lengths, self.columns = chunks, lengths, columns
        self._ends, self._bounds = np.cumsum(lengths), np.cumsum([0, *map(len, chunks)])

    @classmethod
    def of(cls, rows: list[Row]) -> Table:
        """In memory."""
        columns = {key: np.array([row[key] for row in rows]) for key in (rows or [{"digest": 0}])[0] if key != "ids"}
        ids = [row["ids"] for row in rows]
        return cls([np.concatenate(ids)] if ids else [], np.array([len(row) for row in ids], np.int64), columns)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> np.ndarray:
        end = self._ends[row]
        begin = end - self.lengths[row]
        chunk = np.searchsorted(self._bounds, begin, "right") - 1
        return self.chunks[chunk][begin - self._bounds[chunk] : end - self._bounds[chunk]]

    def __add__(self, other: Table) -> Table:
        columns = {key: np.concatenate([column, other.columns[key]]) for key, column in self.columns.items()}
        return Table(self.chunks + other.chunks, np.concatenate([self.lengths, other.lengths]), columns)


def tabled(rows: Callable[[], Iterator[Row]], name: str, tokenizer: Any, source: Any, *settings: Any) -> Table:
    """The table of what `rows()` makes of `source`, which is a list of files or a `Dataset`.

    Raises:
        ValueError: there are no rows. What `rows` raises.
        OSError: the cache cannot be written.
    """

    def some() -> Iterator[Row]:
        row = None
        for row in rows():
            yield row
        if row is None:
            raise ValueError(f"data set '{name}' is empty")

    local = isinstance(source, list)
    if (sum(file.stat().st_size for file in source) if local else source.data.nbytes) < LARGE:
        return Table.of(list(some()))
    import datasets
    import pyarrow.compute as pc

    stamps = [_stamp(file) for file in source] if local else source._fingerprint
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend else (tokenizer.name_or_path, len(tokenizer))
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    made_from = repr((stamps, type(tokenizer), words, frame(tokenizer), settings, code))
    fingerprint = hashlib.blake2b(made_from.encode(), digest_size=16).hexdigest()
    say("%s: tokenised once, then kept in %s", name, datasets.config.HF_DATASETS_CACHE)
    try:
        data = datasets.Dataset.from_generator(some, fingerprint=fingerprint).data
    except datasets.exceptions.DatasetGenerationError as error:
        raise (error.__cause__ or error) from None
    except OSError as error:
        raise OSError(
            f"token ids cannot be kept in {datasets.config.HF_DATASETS_CACHE} ({error}): set HF_DATASETS_CACHE=FOLDER "
            "in the environment, a folder that can be written"
        ) from error
    ids, names = data.column("ids"), set(data.column_names) - {"ids"}
    lengths = pc.list_value_length(ids).to_numpy().astype(np.int64)
    chunks = [chunk.flatten().to_numpy() for chunk in ids.chunks]  # views of the file
    return Table(chunks, lengths, {name: data.column(name).to_numpy() for name in names})


def _stamp(file: Path) -> tuple[str, int, int]:
    return str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns


def digest(text: str) -> int:
    """Tells texts apart, by 63 bits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def unigram_entropy(table: Table) -> float:
    """Entropy of the distribution of the single bytes in a table of a byte tokenizer, in nats per byte: the loss of a
    model that knows byte frequencies and nothing else."""
    counts = sum(np.bincount(chunk, minlength=256)[:256] for chunk in table.chunks)
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())

"""Pre-training data: rows of equal length, cut from documents that are laid end to end.

Method: in each epoch all documents (bos if the tokenizer uses one, text, eos) are laid end to end, permuted by (seed,
epoch), and cut into rows of `seq_len` tokens, which are permuted in turn, so that those of a long document come apart.
The running sum of the documents' lengths says where a row lies: any row is at hand at once. A document that reaches
over the end of a row goes on in the next one, where its position restarts at 0 and it no longer sees its first part:
every token is in one row, no row holds padding, and each cut costs one target. What does not fill a row at the end of
an epoch is left out of it.

Hub data sets, too large to be tokenised first, are streamed by `datasets` in the hub's own order. The same is done to
laps of them: the next `shuffle_buffer` documents, or as many as fill 64 rows; a lap's place is the stream's
`state_dict` before it. Laps are kept by hand since the state of the buffer in `datasets` leaves out what it holds.
Cost: each rank reads and tokenises the whole stream, since giving each rank documents of its own would tie a checkpoint
to the number of ranks.

Validation: `val_path`, or the validation files of a folder, or `val_documents` of the corpus, the same for every seed;
training leaves out every document whose text is one of them, wherever it stands.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from sagetrain.data.collate import Row, packed
from sagetrain.data.corpus import FIELD_HINT, TOGETHER, encode, frame, get_text, load_hub, say, stdlib_files
from sagetrain.data.files import find, find_validation, is_table, read_records
from sagetrain.data.loader import Batch, Stream
from sagetrain.data.tables import Table, digest, tabled

_LAP = 64  # rows; what is left of a lap at its end is less than one


class PackedRows(Sequence):
    """Rows of `width` tokens: documents of a table, laid end to end in the order `order`."""

    def __init__(self, table: Table, order: np.ndarray, width: int) -> None:
        self.table, self.order, self.width = table, order, width
        self.ends = np.cumsum(table.lengths[order])

    @property
    def tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __len__(self) -> int:
        return self.tokens // self.width

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        begin, end = row * self.width, (row + 1) * self.width
        first, last = np.searchsorted(self.ends, [begin, end - 1], "right")
        ids = np.concatenate([self.table[i] for i in self.order[first : last + 1]])
        skip = len(ids) - (int(self.ends[last]) - begin)  # tokens of the first document that lie in rows before
        return ids[skip : skip + self.width], [0, *(self.ends[first:last] - begin).tolist()]


class HubStream(Stream):
    """Packed rows of a hub data set, an `IterableDataset`, as it is read."""

    start = {"lap": 0, "source": None, "row": 0}

    def __init__(self, data: Any, documents: Any, buffer: int, width: int, hidden: np.ndarray, **stream: Any) -> None:
        super().__init__(rows=lambda lap: next(self._laps(lap, None))[0], **stream)
        self.data, self.documents, self.buffer, self.width, self.hidden = data, documents, buffer, width, hidden

    def batches(self, position: dict[str, Any], rank: int, ranks: int) -> Iterator[tuple[Batch, dict[str, Any]]]:
        size, rows = self.batch_size, self._rows(**position)
        while group := list(islice(rows, size * ranks)):
            yield self.collate([row for row, _ in group[rank * size : (rank + 1) * size]]), group[-1][1]

    def _rows(self, lap: int, source: Any, row: int) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Rows, each with the position after it."""
        while True:
            for rows, before in self._laps(lap, source):
                order = np.random.default_rng((self.seed, lap)).permutation(len(rows))
                for i in range(row, len(rows)):
                    yield rows[order[i]], {"lap": lap, "source": before, "row": i + 1}
                lap, row = lap + 1, 0
            source = None

    def _laps(self, lap: int, source: dict[str, Any] | None) -> Iterator[tuple[PackedRows, Any]]:
        """The rows of each lap up to the end of the data, and the state of the data before it."""
        data = copy.deepcopy(self.data)  # each pass has a position of its own
        if source is not None:
            data.load_state_dict(source)
        records, read = iter(data), True
        while read:
            found, length = [], 0
            while length < _LAP * self.width and (read := list(islice(records, self.buffer))):
                found += [document for document in self.documents(read) if document["digest"] not in self.hidden]
                length = sum(len(document["ids"]) for document in found)
            order = np.random.default_rng((self.seed, lap)).permutation(len(found))
            yield PackedRows(Table.of(found), order, self.width), source
            lap, source = lap + 1, data.state_dict()


def build_pretrain(
    tokenizer: Any,
    seq_len: int,
    seed: int,
    batch_size: int,
    source: str | None = "stdlib",
    name: str | None = None,
    path: Any = None,
    text_field: str = "text",
    split: str = "train",
    val_path: Any = None,
    val_documents: int | None = None,
    document_boundaries: bool = True,
    shuffle_buffer: int = 1024,
) -> Stream:
    """Local files (`path`), else Python's standard library (`source="stdlib"`), else a hub data set (`source`, `name`).

    Held out: all documents of `val_path` or of a folder's validation files (`val_documents` of them if set), else
    `val_documents` of the corpus, else nothing.
    """
    for key, value, least in ("shuffle_buffer", shuffle_buffer, 1), ("val_documents", val_documents or 0, 0):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"data.{key} must be an integer of at least {least}, not {value!r}")
    files = None if path is None else find(path)
    apart = find_validation(val_path, files) if val_path is not None else files.validation if files else []
    local, table = partial(local_table, tokenizer=tokenizer, text_field=text_field), None
    if files:
        name, table = _listed(files.chosen), local(files.chosen)
        if files.some_left:
            say("data.path=%s: %s", path, files)
    elif source == "stdlib":
        name, table = "stdlib", local(stdlib_files())
    elif source:
        hub, name = load_hub(source, name, split, streaming=True), "/".join(filter(None, (source, name, split)))
        read = lambda records: documents(  # noqa: E731
            tokenizer, (get_text(record, text_field, name, FIELD_HINT) for record in records)
        )
    else:
        raise ValueError("no data: set data.source= (stdlib or the id of a hub data set) or data.path= (local files)")

    held_out, hidden = [], np.array([], np.int64)
    if apart or val_documents:
        held = local(apart) if apart else table or Table.of(list(read(hub.take(val_documents))))
        order = np.random.default_rng(0).permutation(len(held))[: val_documents or None]
        held_out, hidden = list(PackedRows(held, order, seq_len)), np.unique(held.columns["digest"][order])
        if not held_out:
            raise ValueError(
                f"the {len(hidden)} validation documents do not fill one row of {seq_len} tokens; raise "
                "data.val_documents or give more data.val_path"
            )
    what = f"shuffle_buffer {shuffle_buffer}" if table is None else f"{table.lengths.sum()} tokens"
    common = dict(
        name=f"{name}, {what}, seed {seed}, held out {len(hidden)}",
        held_out=held_out,
        collate=partial(packed, boundaries=document_boundaries),
        batch_size=batch_size,
        seed=seed,
        endless=True,
        facts={"files": str(files)} if files and files.some_left else {},
    )
    if table is None:
        stream: Stream = HubStream(hub, read, shuffle_buffer, seq_len, hidden, **common)
    else:
        kept = np.flatnonzero(~np.isin(table.columns["digest"], hidden))
        order = lambda epoch: np.random.default_rng((seed, epoch)).permutation(kept)  # noqa: E731
        stream = Stream(rows=lambda epoch: PackedRows(table, order(epoch), seq_len), **common)
    if not (rows := stream.rows(0)):
        raise ValueError(
            f"data set '{name}' holds {rows.tokens} tokens in {len(rows.order)} document(s) after {len(hidden)} held "
            f"out for validation; one row needs {seq_len}. Give more text, a shorter seq_len, or fewer "
            "data.val_documents (a file of .txt or .py is one document)."
        )
    return stream


def local_table(files: list[Path], tokenizer: Any, text_field: str = "text") -> Table:
    """The documents of local files, tokenised."""

    def texts() -> Iterator[str]:
        for file in files:
            for number, record in read_records(file):
                yield get_text(record, text_field if is_table(file) else "text", f"{file}:{number}", FIELD_HINT)

    return tabled(lambda: documents(tokenizer, texts()), _listed(files), tokenizer, files, text_field)


def documents(tokenizer: Any, texts: Iterable[str]) -> Iterator[dict[str, Any]]:
    """A row of a table for each text that is not empty: bos (if the tokenizer uses one), text, eos; the digest."""
    (bos, eos), texts = frame(tokenizer), filter(None, texts)
    while group := list(islice(texts, TOGETHER)):
        for text, ids in zip(group, encode(tokenizer, group), strict=True):
            yield {"ids": np.concatenate([bos, ids, eos]), "digest": digest(text)}


def _listed(files: Sequence[Path]) -> str:
    return ",".join(file.name for file in files[:3]) + (f"+{len(files) - 3}" if len(files) > 3 else "")

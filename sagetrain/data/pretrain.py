"""Pre-training data: rows of equal length, cut from documents that are laid end to end.

Method: in each epoch all documents (bos if the tokenizer uses one, text, eos) are laid end to end, permuted by (seed,
epoch), and cut into rows of `seq_len` tokens, which are permuted in turn, so that those of a long document come apart.
The running sum of the documents' lengths says where a row lies: any row is at hand at once, on any rank. A document
that reaches over the end of a row goes on in the next one, where its position restarts at 0 and it no longer sees its
first part: every token is in one row, no row holds padding, and each cut costs one target. What does not fill a row at
the end of an epoch is left out of it. Records that hold token ids are documents as they are, cut after each eos.

Documents are tokenised in parts, each a table in the cache (tables.py): a group of local files, or a file of a hub data
set, so that after a kill only one part is begun again. Local files are tokenised whole unless `tokens` says otherwise.
Of a hub data set only as many tokens are taken as the run needs: its files in an order that is drawn once, the same for
every seed, each from its beginning, until there are enough. The shuffle is over all that is taken, not over the rest.

Validation: `val_path`, or the validation files of a folder, or `val_documents` of the corpus (of a hub data set its
first), the same for every seed; training leaves out every document whose tokens are those of one of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from sagetrain.data.collate import Row, packed
from sagetrain.data.corpus import TOGETHER, contents, encode, fetched, frame, load_hub, say, stdlib_files
from sagetrain.data.files import find, find_validation, is_table, read_records
from sagetrain.data.loader import Stream
from sagetrain.data.tables import Empty, Meter, Table, ahead, digest, made_by, stamps, tabled

PART = 2**26  # bytes of files that are tokenised into one table
Read = Iterator[tuple[str | np.ndarray, int]]  # documents: text or token ids; bytes of all files that lie behind it
Part = tuple[Any, Callable[[], Read]]  # what tells it apart, and its documents


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
        parts = [self.table[i] for i in self.order[first : last + 1]]
        parts[-1] = parts[-1][: len(parts[-1]) - (self.ends[last] - end)]  # the rest lies in rows after this one
        parts[0] = parts[0][len(parts[0]) - (min(self.ends[first], end) - begin) :]
        return np.concatenate(parts), [0, *(self.ends[first:last] - begin).tolist()]


def build_pretrain(
    tokenizer: Any,
    seq_len: int,
    seed: int,
    batch_size: int,
    needed: int | None,
    source: str | None = "stdlib",
    name: str | None = None,
    path: Any = None,
    text_field: str = "text",
    split: str = "train",
    tokens: int | None = None,
    val_path: Any = None,
    val_documents: int | None = None,
    document_boundaries: bool = True,
) -> Stream:
    """Local files (`path`), else Python's standard library (`source="stdlib"`), else a hub data set (`source`, `name`).

    `tokens` are taken, if there are as many: null means all of local files, and `needed` of a hub data set. Held out:
    all documents of `val_path` or of a folder's validation files (`val_documents` of them if set), else `val_documents`
    of the corpus, else nothing.
    """
    for key, value, least in ("tokens", tokens, seq_len), ("val_documents", val_documents, 0):
        if value is not None and (type(value) is not int or value < least):
            raise ValueError(f"data.{key} must be an integer of at least {least}, not {value!r}")
    if not isinstance(document_boundaries, bool):
        raise ValueError(f"data.document_boundaries must be true or false, not {document_boundaries!r}")
    files = None if path is None else find(path)
    apart = find_validation(val_path, files) if val_path is not None else files.validation if files else []
    hub = None
    if files or source == "stdlib":
        chosen = files.chosen if files else stdlib_files()
        label = _listed(chosen) if files else "stdlib"
        corpus = _table(tokenizer, label, *_local(chosen, tokenizer, text_field), tokens)
    elif source:
        load = cache(lambda: load_hub(source, name, split, streaming=True))  # called for what is not in the cache
        hub = partial(_hub, load, (source, name, split, text_field), tokenizer, text_field)
        label = "/".join(filter(None, (source, name, split)))
        if (tokens := tokens or needed) is None:
            raise ValueError("data.tokens: say how many tokens to take of a hub data set (or set trainer.max_steps)")
    else:
        raise ValueError("no data: set data.source= (stdlib or the id of a hub data set) or data.path= (local files)")
    if files and files.some_left:
        say("data.path=%s: %s", path, files)

    held_out, hidden, without = [], np.array([], np.int64), 0
    if apart or val_documents:
        if apart:
            held = _table(tokenizer, _listed(apart), *_local(apart, tokenizer, text_field))
        else:
            held = _table(tokenizer, label, hub(first=val_documents), None) if hub else corpus
        order = np.random.default_rng(0).permutation(len(held))[: val_documents or None]
        held_out, hidden = list(PackedRows(held, order, seq_len)), np.unique(held.columns["digest"][order])
        without = int(held.lengths[order].sum())
        if not held_out:
            raise ValueError(
                f"the {len(hidden)} validation documents do not fill one row of {seq_len} tokens; raise "
                "data.val_documents or give more data.val_path"
            )
    if hub:
        corpus = _table(tokenizer, label, hub(), None, tokens + without)
    kept = np.flatnonzero(~np.isin(corpus.columns["digest"], hidden))
    order = lambda epoch: np.random.default_rng((seed, epoch)).permutation(kept)  # noqa: E731
    facts = {"documents": len(kept), "tokens": int(corpus.lengths[kept].sum())}
    stream = Stream(
        name=f"{label}, {corpus.lengths.sum()} tokens, seed {seed}, held out {len(hidden)}",
        rows=lambda epoch: PackedRows(corpus, order(epoch), seq_len),
        held_out=held_out,
        collate=partial(packed, boundaries=document_boundaries),
        batch_size=batch_size,
        seed=seed,
        endless=True,
        facts=facts | ({"asked": tokens} if hub else {}) | ({"files": str(files)} if files and files.some_left else {}),
    )
    if not stream.rows(0):
        raise ValueError(
            f"data set '{label}' holds {facts['tokens']} tokens in {len(kept)} document(s) after {len(hidden)} held "
            f"out for validation; one row needs {seq_len}. Give more text, a shorter seq_len, or fewer "
            "data.val_documents (a file of .txt or .py is one document)."
        )
    return stream


def _table(tokenizer: Any, name: str, parts: Iterable[Part], size: int | None, tokens: int | None = None) -> Table:
    """The documents of `parts`, tokenised: all, or the first that have `tokens` together. size: bytes of all files."""
    made, taken, maker = [], 0, made_by(tokenizer)
    for key, read in parts:
        left, meter = None if tokens is None else tokens - taken, Meter(name, size or tokens, taken)
        rows = partial(documents, tokenizer, read, left, meter)
        try:
            made.append(tabled(rows, name, maker, key, left))
        except Empty:  # there are no more
            if not made:
                raise
            break
        taken += int(Table(made[-1:]).lengths.sum()) if tokens else 0
        if tokens and taken >= tokens:
            break
    return Table(made)


def documents(
    tokenizer: Any, read: Callable[[], Read], limit: int | None = None, meter: Meter | None = None
) -> Iterator[dict[str, Any]]:
    """A row of a table for each document: bos (if the tokenizer uses one), text, eos, or the token ids as they are;
    with its digest. Ends with the document that reaches `limit` tokens."""
    (bos, eos), taken = frame(tokenizer), 0

    def encoded(group: list[tuple[str | np.ndarray, int]]) -> list[tuple[np.ndarray, int]]:
        texts = iter(encode(tokenizer, [document for document, _ in group if isinstance(document, str)]))
        return [
            (np.concatenate([bos, next(texts), eos]) if isinstance(document, str) else document.astype(np.int32), at)
            for document, at in group
        ]

    with meter or contextlib.nullcontext():
        for group in ahead(map(encoded, ahead(_groups(read()), 2)), 2):
            for ids, _ in group:
                yield {"ids": ids, "digest": digest(ids.tobytes())}
                taken += len(ids)
                if limit is not None and taken >= limit:
                    return
            if meter:
                meter(taken, group[-1][1])


def _groups(read: Read) -> Iterator[list[tuple[str | np.ndarray, int]]]:
    """As many documents as the tokenizer gets at once."""
    group, size = [], 0
    for document, at in read:
        group.append((document, at))
        size += len(document)
        if len(group) == TOGETHER[0] or size > TOGETHER[1]:
            yield group
            group, size = [], 0
    if group:
        yield group


def _local(files: Sequence[Path], tokenizer: Any, field: str) -> tuple[list[Part], int]:
    """Local files in groups of about `PART` bytes, and the bytes of all."""
    groups, size, total = [], PART, 0
    for file in files:
        if size >= PART:
            groups.append((total, []))
            size = 0
        groups[-1][1].append(file)
        size, total = size + file.stat().st_size, total + file.stat().st_size

    def read(behind: int, group: list[Path]) -> Read:
        for file in group:
            for number, record, at in read_records(file):
                for document in contents(record, field if is_table(file) else "text", tokenizer, f"{file}:{number}"):
                    yield document, behind + at
            behind += file.stat().st_size

    return [((stamps(group), field), partial(read, behind, group)) for behind, group in groups], total


def _hub(load: Callable[[], Any], key: tuple, tokenizer: Any, field: str, first: int | None = None) -> Iterator[Part]:
    """The files of a hub data set, in an order drawn once; or its `first` records, in its own order."""

    def read(file: int | None) -> Read:
        data = load()
        if file is None:
            data = data.take(first)
        elif file < data.num_shards:
            data = data.shard(data.num_shards, int(np.random.default_rng(0).permutation(data.num_shards)[file]))
        else:
            return
        for number, record in enumerate(fetched(data, key[0])):
            for document in contents(record, field, tokenizer, f"{key[0]}:{number}"):
                yield document, 0

    for file in count() if first is None else [None]:
        yield (key, first, file), partial(read, file)


def _listed(files: Sequence[Path]) -> str:
    return ",".join(file.name for file in files[:3]) + (f"+{len(files) - 3}" if len(files) > 3 else "")

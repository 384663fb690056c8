"""Pre-training data: stream documents, tokenise, pack into rows of equal length.

Method: documents (bos if the tokenizer uses one, text, eos) are laid end to end and cut into rows of `seq_len` tokens.
A document that reaches over the end of a row goes on in the next one, where its position restarts at 0 and it no longer
sees its first part: every token is in exactly one row, no row holds padding, and each cut costs one target.

Order: files are permuted by (seed, epoch); within that order, blocks of `shuffle_buffer` documents are permuted by
(seed, epoch, block). Unlike a sliding shuffle buffer this can be put back at any point by reading one block again,
which is what makes a resume exact and cheap. The stream has no end: after the last document the next epoch begins.

Ranks: global batch g is rows g*B*W to (g+1)*B*W, rank r takes the r-th B of them. So rows and their order do not depend
on the number of ranks W, and neither does a checkpoint. Choice and cost: each rank reads and tokenises the whole
stream, W times the work of giving each rank documents of its own, which would tie a checkpoint to its number of ranks.

Validation: `val_path`, or the validation files of a folder, or the first `val_documents` of the corpus in a fixed
order; training leaves out every document whose text is one of them, wherever it stands.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from sagetrain.data.collate import Row, packed
from sagetrain.data.files import Files, find, find_validation
from sagetrain.data.loader import Stream
from sagetrain.data.text import HubCorpus, LocalCorpus, encode, frame, say, stdlib_files

log = logging.getLogger(__name__)
_TOGETHER = 64  # documents a tokenizer call gets
_FIXED = (0,)  # key of the one order that does not depend on the seed


def pack(documents: Iterable[tuple[np.ndarray, dict]], width: int, skip: int = 0) -> Iterator[tuple[Row, dict]]:
    """Lays documents (token ids `[n]`, where) end to end, without the first `skip` tokens, and cuts rows of `width`.

    Yields each row with the place after it: `where` of its last document and `token`, how much of that is used up.
    """
    filled, row, starts = 0, np.empty(width, np.int32), []
    for ids, where in documents:
        at, skip = skip, 0
        while at < len(ids):
            take = min(width - filled, len(ids) - at)
            starts.append(filled)
            row[filled : filled + take] = ids[at : at + take]
            at, filled = at + take, filled + take
            if filled == width:
                yield (row, starts), where | {"token": at}
                filled, row, starts = 0, np.empty(width, np.int32), []


class PackedStream(Stream):
    """Endless stream of packed rows, see the module's text.

    Raises:
        ValueError: no document, or fewer tokens than one row after the held-out documents are left out.
    """

    start = {"epoch": 0, "block": 0, "source": None, "document": 0, "token": 0}

    def __init__(
        self,
        corpus: LocalCorpus | HubCorpus,
        tokenizer: Any,
        seq_len: int,
        seed: int,
        batch_size: int = 1,
        shuffle_buffer: int = 1024,
        boundaries: bool = True,
        held_out: Sequence[str] = (),
    ) -> None:
        self.corpus, self.tokenizer, self.seq_len, self.seed = corpus, tokenizer, seq_len, seed
        self.batch_size, self.shuffle_buffer, self.boundaries = batch_size, shuffle_buffer, boundaries
        self.facts: dict[str, str] = {}  # what was read, for the record of the run
        self._hidden = {_digest(text) for text in held_out}
        self.name = f"{corpus.name}, seed {seed}, shuffle_buffer {shuffle_buffer}, held out {len(self._hidden)}"
        self._frame = frame(tokenizer)
        held = ((self._framed(ids), {}) for ids in encode(tokenizer, held_out))
        self.held_out = [row for row, _ in pack(held, seq_len)]
        self._check_enough()

    def batches(self, position: dict[str, Any], rank: int, ranks: int) -> Iterator[tuple[dict, dict]]:
        size, rows = self.batch_size, pack(self._documents(position), self.seq_len, position["token"])
        while group := list(islice(rows, size * ranks)):
            mine = [row for row, _ in group[rank * size : (rank + 1) * size]]
            yield self.collate(mine), group[-1][1]

    def length(self, ranks: int) -> None:
        return None

    def collate(self, rows: Sequence[Row]) -> dict[str, Any]:
        return packed(rows, boundaries=self.boundaries)

    def _documents(self, position: dict[str, Any]) -> Iterator[tuple[np.ndarray, dict[str, Any]]]:
        epoch, block, source, first = (position[k] for k in ("epoch", "block", "source", "document"))
        while True:
            for read, before in self.corpus.blocks((self.seed, epoch), source, self.shuffle_buffer):
                texts = [text for text in read if self._kept(text)]
                order = np.random.default_rng((self.seed, epoch, block)).permutation(len(texts))
                where = {"epoch": epoch, "block": block, "source": before}
                for low in range(first, len(order), _TOGETHER):
                    group = [texts[i] for i in order[low : low + _TOGETHER]]
                    for number, ids in enumerate(encode(self.tokenizer, group), low):
                        yield self._framed(ids), where | {"document": number}
                block, first = block + 1, 0
            epoch, block, source, first = epoch + 1, 0, None, 0
            log.info("%s: all documents read, epoch %d begins in a new order", self.corpus.name, epoch)

    def _framed(self, ids: np.ndarray) -> np.ndarray:
        bos, eos = self._frame
        return np.concatenate([bos, ids, eos])

    def _kept(self, text: str) -> bool:
        return bool(text) and not (self._hidden and _digest(text) in self._hidden)

    def _check_enough(self) -> None:
        if self._hidden and not self.held_out:
            raise ValueError(
                f"the {len(self._hidden)} validation documents do not fill one row of {self.seq_len} tokens; raise "
                "data.val_documents or give more data.val_path"
            )
        tokens = documents = 0
        for read, _ in self.corpus.blocks(_FIXED, None, 1):
            documents += 1
            tokens += sum(len(self._framed(ids)) for ids in encode(self.tokenizer, list(filter(self._kept, read))))
            if tokens >= self.seq_len:
                return
        if not documents:
            raise ValueError(f"data set '{self.corpus.name}' is empty: it holds no document")
        raise ValueError(
            f"data set '{self.corpus.name}' holds {tokens} tokens in {documents} document(s) after {len(self._hidden)} "
            f"held out for validation; one row needs {self.seq_len}. Give more text, a shorter seq_len, or fewer "
            "data.val_documents (a file of .txt or .py is one document)."
        )


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
) -> PackedStream:
    """Local files (`path`), else Python's standard library (`source="stdlib"`), else a hub data set (`source`, `name`).

    Held out: all documents of `val_path` or of a folder's validation files (the first `val_documents` if set), else the
    first `val_documents` of the corpus, else nothing.
    """
    for key, value, least in ("shuffle_buffer", shuffle_buffer, 1), ("val_documents", val_documents or 0, 0):
        if not isinstance(value, int) or value < least:
            raise ValueError(f"data.{key} must be an integer of at least {least}, not {value!r}")
    files: Files | None = None
    if path is not None:
        files = find(path)
        corpus: LocalCorpus | HubCorpus = LocalCorpus(files.chosen, text_field)
        if files.some_left:
            say("data.path=%s: %s", path, files)
    elif source == "stdlib":
        corpus = LocalCorpus(stdlib_files(), name="stdlib", passage=1024)
    elif source:
        corpus = HubCorpus(source, name, split, text_field)
    else:
        raise ValueError("no data: set data.source= (stdlib or the id of a hub data set) or data.path= (local files)")
    apart = find_validation(val_path, files) if val_path is not None else files.validation if files else []
    held_out: list[str] = []
    if apart or val_documents:
        reader = LocalCorpus(apart, text_field) if apart else corpus
        texts = (text for read, _ in reader.blocks(_FIXED, None, 1) for text in read if text)
        held_out = list(islice(texts, val_documents or None))
        if not held_out:
            raise ValueError(f"data set '{reader.name}' is empty: no document for validation")
    options = (shuffle_buffer, document_boundaries, held_out)
    stream = PackedStream(corpus, tokenizer, seq_len, seed, batch_size, *options)
    stream.facts = {"files": str(files)} if files and files.some_left else {}
    return stream


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

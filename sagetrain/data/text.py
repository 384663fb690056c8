"""Text in, token ids out: tokenizers, local files, data sets of the hub, and Python's standard library.

Method: a corpus hands out *blocks* of documents together with the position before each block, so that a reader can be
put back there. In a local file, going back to a position skips lines without parsing them. Hub data sets are streamed
by `datasets`, whose own `state_dict` is the position. Cost: reading is lazy, nothing is cached on disk by this module.
"""

from __future__ import annotations

import copy
import logging
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only

from sagetrain.data.files import is_table, read_records

say = rank_zero_only(logging.getLogger("sagetrain.data").warning)  # what the reader has to know, once, not per rank
_FIELD_HINT = "Set data.text_field= to the one that holds the text."
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

Position = Any  # plain lists, dicts, ints and strings; None is the beginning
Block = tuple[list[str], Position]


class ByteTokenizer:
    """One token per UTF-8 byte (ids 0 to 255), then eos 256 and pad 257; the vocabulary is padded to 264.

    No file, no download, and no Python loop over the text. It answers the few calls that training needs of a tokenizer.
    """

    name_or_path = "byte"
    vocab_size = 264
    bos_token_id: int | None = None
    eos_token_id = 256
    pad_token_id = 257

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, text: str | Sequence[str], **_: Any) -> dict[str, Any]:
        return {"input_ids": self.encode(text) if isinstance(text, str) else [self.encode(t) for t in text]}

    def encode(self, text: str, **_: Any) -> list[int]:
        return list(text.encode())

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """Text of `ids` without those that are no byte; broken UTF-8 becomes U+FFFD."""
        return bytes(i for i in map(int, ids) if 0 <= i < 256).decode(errors="replace")


def build_tokenizer(name: str) -> Any:
    """`byte` gives the built-in `ByteTokenizer`; any other name is a model id or a folder for `AutoTokenizer`.

    A tokenizer without a pad token pads with eos: padding is masked from attention and loss, so its id is never seen.

    Raises:
        FileNotFoundError: neither a folder with a tokenizer nor an id that can be loaded from the hub or its cache.
        ValueError: the tokenizer has no end-of-sequence token.
    """
    if name == "byte":
        return ByteTokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(name))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no tokenizer at '{name}': it is neither a folder with tokenizer.json nor a model id that can be loaded "
            f"({_first_line(error)}). Give a local folder, a reachable model id, or 'byte', which needs no file."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(f"tokenizer '{name}' has no end-of-sequence token; documents could not be told apart")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer: Any, texts: Sequence[str]) -> list[np.ndarray]:
    """Token ids, int32 `[n]` each. Nothing in a text becomes a special token, even if it is spelt like one."""
    if isinstance(tokenizer, ByteTokenizer):
        return [np.frombuffer(t.encode(), dtype=np.uint8).astype(np.int32) for t in texts]
    plain = dict(add_special_tokens=False, split_special_tokens=True, return_attention_mask=False, verbose=False)
    parts = (list(texts[i : i + 256]) for i in range(0, len(texts), 256))  # a tokenizer takes 100 bytes a token
    return [np.asarray(ids, np.int32) for part in parts for ids in tokenizer(part, **plain)["input_ids"]]


def frame(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the tokenizer itself puts before a text (bos, or nothing), and eos; int32 `[0 or 1]` and `[1]`."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    before = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
    return np.array(before, dtype=np.int32), eos


def unigram_entropy(documents: Iterable[str]) -> float:
    """Entropy of the single-byte distribution of all documents, in nats per byte: the loss of a model that knows byte
    frequencies and nothing else.

    Raises:
        ValueError: no bytes at all.
    """
    counts = np.zeros(256, dtype=np.int64)
    for text in documents:
        counts += np.bincount(np.frombuffer(text.encode(), dtype=np.uint8), minlength=256)
    if not counts.any():
        raise ValueError("unigram_entropy needs at least one non-empty document")
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def stdlib_files() -> list[Path]:
    """Python's own standard library as source files, in a fixed order. Tests, installed packages and the build record
    `_sysconfigdata*` are left out, since they differ between distributions (Debian ships the tests apart).

    Raises:
        FileNotFoundError: this Python comes without sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - _NOT_STDLIB)
        files += [Path(folder, n) for n in sorted(names) if n.endswith(".py") and not n.startswith("_sysconfigdata")]
    if not files:
        raise FileNotFoundError(f"no standard library sources under {root}; pass data.path= with text of your own")
    return files


def stdlib_documents() -> Iterator[str]:
    """The texts of `stdlib_files`, in their order."""
    return (clean(record["text"]) for path in stdlib_files() for _, record in read_records(path))


def get_text(record: Mapping[str, Any], field: str, where: str, hint: str = "") -> str:
    """`record[field]`, which must be a string; lone surrogates, which no encoding can carry, become "?".

    Raises:
        ValueError: no such field (lists those there are), or not a string; starts with `where`.
    """
    if field not in record:
        raise ValueError(f"{where}: no field '{field}'; the fields are {', '.join(map(str, record)) or 'none'}. {hint}")
    if not isinstance(record[field], str):
        raise ValueError(f"{where}: field '{field}' is {type(record[field]).__name__}, a string is needed")
    return clean(record[field])


def clean(text: str) -> str:
    return text if text.isascii() else text.encode(errors="replace").decode()


def cut(text: str, size: int) -> Iterator[str]:
    """The lines of `text` in passages of about `size` characters."""
    length, lines = 0, []
    for line in text.splitlines(keepends=True):
        if lines and length + len(line) > size:
            yield "".join(lines)
            length, lines = 0, []
        lines.append(line)
        length += len(line)
    yield "".join(lines)


class LocalCorpus:
    """Documents of local files; `key` draws the order of the files, not that within a file.

    passage: cut each (.txt or .py) file into documents of about so many characters, so that shuffling mixes long files
    and the rows of a batch are no neighbours.
    """

    def __init__(
        self, files: Sequence[Path], text_field: str = "text", name: str | None = None, passage: int | None = None
    ) -> None:
        self.files, self.text_field, self.passage = list(files), text_field, passage
        self.name = name or ",".join(p.name for p in self.files[:3]) + (f"+{len(files) - 3}" if len(files) > 3 else "")

    def blocks(self, key: tuple[int, ...], position: Position, size: int) -> Iterator[Block]:
        """One pass from `position`: up to `size` documents each, and the position of the block's first document."""
        at: list[int] = list(position or (0, 0))
        return _blocks(self._texts(key, at), lambda: list(at), list(at), size)

    def _texts(self, key: tuple[int, ...], at: list[int]) -> Iterator[str]:
        order = np.random.default_rng(key).permutation(len(self.files))
        while at[0] < len(order):
            path = self.files[order[at[0]]]
            field = self.text_field if is_table(path) else "text"
            for number, record in read_records(path, 0 if self.passage else at[1]):
                text = get_text(record, field, f"{path}:{number}", _FIELD_HINT)
                parts = enumerate(cut(text, self.passage), 1) if self.passage else [(number, text)]
                for part_number, part in parts:
                    if part_number > at[1]:
                        at[1] = part_number
                        yield part
            at[:] = at[0] + 1, 0


class HubCorpus:
    """Documents of a hub data set, streamed in the hub's own order (`key` has no part in it)."""

    def __init__(self, repo: str, config: str | None, split: str, text_field: str = "text") -> None:
        self.name, self.text_field = "/".join(filter(None, (repo, config, split))), text_field
        self._data = load_hub(repo, config, split, streaming=True)

    def blocks(self, key: tuple[int, ...], position: Position, size: int) -> Iterator[Block]:
        """One pass from `position`: up to `size` documents each, and the position of the block's first document."""
        data = copy.deepcopy(self._data)  # each pass has a position of its own
        if position is not None:
            data.load_state_dict(position)
        texts = (get_text(record, self.text_field, self.name, _FIELD_HINT) for record in data)
        return _blocks(texts, data.state_dict, position, size)


def _blocks(texts: Iterator[str], now: Callable[[], Position], first: Position, size: int) -> Iterator[Block]:
    before, block = first, []
    for text in texts:
        block.append(text)
        if len(block) == size:
            yield block, before
            before, block = now(), []
    if block:
        yield block, before


def load_hub(repo: str, config: str | None, split: str, streaming: bool) -> Any:
    """`datasets.load_dataset`; every failure says that local files can be given instead.

    Raises:
        FileNotFoundError: the hub cannot be reached or has no such data set, configuration or split.
    """
    import datasets

    try:
        return datasets.load_dataset(repo, config, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises errors of many unrelated libraries; all mean the same here
        raise FileNotFoundError(
            f"data set '{repo}' (configuration {config}, split {split}) cannot be loaded from the hub: "
            f"{_first_line(error)}. Without network access pass local files: data.path=FILE_OR_FOLDER."
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

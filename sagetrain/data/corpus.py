"""Text in, token ids out: tokenizers, Python's standard library, what a record holds, data sets of the hub."""

from __future__ import annotations

import logging
import os
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only

say = rank_zero_only(logging.getLogger("sagetrain.data").warning)  # what the reader has to know, once, not per rank
TOGETHER = 1024, 2**22  # texts, and characters of them, that a tokenizer call gets: it takes 100 bytes a token
IDS = "input_ids", "tokens"  # fields of records that are tokenised already
_NOT_STDLIB = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


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
    return [np.asarray(ids, np.int32) for ids in tokenizer(list(texts), **plain)["input_ids"]] if texts else []


def frame(tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """What the tokenizer itself puts before a text (bos, or nothing), and eos; int32 `[0 or 1]` and `[1]`."""
    eos = np.array([tokenizer.eos_token_id], dtype=np.int32)
    before = [i for i in tokenizer("")["input_ids"] if i == tokenizer.bos_token_id][:1]
    return np.array(before, dtype=np.int32), eos


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


def contents(record: Mapping[str, Any], field: str, tokenizer: Any, where: str) -> Iterator[str | np.ndarray]:
    """The documents in a record that are not empty: its text, or its token ids (which `field` may hold too; without
    that field `input_ids` or `tokens`), cut after each eos.

    Raises:
        ValueError: neither, or ids that the tokenizer does not have; starts with `where`.
    """
    asked, field = field, next((name for name in (field, *IDS) if name in record), field)
    if field == asked and not isinstance(record.get(field), list | np.ndarray):
        hint = f"Set data.text_field= to the one that holds the text (token ids are read from {' or '.join(IDS)})."
        return filter(None, [get_text(record, field, where, hint)])
    try:
        ids = np.asarray(record[field])
    except ValueError:  # lists of several lengths
        ids = np.asarray(None)
    numbers = ids.ndim == 1 and (ids.dtype.kind in "iu" or not len(ids))
    if not numbers or len(ids) and not 0 <= ids.min() <= ids.max() < len(tokenizer):
        raise ValueError(
            f"{where}: field '{field}' must be a list of token ids from 0 to {len(tokenizer) - 1}, those of the "
            f"tokenizer '{tokenizer.name_or_path}'; give the tokenizer that made them (model.tokenizer=)"
        )
    return filter(len, np.split(ids, np.flatnonzero(ids[:-1] == tokenizer.eos_token_id) + 1))


def clean(text: str) -> str:
    return text if text.isascii() else text.encode(errors="replace").decode()


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


def fetched(records: Iterable[Any], name: str) -> Iterator[Any]:
    """The same records. Raises OSError, in one line, when the hub breaks off."""
    try:
        yield from records
    except Exception as error:  # as above
        raise OSError(
            f"data set '{name}' cannot be read to its end: {_first_line(error)}. Give the same command again: files "
            "that were tokenised whole are kept"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

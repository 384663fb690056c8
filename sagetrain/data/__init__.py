"""Data: streams of packed text for pre-training, prompt-and-answer examples for fine-tuning, with exact resume."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from sagetrain.data.corpus import ByteTokenizer, build_tokenizer
from sagetrain.data.loader import TextData
from sagetrain.data.pretrain import build_pretrain
from sagetrain.data.tasks import TASKS, build_task

__all__ = ["ByteTokenizer", "TextData", "build", "build_tokenizer"]

_ELSEWHERE = {"tokenizer", "batch_size", "seq_len"}  # may stand in the same group, but are read by the caller


def build(
    cfg: Mapping[str, Any], tokenizer: Any, seq_len: int, seed: int, batch_size: int = 1, needed: int | None = None
) -> TextData:
    """The data module that `cfg` describes.

    Args:
        cfg: `kind` (`pretrain`, or a task: gsm8k, mmlu, hellaswag, drop) and the arguments of `build_pretrain` or
            `build_task`.
        tokenizer: from `build_tokenizer`.
        seq_len: tokens in a packed row; the most tokens of a fine-tuning example. At least 8.
        seed: decides the order of the data, not what is held out. Not negative.
        batch_size: rows (examples) in a batch of one rank.
        needed: tokens that the run will read, if it is known: of a pre-training set on the hub no more are taken.

    Raises:
        ValueError: an unknown kind or key, a number out of range, data that is empty, broken or too little.
        FileNotFoundError: a file, or a data set on the hub, that is not there.
    """
    options = {str(key): _plain(cfg[key]) for key in cfg if key not in _ELSEWHERE}
    kind = options.pop("kind", None)
    if kind != "pretrain" and kind not in TASKS:
        raise ValueError(f"unknown data.kind {kind!r}; there are pretrain, {', '.join(TASKS)}")
    for name, value, least in ("seq_len", seq_len, 8), ("batch_size", batch_size, 1), ("seed", seed, 0):
        if type(value) is not int or value < least:
            raise ValueError(f"{name} must be an integer of at least {least}, not {value!r}")
    function, first = (build_pretrain, ()) if kind == "pretrain" else (build_task, (kind,))
    known = [p.name for p in inspect.signature(function).parameters.values() if p.default is not p.empty]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"unknown key data.{unknown[0]} for kind {kind}; there are {', '.join(known)}")
    more = {"needed": needed} if kind == "pretrain" else {}
    return TextData(function(*first, tokenizer, seq_len, seed, batch_size, **more, **options))


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else list(value)

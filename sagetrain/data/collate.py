"""From token arrays to batches that a Hugging Face causal language model takes.

Method: a packed row is a row of token ids with the offsets where a new segment (document) begins; everything else is
computed from these two: `position_ids` restart at each segment, `cu_seq_lens_*` are the same borders for kernels that
take them, and the label of a segment's first token is masked. Labels are *not* shifted (the model shifts them): the
label at t is predicted from t - 1, so masking a segment's first token is what keeps every target inside its document.
transformers' own `sdpa` and `flex_attention` read the borders from `position_ids`, all others from `cu_seq_lens_*`;
both see the same rows. `max_length_*` is the longest segment, not a rounded bound: kernels start a block for every 128
tokens of it and segment, and a compiler that has met two values takes the third as it comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

IGNORE = -100
Row = tuple[np.ndarray, Sequence[int]]  # token ids [T], offsets of the segments, the first of them 0
Example = tuple[np.ndarray, int]  # token ids [n], how many of them are prompt


def packed(rows: Sequence[Row], labels: np.ndarray | None = None, boundaries: bool = True) -> dict[str, Any]:
    """Rows of equal length T to a batch: input_ids, labels, position_ids int64 `[B, T]`; cu_seq_lens_q and
    cu_seq_lens_k int32 `[segments + 1]`, from 0 to B T over the rows laid end to end; max_length_q and max_length_k,
    ints. With `boundaries=False` input_ids and labels only: documents of a row then see each other.
    """
    ids = np.stack([row for row, _ in rows]).astype(np.int64)
    labels = (ids if labels is None else labels).copy()
    batch: dict[str, Any] = {"input_ids": torch.from_numpy(ids)}
    if boundaries:
        width = ids.shape[1]
        borders = [offset + i * width for i, (_, starts) in enumerate(rows) for offset in starts]
        starts, lengths = np.array(borders), np.diff([*borders, ids.size])
        labels.reshape(-1)[starts] = IGNORE
        positions = np.arange(ids.size) - np.repeat(starts, lengths)
        batch["position_ids"] = torch.from_numpy(positions.reshape(ids.shape))
        cu_seq_lens = torch.tensor([*borders, ids.size], dtype=torch.int32)
        batch |= {"cu_seq_lens_q": cu_seq_lens, "cu_seq_lens_k": cu_seq_lens}
        batch |= {"max_length_q": int(lengths.max()), "max_length_k": int(lengths.max())}
    return batch | {"labels": torch.from_numpy(labels)}


def padded(examples: Sequence[Example], pad_id: int) -> dict[str, torch.Tensor]:
    """Examples to input_ids, attention_mask, labels int64 `[B, longest]`, padded on the right; prompt and padding carry
    no label."""
    shape = len(examples), max(len(ids) for ids, _ in examples)
    input_ids, mask = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORE, dtype=np.int64)
    for i, (ids, prompt) in enumerate(examples):
        input_ids[i, : len(ids)] = ids
        mask[i, : len(ids)] = 1
        labels[i, prompt : len(ids)] = ids[prompt:]
    arrays = {"input_ids": input_ids, "attention_mask": mask, "labels": labels}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def packed_examples(rows: Sequence[Sequence[Example]], width: int, pad_id: int) -> dict[str, Any]:
    """Several examples per row of `width` tokens; what is left of a row is padding, a segment of its own without
    labels. The same format as `packed`."""
    tokens, labels = [], np.full((len(rows), width), IGNORE, dtype=np.int64)
    for i, examples in enumerate(rows):
        row, starts, at = np.full(width, pad_id, dtype=np.int64), [], 0
        for ids, prompt in examples:
            starts.append(at)
            row[at : at + len(ids)] = ids
            labels[i, at + prompt : at + len(ids)] = ids[prompt:]
            at += len(ids)
        tokens.append((row, starts + [at] * (at < width)))
    return packed(tokens, labels)


def flattened(examples: Sequence[Example]) -> dict[str, Any]:
    """Examples end to end in one row as long as all of them, so without padding. The same format as `packed`."""
    return packed_examples([examples], sum(len(ids) for ids, _ in examples), IGNORE)

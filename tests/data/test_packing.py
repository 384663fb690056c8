"""Packed rows: every token once, borders where documents begin, no target across a border, ranks share the rows out."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from sagetrain.data import ByteTokenizer, build
from sagetrain.data.collate import IGNORE
from sagetrain.data.corpus import stdlib_files
from sagetrain.data.files import read_records
from sagetrain.data.tables import unigram_entropy

TEXTS = st.lists(
    st.text(st.characters(codec="utf-8", max_codepoint=0x2FFF), min_size=1, max_size=60), min_size=1, max_size=30
)


def stream_of(texts, width, seed=0, size=1, **more):
    """Packed rows of a file of these documents."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {
            key: str(write(Path(folder, key + ".jsonl"), given)) for key, given in more.items() if key == "val_path"
        }
        cfg = {"kind": "pretrain", "path": str(write(Path(folder, "a.jsonl"), texts))} | more | paths
        return build(cfg, ByteTokenizer(), width, seed, size).stream


def write(path: Path, texts, field="text") -> Path:
    path.write_text("".join(json.dumps({field: t}) + "\n" for t in texts))
    return path


def take(batches, n):
    return [batch for batch, _ in zip(batches, range(n), strict=False)]


def equal(a, b) -> bool:
    same = lambda x, y: torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y  # noqa: E731
    return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(texts=TEXTS, width=st.integers(8, 64), size=st.integers(1, 3), seed=st.integers(0, 9))
def test_one_epoch_holds_every_token_once(texts, width, size, seed):
    total = sum(len(t.encode()) + 1 for t in texts)
    if total < width:
        with pytest.raises(ValueError, match="one row needs"):
            stream_of(texts, width, seed, size)
        return
    stream = stream_of(texts, width, seed, size)
    rows, used = [], total // width * width
    for batch, _ in stream.batches(stream.start, 0, 1):
        ids, labels, places = (batch[k] for k in ("input_ids", "labels", "position_ids"))
        assert ids.shape == labels.shape == places.shape == (size, width)
        begins = places == 0
        assert begins[:, 0].all() and torch.equal(labels == IGNORE, begins)
        assert torch.equal(labels[~begins], ids[~begins])
        assert ((places[:, 1:] == places[:, :-1] + 1) | begins[:, 1:]).all()
        after_eos = ids[:, :-1] == ByteTokenizer.eos_token_id
        assert torch.equal(begins[:, 1:], after_eos)  # a border stands where a document ended, and only there
        cu = batch["cu_seq_lens_q"]  # of the rows laid end to end
        assert cu.dtype == torch.int32 and cu.tolist() == [*begins.flatten().nonzero()[:, 0].tolist(), size * width]
        assert batch["cu_seq_lens_k"] is cu and type(batch["max_length_q"]) is int
        assert batch["max_length_q"] == batch["max_length_k"] == int(cu.diff().max())
        rows += ids.tolist()
        if len(rows) * width >= used:
            break
    laid = [row.tolist() for row, _ in stream.rows(0)]  # the rows of the first epoch as they lie in the documents
    assert sorted(rows[: len(laid)]) == sorted(laid) and len(laid) * width == used
    whole = sum(laid, [])
    ends = [i for i, token in enumerate(whole) if token == ByteTokenizer.eos_token_id]
    begins = [0, *(end + 1 for end in ends)]
    found = [bytes(whole[a:b]) for a, b in zip(begins, ends, strict=False)]
    left = Counter(t.encode() for t in texts)  # each document once; the last may be cut off with the epoch
    left.subtract(found)
    last = bytes(whole[begins[-1] :])
    assert min(left.values()) >= 0 and any(t.startswith(last) for t in left.elements()) == bool(left.total())
    assert sum(len(t) + 1 for t in left.elements()) - len(last) == total - used < width


@settings(max_examples=30, deadline=None)
@given(texts=TEXTS, width=st.integers(8, 40), ranks=st.integers(1, 4), seed=st.integers(0, 3))
def test_ranks_share_the_same_rows(texts, width, ranks, seed):
    if sum(len(t.encode()) + 1 for t in texts) < width:
        return
    stream = stream_of(texts, width, seed)
    alone = take((b["input_ids"] for b, _ in stream.batches(stream.start, 0, 1)), 3 * ranks)
    for rank in range(ranks):
        mine = take((b["input_ids"] for b, _ in stream.batches(stream.start, rank, ranks)), 3)
        assert torch.equal(torch.cat(mine), torch.cat(alone[rank::ranks]))


@settings(max_examples=40, deadline=None)
@given(texts=TEXTS, width=st.integers(8, 40), data=st.data())
def test_any_position_continues_the_stream(texts, width, data):
    if sum(len(t.encode()) + 1 for t in texts) < width:
        return
    stream = stream_of(texts, width, 1, data.draw(st.integers(1, 3)))
    run = take(stream.batches(stream.start, 0, 1), 9)
    cut = data.draw(st.integers(0, 7))
    again = take(stream.batches(json.loads(json.dumps(run[cut][1])), 0, 1), 8 - cut)
    assert all(equal(a, b) and p == q for (a, p), (b, q) in zip(again, run[cut + 1 :], strict=True))


def test_order_depends_on_seed_and_epoch_only(tmp_path):
    path = write(tmp_path / "a.jsonl", [f"document {i:03d}" for i in range(50)])

    def order(seed, rows):
        data = build({"kind": "pretrain", "path": str(path)}, ByteTokenizer(), 13, seed)
        return [bytes(b["input_ids"][0, :-1].tolist()) for b in take(data.train_dataloader(), rows)]

    first, second = order(0, 100)[:50], order(0, 100)[50:]
    assert first == order(0, 50) and sorted(first) == sorted(second) and first != second and first != sorted(first)
    assert order(1, 50) != first


def test_held_out_documents_are_never_trained_on(tmp_path):
    texts = [f"text number {i % 20:02d}." for i in range(60)]  # each three times
    cfg = {"kind": "pretrain", "path": str(write(tmp_path / "a.jsonl", texts)), "val_documents": 4}
    data = build(cfg, ByteTokenizer(), 16, 0)
    train = {bytes(b["input_ids"][0, :-1].tolist()) for b in take(data.train_dataloader(), 200)}
    held = {bytes(b["input_ids"][0, :-1].tolist()) for b in data.val_dataloader()}
    assert held and train and not held & train and held | train == {t.encode() for t in texts}
    again = build(cfg, ByteTokenizer(), 16, 7).val_dataloader()  # another seed, the same validation
    assert all(equal(a, b) for a, b in zip(data.val_dataloader(), again, strict=True))


def test_val_path_is_left_out_of_training(tmp_path):
    path, val = write(tmp_path / "a.jsonl", ["seen " * 9, "held " * 9]), write(tmp_path / "v.jsonl", ["held " * 9])
    data = build({"kind": "pretrain", "path": str(path), "val_path": str(val)}, ByteTokenizer(), 16, 0, 2)
    text = ByteTokenizer().decode(torch.cat([b["input_ids"] for b in take(data.train_dataloader(), 20)]).flatten())
    assert "seen" in text and "held" not in text
    (batch,) = data.val_dataloader()
    assert batch["input_ids"].shape == (2, 16) and batch["position_ids"][1, 0] == 0


def test_validation_rows_follow_the_rules_of_training_rows():
    stream = stream_of(["x" * 99], 8, 0, 2, val_path=["abc", "defghijklmnop", "q"] * 9)
    keys = "input_ids", "position_ids", "labels"
    rows = [row for b in stream.validation(0, 1) for row in zip(*(b[key] for key in keys), strict=True)]
    assert len(rows) == 9 * (4 + 14 + 2) // 8
    for ids, places, labels in rows:
        assert torch.equal(places[1:] == 0, ids[:-1] == 256) and torch.equal(labels == IGNORE, places == 0)
    shares = [torch.cat([b["input_ids"] for b in stream.validation(r, 3)]) for r in range(3)]
    assert torch.equal(torch.cat(shares), torch.stack([i for i, _, _ in rows]))  # 7, 7 and 8: none is left out
    for held_out in (stream.held_out[:5], stream.held_out[:1]):  # B=2: ranks with 1, 2 and 2 rows, or two with none
        stream.held_out = held_out
        ranks = [stream.validation(r, 3) for r in range(3)]
        assert len({len(batches) for batches in ranks}) == 1
        counted = [row for batches in ranks for b in batches if (b["labels"] != IGNORE).any() for row in b["input_ids"]]
        assert len(counted) == len(held_out)


def test_boundaries_off_gives_plain_rows():
    stream = stream_of(["ab", "cdefghij"] * 5, 8, document_boundaries=False)
    batch, _ = next(stream.batches(stream.start, 0, 1))
    assert batch.keys() == {"input_ids", "labels"} and torch.equal(batch["input_ids"], batch["labels"])


def test_stdlib_is_there_and_its_entropy_is_right():
    files = stdlib_files()
    names = {p.name for p in files}
    assert {"argparse.py", "tokenize.py", "decoder.py"} <= names and files == stdlib_files()
    assert not any({"test", "site-packages", "dist-packages"} & set(p.parts[-4:-1]) for p in files)
    text = "".join(record["text"] for file in files for _, record, _ in read_records(file)).encode(errors="replace")
    assert len(text) > 5_000_000
    p = np.bincount(np.frombuffer(text, np.uint8), minlength=256) / len(text)
    table = build({"kind": "pretrain"}, ByteTokenizer(), 64, 0).stream.rows(0).table
    assert unigram_entropy(table) == pytest.approx(-sum(x * np.log(x) for x in p if x))
    assert unigram_entropy(stream_of(["abab", "cdcd"], 8).rows(0).table) == pytest.approx(np.log(4))


def test_packed_rows_are_what_sdpa_takes(tmp_path):
    """A model reads a packed row as it reads each document alone."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=264)
    model = LlamaForCausalLM(LlamaConfig(**shape, attn_implementation="sdpa")).double().eval()
    texts = ["first document", "2nd", "and the third one"]
    stream = stream_of(texts, 37)
    batch, _ = next(stream.batches(stream.start, 0, 1))
    borders = batch["cu_seq_lens_q"].tolist()
    with torch.no_grad():
        got = model(**batch, use_cache=False)  # with a cache, transformers reads no borders from position_ids
        parts = [batch["input_ids"][:, a:b] for a, b in zip(borders, borders[1:], strict=False)]
        alone = [model(input_ids=part).logits for part in parts]
        losses = [cross_entropy(x[0, :-1], part[0, 1:], reduction="sum") for x, part in zip(alone, parts, strict=True)]
    torch.testing.assert_close(got.logits, torch.cat(alone, 1))
    targets = int((batch["labels"][:, 1:] != IGNORE).sum())
    assert targets == 37 - 3
    torch.testing.assert_close(got.loss.double(), sum(losses) / targets)

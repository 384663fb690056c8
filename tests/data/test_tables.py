"""Data too large for memory: kept on disk by `datasets`, the same rows, made once, one clear line when it cannot be."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import datasets
import pytest
import torch

from sagetrain.data import ByteTokenizer, build, files, pretrain, tables

CFG = {"pretrain": {"kind": "pretrain", "val_documents": 5}, "gsm8k": {"kind": "gsm8k", "val_fraction": 0.2}}


@pytest.fixture
def path(tmp_path, monkeypatch):
    """2,500 documents, more than one batch of records in Arrow; the cache is in the same folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with open(tmp_path / "x.jsonl", "w", encoding="utf-8") as file:
        for i in range(2500):
            text = f"document {i} " * (1 + i % 5)
            file.write(json.dumps({"text": text, "question": text, "answer": f"#### {i}"}) + "\n")
    return tmp_path / "x.jsonl"


def tensors(kind, path):
    data = build(CFG[kind] | {"path": str(path)}, ByteTokenizer(), 128, 3, 2)
    batches = [*(batch for batch, _ in zip(data.train_dataloader(), range(1500), strict=False)), *data.val_dataloader()]
    return data.state_dict()["data"], [batch["input_ids"] for batch in batches]


@pytest.mark.parametrize("kind", CFG)
def test_what_is_kept_on_disk_gives_the_same_rows(kind, path, monkeypatch):
    small = tensors(kind, path)
    assert not (path.parent / "cache").exists()
    monkeypatch.setattr(tables, "LARGE", 0)
    large = tensors(kind, path)
    monkeypatch.setattr(files, "json", None)  # nothing is read the second time
    again = tensors(kind, path)
    for name, batches in large, again:
        assert name == small[0] and all(torch.equal(a, b) for a, b in zip(batches, small[1], strict=True))
    path.write_text(path.read_text("utf-8").replace("document 7 ", "DOCUMENT 7 "), encoding="utf-8")
    with pytest.raises(AttributeError):  # the file has changed, hence it is read
        tensors(kind, path)


def test_an_error_names_the_line_and_leaves_nothing(path, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 0)
    good = path.read_text("utf-8")
    path.write_text(good + "{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.jsonl:2501: broken JSON line"):
        tensors("pretrain", path)
    path.write_text(good, encoding="utf-8")
    assert len(tensors("pretrain", path)[1]) > 1500


def test_a_cache_that_cannot_be_written(path, monkeypatch):
    monkeypatch.setattr(tables, "LARGE", 0)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "below a file")
    with pytest.raises(OSError, match="x.jsonl/below a file.*: set HF_DATASETS_CACHE=FOLDER"):
        tensors("pretrain", path)


def test_processes_at_once_make_one_table(path):
    code = (
        "import sys; from sagetrain.data import ByteTokenizer, build, tables; tables.LARGE = 0\n"
        "data = build({'kind': 'pretrain', 'path': sys.argv[1]}, ByteTokenizer(), 128, 0)\n"
        "print(next(iter(data.train_dataloader()))['input_ids'].tolist())"
    )
    env = os.environ | {"HF_DATASETS_CACHE": str(path.parent / "cache"), "HF_HUB_OFFLINE": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE, env=env) for _ in range(3)]
    said = {run.communicate()[0] for run in runs}
    assert len(said) == 1 and said.pop() and not any(run.returncode for run in runs)
    assert len(list(path.parent.rglob("*.arrow"))) == 1


def test_a_row_is_found_in_every_chunk():
    rows = list(pretrain.documents(ByteTokenizer(), ["a" * n for n in (3, 1, 9, 2)]))
    table = tables.Table.of(rows[:1]) + tables.Table.of(rows[1:3]) + tables.Table.of(rows[3:])
    assert [table[i].tolist() for i in range(4)] == [row["ids"].tolist() for row in rows]
    assert table.columns["digest"].tolist() == [row["digest"] for row in rows]

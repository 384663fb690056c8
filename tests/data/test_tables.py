"""Token tables: made once, whole or not there, of no more than is needed; one clear line when they cannot be made."""

from __future__ import annotations

import json
import re
import signal
import time

import datasets
import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from sagetrain.data import ByteTokenizer, build, corpus, files, pretrain, tables
from sagetrain.errors import is_bad_input
from tests.launch import Program

CFG = {"pretrain": {"kind": "pretrain", "val_documents": 5}, "gsm8k": {"kind": "gsm8k", "val_fraction": 0.2}}
TOK = ByteTokenizer()


@pytest.fixture
def path(tmp_path, monkeypatch):
    """2,500 documents, more than one batch of records in Arrow; the cache is in the same folder."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with open(tmp_path / "x.jsonl", "w", encoding="utf-8") as file:
        for i in range(2500):
            text = f"document {i} " * (1 + i % 5)
            file.write(json.dumps({"text": text, "question": text, "answer": f"#### {i}"}) + "\n")
    return tmp_path / "x.jsonl"


def tensors(kind, path, **more):
    data = build(CFG[kind] | {"path": str(path)} | more, TOK, 128, 3, 2)
    batches = [*(batch for batch, _ in zip(data.train_dataloader(), range(1500), strict=False)), *data.val_dataloader()]
    return data.state_dict()["data"], [batch["input_ids"] for batch in batches]


def texts(stream):
    """The documents that a stream trains on."""
    table, rows = stream.rows(0).table, stream.rows(0).order
    return [TOK.decode(table[i]) for i in sorted(rows)]


@pytest.mark.parametrize("kind", CFG)
def test_a_second_start_reads_no_text(kind, path, monkeypatch):
    first = tensors(kind, path)
    assert len(list(path.parent.rglob("*.arrow"))) == 1
    monkeypatch.setattr(files, "json", None)
    again = tensors(kind, path)
    assert again[0] == first[0] and all(torch.equal(a, b) for a, b in zip(again[1], first[1], strict=True))
    path.write_text(path.read_text("utf-8").replace("document 7 ", "DOCUMENT 7 "), encoding="utf-8")
    with pytest.raises(AttributeError):  # the file has changed, hence it is read
        tensors(kind, path)


@pytest.mark.parametrize("kind", CFG)
def test_an_error_names_the_line_and_leaves_nothing(kind, path):
    good = path.read_text("utf-8")
    path.write_text(good + "{\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.jsonl:2501: broken JSON line"):
        tensors(kind, path)
    path.write_text(good, encoding="utf-8")
    assert len(tensors(kind, path)[1]) > 800


def test_a_cache_that_cannot_be_written(path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path / "below a file")
    with pytest.raises(OSError, match="x.jsonl/below a file.*set HF_DATASETS_CACHE=FOLDER"):
        tensors("pretrain", path)


SLOWLY = """
import datasets, sys, time
from sagetrain.data import ByteTokenizer, build, pretrain, tables
datasets.config.HF_DATASETS_CACHE = sys.argv[1]
encode, pretrain.PART, pretrain.TOGETHER, tables.EVERY = pretrain.encode, 1, (100, 10**9), 0.2
pauses = iter([float(sys.argv[2])] * int(sys.argv[3]))
def slowly(tokenizer, texts):
    time.sleep(next(pauses, 600))
    print("encodes", len(texts), flush=True)
    return encode(tokenizer, texts)
pretrain.encode = slowly
data = build({'kind': 'pretrain', 'path': sys.argv[4:]}, ByteTokenizer(), 128, 0)
print("rows", next(iter(data.train_dataloader()))['input_ids'].tolist())
"""


def start(name, pause, path, *paths, stops=1000):
    """A process that tokenises with a pause before each call, and does not end the one after `stops` of them."""
    (folder := path.parent / name).mkdir()
    words = [path.parent / "cache", pause, stops, path, *paths]
    return Program(SLOWLY, *map(str, words), folder=folder)


@pytest.mark.slow
def test_processes_at_once_make_one_table(path):
    runs = [start(name, 0.02, path) for name in ("first", "second")]
    assert [run.ends() for run in runs] == [0, 0]
    said = [run.stdout.read_text().splitlines() for run in runs]
    assert len({lines[-1] for lines in said}) == 1 and said[0][-1].startswith("rows [[")
    assert sum("encodes 100" in lines for lines in said) == 1


@pytest.mark.slow
def test_what_was_killed_while_it_tokenised_goes_on(path, monkeypatch):
    """Two files, two tables: the first is whole when the kill comes, the second is begun again, and none is half."""
    second, calls = path.with_name("y.jsonl"), []
    second.write_text(path.read_text("utf-8").replace("document", "another"), encoding="utf-8")
    run = start("killed", 0.05, path, second, stops=38)
    while run.is_alive() and run.stdout.read_text().count("encodes") < 38:
        time.sleep(0.01)
    run.kill()
    assert run.ends() == -signal.SIGKILL and list(path.parent.rglob("*.incomplete/*.arrow"))
    speed = re.search(r"x\.jsonl,y\.jsonl: tokenised (\d+)%, [\d,]+ tokens/s, \d+ s left", run.stderr.read_text())
    assert speed and 0 < int(speed[1]) < 100  # no terminal: lines
    encode = lambda tokenizer, texts: calls.append(len(texts)) or corpus.encode(tokenizer, texts)  # noqa: E731
    monkeypatch.setattr(pretrain, "PART", 1)
    monkeypatch.setattr(pretrain, "encode", encode)
    want = [json.loads(line)["text"] for file in (path, second) for line in file.read_text("utf-8").splitlines()]
    for _ in range(2):
        assert texts(build({"kind": "pretrain", "path": [str(path), str(second)]}, TOK, 128, 0).stream) == want
        assert sum(calls) == 2500  # the second file alone, once


def test_a_row_is_found_in_every_chunk(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrain, "PART", 1)
    for i, lengths in enumerate([(3, 1), (9,), (2, 600)]):
        lines = "".join(json.dumps({"text": "abc"[i] * n}) + "\n" for n in lengths)
        (tmp_path / f"{i}.jsonl").write_text(lines, encoding="utf-8")
    stream = build({"kind": "pretrain", "path": str(tmp_path)}, TOK, 16, 0).stream
    table = stream.rows(0).table
    assert len(table.chunks) == 3 and [len(table[i]) for i in range(5)] == [4, 2, 10, 3, 601]
    assert texts(stream) == ["aaa", "a", "b" * 9, "cc", "c" * 600]


def test_progress_says_the_time_left(monkeypatch, capsys):
    """By a clock of the test: 120 tokens to take, 20 of which are there; 40 in 12 s, then 20 in 12 s."""
    now = [0.0]
    monkeypatch.setattr(tables.time, "monotonic", lambda: now[0])
    meter = tables.Meter("set", 120, 20)
    with meter:
        for tokens in 10, 30, 50:
            meter(tokens, 0)
            now[0] += 6
        now[0] += 6
        meter(70, 0)
    said = capsys.readouterr().err.splitlines()
    assert said == ["set: tokenised 58%, 3 tokens/s, 15 s left", "set: tokenised 75%, 2 tokens/s, 12 s left"]


IDS = [[1, 2, 256], [3, 256, 4, 5, 256], [256], [6, 7]]  # as records; eos is 256


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow", "npy"])
def test_token_ids_are_documents_as_they_are(form, tmp_path):
    column = {"jsonl": "tokens"}.get(form, "input_ids")
    if form == "jsonl":
        (tmp_path / "x.jsonl").write_text("".join(json.dumps({column: ids, "n": 1}) + "\n" for ids in IDS))
    elif form == "parquet":
        parquet.write_table(pyarrow.table({column: IDS}), tmp_path / "x.parquet")
    elif form == "arrow":
        datasets.Dataset.from_dict({column: IDS}).save_to_disk(tmp_path)
    else:
        np.save(tmp_path / "x.npy", np.array(sum(IDS, []), np.uint16))
    stream = build({"kind": "pretrain", "path": str(tmp_path)}, TOK, 8, 0).stream
    table = stream.rows(0).table
    assert [table[i].tolist() for i in range(len(table))] == [[1, 2, 256], [3, 256], [4, 5, 256], [256], [6, 7]]
    batch, _ = next(stream.batches(stream.start, 0, 1))
    assert batch["input_ids"].dtype == torch.int64


@pytest.mark.parametrize("ids", [[1, 264], [-1], [1.5], [[1], [2]], ["a"], 7])
def test_token_ids_that_the_tokenizer_does_not_have(ids, tmp_path):
    lines = [{"input_ids": [1, 2]}, {"input_ids": ids}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = "field 'input_ids' must be a list of token ids from 0 to 263, those of the tokenizer 'byte'"
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: {said}"):
        build({"kind": "pretrain", "path": str(tmp_path / "x.jsonl")}, TOK, 8, 0)


def test_arrays_that_are_no_tokens(tmp_path):
    for array, said in (np.ones((2, 2), np.int64), "must be a list"), (np.ones(3), "must be a list"):
        np.save(tmp_path / "x.npy", array)
        with pytest.raises(ValueError, match=rf"x\.npy:1: field 'input_ids' {said}"):
            build({"kind": "pretrain", "path": str(tmp_path / "x.npy")}, TOK, 8, 0)
    (tmp_path / "x.npy").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x\.npy:1: .*not readable as npy"):
        build({"kind": "pretrain", "path": str(tmp_path / "x.npy")}, TOK, 8, 0)
    (tmp_path / "x.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"x\.bin' is or holds no data of a known format; supported: .*\.npy"):
        build({"kind": "pretrain", "path": str(tmp_path / "x.bin")}, TOK, 8, 0)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The real streaming of `datasets`, from three parquet files in place of the hub; counts what is asked for."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    table = datasets.Dataset.from_dict({"text": [f"row {i:03d}" for i in range(300)], "id": list(range(300))})
    paths = [str(tmp_path / f"x{i}.parquet") for i in range(3)]
    for i, file in enumerate(paths):
        table.shard(3, i, contiguous=True).to_parquet(file, batch_size=40)
    load, calls = datasets.load_dataset, []

    def fake(repo, config, split, streaming):
        calls.append((repo, config, split, streaming))
        return load("parquet", data_files=paths, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", fake)
    return calls


HUB = {"kind": "pretrain", "source": "some/set", "name": "sample"}


def test_of_a_hub_data_set_only_what_the_run_needs_is_taken(hub):
    stream = build(HUB | {"val_documents": 5}, TOK, 16, 0, needed=400).stream
    assert hub == [("some/set", "sample", "train", True)]
    got = texts(stream)
    first = int(got[0][-3:]) // 100
    assert len(got) == -(-(400 + 5 * 8) // 8) - (5 if first == 0 else 0)  # rows of 8 tokens; of one file
    assert got == [f"row {i:03d}" for i in range(100 * first, 100 * first + 55)][5 if first == 0 else 0 :]
    assert stream.facts["asked"] == 400 and stream.facts["tokens"] >= 400
    held = "".join(TOK.decode(ids) for ids, _ in stream.held_out)  # the first five documents, in another order
    assert {held[i : i + 7] for i in range(0, len(held), 7)} < {f"row {i:03d}" for i in range(5)}
    hub.clear()
    again = build(HUB | {"val_documents": 5}, TOK, 16, 0, needed=400).stream
    assert texts(again) == got and not hub  # found in the cache, without a word to the hub
    other_seed = build(HUB | {"val_documents": 5}, TOK, 16, 1, needed=400).stream
    assert not hub and texts(other_seed) == got and (other_seed._order(0) != again._order(0)).any()
    more = texts(build(HUB | {"val_documents": 5}, TOK, 16, 0, needed=1600).stream)
    assert hub and set(got) < set(more) and 200 <= len(more) <= 210


def test_all_of_a_hub_data_set_that_is_too_small(hub):
    data = build(HUB, TOK, 16, 0, needed=10**6)
    assert sorted(texts(data.stream)) == [f"row {i:03d}" for i in range(300)]
    got = [TOK.decode(b["input_ids"][0]) for b, _ in zip(data.train_dataloader(), range(300), strict=False)]
    assert sorted(got[:150]) == sorted(set(got[:150])) and sorted(got[:150]) != sorted(got[150:])  # a second epoch
    assert build(HUB | {"tokens": 80}, TOK, 16, 0, needed=10**6).stream.facts["tokens"] == 80


def test_a_hub_that_breaks_off_costs_one_file(hub, monkeypatch):
    """Files of 100 rows, 800 tokens: it breaks off after 150 rows, and the first file need not be fetched again."""
    iterate, rows = datasets.IterableDataset.__iter__, []

    def broken(data):
        for record in iterate(data):
            if len(rows) == 150:
                raise ConnectionError("reset by peer\nat length")
            rows.append(record)
            yield record

    monkeypatch.setattr(datasets.IterableDataset, "__iter__", broken)
    with pytest.raises(OSError, match="'some/set' cannot be read to its end: reset by peer. Give the same") as error:
        build(HUB, TOK, 16, 0, needed=10**6)
    assert is_bad_input(error.value)
    monkeypatch.setattr(datasets.IterableDataset, "__iter__", lambda data: rows.append(0) or iterate(data))
    assert len(texts(build(HUB, TOK, 16, 0, needed=10**6).stream)) == 300 and len(rows) == 152  # of two files


def test_local_files_are_read_whole_unless_tokens_are_given(path, monkeypatch):
    want = [json.loads(line)["text"] for line in path.read_text("utf-8").splitlines()]
    assert texts(build({"kind": "pretrain", "path": str(path)}, TOK, 128, 0, needed=256).stream) == want
    assert (
        texts(build({"kind": "pretrain", "path": str(path), "tokens": 256}, TOK, 128, 0).stream) == want[:9]
    )  # 239 tokens, and the document that makes it 284

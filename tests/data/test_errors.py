"""Bad input says what is wrong and where, before training where it can be known."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import lzma

import pyarrow
import pytest
from omegaconf import OmegaConf
from pyarrow import parquet

from sagetrain.data import ByteTokenizer, build, build_tokenizer
from sagetrain.data.corpus import encode
from sagetrain.data.files import find

TOK = ByteTokenizer()
GOOD = json.dumps({"text": "some text that is long enough", "id": 1}) + "\n"
OPEN = {"": open, ".xz": lzma.open, ".gz": gzip.open, ".zst": lambda path, mode, encoding: zst(path)}


@contextlib.contextmanager
def zst(path):
    with pyarrow.output_stream(path, compression="zstd") as file, io.TextIOWrapper(file, "utf-8") as text:
        yield text


def pretrain(path, seq_len=16, **cfg):
    data = build({"kind": "pretrain", "path": path if isinstance(path, list) else str(path)} | cfg, TOK, seq_len, 0)
    return next(iter(data.train_dataloader()))


@pytest.mark.parametrize("end", OPEN)
def test_broken_json_names_file_and_line(end, tmp_path):
    path = tmp_path / f"x.jsonl{end}"
    with OPEN[end](path, "wt", encoding="utf-8") as f:
        f.write(GOOD + "\n" + GOOD + '{"text": "cut o\n' + GOOD)
    with pytest.raises(ValueError, match=rf"x\.jsonl{end}:4: broken JSON line"):
        pretrain(path)
    with pytest.raises(ValueError, match=rf"x\.jsonl{end}:4: broken JSON line"):  # found when it is built
        build({"kind": "pretrain", "path": str(path)}, TOK, 64, 0)
    with OPEN[end](path, "wt", encoding="utf-8") as f:
        f.write('{"question": "?", "answer": "!"}\n[1]\n')
    with pytest.raises(ValueError, match=rf"x\.jsonl{end}:2: each line must be a JSON object, this one is a list"):
        build({"kind": "gsm8k", "path": str(path)}, TOK, 64, 0)


@pytest.mark.parametrize("end", [".xz", ".gz", ".zst"])
def test_cut_off_file_names_file_and_line(end, tmp_path):
    path = tmp_path / f"x.jsonl{end}"
    with OPEN[end](path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": f"{i * 7919 % 10007}" * 9}) + "\n" for i in range(2000))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"x\.jsonl{end}:\d+: .*(damaged|cut off)"):
        pretrain(path, seq_len=10**6)
    path.write_bytes(b"this is no compressed file")
    with pytest.raises(ValueError, match=rf"x\.jsonl{end}:1: .*(damaged|cut off)"):
        pretrain(path)


def test_not_utf8(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"caf\xe9" * 20)
    with pytest.raises(ValueError, match=r"x\.txt:1: not UTF-8 text .* byte 0xe9"):
        pretrain(tmp_path / "x.txt")
    (tmp_path / "x.jsonl").write_bytes(GOOD.encode() + b'{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl:2: broken JSON line"):
        pretrain(tmp_path / "x.jsonl", seq_len=64)
    (tmp_path / "x.parquet").write_bytes(b"not a table")
    with pytest.raises(ValueError, match=r"x\.parquet:1: .*not readable as parquet"):
        pretrain(tmp_path / "x.parquet")
    table = pyarrow.table({"text": [f"{i * 7919 % 10007} words" for i in range(4000)]})
    parquet.write_table(table, tmp_path / "x.parquet")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    content[200:4000] = bytes(3800)
    (tmp_path / "x.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet:\d+: .*not readable as parquet"):
        pretrain(tmp_path / "x.parquet", seq_len=10**6)


def test_missing_files_and_formats(tmp_path):
    for path in (tmp_path / "nothing.jsonl", tmp_path / "*.jsonl", [str(tmp_path / "gone.txt")]):
        name = path[0] if isinstance(path, list) else str(path)
        with pytest.raises(FileNotFoundError) as error:
            pretrain(path)
        assert name in str(error.value) and "does not exist" in str(error.value)
    with pytest.raises(ValueError, match="holds no data of a known format"):
        pretrain(tmp_path)
    (tmp_path / "x.csv").write_text("a,b", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.csv' is or holds no data of a known format; supported: \.jsonl"):
        pretrain(tmp_path / "x.csv")
    with pytest.raises(ValueError, match="empty list"):
        pretrain([])
    for entry in ("", 5, True):
        with pytest.raises(ValueError, match=f"data.path holds {entry!r}, which names no file"):
            find(entry)
        with pytest.raises(ValueError, match=f"data.path holds {entry!r}, which names no file"):
            find([entry])


def test_empty_and_too_little(tmp_path):
    (tmp_path / "x.jsonl").write_text("\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'x.jsonl' is empty"):
        pretrain(tmp_path / "x.jsonl")
    with pytest.raises(ValueError, match="is empty"):
        build({"kind": "gsm8k", "path": str(tmp_path / "x.jsonl")}, TOK, 64, 0)
    with pytest.raises(ValueError, match="'x.jsonl' is empty"):
        pretrain(tmp_path / "x.jsonl", val_documents=3)
    (tmp_path / "x.jsonl").write_text(GOOD * 3, encoding="utf-8")
    with pytest.raises(ValueError, match=r"holds 90 tokens in 3 document\(s\) .* one row needs 91"):
        pretrain(tmp_path / "x.jsonl", seq_len=91)
    assert pretrain(tmp_path / "x.jsonl", seq_len=90)["input_ids"].shape == (1, 90)
    with pytest.raises(ValueError, match=r"holds 0 tokens in 0 document\(s\) after 1 held out"):
        pretrain(tmp_path / "x.jsonl", val_documents=1)  # all three are the same document
    (tmp_path / "y.jsonl").write_text('{"text": "another"}\n' * 9, encoding="utf-8")
    with pytest.raises(ValueError, match="1 validation documents do not fill one row of 16 tokens"):
        pretrain(tmp_path / "x.jsonl", val_path=str(tmp_path / "y.jsonl"), val_documents=1)


@pytest.mark.parametrize("ids", [[[1, 2], [3]], "text", None, 5, [1, "2"]])
def test_token_ids_that_are_no_list_of_numbers(ids, tmp_path):
    good = {"input_ids": list(range(64))}
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(good)}\n{json.dumps({'input_ids': ids})}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.jsonl:2: field 'input_ids' must be a list of token ids from 0 to 263"):
        pretrain(tmp_path / "x.jsonl")


def test_missing_field_lists_the_fields(tmp_path):
    (tmp_path / "x.jsonl").write_text(GOOD, encoding="utf-8")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: no field 'content'; the fields are text, id\. Set data\.text_f"):
        pretrain(tmp_path / "x.jsonl", text_field="content")
    with pytest.raises(ValueError, match=r"x\.jsonl:1: field 'id' is int, a string is needed"):
        pretrain(tmp_path / "x.jsonl", text_field="id")
    for kind, field in ("gsm8k", "question"), ("mmlu", "question"), ("hellaswag", "ctx"), ("drop", "passage"):
        with pytest.raises(ValueError, match=rf"x\.jsonl:1: no field '{field}'; the fields are text, id"):
            build({"kind": kind, "path": str(tmp_path / "x.jsonl")}, TOK, 64, 0)


@pytest.mark.parametrize("kind, change, message", [
    ("mmlu", {"answer": 4}, "field 'answer' must be 0 to 3, not '4'"),
    ("mmlu", {"choices": "abcd"}, "field 'choices' must be a non-empty list"),
    ("hellaswag", {"label": ""}, "field 'label' must be 0 to 1, not ''"),
    ("drop", {"answers": []}, "field 'answers' must be a non-empty list"),
    ("drop", {"answers": [["a", "b"]]}, r"field 'answers' must hold texts, one of it is \['a', 'b'\]"),
    ("drop", {"answers": [" "]}, "the answer is empty"),
    ("gsm8k", {"answer": ""}, "the answer is empty"),
    ("hellaswag", {"label": "²"}, "field 'label' must be 0 to"),
    ("drop", {"answers_spans": {}}, "no field 'answers', 'answers_spans' or 'answer'"),
])  # fmt: skip
def test_broken_task_records(kind, change, message, tmp_path):
    record = {
        "mmlu": {"question": "?", "subject": "s", "choices": list("abcd"), "answer": 0},
        "hellaswag": {"activity_label": "a", "ctx": "c", "endings": ["x", "y"], "label": 0},
        "drop": {"passage": "p", "question": "q"},
        "gsm8k": {"question": "q"},
    }[kind]
    (tmp_path / "x.jsonl").write_text(json.dumps(record | change) + "\n", encoding="utf-8")
    if message.startswith("no field"):
        record.pop("answers", None)
        (tmp_path / "x.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"x.jsonl:1: {message}"):
        build({"kind": kind, "path": str(tmp_path / "x.jsonl")}, TOK, 64, 0)


def test_options(tmp_path):
    (tmp_path / "x.jsonl").write_text(GOOD, encoding="utf-8")
    good = {"kind": "pretrain", "path": str(tmp_path / "x.jsonl")}
    for change, message in (
        ({"kind": "squad"}, "unknown data.kind 'squad'; there are pretrain, gsm8k, mmlu, hellaswag, drop"),
        ({"kind": None}, "unknown data.kind None"),
        ({"shufle_buffer": 3}, "unknown key data.shufle_buffer for kind pretrain; there are source, name, path"),
        ({"tokens": 0}, "data.tokens must be an integer of at least 16, not 0"),
        ({"path": None, "source": "some/set"}, "data.tokens: say how many tokens to take of a hub data set"),
        ({"document_boundaries": "maybe"}, "data.document_boundaries must be true or false, not 'maybe'"),
        ({"val_documents": -1}, "data.val_documents must be an integer of at least 0, not -1"),
        ({"val_documents": True}, "data.val_documents must be an integer of at least 0, not True"),
        ({"path": None, "source": None}, "set data.source= .* or data.path="),
        ({"kind": "gsm8k", "val_fraction": 1.0}, r"data.val_fraction must be in \[0, 1\)"),
        ({"kind": "gsm8k", "max_examples": 0}, "data.max_examples must be an integer of at least 1, not 0"),
        ({"kind": "gsm8k", "max_examples": True}, "data.max_examples must be an integer of at least 1, not True"),
    ):
        with pytest.raises(ValueError, match=message):
            build(good | change, TOK, 16, 0)
    for arguments, message in (
        ((7, 0), "seq_len must be an integer of at least 8, not 7"),
        ((16, -1), "seed must be an integer of at least 0"),
        ((16, 0, 0), "batch_size must be an integer of at least 1"),
        ((16, 0, True), "batch_size must be an integer of at least 1, not True"),
    ):
        with pytest.raises(ValueError, match=message):
            build(good, TOK, *arguments)


def test_hub_out_of_reach_says_to_pass_local_files(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    for cfg in {"kind": "pretrain", "source": "some/set", "name": "s", "tokens": 99}, {"kind": "mmlu"}:
        with pytest.raises(FileNotFoundError, match="cannot be loaded from the hub.*pass local files: data.path="):
            build(cfg, TOK, 16, 0)


def test_tokenizers(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at '.*nowhere'.*or 'byte'"):
        build_tokenizer(str(tmp_path / "nowhere"))
    text = "Zürich, 東京 and \x00\n"
    ids = TOK.encode(text)
    assert TOK.decode([*ids, TOK.eos_token_id, TOK.pad_token_id]) == text and max(ids) < 256 < len(TOK)
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "some": 3, "text": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path / "words")
    tokenizer = build_tokenizer(str(tmp_path / "words"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    (tmp_path / "x.jsonl").write_text(GOOD * 9, encoding="utf-8")
    data = build({"kind": "pretrain", "path": str(tmp_path / "x.jsonl")}, tokenizer, 14, 0)
    assert next(iter(data.train_dataloader()))["input_ids"].tolist() == [[3, 4, 2, 2, 2, 2, 1] * 2]
    (ids,) = encode(tokenizer, ["some </s> text"])
    assert tokenizer.eos_token_id not in ids and [ids[0], ids[-1]] == [3, 4]  # text cannot spell the end of a document
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "endless")
    with pytest.raises(ValueError, match="has no end-of-sequence token"):
        build_tokenizer(str(tmp_path / "endless"))


def test_odd_but_right_files(tmp_path):
    """Empty documents and blank lines are passed over, lone surrogates replaced, all formats read the same text."""
    text = "größe " * 8
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.jsonl").write_text(
        json.dumps({"text": ""}) + "\n\n" + json.dumps({"text": text}) + "\n", encoding="utf-8"
    )
    (tmp_path / "a/x.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a/x.py").write_bytes(b"# coding: latin-1\n# gr\xf6\xdfe\n")
    with lzma.open(tmp_path / "a/x.txt.xz", "wt", encoding="utf-8") as f:
        f.write(text)
    with zst(tmp_path / "a/x.txt.zst") as f:
        f.write(text)
    table = pyarrow.table({"id": range(2), "text": ["", text]})
    parquet.write_table(table, tmp_path / "a/x.parquet")
    for name in "x.jsonl", "x.txt", "x.txt.xz", "x.txt.zst", "x.parquet":
        assert TOK.decode(pretrain(tmp_path / "a" / name, seq_len=65)["input_ids"][0]) == text
    assert TOK.decode(pretrain(tmp_path / "a/x.py", seq_len=29)["input_ids"][0]) == "# coding: latin-1\n# größe\n"
    (tmp_path / "y.jsonl").write_text('{"text": "lone \\ud800 surrogate"}\n', encoding="utf-8")
    assert TOK.decode(pretrain(tmp_path / "y.jsonl")["input_ids"][0]) == "lone ? surrogate"[:16]
    cfg = OmegaConf.create(
        {"kind": "pretrain", "path": [str(tmp_path / "a"), str(tmp_path / "y.js*")], "val_path": None}
    )  # as Hydra gives it: a folder (of which the tables are data) and a glob
    assert build(cfg, TOK, 8, 0).stream.name.startswith("x.jsonl,x.parquet,y.jsonl, ")
    for name, text in ("bom.txt", "one\r\ntwo\n"), ("bom.jsonl", '{"text": "one\\ntwo\\n"}\r\n\r\n'):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())  # as Windows programs write them
        assert TOK.decode(pretrain(tmp_path / name, seq_len=9)["input_ids"][0]) == "one\ntwo\n"

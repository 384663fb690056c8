"""Which files of a folder are read: splits by their names, nothing that is no data, and a word about it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from sagetrain.__main__ import compose
from sagetrain.data import ByteTokenizer, build
from sagetrain.data.files import find, find_validation
from sagetrain.training.train import run
from tests.tiny import MODEL

TOK = ByteTokenizer()


def fill(folder: Path, *names: str) -> Path:
    """Files with one record each, which tells the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        record = {"text": f"text of {name} ", "question": f"from {name}?", "answer": "#### 1"}
        path.write_text(json.dumps(record) + "\n" if ".jsonl" in name else f"text of {name} ", encoding="utf-8")
    return folder


def names(files: list[Path], root: Path) -> list[str]:
    return [str(p.relative_to(root)) for p in files]


@pytest.mark.parametrize("inside, chosen, validation, left_out", [
    (["train.jsonl", "test.jsonl", "README.txt"], ["train.jsonl"], [], ["README.txt", "test.jsonl"]),
    (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/validation-00000-of-00001.jsonl",
      "data/test-00000-of-00001.jsonl"], ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
     ["data/validation-00000-of-00001.jsonl"], ["data/test-00000-of-00001.jsonl"]),
    (["train/a.jsonl", "dev/a.jsonl", "test/train.jsonl"], ["train/a.jsonl"], ["dev/a.jsonl"], ["test/train.jsonl"]),
    (["a.jsonl", "b.jsonl", "my_test.jsonl", "val.jsonl"], ["a.jsonl", "b.jsonl"], ["val.jsonl"], ["my_test.jsonl"]),
    (["a.jsonl", "train.jsonl"], ["train.jsonl"], [], ["a.jsonl"]),
    (["gsm8k-train.jsonl", "gsm8k-test.jsonl", "gsm8k-eval 2.jsonl"], ["gsm8k-train.jsonl"], [],
     ["gsm8k-eval 2.jsonl", "gsm8k-test.jsonl"]),
    # words inside of others are no splits
    (["devices.jsonl", "latest.jsonl", "pretrain.jsonl"], ["devices.jsonl", "latest.jsonl", "pretrain.jsonl"], [], []),
    # text is data where there is no table, but not what describes the data; a loading script is none
    (["a.jsonl", "a.py", "notes.txt", "LICENSE.txt"], ["a.jsonl"], [], ["LICENSE.txt", "a.py", "notes.txt"]),
    (["wiki-train.txt", "wiki-valid.txt", "wiki-test.txt", "README.txt"], ["wiki-train.txt"], ["wiki-valid.txt"],
     ["README.txt", "wiki-test.txt"]),
    (["b.txt", "licence.txt"], ["b.txt"], [], ["licence.txt"]),
    (["README.txt"], ["README.txt"], [], []),
    (["train.py", "tests/test_train.py", "model.py"], ["model.py", "tests/test_train.py", "train.py"], [], []),
    ([".cache/x.jsonl", "__pycache__/x.py", "._a.jsonl", "a.jsonl"], ["a.jsonl"], [], []),
])  # fmt: skip
def test_splits_of_a_folder(inside, chosen, validation, left_out, tmp_path):
    found = find(fill(tmp_path / "test", *inside))  # the name of the folder itself says nothing
    got = (names(files, tmp_path / "test") for files in (found.chosen, found.validation, found.left_out))
    assert tuple(got) == (chosen, validation, left_out)


def test_what_is_named_is_read(tmp_path):
    fill(tmp_path, "train.jsonl", "test.jsonl", "test-2.jsonl", "only/test.jsonl", "both/test.jsonl", "both/val.jsonl")
    assert find(tmp_path / "test.jsonl").chosen == [tmp_path / "test.jsonl"]
    assert names(find(str(tmp_path / "test*.jsonl")).chosen, tmp_path) == ["test-2.jsonl", "test.jsonl"]
    listed = find([tmp_path / "test.jsonl", tmp_path / "*.jsonl", tmp_path / "test.jsonl"])
    assert names(listed.chosen, tmp_path) == ["test.jsonl", "train.jsonl"]  # the glob leaves tests out; nothing twice
    assert names(listed.left_out, tmp_path) == ["test-2.jsonl"]
    with pytest.raises(ValueError, match=r"only' holds no train split, only test \(test.jsonl\); to read these"):
        find(tmp_path / "only")
    with pytest.raises(ValueError, match=r"only test \(test.jsonl\), validation \(val.jsonl\)"):
        find(tmp_path / "both")
    assert names(find_validation(tmp_path / "both", None), tmp_path) == ["both/val.jsonl"]
    with pytest.raises(ValueError, match="holds no validation split, only test"):
        find_validation(tmp_path / "only", None)


def test_paths_with_a_tilde_or_brackets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fill(tmp_path / "set [v1]", "a.jsonl", "x[1].jsonl")
    for path in ("~/set [v1]/a.jsonl", "~/set [v1]/a*.jsonl", str(tmp_path / "set [v1]" / "[a]*")):
        assert find(path).chosen == [tmp_path / "set [v1]" / "a.jsonl"]
    assert find("~/set [v1]/x[1].jsonl").chosen == [tmp_path / "set [v1]" / "x[1].jsonl"]
    assert len(find("~/set [v1]").chosen) == 2


@pytest.mark.parametrize("kind", ["gsm8k", "pretrain"])
def test_a_folder_trains_and_validates_on_its_own_splits_and_says_so(kind, tmp_path, caplog):
    fill(tmp_path, "train.jsonl", "validation.jsonl", "test.jsonl", "README.txt")
    with caplog.at_level(logging.WARNING):
        data = build({"kind": kind, "path": str(tmp_path)}, TOK, 64 if kind == "gsm8k" else 16, 0)
    for loader, name in (data.train_dataloader(), "train"), (data.val_dataloader(), "validation"):
        text = TOK.decode(next(iter(loader))["input_ids"][0])
        assert f"{'from' if kind == 'gsm8k' else 'text of'} {name}"[:16] in text
    said = "reads train.jsonl; validates on validation.jsonl; leaves out README.txt, test.jsonl"
    assert f"data.path={tmp_path}: {said}" in caplog.text and data.stream.facts["files"] == said


def test_the_record_of_a_run_says_what_was_read(tmp_path):
    fill(tmp_path / "set", "train-1.jsonl", "train-2.jsonl", "test.jsonl")
    cfg = compose(["recipe=gsm8k_finetune", "model=quickstart", *MODEL, f"data.path={tmp_path / 'set'}",
                   "data.seq_len=46", "data.too_long=skip", "data.val_fraction=0", "trainer.accelerator=cpu",
                   "data.batch_size=1", "attention=bf16", "trainer.precision=32-true", "trainer.max_steps=1",
                   "trainer.enable_progress_bar=false", f"out={tmp_path / 'out'}"])  # fmt: skip
    (tmp_path / "set" / "train-1.jsonl").write_text('{"question": "a longer question than fits", "answer": "1"}\n' * 3)
    with (tmp_path / "set" / "train-2.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"question": f"why {i}?", "answer": "1"}) + "\n" for i in range(4))
    (out,) = run(cfg)
    assert json.loads((out / "run.json").read_text("utf-8"))["data"] == {
        "examples": 5, "validation examples": "0", "skipped as too long": 3,
        "files": "reads train-1.jsonl, train-2.jsonl; leaves out test.jsonl", "chat_template": False}  # fmt: skip

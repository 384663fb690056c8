"""Fine-tuning examples: both layouts give the same text, the loss is on the answer, nothing of the answer is cut."""

from __future__ import annotations

import json
import logging
import lzma
from pathlib import Path

import pytest
import torch

from sagetrain.data import ByteTokenizer, build, build_tokenizer
from sagetrain.data.collate import IGNORE
from sagetrain.data.tasks import TASKS
from tests.tiny import TEMPLATES, THINKS, pretrained

SHARED = Path(__file__).parents[3] / "shared" / "data"
TOK = ByteTokenizer()
HUB = {
    "gsm8k": {"question": "How many?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"},
    "mmlu": {"question": " Which? ", "subject": "high_school_physics", "choices": ["w", "x", "y", "z"], "answer": 2},
    "hellaswag": {"ind": 1, "activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he",
                  "ctx": "A man cooks. he", "endings": ["runs.", "stirs [substeps] it."], "label": "1"},
    "drop": {"section_id": "n", "query_id": "q", "passage": "A beat B and C.", "question": "Who lost?",
             "answers_spans": {"spans": ["B", "C"], "types": ["span", "span"]}},
}  # fmt: skip
LOCAL = {
    "gsm8k": HUB["gsm8k"],
    "mmlu": HUB["mmlu"],
    "hellaswag": {"activity_label": "Cooking", "ctx": "A man cooks. he", "endings": ["runs.", "stirs it."], "label": 1},
    "drop": {"passage": "A beat B and C.", "question": "Who lost?", "answers": ["B and C", "C and B"]},
}
TEXT = {
    "gsm8k": ("Question: How many?\nAnswer:", " 1 + 1 = <<1+1=2>>2\n#### 2"),
    "mmlu": (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Which?\nA. w\nB. x\nC. y\nD. z\nAnswer:",
        " C",
    ),
    "hellaswag": ("Cooking: A man cooks. He", " stirs it."),
    "drop": ("A beat B and C. Who lost?", " B and C"),
}


def write(path: Path, records) -> str:
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "wt", encoding="utf-8") as f:
        f.writelines(json.dumps(record) + "\n" for record in records)
    return str(path)


def first(cfg, tokenizer=TOK, seq_len=400, **kwargs):
    return next(iter(build({"val_fraction": 0} | cfg, tokenizer, seq_len, 0, **kwargs).train_dataloader()))


def examples(stream, rows):
    """(token ids, how many of them are prompt) of each example of some rows that are padded."""
    batches = [stream.collate([row]) for row in rows]
    return [(b["input_ids"][0], int((b["labels"][0] == IGNORE).sum())) for b in batches]


def questions(count: int, start: int = 0):
    return [{"question": f"q{i}" * (1 + i % 5), "answer": f"#### {i}"} for i in range(start, start + count)]


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("layout", [HUB, LOCAL], ids=["hub", "local"])
def test_prompt_and_answer(kind, layout, tmp_path):
    batch = first({"kind": kind, "path": write(tmp_path / "x.jsonl.xz", [layout[kind]])})
    ids, labels, (prompt, answer) = batch["input_ids"][0], batch["labels"][0], TEXT[kind]
    assert TOK.decode(ids) == prompt + answer and ids[-1] == TOK.eos_token_id
    assert torch.equal(labels == IGNORE, torch.arange(len(ids)) < len(prompt))
    assert torch.equal(labels[labels >= 0], ids[len(prompt) :])


@pytest.mark.parametrize("record, prompt, answer", [
    # a WikiHow scene: markup out, a title ends a sentence, no ctx_b
    ({"activity_label": "Pets", "ctx_a": "[header] How to wash a cat [title] Fill a tub. [step] Use warm water.",
      "ctx_b": "", "ctx": "unused", "endings": ["Dry it [title] Use a towel. [step] Be quick.", "no"], "label": "0"},
     "Pets: How to wash a cat. Fill a tub. Use warm water.", " Dry it. Use a towel. Be quick."),
    # markup at the ends leaves its space
    ({"activity_label": "Pets", "ctx": "Wash it. [substeps]", "endings": ["[substeps] Dry it.", "no"], "label": 0},
     "Pets: Wash it. ", "  Dry it."),
    # only the first letter of ctx_b is a capital
    ({"activity_label": "Ski", "ctx_a": "Ann skis in Bern.", "ctx_b": "the man in a BIG hat", "ctx": "unused",
      "endings": ["falls.", "no"], "label": "0"}, "Ski: Ann skis in Bern. The man in a big hat", " falls."),
    # a scene in one piece: the sentence that is begun, also after a quotation, also the only one
    ({"activity_label": "Ski", "ctx": 'Ann skis in Bern. She says "Go!" bob', "endings": ["falls.", "no"], "label": 0},
     'Ski: Ann skis in Bern. She says "Go!" Bob', " falls."),
    ({"activity_label": "Ski", "ctx": "the man", "endings": ["falls.", "no"], "label": 0}, "Ski: The man", " falls."),
    ({"activity_label": "Ski", "ctx": "He skis (e.g. here).", "endings": ["No.", "Yes."], "label": 1},
     "Ski: He skis (e.g. here).", " Yes."),
])  # fmt: skip
def test_hellaswag_as_the_harness_asks_it(record, prompt, answer):
    assert TASKS["hellaswag"].text(record, "here")[1:] == (prompt, answer)


def test_spaces_at_the_end_of_a_prompt_are_scored_with_the_answer(tmp_path):
    record = {
        "activity_label": "Pets",
        "ctx": "Wash it. [substeps]",
        "endings": ["[substeps] Dry it.", "no"],
        "label": 0,
    }
    batch = first({"kind": "hellaswag", "path": write(tmp_path / "x.jsonl", [record])})
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert bytes(ids[labels == IGNORE].tolist()) == b"Pets: Wash it."
    assert bytes(labels[labels >= 0][:-1].tolist()) == b"   Dry it."


@pytest.mark.parametrize("record, answer", [
    ({"answers": ["the cats", "cats"]}, " the cats"),
    ({"answers_spans": {"spans": ["two", "two"], "types": ["number", "number"]}}, " two"),
    ({"answer": {"number": "2", "date": {"day": "", "month": "", "year": ""}, "spans": []}}, " 2"),
    ({"answer": {"number": 0, "date": {}, "spans": []}}, " 0"),
    ({"answer": {"number": "", "date": {"day": "", "month": "May", "year": "1990"}, "spans": []}}, " May 1990"),
    ({"answer": {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": ["Ann", "Bob"]}}, " Ann and Bob"),
])  # fmt: skip
def test_drop_in_every_layout(record, answer):
    text = {"passage": "Ann has Bob's two cats. ", "question": "Who?"} | record
    assert TASKS["drop"].text(text, "here") == (text["passage"], "Ann has Bob's two cats.  Who?", answer)
    assert TASKS["drop"].text(text | {"question": "Who? "}, "here")[2] == answer[1:]  # the space is there already


def test_one_scene_is_on_one_side():
    """What the hash decides by: the source, the passage, the scene without the sentence that is begun."""
    scene = {"activity_label": "Ski", "endings": ["falls.", "no"], "label": 0}
    keys = {TASKS["hellaswag"].text(scene | {"ctx": f"Ann skis. {who}"}, "")[0] for who in ("she", "the man")}
    assert keys == {"Ann skis."}
    assert TASKS["hellaswag"].text(HUB["hellaswag"] | {"source_id": "v_1"}, "")[0] == "v_1"


@pytest.mark.parametrize("kind", TASKS)
def test_what_is_evaluated_is_never_read(kind, monkeypatch):
    """lm-evaluation-harness evaluates GSM8K and MMLU on test, HellaSwag and DROP on validation."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def fake(repo, config, split, streaming):
        calls.append((repo, config, split, streaming))
        change = {"gsm8k": "question", "mmlu": "question", "hellaswag": "ctx_a", "drop": "passage"}[kind]
        return datasets.Dataset.from_list([HUB[kind] | {change: f"{split} number {i}."} for i in range(80)])

    monkeypatch.setattr(datasets, "load_dataset", fake)
    data = build({"kind": kind}, TOK, 400, 0)
    task = TASKS[kind]
    splits = ("auxiliary_train", "validation") if kind == "mmlu" else ("train",)
    assert calls == [(task.repo, task.config, split, False) for split in splits]
    train, val = (
        [TOK.decode(ids) for ids, _ in examples(data.stream, rows)]
        for rows in (data.stream.rows(0), data.stream.held_out)
    )
    assert not set(train) & set(val) and len(train) + len(val) == 80 * len(splits)
    assert len(val) == 80 if kind == "mmlu" else 0 < len(val) < 20
    with pytest.raises(ValueError, match="no .* example is left"):
        build({"kind": kind, "source": "my/copy", "split": "dev", "val_fraction": 0.9999999}, TOK, 400, 0)
    assert calls[len(splits) :] == [("my/copy", None, "dev", False)]
    build({"kind": kind, "source": "my/copy", "val_split": "held"}, TOK, 400, 0)
    assert calls[-2:] == [("my/copy", None, task.train, False), ("my/copy", None, "held", False)]


def test_padding_is_on_the_right_and_masked(tmp_path):
    batch = first({"kind": "gsm8k", "path": write(tmp_path / "x.jsonl", questions(6))}, batch_size=6)
    ids, mask, labels = batch["input_ids"], batch["attention_mask"], batch["labels"]
    lengths = mask.sum(1)
    assert len(set(lengths.tolist())) > 2 and ids.shape[1] == lengths.max()
    assert torch.equal(mask.bool(), torch.arange(ids.shape[1]) < lengths[:, None])
    assert (ids[mask == 0] == TOK.pad_token_id).all() and (labels[mask == 0] == IGNORE).all()
    assert (ids[torch.arange(6), lengths - 1] == TOK.eos_token_id).all()


def test_packed_examples_are_whole_and_apart(tmp_path):
    path = write(tmp_path / "x.jsonl", questions(20))
    loader = build({"kind": "gsm8k", "path": path, "val_fraction": 0, "packing": True}, TOK, 120, 0).train_dataloader()
    assert 1 < len(loader) < 20
    got = []
    for batch in loader:
        ids, labels, cu = batch["input_ids"][0], batch["labels"][0], batch["cu_seq_lens_q"].tolist()
        assert len(ids) == 120 == cu[-1] and batch["position_ids"][0][cu[:-1]].tolist() == [0] * (len(cu) - 1)
        for a, b in zip(cu, cu[1:], strict=False):
            if ids[a] == TOK.pad_token_id:
                assert (ids[a:b] == TOK.pad_token_id).all() and (labels[a:b] == IGNORE).all() and b == 120
            else:
                got.append(TOK.decode(ids[a:b]))
                assert ids[b - 1] == TOK.eos_token_id and TOK.decode(labels[a:b][labels[a:b] >= 0]).startswith(" ####")
    assert sorted(got) == sorted(f"Question: {q['question']}\nAnswer: {q['answer']}" for q in questions(20))


def test_examples_end_to_end_are_those_of_the_padded_batch(tmp_path):
    """Of every batch, validation's too: the same examples, in the same order, no token more."""
    cfg = {"kind": "gsm8k", "path": write(tmp_path / "x.jsonl", questions(20)), "val_fraction": 0.2}
    padded, flat = (build(cfg | {"packing": how}, TOK, 120, 0, batch_size=4) for how in (False, "batch"))
    pairs = [*zip(padded.train_dataloader(), flat.train_dataloader(), strict=True)]
    pairs += zip(padded.val_dataloader(), flat.val_dataloader(), strict=True)
    assert len(pairs) > 4
    for rows, row in pairs:
        real, cu = rows["attention_mask"] == 1, row["cu_seq_lens_q"]
        for name in ("input_ids", "labels"):
            assert row[name].shape == (1, int(real.sum())) and torch.equal(row[name][0], rows[name][real])
        assert torch.equal(cu.diff(), real.sum(1).to(cu.dtype)) and torch.equal(row["cu_seq_lens_k"], cu)
        positions = torch.arange(real.shape[1]).expand_as(real)[real]
        assert torch.equal(row["position_ids"][0], positions) and row["max_length_q"] == int(real.sum(1).max())
    with pytest.raises(ValueError, match="data.packing must be false, true or batch, not 'rows'"):
        build(cfg | {"packing": "rows"}, TOK, 120, 0)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_is_what_the_template_writes(kind, template, tmp_path):
    """Prompt and answer together read as the whole conversation, the prompt as what the harness asks; the answer and
    the end of its turn carry the loss, the line break that Qwen's template puts behind it is no part of it."""
    tokenizer = build_tokenizer(str(pretrained(tmp_path / "model", template)))
    cfg = {"kind": kind, "path": write(tmp_path / "x.jsonl", [HUB[kind]]), "chat_template": True}
    batch, (prompt, answer) = first(cfg, tokenizer), TEXT[kind]
    says = [("user", prompt), ("assistant", answer.strip())]
    if kind == "mmlu":
        head, question = prompt.split("\n\n")
        says = [("system", head + "\n\n"), ("user", question), says[1]]
    turns = [{"role": role, "content": said} for role, said in says]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    asked = tokenizer.apply_chat_template(turns[:-1], tokenize=False, add_generation_prompt=True)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert tokenizer.decode(ids) == whole.removesuffix("\n") and ids[-1] == tokenizer.convert_tokens_to_ids("<|end|>")
    assert tokenizer.decode(ids[labels == IGNORE]) == asked and tokenizer.decode(labels[labels >= 0]) == (
        answer.strip() + "<|end|>"
    )
    assert ids[labels == IGNORE].tolist() == tokenizer.apply_chat_template(
        turns[:-1], add_generation_prompt=True, return_dict=False
    )


def test_when_examples_are_conversations(tmp_path):
    """As plain text unless asked for; the table of one is never taken for the other's, nor for another template's."""
    tokenizer = build_tokenizer(str(pretrained(tmp_path / "model", "qwen2")))
    cfg = {"kind": "gsm8k", "path": write(tmp_path / "x.jsonl", [HUB["gsm8k"]])}

    def text(tokenizer=tokenizer, **how):
        data = build({"val_fraction": 0} | cfg | how, tokenizer, 400, 0)
        ids = next(iter(data.train_dataloader()))["input_ids"][0]
        assert data.stream.facts["chat_template"] == ("chat template" in data.stream.name) == (ids[0] == 2)
        return tokenizer.decode(ids)

    plain = text()
    assert plain.startswith("Question") and text(chat_template=None) == text(chat_template=False) == plain
    assert text(chat_template=True) == text(chat_template="auto") != plain
    assert text(TOK, chat_template="auto") == plain.removesuffix("<|eos|>")
    tokenizer.chat_template = tokenizer.chat_template.replace("<|start|>", "<|start|> ")
    assert text(chat_template=True).startswith("<|start|> user")
    tokenizer.chat_template = TEMPLATES["qwen2"].replace("<|end|>", "")
    assert text(chat_template=True).endswith("#### 2<|eos|>")  # where a template does not end a turn
    tokenizer.chat_template = THINKS
    assert text(chat_template=True).count("assistant\n<think>\n\n</think>\n\n") == 1
    changes = ("m.content", "m.content | replace('1', 'I')"), ("assistant\n", "it\n"), ("{{ m.c", "Well: {{ m.c")
    for part, other in changes:
        tokenizer.chat_template = TEMPLATES["qwen2"].replace(part, other)
        with pytest.raises(ValueError, match="the answer does not follow the prompt as it is"):
            text(chat_template=True)
    tokenizer.chat_template = "{{ raise_exception('Odd!') }}"
    with pytest.raises(ValueError, match="refuses a question and its answer .Odd!.. Set data.chat_template=false"):
        text(chat_template=True)
    with pytest.raises(ValueError, match="data.chat_template=true: the tokenizer 'byte' has no chat template"):
        text(TOK, chat_template=True)
    for odd in ("yes", 1):
        with pytest.raises(ValueError, match="data.chat_template must be false, true or auto, not"):
            text(chat_template=odd)


def test_too_long_is_counted_before_anything_is_spent(tmp_path, caplog):
    """The record that is too long is the validation example, the others need 40 to 42 tokens."""
    records = [{"passage": f"{'long ' * (i % 3)}p{i}", "question": "Who?", "answers": ["the answer"]} for i in range(6)]
    train = write(tmp_path / "x.jsonl", records)
    val = write(tmp_path / "v.jsonl", [{"passage": "long " * 9, "question": "Who?", "answers": ["the answer"]}])
    cfg = {"kind": "drop", "path": train, "val_path": val}
    needs = [len(f"{r['passage']} Who? the answer") + 1 for r in records]
    assert sorted(needs) == [19, 19, 24, 24, 29, 29]
    message = r"3 of 7 examples do not fit data.seq_len=24, the longest needs 62. Give data.seq_len=62, .*too_long=skip"
    with pytest.raises(ValueError, match=message):
        build(cfg, TOK, 24, 0)
    assert len(build(cfg, TOK, 62, 0).stream.held_out) == 1
    with caplog.at_level(logging.WARNING):
        stream = build(cfg | {"too_long": "skip"}, TOK, 24, 0).stream
    assert sorted(len(ids) for ids, _ in examples(stream, stream.rows(0))) == [19, 19, 24, 24] and stream.held_out == []
    assert "3 skipped as too long" in caplog.text and stream.facts["skipped as too long"] == 3
    with caplog.at_level(logging.WARNING):
        stream = build(cfg | {"too_long": "truncate"}, TOK, 24, 0).stream
    assert sorted(len(ids) for ids, _ in examples(stream, stream.rows(0))) == [19, 19, 24, 24, 24, 24]
    ((ids, prompt),) = examples(stream, stream.held_out)
    assert TOK.decode(ids) == "long long  Who? the answer"[-23:] and TOK.decode(ids[prompt:]) == " the answer"
    assert "3 truncated" in caplog.text and stream.facts["truncated"] == 3
    with pytest.raises(ValueError, match="0 row.s. of training data"):  # the answer alone is too long
        build(cfg | {"too_long": "truncate"}, TOK, 12, 0)
    with pytest.raises(ValueError, match="data.too_long must be one of error, skip, truncate, not 'cut'"):
        build(cfg | {"too_long": "cut"}, TOK, 24, 0)


def test_a_truncated_prompt_keeps_bos(tmp_path):
    class WithBos(ByteTokenizer):
        bos_token_id = 258

        def encode(self, text, **options):
            return [258, *super().encode(text)] if text == "" else super().encode(text)

    path = write(tmp_path / "x.jsonl", [{"passage": "long " * 9, "question": "Who?", "answers": ["me"]}])
    batch = first({"kind": "drop", "path": path, "too_long": "truncate"}, WithBos(), 16)
    assert batch["input_ids"][0].tolist() == [258, *b" long  Who? me", 256]


def test_hash_split_keeps_passages_together_and_ignores_the_seed(tmp_path):
    records = [{"passage": f"passage {i // 3}", "question": f"question {i}", "answers": [str(i)]} for i in range(120)]
    cfg = {"kind": "drop", "path": write(tmp_path / "x.jsonl", records), "val_fraction": 0.3}

    def sides(seed):
        data = build(cfg, TOK, 200, seed)
        loaders = data.train_dataloader(), data.val_dataloader()
        text = [[TOK.decode(b["input_ids"][0]) for b in loader] for loader in loaders]
        return [{t.split(" q")[0] for t in side} for side in text], [len(side) for side in text]

    (train, val), (n_train, n_val) = sides(0)
    assert not train & val and n_train + n_val == 120 and n_train == 3 * len(train) and 10 < n_val < 70
    assert sides(5) == ([train, val], [n_train, n_val])


def test_val_path_and_max_examples(tmp_path):
    path, val = write(tmp_path / "x.jsonl", questions(30)), write(tmp_path / "v.jsonl", questions(30, 100))
    data = build({"kind": "gsm8k", "path": path, "val_path": val, "max_examples": 7}, TOK, 200, 0)
    assert len(data.train_dataloader()) == len(data.val_dataloader()) == 7
    assert all("#### 1" in TOK.decode(b["input_ids"][0]) for b in data.val_dataloader())


def test_no_validation_example_is_trained_on(tmp_path, caplog):
    path, val = write(tmp_path / "x.jsonl", questions(30)), write(tmp_path / "v.jsonl", questions(10, 25))
    with caplog.at_level(logging.WARNING):
        stream = build({"kind": "gsm8k", "path": path, "val_path": val}, TOK, 200, 0).stream
    assert len(stream.rows(0)) == 25 and len(stream.held_out) == 10
    assert "25 examples, 10 (" in caplog.text
    (tmp_path / "link").symlink_to(tmp_path)
    for same in (path, str(tmp_path / "link" / "x.jsonl"), str(tmp_path / "x*")):
        for kind in ("gsm8k", "pretrain"):
            with pytest.raises(ValueError, match="val_path names '.*x.jsonl', which data.path trains on: give other"):
                build({"kind": kind, "path": path, "val_path": same}, TOK, 200, 0)


def test_epochs_are_permutations_shared_out_among_ranks(tmp_path):
    path = write(tmp_path / "x.jsonl", questions(10))
    stream = build({"kind": "gsm8k", "path": path, "val_fraction": 0}, TOK, 200, 0).stream
    epoch = lambda e, rank=0, ranks=1: [  # noqa: E731
        TOK.decode(b["input_ids"][0]) for b, _ in stream.batches({"epoch": e, "row": 0}, rank, ranks)
    ]
    assert sorted(epoch(0)) == sorted(epoch(1)) and epoch(0) != epoch(1) and len(set(epoch(0))) == 10
    assert [epoch(0, r, 3) for r in range(3)] == [epoch(0)[r:9:3] for r in range(3)] and stream.length(3) == 3
    with pytest.raises(ValueError, match="11 rank"):
        stream.length(11)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets do not lie beside this checkout")
@pytest.mark.parametrize("kind, file", [("gsm8k", "gsm8k-train"), ("mmlu", "mmlu-dev"), ("hellaswag", "hellaswag-val"),
                                        ("drop", "drop-dev")])  # fmt: skip
def test_real_files(kind, file):
    tokenizer = build_tokenizer(str(SHARED / "tokenizer-mistral-v1"))
    cfg = {"kind": kind, "path": str(SHARED / f"{file}.jsonl.xz"), "max_examples": 40, "val_fraction": 0.1}
    data = build(cfg, tokenizer, 1024, 0, batch_size=4)
    for batch in data.train_dataloader():
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            ids, labels = ids[mask == 1], labels[mask == 1]
            assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
            answer = labels[labels >= 0]
            assert 2 <= len(answer) < len(ids) and torch.equal(answer, ids[-len(answer) :])
            # the prompt's tokens are those of the prompt alone, and together they read as one text
            prompt = tokenizer.decode(ids[: -len(answer)], skip_special_tokens=True)
            assert tokenizer(prompt)["input_ids"] == ids[: -len(answer)].tolist()
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            assert whole.startswith(prompt) and whole[len(prompt)] == " " and whole[len(prompt) + 1] != " "

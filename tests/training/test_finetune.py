"""The four recipes for fine-tuning, from a folder of weights to weights, full and with adapters, on local files.

Records have the fields of the real files; with these files in the folder of the environment variable SAGE_DATA
(`gsm8k-train.jsonl.xz`, ...) their first rows are read instead.
"""

import csv
import json
import lzma
import math
import os
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sagetrain.__main__ import compose
from sagetrain.training.export import export
from sagetrain.training.module import CausalLM
from sagetrain.training.train import run
from tests.tiny import TEMPLATES, pretrained

RECORDS = {
    "gsm8k": {"question": "Ann has {} pens and buys one.", "answer": "{} + 1 = <<{}+1={}>>{}\n#### {}"},
    "mmlu": {"subject": "high_school_maths", "question": "What is {}?", "choices": ["a", "b", "c", "d"], "answer": 1},
    "hellaswag": {"ind": 24, "activity_label": "Roof {}", "ctx_a": "A man is on a roof {}.", "ctx_b": "he",
                  "ctx": "A man is on a roof {}. he", "split": "val", "split_type": "indomain", "label": 3,
                  "endings": ["sits.", "rips up [substeps] tiles.", "falls.", "pulls."], "source_id": "v~{}"},
    "drop": {"section_id": "nfl_{}", "query_id": "q{}", "passage": "Team {} won by two.", "question": "Who won?",
             "answers_spans": {"spans": ["team {}"], "types": ["span"]}},
}  # fmt: skip
REAL = {"gsm8k": "gsm8k-train", "mmlu": "mmlu-test", "hellaswag": "hellaswag-val", "drop": "drop-dev"}
EXAMPLES = {"gsm8k": 32, "mmlu": 128, "hellaswag": 128, "drop": 128}  # of a step, as in the paper


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `llama` and `qwen2`."""
    folder = tmp_path_factory.mktemp("bases")
    return [pretrained(folder / kind, kind) for kind in TEMPLATES][0].parent


def made(kind: str, folder: Path, count: int) -> Path:
    record, path = json.dumps(RECORDS[kind]), folder / f"{kind}.jsonl"
    path.write_text("".join(record.replace("{}", str(i)) + "\n" for i in range(count)))
    return path


def records(kind: str, folder: Path) -> Path:
    if not (real := os.environ.get("SAGE_DATA")):
        return made(kind, folder, 20)
    with lzma.open(Path(real, f"{REAL[kind]}.jsonl.xz"), "rt", encoding="utf-8") as lines:
        (folder / f"{kind}.jsonl").write_text("".join(islice(lines, 20)))
    return folder / f"{kind}.jsonl"


def finetune(kind: str, base: Path, file: Path, out: Path, *changes: str) -> list[float]:
    """Losses of two steps of the recipe, with its own attention."""
    width = 4096 if os.environ.get("SAGE_DATA") else 256
    run(compose([
        f"recipe={kind}_finetune", f"model.path={base}", f"data.path={file}", f"data.seq_len={width}",
        "trainer.max_steps=2", "trainer.accelerator=cpu", "trainer.precision=32-true", "trainer.limit_val_batches=1",
        "trainer.enable_progress_bar=false", f"out={out}", *changes,
    ]))  # fmt: skip
    with open(out / "metrics.csv") as table:
        return [float(row["loss"]) for row in csv.DictReader(table)]


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize(
    ("model", "lora", "packing", "chat"),
    [
        ("llama", False, "batch", True),
        ("llama", True, "false", True),
        ("qwen2", True, "batch", False),
        ("qwen2", False, "true", False),
    ],
)
def test_recipes_train_and_what_they_trained_is_read(
    kind: str, bases: Path, tmp_path: Path, model: str, lora: bool, packing: str, chat: bool
) -> None:
    changes = [f"data.packing={packing}", f"data.chat_template={chat}", "data.batch_size=1", "checkpoint.keep=weights"]
    changes += ["trainer.accumulate_grad_batches=2", "optim.lr=0.01", "optim.warmup_steps=0"]
    file, base = records(kind, tmp_path), bases / model
    found = finetune(kind, base, file, tmp_path / "out", *changes, *(["model.lora.r=4"] if lora else []))
    assert len(found) == 2 and all(1.0 < loss < 1.7 * math.log(264) for loss in found)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["data"]["chat_template"] == chat
    assert (tmp_path / "out" / "weights" / "adapter_model.safetensors").exists() == lora
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (base, export(tmp_path / "out", tmp_path / "whole", merge=lora))
    )
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert before.keys() == after.keys() and len(moved) == (2 * 7 if lora else len(before))


@pytest.mark.parametrize("kind", RECORDS)
def test_a_step_has_as_many_examples_as_in_the_paper(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the recipe's own batches: no padding, every example a sequence of its own, and none twice."""
    step, seen = CausalLM.training_step, {}

    def training_step(self: CausalLM, batch: dict, index: int) -> torch.Tensor:
        assert "attention_mask" not in batch and batch["input_ids"].shape == (1, batch["cu_seq_lens_q"][-1])
        examples = batch["input_ids"][0].tensor_split(batch["cu_seq_lens_q"][1:-1].long())
        seen.setdefault(self.trainer.global_step, []).extend(tuple(ids.tolist()) for ids in examples)
        return step(self, batch, index)

    monkeypatch.setattr(CausalLM, "training_step", training_step)
    base, file = pretrained(tmp_path / "base"), made(kind, tmp_path, 300)
    finetune(kind, base, file, tmp_path / "out", "trainer.limit_val_batches=0", "checkpoint.keep=none")
    assert [len(examples) for examples in seen.values()] == [EXAMPLES[kind]] * 2
    assert len(set(seen[0] + seen[1])) == 2 * EXAMPLES[kind]


@pytest.mark.parametrize("kind", RECORDS)
def test_recipes_have_the_settings_of_the_paper(kind: str) -> None:
    cfg = compose([f"recipe={kind}_finetune"])
    optim = cfg.optim.lr, cfg.optim.schedule, cfg.optim.min_lr_ratio, cfg.optim.warmup_steps
    assert optim == (3e-5, "linear", 0.0, 100) and cfg.trainer.max_steps == 700
    assert cfg.data.batch_size * cfg.trainer.accumulate_grad_batches == EXAMPLES[kind]
    assert cfg.data.batch_size * cfg.data.seq_len == 16384 and cfg.data.packing == "batch"

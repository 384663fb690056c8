"""Every recipe composes, is short, and trains a tiny model for a few steps on local files, validation included."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sagetrain.__main__ import compose
from sagetrain.paths import RECIPES_DIR, groups, recipes
from sagetrain.training.module import model_config
from sagetrain.training.train import run

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TINY = [
    "compare.arms=null",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.enable_progress_bar=false",
    "model=quickstart",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=1",
    "data.batch_size=2",
    "trainer.max_steps=3",
    "trainer.accumulate_grad_batches=1",
    "trainer.limit_val_batches=1",
    "trainer.val_check_interval=2",
    "probe.every=0",
]

EXAMPLES = {
    "gsm8k": {"question": "Ann has {} apples and buys one. How many?", "answer": "She has {} + 1.\n#### {}"},
    "mmlu": {"subject": "maths", "question": "What is {}?", "choices": ["a", "b", "c", "d"], "answer": 1},
    "hellaswag": {"activity_label": "Work", "ctx": "Person {} sits", "endings": ["up", "on", "in", "by"], "label": 2},
    "drop": {"passage": "Team {} won by two.", "question": "Which team won {}?", "answers": ["team {}"]},
    "pretrain": {"text": "Document {}: it says nothing much, several times over. " * 3},
}
FILES = {
    "gsm8k": "gsm8k-test.jsonl.xz",
    "mmlu": "mmlu-dev.jsonl.xz",
    "hellaswag": "hellaswag-val.jsonl.xz",
    "drop": "drop-dev.jsonl.xz",
    "pretrain": "pretrain-val.jsonl.xz",
}


def local_file(kind: str, folder: Path) -> Path:
    """The real data where it lies beside the checkout, else a small file of the same form."""
    if (SHARED / FILES[kind]).exists():
        return SHARED / FILES[kind]
    example = json.dumps(EXAMPLES[kind])
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(example.replace("{}", str(i)) + "\n" for i in range(200)))
    return path


@pytest.mark.parametrize("name", recipes())
def test_recipe_is_short_and_says_what_it_does(name: str) -> None:
    lines = (RECIPES_DIR / f"{name}.yaml").read_text().splitlines()
    assert len(lines) < 20
    assert len(recipes()[name]) > 20


def test_the_recipes_that_were_promised() -> None:
    tasks = {f"{task}_finetune" for task in ("gsm8k", "mmlu", "hellaswag", "drop")}
    assert set(recipes()) >= {"quickstart", "llama1b_pretrain", "parity_120m"} | tasks


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("name", recipes())
def test_recipe_trains(name: str, tmp_path: Path) -> None:
    arguments = [f"recipe={name}", *TINY, f"out={tmp_path / 'run'}"]
    data = compose([f"recipe={name}"]).data
    if name == "quickstart":
        arguments += ["data.seq_len=64"]
    elif data.kind == "pretrain":
        arguments += [f"data.path={local_file('pretrain', tmp_path)}", "data.seq_len=256", "data.val_documents=5"]
    else:
        arguments += [f"data.path={local_file(data.kind, tmp_path)}", "data.seq_len=1024"]
        arguments += ["data.max_examples=40", "data.too_long=truncate"]
    run(compose(arguments))
    lines = [line.split(",") for line in (tmp_path / "run" / "metrics.csv").read_text().splitlines()]
    losses = [float(line[lines[0].index("loss")]) for line in lines[1:]]
    assert len(losses) == 3 and all(2.0 < loss < 1.5 * math.log(264) for loss in losses)
    assert bool(lines[2][lines[0].index("val_loss")]) == (name != "quickstart")


@pytest.mark.parametrize(
    ("group", "option"), [(g, o) for g, options in groups().items() for o in options if g not in ("recipe", "data")]
)
def test_every_option_composes(group: str, option: str) -> None:
    cfg = compose(["recipe=gsm8k_finetune", f"{group}={option}"])
    assert cfg.recipe == "gsm8k_finetune" and (group in cfg or group == "memory")


def test_memory_decides_after_the_recipe() -> None:
    small, large = (knobs_of(name) for name in ("24gb", "80gb"))
    assert small == ("attention_saved", 2, "adamw8bit", "bf16-true") and large == ("none", 1, "adamw", "auto")


def knobs_of(name: str) -> tuple:
    cfg = compose(["recipe=llama1b_pretrain", f"memory={name}"])
    return cfg.model.checkpointing, cfg.model.checkpoint_every, cfg.optim.kind, cfg.trainer.precision


def test_llama1b_has_the_published_shape() -> None:
    config = model_config(compose(["recipe=llama1b_pretrain"]).model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400
    assert (config.head_dim, config.num_key_value_heads, config.rope_parameters["rope_type"]) == (64, 8, "llama3")


@pytest.mark.parametrize(("model_type", "norms"), [("llama", 0), ("qwen3", 12 * 2 * 64)])
def test_parity_with_and_without_qk_norm(model_type: str, norms: int) -> None:
    config = model_config(compose(["recipe=parity_120m", f"model.config.model_type={model_type}"]).model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) == 124_668_672 + norms
    assert (config.head_dim, config.num_attention_heads, config.num_key_value_heads) == (64, 12, 4)


@pytest.mark.parametrize("tokens", [8192, 16384])
def test_llama1b_fits_long_rows(tokens: int) -> None:
    cfg = compose(["recipe=llama1b_pretrain", f"data.seq_len={tokens}"])
    assert cfg.data.document_boundaries and model_config(cfg.model).max_position_embeddings >= tokens

"""Trains the same steps on one and on two ranks, cut into other micro-batches, under every strategy.

A script, so that a process forks which has done nothing but import: python steps_worker.py OUT. Each run leaves its
directory in OUT.
"""

import json
import sys
from pathlib import Path

from omegaconf import DictConfig

import sagetrain.data
from sagetrain.__main__ import compose
from tests.ranks import fork
from tests.tiny import MODEL

STEPS, GLOBAL_BATCH, ACCUMULATION, CLIP = 7, 4, 2, 0.5
RUNS = {
    1: ["auto", "deepspeed2"],
    2: ["ddp", "fsdp2", "deepspeed0", "deepspeed1", "deepspeed2", "deepspeed3", "ddp_value", "fsdp2_value"],
}


def examples(count: int, first: int) -> str:
    """JSON lines whose answers have 1 or 30 words."""
    answers = [f"{'word ' * (1 if i % 4 else 30)}#### {i}" for i in range(first, first + count)]
    return "".join(json.dumps({"question": f"Say {i}", "answer": a}) + "\n" for i, a in enumerate(answers, first))


def data(cfg: DictConfig) -> sagetrain.data.TextData:
    tokenizer = sagetrain.data.build_tokenizer(cfg.model.tokenizer)
    return sagetrain.data.build(cfg.data, tokenizer, cfg.data.seq_len, cfg.seed, cfg.data.batch_size)


def config(folder: Path, ranks: int = 1, run: str = "auto") -> DictConfig:
    """22 examples make 5 micro-batches of 4: steps of 2, 2 and 1 of them. Validation: 5 rows, uneven among 2 ranks."""
    for name, lines in ("train", examples(22, 0)), ("val", examples(5, 50)):
        if not (folder / f"{name}.jsonl").exists():
            (folder / f"{name}.jsonl").write_text(lines)
    name, _, clipping = run.partition("_")
    deepspeed = name.startswith("deepspeed")
    strategy = ["strategy=deepspeed", f"strategy.stage={name[-1]}"] if deepspeed else [f"strategy={name}"]
    return compose([
        "recipe=gsm8k_finetune", "model=quickstart", *MODEL, "model.config.num_hidden_layers=2",
        "attention.implementation=sdpa", "data.packing=false",
        f"data.path={folder / 'train.jsonl'}", f"data.val_path={folder / 'val.jsonl'}", "data.seq_len=256",
        f"data.batch_size={GLOBAL_BATCH // ranks}", *strategy, "seed=3",
        "trainer.accelerator=cpu", "trainer.precision=32-true", f"trainer.devices={ranks}", "probe.every=0",
        f"trainer.max_steps={STEPS}", f"trainer.accumulate_grad_batches={ACCUMULATION}", "checkpoint.every_n_steps=0",
        "trainer.limit_val_batches=1.0", "trainer.val_check_interval=4", "trainer.enable_progress_bar=false",
        f"trainer.gradient_clip_val={CLIP}", f"+trainer.gradient_clip_algorithm={clipping or 'norm'}",
        "optim.lr=0.005", "optim.schedule=cosine", "optim.min_lr_ratio=0.1", "optim.weight_decay=10",
        "optim.warmup_steps=2", f"out={folder / f'{run}{ranks}'}",
    ])  # fmt: skip


if __name__ == "__main__":
    import deepspeed  # noqa: F401 (once, for all ranks)

    from sagetrain.training.train import run

    folder = Path(sys.argv[1])
    fork(RUNS, lambda ranks: [run(config(folder, ranks, name)) for name in RUNS[ranks]])

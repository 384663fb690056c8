"""INT8 attention trains as well as BF16: same weights, same data, and a final loss inside the band between seeds."""

import csv
from pathlib import Path

from sagetrain.__main__ import compose
from sagetrain.training.train import run

SEEDS, STEPS, TAIL = 3, 60, 10


def final_loss(folder: Path) -> tuple[float, float]:
    """(loss of the first step, mean over the last ones)."""
    with open(folder / "metrics.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == STEPS
    return losses[0], sum(losses[-TAIL:]) / TAIL


def test_int8_ends_inside_the_seed_band_of_bf16(tmp_path: Path) -> None:
    # Names that come back: to predict their second half, the model has to look back, which only attention can.
    words = [f"{chr(97 + i % 26)}{chr(97 + i * 7 % 26)}{chr(97 + i * 11 % 26)}{i % 10}" for i in range(50)]
    lines = (f"{words[i * i % 50]} + {words[i % 50]} = {words[i * i % 50]}{words[i % 50]}\n" for i in range(4000))
    (tmp_path / "text.txt").write_text("".join(lines))
    arguments = [
        "recipe=quickstart",
        "compare.arms=[bf16,sage_int8]",
        f"compare.seeds={SEEDS}",
        f"data.path={tmp_path / 'text.txt'}",
        f"out={tmp_path / 'out'}",
        f"trainer.max_steps={STEPS}",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.enable_progress_bar=false",
        "model.config.hidden_size=64",
        "model.config.intermediate_size=128",
        "model.config.num_hidden_layers=2",
        "model.config.num_attention_heads=1",
        "model.config.num_key_value_heads=1",
        "data.seq_len=128",
        "data.batch_size=2",
        "optim.lr=0.01",
        "optim.warmup_steps=5",
    ]
    runs = {folder.name: final_loss(folder) for folder in run(compose(arguments))}
    finals = {arm: [runs[f"{arm}-seed{seed}"][1] for seed in range(SEEDS)] for arm in ("bf16", "sage_int8")}
    assert all(last < 0.6 * first for first, last in runs.values()), runs
    gap = sum(finals["sage_int8"]) / SEEDS - sum(finals["bf16"]) / SEEDS
    assert abs(gap) <= max(finals["bf16"]) - min(finals["bf16"]), finals
    # The arms differ by rounding only, and do differ.
    pairs = [(runs[f"bf16-seed{seed}"], runs[f"sage_int8-seed{seed}"]) for seed in range(SEEDS)]
    assert all(a != b for a, b in pairs)

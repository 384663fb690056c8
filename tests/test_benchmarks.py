"""The benchmark of a recipe's step measures the recipe: its arms, its data, one loss for all of them."""

import sys
from typing import Any

import pytest
import torch

from benchmarks import pretrain
from tests.tiny import MODEL


def test_a_recipes_step_arm_by_arm(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict[str, Any]] = []
    monkeypatch.setattr(pretrain, "write", lambda rows, path: written.extend(rows))
    command = ["--device", "cpu", "--recipe", "quickstart", "--lengths", "64", "--rounds", "1", "--arms"]
    arms = ["sage_int8", "sdpa", "flex"]
    overrides = [*MODEL, "data.batch_size=2", "trainer.accumulate_grad_batches=5"]
    monkeypatch.setattr(sys, "argv", ["pretrain", *command, *arms, "--set", *overrides])
    pretrain.main()
    assert [(row["data"], row["attention"]) for row in written] == [
        (data, arm) for data in ("packed", "plain") for arm in ("flex", "sage_int8", "sdpa")
    ]
    for refused, ours, theirs in (written[:3], written[3:]):
        assert "needs a CUDA GPU" in refused["refused"]
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=0.01) and ours["ran"] == "sage_int8"
        assert ours["step_ms"] == pytest.approx(
            ours["first_ms"] + 4 * ours["micro_ms"] + ours["optimizer_ms"], rel=1e-3
        )
        assert ours["tokens_per_s"] == pytest.approx(5 * 2 * 64 / ours["step_ms"] * 1e3, rel=1e-3)
        assert ours["x_sdpa"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"], rel=1e-2)


def test_model_flops_by_hand() -> None:
    """Two documents of 3 and 5 tokens in a row of 8: 6 N T + 6 L H_q D (9 + 25)."""
    model = pretrain.AutoModelForCausalLM.from_config(
        pretrain.model_config(pretrain.compose(["recipe=quickstart", *MODEL]).model)
    )
    count = sum(p.numel() for p in model.parameters())
    batch = {"input_ids": torch.zeros(1, 8, dtype=torch.int64), "cu_seq_lens_q": torch.tensor([0, 3, 8])}
    assert pretrain.model_flops(model, batch) == 6 * count * 8 + 6 * 64 * 34
    assert pretrain.model_flops(model, {"input_ids": batch["input_ids"]}) == 6 * count * 8 + 6 * 64 * 64

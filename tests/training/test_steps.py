"""An optimizer step is what its examples make it, whatever the strategy, the ranks and the micro-batches."""

import csv
from pathlib import Path

import pytest
import steps_worker as worker
import torch
from transformers import AutoModelForCausalLM, get_cosine_with_min_lr_schedule_with_warmup

from sagetrain.training.module import model_config
from tests.ranks import launch

CLOSE = {"rel": 1e-4}  # fp32 in another order stays far below; the mean of means is far above, see the test


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the worker left its runs."""
    out = tmp_path_factory.mktemp("steps")
    worker.config(out)  # writes the data, before there are several who would
    launch(worker.__file__, out, str(out))
    return out


def plain(folder: Path, clip: str = "norm", by_micro_batch: bool = False) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a loop in fp64 without Lightning; `by_micro_batch`: the mean of means."""
    cfg = worker.config(folder)
    torch.manual_seed(cfg.seed)
    model = AutoModelForCausalLM.from_config(model_config(cfg.model), attn_implementation="sdpa").double()
    groups = [
        {"params": [p for p in model.parameters() if (p.ndim > 1) == decays], "weight_decay": 10.0 * decays}
        for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.optim.lr, betas=tuple(cfg.optim.betas))
    schedule = get_cosine_with_min_lr_schedule_with_warmup(optimizer, 2, worker.STEPS, min_lr_rate=0.1)
    data, found = worker.data(cfg).stream, []
    at = data.start
    for step in range(worker.STEPS):
        batches = []
        for _ in range(1 if step % 3 == 2 else worker.ACCUMULATION):
            batch, at = next(data.batches(at, 0, 1))
            batches.append(batch)
        total = sum(float((b["labels"][:, 1:] != -100).sum()) for b in batches)
        loss = torch.zeros((), dtype=torch.float64)
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            target, reduction = batch["labels"][:, 1:], "mean" if by_micro_batch else "sum"
            part = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction=reduction)
            loss = loss + part / (worker.ACCUMULATION if by_micro_batch else total)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        if clip == "value":
            torch.nn.utils.clip_grad_value_(model.parameters(), worker.CLIP)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), worker.CLIP)
        optimizer.step()
        schedule.step()
        found.append((loss.item(), norm.item()))
    return found


@pytest.mark.parametrize(("ranks", "run"), [(ranks, run) for ranks, runs in worker.RUNS.items() for run in runs])
def test_every_target_weighs_the_same(folder: Path, ranks: int, run: str) -> None:
    expected = plain(folder, clip="value" if run.endswith("value") else "norm")
    got = [(float(row["loss"]), float(row["grad_norm"])) for row in rows(folder / f"{run}{ranks}")]
    assert len(got) == worker.STEPS
    for step, (mine, theirs) in enumerate(zip(got, expected, strict=True), 1):
        assert mine == pytest.approx(theirs, **CLOSE), f"step {step}"


def test_the_mean_of_means_would_be_seen(folder: Path) -> None:
    (_, wrong), (_, right) = plain(folder, by_micro_batch=True)[0], plain(folder)[0]
    assert abs(wrong / right - 1) > 10 * CLOSE["rel"]


def test_validation_does_not_depend_on_strategy_and_ranks(folder: Path) -> None:
    found = {
        f"{run}{ranks}": [float(row["val_loss"]) for row in rows(folder / f"{run}{ranks}") if row["val_loss"]]
        for ranks, runs in worker.RUNS.items() for run in runs if not run.endswith("value")
    }  # fmt: skip
    for losses in found.values():
        assert len(losses) == 3 and losses == pytest.approx(found["auto1"], **CLOSE)

"""What the loggers get, read back from what they wrote: offline runs, event files, and the calls of trackio."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sagetrain.__main__ import compose
from sagetrain.training.loggers import named
from sagetrain.training.train import run
from tests.training.test_train import TINY

EVERY_STEP = {
    "tokens": "tokens", "loss": "train/loss", "grad_norm": "train/grad_norm", "lr": "train/lr",
    "tokens_per_s": "speed/tokens_per_s", "step_ms": "speed/step_ms", "data_wait": "speed/data_wait",
    "mfu": "speed/mfu",
}  # fmt: skip
PROBE = {f"probe/{name}" for name in ("loss_bf16", "loss_lowbit", "grad_cosine", "ds_rowsum")}
OF_LAYERS = {f"probe/{x}_{how}" for x in ("sigma_q", "sigma_k", "dq_error", "dk_error") for how in ("mean", "max")}


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trains a tiny model whose device has a known peak; validates and probes every second step of four."""
    monkeypatch.setattr("sagetrain.training.callbacks.peak_flops", lambda device: 1e9)
    text, held = tmp_path / "text.txt", tmp_path / "held.txt"
    text.write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(500)))
    held.write_text("".join(f"{i} less {i} is {i - i}.\n" for i in range(50)))
    more = ["probe.every=2", "trainer.limit_val_batches=1", "trainer.val_check_interval=2", f"data.val_path={held}"]

    def go(*changes: str) -> list[Path]:
        return run(compose([*TINY, *more, f"data.path={text}", f"out={tmp_path / 'out'}", *changes]))

    return go


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def offline(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The records of an offline run of Weights & Biases by their kind, as its own program reads them."""
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records: dict[str, list[dict[str, Any]]] = {}
    for record in map(json.loads, done.stdout.splitlines()):
        records.setdefault(record["type"], []).append(record.get(record["type"]))
    return records


def test_wandb_offline_holds_a_comparison(train, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    outs = train("logger=wandb", "compare.arms=[bf16,sage_int8]", "compare.seeds=1")
    for out, name in zip(outs, ("bf16-seed0", "sage_int8-seed0"), strict=True):
        records = offline(out)
        about = records["run"][0]
        assert (about["display_name"], about["run_group"], about["project"]) == (name, "quickstart-out", "sagetrain")
        assert records["metric"][-1]["glob_name"] == "*" and records["metric"][-1]["step_metric"] == "tokens"
        history = [record["item"] for record in records["history"]]
        logged = [item for item in history if "train/loss" in item]
        for column, key in EVERY_STEP.items():
            assert [item[key] for item in logged] == [float(row[column]) for row in rows(out)]
        assert [item["trainer/global_step"] for item in logged] == [1, 2, 3, 4]
        later = [item for item in history if "val/loss" in item]
        written = [row for row in rows(out) if row["val_loss"]]
        assert [(item["tokens"], item["val/loss"]) for item in later] == [
            (int(row["tokens"]), float(row["val_loss"])) for row in written
        ] and len(written) == 2
        assert not {key for item in history for key in item} & {"loss", "val_loss", "step"}


def test_wandb_shows_sigma_of_all_layers_in_one_panel(train, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    (out,) = train("logger=wandb", "model.config.num_hidden_layers=3")
    probes = [record["item"] for record in offline(out)["history"] if "probe/loss_bf16" in record["item"]]
    assert len(probes) == 2
    for item, row in zip(probes, (row for row in rows(out) if row["probe/loss_bf16"]), strict=True):
        sigma = [float(row[f"probe/sigma_q_layer{i}"]) for i in range(3)]
        assert item["probe/sigma_q_by_layer.values"] == pytest.approx(sigma)
        assert item["probe/sigma_q_by_layer.bins"] == [0, 1, 2, 3]
        assert item["probe/sigma_q_max"] == max(sigma) and {*item} >= PROBE | OF_LAYERS
        assert not any("layer0" in name for name in item)


def test_tensorboard_gets_the_same_rows(train) -> None:
    (out,) = train("logger=tensorboard")
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    for column, key in EVERY_STEP.items():
        assert [e.value for e in events.Scalars(key)] == pytest.approx([float(row[column]) for row in rows(out)])
    assert {*EVERY_STEP.values(), "val/loss"} | PROBE | OF_LAYERS <= set(events.Tags()["scalars"])


def test_trackio_gets_the_same_rows(train, monkeypatch, tmp_path: Path) -> None:
    """trackio itself wants an older pillow than ours: its calls are recorded instead."""
    calls: list[tuple[Any, ...]] = []
    log = SimpleNamespace(log=lambda row, step: calls.append((step, row)), finish=lambda: calls.append(("finish",)))
    module = SimpleNamespace(init=lambda **options: calls.append(("init", options)) or log)
    monkeypatch.setitem(sys.modules, "trackio", module)
    (out,) = train("logger=trackio", "logger.group=mine")
    (_, options), *logged, last = calls
    own = json.loads((out / "run.json").read_text())["wandb_id"]  # other runs of this seed have other names
    assert {k: options[k] for k in ("project", "name", "group", "resume")} == {
        "project": "sagetrain", "name": f"sage_int8-seed0-{own}", "group": "mine", "resume": "allow"}  # fmt: skip
    assert options["config"]["optim"]["lr"] == 0.005 and last == ("finish",)
    losses = [(step, row["train/loss"]) for step, row in logged if "train/loss" in row]
    assert losses == [(int(row["step"]), float(row["loss"])) for row in rows(out)]
    assert {name for _, row in logged for name in row} == {*EVERY_STEP.values(), "val/loss"} | PROBE | OF_LAYERS


def test_trackio_that_is_not_installed_is_one_line(train, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ValueError, match="logger=trackio: no package trackio: pip install trackio"):
        train("logger=trackio")


def test_names_have_groups() -> None:
    row = {"step": 3, "tokens": 96, "loss": 2.0, "peak_gib": 1.5, "eval/gsm8k/strict_match": 0.25}
    assert named(row) == (
        {"tokens": 96, "train/loss": 2.0, "memory/peak_gib": 1.5, "eval/gsm8k/strict_match": 0.25}, {})  # fmt: skip


@pytest.mark.parametrize("accumulate", [1, 2])
def test_mfu_by_hand(train, accumulate: int) -> None:
    """A row of 32 tokens, plain: 6 N T + 6 L H_q D T^2; two rows a micro-batch."""
    (out,) = train(f"trainer.accumulate_grad_batches={accumulate}")
    count = json.loads((out / "run.json").read_text())["parameters"]
    flops = 2 * accumulate * (6 * count * 32 + 6 * 64 * 32**2)
    for row in rows(out):
        assert float(row["mfu"]) == pytest.approx(flops / float(row["step_ms"]) * 1e3 / 1e9)
        assert row["peak_gib"] == ""  # of a GPU

"""The dashboard for Weights & Biases: what is built, and what an offline run of a comparison holds."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sagetrain.compare import Comparison, find_runs
from sagetrain.compare.__main__ import main
from sagetrain.compare.dashboard import CURVES, workspace
from sagetrain.training.callbacks import COLUMNS, probe_columns
from sagetrain.training.loggers import named
from tests.compare.test_compare import STEPS, scored

LOGGED = {"logger": {"_target_": "lightning.pytorch.loggers.WandbLogger"}}


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, scores in enumerate([(0.30, 0.31), (0.34, 0.33)]):
        for arm, score in zip(("bf16", "sage_int8"), scores, strict=True):
            scored(tmp_path / "runs", arm, seed, 0.1, score, config=LOGGED)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def test_the_dashboard_shows_the_runs_of_the_comparison(parent: Path):
    made = workspace(Comparison(find_runs([parent])), "someone", "sagetrain", "own")._to_model()
    spec = json.loads(made.model_dump_json(by_alias=True, exclude_none=True))["spec"]["section"]
    (chosen,) = spec["runSets"][0]["filters"]["filters"]
    assert chosen["key"]["name"] == "name" and chosen["op"] == "IN"  # "name" is what the service calls an id
    assert chosen["value"] == ["id0bf16", "id1bf16", "id0sage_int8", "id1sage_int8", "own"]
    found = {section["name"]: section["panels"] for section in spec["panelBankConfig"]["sections"]}
    assert list(found) == ["Verdict", "Training", "Speed and memory", "Probe", "Scores"]
    words, gap = found["Verdict"]
    assert "| INT8 | 0, 1 |" in words["config"]["value"]
    assert gap["config"]["metrics"] == ["gap/INT8", "band/above", "band/below"]
    lines = [panel["config"] for name in ("Training", "Speed and memory", "Scores") for panel in found[name]]
    assert {"train/loss", "train/grad_norm", "speed/mfu", "memory/peak_gib", "eval/gsm8k/strict_match"} <= {
        metric for config in lines for metric in config["metrics"]
    }
    for config in lines:
        assert config["xAxis"] == "tokens" and config["groupBy"] == "attention.value.name"
        assert (config["groupAgg"], config["groupArea"]) == ("mean", "minmax")


def test_the_dashboard_shows_what_runs_send():
    sent, _ = named(dict.fromkeys([*COLUMNS, *probe_columns(1)], 1.0))
    assert {metric for panels in CURVES.values() for metric in panels} <= set(sent)


def test_the_dashboard_needs_no_arm_bf16(tmp_path: Path):
    for arm in ("sdpa", "sage_int8"):
        scored(tmp_path, arm, 0, 0.1, 0.3)
    made = workspace(Comparison(find_runs([tmp_path])), "someone", "sagetrain", "own")
    assert made.sections[0].panels[1].y[0] == "gap/INT8"


def test_arms_that_settings_tell_apart_are_not_averaged(tmp_path: Path):
    for lr in (0.1, 0.2):
        for arm in ("bf16", "sage_int8"):
            scored(tmp_path / str(lr), arm, 0, 0.1, 0.3, config={"optim": {"lr": lr}})
    comparison = Comparison(find_runs([tmp_path]))
    assert len(comparison.arms) == 4
    panels = [panel for section in workspace(comparison, "a", "b", "own").sections[1:3] for panel in section.panels]
    assert panels and all(panel.groupby is None for panel in panels)


def test_runs_that_did_not_log_there_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture):
    for arm, config in (("bf16", {"logger": {"_target_": None}}), ("sage_int8", LOGGED), ("sdpa", {})):
        scored(tmp_path, arm, 0, 0.1, 0.3, config=config)
    assert main([str(tmp_path), "--wandb", "someone/sagetrain"]) == 2
    assert "--wandb: bf16-seed0, sdpa-seed0 did not log to Weights & Biases (logger=wandb)" in capsys.readouterr().err


def test_an_offline_run_holds_gaps_band_and_tables(parent: Path, capsys: pytest.CaptureFixture):
    assert main([str(parent), "--wandb", "someone/sagetrain"]) == 0
    assert "wandb sync" in " ".join(capsys.readouterr().out.split())
    (file,) = Path("wandb").glob("offline-run-*/*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in done.stdout.splitlines()]
    history = [record["history"]["item"] for record in records if record["type"] == "history"]
    comparison = Comparison(find_runs([parent]))
    last = [item for item in history if "gap/INT8" in item][-1]
    assert last["gap/INT8"] == pytest.approx(comparison.others[0].gap, abs=1e-12)
    assert last["band/above"] == -last["band/below"] == pytest.approx(comparison.band)
    assert (last["tokens"], last["trainer/global_step"]) == (64 * STEPS, STEPS)
    assert re.search(r'"arms.*table', json.dumps(history[-1])) and re.search(r'"scores.*table', json.dumps(history[-1]))


@pytest.mark.parametrize("target", ["sagetrain", "/sagetrain", "someone/", "a/b/c"])
def test_another_target_is_refused(parent: Path, capsys: pytest.CaptureFixture, target: str):
    assert main([str(parent), "--wandb", target]) == 2
    assert capsys.readouterr().err == f"sagetrain: error: --wandb: {target!r} is not ENTITY/PROJECT\n"

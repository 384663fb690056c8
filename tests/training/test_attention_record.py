"""run.json says what attention ran, and why its speed is no baseline."""

import json
from pathlib import Path

import pytest
import torch

from sagetrain.__main__ import compose
from sagetrain.integrations import bf16
from sagetrain.training.train import run
from tests.tiny import MODEL

TINY = [
    *("recipe=quickstart", "compare.arms=null", "trainer.accelerator=cpu", "trainer.precision=32-true", *MODEL),
    *("probe.every=0", "data.seq_len=32", "data.batch_size=2", "trainer.max_steps=2"),
    "trainer.enable_progress_bar=false",
]
WINDOW = ["model.config.model_type=mistral", "+model.config.sliding_window=8"]


@pytest.fixture
def facts(tmp_path: Path):
    """Trains with the given changes; returns (attention, handicap) of every run, by its name."""
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i} is {i + i}.\n\n" for i in range(500)))

    def go(*changes: str) -> dict[str, tuple[str, str | None]]:
        runs = run(compose([*TINY, f"data.path={text}", f"out={tmp_path / str(len(changes))}", *changes]))
        infos = [json.loads((out / "run.json").read_text()) for out in runs]
        return {info["name"]: (info["attention"], info["handicap"]) for info in infos}

    return go


def test_arms_of_packed_documents(facts, capsys) -> None:
    """Two rows a batch. On a CPU `bf16` is SDPA, document by document: a fair baseline."""
    found = facts("data.document_boundaries=true", "compare.arms=[bf16,sdpa,sage_int8]", "compare.seeds=1")
    fair = ("SDPA flash, one call for each document", None)
    assert found.pop("bf16-seed0") == found.pop("sdpa-seed0") == fair
    ((name, handicap),) = found.values()
    assert name.startswith("sage_int8 (cpu/") and handicap is None
    assert "bf16-seed0: attention SDPA flash, one call for each document\n" in capsys.readouterr().err


def test_handicaps_reach_run_json(facts, capsys) -> None:
    assert facts("attention=sdpa", *WINDOW) == {"sdpa-seed0": ("SDPA with a dense mask", bf16.DENSE)}
    assert f"its speed is no baseline: {bf16.DENSE}" in capsys.readouterr().err
    ((what, handicap),) = facts("attention.implementation=eager").values()
    assert what == "eager" and "nobody watched" in handicap


def test_every_compiled_run_of_a_process_is_watched(facts, monkeypatch) -> None:
    """The graphs of the run before would hide what the next one runs."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **{**k, "backend": "eager"}))
    found = facts("compare.arms=[bf16,sage_int8]", "compare.seeds=2", "model.compile=true")
    assert found["bf16-seed0"] == found["bf16-seed1"] == ("SDPA flash", None)


def test_graph_breaks_are_those_of_the_run_itself(facts, tmp_path: Path, monkeypatch) -> None:
    """The arm before, which calls SDPA document by document, breaks its layers; INT8 does not."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **{**k, "backend": "eager"}))
    facts("compare.arms=[bf16,sage_int8]", "compare.seeds=1", "model.compile=true", "data.document_boundaries=true")
    found = {path.parent.name: json.loads(path.read_text()) for path in tmp_path.glob("4/*/run.json")}
    assert found["bf16-seed0"]["graph_breaks"] and found["sage_int8-seed0"]["graph_breaks"] == []
    assert all(info["compile_s"] > 0 for info in found.values())


def test_graphs_of_little_memory_are_whole(facts, tmp_path: Path, monkeypatch) -> None:
    """Micro-batches of other documents compile anew, and find gradients in FP32 on weights in BF16."""
    documents = tmp_path / "documents.jsonl"
    documents.write_text("".join(json.dumps({"text": "lime " * (1 + i * i % 7)}) + "\n" for i in range(200)))
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda *a, **k: real(*a, **{**k, "backend": "eager"}))
    facts(
        *("memory=24gb", "trainer.precision=bf16-true", "trainer.accumulate_grad_batches=4", "model.compile=true"),
        *("data.document_boundaries=true", f"data.path={documents}"),
    )
    (info,) = (json.loads(path.read_text()) for path in tmp_path.glob("6/**/run.json"))
    assert info["graph_breaks"] == [] and info["compile_s"] > 0

"""metrics.csv keeps one row per step whatever happens, and the drift probe only looks."""

import csv
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import sagetrain
from sagetrain.__main__ import compose
from sagetrain.compare import figures
from sagetrain.data.collate import packed, padded
from sagetrain.training.callbacks import (
    OF_LAYERS,
    PROBE,
    Probe,
    RunLog,
    beginning,
    captured,
    first_document,
    gradient_errors,
    probe_columns,
)
from sagetrain.training.module import CausalLM
from sagetrain.training.train import run
from tests import kernelkit

TINY = [
    "recipe=quickstart",
    "compare.arms=null",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.max_steps=6",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=1",
    "model.config.num_key_value_heads=1",
    "data.seq_len=64",
    "data.batch_size=2",
    "trainer.enable_progress_bar=false",
]


def train(folder: Path, *changes: str) -> list[dict[str, str]]:
    text = folder / "text.txt"
    text.write_text("".join(f"{i} and {i} is {i + i}.\n" for i in range(500)))
    (out,) = run(compose([*TINY, f"data.path={text}", *changes]))
    with open(out / "metrics.csv") as file:
        return list(csv.DictReader(file))


def test_probe_measures_and_leaves_training_untouched(tmp_path: Path) -> None:
    probed = train(tmp_path, "probe.every=2", f"out={tmp_path / 'probed'}")
    plain = train(tmp_path, "probe.every=0", f"out={tmp_path / 'plain'}")
    for column in ("step", "loss", "grad_norm", "lr"):
        assert [r[column] for r in probed] == [r[column] for r in plain]
    assert not any(c.startswith("probe/") for c in plain[0])
    assert [bool(r["probe/loss_lowbit"]) for r in probed] == [False, True] * 3
    for row in probed[1::2]:
        values = {c: float(row[c]) for c in probe_columns(layers=2)}
        assert all(map(math.isfinite, values.values()))
        assert 0.9 < values["probe/grad_cosine"] < 1.0
        assert 0 < abs(values["probe/loss_bf16"] - values["probe/loss_lowbit"]) < 0.05
        assert all(values[f"probe/sigma_{x}_layer{i}"] > 0 for x in "qk" for i in range(2))
        assert all(1e-3 < values[f"probe/d{x}_error_layer{i}"] < 0.1 for x in "qk" for i in range(2))
        assert values["probe/ds_rowsum"] >= 0


def test_errors_of_the_probe_are_those_of_the_kernel() -> None:
    case = kernelkit.Case(hq=4, hkv=2, tq=150, tk=150, d=40, kind="masked", dtype=torch.float32)
    truth, got = kernelkit.exact(case), kernelkit.run(sagetrain.attention, case)
    errors = [kernelkit.error(got[name], truth[name]) for name in ("d_q", "d_k")]
    assert gradient_errors(*case.tensors(), "sage_int8") == pytest.approx(errors, rel=1e-3)


def test_the_probe_keeps_what_the_scheme_gets_under_autocast() -> None:
    """Queries and keys are float32 there: rotary embeddings are, and attention casts."""
    name, layers = captured("sage_int8")
    q, k, v = (torch.randn(1, heads, 20, 64, requires_grad=True) for heads in (2, 1, 1))
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = ALL_ATTENTION_FUNCTIONS[name](torch.nn.Module(), q, k, v, None)
    out.sum().backward()
    assert [x.dtype for x in layers[0]] == [torch.bfloat16] * 4


@pytest.mark.gpu
def test_probe_on_a_gpu(tmp_path: Path) -> None:
    rows = train(
        tmp_path, "probe.every=3", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed", f"out={tmp_path / 'run'}"
    )
    for row in rows[2::3]:
        values = {c: float(row[c]) for c in probe_columns(layers=2)}
        assert 0.9 < values["probe/grad_cosine"] < 1.0
        assert all(1e-3 < values[f"probe/d{x}_error_layer{i}"] < 0.1 for x in "qk" for i in range(2))


def test_the_report_names_what_the_probe_says_of_layers() -> None:
    assert tuple(figures.OF_LAYERS) == OF_LAYERS


def test_the_last_step_is_validated_too(tmp_path: Path) -> None:
    """Every fourth micro-batch is, and the last one, the seventh, here."""
    (held := tmp_path / "held.txt").write_text("".join(f"{i} is no {i + 1}.\n" for i in range(100)))
    changes = [f"data.val_path={held}", "trainer.limit_val_batches=1", "trainer.val_check_interval=4"]
    rows = train(tmp_path, *changes, "trainer.max_steps=7", "probe.every=0", f"out={tmp_path / 'run'}")
    assert [bool(row["val_loss"]) for row in rows] == [False, False, False, True, False, False, True]
    rows = train(tmp_path, *changes, "trainer.max_steps=2", "probe.every=0", f"out={tmp_path / 'short'}")
    assert [bool(row["val_loss"]) for row in rows] == [False, True]


@pytest.mark.parametrize("kind", ["attention_saved", "full"])
def test_probe_of_recomputed_layers(tmp_path: Path, kind: str) -> None:
    plain, again = (
        train(tmp_path, "probe.every=1", "trainer.max_steps=1", f"model.checkpointing={how}", f"out={tmp_path / how}")
        for how in ("none", kind)
    )
    columns = probe_columns(layers=2)
    assert [again[0][c] for c in columns] == [plain[0][c] for c in columns]


def test_probe_on_packed_documents_and_off_in_bf16(tmp_path: Path) -> None:
    packed = train(
        tmp_path, "probe.every=3", "data.document_boundaries=true", "data.batch_size=1", f"out={tmp_path / 'p'}"
    )
    assert all(packed[2][c] for c in PROBE)
    plain = train(tmp_path, "probe.every=3", "attention=bf16", f"out={tmp_path / 'b'}")
    assert not any(c.startswith("probe/") for c in plain[0])


def test_probe_holds_the_beginning_of_a_row() -> None:
    rows = [(np.arange(12) + 100 * i, starts) for i, starts in enumerate(([0, 3, 8], [0, 5]))]
    for whole, tokens in (
        (packed(rows), 10),
        (packed(rows), 8),
        (packed(rows), 99),
        (packed(rows, boundaries=False), 6),
    ):
        cut, width = beginning(whole, tokens), min(tokens, 12)
        starts = [x for x in (0, 3, 8) if x < width]
        alone = packed([(np.arange(width), starts)], boundaries="position_ids" in whole)
        assert cut.keys() == alone.keys()
        for key, value in alone.items():
            assert torch.equal(cut[key], value) if isinstance(value, torch.Tensor) else cut[key] == value
    examples = [(np.arange(9), 2), (np.arange(5), 1)]
    assert beginning(padded(examples, 0), 4)["input_ids"].shape == (1, 4)
    assert beginning(padded(examples, 0), 2)["input_ids"].shape == (1, 9)  # two tokens of prompt: no target


def test_probe_takes_no_more_tokens_than_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, gradients = [], Probe._gradients

    def watched(module: CausalLM, batch: dict, attention: str) -> tuple:
        hook = module.model.register_forward_pre_hook(
            lambda _, args, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
        )
        try:
            return gradients(module, batch, attention)
        finally:
            hook.remove()

    monkeypatch.setattr(Probe, "_gradients", staticmethod(watched))
    train(tmp_path, "probe.every=1", "trainer.max_steps=1", "probe.max_tokens=24", f"out={tmp_path / 'run'}")
    assert seen == [24, 24]


def test_rows_beyond_the_checkpoint_and_half_rows_are_dropped(tmp_path: Path) -> None:
    trainer = SimpleNamespace(global_step=2, is_global_zero=True, loggers=[])
    rows = "1,10,0.5,\n2,20,0.25,0.75\n3,30,0.125,\n4,40,0.0"
    (tmp_path / "metrics.csv").write_text(f"step,tokens,loss,probe/loss_int8\n{rows}")  # its former name
    log = RunLog(tmp_path, {}, extra=("probe/grad_cosine", "probe/loss_lowbit"))
    log._open(trainer.global_step)
    for step in (3, 4):
        log.row = {"step": step, "loss": 1 / step}
        log._last_row = log._file.seek(0, 2)
        log._write()
        trainer.global_step = step
        if step == 3:
            log.amend(trainer, {"val_loss": 7.0})
    log.close()
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [r["step"] for r in rows] == ["1", "2", "3", "4"]
    assert [r["val_loss"] for r in rows] == ["", "", "7.0", ""]
    assert rows[1]["loss"] == "0.25" and rows[3]["loss"] == "0.25" and rows[0]["probe/grad_cosine"] == ""
    assert rows[1]["probe/loss_lowbit"] == "0.75" and "probe/loss_int8" not in rows[1]


def test_a_row_in_the_place_of_a_longer_one(tmp_path: Path) -> None:
    """Validation twice at one step, whose second loss has fewer digits."""
    log, trainer = RunLog(tmp_path, {}), SimpleNamespace(global_step=1, is_global_zero=True, loggers=[])
    log._open(1)
    log.row, log._last_row = {"step": 1, "loss": 0.5}, log._file.seek(0, 2)
    for value in (5.123456789, 5.5):
        log.amend(trainer, {"val_loss": value})
    log.close()
    (row,) = csv.DictReader((text := (tmp_path / "metrics.csv").read_text()).splitlines())
    assert (row["step"], row["val_loss"]) == ("1", "5.5") and len(text.split("\n")) == 3


@pytest.mark.parametrize(
    ("batch", "length"),
    [
        ({"input_ids": torch.zeros(1, 6)}, 6),
        ({"input_ids": torch.zeros(1, 6), "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]])}, 3),
        ({"input_ids": torch.zeros(1, 4), "position_ids": torch.tensor([[0, 1, 2, 3]])}, 4),
        ({"input_ids": torch.zeros(1, 4), "attention_mask": torch.tensor([[1, 1, 0, 0]])}, 2),
    ],
)
def test_first_document(batch: dict[str, torch.Tensor], length: int) -> None:
    assert first_document(batch) == length

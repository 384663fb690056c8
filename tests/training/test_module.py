"""One device: which targets a step weighs, where its weights come from, when the host waits, what ends a run."""

import csv
import math
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import steps_worker as worker
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import DictConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from sagetrain.data.loader import Batches
from sagetrain.integrations import lightning as strategies
from sagetrain.training import callbacks, layers, loss, module
from sagetrain.training.callbacks import RunLog
from sagetrain.training.module import CausalLM, model_config

QUIET = dict(
    devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    use_distributed_sampler=False, num_sanity_val_steps=0,
)  # fmt: skip
CLOSE = {"rel": 1e-5}  # fp32, and which examples are padded together, against fp64


class Run:
    """Trains the worker's model in this process. `cfg` may be changed before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cfg = worker.config(folder)
        self.cfg.data.batch_size = 2  # 11 micro-batches an epoch
        self.module: CausalLM | None = None

    def frozen(self) -> DictConfig:
        """With a learning rate of 0 the loss of a step says which targets it weighed, and how."""
        self.cfg.optim.lr = 0.0
        return self.cfg

    def fit(
        self, *more: L.Callback, batches: list[Any] | None = None, start: Path | None = None, **options: Any
    ) -> list[dict[str, float]]:
        log = RunLog(self.folder, {})
        self.module = CausalLM(self.cfg)
        trainer = L.Trainer(
            **QUIET | {"accelerator": "cpu", "limit_val_batches": 0, "log_every_n_steps": 1} | options,
            callbacks=[log, *more],
        )
        try:
            if batches is None:
                trainer.fit(self.module, datamodule=worker.data(self.cfg), ckpt_path=start)
            else:
                trainer.fit(self.module, train_dataloaders=Batches(batches))
        finally:
            log.close()
        return self.rows()

    def rows(self) -> list[dict[str, float]]:
        with open(self.folder / "metrics.csv") as file:
            return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

    def model(self) -> torch.nn.Module:
        torch.manual_seed(self.cfg.seed)
        return AutoModelForCausalLM.from_config(model_config(self.cfg.model), attn_implementation="sdpa")

    def losses(self, *steps: int) -> list[float]:
        """What steps of so many micro-batches have to give, from the beginning of the data, with frozen weights."""
        model, stream = self.model(), worker.data(self.cfg).stream
        at, found = stream.start, []
        for step in steps:
            parts = []
            for _ in range(step):
                batch, at = next(stream.batches(at, 0, 1))
                parts.append(sums(model, batch))
            found.append(sum(loss for loss, _ in parts) / sum(count for _, count in parts))
        return found


def sums(model: torch.nn.Module, batch: dict[str, Any]) -> tuple[float, int]:
    """Sum of the token losses, and their number."""
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    target = batch["labels"][:, 1:].flatten()
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target, reduction="sum")
    return float(loss), int((target != -100).sum())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def of(rows: list[dict[str, float]], column: str = "loss") -> list[float]:
    return [row[column] for row in rows]


# --- Targets ---


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"accumulate_grad_batches": 4, "max_epochs": 2}, (4, 4, 3, 4, 4, 3)),
        ({"accumulate_grad_batches": 2, "limit_train_batches": 3, "max_steps": 5}, (2, 1, 2, 1, 2)),
        ({"accumulate_grad_batches": 3, "limit_train_batches": 0.5, "max_steps": 4}, (3, 2, 3, 2)),
        ({"max_steps": 3}, (1, 1, 1)),
    ],
    ids=["epochs", "limit", "share", "alone"],
)
def test_a_step_weighs_its_targets_alike(run: Run, options: dict[str, Any], steps: tuple[int, ...]) -> None:
    run.frozen()
    assert of(run.fit(**options)) == pytest.approx(run.losses(*steps), **CLOSE)


def test_accumulation_may_change_between_epochs(run: Run) -> None:
    run.frozen()
    rows = run.fit(GradientAccumulationScheduler({0: 2, 1: 3}), max_epochs=2, limit_train_batches=5)
    assert of(rows) == pytest.approx(run.losses(2, 2, 1, 3, 2), **CLOSE)


def test_a_run_that_goes_on_within_a_step_weighs_what_is_left_of_it(run: Run) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(run.folder / "within.ckpt")

    run.frozen()
    options = {"accumulate_grad_batches": 2, "max_steps": 4}
    whole = run.fit(Save(), **options)
    assert of(whole) == pytest.approx(run.losses(2, 2, 2, 2), **CLOSE)
    rows = run.fit(start=run.folder / "within.ckpt", **options)
    assert of(rows) == pytest.approx([whole[0]["loss"], run.losses(3, 1)[1], *of(whole[2:])], **CLOSE)


def test_micro_batches_of_another_size_within_an_epoch_are_refused(run: Run) -> None:
    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx in (3, 10):  # after two steps, and at the end of the epoch
                trainer.save_checkpoint(run.folder / f"{batch_idx}.ckpt")

    run.fit(Save(), accumulate_grad_batches=2, max_steps=6)
    run.cfg.data.batch_size = 4
    with pytest.raises(ValueError, match="of 2 rows a micro-batch on all ranks, and here they have 4"):
        run.fit(start=run.folder / "3.ckpt", accumulate_grad_batches=2, max_steps=8)
    assert run.fit(start=run.folder / "10.ckpt", accumulate_grad_batches=2, max_steps=8)[-1]["step"] == 8


def test_accumulation_that_changes_under_a_batch_is_refused(run: Run) -> None:
    class Change(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            trainer.accumulate_grad_batches = 3

    with pytest.raises(NotImplementedError, match="accumulate_grad_batches went from 2 to 3 after a batch was read"):
        run.fit(Change(), accumulate_grad_batches=2, max_steps=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overfit_batches": 2, "max_steps": 2}, "trainer.overfit_batches=2 is not supported"),
        ({"accumulate_grad_batches": True, "max_steps": 2}, "batches=True must be a whole number"),
        ({"accumulate_grad_batches": {0: 2}, "max_steps": 2}, "GradientAccumulationScheduler"),
        ({"accumulate_grad_batches": 0, "max_steps": 2}, "whole number of at least 1"),
    ],
)
def test_what_the_data_cannot_do_is_refused(run: Run, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.fit(**options)


def test_pretraining_data_has_no_epochs(run: Run) -> None:
    text = run.folder / "text.txt"
    text.write_text("some words\n" * 500)
    run.cfg.data = {"kind": "pretrain", "path": str(text), "seq_len": 64, "batch_size": 2, "val_documents": 0}
    with pytest.raises(ValueError, match="trainer.max_epochs=2: pre-training data has no end"):
        run.fit(max_epochs=2, max_steps=3)
    assert len(run.fit(max_steps=3, accumulate_grad_batches=2)) == 3


def micro_batches(run: Run, labelled: list[bool], counted: bool) -> list[dict[str, Any]]:
    """Batches of somebody else's loader, some without any target."""
    stream, at, batches = worker.data(run.cfg).stream, {"epoch": 0, "row": 0}, []
    for label in labelled:
        batch, at = next(stream.batches(at, 0, 1))
        batch["labels"] = batch["labels"] if label else torch.full_like(batch["labels"], -100)
        batches.append(batch)
    total = sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    return [batch | ({"num_items_in_batch": total} if counted else {}) for batch in batches]


def test_a_micro_batch_without_targets_weighs_nothing(run: Run) -> None:
    run.frozen()
    batches = micro_batches(run, [False, True, False], counted=True)
    (row,) = run.fit(batches=batches, accumulate_grad_batches=3, max_steps=1)
    loss, count = sums(run.model(), batches[1])
    assert row["loss"] == pytest.approx(loss / count, **CLOSE) and row["grad_norm"] > 0


def test_a_step_without_targets_changes_nothing(run: Run) -> None:
    run.cfg.optim.weight_decay = 0.0
    rows = run.fit(batches=micro_batches(run, [False, False], counted=False), max_steps=2)
    assert of(rows) == [0, 0] and of(rows, "grad_norm") == [0, 0]
    for mine, new in zip(run.module.model.parameters(), run.model().parameters(), strict=True):
        assert torch.equal(mine, new)


def test_batches_of_another_loader(run: Run) -> None:
    run.frozen()
    batches = micro_batches(run, [True, True], counted=False)
    assert of(run.fit(batches=batches, max_steps=2)) == pytest.approx(run.losses(1, 1), **CLOSE)
    with pytest.raises(ValueError, match="accumulate_grad_batches=2 needs to know the targets of a whole optimizer"):
        run.fit(batches=batches, accumulate_grad_batches=2, max_steps=1)


def test_a_count_that_a_loader_gives_again_stays_as_it_was(run: Run, monkeypatch) -> None:
    run.frozen()
    monkeypatch.setattr(CausalLM, "_over_ranks", lambda self, x: x.mul_(2))  # two equal ranks
    (batch,) = micro_batches(run, [True], counted=True)
    batch["num_items_in_batch"] = torch.tensor(batch["num_items_in_batch"])
    first, second = of(run.fit(batches=[batch, batch], max_steps=2))
    assert first == second


@pytest.mark.parametrize("size", [1, 2, 5])
def test_validation_does_not_depend_on_the_batch_size(run: Run, size: int) -> None:
    stream = worker.data(run.cfg).stream
    parts = [sums(run.model(), stream.collate([row])) for row in stream.held_out]
    run.cfg.data.batch_size = size
    trainer = L.Trainer(**QUIET, accelerator="cpu")
    trainer.validate(CausalLM(run.cfg), worker.data(run.cfg), verbose=False)
    expected = sum(loss for loss, _ in parts) / sum(count for _, count in parts)
    assert float(trainer.callback_metrics["val_loss"]) == pytest.approx(expected, **CLOSE)


# --- Weights ---


def test_weights_are_those_of_the_seed_whatever_the_device_and_what_was_drawn_before(run: Run, monkeypatch) -> None:
    run.frozen()
    # On a GPU a strategy sets that device while the model is built; `meta` is the one that a CPU has.
    monkeypatch.setattr(SingleDeviceStrategy, "tensor_init_context", lambda *_, **__: torch.device("meta"))
    torch.manual_seed(99)
    before = torch.get_rng_state()
    run.fit(max_steps=1)
    for mine, new in zip(run.module.model.parameters(), run.model().parameters(), strict=True):
        assert torch.equal(mine, new)
    torch.set_rng_state(before)
    trainer = L.Trainer(**QUIET, accelerator="cpu")
    again = CausalLM(run.cfg)
    again.trainer = trainer
    again.configure_model()
    assert torch.equal(torch.get_rng_state(), before)  # dropout, say, does not depend on the size of the model


def test_no_decay_on_vectors_and_no_empty_group(run: Run) -> None:
    run.fit(max_steps=1)
    decayed, plain = run.module.optimizers().param_groups
    assert decayed["weight_decay"] == 10 and all(p.ndim == 2 for p in decayed["params"])
    assert plain["weight_decay"] == 0 and all(p.ndim == 1 for p in plain["params"])
    for p in plain["params"]:
        p.requires_grad_(False)
    (group,) = run.module.configure_optimizers()["optimizer"].param_groups
    assert group["weight_decay"] == 10


# --- How it is trained ---


def test_a_frequency_of_rope_stays_fp32_whatever_the_precision(run: Run) -> None:
    """In bf16 the angle of position 16,000 would be off by up to 60 radians."""
    run.fit(max_steps=1, precision="bf16-true")
    weights = {p.dtype for p in run.module.parameters()}
    (name, frequencies), *_ = [x for x in run.module.model.named_buffers() if x[0].endswith("inv_freq")]
    assert weights == {torch.bfloat16}
    assert torch.equal(frequencies, dict(run.model().named_buffers())[name]) and frequencies.dtype == torch.float32


def test_a_buffer_that_was_learned_is_that_of_the_checkpoint(run: Run, monkeypatch, tmp_path: Path) -> None:
    class Learns(L.Callback):
        def on_train_end(self, trainer: L.Trainer, pl_module: CausalLM) -> None:
            pl_module.model.kept.fill_(1.001)  # bf16 has no such number
            trainer.save_checkpoint(tmp_path / "kept.ckpt")

    zero = torch.zeros(1)
    monkeypatch.setattr(module, "prepare", lambda model, how: model.register_buffer("kept", zero.clone()))
    run.fit(Learns(), max_steps=1, precision="bf16-true")
    run.fit(max_steps=2, precision="bf16-true", start=tmp_path / "kept.ckpt")
    assert torch.equal(run.module.model.kept, torch.tensor([1.001]))


def cosine(step: int) -> float:
    return step / 2 if step < 2 else 0.1 + 0.9 * (1 + math.cos(math.pi * (step - 2) / 8)) / 2


def linear(step: int) -> float:
    return step / 2 if step < 2 else (10 - step) / 8


def wsd(step: int, decay: int) -> float:
    return 0.1 + 0.9 * min(1.0, step / 2, 1 - math.sqrt(max(0.0, (step - 10 + decay) / decay)))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"schedule": "cosine"}, cosine),
        ({"schedule": "linear", "min_lr_ratio": 0.0}, linear),
        ({"schedule": "linear"}, lambda step: 0.1 + 0.9 * linear(step)),
        ({"schedule": "wsd"}, partial(wsd, decay=2)),
        ({"schedule": "wsd", "decay_steps": 4}, partial(wsd, decay=4)),
    ],
)
def test_schedules(run: Run, settings: dict, expected: Callable[[int], float]) -> None:
    run.cfg.optim.update({"lr": 1.0, "warmup_steps": 2, "min_lr_ratio": 0.1} | settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = module.learning_rates(optimizer, run.cfg.optim, 10)
    found = []
    for _ in range(10):
        found += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert found == pytest.approx([expected(step) for step in range(10)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"optim": {"kind": "adam"}}, ValueError, "optim.kind=adam: choose adamw or adamw8bit"),
        (
            {"optim": {"kind": "adamw8bit"}},
            ModuleNotFoundError,
            "optim.kind=adamw8bit: no package torchao: pip install",
        ),
        ({"model": {"linear": "float8"}}, ModuleNotFoundError, "model.linear=float8: no package torchao"),
    ],
)
def test_choices_that_cannot_be(run: Run, monkeypatch, change: dict, error: type[Exception], message: str) -> None:
    for name in ("torchao", "torchao.optim", "torchao.float8"):
        monkeypatch.setitem(sys.modules, name, None)
    run.cfg.merge_with(change)
    with pytest.raises(error, match=message):
        run.fit(max_steps=1)


def test_moments_in_8_bits_are_refused_where_weights_are_shards(run: Run) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        shard = distribute_tensor(torch.zeros(2, 2), init_device_mesh("cpu", (1,)), [Shard(0)])
        run.cfg.optim.kind = "adamw8bit"
        with pytest.raises(ValueError, match="optim.kind=adamw8bit does not run under FSDP2"):
            module.optimizer_of(run.cfg.optim, [{"params": [torch.nn.Parameter(shard)]}], fused=False)
    finally:
        torch.distributed.destroy_process_group()


def test_a_loss_that_cannot_be_fused_is_refused_or_left_alone(run: Run) -> None:
    run.cfg.model.config = {
        "model_type": "granite", "vocab_size": 264, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 1, "num_key_value_heads": 1, "logits_scaling": 4.0,
    }  # fmt: skip
    run.fit(max_steps=1)
    run.cfg.model.fused_loss = True
    with pytest.raises(ValueError, match="model.fused_loss=true: the loss of GraniteForCausalLM is more than a linear"):
        run.fit(max_steps=1)


@pytest.mark.parametrize("settings", [{"checkpointing": "attention_saved"}, {"compile": True}, {"fused_loss": False}])
def test_how_it_is_computed_changes_no_step(run: Run, settings: dict) -> None:
    run.cfg.attention.implementation = "sage_int8"
    plain = run.fit(max_steps=3, accumulate_grad_batches=2)
    run.cfg.model.update(settings)
    found = run.fit(max_steps=3, accumulate_grad_batches=2)
    for column in ("loss", "grad_norm"):  # INT8 may round to the neighbour
        assert of(found, column) == pytest.approx(of(plain, column), rel=0.0 if "checkpointing" in settings else 2e-3)


# --- What is waited for, and what is written ---

OURS = {x.__file__ for x in (module, callbacks, strategies, loss, layers)}


class Step(L.Callback):
    """Knows the optimizer step under way."""

    now = 0

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.now = trainer.global_step + 1


class Reads(TorchDispatchMode):
    """Collects in which step our own code reads a value of a tensor on the host."""

    def __init__(self, step: Callable[[], int]) -> None:
        super().__init__()
        self.step, self.steps = step, set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default:
            callers = [frame.filename for frame in traceback.extract_stack()[:-1]]
            reader = next(file for file in reversed(callers) if file != __file__ and "/torch/" not in file)
            if reader in OURS:
                self.steps.add(self.step())
        return function(*args, **kwargs or {})


def test_only_logged_steps_are_waited_for(run: Run) -> None:
    step = Step()
    with Reads(lambda: step.now) as reads:
        rows = run.fit(step, max_steps=7, log_every_n_steps=3, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert reads.steps == {3, 6, 7} and of(rows, "step") == [3, 6, 7]


@pytest.mark.gpu
def test_only_logged_steps_synchronise_a_gpu(run: Run) -> None:
    class Strict(Step):
        def on_train_start(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("warn")

        def on_train_end(self, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    strict, seen = Strict(), set()

    def note(message: Warning, category: type[Warning], filename: str, *_: Any, **__: Any) -> None:
        if filename in OURS and "synchroniz" in str(message):
            seen.add(strict.now)

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        run.fit(strict, accelerator="gpu", max_steps=7, log_every_n_steps=3, gradient_clip_val=0.5)
    assert seen == {3, 6, 7}


def test_every_row_counts_all_tokens_and_the_last_step_has_one(run: Run) -> None:
    often = of(run.fit(max_epochs=1, accumulate_grad_batches=2), "tokens")
    rows = run.fit(max_epochs=1, accumulate_grad_batches=2, log_every_n_steps=4)
    assert len(often) == 6 and of(rows, "step") == [4, 6] and of(rows, "tokens") == [often[3], often[5]]
    assert all(row["tokens_per_s"] * row["step_ms"] > 0 for row in rows)


def test_a_validated_step_has_a_row(run: Run) -> None:
    options = {"val_check_interval": 2, "check_val_every_n_epoch": None, "limit_val_batches": 1.0}
    rows = run.fit(max_steps=5, log_every_n_steps=5, **options)
    assert of(rows, "step") == [2, 4, 5] and ["val_loss" in row for row in rows] == [True, True, False]


# --- What is not finite ---


def spoil(monkeypatch: pytest.MonkeyPatch, index: int) -> None:
    """The gradient of this micro-batch overflows, its loss does not."""
    step = CausalLM.training_step

    def training_step(self: CausalLM, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = step(self, batch, batch_idx)
        if batch_idx == index:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    monkeypatch.setattr(CausalLM, "training_step", training_step)


@pytest.mark.parametrize(
    ("every", "message"),
    [
        (1, "gradient of step 2 is not finite .*norm (nan|inf)"),
        (4, "the gradient of step 2 is not finite .step 4"),
    ],
)
def test_a_gradient_that_is_not_finite_ends_the_run(run: Run, monkeypatch, every: int, message: str) -> None:
    class Saves(L.Callback):
        """Asks before it would save, at a step without a row too."""

        finite: list[bool] = []

        def on_train_batch_end(self, trainer: L.Trainer, module: CausalLM, *_: Any) -> None:
            self.finite.append(module.finite())

    spoil(monkeypatch, 1)
    saves = Saves()
    saves.finite = []
    with pytest.raises(FloatingPointError, match=message):
        run.fit(saves, max_steps=8, log_every_n_steps=every)
    assert saves.finite == [True, False, False][: 1 if every == 1 else 3]


def overflow(monkeypatch: pytest.MonkeyPatch, layer: str, micro_batch: int, backward: bool = False) -> None:
    """What this layer makes of one micro-batch, or its gradient, is not finite, whoever runs the model on it."""
    build = CausalLM.configure_model

    def configure_model(self: CausalLM) -> None:
        build(self)
        seen: list[torch.Tensor] = []

        def note(model: torch.nn.Module, args: Any, inputs: dict[str, Any]) -> None:
            seen[:] = [inputs["input_ids"]]

        def spoilt(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
            ids = bad["input_ids"]
            if seen[0].shape != ids.shape or not torch.equal(seen[0], ids):
                return None
            if backward and not output.requires_grad:
                return None
            if backward:
                output.register_hook(lambda grad: grad * float("inf"))
                return None
            return output * float("inf")

        stream = worker.data(self.cfg).stream
        at = stream.start
        for _ in range(micro_batch):
            bad, at = next(stream.batches(at, 0, 1))
        self.model.register_forward_pre_hook(note, with_kwargs=True)
        self.model.get_submodule(layer).register_forward_hook(spoilt)

    monkeypatch.setattr(CausalLM, "configure_model", configure_model)


FUSED = partial(torch.optim.AdamW, fused=True)


@pytest.mark.parametrize("optimizer", [None, FUSED], ids=["left out", "told"])
@pytest.mark.parametrize(
    ("layer", "backward", "said"),
    [
        ("model.layers.1.mlp.act_fn", False, r"first output that is not finite is that of model.layers.1.mlp.act_fn, "
         r"in micro-batch 2 of 2 \(2 rows, this rank's of the 2 that follow {'epoch': 0, 'row': 6} in the data\)"),
        ("lm_head", False, r"first output that is not finite is that of lm_head, in micro-batch 2 of 2 \(.*\)"),
        ("model.layers.0.mlp.act_fn", True, r"first gradient that is not finite is that of model.layers.0\.\S+ "
         r"\(\d+ of 2\d\), in a step of 2 micro-batches \(4 rows, .* 4 that follow {'epoch': 0, 'row': 4} in .*\)"),
    ],
)  # fmt: skip
def test_batch_and_layer_of_a_bad_step_are_named(run: Run, monkeypatch, optimizer, layer, backward, said) -> None:
    """Weights and moments stay as they were: what is looked for afterwards would be lost in spoilt ones."""
    run.cfg.model.fused_loss = False
    if optimizer:
        monkeypatch.setattr(module, "optimizer_of", lambda optim, groups, *_, **__: optimizer(groups, lr=optim.lr))
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    before = run.fit(max_steps=1, **options)
    weights = [p.detach().clone() for p in run.module.model.parameters()]
    overflow(monkeypatch, layer, 4, backward)
    with pytest.raises(FloatingPointError, match=f"step 2 is not finite .*. The {said}. There is no checkpoint"):
        run.fit(max_steps=8, **options)
    assert run.rows()[0]["loss"] == before[0]["loss"] and len(run.rows()) == 2
    mine = list(run.module.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(mine, weights, strict=True))
    state = run.module.trainer.optimizers[0].state
    assert all(x.isfinite().all() for p in mine for x in state[p].values()) and int(state[mine[0]]["step"]) == 1


def test_a_bad_step_that_is_seen_later_says_what_would_tell_more(run: Run, monkeypatch) -> None:
    spoil(monkeypatch, 1)
    said = "gradient of step 2 .*The batch of step 2 is gone by step 4; with trainer.log_every_n_steps=1 it is named"
    with pytest.raises(FloatingPointError, match=said):
        run.fit(max_steps=8, log_every_n_steps=4)


def test_an_overflow_that_a_loss_scaler_leaves_out_is_normal(run: Run, monkeypatch) -> None:
    spoil(monkeypatch, 1)
    scaled = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    rows = run.fit(max_steps=4, plugins=[scaled])
    assert [math.isfinite(row["grad_norm"]) for row in rows] == [True, False, True, True]
    assert all(p.isfinite().all() for p in run.module.model.parameters()) and run.module.finite()

"""What the recipe needs of a GPU's memory: Llama-1B with 16K tokens in a micro-batch."""

import json
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from lightning.pytorch import Trainer
from transformers import AutoModelForCausalLM

from sagetrain.__main__ import compose
from sagetrain.training import train
from sagetrain.training.allocator import SETTINGS
from sagetrain.training.callbacks import RunLog
from sagetrain.training.module import model_config, prepare
from sagetrain.training.train import run
from tests.tiny import MODEL, RUN


def pretrain(tmp_path: Path, *overrides: str) -> dict:
    """Two steps of two micro-batches of 16K and a probe; what run.json says of them."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": "a lone lime " * (20 + i * i % 3000)}) + "\n" for i in range(200)))
    (folder,) = run(compose([
        "recipe=llama1b_pretrain", "model.tokenizer=byte", f"data.path={text}", "data.val_documents=1",
        "data.seq_len=16384", "trainer.max_steps=2", "trainer.accumulate_grad_batches=2", "trainer.limit_val_batches=0",
        "checkpoint.keep=none", "checkpoint.every_n_steps=0", "checkpoint.every_minutes=0", "probe.every=1",
        f"out={tmp_path / 'run'}", *overrides,
    ]))  # fmt: skip
    return json.loads((folder / "run.json").read_text())


@pytest.mark.gpu
@pytest.mark.parametrize(("memory", "gib"), [("24gb", 23), ("80gb", 76)])
def test_llama1b_at_16k(tmp_path: Path, memory: str, gib: int) -> None:
    whole = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(gib * 2**30 / whole)
    try:
        facts = pretrain(tmp_path, f"memory={memory}")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert facts["status"] == "finished" and facts["peak_gib"] < gib and facts["graph_breaks"] == []


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize(("memory", "hidden", "inner"), [("80gb", 2 * 13.9, 2 * 6), ("24gb", 11.9 + 5.4, 6)])
def test_what_layers_keep_for_the_backward(memory: str, hidden: float, inner: float) -> None:
    """Two layers more, by the arithmetic of docs/pretraining.md: T (`hidden` H + `inner` F) bytes."""
    tokens, config = 96, {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "head_dim": 64}
    config |= {"num_key_value_heads": 1, "vocab_size": 272}

    def kept(layers: int) -> int:
        shape = [f"model.config.{key}={value}" for key, value in (config | {"num_hidden_layers": layers}).items()]
        cfg = compose(["recipe=quickstart", "compare.arms=null", "model.compile=true", f"memory={memory}", *shape])
        mixed = memory == "80gb"
        dtype = torch.float32 if mixed else torch.bfloat16
        model = AutoModelForCausalLM.from_config(model_config(cfg.model), dtype=dtype).train()
        prepare(model, cfg.model)
        model.set_attn_implementation("sage_int8")
        sizes = {}

        def keep(x: torch.Tensor) -> torch.Tensor:
            if tokens in x.shape:  # no weight, and none of its casts
                sizes[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
            return x

        ids = torch.arange(tokens)[None]
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=mixed),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x),
        ):
            model(input_ids=ids, labels=ids, use_cache=False)
        return sum(size for _, size in sizes.values())

    more = (kept(4) - kept(2)) / tokens
    assert more == pytest.approx(hidden * 256 + inner * 1024, rel=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_moments_in_8_bits_are_kept_by_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """memory=24gb on a CPU: weights in BF16, and after an interruption the losses of the run without one."""

    def losses(out: Path) -> list[str]:
        run(compose([
            "recipe=quickstart", *MODEL, "compare.arms=null", "memory=24gb", "trainer.accelerator=cpu",
            "data.seq_len=64", "trainer.max_steps=5", "trainer.accumulate_grad_batches=2", "checkpoint.every_n_steps=2",
            "probe.every=0", "trainer.enable_progress_bar=false", f"out={out}",
        ]))  # fmt: skip
        lines = [line.split(",") for line in (out / "metrics.csv").read_text().splitlines()]
        return [line[lines[0].index("loss")] for line in lines]

    whole = losses(tmp_path / "whole")
    (saved,) = (tmp_path / "whole" / "checkpoints").glob("step-*.ckpt")
    state = torch.load(saved, weights_only=True)
    assert {x.dtype for name, x in state["state_dict"].items() if "weight" in name} == {torch.bfloat16}
    moments = [x for each in state["optimizer_states"][0]["state"].values() for x in each.values()]
    assert any(type(x).__name__ == "OptimState8bit" for x in moments)

    end = RunLog.on_train_batch_end

    def fails(self: RunLog, trainer: Trainer, *args: Any) -> None:
        end(self, trainer, *args)
        if trainer.global_step == 3:
            raise KeyError("interrupted")

    with monkeypatch.context() as patched, pytest.raises(KeyError):
        patched.setattr(RunLog, "on_train_batch_end", fails)
        losses(tmp_path / "broken")
    assert losses(tmp_path / "broken") == whole and len(set(whole)) == 6


@pytest.mark.slow
@pytest.mark.usefixtures("uncompiled")
def test_moments_in_8_bits_under_ddp(tmp_path: Path) -> None:
    """Its buckets have the type of the weights, so gradients have it too."""
    with mock.patch.dict(os.environ):  # Lightning writes there how its ranks find each other
        try:
            run(compose([
                "recipe=quickstart", *MODEL, "compare.arms=null", "memory=24gb", "trainer.accelerator=cpu",
                "strategy=ddp", "data.seq_len=64", "trainer.max_steps=2", "trainer.accumulate_grad_batches=2",
                "probe.every=0", "checkpoint.keep=none", f"out={tmp_path / 'run'}",
            ]))  # fmt: skip
        finally:
            torch.distributed.destroy_process_group()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 2


def test_segments_grow_and_threads_pin_unless_the_user_says_how_memory_is_allocated(monkeypatch, tmp_path) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(train, "check_settings", lambda cfg: 1 / 0)  # nothing is allocated before it

    def begin() -> list[str]:
        with pytest.raises(ZeroDivisionError):
            run(compose([*RUN, f"out={tmp_path}"]))
        return told

    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        with monkeypatch.context() as said:
            said.setenv(name, "max_split_size_mb:64")
            assert begin() == []
    assert begin() == ["expandable_segments:True,pinned_use_cuda_host_register:True,pinned_num_register_threads:8"]


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch has no CUDA")
def test_torch_knows_the_settings_of_its_allocator() -> None:
    torch._C._accelerator_setAllocatorSettings(SETTINGS)


def test_a_gpu_that_is_full_names_the_knobs_that_are_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(train.L.Trainer, "fit", full)
    for settings, named, unnamed in (
        (["data.batch_size=4"], ("data.batch_size=1 with trainer", "memory=24gb", "=attention_saved"), ("_every=1",)),
        (["memory=24gb"], ("model.checkpoint_every=1", "=full", "data.seq_len"), ("memory=24gb", "attention_saved")),
        (["model.checkpointing=full", "model.fused_loss=false"], ("fused_loss=true",), ("checkpointing=",)),
        (["strategy=fsdp2"], ("=attention_saved", "more devices"), ("memory=24gb", "strategy=fsdp2")),
    ):
        with pytest.raises(
            RuntimeError, match="^CUDA out of memory: Tried to allocate 2.00 GiB. What to turn"
        ) as error:
            run(compose([*RUN, *settings, f"out={tmp_path / str(len(settings[0]))}"]))
        for knob in named:
            assert knob in str(error.value), knob
        for knob in unnamed:
            assert knob not in str(error.value), knob

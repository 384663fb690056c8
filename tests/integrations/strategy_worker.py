"""Trains a tiny Llama under every Lightning strategy and writes what happened: python strategy_worker.py OUT.

A script, so that a process forks which has done nothing but import. Each rank writes OUT/{ranks}.{rank}.json.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DistributedSampler
from transformers import LlamaConfig, LlamaForCausalLM

from tests.ranks import fork

VOCAB, SEQ_LEN, STEPS_PER_EPOCH, EPOCHS, SEQUENCES_PER_STEP = 64, 32, 3, 2, 2
CLIP = 0.1
ACCUMULATION = 2  # the second optimizer step of an epoch has one micro-batch
# eps far above rounding noise: Adam then neither blows up noise in tiny gradients nor hides a wrong clipping factor.
OPTIM = {"lr": 3e-2, "eps": 1e-2, "weight_decay": 0.1}


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=SEQ_LEN,
        attn_implementation="eager",  # so that the strategy has something to change
    )
    return LlamaForCausalLM(config)


def train_projections_only(model: LlamaForCausalLM) -> None:
    for name, weight in model.named_parameters():
        weight.requires_grad_("v_proj" in name or "o_proj" in name)


def sequences() -> torch.Tensor:
    """[STEPS_PER_EPOCH * SEQUENCES_PER_STEP, SEQ_LEN] tokens."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(VOCAB, (STEPS_PER_EPOCH * SEQUENCES_PER_STEP, SEQ_LEN), generator=generator)


def global_batches() -> Iterator[torch.Tensor]:
    """What all ranks together see, step by step, [SEQUENCES_PER_STEP, SEQ_LEN] (Lightning shuffles)."""
    data = sequences()
    sampler = DistributedSampler(data, num_replicas=1, rank=0, shuffle=True)
    for epoch in range(EPOCHS):
        sampler.set_epoch(epoch)
        yield from data[list(sampler)].split(SEQUENCES_PER_STEP)


def main(ranks: int, out: Path) -> None:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.utils.data import DataLoader

    from sagetrain.integrations import lightning as strategies
    from sagetrain.ops import schemes

    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rank = int(os.environ.get("LOCAL_RANK", 0))

    class Module(pl.LightningModule):
        def __init__(self, seed: int = 0, sharded: bool = True, ring: bool = False) -> None:
            super().__init__()
            self.model, self.sharded, self.ring, self.losses = tiny_llama(seed), sharded, ring, []

        def configure_model(self) -> None:
            if self.device_mesh is not None and self.sharded:
                strategies.shard(self.model, self.device_mesh)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], **OPTIM)

        def loss(self, tokens: torch.Tensor) -> torch.Tensor:
            loss = self.model(input_ids=tokens, labels=tokens).loss
            self.losses.append(self.trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean").item())
            return loss

        def training_step(self, tokens: torch.Tensor, index: int) -> torch.Tensor:
            if not self.ring:
                return self.loss(tokens)
            with context_parallel(init_device_mesh("cpu", (ranks,)), buffers=[tokens], buffer_seq_dims=[1]):
                return self.loss(tokens)

        def validation_step(self, tokens: torch.Tensor, index: int) -> None:
            self.loss(tokens)

    class Other(Module):
        """Has no Hugging Face model."""

        def configure_model(self) -> None:
            self.model = torch.nn.Linear(2, 1)
            if self.device_mesh is not None:
                torch.distributed.fsdp.fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def trainer(strategy: Any, **options: Any) -> pl.Trainer:
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        defaults = {"max_epochs": EPOCHS, "gradient_clip_val": CLIP, "enable_checkpointing": False}
        return pl.Trainer(accelerator="cpu", devices=ranks, strategy=strategy, **quiet, **defaults | options)

    def data() -> DataLoader:
        return DataLoader(sequences(), batch_size=SEQUENCES_PER_STEP // ranks)

    def message(error: type[Exception], strategy: Any, module: pl.LightningModule, **options: Any) -> str:
        """What the error of this type says; any other outcome fails the worker."""
        try:
            trainer(strategy, **options).fit(module, data())
        except error as caught:
            return str(caught)
        raise AssertionError(f"{strategy} raised nothing")

    def trains(make: Any, folder: Path, **options: Any) -> dict[str, list[float]]:
        """Losses of one run, of its second epoch once more from the checkpoint, and of the final weights."""
        checkpoints = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
        module, resumed = Module(), Module(seed=1)  # other weights: only the checkpoint can bring the same losses
        fit = trainer(make(attention="sdpa", **options), callbacks=[checkpoints], enable_checkpointing=True)
        fit.fit(module, data())
        trainer(make(attention="sdpa", **options)).fit(resumed, data(), ckpt_path=str(folder / "epoch=0.ckpt"))
        losses, module.losses = module.losses, []
        fit.validate(module, data(), verbose=False)
        return {"losses": losses, "resumed": resumed.losses, "validated": module.losses}

    def losses(strategy: Any, module: Module, **options: Any) -> list[float]:
        trainer(strategy, **options).fit(module, data())
        return module.losses

    def adapter() -> Module:
        """Only some projections are trained, as LoRA does with its adapters."""
        module = Module()
        train_projections_only(module.model)
        return module

    def by_name(name: str) -> dict[str, Any]:
        module, named = Module(), trainer(name)
        named.fit(module, data())
        return {
            "losses": module.losses,
            "type": type(named.strategy).__name__,
            "attention": module.model.config._attn_implementation,
        }

    def no_kernel(device: torch.device) -> str:
        raise RuntimeError(f"nothing for rank {rank}")

    runs: dict[str, Any] = {}
    names: dict[str, Any] = {}
    errors: dict[str, Any] = {}
    kinds = {
        "ddp": strategies.SageDDPStrategy,
        "fsdp2": strategies.SageFSDP2Strategy,
        "deepspeed": strategies.SageDeepSpeedStrategy,
    }
    # Whoever is first creates the process group: DDP with one rank, DeepSpeed with two.
    for kind, make in kinds.items() if ranks == 1 else reversed(kinds.items()):
        stages = [{"stage": 2}, {"stage": 3}] if kind == "deepspeed" else [{}]
        for options in stages:
            label = kind + "".join(f"_zero{stage}" for stage in options.values())
            runs[label] = trains(make, out / f"{label}.{ranks}", **options)
            accumulated = losses(make(attention="sdpa", **options), Module(), accumulate_grad_batches=ACCUMULATION)
            frozen = losses(make(attention="sdpa", **options), adapter())
            runs[label] |= {"accumulated": accumulated, "frozen": frozen}
        names[kind] = by_name(f"sage_{kind}")
        errors[kind] = {"no model": message(ValueError, make(), Other())}
        if kind == "fsdp2":
            errors[kind]["not sharded"] = message(ValueError, make(), Module(sharded=False))
            errors[kind]["precision"] = message(ValueError, "sage_fsdp2", Module(), precision="64-true")
        if ranks > 1:
            real = schemes.get()
            other = replace(real, kernel_name=lambda device: f"cpu/kernel_of_{rank}")
            schemes.SCHEMES[real.name] = other
            errors[kind]["kernels differ"] = message(RuntimeError, make(), Module())
            schemes.SCHEMES[real.name] = replace(real, kernel_name=no_kernel) if rank == 1 else real
            errors[kind]["no kernel"] = message(RuntimeError, make(), Module())
            schemes.SCHEMES[real.name] = real
        if ranks > 1 and kind == "ddp":
            errors[kind]["context_parallel"] = message(NotImplementedError, make(), Module(ring=True))
    (out / f"{ranks}.{rank}.json").write_text(json.dumps({"runs": runs, "names": names, "errors": errors}))


if __name__ == "__main__":
    import deepspeed  # noqa: F401 (once, for all ranks)

    import sagetrain.integrations.lightning  # noqa: F401

    fork((1, 2), lambda ranks: main(ranks, Path(sys.argv[1])))

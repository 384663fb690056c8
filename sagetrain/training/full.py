"""A disk or a GPU that is full: one line that says what to do."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from omegaconf import DictConfig


@contextmanager
def enough(cfg: DictConfig) -> Iterator[None]:
    """Have a full disk say so, and a GPU whose memory is full which knobs to turn, in the order of what they cost."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            f"no space left for {error.filename or cfg.out}. What was saved is kept: free some space and start the "
            "same command again to go on"
        ) from error
    except torch.OutOfMemoryError as error:
        sharded = (cfg.strategy.get("_target_") or "").endswith("SageFSDP2Strategy")  # which 8-bit moments do not bear
        knobs = {
            "model.fused_loss=true": cfg.model.fused_loss is False,
            f"data.batch_size=1 with trainer.accumulate_grad_batches {cfg.data.batch_size}x": cfg.data.batch_size > 1,
            "memory=24gb": cfg.optim.kind == "adamw" and not sharded,
            "model.checkpointing=attention_saved": cfg.model.checkpointing == "none",
            "model.checkpoint_every=1": cfg.model.checkpoint_every > 1,
            "model.checkpointing=full": cfg.model.checkpointing == "attention_saved",
            "a shorter data.seq_len": True,
            "strategy=fsdp2 on more devices, with optim.kind=adamw": not sharded,
            "more devices": sharded,
        }
        asked = re.search(r"Tried to allocate [\d.]+ \w+", str(error))
        full = f"CUDA out of memory{f': {asked[0]}' if asked else ''}"
        turn = ", ".join(knob for knob, left in knobs.items() if left)
        raise RuntimeError(f"{full}. What to turn, the cheapest first: {turn}") from error

"""A LightningModule around any Hugging Face causal language model.

Method: the model comes from its configuration (random weights) or from pre-trained weights, takes the attention that
the run names, and is trained on the mean next-token cross-entropy (nats) over unmasked targets, with AdamW, linear
warm-up and cosine decay. What a step did (loss, tokens, gradient norm, learning rate) is left in `step` for the
callbacks.
Choice: weights are made in `configure_model`, from the global random state, so that every arm of a comparison starts
from the same bits and every rank from the same model; FSDP2 shards them right there.
Cost: one reduction over the gradients per step, which clipping needs anyway; each rank holds the full model once before
it is sharded.
"""

import time
from typing import Any

import lightning.pytorch as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, get_cosine_with_min_lr_schedule_with_warmup

from sagetrain.training.strategies import SageFSDP2Strategy, shard


def model_config(model: DictConfig) -> PreTrainedConfig:
    """The Hugging Face configuration that conf/model describes: of `path` when given, with the changes in `config`.

    Raises ValueError for a key that this model's configuration does not have.
    """
    changes: dict[str, Any] = OmegaConf.to_container(model.config, resolve=True)  # type: ignore[assignment]
    if model.path:
        base = AutoConfig.from_pretrained(model.path)
    else:
        base = AutoConfig.for_model(changes.pop("model_type", "missing: set model.config.model_type"))
    unknown = sorted(set(changes) - set(base.to_dict()))
    if unknown:
        raise ValueError(
            f"model.config.{unknown[0]} is not a setting of a {base.model_type} model; "
            f"its settings: {', '.join(sorted(base.to_dict()))}"
        )
    if not changes:
        return base
    # From one dictionary, so that what is derived from several settings (head_dim, rope) is derived from all of them.
    return type(base).from_dict(base.to_dict() | changes if model.path else changes)


def check_length(config: PreTrainedConfig, seq_len: int) -> None:
    """Raises ValueError when a model of this configuration has no positions for `seq_len` tokens."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise ValueError(
            f"data.seq_len={seq_len} is longer than the model allows (max_position_embeddings={limit}): "
            f"set data.seq_len={limit} or less, or a larger model.config.max_position_embeddings to extend it"
        )


class CausalLM(L.LightningModule):
    """Trains `model(input_ids, labels, ...)`; batches are dictionaries of its keyword arguments.

    cfg: the run's configuration (uses `model`, `attention`, `optim`, `data.seq_len`).
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.hf_config = model_config(cfg.model)
        check_length(self.hf_config, cfg.data.seq_len)
        self.model: torch.nn.Module | None = None
        self.step: dict[str, Any] = {}  # of the last optimizer step: grad_norm, lr
        self.losses: list[Tensor] = []  # of the micro-batches since the last optimizer step
        self.tokens: list[Tensor | int] = []
        self.clock: float | None = None  # when the work for the coming optimizer step began
        self._last_step = 0

    def configure_model(self) -> None:
        if self.model is not None:
            return
        attention, dtype = self.cfg.attention.implementation, self.dtype if self._true_half() else torch.float32
        if self.cfg.model.path:
            with torch.device("cpu"):  # Lightning sets the GPU here, and transformers would ask for `accelerate`
                self.model = AutoModelForCausalLM.from_pretrained(
                    self.cfg.model.path, config=self.hf_config, attn_implementation=attention, dtype=dtype
                )
        else:
            self.model = AutoModelForCausalLM.from_config(self.hf_config, attn_implementation=attention, dtype=dtype)
        self.model.train()
        if isinstance(self.trainer.strategy, SageFSDP2Strategy):
            shard(self.model, self.device_mesh)
        if self.cfg.model.compile:
            self.model.compile()

    def _true_half(self) -> bool:
        return str(self.trainer.precision).endswith("-true") and not str(self.trainer.precision).startswith("32")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.model(**batch, use_cache=False).loss
        mask = batch.get("attention_mask")
        self.losses.append(loss.detach())
        self.tokens.append(batch["input_ids"].numel() if mask is None else mask.sum())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        loss = self.model(**batch, use_cache=False).loss
        self.log("val_loss", loss, batch_size=len(batch["input_ids"]), sync_dist=True, logger=False)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
    ) -> None:
        """Clip as Lightning would, and keep the norm from before (DeepSpeed clips by itself, see `grad_norm`)."""
        self.step = {"lr": optimizer.param_groups[0]["lr"]}
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if not grads or hasattr(self.trainer.model, "get_global_grad_norm"):
            return
        norm = get_total_norm(grads)
        self.step["grad_norm"] = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if gradient_clip_val and str(gradient_clip_algorithm) == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    def grad_norm(self) -> float:
        """L2 norm of all gradients of the last step, before clipping."""
        engine = self.trainer.model
        norm = engine.get_global_grad_norm() if hasattr(engine, "get_global_grad_norm") else self.step.get("grad_norm")
        return float("nan") if norm is None else float(norm)

    def configure_optimizers(self) -> dict[str, Any]:
        optim = self.cfg.optim
        trained = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.ndim >= 2], "weight_decay": optim.weight_decay},
            {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=tuple(optim.betas))
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the learning-rate schedule needs an end: set trainer.max_steps")
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, min(optim.warmup_steps, int(steps)), int(steps), min_lr_rate=optim.min_lr_ratio
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        self._last_step, self.clock = self.trainer.global_step, None

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.clock is None:  # the first step does not count what Lightning does before it
            self.clock = time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step != self._last_step:  # Lightning calls this after the callbacks' hooks
            self._last_step, self.clock = self.trainer.global_step, time.perf_counter()
            self.losses.clear()
            self.tokens.clear()

    def on_validation_end(self) -> None:
        self.clock = time.perf_counter()

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

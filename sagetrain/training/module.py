"""A LightningModule around any Hugging Face causal language model.

Method: the model comes from its configuration (random weights) or from pre-trained weights, takes the attention that
the run names, computes its loss and layers as conf/train.yaml says (loss.py, layers.py), and is trained on next-token
cross-entropy (nats) with AdamW, linear warm-up and a schedule (cosine, linear, or constant and then down). The loss of
an optimizer step is the sum over its unmasked targets by their number, of all its micro-batches and ranks together:
each target weighs the same however the step is cut. Validation is weighed in the same way. What a step did (loss,
tokens, gradient norm, learning rate) is left in `step`, on the device, for the callbacks.
Choice: transformers divides the sum of a micro-batch by `num_items_in_batch`. We give it the mean number of targets per
micro-batch and rank, so that the division by accumulate_grad_batches (Lightning) and the mean over ranks (DDP, FSDP2,
DeepSpeed) come out right. Weights are drawn on the CPU in fp32 from `seed` alone, whatever the strategy, its device and
its number of ranks; FSDP2 shards them right there.
Cost: one reduction over the gradients per step, which clipping needs anyway, and two sums of a few bytes over the
ranks, for which no host waits; each rank draws (a billion weights take 10 to 30 s) and holds the full model once before
it is sharded.
"""

import math
import time
from collections.abc import Iterator
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy, ParallelStrategy
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_wsd_schedule,
)

from sagetrain.data.loader import TextData, targets
from sagetrain.integrations.lightning import SageFSDP2Strategy, shard
from sagetrain.terminal import console
from sagetrain.training import lora
from sagetrain.training.checks import check_settings
from sagetrain.training.folder import global_rank
from sagetrain.training.layers import checkpoint_layers, compile_layers, float8_layers
from sagetrain.training.loss import can_fuse, fuse


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


def prepare(model: PreTrainedModel, how: DictConfig) -> None:
    """Has `model`, with whole weights, compute its loss and layers as `how` (conf/train.yaml, `model`) says.

    Raises ValueError for what this model cannot do. Where `fused_loss=auto` finds that, it says so.
    """
    fused = how.fused_loss and can_fuse(model)
    if how.fused_loss is True and not fused:
        raise ValueError(
            f"model.fused_loss=true: the loss of {type(model).__name__} is more than a linear head on its hidden "
            "states (capped or scaled logits, more terms). Set model.fused_loss=false or auto"
        )
    if fused:
        fuse(model)
    elif how.fused_loss and global_rank() == 0:
        console(stderr=True).print(f"{type(model).__name__} computes its own loss, from the logits of all tokens")
    if how.linear == "float8":
        float8_layers(model)
    checkpoint_layers(model, how.checkpointing, how.checkpoint_every)
    if how.compile:
        compile_layers(model)


def numel(weight: Tensor) -> int:
    """Elements of a parameter, all ranks' shares together."""
    return getattr(weight, "ds_numel", weight.numel())


def check_length(config: PreTrainedConfig, seq_len: int) -> None:
    """Raises ValueError when a model of this configuration has no positions for `seq_len` tokens."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and seq_len > limit:
        raise ValueError(
            f"data.seq_len={seq_len} is longer than the model allows (max_position_embeddings={limit}): "
            f"set data.seq_len={limit} or less, or a larger model.config.max_position_embeddings to extend it"
        )


def optimizer_of(
    optim: DictConfig, groups: list[dict[str, Any]], fused: bool, alone: bool = True
) -> torch.optim.Optimizer:
    """AdamW of torch (`fused` where that runs) or, with moments in 8 bits, of torchao, over groups of weights.

    alone: whether nobody else needs the gradients. DDP has them in the type of the weights and DeepSpeed its own; else
    torchao's are fp32, since they are the sums of many micro-batches.
    Raises ValueError for adamw8bit under FSDP2.
    """
    options = {"lr": optim.lr, "betas": tuple(optim.betas)}
    if optim.kind == "adamw":
        return torch.optim.AdamW(groups, fused=fused or None, **options)
    from torchao.optim import AdamW8bit

    weights = [weight for group in groups for weight in group["params"]]
    if any(isinstance(weight, DTensor) for weight in weights):
        raise ValueError(
            "optim.kind=adamw8bit does not run under FSDP2 (torchao's moments lack what torch asks of a shard): set "
            "optim.kind=adamw, which FSDP2 shards, or strategy=ddp"
        )
    for weight in weights if alone else []:
        weight.grad_dtype = torch.float32
    return AdamW8bit(groups, bf16_stochastic_round=True, **options)


def learning_rates(optimizer: torch.optim.Optimizer, optim: DictConfig, steps: int) -> LambdaLR:
    """The schedule over `steps` optimizer steps: linear warm-up, then `cosine`, `linear`, or `wsd` (constant, then down
    like 1 - sqrt over the last `decay_steps`; null: a fifth of all). All end at `min_lr_ratio`."""
    warmup = min(optim.warmup_steps, steps)
    if optim.schedule == "cosine":
        return get_cosine_with_min_lr_schedule_with_warmup(optimizer, warmup, steps, min_lr_rate=optim.min_lr_ratio)
    if optim.schedule == "linear":  # a decay that begins where the warm-up ends
        decay, shape = steps - warmup, "linear"
    else:
        decay, shape = min(steps // 5 if optim.decay_steps is None else optim.decay_steps, steps - warmup), "1-sqrt"
    return get_wsd_schedule(optimizer, warmup, decay, steps, decay_type=shape, min_lr_ratio=optim.min_lr_ratio)


class CausalLM(L.LightningModule):
    """Trains `model(input_ids, labels, ...)`; batches are dictionaries of its keyword arguments.

    A training batch may carry `num_items_in_batch`: the unmasked targets (after the shift) of this rank in all
    micro-batches of its optimizer step, as `TextData` counts them. Without accumulation it may be left out.

    cfg: the run's configuration (uses `model`, `attention`, `optim`, `seed`, `data.seq_len`).
    """

    def __init__(self, cfg: DictConfig) -> None:
        super().__init__()
        check_settings(cfg)
        self.cfg = cfg
        self.hf_config = model_config(cfg.model)
        self.lora = lora.options(cfg.model)
        check_length(self.hf_config, cfg.data.seq_len)
        self.model: torch.nn.Module | None = None
        self._fp32_buffers: dict[str, Tensor] = {}
        self.step: dict[str, Any] = {}  # of the last optimizer step: step, loss, tokens, grad_norm, lr (all ranks)
        self.clock: tuple[float, float] | None = None  # when what the next row times began, and its _waited()
        self.held: list[tuple[dict[str, Any] | None, dict[str, Any]]] = []  # where in the data, batch: of that step
        self._left_out: list[tuple[str, Tensor]] = []  # gradients that the optimizer was not given
        self._mean_targets: Tensor | None = None  # of the optimizer step under way, per micro-batch and rank
        self._loss: Tensor | float = 0.0  # of the micro-batches so far, this rank
        self._tokens: Tensor | int = 0
        self._grad_norm: Tensor | None = None
        self._first_bad: Tensor | None = None  # first optimizer step with a loss or gradient that is not finite
        self._validated: Tensor | None = None  # [sum of the token losses, targets], this rank

    def configure_model(self) -> None:
        if self.model is not None:
            return
        options = {"attn_implementation": self.cfg.attention.implementation, "dtype": torch.float32}
        # On the CPU: strategies differ in the device they would draw on. (And on a GPU, which Lightning sets here,
        # transformers would ask for `accelerate` to load weights.)
        with torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.cfg.seed)
            if self.cfg.model.path:
                self.model = AutoModelForCausalLM.from_pretrained(self.cfg.model.path, config=self.hf_config, **options)
            else:
                self.model = AutoModelForCausalLM.from_config(self.hf_config, **options)
        if self.lora:
            lora.adapt(self.model, self.lora, self.cfg.seed)
        self.model.train()
        prepare(self.model, self.cfg.model)
        self._fp32_buffers = {name: x for name, x in self.model.named_buffers() if x.dtype == torch.float32}
        if isinstance(self.trainer.strategy, SageFSDP2Strategy):
            shard(self.model, self.device_mesh)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Raises ValueError for accumulation over batches that do not say how many targets their step has."""
        batch = dict(batch)
        window = batch.pop("num_items_in_batch", None)
        if self._mean_targets is None:
            self.held, self._left_out = [], []
            if window is None and self.trainer.accumulate_grad_batches > 1:
                raise ValueError(
                    f"trainer.accumulate_grad_batches={self.trainer.accumulate_grad_batches} needs to know the targets "
                    "of a whole optimizer step beforehand: read the data through sagetrain.data.TextData, or put "
                    "num_items_in_batch (labels that are not -100 after the shift, over all its micro-batches on this "
                    "rank) into each batch"
                )
            window = targets(batch["labels"]) if window is None else window
            shares = self.trainer.world_size * self.trainer.accumulate_grad_batches
            # A copy: the sum over ranks is in place, and a loader may give its tensor again.
            total = self._over_ranks(window.clone() if isinstance(window, Tensor) else self._scalar(window))
            self._mean_targets = (total.clamp(min=1) / shares).float()
        data = self.trainer.datamodule
        self.held.append((data.position() if isinstance(data, TextData) else None, batch))
        loss = self.model(**batch, num_items_in_batch=self._mean_targets, use_cache=False).loss
        mask = batch.get("attention_mask")
        self._loss = self._loss + loss.detach()
        self._tokens = self._tokens + (batch["input_ids"].numel() if mask is None else mask.sum())
        return loss

    def _scalar(self, value: float) -> Tensor:
        """fp64 [] on the device, filled there: no copy that the host waits for."""
        return torch.full((), value, dtype=torch.float64, device=self.device)

    def _over_ranks(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks. (Lightning's own `reduce` has a barrier in it, for which the host waits.)"""
        if self.trainer.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def on_validation_epoch_start(self) -> None:
        self._validated = torch.zeros(2, dtype=torch.float64, device=self.device)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        count = targets(batch["labels"])
        loss = self.model(**batch, num_items_in_batch=count.clamp(min=1).float(), use_cache=False).loss
        self._validated += torch.stack((loss.double() * count, count.double()))

    def on_validation_epoch_end(self) -> None:
        total, count = self._over_ranks(self._validated)
        self.log("val_loss", total / count, sync_dist=True, logger=False)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, gradient_clip_val: float | None, gradient_clip_algorithm: str | None
    ) -> None:
        """Clip as Lightning would, and keep the norm from before (DeepSpeed clips by itself, after this)."""
        self._grad_norm = None
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        if not grads or self._engine_has_norm():
            return
        norm = get_total_norm(grads)
        self._grad_norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not self._loss_is_scaled():
            self._leave_out(optimizer, self._grad_norm)
        if not gradient_clip_val or self._engine() is not None:
            return
        if gradient_clip_algorithm == "value":  # an enum that is a str, whose str() is something else
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            # One that is not finite would spoil all gradients, and with them what they can tell (finite.py).
            norm = norm if isinstance(norm, DTensor) else norm.nan_to_num(nan=1.0, posinf=1.0)
            clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)

    def _leave_out(self, optimizer: torch.optim.Optimizer, norm: Tensor) -> None:
        """Has weights and moments stay as they are where the gradient is not finite, if no device need be waited for:
        not under DeepSpeed, nor of torchao's optimizer and FSDP2 on a GPU."""
        if optimizer.defaults.get("fused") and not any(isinstance(p, DTensor) for p in self.parameters()):
            optimizer.found_inf = (~norm.isfinite()).float()  # as a scaler of the loss tells it
        elif norm.device.type == "cpu" and self._engine() is None and not math.isfinite(norm.float().numpy()):
            self._left_out = list(self.gradients())
            optimizer.zero_grad()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of every parameter that has one, after the last step."""
        yield from self._left_out or ((n, p.grad) for n, p in self.model.named_parameters() if p.grad is not None)

    def _engine(self) -> Any | None:
        """DeepSpeed's engine, None under other strategies."""
        return self.trainer.model if hasattr(self.trainer.model, "get_global_grad_norm") else None

    def _engine_has_norm(self) -> bool:
        """Without ZeRO, in fp32, DeepSpeed clips the gradients where they are and keeps no norm."""
        e = self._engine()
        return e is not None and (e.zero_optimization() or e.bfloat16_enabled() or e.fp16_enabled())

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Lightning's, once per optimizer step; then what the step did is put together, without waiting for it."""
        lr = float(optimizer.param_groups[0]["lr"])  # a tensor on the CPU with torchao's
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        step, share = self.trainer.global_step + 1, self._loss / self.trainer.accumulate_grad_batches
        norm = self._engine().get_global_grad_norm() if self._engine_has_norm() else self._grad_norm
        tokens = self._tokens if isinstance(self._tokens, Tensor) else self._scalar(self._tokens)
        loss, tokens = self._over_ranks(torch.stack((share.double(), tokens.double())))
        loss = loss / self.trainer.world_size
        self.step = {"step": step, "loss": loss, "tokens": tokens, "grad_norm": norm, "lr": lr}
        if not self._loss_is_scaled():
            self._note_bad(step, loss, norm)
        self._mean_targets, self._loss, self._tokens = None, 0.0, 0

    def _loss_is_scaled(self) -> bool:
        """Whether a scaler of the loss looks for overflows and leaves out such steps: they are normal then."""
        engine = self._engine()
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        return scaler is not None or (engine is not None and engine.fp16_enabled())

    def _note_bad(self, step: int, loss: Tensor, norm: Tensor | float | None) -> None:
        good = loss.isfinite()
        if norm is not None:
            good = good & (norm.to(loss.device).isfinite() if isinstance(norm, Tensor) else math.isfinite(norm))
        none = self._scalar(math.inf) if self._first_bad is None else self._first_bad
        self._first_bad = torch.where(good, none, none.clamp(max=step))

    def first_bad_step(self) -> int | None:
        """The first optimizer step since training began whose loss or gradient norm is not finite; waits for the
        device. The weights of later steps are spoilt. The same on every rank."""
        step = math.inf if self._first_bad is None else float(self._first_bad)
        return None if step == math.inf else int(step)

    def finite(self) -> bool:
        """Whether every step so far had a finite loss and gradient norm; to be asked before weights are saved."""
        return self.first_bad_step() is None

    def grad_norm(self) -> float:
        """L2 norm of all gradients of the last step, before clipping; waits for the device."""
        norm = self.step.get("grad_norm")
        return float("nan") if norm is None else float(norm)

    def on_fit_start(self) -> None:
        """What the model keeps in fp32 beside its weights (RoPE's frequencies) stays so, whatever the precision.

        A strategy's cast has put others in the place of these buffers, which a checkpoint in one file was loaded into.
        """
        for name, buffer in self._fp32_buffers.items():
            owner, _, own = name.rpartition(".")
            self.model.get_submodule(owner)._buffers[own] = buffer.to(self.device)

    def configure_optimizers(self) -> dict[str, Any]:
        optim = self.cfg.optim
        trained = [p for p in self.parameters() if p.requires_grad]
        decayed, plain = [], []
        for p in trained:  # a tensor that ZeRO-3 has partitioned is flat
            (decayed if len(getattr(p, "ds_shape", p.shape)) >= 2 else plain).append(p)
        groups = [{"params": decayed, "weight_decay": optim.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        # DeepSpeed takes empty groups out of the optimizer, and the schedule then has more of them than it.
        groups = [group for group in groups if group["params"]]
        # Fused, an optimizer itself undoes the scale of an fp16 loss, and clipping would come too early.
        fused = self.device.type == "cuda" and self._engine() is None and not self._loss_is_scaled()
        alone = not isinstance(self.trainer.strategy, ParallelStrategy)
        optimizer = optimizer_of(optim, groups, fused, alone)
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ValueError("the learning-rate schedule needs an end: set trainer.max_steps")
        schedule = learning_rates(optimizer, optim, int(steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def adapters_alone(self) -> bool:
        """Whether checkpoints leave out the frozen weights of a run with adapters, which are those of `model.path`: not
        under FSDP2 and DeepSpeed, whose folders hold all weights."""
        return bool(self.lora) and not isinstance(self.trainer.strategy, ModelParallelStrategy | DeepSpeedStrategy)

    def _kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What of a state_dict is in a checkpoint."""
        weights = self.named_parameters(remove_duplicate=False) if self.adapters_alone else ()
        frozen = {name for name, weight in weights if not weight.requires_grad}
        return {name: x for name, x in state.items() if name not in frozen}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.adapters_alone:
            checkpoint["state_dict"] = self._kept(checkpoint["state_dict"])

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises ValueError where a checkpoint in one file is of another model."""
        self.strict_loading = not self.adapters_alone
        both = checkpoint.get("state_dict", {}), self._kept(self.state_dict())
        theirs, ours = ({name: list(x.shape) for name, x in weights.items()} for weights in both)
        differ = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        if theirs and differ:
            there, here = (shapes.get(differ[0], "missing") for shapes in (theirs, ours))
            raise ValueError(
                f"the checkpoint is of another model: {differ[0]} is {there} there and {here} here. "
                "Give the model.* settings of its run"
            )

    def on_train_start(self) -> None:
        self.step, self.clock, self._first_bad = {}, None, None
        self._mean_targets, self._loss, self._tokens = None, 0.0, 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._start_clock()  # the first row does not count what Lightning does before it

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._start_clock()  # Lightning calls this after the callbacks' hooks, whose work after a row is not counted

    def on_validation_end(self) -> None:
        self.clock = time.perf_counter(), self._waited()

    def _start_clock(self) -> None:
        if self.clock is None:
            self.clock = time.perf_counter(), self._waited()

    def lap(self) -> tuple[float, float]:
        """Seconds of training since the last call, and how many of them it waited for data (nan: not our data)."""
        (begun, waited), self.clock = self.clock, None
        return time.perf_counter() - begun, self._waited() - waited

    def _waited(self) -> float:
        return getattr(self.trainer.datamodule, "waited", math.nan)

    def parameter_count(self, trained: bool = False) -> int:
        """Of all parameters, or of those that are `trained`."""
        return sum(numel(p) for p in self.parameters() if p.requires_grad or not trained)

"""Lightning plug: strategies that train with SageTrain's attention, `sage_ddp`, `sage_fsdp2`, `sage_deepspeed`.

Method: each class is Lightning's own strategy plus one mixin. In `setup` the mixin puts the chosen attention on every
Hugging Face model inside the LightningModule, lets the ranks compare which kernel they are about to run, and logs it
once. Everything else (launching, wrapping, precision, accumulation, clipping, checkpoints) is Lightning's.
Choice: `Trainer(strategy="sage_ddp")` alone turns an existing LightningModule into an INT8 run. FSDP2 shards over all
ranks by default (Lightning's default is tensor parallel inside a node). DeepSpeed also trains on the CPU (gloo), so
that the real engines are tested without a GPU; on CUDA both are Lightning's, unchanged.
Cost: one `all_gather_object` of a short string per `setup`. No private import
from Lightning; two private attributes of its ModelParallelStrategy are set (in
`SageFSDP2Strategy.setup_environment`).
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, StrategyRegistry
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from sagetrain.ops import schemes

__all__ = ["SageDDPStrategy", "SageDeepSpeedStrategy", "SageFSDP2Strategy", "shard"]


def shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Shard a Hugging Face model in place with FSDP2: every decoder layer, then the root. Call it in `configure_model`.

    mesh: one-dimensional, or Lightning's `self.device_mesh`, of which the "data_parallel" dimension is used.
    options: passed to `torch.distributed.fsdp.fully_shard` (`mp_policy`, `reshard_after_forward`, `offload_policy`).
    Returns `model`; one that is sharded already is returned as it is, since Lightning may call `configure_model` twice.
    Raises ValueError when there is no decoder layer to shard.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    if isinstance(model, FSDPModule):
        return model
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"shard() found no transformer layer in {type(model).__name__}: it looks for transformers' "
            "GradientCheckpointingLayer. Call torch.distributed.fsdp.fully_shard on the layers of this model yourself."
        )
    if mesh.ndim > 1:
        mesh = mesh["data_parallel"]
    for layer in reversed(layers):  # modules() lists a parent before its children; fully_shard wants children first
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


class SageStrategy:
    """Mixin in front of a Lightning strategy.

    attention: name registered with transformers' AttentionInterface, or None to leave the models as they are.
    options: the Lightning strategy's own arguments.
    Raises ValueError for an unknown name (and lists the choices).
    """

    def __init__(self, *, attention: str | None = schemes.DEFAULT, **options: Any) -> None:
        from transformers import AttentionInterface

        choices = sorted({"eager", *AttentionInterface().valid_keys()})
        if attention is not None and attention not in choices:
            raise ValueError(
                f"attention={attention!r} is unknown; choose one of {', '.join(choices)}, "
                "or None to leave the model's attention as it is."
            )
        super().__init__(**options)
        self.attention = attention

    def setup(self, trainer: Trainer) -> None:
        """Set and compare the attention, then set up as Lightning does.

        Raises on every rank: ValueError when there is no Hugging Face model, or one whose attention cannot be chosen;
        RuntimeError when no kernel serves the device of some rank, or the ranks would run different ones.
        """
        from transformers import PreTrainedModel

        models = [module for module in self.lightning_module.modules() if isinstance(module, PreTrainedModel)]
        self._set_attention(models)
        self._agree(models)
        super().setup(trainer)

    def _set_attention(self, models: list[Any]) -> None:
        if self.attention is None:
            return
        if not models:
            raise ValueError(
                f"{type(self).__name__}(attention={self.attention!r}) found no Hugging Face model in "
                f"{type(self.lightning_module).__name__}. Build it in __init__ or configure_model; for a model of your "
                "own pass attention=None and call sagetrain.attention in it."
            )
        for model in models:
            # transformers reads the source of the class to tell; fully_shard has put a class of its own in front.
            original = next(cls for cls in type(model).__mro__ if not issubclass(cls, FSDPModule))
            if original._can_set_attn_implementation():
                model.set_attn_implementation(self.attention)
            if model.config._attn_implementation != self.attention:
                raise ValueError(
                    f"{original.__name__} runs attention {model.config._attn_implementation!r} and transformers cannot "
                    f"set {self.attention!r} on it (it does not use AttentionInterface). Use another model, or pass "
                    "attention=None."
                )

    def _agree(self, models: list[Any]) -> None:
        """All ranks compare what they are about to run; rank 0 logs it."""
        runs, missing = ", ".join(sorted({model.config._attn_implementation for model in models})), False
        ours = list(schemes.named_in(runs)) or ([] if models else [schemes.get()])
        if ours:  # an own module may call sagetrain.attention: compare the kernel as well
            try:
                kernel = ", ".join(scheme.kernel_name(self.root_device) for scheme in ours)
            except RuntimeError as error:  # raised below on all ranks together, so that none waits for the others
                kernel, missing = f"none: {error}", bool(models)
            runs = f"{runs or 'own model'}, kernel {kernel}"
        everywhere: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(everywhere, (runs, missing))
        ranks = defaultdict(list)
        for rank, (theirs, _) in enumerate(everywhere):
            ranks[theirs].append(str(rank))
        listed = "; ".join(f"rank {', '.join(which)}: {theirs}" for theirs, which in ranks.items())
        if any(absent for _, absent in everywhere):
            label = ", ".join(scheme.label for scheme in ours)
            raise RuntimeError(f"no {label} attention kernel serves this device ({listed}). Choose attention='sdpa'.")
        if len(ranks) > 1:
            raise RuntimeError(
                f"the ranks would run different attention ({listed}). Use machines of one kind, or choose "
                "attention='sdpa'."
            )
        rank_zero_info(f"SageTrain attention: {runs} ({self.world_size} ranks on {self.root_device.type})")


class SageDDPStrategy(SageStrategy, DDPStrategy):
    """`sage_ddp`: Lightning's DDPStrategy with SageTrain's attention."""


class SageFSDP2Strategy(SageStrategy, ModelParallelStrategy):
    """`sage_fsdp2`: Lightning's ModelParallelStrategy with SageTrain's attention, sharding over all ranks by default.

    The LightningModule overrides `configure_model` and calls `shard(self.model, self.device_mesh)` there. Clipping by
    norm takes the norm over all shards (torch's clip_grad_norm_ on DTensors); a checkpoint is a folder with one file
    per rank.
    """

    PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "16-true")

    def setup_environment(self) -> None:
        if self._tensor_parallel_size == "auto":
            self._tensor_parallel_size = 1
        if self._data_parallel_size == "auto":
            self._data_parallel_size = self.num_nodes * self.num_processes // self._tensor_parallel_size
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        """As SageStrategy.setup. Raises ValueError for a precision FSDP2 lacks and for parameters nobody sharded."""
        if trainer.precision not in self.PRECISIONS:  # Lightning does not check this for a strategy given by name
            raise ValueError(f"sage_fsdp2 supports precision {', '.join(self.PRECISIONS)}, not {trainer.precision!r}.")
        trained = [(name, weight) for name, weight in self.lightning_module.named_parameters() if weight.requires_grad]
        apart = [name for name, weight in trained if not isinstance(weight, DTensor)]
        if apart and self._tensor_parallel_size == 1:
            raise ValueError(
                f"sage_fsdp2: {len(apart)} parameters of {type(self.lightning_module).__name__} are not sharded "
                f"({apart[0]}, ...), so each rank would train its own. Override configure_model and call "
                "sagetrain.integrations.lightning.shard(self.model, self.device_mesh) in it."
            )
        super().setup(trainer)


class SageDeepSpeedStrategy(SageStrategy, DeepSpeedStrategy):
    """`sage_deepspeed`: Lightning's DeepSpeedStrategy with SageTrain's attention.

    It trains on the CPU too (gloo): with a torch optimizer (DeepSpeedCPUAdam compiles for minutes), in fp32 or bf16.
    With `accumulate_grad_batches` the gradient is divided once and the last, shorter step of an epoch is made, as
    Lightning does under its other strategies.
    """

    def __init__(self, *, attention: str | None = schemes.DEFAULT, **options: Any) -> None:
        if find_spec("deepspeed") is None:
            raise ModuleNotFoundError(
                "sage_deepspeed needs DeepSpeed: DS_BUILD_OPS=0 pip install 'sagetrain[deepspeed]'"
            )
        # Only DeepSpeed's throughput log uses it; Lightning's "auto" fails on streams, which have no batch sampler.
        options.setdefault("logging_batch_size_per_gpu", 1)
        super().__init__(attention=attention, **options)

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CPUAccelerator):
            return super().setup_environment()
        import deepspeed

        device = deepspeed.accelerator.get_accelerator().device_name()
        if device != "cpu":
            raise RuntimeError(f"DeepSpeed chose {device!r} but the Trainer runs on the CPU: set DS_ACCELERATOR=cpu.")
        # Its shared-memory all-reduce takes about a minute to compile; gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # Lightning tells DeepSpeed the local rank by the device's index, which torch accepts and ignores for the CPU.
        self.parallel_devices = [torch.device("cpu", rank) for rank in range(self.num_processes)]
        super(DeepSpeedStrategy, self).setup_environment()  # past the CUDA check, which is all that class adds

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Nothing: weights are made whole and partitioned when training begins. Inside `deepspeed.zero.Init` (which a
        `configure_model` for a larger model can enter itself) transformers would draw its weights into empty ones."""
        yield

    @property
    def handles_gradient_accumulation(self) -> bool:
        """Lightning says which micro-batch is the last of its step: only it knows where an epoch ends."""
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Lightning runs each micro-batch that is not the last of its step in this context."""
        self.deepspeed_engine.set_gradient_accumulation_boundary(False)
        yield
        self.deepspeed_engine.step()  # counts the micro-batch, no more

    def optimizer_step(self, *args: Any, **kwargs: Any) -> Any:
        self.deepspeed_engine.set_gradient_accumulation_boundary(True)
        return super().optimizer_step(*args, **kwargs)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Without DeepSpeed's division by the number of micro-batches: Lightning has divided already."""
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)


STRATEGIES = {"sage_ddp": SageDDPStrategy, "sage_fsdp2": SageFSDP2Strategy, "sage_deepspeed": SageDeepSpeedStrategy}
for _name, _class in STRATEGIES.items():
    StrategyRegistry.register(_name, _class, description=f"{_class.__name__}: low-bit attention", override=True)

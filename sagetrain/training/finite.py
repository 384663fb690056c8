"""Whether the numbers of a run are finite and, once they are not, in which batch and layer that began.

Method: after a bad step its micro-batches, which the module holds, go through the model once more, and the first module
whose output is not finite is named; if there is none, the gradients are looked at, then the state of the optimizer. The
optimizer leaves weights and moments as they were in such a step (CausalLM), or there would be nothing left to look at.
Choice: looked for only when a run is about to end, so that good steps cost nothing; each rank looks at its own.
Cost: where weights are sharded (FSDP2, ZeRO-3) no layer's output is looked at, since ranks would have to do it together
while one of them may be failing; and with `trainer.log_every_n_steps` above 1 the batch of a bad step may be gone.
"""

from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from sagetrain.data.loader import targets


def parts(x: Any) -> Iterator[Tensor]:
    """The plain floating-point tensors in `x`: itself, a DTensor's shard, the scales of quantised moments, or none."""
    if not isinstance(x, Tensor):  # a step that is counted in Python, a DTensor's mesh
        return
    x = getattr(x, "ds_tensor", x)  # ZeRO-3's shard
    if is_traceable_wrapper_subclass(x):
        for name in x.__tensor_flatten__()[0]:
            yield from parts(getattr(x, name))
    elif x.is_floating_point():
        yield x


@torch.no_grad()
def is_finite(trainer: L.Trainer) -> bool:
    """Whether the weights and the state of the optimizers, every rank's share of them, are finite."""
    kept = [(weight, *state.values()) for each in trainer.optimizers for weight, state in each.state.items()]
    sums = [
        part.sum(dtype=torch.float64) for x in chain(trainer.lightning_module.parameters(), *kept) for part in parts(x)
    ]
    here = all(bool(torch.isfinite(x)) for x in sums)
    return trainer.strategy.reduce_boolean_decision(here, all=True)


def _bad(*values: Any) -> bool:
    return any(not part.isfinite().all() for x in tree_leaves(values) for part in parts(x))


def what_is_bad(trainer: L.Trainer, module: L.LightningModule) -> str:
    """What is known of a step that was not finite, as sentences; all ranks ask together."""
    step, bad = module.step["step"], module.first_bad_step()
    if bad not in (None, step):
        return (
            f"The batch of step {bad} is gone by step {step}; with trainer.log_every_n_steps=1 it is named, and the "
            "layer too. "
        )
    try:
        said = _look(trainer, module)
    except Exception as error:  # what is to be explained must not be hidden by it
        said = f"(Looking for the layer failed: {error}) "
    if trainer.world_size == 1:
        return said
    everywhere = [""] * trainer.world_size
    dist.all_gather_object(everywhere, said)
    return next((f"Rank {rank}: {said}" for rank, said in enumerate(everywhere) if said), "")


@torch.no_grad()
def _look(trainer: L.Trainer, module: L.LightningModule) -> str:
    """What is bad on this rank."""
    weights = list(module.model.named_parameters())
    spoilt = [name for name, weight in weights if _bad(weight)]
    sharded = any(isinstance(weight, DTensor) or hasattr(weight, "ds_id") for _, weight in weights)
    if not spoilt and not sharded:
        for number, (position, batch) in enumerate(module.held, 1):
            if (layer := _first_bad_output(trainer, module, batch)) is not None:
                return (
                    f"The first output that is not finite is that of {layer or 'the whole model'}, in micro-batch "
                    f"{number} of {len(module.held)} ({_rows(trainer, [(position, batch)])}). "
                )
    gradients = [name for name, grad in module.gradients() if _bad(grad)]
    if gradients:  # the backward goes from the last to the first
        said = f"The first gradient that is not finite is that of {gradients[-1]} ({len(gradients)} of {len(weights)})"
    elif spoilt:
        said = f"{len(spoilt)} of {len(weights)} weights are not finite, the first is {spoilt[0]}"
    else:
        names = {weight: name for name, weight in weights}
        kept = ((weight, state) for each in trainer.optimizers for weight, state in each.state.items())
        bad = next((names.get(weight) for weight, state in kept if _bad(state)), None)
        if bad is None:
            return ""
        said = f"The optimizer's state of {bad} is not finite"
    return f"{said}, in a step of {len(module.held)} micro-batches ({_rows(trainer, module.held)}). "


def _rows(trainer: L.Trainer, held: list[tuple[dict[str, Any] | None, dict[str, Any]]]) -> str:
    """Which rows of the data these micro-batches are."""
    position = held[0][0]
    own = position and trainer.datamodule.stream.batch_size  # a row of the data need not be one of the batch
    rows = sum(own or len(batch["input_ids"]) for _, batch in held)
    where = f", this rank's of the {rows * trainer.world_size} that follow {position} in the data" if position else ""
    return f"{rows} rows{where}"


def _first_bad_output(trainer: L.Trainer, module: L.LightningModule, batch: dict[str, Any]) -> str | None:
    """Name of the first module in the Hugging Face model whose output for `batch` is not finite."""
    found: list[str] = []

    def look(name: str, layer: torch.nn.Module, inputs: Any, output: Any) -> None:
        if not found and _bad(output):
            found.append(name)

    hooks = [layer.register_forward_hook(partial(look, name)) for name, layer in module.model.named_modules()]
    try:
        with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            module.model(**batch, num_items_in_batch=targets(batch["labels"]).clamp(min=1).float(), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None

"""What is done to each layer of a Hugging Face model before training: checkpointing, compilation, float8 products.

Method: a layer's `forward` is replaced by one that keeps less (`checkpoint`) and runs compiled (`compile_layers`).
Hooks that others put on the layer (FSDP2) stay outside of both; those of ZeRO-3 are also on what is inside a layer, and
break its graph there. `attention_saved` keeps the results of the attention op, so the backward recomputes all of a
layer but its attention; `full` keeps the layer's input alone.
Choice: layer by layer, because all layers then share one compiled graph, which takes seconds; compiled whole, a model
of 16 layers takes a minute and breaks at its loss.
Cost: `attention_saved` runs the matrix products of a layer's forward again (about a third more work in them), `full`
its attention too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._dynamo import utils
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

import sagetrain.integrations.flash4  # noqa: F401  (defines its ops)
from sagetrain.ops import schemes

CHECKPOINTING = ("none", "attention_saved", "full")
# Attention ops of others, where they are loaded. FlexAttention is none, and is recomputed.
ATTENTION_OPS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "torch_attn::_varlen_attn",
    "flash_attn::_flash_attn_forward",
    "flash_attn::_flash_attn_varlen_forward",
    "flash_attn_3::fwd",
    "sagetrain::fa4_forward",
)


def layers(model: nn.Module) -> list[nn.Module]:
    """The transformer layers, in order. Raises ValueError for a model in which transformers marks none."""
    found = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no layers that transformers marks (GradientCheckpointingLayer), so it can be "
            "neither compiled nor checkpointed by layers: set model.compile=false model.checkpointing=none"
        )
    return found


def attention_ops() -> list[Any]:
    """The ops whose results `attention_saved` keeps."""
    found = (getattr(getattr(torch.ops, space), op, None) for space, op in (name.split("::") for name in ATTENTION_OPS))
    return [op.default for op in found if op is not None] + [scheme.forward for scheme in schemes.SCHEMES.values()]


def checkpoint_layers(model: nn.Module, kind: str, every: int = 1) -> None:
    """Has every `every`-th layer keep for its backward what `kind` (one of CHECKPOINTING) says."""
    if kind == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False}
    if kind == "attention_saved":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, attention_ops())
    for layer in layers(model)[::every]:
        layer.forward = _checkpointed(layer.forward, options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def again(*args: Any, **inputs: Any) -> Any:
        return checkpoint(forward, *args, **inputs, **options)

    return again


def compile_layers(
    model: nn.Module, compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> None:
    """Has every layer run compiled, by `compiler` (torch.compile); lengths of documents may vary without compiling
    anew."""
    for layer in layers(model):
        layer.forward = _gradients_aside(layer, (compiler or torch.compile)(layer.forward))


def _gradients_aside(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Takes gradients of another type than their weight's (`grad_dtype`) off the layer while it runs: compiling anew
    in the midst of an accumulation, Dynamo breaks the graph at such a weight, and never compiles a checkpointed layer.
    The weights are looked up at each call, as FSDP2 puts others in their place."""

    def aside(*args: Any, **inputs: Any) -> Any:
        weights = [w for w in layer.parameters() if w.grad is not None and w.grad.dtype != w.dtype]
        gradients = [w.grad for w in weights]
        for weight in weights:
            weight.grad = None
        try:
            return forward(*args, **inputs)
        finally:
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient

    return aside


def compiled_anew() -> None:
    """From here on `compiled` counts."""
    utils.clear_compilation_metrics()
    utils.counters["inductor"].clear()
    utils.counters["graph_break"].clear()


def compiled() -> dict[str, Any]:
    """What compiling took since `compiled_anew`: seconds, graphs, how many of them torch had in its cache on disk
    (TORCHINDUCTOR_CACHE_DIR), and where a layer breaks into several. Empty where nothing was compiled."""
    done = utils.get_compilation_metrics()
    if not done:
        return {}
    seconds = sum((each.end_time_us or 0) - (each.start_time_us or 0) for each in done) / 1e6
    cached, made = (utils.counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss"))
    breaks = [reason.splitlines()[0] for reason in utils.counters["graph_break"]]
    return {"compile_s": round(seconds, 1), "graphs": cached + made, "graphs_cached": cached, "graph_breaks": breaks}


def float8_layers(model: nn.Module) -> None:
    """Has the linear layers (not the head) multiply in float8, one scale for each tensor, by torchao."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    head = model.get_output_embeddings()
    config = Float8LinearConfig.from_recipe_name("tensorwise")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: module is not head)

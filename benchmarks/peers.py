"""The attention that ours is compared with, all called the same way: `call(q, k, v, is_causal) -> o`.

q, o `[B, Hq, T, D]`, k, v `[B, Hkv, T, D]`; differentiable. Each maker imports what its peer needs when it is called,
and raises ImportError where that is missing. A call raises whatever the peer raises for a shape that it refuses.

    sdpa        torch's scaled_dot_product_attention, on one of its backends
    fa4         FlashAttention-4 (BF16); on Hopper its Hopper kernels
    cudnn_fp8   cuDNN's FP8 attention (E4M3, one scale a tensor)

Versions of the last two, and how to install them: docs/install.md.

cuDNN FP8 takes and gives FP8 tensors whose scales are known beforehand: casts from and to BF16, and finding the scales,
are left out of its time, in its favour.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Call = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def sdpa(*backends: SDPBackend) -> Call:
    """torch's own, on the backends named (any of them; torch's choice when none is named)."""

    def call(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        if not backends:
            return attend(q, k, v, is_causal=is_causal, enable_gqa=True)
        with sdpa_kernel(list(backends)):
            return attend(q, k, v, is_causal=is_causal, enable_gqa=True)

    return call


def fa4() -> Call:
    from flash_attn.cute import flash_attn_func

    def call(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        result = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=is_causal)
        return (result[0] if isinstance(result, tuple) else result).transpose(1, 2)

    return call


# ---------------------------------------------------------------------------------------------- cuDNN FP8

# What FP8 values were multiplied by. q, k, v and dO have unit variance here and need nothing; P is at most 1, dS (which
# cuDNN calls dP) and the results are small. Powers of two that use E4M3's range (448) without leaving it.
SCALES = {"s": 256.0, "o": 16.0, "dP": 32.0, "dQ": 16.0, "dK": 16.0, "dV": 16.0}
FORWARD_SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
BACKWARD_SCALARS = (
    *("descale_q", "descale_k", "descale_v", "descale_o", "descale_dO", "descale_s", "descale_dP"),
    *("scale_s", "scale_dQ", "scale_dK", "scale_dV", "scale_dP"),
)


def cudnn_fp8() -> Call:
    import cudnn  # noqa: F401  (now, so that it is missed before anything is measured)

    return _CudnnFP8.apply


@cache
def _scalars(names: tuple[str, ...], device: torch.device) -> dict[str, Tensor]:
    def value(name: str) -> float:
        kind, _, tensor = name.partition("_")
        scale = SCALES.get(tensor, 1.0)
        return scale if kind == "scale" else 1 / scale

    return {name: torch.full((1, 1, 1, 1), value(name), device=device) for name in names}


_graphs: dict[tuple, Callable[[], None]] = {}


def _run(operation: str, inputs: dict[str, Tensor], outputs: list[Tensor], is_causal: bool) -> None:
    """Executes `pygraph.<operation>(**inputs) -> outputs`; the graph is built at the first call for these layouts."""
    layouts = tuple((x.shape, x.stride()) for x in (*inputs.values(), *outputs))
    key = (operation, is_causal, layouts)
    if key not in _graphs:
        _graphs[key] = _build(operation, inputs, outputs, is_causal)
    _graphs[key](list(inputs.values()) + outputs)


def _build(operation: str, inputs: dict[str, Tensor], outputs: list[Tensor], is_causal: bool) -> Callable:
    import cudnn

    fp8, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
    types = {torch.float8_e4m3fn: fp8, torch.float32: fp32}
    graph = cudnn.pygraph(io_data_type=fp8, intermediate_data_type=fp32, compute_data_type=fp32)
    operands = {
        name: graph.tensor(dim=list(x.shape), stride=list(x.stride()), data_type=types[x.dtype])
        for name, x in inputs.items()
    }
    options: dict[str, Any] = {"attn_scale": inputs["q"].shape[-1] ** -0.5, "use_causal_mask": is_causal}
    if operation == "sdpa_fp8":
        options["is_inference"] = False
    results = getattr(graph, operation)(**operands, **options)
    for result, x in zip(results, outputs, strict=True):
        result.set_output(True).set_dim(list(x.shape)).set_stride(list(x.stride())).set_data_type(types[x.dtype])
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    workspace = torch.empty(graph.get_workspace_size(), dtype=torch.uint8, device=outputs[0].device)
    places = [*operands.values(), *results]
    return lambda tensors: graph.execute(dict(zip(places, tensors, strict=True)), workspace)


class _CudnnFP8(torch.autograd.Function):
    """FP8 in, FP8 out; O and the gradients are multiplied by SCALES."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
        o, stats = torch.empty_like(q), q.new_empty(*q.shape[:3], 1, dtype=torch.float32)
        amax = [q.new_empty(1, 1, 1, 1, dtype=torch.float32) for _ in range(2)]
        inputs = {"q": q, "k": k, "v": v} | _scalars(FORWARD_SCALARS, q.device)
        _run("sdpa_fp8", inputs, [o, stats, *amax], is_causal)
        ctx.save_for_backward(q, k, v, o, stats)
        ctx.is_causal = is_causal
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, stats = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        amax = [q.new_empty(1, 1, 1, 1, dtype=torch.float32) for _ in range(4)]
        inputs = {"q": q, "k": k, "v": v, "o": o, "dO": d_o, "stats": stats}
        _run("sdpa_fp8_backward", inputs | _scalars(BACKWARD_SCALARS, q.device), gradients + amax, ctx.is_causal)
        return *gradients, None

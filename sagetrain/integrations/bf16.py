"""The arms that INT8 attention is compared with: BF16 attentions of others, each at its best.

Method. Every arm is an attention function of transformers under a name of its own (`bf16_varlen`, ...; in a recipe
`attention=varlen`). All but `flex` share the masks of huggingface.py: plain causal rows reach them without a mask,
compiled or not; packed documents and padding as cu_seqlens. `bf16` is no arm but a choice: the first of `ORDER` that
runs here.

    fa4, fa3, fa2   FlashAttention of the packages flash-attn-4 (by flash4.py), flash-attn-3, flash-attn
    varlen          SDPA for plain rows, torch's varlen_attn (FlashAttention-2) for packed and padded ones
    flex            transformers' own flex_attention, which makes its block mask from position_ids
    sdpa            SDPA. Packed and padded: on a CPU one call for each document, on a GPU a dense mask
    sdpa_cudnn      the same on cuDNN and on nothing else

Choice. transformers' own `sdpa` gets a dense [T, T] mask for packed documents, and for plain rows too once compiled;
its flash_attention_* look for packing in every layer, waiting for the device. Named arms that cannot run are refused.

Cost. `ran` says what ran since `forget`, and why its speed is no baseline (a dense mask, SDPA's math backend). The
attention functions note it themselves, when they run or are traced, so a compiled graph spends nothing on it.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import flex_attention_mask
from transformers.masking_utils import sdpa_mask as dense_mask
from transformers.utils import import_utils

from sagetrain.integrations import flash4
from sagetrain.integrations.huggingface import Sequences, adapter, sage_mask
from sagetrain.ops import schemes

PREFIX = "bf16_"
ORDER = ("fa4", "fa3", "fa2", "varlen", "flex", "sdpa")
DENSE = "a dense [T, T] mask, so SDPA computed what the mask hides"
MATH = "SDPA's math backend, which writes all T x T scores to memory"
BACKENDS = {0: "SDPA math", 1: "SDPA flash", 2: "SDPA memory-efficient", 3: "SDPA cuDNN"}  # torch's numbers

_ran: dict[str, str] = {}  # what ran -> why its speed is no baseline, "" when it is one


class Arm(NamedTuple):
    lacks: Callable[[torch.device], str]  # what keeps it from running there; "" when nothing does
    make: Callable[[], tuple[Callable[..., Any], Callable[..., Any]]]  # its attention and its mask function


# ------------------------------------------------------------------------------------------------ what ran


def forget() -> None:
    """Begin to watch anew. Compiled graphs are noted when they are traced: reset the compiler as well."""
    _ran.clear()


def ran(implementation: str) -> tuple[str, str | None]:
    """(what ran since `forget`, why its speed is no baseline or None) for a model with this implementation."""
    if _ran:
        return ", ".join(sorted(_ran)), "; ".join(sorted({x for x in _ran.values() if x})) or None
    handicap = None if implementation in schemes.SCHEMES else f"nobody watched what transformers' {implementation} ran"
    return implementation, handicap


@torch.compiler.assume_constant_result
def _note(what: str, handicap: str = "") -> bool:
    _ran[what] = handicap
    return True


@torch.compiler.assume_constant_result
def _note_sdpa(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], masked: bool, is_causal: bool, how: str
) -> bool:
    """Notes the backend that SDPA takes for such tensors; shape is (query heads, key heads, D of q, D of v)."""
    on = torch.backends.cuda
    enabled = (on.flash_sdp_enabled(), on.mem_efficient_sdp_enabled(), on.math_sdp_enabled(), on.cudnn_sdp_enabled())
    backend = _backend(device, dtype, shape, masked, is_causal, enabled)
    handicaps = [DENSE] * masked + [MATH] * (backend == 0)
    _ran[BACKENDS.get(backend, "SDPA") + masked * " with a dense mask" + how] = "; ".join(handicaps)
    return True


@cache
def _backend(
    device: str, dtype: torch.dtype, shape: tuple[int, ...], masked: bool, is_causal: bool, enabled: tuple[bool, ...]
) -> int:
    """SDPA's choice, by torch's number, which depends on no value and on no length."""
    heads, kv_heads, width, v_width = shape
    q, k, v = (
        torch.empty(1, h, 128, d, dtype=dtype, device=device, requires_grad=True)
        for h, d in ((heads, width), (kv_heads, width), (kv_heads, v_width))
    )
    mask = torch.ones(1, 1, 128, 128, dtype=torch.bool, device=device) if masked else None
    return torch._fused_sdp_choice(q, k, v, mask, 0.0, is_causal, scale=None, enable_gqa=heads != kv_heads)


# ------------------------------------------------------------------------------------------------ kernels


def _cast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """To the autocast dtype, as SDPA does by itself and the others do not."""
    if torch.is_autocast_enabled(q.device.type):
        return tuple(x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    return q, k, v


def _documents(cu: Tensor, tokens: int) -> Tensor:
    """Number of the sequence that each of `tokens` tokens belongs to."""
    return torch.searchsorted(cu, torch.arange(tokens, device=cu.device, dtype=cu.dtype), right=True)


@torch.compiler.disable  # Inductor (torch 2.11) does not lower some of these masks: compiled graphs break here
def _same_document(s: Sequences, rows: int, tokens_q: int, tokens_k: int) -> Tensor:
    """[B, 1, Tq, Tk] bool: query and key are of one sequence and the key is not ahead (bottom-right)."""
    document, other = _documents(s.cu_q, rows * tokens_q), _documents(s.cu_k, rows * tokens_k)
    place = torch.arange(rows * tokens_q, device=s.cu_q.device)
    if s.is_causal:  # the last key that a query sees, counted from the end of its sequence
        ends_q, ends_k = (nn.functional.pad(cu, (0, 1)) for cu in (s.cu_q, s.cu_k))
        place = place - ends_q[document] + ends_k[document]
    q = (document.view(rows, 1, tokens_q, 1), place.view(rows, 1, tokens_q, 1))
    key = torch.arange(rows * tokens_k, device=s.cu_q.device).view(rows, 1, 1, tokens_k)
    same = q[0] == other.view(rows, 1, 1, tokens_k)
    return same & (key <= q[1]) if s.is_causal else same


def _call_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, dropout: float,
    backend: SDPBackend | None = None, how: str = "",
) -> Tensor:  # fmt: skip
    if is_causal and q.shape[2] != k.shape[2]:
        is_causal = False
        if q.shape[2] > 1:  # SDPA would align it top-left
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
            mask = mask.tril(k.shape[2] - q.shape[2])
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))  # grouped heads would mean the math backend
    if backend is None:
        shape = (q.shape[1], k.shape[1], q.shape[3], v.shape[3])
        _note_sdpa(q.device.type, q.dtype, shape, mask is not None, is_causal, how)
    else:
        _note(BACKENDS[3] + (mask is not None) * " with a dense mask", DENSE if mask is not None else "")
    options = {"attn_mask": mask, "dropout_p": dropout, "is_causal": is_causal, "scale": scale}
    return functional.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **options)


@torch.compiler.disable  # lengths are data: compiled graphs break here
def _one_by_one(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float | None, dropout: float) -> Tensor:
    """One call of SDPA for each sequence, and so no mask: [B, Hq, Tq, D] -> [B, Tq, Hq, D]."""
    rows, tokens = q.shape[0], q.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
    parts, done = [], 0
    for (start, end), (first, last) in zip(pairwise(s.cu_q.tolist()), pairwise(s.cu_k.tolist()), strict=True):
        if start < end and first < last:
            part = q[:, :, start:end], k[:, :, first:last], v[:, :, first:last]
            parts += [q.new_zeros(1, q.shape[1], start - done, v.shape[3])]
            parts += [_call_sdpa(*part, None, s.is_causal, scale, dropout, how=", one call for each document")]
            done = end
    parts += [q.new_zeros(1, q.shape[1], rows * tokens - done, v.shape[3])]
    return torch.cat(parts, dim=2)[0].transpose(0, 1).unflatten(0, (rows, tokens))


def _sdpa(backend: SDPBackend | None = None) -> Callable[..., Tensor]:
    def kernel(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float | None, dropout: float, **_: Any) -> Tensor:
        q, k, v = _cast(q, k, v)
        mask, is_causal = None, s.is_causal
        if s.cu_q is not None:
            if q.device.type == "cpu":
                return _one_by_one(q, k, v, s, scale, dropout)
            mask, is_causal = _same_document(s, q.shape[0], q.shape[2], k.shape[2]), False
        if backend is None:
            return _call_sdpa(q, k, v, mask, is_causal, scale, dropout).transpose(1, 2)
        with sdpa_kernel(backend):
            return _call_sdpa(q, k, v, mask, is_causal, scale, dropout, backend).transpose(1, 2)

    return kernel


def _packed(name: str, what: str, call: Callable[..., Tensor], plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A kernel out of two: call(q, k, v [tokens, H, D], s, scale, deterministic) for sequences, plain(the same, with
    [B, T, H, D]) for whole rows."""

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float | None, deterministic: bool, **_: Any
    ) -> Tensor:
        q, k, v = _cast(q, k, v)
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise TypeError(
                f"attention={name} takes bfloat16 and float16, and got {q.dtype}: set trainer.precision=bf16-mixed "
                "(torch.autocast), or choose attention=sdpa"
            )
        deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
        width, v_width = q.shape[-1], v.shape[-1]
        scale = width**-0.5 if scale is None else scale
        if width != v_width:  # multi-head latent attention: zeros change nothing
            q, k, v = (functional.pad(x, (0, max(width, v_width) - x.shape[-1])) for x in (q, k, v))
        rows, tokens = q.shape[0], q.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        if s.cu_q is None:
            output = plain(q, k, v, s, scale, deterministic)
        else:
            _note(what)
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            longest = (len(x) if known is None else known for x, known in ((q, s.max_q), (k, s.max_k)))
            s = Sequences(s.is_causal, s.cu_q, s.cu_k, *longest)
            output = call(q, k, v, s, scale, deterministic).unflatten(0, (rows, tokens))
        return output[..., :v_width] if v_width != output.shape[-1] else output

    return kernel


def _varlen() -> Callable[..., Tensor]:
    from torch.nn.attention.varlen import varlen_attn

    takes_groups = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def call(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, deterministic: bool) -> Tensor:
        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0) if s.is_causal else (-1, -1)}
        if takes_groups:
            options["enable_gqa"] = True
        else:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        return varlen_attn(q, k, v, s.cu_q, s.cu_k, s.max_q, s.max_k, **options)

    def plain(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, deterministic: bool) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return _call_sdpa(q, k, v, None, s.is_causal, scale, 0.0).transpose(1, 2)

    return _packed("varlen", "torch varlen_attn", call, plain)


FLASH = {  # version: (package to install, module, transformers' word on whether it is there, compute capability)
    2: ("flash-attn", "flash_attn", import_utils.is_flash_attn_2_available, 8),
    3: ("flash-attn-3", "flash_attn_interface", import_utils.is_flash_attn_3_available, 8),
    4: ("flash-attn-4", "flash_attn.cute.interface", import_utils.is_flash_attn_4_available, 9),
}


def _flash(version: int) -> Callable[..., Tensor]:
    if version == 4:  # the package's own are no ops of torch.library: compiled graphs would break
        rows = varlen = flash4.attention
    else:
        module = importlib.import_module(FLASH[version][1])
        rows, varlen = module.flash_attn_func, module.flash_attn_varlen_func
    what = f"FlashAttention-{version}"

    def first(output: Any) -> Tensor:
        return output[0] if isinstance(output, tuple) else output

    def call(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, deterministic: bool) -> Tensor:
        lengths = {"cu_seqlens_q": s.cu_q, "cu_seqlens_k": s.cu_k, "max_seqlen_q": s.max_q, "max_seqlen_k": s.max_k}
        options = {"softmax_scale": scale, "causal": s.is_causal, "deterministic": deterministic}
        return first(varlen(q, k, v, **lengths, **options))

    def plain(q: Tensor, k: Tensor, v: Tensor, s: Sequences, scale: float, deterministic: bool) -> Tensor:
        _note(what)
        return first(rows(q, k, v, softmax_scale=scale, causal=s.is_causal, deterministic=deterministic))

    return _packed(f"fa{version}", what, call, plain)


# ------------------------------------------------------------------------------------------------ arms


def sdpa_mask(
    *, kv_length: int, kv_offset: int = 0, local_size: int | None = None, use_vmap: bool = False, **options: Any
) -> Tensor | None:
    """The masks of `sage_mask`, and transformers' dense ones for windows and custom patterns."""
    windowed = kv_offset != 0 or (local_size is not None and kv_length > local_size)
    options |= {"kv_length": kv_length, "kv_offset": kv_offset, "local_size": local_size, "use_vmap": use_vmap}
    return (dense_mask if windowed or use_vmap else sage_mask)(**options)


def _sdpa_arm(name: str, backend: SDPBackend | None = None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    planned = adapter(PREFIX + name, _sdpa(backend), dropout=True)

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        if options.get("position_bias") is None and (attention_mask is None or attention_mask.dtype == torch.int32):
            return planned(module, query, key, value, attention_mask, **options)
        if options.get("cu_seq_lens_q") is not None:
            raise NotImplementedError(
                f"{PREFIX}{name} attention does not combine cu_seq_lens with windows or masks of your own. What to do: "
                "choose attn_implementation='sdpa' and pack by position_ids with use_cache=False"
            )
        _note("SDPA with a dense mask", DENSE)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    return attend, sdpa_mask


def _flex(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
    position_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None, **options: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    if cu_seq_lens_q is not None and position_ids is None:
        raise ValueError("attention=flex packs by position_ids, not by cu_seq_lens: give position_ids that restart")
    _note("FlexAttention")
    query, key, value = _cast(query, key, value)
    return flex_attention_forward(module, query, key, value, attention_mask, **options)[0], None


def _lacks_gpu(device: torch.device, capability: int = 8) -> str:
    able = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= capability
    return "" if able else f"a CUDA GPU of compute capability {capability}.0 or newer"


def _lacks_varlen(device: torch.device) -> str:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "torch 2.11 or newer"
    old = "window_size" not in inspect.signature(varlen_attn).parameters
    return _lacks_gpu(device) or ("torch 2.11 or newer" if old else "")


def _lacks_flash(version: int) -> Callable[[torch.device], str]:
    package, module, installed, capability = FLASH[version]

    def lacks(device: torch.device) -> str:
        if missing := _lacks_gpu(device, capability):
            return missing
        if not installed():
            return f"the package {package} (pip install {package})"
        try:
            importlib.import_module(module)
        except Exception as error:  # built for another torch, most of the time
            return f"a {package} that loads here ({type(error).__name__}: {error})"
        return flash4.lacks() if version == 4 else ""

    return lacks


ARMS = {
    **{f"fa{n}": Arm(_lacks_flash(n), lambda n=n: (adapter(f"{PREFIX}fa{n}", _flash(n)), sage_mask)) for n in FLASH},
    "varlen": Arm(_lacks_varlen, lambda: (adapter(f"{PREFIX}varlen", _varlen()), sage_mask)),
    "flex": Arm(_lacks_gpu, lambda: (_flex, flex_attention_mask)),
    "sdpa": Arm(lambda device: "", lambda: _sdpa_arm("sdpa")),
    "sdpa_cudnn": Arm(_lacks_gpu, lambda: _sdpa_arm("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION)),
}


def best(device: torch.device) -> str:
    """The arm that `bf16` stands for on a device."""
    return next(name for name in ORDER if not ARMS[name].lacks(device))


def report(device: torch.device) -> str:
    """Which arms run on a device, and what the others need, in one line."""
    arms: dict[str, list[str]] = {"": []}
    for name, arm in ARMS.items():
        arms.setdefault(arm.lacks(device), []).append(name)
    here = ", ".join(arms.pop(""))
    absent = [f"; {', '.join(names)}: needs {missing}" for missing, names in arms.items()]
    return f"attention=bf16 is {best(device)}; here: {here}{''.join(absent)}"


def choose(implementation: str, device: torch.device) -> str:
    """The name for transformers of an `implementation` in conf/attention, registered there when it is one of ours.

    "bf16" becomes the best arm that runs on the device; names that are not ours are returned as they are. Raises
    ValueError for an arm that cannot run there, with what it needs.
    """
    name = best(device) if implementation == "bf16" else implementation.removeprefix(PREFIX)
    if name not in ARMS or not (implementation == "bf16" or implementation.startswith(PREFIX)):
        return implementation
    if missing := ARMS[name].lacks(device):
        instead = f"attention=bf16 takes the best that runs here: {best(device)}"
        raise ValueError(f"attention={name} needs {missing}; {instead}")
    attention, mask = ARMS[name].make()
    AttentionInterface.register(PREFIX + name, attention)
    AttentionMaskInterface.register(PREFIX + name, mask)
    return PREFIX + name

"""Hugging Face plug: every scheme is an `attn_implementation` for the models of transformers.

Method. transformers asks two registered functions. `sage_mask` runs once per forward and says which tokens belong
together; the attention runs in every layer. A batch of B rows with padding, a KV cache or packed documents is, for
our op, one packed row of B*T tokens and the first token of each sequence in it (cu_seqlens). So `sage_mask` never
builds a [Tq, Tk] mask. It returns None where plain causal or full attention is meant, else a small *plan*:

    plan [2, kind, Tk, N + 1] int32    plan[0, 0, 0] = cu_seqlens_q, plan[1, 0, 0] = cu_seqlens_k

    row b with padding, three sequences:   | left pad | real tokens | right pad, unwritten cache |     N = 3 * B
    row b with packed documents:           | document | document | ... |                               N = documents

Choice. A plan is a 4-dimensional tensor because transformers hands those through untouched (compile, checkpointing,
generate); kind and Tk live in its shape, because a shape can be checked without waiting for the device (the data of the
middle dimensions is one element, expanded). Pads attend pads: no gather, no scatter, views wherever strides allow.

`adapter` makes an attention function of any kernel that takes cu_seqlens: the schemes here, the BF16 arms of bf16.py.

Cost. O(B*T) integers per forward, one or two device synchronisations when not compiled (transformers does the same to
look for packing), none when compiled: there a broken promise stops the program through an asynchronous assertion.
Whatever is not honoured raises, naming what was asked and what to do instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
from transformers.utils.import_utils import is_tracing

from sagetrain.ops import schemes
from sagetrain.ops.functional import attention

# Kinds of plan. UNCHECKED (only while compiling) holds the number of document starts that were seen, which has to be 0
# unless the documents come as cu_seq_lens.
_PADDED, _PADDED_FULL, _PACKED, _UNCHECKED = 1, 2, 3, 4

# What transformers passes along that changes nothing in the attention itself.
_HARMLESS = frozenset(
    ("use_cache", "cache_position", "past_key_values", "position_embeddings", "num_items_in_batch", "shift_labels")
    + ("ignore_index", "output_hidden_states", "output_router_logits", "logits_to_keep", "return_dict")
)
_PASS_CU_SEQLENS = (
    "pass cu_seq_lens_q and cu_seq_lens_k (int32, first token of each document) to the model, or leave out "
    "attention_mask and set use_cache=False so that transformers packs by position_ids (when not compiled)"
)


class Sequences(NamedTuple):
    """Which tokens see each other. Without cu_*, each row is one sequence; with them, the B*T tokens of the flattened
    batch are cut at cu_q and cu_k, int32 `[N + 1]`. Causal is aligned bottom-right in each sequence. No sequence is
    longer than max_q, max_k; None where nobody said. Who does not need them does not look: compilers guard them."""

    is_causal: bool
    cu_q: Tensor | None
    cu_k: Tensor | None
    max_q: int | None
    max_k: int | None


def _refuse(name: str, asked: str, instead: str = "choose attn_implementation='sdpa' for this model") -> NoReturn:
    raise NotImplementedError(
        f"{name} attention does not support {asked}. Supported: causal or full attention, padding given as a 2D "
        f"attention_mask, packed documents, KV caches. What to do: {instead}."
    )


def _refuse_window(name: str, window: int | None, keys: int) -> NoReturn:
    _refuse(
        name,
        f"a sliding window or chunk of {window} tokens over {keys} keys",
        "set config.sliding_window=None if full attention is meant, else choose attn_implementation='sdpa'",
    )


def _refuse_dropout(name: str, module: nn.Module, dropout: float) -> NoReturn:
    """Names the setting that this very model has: attention_dropout, attn_pdrop, attention_probs_dropout_prob, ..."""
    settings = vars(getattr(module, "config", None) or PreTrainedConfig())
    equal = [key for key, value in settings.items() if "drop" in key and value == dropout]
    ours = [key for key in equal if "att" in key] or equal
    setting = " and ".join(f"config.{key}=0.0" for key in ours) or "the attention dropout of its config to 0.0"
    recipe = f"; in a run: model.config.{ours[0]}=0.0" if ours else ""
    _refuse(name, f"attention dropout ({dropout})", f"set {setting} before building the model{recipe}")


def _require(ok: Tensor, message: str) -> None:
    """Raises when the one-element tensor `ok` is false: at once when not compiled, else by an asynchronous assertion.

    No double quote in `message`: Inductor writes it into C++ source as it is.
    """
    if is_tracing(ok):
        torch._assert_async(ok, message)
    elif not ok:
        raise ValueError(message)


def _require_no_restarts(ok: Tensor, name: str) -> None:
    _require(
        ok,
        f"{name} attention: position_ids restart, so documents are packed, but transformers hides that from the "
        f"attention when compiling, with a cache, or with an attention_mask. What to do: {_PASS_CU_SEQLENS}",
    )


def _plan(kind: int, cu_q: Tensor, cu_k: Tensor, tokens_k: int) -> Tensor:
    return torch.stack((cu_q, cu_k)).to(torch.int32)[:, None, None].expand(-1, kind, tokens_k, -1)


def _packed_plan(starts: Tensor) -> Tensor:
    """starts [B, T] bool, true at the first token of each document -> plan (N = number of documents)."""
    rows, tokens = starts.shape
    cu = torch.cat((starts.flatten().nonzero()[:, 0], starts.new_full((1,), rows * tokens, dtype=torch.int64)))
    return _plan(_PACKED, cu, cu, tokens)


def _padded_plan(real: Tensor, tokens_q: int, offset: int | Tensor, full: bool, name: str) -> Tensor:
    """real [B, Tk] bool, one unbroken run of true in each row; query i stands at key offset + i -> plan (N = 3 * B).

    Causal: queries at pads join the pads beside them. Full: every query attends the real keys, as under `sdpa`.
    """
    rows, tokens_k = real.shape
    count = real.sum(-1)
    first = real.int().argmax(-1)  # 0 in a row without any real token: then everything is right padding
    last = first + count
    unbroken = (last == tokens_k - real.flip(-1).int().argmax(-1)) | (count == 0)
    _require(
        unbroken.all(),
        f"{name} attention needs the ones of an attention_mask row in one unbroken run (padding left, right or both); "
        "this mask has holes: move the padding to the ends, or choose attn_implementation='sdpa'",
    )

    def cu(first: Tensor, last: Tensor, tokens: int) -> Tensor:
        row = torch.arange(rows, device=real.device) * tokens
        starts = torch.stack((row, row + first.clamp(0, tokens), row + last.clamp(0, tokens)), dim=-1)
        return torch.cat((starts.flatten(), row.new_full((1,), rows * tokens)))

    if full:
        cu_q = cu(torch.zeros_like(first), torch.full_like(last, tokens_q), tokens_q)
    else:
        cu_q = cu(first - offset, last - offset, tokens_q)
    return _plan(_PADDED_FULL if full else _PADDED, cu_q, cu(first, last, tokens_k), tokens_k)


def sage_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: int | Tensor = 0, kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function, attention_mask: Tensor | None = None,
    local_size: int | None = None, use_vmap: bool = False, device: torch.device | str = "cpu",
    config: PreTrainedConfig | None = None, **_: Any,
) -> Tensor | None:  # fmt: skip
    """Mask function of transformers: None for plain causal or full attention, else a plan (module docstring).

    attention_mask [B, tokens seen] bool, true at real tokens; q_offset tokens are in the cache before this call.
    `mask_function` is causal, full, or a pattern that is looked at only between neighbouring tokens, which tells packed
    documents exactly. Windows with an effect and custom patterns raise NotImplementedError, masks with holes
    ValueError. The remaining keywords choose how `sdpa` and `eager` build their mask, not which one.
    """
    name = getattr(config, "_attn_implementation", None) or schemes.DEFAULT
    if use_vmap:
        _refuse(name, "custom mask patterns (or_mask_function, and_mask_function)")
    if kv_offset != 0 or (local_size is not None and kv_length > local_size):
        _refuse_window(name, local_size, kv_offset + kv_length)
    if attention_mask is not None and attention_mask.ndim != 2:
        _refuse(name, f"an attention_mask of shape {tuple(attention_mask.shape)}", "give a 2D attention_mask [B, T]")
    tracing = is_tracing(attention_mask)
    if isinstance(q_offset, Tensor) and not tracing:
        q_offset = int(q_offset)
    full = mask_function is bidirectional_mask_function
    if not full and mask_function is not causal_mask_function:
        row, token = torch.arange(batch_size, device=device)[:, None], torch.arange(kv_length, device=device)[None]
        ahead = mask_function(row, row.new_zeros(()), token[:, :-1], token[:, 1:])
        _require(~ahead.any(), f"{name} attention cannot look ahead inside blocks; choose attn_implementation='sdpa'")
        behind = mask_function(row, row.new_zeros(()), token[:, 1:], token[:, :-1])
        starts = nn.functional.pad(~behind.expand(batch_size, -1), (1, 0), value=True)
        restarts = ~behind.all()
        if attention_mask is not None or isinstance(q_offset, Tensor) or q_offset != 0 or kv_length != q_length:
            _require(~restarts, f"{name} attention: packed documents cannot have an attention_mask or past keys")
        elif tracing:
            return _plan(_UNCHECKED, restarts[None], restarts[None], kv_length)
        elif restarts:
            return _packed_plan(starts)

    token = torch.arange(kv_length, device=device)
    written = kv_length if full else q_offset + q_length
    if attention_mask is None:
        if not isinstance(written, Tensor) and written == kv_length:
            return None
        real = token < written
    else:
        if not full and not isinstance(written, Tensor) and attention_mask.shape[1] < written:
            raise ValueError(
                f"attention_mask covers {attention_mask.shape[1]} tokens, but with the cache there are {written}: "
                "give one value for every token seen so far"
            )
        real = nn.functional.pad(attention_mask.bool(), (0, max(kv_length - attention_mask.shape[1], 0)))[:, :kv_length]
        real = real & (token < written)
        if not tracing and real.all():
            return None
    return _padded_plan(real.expand(batch_size, -1), q_length, 0 if full else q_offset, full, name)


def _check_positions(name: str, position_ids: Tensor, query: Tensor, plan: Tensor | None) -> None:
    """Refuses position ids that restart among real tokens: documents that transformers hid from `sage_mask`."""
    rows, tokens = query.shape[0], query.shape[2]
    if position_ids.ndim != 2 or position_ids.shape[1] != tokens:
        _refuse(name, f"position_ids of shape {tuple(position_ids.shape)} for {tokens} tokens", _PASS_CU_SEQLENS)
    restarts = position_ids.diff(dim=-1) != 1
    if plan is not None:  # the step from one token to the next counts where both are real
        token = torch.arange(1, tokens, device=query.device)
        cu = plan[0, 0, 0, :-1].view(rows, 3) - torch.arange(rows, device=query.device)[:, None] * tokens
        restarts = restarts & (token > cu[:, 1:2]) & (token < cu[:, 2:3])
    _require_no_restarts(~restarts.any(), name)


def _check_seq_idx(name: str, seq_idx: Tensor, query: Tensor, cu_q: Tensor | None) -> None:
    """Refuses numbers of documents, one for each token, that say anything else than the sequences do."""
    rows, tokens = query.shape[0], query.shape[2]
    if tuple(seq_idx.shape) != (rows, tokens):
        _refuse(name, f"seq_idx of shape {tuple(seq_idx.shape)} for {rows} rows of {tokens} tokens", _PASS_CU_SEQLENS)
    starts = torch.zeros(rows * tokens + 1, dtype=torch.bool, device=query.device)
    if cu_q is not None:
        starts = starts.index_fill(0, cu_q.long().clamp(0, rows * tokens), True)
    changes = seq_idx.diff(dim=-1) != 0
    _require(
        (changes == starts[:-1].view(rows, tokens)[:, 1:]).all(),
        f"{name} attention: seq_idx has other documents than cu_seq_lens (or position_ids): {_PASS_CU_SEQLENS}",
    )


def adapter(name: str, kernel: Callable[..., Tensor], dropout: bool = False) -> Callable[..., tuple[Tensor, None]]:
    """An attention function of transformers, for masks of `sage_mask`, that calls `kernel`.

    kernel(query [B, Hq, Tq, D], key, value [B, Hkv, Tk, D], sequences, scale=, dropout=, deterministic=) gives
    [B, Tq, Hq, D] and meets dropout > 0 only where `dropout` says that it can.
    """
    can_drop = dropout

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
        sliding_window: int | None = None, position_ids: Tensor | None = None, cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None, max_length_q: int | None = None, max_length_k: int | None = None,
        seq_idx: Tensor | None = None, deterministic: bool | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """query [B, Hq, Tq, D], key, value [B, Hkv, Tk, D] -> ([B, Tq, Hq, D], None).

        attention_mask: None or a plan of `sage_mask`. cu_seq_lens_q, cu_seq_lens_k: integer [N + 1], first token of
        each document in the B*T tokens of the flattened batch; they win over position_ids. seq_idx [B, T], the number
        of each token's document, is redundant and has to agree. Anything not honoured raises NotImplementedError (a
        feature) or ValueError (contradicting arguments).
        """
        for argument, asked in kwargs.items():
            if argument not in _HARMLESS and asked is not None and asked is not False:
                instead = f"leave {argument} out or choose attn_implementation='sdpa' (or 'eager')"
                _refuse(name, f"the argument {argument}", instead)
        if dropout > 0 and not can_drop:
            _refuse_dropout(name, module, dropout)
        rows, tokens_q, tokens_k = query.shape[0], query.shape[2], key.shape[2]
        if sliding_window is not None and tokens_k > sliding_window:
            _refuse_window(name, sliding_window, tokens_k)
        kind = 0
        if attention_mask is not None:
            kind = attention_mask.shape[1] if attention_mask.ndim == 4 and attention_mask.dtype == torch.int32 else 0
            if kind not in (_PADDED, _PADDED_FULL, _PACKED, _UNCHECKED) or attention_mask.shape[2] != tokens_k:
                _refuse(
                    name,
                    f"an attention_mask of shape {tuple(attention_mask.shape)} and type {attention_mask.dtype} "
                    f"for {tokens_k} keys (4D masks, ALiBi and position biases are masks of this kind)",
                    "give a 2D attention_mask [B, T] to the model, or choose attn_implementation='sdpa'",
                )
        padded = kind in (_PADDED, _PADDED_FULL)
        if padded and attention_mask.shape[3] != 3 * rows + 1:
            _refuse(name, f"a padding mask for {(attention_mask.shape[3] - 1) // 3} rows with {rows} query rows")
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        # Once per forward is enough; a compiled layer must not depend on its number
        first_layer = torch.compiler.is_compiling() or not getattr(module, "layer_idx", None)
        cu_q = cu_k = None
        max_q, max_k = tokens_q, tokens_k
        if cu_seq_lens_q is not None or cu_seq_lens_k is not None:
            if cu_seq_lens_q is None or cu_seq_lens_k is None:
                raise ValueError("cu_seq_lens_q and cu_seq_lens_k go together: give both (the same tensor will do)")
            if padded or tokens_q != tokens_k:
                raise ValueError(
                    f"cu_seq_lens_q/k cannot be combined with padding or past keys ({tokens_q} queries, {tokens_k} "
                    "keys): leave attention_mask out (packed rows have no padding), pack only at the start of a cache"
                )
            cu_q, cu_k = cu_seq_lens_q.to(torch.int32), cu_seq_lens_k.to(torch.int32)
            max_q, max_k = max_length_q, max_length_k
        else:
            if kind == _UNCHECKED:
                _require_no_restarts(attention_mask[0, 0, 0, 0] == 0, name)
            elif kind:
                is_causal = kind != _PADDED_FULL
                cu_q, cu_k = attention_mask[0, 0, 0], attention_mask[1, 0, 0]
            if is_causal and kind != _PACKED and position_ids is not None and tokens_q > 1 and first_layer:
                _check_positions(name, position_ids, query, attention_mask if padded else None)
        if seq_idx is not None and first_layer:
            _check_seq_idx(name, seq_idx, query, cu_q)
        sequences = Sequences(bool(is_causal), cu_q, cu_k, max_q, max_k)
        options = {"scale": scaling, "dropout": dropout, "deterministic": bool(deterministic)}
        return kernel(query, key, value, sequences, **options).contiguous(), None

    return attend


def _kernel(scheme: str) -> Callable[..., Tensor]:
    def kernel(q: Tensor, k: Tensor, v: Tensor, s: Sequences, *, dropout: float, **options: Any) -> Tensor:
        options |= {"is_causal": s.is_causal, "cu_seqlens_q": s.cu_q, "cu_seqlens_k": s.cu_k, "scheme": scheme}
        if s.cu_q is None:
            return attention(q, k, v, **options).transpose(1, 2)
        rows, tokens = q.shape[0], q.shape[2]
        q, k, v = (x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None] for x in (q, k, v))
        output = attention(q, k, v, **options)
        return output[0].transpose(0, 1).unflatten(0, (rows, tokens))

    return kernel


def register(scheme: schemes.Scheme) -> None:
    """Adds the name to the attention and to the mask functions of transformers; changes nothing else there.

    Raises ValueError for a name that transformers has already.
    """
    taken = AttentionInterface().get(scheme.name)
    if scheme.name == "eager" or (taken is not None and not hasattr(taken, "scheme")):
        raise ValueError(f"scheme {scheme.name!r}: transformers has an attention of that name")
    attend = adapter(scheme.name, _kernel(scheme.name))
    attend.scheme = scheme.name  # known again when this module is reloaded
    AttentionInterface.register(scheme.name, attend)
    AttentionMaskInterface.register(scheme.name, sage_mask)


schemes.watch(register)

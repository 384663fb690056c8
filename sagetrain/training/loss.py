"""Next-token cross-entropy without the logits of all tokens: what large vocabularies cost in memory.

Method: the tokens are cut into chunks. Of each chunk the logits are made, turned in place into their own gradient
(softmax - one-hot) and multiplied into the gradients of hidden states and of the head's weight; then the next chunk
takes their memory. So there are never more than `CHUNK` rows of logits, forward and backward together, and no matrix
product is done twice. The gradient is kept unscaled, the sum over targets, until the backward knows its factor, so that
nothing underflows. Sums over tokens are in fp32.
Choice: not liger-kernel's, which cuts 8,192 tokens of 128,256 logits into chunks of 256 and passes over the gradient of
the head for each of them: several times slower on an H100 (docs/LOG.md), and there is none for CPUs. `fuse` replaces a
Hugging Face model's `forward` and the head's, so whatever wraps these modules (FSDP2, ZeRO-3) still gathers their
weights.
Cost: the gradient of the head's weight is held from forward to backward. Logits are rounded to the type of the matrix
product, as under autocast.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from sagetrain.data.collate import IGNORE

CHUNK = 4096  # tokens; at 128,256 logits 1 GB in bf16
TRIED = 8  # tokens that `can_fuse` compares
LARGE = 200.0  # logit
OWN = {"shift_labels", "ignore_index", "logits_to_keep", "output_hidden_states", "output_attentions", "return_dict"}
TOLERANCE = 1e-5  # of the mean loss, relative


def _to_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum of the losses of a chunk, fp32 []; logits [n, V] become their gradient."""
    full, kept = logits.float(), (labels != IGNORE)[:, None]
    target = labels.clamp(min=0)[:, None]
    log_sum = full.logsumexp(-1, keepdim=True)
    total = torch.where(kept, log_sum - full.gather(1, target), 0.0).sum()
    hot = torch.arange(full.shape[1], device=full.device) == target
    logits.copy_(torch.where(kept, (full - log_sum).exp() - hot.float(), 0.0))
    return total


_to_gradient_compiled = torch.compile(_to_gradient)


def _to_gradient_eager(logits: Tensor, labels: Tensor) -> Tensor:
    """The same in half as many passes, where nothing fuses them."""
    kept = (labels != IGNORE).nonzero()[:, 0]
    target = kept, labels[kept]
    log_p = functional.log_softmax(logits.float(), -1)
    total = -log_p[target].sum()
    gradient = log_p.exp_()
    gradient[target] -= 1.0
    gradient[labels == IGNORE] = 0.0
    logits.copy_(gradient)
    return total


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total may be of a wider type."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b


class _FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, factor: Tensor
    ) -> Tensor:
        where = hidden.device.type
        dtype = torch.get_autocast_dtype(where) if torch.is_autocast_enabled(where) else weight.dtype
        x, w, b = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        to_gradient = _to_gradient_compiled if hidden.is_cuda else _to_gradient_eager
        learns = ctx.needs_input_grad  # frozen weights cost nothing
        d_hidden = torch.empty_like(x) if learns[0] else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if learns[1] else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if learns[2] else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, len(x), CHUNK):
            chunk = slice(start, start + CHUNK)
            logits = functional.linear(x[chunk], w, b)
            total += to_gradient(logits, labels[chunk])
            if d_hidden is not None:
                torch.mm(logits, w, out=d_hidden[chunk])
            if d_weight is not None:
                _add_product(d_weight, logits.t(), x[chunk])
            if d_bias is not None:
                d_bias += logits.sum(0, dtype=torch.float32)
            del logits
        ctx.save_for_backward(d_hidden, d_weight, d_bias, factor)
        return total * factor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, factor = ctx.saved_tensors
        scale = d_loss * factor
        # In fp32: a GPU rounds the scale of bf16 values to bf16, and all of them would be off by up to 0.4%. Autograd
        # casts each to the type that its leaf takes, which for a bf16 weight may be fp32 (`grad_dtype`).
        return *(None if x is None else x.float().mul_(scale) for x in gradients), None, None


def fused_loss(hidden: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, bias: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropies (nats) of `hidden @ weight.T + bias` over `divisor`, fp32 [].

    hidden: [N, H]. weight: [V, H]. bias: [V]. labels: int64 [N], the class of each row, -100 where there is none.
    divisor: []. Differentiable once in hidden, weight and bias, and the backward takes its graph (no retain_graph);
    under autocast products are of its type.
    """
    return _FusedLoss.apply(hidden, weight, bias, labels, divisor.float().reciprocal())


def fuse(model: PreTrainedModel) -> None:
    """Has `model(..., labels=, num_items_in_batch=).loss` computed by `fused_loss`; its `logits` are None then.

    Without labels, or with an argument in `OWN`, the model does what it did.
    """
    whole, head = model.forward, model.get_output_embeddings()
    project = head.forward

    def head_forward(hidden: Tensor, labels: Tensor | None = None, divisor: Tensor | None = None) -> Tensor:
        if labels is None:
            return project(hidden)
        return fused_loss(hidden, head.weight, labels, divisor, head.bias)

    @wraps(whole)  # transformers reads the names of its arguments, for one before it generates
    def forward(
        *args: Any, labels: Tensor | None = None, num_items_in_batch: Tensor | None = None, **options: Any
    ) -> Any:
        if labels is None or OWN & options.keys():
            given = {"labels": labels, "num_items_in_batch": num_items_in_batch}
            return whole(*args, **{name: x for name, x in given.items() if x is not None}, **options)
        hidden = model.base_model(*args, **options).last_hidden_state
        target = functional.pad(labels, (0, 1), value=IGNORE)[:, 1:].flatten().to(hidden.device)
        divisor = (target != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        return CausalLMOutput(loss=head(hidden.flatten(0, 1), target, torch.as_tensor(divisor, device=hidden.device)))

    head.forward, model.forward = head_forward, forward


@torch.no_grad()
def can_fuse(model: PreTrainedModel) -> bool:
    """Whether the model's own loss is that of a linear head on its last hidden states, tried on a few tokens.

    Logits that are scaled or capped (they are tried large too) and losses with more terms are found out. The model has
    whole weights, on any device.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or model.base_model is model:
        return False
    tokens = torch.arange(1, 1 + TRIED, device=head.weight.device)[None]
    before, training, factor = model.config._attn_implementation, model.training, 1.0
    larger = head.register_forward_hook(lambda module, inputs, logits: logits * factor)
    model.eval()
    model.set_attn_implementation("eager")
    try:
        logits = head(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state)[0, :-1]
        for factor in (1.0, LARGE / max(float(logits.abs().max()), TOLERANCE)):
            own = model(input_ids=tokens, labels=tokens, use_cache=False).loss
            ours = functional.cross_entropy((logits * factor).float(), tokens[0, 1:])
            if not torch.isclose(own, ours, rtol=TOLERANCE):
                return False
    finally:
        larger.remove()
        model.set_attn_implementation(before)
        model.train(training)
    return True

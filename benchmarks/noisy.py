"""`noisy`: BF16 attention with Gaussian noise in its output, the control of every error that is right on average.

Method: the exact output o of each head gets independent noise of SIZE times the root mean square of that head's numbers
in its row; the gradients are those of the exact attention. So its runs say what an INT8 attention's error would do to
training if it were nothing but noise of that size (0.016: somewhat more than the kernels for compute capability 9.0
have). Runs of one seed part whatever disturbs them, so what shows bias, or noise of the backward, is a mean over many
seeds that differs from that of these. The same as `noise=0.016` of benchmarks/bias.py, in training.
Choice: no scheme but an attention of transformers, around arms of sagetrain/integrations/bf16.py, so that packed and
padded rows work as there: on a GPU `varlen` (SDPA for plain rows, torch's varlen_attn for packed ones), on a CPU
`sdpa`. Noise is drawn from torch's generator at each call, in validation too; each rank that has the same seed draws
the same. It is added in FP32, and rounded with o to its type.
Cost: a pass over o, which torch.compile fuses. Checkpointing recomputes a layer with the generator's state of before,
so it draws the same noise again; compiled, that is torch.compile's affair and was not looked at: leave
model.checkpointing=none there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from sagetrain.integrations import bf16
from sagetrain.integrations.huggingface import sage_mask

NAME = "noisy"
SIZE = 0.016


def with_noise(o: Tensor, size: float = SIZE) -> Tensor:
    """`o [B, T, H, D]` and noise of `size` times the root mean square of a head's numbers, which has no gradient."""
    exact = o.detach().float()
    noise = torch.randn_like(exact) * (size * exact.square().mean((1, 3), keepdim=True).sqrt())
    return (o.float() + noise).to(o.dtype)


def register() -> None:
    """Makes `noisy` an `attn_implementation` of transformers. Raises ValueError for a name that is taken, and where the
    GPU lacks what it takes."""
    if AttentionInterface().get(NAME) is not None:
        raise ValueError(f"transformers has an attention {NAME!r} already")
    arms = {"cpu": bf16.ARMS["sdpa"]}
    if torch.cuda.is_available():
        arms["cuda"] = bf16.ARMS["varlen"]
        if missing := arms["cuda"].lacks(torch.device("cuda")):
            raise ValueError(f"attention={NAME} needs {missing}")
    exact = {device: arm.make()[0] for device, arm in arms.items()}

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        """Shapes and options of huggingface.adapter."""
        bf16._note(f"noise of {SIZE}", "noise was added to the output")
        o, _ = exact[query.device.type](module, query, key, value, attention_mask, **options)
        return with_noise(o), None

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sage_mask)

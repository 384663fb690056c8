"""What attention a run really ran, for run.json and the reader.

Method: the attention functions note what they ran (sagetrain/integrations/bf16.py); after the first micro-batch this is
written into run.json as `attention`, with `handicap`, the reason why its speed is no baseline (null when it is one).
Choice: seen, not concluded from the configuration, which knows neither the backend that SDPA takes nor what
transformers made of the mask.
Cost: nothing after the first micro-batch. The compiler forgets its graphs before a compiled run: they would hide what
the second run of a process runs, and arms times seeds would pass its limit of graphs, after which it compiles no more.
"""

from typing import Any

import lightning.pytorch as L
import torch
from rich.console import Console

from sagetrain.integrations import bf16
from sagetrain.ops import schemes
from sagetrain.training.callbacks import RunLog
from sagetrain.training.module import CausalLM


class AttentionRecord(L.Callback):
    """Fills `attention` and `handicap` of run.json and says them once. implementation: its name for transformers."""

    def __init__(self, record: RunLog, implementation: str, console: Console) -> None:
        self.record = record
        self.implementation = implementation
        self.console = console
        self.seen = False

    def on_fit_start(self, trainer: L.Trainer, module: CausalLM) -> None:
        if module.cfg.model.compile:
            torch.compiler.reset()
        bf16.forget()

    def on_train_batch_end(self, trainer: L.Trainer, module: CausalLM, *_: Any) -> None:
        if self.seen or not trainer.is_global_zero:
            return
        self.seen = True
        facts = self.record.facts
        ours = self.implementation in schemes.SCHEMES
        kernel = f"{self.implementation} ({facts['kernel']})"
        what, handicap = (kernel, None) if ours else bf16.ran(self.implementation)
        facts |= {"attention": what, "handicap": handicap}
        self.record.write_status("running", trainer.global_step)
        why = f"; its speed is no baseline: {handicap}" if handicap else ""
        self.console.print(f"{facts['name']}: attention {what}{why}", highlight=False, markup=False, soft_wrap=True)

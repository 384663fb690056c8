"""What a run writes down: metrics.csv, run.json, the progress bar, and the drift probe.

Method: one row per logged optimizer step goes to metrics.csv and is flushed at once; what is measured later in the same
step (validation, probe) is written over that row in one system call. After a resume, rows beyond the checkpoint are
dropped, so every step stands there once. The probe compares the run's scheme with BF16 attention on one held batch.
Choice: the loss of that step alone over all its targets, never smoothed, printed with all its digits, so that two runs
can be compared bit for bit; times are the mean over the steps since the row before, `data_wait` is the share of them
for which the loop waited for its next batches. `mfu` is that of this rank's device (empty where its peak is not known),
`peak_gib` the most memory that was allocated on it. Not Lightning's CSVLogger, which begins metrics.csv anew after a
resume and writes a row only once; not its progress bars, which count batches of an epoch, read what was logged (a wait
for the device each time) and show nothing where the output is no terminal.
Cost: reading a row waits for the step to finish on the device. That happens every `trainer.log_every_n_steps` steps,
before validation and a probe, and at the end; no other step is waited for. A probe takes two sets of gradients, time
and activations of `probe.max_tokens`, which is less than a micro-batch of long rows takes, and attention of its first
document in FP32.
"""

import csv
import io
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sagetrain.data.loader import targets
from sagetrain.ops import reference, schemes
from sagetrain.ops.functional import attention
from sagetrain.terminal import console
from sagetrain.training.checkpoint import way_back
from sagetrain.training.finite import what_is_bad
from sagetrain.training.flops import model_flops, peak_flops
from sagetrain.training.folder import RENAMED, write
from sagetrain.training.loggers import send
from sagetrain.training.module import CausalLM

COLUMNS = ("step", "tokens", "loss", "grad_norm", "lr", "tokens_per_s", "step_ms", "data_wait", "mfu", "peak_gib")
COLUMNS += ("val_loss",)
RESERVE, RESERVED = ".reserve", 64 << 10  # for the last run.json of a run on a full disk
PROBE = ("probe/loss_bf16", "probe/loss_lowbit", "probe/grad_cosine", "probe/ds_rowsum")
OF_LAYERS = ("probe/sigma_q", "probe/sigma_k", "probe/dq_error", "probe/dk_error")


def probe_columns(layers: int) -> tuple[str, ...]:
    return PROBE + tuple(f"{name}_layer{i}" for name in OF_LAYERS for i in range(layers))


class RunLog(L.Callback):
    """Writes metrics.csv and keeps run.json up to date; sends the same rows to the Trainer's loggers.

    folder: the run directory. facts: what run.json says besides status and steps. extra: columns beyond `COLUMNS`.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], extra: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.facts = facts
        self.columns = COLUMNS + extra
        self.row: dict[str, Any] = {}  # of the last logged step
        self._tokens: Tensor | int = 0  # since the run began, on the device until a row is written
        self._flops: Tensor | float = 0.0  # of this rank since the row before
        self._peak: float | None = None  # FLOPs a second that its device has
        self._seen = 0
        self._logged = (0, 0)  # step and tokens of the row before
        self._file: io.TextIOWrapper | None = None
        self._last_row = 0  # its offset in the file

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": int(self._tokens)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tokens = state["tokens"]

    def on_train_start(self, trainer: L.Trainer, module: CausalLM) -> None:
        self._seen, self._logged = trainer.global_step, (trainer.global_step, int(self._tokens))
        self._peak, self._flops = peak_flops(module.device), 0.0
        if trainer.is_global_zero:
            self.facts["parameters"] = module.parameter_count()
            self.facts["trained_parameters"] = module.parameter_count(trained=True)
            self._open(trainer.global_step)
            self.write_status("running", trainer.global_step)

    def on_train_batch_end(self, trainer: L.Trainer, module: CausalLM, _: Any, batch: dict[str, Any], *__: Any) -> None:
        step = trainer.global_step
        if self._peak:
            self._flops = self._flops + model_flops(module.model, batch)
        if step == self._seen:
            return
        self._seen = step
        self._tokens = self._tokens + module.step["tokens"]
        if step % trainer.log_every_n_steps == 0 or step == trainer.max_steps:
            self.has_row(trainer, module)

    def on_validation_start(self, trainer: L.Trainer, module: CausalLM) -> None:
        self.has_row(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: CausalLM) -> None:
        self.has_row(trainer, module)

    def has_row(self, trainer: L.Trainer, module: CausalLM) -> bool:
        """Whether the last step has a row, which is written now if need be; False before the first step.

        Raises FloatingPointError when the loss or gradient of a step since training began is not finite.
        """
        if not module.step:
            return False
        if self.row.get("step") == module.step["step"]:
            return True
        step, loss, self._tokens = module.step["step"], float(module.step["loss"]), int(self._tokens)
        (seconds, waited), steps, tokens = module.lap(), step - self._logged[0], self._tokens - self._logged[1]
        norm, lr, self._logged = module.grad_norm(), module.step["lr"], (step, self._tokens)
        values = (step, self._tokens, loss, norm, lr, tokens / seconds, 1e3 * seconds / steps, waited / seconds)
        self.row = dict(zip(COLUMNS, values, strict=False))
        if self._peak:
            self.row["mfu"], self._flops = float(self._flops) / seconds / self._peak, 0.0
        if module.device.type == "cuda":
            self.row["peak_gib"] = torch.cuda.max_memory_allocated(module.device) / 2**30
        if trainer.is_global_zero:
            self.facts.setdefault("tokens_per_step", tokens // steps)
            self._last_row = self._file.seek(0, os.SEEK_END)
            self._write()
        send(trainer.loggers, self.row, step)
        bad = module.first_bad_step()
        if bad is None and math.isfinite(loss):
            return True
        raise FloatingPointError(
            f"the loss or the gradient of step {bad or step} is not finite (step {step}: loss {loss}, gradient norm "
            f"{norm}). {what_is_bad(trainer, module)}{way_back(trainer)}"
        )

    def amend(self, trainer: L.Trainer, values: dict[str, float]) -> None:
        """Add columns to the row of the last step."""
        if trainer.is_global_zero and self._file is None:  # nothing was left to train
            self._open(trainer.global_step)
        if self.row.get("step") == trainer.global_step:
            self.row.update(values)
        if trainer.is_global_zero and self.row:
            self._file.seek(self._last_row)
            self._write()
        send(trainer.loggers, values, trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, module: CausalLM) -> None:
        if "val_loss" in trainer.callback_metrics and self.row:
            self.amend(trainer, {"val_loss": float(trainer.callback_metrics["val_loss"])})

    def write_status(self, status: str, steps: int, **more: Any) -> None:
        """Replace run.json; where the disk is full, in the room that was reserved for it."""
        text = json.dumps(self.facts | {"status": status, "steps": steps} | more, indent=2) + "\n"
        try:
            write(self.folder / "run.json", text)
        except OSError:
            (self.folder / RESERVE).unlink(missing_ok=True)
            write(self.folder / "run.json", text)

    def close(self) -> None:
        if self._file is not None:
            (self.folder / RESERVE).unlink(missing_ok=True)
            file, self._file = self._file, None
            file.close()

    def _write(self) -> None:
        """Write the last row over the one that stands there, which may be longer."""
        self._table(self._file).writerow(self.row)
        self._file.truncate()
        self._file.flush()

    def _table(self, file: io.TextIOBase) -> csv.DictWriter:
        return csv.DictWriter(file, self.columns, restval="", extrasaction="ignore", lineterminator="\n")

    def _open(self, step: int) -> None:
        """Open metrics.csv with the rows up to `step`, without what an interrupted run wrote after its checkpoint."""
        path, text = self.folder / "metrics.csv", io.StringIO()
        self._table(text).writeheader()
        if path.exists():
            rows = csv.DictReader(line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n"))
            rows.fieldnames = [RENAMED.get(column, column) for column in rows.fieldnames or ()]
            kept = [row for row in rows if row["step"].isdigit() and int(row["step"]) <= step]
            self._table(text).writerows(kept[:-1])
            for last in kept[-1:]:  # it may get more columns
                self.row = {key: float(value) for key, value in last.items() if value} | {"step": int(last["step"])}
                self.row["tokens"], self._last_row = int(last["tokens"]), len(text.getvalue().encode())
                self._table(text).writerow(last)
        write(path, text.getvalue())
        self.close()
        self._file = open(path, "r+", newline="")  # noqa: SIM115 (closed in close())
        (self.folder / RESERVE).write_bytes(os.urandom(RESERVED))  # nothing that a file system could compress


class Probe(L.Callback):
    """Every `every` steps: how far the run's scheme is from BF16 on one held batch, with the weights of the moment.

    The batch is the beginning of the run's first row, `max_tokens` of it, and is kept in the checkpoint: two sets of
    gradients and the activations of so few tokens stay below what a training step takes. Gradients are taken with
    `torch.autograd.grad`, so neither `.grad`, optimizer nor random state change: a run with the probe has the losses of
    a run without. Needs whole parameters on every rank; with FSDP2 or ZeRO-3 it says so and stays off.
    """

    def __init__(self, record: RunLog, every: int, max_tokens: int) -> None:
        self.record = record
        self.every = every
        self.max_tokens = max_tokens
        self.batch: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.batch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batch = state["batch"]

    def on_train_start(self, trainer: L.Trainer, module: CausalLM) -> None:
        if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in module.parameters()):
            self.every = 0
            if trainer.is_global_zero:
                console(stderr=True).print("drift probe off: it needs whole parameters, and this strategy shards them")

    def on_train_batch_start(self, trainer: L.Trainer, module: CausalLM, batch: dict[str, Any], batch_idx: int) -> None:
        if self.batch is None:
            self.batch = beginning(batch, self.max_tokens)

    def on_train_batch_end(self, trainer: L.Trainer, module: CausalLM, *_: Any) -> None:
        due = self.every and trainer.global_step % self.every == 0
        if due and self.record.has_row(trainer, module) and PROBE[0] not in self.record.row:
            self.record.amend(trainer, self.measure(trainer, module))

    def measure(self, trainer: L.Trainer, module: CausalLM) -> dict[str, float]:
        """All columns of `probe_columns` for the held batch and the weights of now."""
        batch = {k: v.to(module.device) if isinstance(v, Tensor) else v for k, v in self.batch.items()}
        devices = [module.device] if module.device.type == "cuda" else []
        scheme = schemes.get(module.model.config._attn_implementation)
        with (
            torch.enable_grad(),
            torch.compiler.set_stance("force_eager"),
            trainer.precision_plugin.forward_context(),
        ):
            with torch.random.fork_rng(devices):
                loss_bf16, grads_bf16 = self._gradients(module, batch, "sdpa")
            name, layers = captured(scheme.name)
            with torch.random.fork_rng(devices):  # from the same state: dropout drops the same
                loss_lowbit, grads_lowbit = self._gradients(module, batch, name)
        layers = [tensors for tensors in layers if len(tensors) == 4]  # one that checkpointing ran again got no dO
        norm = math.sqrt(sum(_dot(a, a) for a in grads_bf16) * sum(_dot(b, b) for b in grads_lowbit))
        cosine = sum(_dot(a, b) for a, b in zip(grads_bf16, grads_lowbit, strict=True)) / norm
        length, preset = first_document(batch), scheme.preset(scheme.kernel_name(module.device))
        first = [[x[:1, :, :length] for x in tensors] for tensors in layers]
        residual = max(reference.ds_rowsum_residual(*tensors, preset=preset) for tensors in first)
        values = dict(zip(PROBE, (loss_bf16, loss_lowbit, cosine, residual), strict=True))
        for i, ((q, k, *_), tensors) in enumerate(zip(layers, first, strict=True)):
            of_layer = float(q.float().std()), float(k.float().std()), *gradient_errors(*tensors, scheme.name)
            values |= {f"{name}_layer{i}": value for name, value in zip(OF_LAYERS, of_layer, strict=True)}
        return values

    @staticmethod
    def _gradients(module: CausalLM, batch: dict[str, Any], attention: str) -> tuple[float, list[Tensor]]:
        before = module.model.config._attn_implementation
        module.model.set_attn_implementation(attention)
        try:
            loss = module.model(**batch, use_cache=False).loss
            parameters = [p for p in module.parameters() if p.requires_grad]
            return float(loss.detach()), list(torch.autograd.grad(loss, parameters))
        finally:
            module.model.set_attn_implementation(before)


def _dot(a: Tensor, b: Tensor) -> float:
    pieces = zip(a.flatten().split(2**24), b.flatten().split(2**24), strict=True)  # fp64 of a whole head: gigabytes
    return float(sum((x.double() * y.double()).sum() for x, y in pieces))


def gradient_errors(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor, scheme: str) -> tuple[float, float]:
    """Relative L2 distance of a scheme's dQ and dK from those of FP32 attention (causal, scale 1 / sqrt(D)).

    q, d_o `[B, Hq, T, D]`, k, v `[B, Hkv, T, D]`, as the scheme gets them.
    """
    group = q.shape[1] // k.shape[1]

    def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, *(x.repeat_interleave(group, 1) for x in (k, v)), is_causal=True)

    found = []
    for attend, dtype in ((exact, torch.float32), (partial(attention, is_causal=True, scheme=scheme), q.dtype)):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            o = attend(*inputs)
        found.append(torch.autograd.grad(o, inputs[:2], d_o.to(o.dtype)))
    return tuple(float((got.float() - truth).norm() / truth.norm()) for truth, got in zip(*found, strict=True))


def beginning(batch: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The first `tokens` of row 0 as a batch of its own on the CPU; the whole row where these hold no target."""
    row = {k: v[:1].detach().cpu() for k, v in batch.items() if isinstance(v, Tensor) and v.dim() > 1}
    cut = {k: v[:, :tokens].clone() for k, v in row.items()}
    if not targets(cut["labels"]):
        cut = {k: v.clone() for k, v in row.items()}
    if "cu_seq_lens_q" in batch:
        width, borders = cut["input_ids"].shape[1], batch["cu_seq_lens_q"].cpu()
        borders = torch.cat((borders[borders < width], borders.new_tensor([width])))
        cut |= {"cu_seq_lens_q": borders, "cu_seq_lens_k": borders}
        cut |= dict.fromkeys(("max_length_q", "max_length_k"), int(borders.diff().max()))
    return cut


def first_document(batch: dict[str, Any]) -> int:
    """Length of the first document of row 0: up to where positions restart, or where padding begins."""
    if "attention_mask" in batch:
        return int(batch["attention_mask"][0].sum())
    if "position_ids" in batch:
        starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
        return starts[1] if len(starts) > 1 else batch["input_ids"].shape[1]
    return batch["input_ids"].shape[1]


def captured(name: str) -> tuple[str, list[list[Tensor]]]:
    """Registers an attention that is `name`, but keeps q, k, v and dO `[B, H, T, D]` of each layer. Returns its name
    and what it will keep."""
    layers: list[list[Tensor]] = []

    def attention(layer: torch.nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options: Any) -> Any:
        dtype = reference.autocast_dtype(q) or q.dtype  # the scheme casts, too
        kept = [x.detach().to(dtype) for x in (q, k, v)]
        layers.append(kept)
        out, weights = ALL_ATTENTION_FUNCTIONS[name](layer, q, k, v, mask, **options)
        out.register_hook(lambda grad: kept.append(grad.detach().transpose(1, 2)))  # [B, T, H, D] in transformers
        return out, weights

    AttentionInterface.register(f"{name}_captured", attention)
    AttentionMaskInterface.register(f"{name}_captured", ALL_MASK_ATTENTION_FUNCTIONS[name])
    return f"{name}_captured", layers


class LastValidation(L.Callback):
    """Validation after the last step, too, whichever micro-batch `trainer.val_check_interval` would wait for."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.val_check_batch = 1


class Bar(L.Callback):
    """Progress with loss, tokens/s and time left; when the output is no terminal, a line every tenth of the run."""

    def __init__(self, record: RunLog, title: str) -> None:
        self.record = record
        self.title = title
        self.console = console(stderr=True)
        shown = "loss {task.fields[loss]:.3f} · {task.fields[speed]:,.0f} tokens/s · left"
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TextColumn(shown))
        self.progress = Progress(*columns, TimeRemainingColumn(), console=self.console)
        self._seen = 0

    def on_train_start(self, trainer: L.Trainer, module: CausalLM) -> None:
        self._total, self._seen = int(trainer.estimated_stepping_batches), trainer.global_step
        fields = {"total": self._total, "completed": self._seen, "loss": math.nan, "speed": 0.0}
        self.task = self.progress.add_task(self.title, **fields)
        if trainer.is_global_zero and self.console.is_terminal:
            self.progress.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: CausalLM, *_: Any) -> None:
        step, row = trainer.global_step, self.record.row
        if not trainer.is_global_zero or step == self._seen or not row:
            return
        self._seen = step
        self.progress.update(self.task, completed=step, loss=row["loss"], speed=row["tokens_per_s"])
        if not self.console.is_terminal and step * 10 // self._total > (step - 1) * 10 // self._total:
            left = (self._total - step) * row["step_ms"] / 1e3
            self.console.print(
                f"{self.title}  step {step}/{self._total}  loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s"
                f"  {left:.0f} s left"
            )

    def stop(self) -> None:
        if self.progress.live.is_started:
            self.progress.stop()

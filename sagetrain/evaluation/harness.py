"""One evaluation: a model in memory, lm-evaluation-harness around it.

Method: the harness builds the requests, batches them by length (`HFLM`), and scores the answers; the attention is what
the model has been given. Every answer is kept on the disk at once (the harness's cache of responses), under a name made
of all weights and settings, attention, precision and tokenizer, so an evaluation that was killed goes on where it
stopped and another model never reads its answers. They are deleted when the scores are kept.
Choice: several ranks share the requests, not the documents, so that tasks smaller than the number of ranks are no case
of their own; each computes all scores. Choices are scored in FP32: in BF16 close ones would often tie, for the first.
Rows are padded on the right where choices are scored (the harness gives no mask there, causal attention needs none; the
scales of INT8 blocks see the padding) and on the left, masked, where answers are generated.
Cost: a pass over the weights to name the answers. Memory: logits of a batch's choices, not of its prompts, where the
model takes `logits_to_keep`, as those of transformers do.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import io
import json
import logging
import math
import os
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import torch
import torch.distributed as dist
import xxhash
from lm_eval.api.model import CacheHook, CachingLM
from lm_eval.models.huggingface import HFLM
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from sagetrain.data.corpus import ByteTokenizer, encode, frame
from sagetrain.data.tables import made_by
from sagetrain.data.tasks import check_template
from sagetrain.doctor import versions
from sagetrain.evaluation.scores import METRICS, Scores
from sagetrain.evaluation.tasks import leaves
from sagetrain.integrations import bf16
from sagetrain.ops import schemes
from sagetrain.terminal import console

SEED = 1234  # the harness's own, for the examples
TOLD_EVERY = 10.0


class Abandoned(Exception):
    """Asked to stop; what was answered is kept."""


class Told:
    """Progress: a bar, or where the output is no terminal a line at the begin, and then one in TOLD_EVERY seconds, with
    whole batches: their answers come at once. stop: asked after every answer."""

    def __init__(self, title: str, quiet: bool = False, stop: Callable[[], Any] = lambda: False) -> None:
        self.title, self.quiet, self.stop = title, quiet, stop
        self.console = console(stderr=True)
        self.console.file = sys.stderr  # of now: later it is where the harness writes
        self.done = self.total = 0
        self.said = 0.0

    @contextlib.contextmanager
    def of(self, what: str, total: int) -> Iterator[None]:
        self.done, self.total, self.what, self.begun = 0, total, f"{self.title}: {what}", time.monotonic()
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        live = self.console.is_terminal and not self.quiet
        apart = {"redirect_stdout": False, "redirect_stderr": False}
        columns = (*columns, TimeRemainingColumn())
        with Progress(*columns, console=self.console, disable=not live, **apart) as self.bar:
            self.task = self.bar.add_task(self.what, total=total)
            self.say("")
            yield

    def batch(self) -> None:
        """One begins."""
        if self.done and (now := time.monotonic()) - self.said > TOLD_EVERY:
            self.say(f", {(self.total - self.done) * (now - self.begun) / self.done:.0f} s left")

    def say(self, more: str) -> None:
        self.said = time.monotonic()
        if not self.quiet and not self.console.is_terminal:
            self.console.print(f"{self.what} {self.done:,}/{self.total:,}{more}", soft_wrap=True)

    def answered(self) -> None:
        if self.stop():
            raise Abandoned
        self.done += 1
        self.bar.update(self.task, completed=self.done)


class Model(HFLM):
    """A model in memory for the harness, which tells how far it is."""

    def __init__(self, model: nn.Module, tokenizer: Any, told: Told, dtype: torch.dtype | None, **options: Any) -> None:
        how = {"mixed_precision_dtype": dtype, "softmax_dtype": "float32", "enable_thinking": False}  # as in training
        super().__init__(model, tokenizer=tokenizer, **how, **options)
        self.told = told
        plain = model.get_base_model() if hasattr(model, "get_base_model") else model  # without adapters
        self.longest = 1  # tokens of a choice; the harness looks for its batch size before it has any
        self.keeps = "logits_to_keep" in inspect.signature(plain.forward).parameters

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        with self.told.of("choices scored", len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *rest: Any, **options: Any) -> list[tuple[float, bool]]:
        self.longest = max((len(choice) for *_, choice in requests), default=1)
        if self.longest > self.max_length:
            raise ValueError(
                f"{self.told.title}: a choice has {self.longest} tokens, and the model has no more than "
                f"{self.max_length} positions (max_position_embeddings)"
            )
        return super()._loglikelihood_tokens(requests, *rest, **options)

    def _detect_batch_size(self, *given: Any, **options: Any) -> int:
        longest, self.longest = self.longest, self.max_length  # all logits: a row may be padded by as many
        try:
            return super()._detect_batch_size(*given, **options)
        finally:
            self.longest = longest

    def _model_call(self, ids: torch.Tensor) -> torch.Tensor:
        self.told.batch()
        # The harness counts from the end, so the last logits will do: as many as the longest choice and the padding of
        # the shortest row have. Padding is 0; a prompt's own zeros before it only keep more.
        padding = int((ids == 0).flip(-1).cumprod(-1).sum(-1).max())
        keep = {"logits_to_keep": padding + self.longest} if self.keeps else {}
        dtype = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            return self.model(ids, **keep).logits

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        with self.told.of("answers", len(requests)):
            return super().generate_until(requests, disable_tqdm=True)

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **options: Any) -> Any:
        self.told.batch()
        # The end that training taught is the tokenizer's, which the model's configuration need not know: rows would go
        # on after it until all of their batch have stopped.
        known = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
        return super()._model_generate(context, max_length, stop, eos_token_id=sorted(ends), **options)


class Kept(CachingLM):
    """The harness's cache around a model, for the share of the requests of one rank."""

    def __init__(self, lm: Model, path: Path, rank: int, world: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rank_of_all, self.world = rank, world
        if not _sound(path):
            for part in path, path.with_name(f"{path.name}-journal"):
                part.unlink(missing_ok=True)
            lm.told.console.print(f"{lm.told.title}: its kept answers are damaged and asked anew", soft_wrap=True)
        super().__init__(lm, str(path))

    def get_cache_hook(self) -> CacheHook:
        return _Hook(self)

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        return self._shared("loglikelihood", requests)

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        return self._shared("generate_until", requests)

    def _shared(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        ours: list[Any] | None = None
        with contextlib.suppress(Abandoned):
            ours = self.__getattr__(kind)(requests[self.rank_of_all :: self.world])
        parts: list[Any] = [ours] * self.world
        if self.world > 1:
            dist.all_gather_object(parts, ours)
        if any(part is None for part in parts):
            raise Abandoned
        answers: list[Any] = [None] * len(requests)
        for rank, part in enumerate(parts):
            answers[rank :: self.world] = part
        return answers


def _sound(path: Path) -> bool:
    """Whether there are answers that can be read, or none yet."""
    if not path.exists():
        return True
    try:
        with contextlib.closing(sqlite3.connect(path)) as kept:
            return kept.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.OperationalError:  # of the disk, or of another who has it
        raise
    except sqlite3.DatabaseError:
        return False


class _Hook(CacheHook):
    def __init__(self, kept: Kept) -> None:
        super().__init__(kept)
        self.told = kept.lm.told

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        super().add_partial(attr, req, res)
        self.told.answered()


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    title: str = "evaluation",
    batch_size: int | str = 8,
    limit: int | None = None,
    chat_template: bool = False,
    dtype: torch.dtype | None = None,
    quiet: bool = False,
    rank: int = 0,
    world: int = 1,
    stop: Callable[[], Any] = lambda: False,
    keep: Callable[[Scores], Any] = lambda found: None,
) -> Scores:
    """Scores of `model`, which is left in evaluation mode, on `tasks` (by name, as tasks.build gives them).

    dtype: of autocast, None for none. limit: questions of each task (of MMLU, of each subject). batch_size: rows, or
    "auto". world: the ranks of torch.distributed that all call this. keep: what rank 0 does with the scores before
    the answers are deleted; where it fails they stay. Raises ValueError for what this model cannot answer, RuntimeError
    where a batch does not fit the GPU's memory, Abandoned once `stop()` says so.
    """
    name = model.config._attn_implementation
    told = Told(title, quiet or rank > 0, stop)
    log, messages = logging.getLogger("lm_eval"), _Messages()
    level, begun = log.level, time.monotonic()
    bf16.forget()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for redirect in contextlib.redirect_stderr, contextlib.redirect_stdout:  # bars, and what it says of batches
            stack.enter_context(redirect(io.StringIO()))
        log.addHandler(messages)
        stack.callback(log.removeHandler, messages)
        stack.callback(log.setLevel, level)
        log.setLevel(logging.WARNING)
        stack.callback(setattr, log, "propagate", log.propagate)
        log.propagate = False
        bos = False if chat_template else None  # what a template writes is whole, as in training
        lm = Model(model, for_transformers(tokenizer), told, dtype, batch_size=batch_size, add_bos_token=bos)
        _check(lm, tokenizer, tasks, chat_template)
        path = stack.enter_context(_owned(answers_of(model, tokenizer, dtype, rank)))
        kept = Kept(lm, path, rank, world)
        stack.callback(kept.dbdict.close)
        loaded: dict[str, dict[str, Any]] = {"tasks": {}, "groups": {}}
        for task, built in tasks.items():
            if hasattr(built, "get_all_tasks"):
                loaded["groups"][task] = built
            for leaf in leaves(built):
                leaf.set_fewshot_seed(SEED)
                loaded["tasks"][leaf.task_name] = leaf
        try:
            results = lm_eval.evaluate(
                kept,
                loaded,
                limit=limit,
                bootstrap_iters=1,  # for what is no mean, and there is nothing else
                log_samples=False,
                apply_chat_template=chat_template,
                fewshot_as_multiturn=chat_template,
            )
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"{title}: CUDA out of memory at batch size {batch_size}: choose a smaller one (eval.batch_size, or "
                "--batch-size of the command). Answers are kept; the same command goes on from there"
            ) from error
    if messages.cut and not quiet and rank == 0:
        told.console.print(
            f"{title}: {messages.cut} rows or batches did not fit the model's {lm.max_length} tokens and lost the "
            "beginning of their prompts",
            soft_wrap=True,
        )
    device = next(model.parameters()).device
    ran = f"{name} ({schemes.get(name).kernel_name(device)})" if name in schemes.SCHEMES else bf16.ran(name)[0]
    bf16.forget()
    how = {
        "chat_template": chat_template,
        "attention": ran,
        "precision": str(dtype or next(model.parameters()).dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "seconds": round(time.monotonic() - begun, 1),
        "versions": versions() | {"lm_eval": lm_eval.__version__},
    }
    found = {task: _scores(task, built, results, limit) | how for task, built in tasks.items()}
    _done(found, keep, path, rank, world)
    return found


def _done(found: Scores, keep: Callable[[Scores], Any], answers: Path, rank: int, world: int) -> None:
    """Deletes every rank's answers once rank 0 has kept the scores."""
    kept = [False]
    try:
        if rank == 0:
            keep(found)
            kept = [True]
    finally:
        if world > 1:
            dist.broadcast_object_list(kept)
        if kept[0]:
            answers.unlink(missing_ok=True)


@contextlib.contextmanager
def _owned(path: Path) -> Iterator[Path]:
    """The file of answers, or one beside it, which nobody goes on from, where another evaluation may have it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix(".lock"), "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another has it, or there are no locks on this file system
            path = path.with_suffix(f".{os.getpid()}.db")
        yield path


class _Messages(logging.Handler):
    """Instead of the harness's log: how often it cut a prompt. Errors raise."""

    cut = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.cut += "runcati" in record.getMessage()


def _check(lm: Model, tokenizer: Any, tasks: Mapping[str, Any], chat_template: bool) -> None:
    generated = [task for task, built in tasks.items() if next(leaves(built)).OUTPUT_TYPE == "generate_until"]
    if generated and lm.max_length <= lm.max_gen_toks:
        raise ValueError(
            f"{generated[0]}: an answer may have {lm.max_gen_toks} tokens, and the model has no more than "
            f"{lm.max_length} positions (max_position_embeddings)"
        )
    if chat_template and not lm.tokenizer.chat_template:
        raise ValueError(f"the tokenizer {lm.tokenizer.name_or_path} has no chat template")
    if chat_template:
        check_template(lm.tokenizer)
    elif lm.tok_encode("a") != [*map(int, frame(tokenizer)[0]), *map(int, encode(tokenizer, ["a"])[0])]:
        raise ValueError(
            f"the tokenizer {lm.tokenizer.name_or_path} puts tokens behind a text, so questions would not be those of "
            "training: have it add none but at the begin (add_eos_token=false)"
        )


def digest(built: Any, limit: int | None = None) -> str:
    """Tells apart what is asked of a task up to a limit (of MMLU, of each subject): texts, choices, right answers."""
    parts = []
    for leaf in leaves(built):
        said = xxhash.xxh3_64(leaf.task_name.encode())
        for each in islice(leaf.eval_docs, limit):
            choices = leaf.doc_to_choice(each) if leaf.OUTPUT_TYPE == "multiple_choice" else []
            right = each["answers"] if "answers" in each else str(leaf.doc_to_target(each))
            said.update(json.dumps([leaf.doc_to_text(each), choices, right]).encode())
        parts.append(said.hexdigest())
    return xxhash.xxh3_64(" ".join(sorted(parts)).encode()).hexdigest()  # files have subjects in any order


def _scores(task: str, built: Any, results: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    parts = [leaf.task_name for leaf in leaves(built)]
    whole, counts = results["results"][task], results["n-samples"]
    values, errors = {}, {}
    for key, value in whole.items():
        metric, comma, chosen = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        short = metric if chosen == "none" else chosen.replace("-", "_")
        if short in METRICS[task]:
            error = whole.get(f"{metric}_stderr,{chosen}")
            known = isinstance(error, float) and math.isfinite(error)
            values[short], errors[short] = float(value), error if known else None
    found = {
        "scores": values,
        "stderr": errors,
        "n": sum(counts[part]["effective"] for part in parts),
        "limit": limit if any(counts[part]["effective"] < counts[part]["original"] for part in parts) else None,
        "digest": digest(built, limit),
        "version": next(leaves(built)).VERSION,
        "few_shot": next(leaves(built)).get_config("num_fewshot"),
    }
    if parts != [task]:
        found["subjects"] = {part.removeprefix(f"{task}_"): results["results"][part]["acc,none"] for part in parts}
    return found


def fingerprint(model: nn.Module) -> str:
    """Tells models apart by all their weights, and buffers that are saved with them."""
    said = xxhash.xxh3_128()  # hashlib's would take seconds a gigabyte
    tensors = ((name, each) for name, each in model.state_dict().items() if isinstance(each, torch.Tensor))
    for name, weight in tensors:
        said.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        said.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return said.hexdigest()


def answers_of(model: nn.Module, tokenizer: Any, dtype: torch.dtype | None, rank: int = 0) -> Path:
    """Where the answers of this model are kept until there are scores."""
    device = next(model.parameters()).device.type
    settings = [each.to_json_string() for each in (model.config, model.generation_config)]  # as RoPE's base
    settings += [repr(adapter) for adapter in getattr(model, "peft_config", {}).values()]  # as alpha
    parts = (fingerprint(model), settings, model.config._attn_implementation, device, dtype, made_by(tokenizer))
    name = hashlib.blake2b(repr((*parts, lm_eval.__version__)).encode(), digest_size=16).hexdigest()
    return Path(datasets.config.HF_DATASETS_CACHE, "sagetrain-answers", f"{name}.{rank}.db")


def for_transformers(tokenizer: Any) -> Any:
    """A tokenizer of transformers that does what this one does."""
    if not isinstance(tokenizer, ByteTokenizer):
        return tokenizer
    bytes_ = Tokenizer(models.BPE({char: byte for byte, char in bytes_to_unicode().items()}, []))
    bytes_.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_.decoder = decoders.ByteLevel()
    bytes_.add_special_tokens([AddedToken(word, special=True) for word in ("<eos>", "<pad>")])
    return PreTrainedTokenizerFast(tokenizer_object=bytes_, eos_token="<eos>", pad_token="<pad>", name_or_path="byte")

"""Evaluation within a run: every `eval.every_n_steps` steps and at its end, of the model where it lies.

Method: as sagetrain.evaluate does alone, with the run's attention, precision and chat template; layers run uncompiled.
Scores go to eval.json, to the step's row of metrics.csv and to the loggers. Random state and training mode are put
back, so a run has the losses of a run without. All ranks share the requests.
Choice: at the end it comes after the last checkpoint is written, so whatever happens to a long evaluation costs nothing
but itself; a signal during one between steps breaks it off, and the run catches up when it goes on. Answers are kept
until there are scores. Sharded weights (FSDP2, ZeRO-3) are refused: generation would gather them for each token.
Cost: every rank reads the questions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as L
from omegaconf import DictConfig, OmegaConf

from sagetrain.data.tasks import chats, check_template
from sagetrain.errors import asked_for
from sagetrain.evaluation import AUTOCAST, scores
from sagetrain.evaluation.tasks import Files, build, check_tasks, find
from sagetrain.terminal import console
from sagetrain.training.callbacks import RunLog
from sagetrain.training.checkpoint import random_state, set_random_state
from sagetrain.training.module import CausalLM
from sagetrain.training.signals import Watch


def check(cfg: DictConfig) -> dict[str, Files | None]:
    """The files of each task that the run evaluates. Raises what is wrong with `eval`, before anything takes time."""
    if isinstance(cfg.eval.tasks, str):
        raise ValueError(f"eval.tasks={cfg.eval.tasks}: give a list, eval.tasks=[{cfg.eval.tasks}]")
    if not (cfg.eval.batch_size == "auto" or (type(cfg.eval.batch_size) is int and cfg.eval.batch_size > 0)):
        raise ValueError(f"eval.batch_size={cfg.eval.batch_size}: give a number of rows, at least 1, or auto")
    tasks = check_tasks(list(cfg.eval.tasks or []), "eval.tasks")
    if not tasks:
        return {}
    if find_spec("lm_eval") is None:
        raise ModuleNotFoundError("eval.tasks: no package lm_eval: pip install 'sagetrain[eval]'", name="lm_eval")
    target = cfg.strategy.get("_target_") or ""
    if target.endswith("SageFSDP2Strategy") or cfg.strategy.get("stage") == 3:
        raise ValueError(
            "eval.tasks: this strategy shards the weights, and they are not evaluated in place. Set eval.tasks=[] and "
            "evaluate what the run leaves (python -m sagetrain.evaluate RUN), or choose strategy=ddp"
        )
    scores.read(Path(cfg.out))  # before the questions, not after
    data = OmegaConf.to_container(cfg.eval.data) if OmegaConf.is_config(cfg.eval.data) else cfg.eval.data
    return find(tasks, data, cfg.eval.few_shot, "eval.data")


class Evaluate(L.Callback):
    """record: where the run writes. Raises ValueError for data that cannot be read."""

    def __init__(self, record: RunLog, watch: Watch, cfg: DictConfig, tokenizer: Any) -> None:
        self.record, self.watch, self.cfg, self.tokenizer = record, watch, cfg, tokenizer
        self.files = check(cfg)
        self.every = cfg.eval.every_n_steps
        if self.files and chats(tokenizer, cfg.data.get("chat_template")):
            check_template(tokenizer)
        self.evaluated = 0  # the last step that was
        with asked_for("eval.data"):
            self.tasks = {task: build(task, files, cfg.eval.few_shot) for task, files in self.files.items()}

    def on_train_start(self, trainer: L.Trainer, module: CausalLM) -> None:
        if self._due(trainer) and self._lacks(trainer, module):
            self._evaluate(trainer, module)

    def on_train_batch_end(self, trainer: L.Trainer, module: CausalLM, *_: Any) -> None:
        step = trainer.global_step
        if module.step.get("step") == step != self.evaluated and self._due(trainer):
            self.record.has_row(trainer, module)
            self._evaluate(trainer, module)

    def on_fit_end(self, trainer: L.Trainer, module: CausalLM) -> None:
        if self._lacks(trainer, module):
            module.to(trainer.strategy.root_device)  # Lightning has put it aside
            before = self.watch.outside
            self.watch.outside = "while it was evaluated; it is trained and saved, and the same command goes on"
            self._evaluate(trainer, module)
            self.watch.outside = before

    def _due(self, trainer: L.Trainer) -> bool:
        step = trainer.global_step
        return bool(self.every) and step % self.every == 0 and step != trainer.max_steps

    def _lacks(self, trainer: L.Trainer, module: CausalLM) -> bool:
        """Whether the last step has no scores: neither from here nor, where none was trained, from before."""
        step = trainer.global_step
        before = not module.step and self._has(step)
        return step not in (0, self.evaluated) and not trainer.strategy.broadcast(before)

    def _has(self, step: int) -> bool:
        """Whether eval.json has scores of the same questions, asked in the same way."""
        from sagetrain.evaluation.harness import digest

        held, how = scores.read(self.record.folder).get(str(step), {}).get(self.cfg.attention.name, {}), self.cfg.eval
        for task, built in self.tasks.items():
            there = held.get(task, {})
            old = "digest" not in there  # then the number says which
            asked = {"limit": how.limit} if old else {"digest": digest(built, how.limit)}
            if not (asked | {"few_shot": how.few_shot}).items() <= there.items():
                return False
        return True

    def _evaluate(self, trainer: L.Trainer, module: CausalLM) -> None:
        from sagetrain.evaluation.harness import Abandoned, evaluate

        step, how = trainer.global_step, self.cfg.eval
        self.evaluated = step
        try:
            with _put_back(module):
                found = evaluate(
                    module.model,
                    self.tokenizer,
                    self.tasks,
                    title=f"{self.record.facts['name']} step {step}",
                    batch_size=how.batch_size,
                    limit=how.limit,
                    chat_template=chats(self.tokenizer, self.cfg.data.get("chat_template")),
                    dtype=AUTOCAST.get(str(trainer.precision)),
                    quiet=not self.cfg.trainer.get("enable_progress_bar", True),
                    rank=trainer.global_rank,
                    world=trainer.world_size,
                    stop=lambda: self.watch.stepping and self.watch.stop,
                    keep=lambda found: self._keep(step, found),
                )
        except Abandoned:  # the checkpoint comes next, and the end
            return
        self.record.amend(trainer, scores.row(found))

    def _keep(self, step: int, found: scores.Scores) -> None:
        """The table comes first: whatever becomes of the file, it is seen."""
        for task, of in found.items():
            files = self.files[task]
            of |= {"model": self.cfg.out, "data": "hub" if files is None else ", ".join(map(str, files.asked))}
        console().print(f"{self.record.facts['name']} step {step:,}, scores:", scores.table(found))
        folder = Path(self.record.folder)
        with asked_for(f"the scores are not written to {folder}, the answers are kept"):
            scores.keep(folder, step, self.cfg.attention.name, found)


@contextmanager
def _put_back(module: CausalLM) -> Iterator[None]:
    """Leaves random state and training mode as they are."""
    state, training = random_state(), [part for part in module.modules() if part.training]
    try:
        yield
    finally:
        for part in training:
            part.training = True
        set_random_state(state)

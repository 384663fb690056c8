"""Settings that are a choice, a number of something or a share: checked before anything else takes time.

Kept by hand, as one table: Hydra's structured configs know types, but neither choices nor ranges.
"""

from __future__ import annotations

import math
from importlib.util import find_spec
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from sagetrain.training import lora
from sagetrain.training.layers import CHECKPOINTING

CHOICES: dict[str, tuple[Any, ...]] = {
    "model.compile": (True, False),
    "model.fused_loss": ("auto", True, False),
    "model.checkpointing": CHECKPOINTING,
    "model.linear": ("float8", None),
    "optim.kind": ("adamw", "adamw8bit"),
    "optim.schedule": ("cosine", "linear", "wsd"),
}
LEAST = {
    "seed": 0,
    "model.checkpoint_every": 1,
    "optim.warmup_steps": 0,
    "optim.decay_steps": 0,
    "eval.every_n_steps": 0,
    "eval.limit": 1,
    "eval.few_shot": 0,
    "probe.every": 0,
    "probe.max_tokens": 1,
    "checkpoint.every_n_steps": 0,
    "compare.seeds": 1,
    "trainer.max_steps": -1,
    "trainer.log_every_n_steps": 1,
}
OPTIONAL = ("optim.decay_steps", "eval.limit", "trainer.gradient_clip_val")
RANGES = {
    "optim.lr": (0, math.inf),
    "optim.weight_decay": (0, math.inf),
    "optim.min_lr_ratio": (0, 1),
    "checkpoint.every_minutes": (0, math.inf),
    "trainer.gradient_clip_val": (0, math.inf),  # by a norm below 0 torch would turn the gradient round
}


def check_settings(cfg: DictConfig) -> None:
    """Raises ValueError for the first setting that is none of its choices, no whole number, out of its range, or too
    much for this GPU; ModuleNotFoundError for one that needs torchao or peft where it is missing."""

    def refuse(key: str, value: Any, wanted: str) -> None:
        raise ValueError(f"{key}={_spelt(value)}: {wanted}")

    for key, choices in CHOICES.items():
        value = OmegaConf.select(cfg, key)
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            *most, last = map(_spelt, choices)
            refuse(key, value, f"choose {', '.join(most)} or {last}")
    for key, least in LEAST.items():
        value = OmegaConf.select(cfg, key)
        if not (value is None and key in OPTIONAL) and (type(value) is not int or value < least):
            refuse(key, value, f"give a whole number, at least {least}")
    for key, (low, high) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        if value is None and key in OPTIONAL:
            continue
        if not _number(value) or not low <= value <= high or value == math.inf:
            refuse(key, value, f"give a number from {low} to {high}" if high < math.inf else "give a number, 0 or more")
    betas = OmegaConf.select(cfg, "optim.betas")
    if not OmegaConf.is_list(betas) or len(betas) != 2 or not all(_number(beta) and 0 <= beta < 1 for beta in betas):
        refuse("optim.betas", betas, "give two numbers from 0 to below 1, as in optim.betas=[0.9,0.95]")
    arms = list(cfg.compare.arms or [])
    if len(set(arms)) < len(arms):
        refuse("compare.arms", f"[{','.join(arms)}]", "name each arm once; compare.seeds=N runs all of them N times")
    for key, value in ("optim.kind", "adamw8bit"), ("model.linear", "float8"):
        if OmegaConf.select(cfg, key) == value and find_spec("torchao") is None:
            raise ModuleNotFoundError(f"{key}={value}: no package torchao: pip install 'sagetrain[torchao]'")
    lora.options(cfg.model)
    if cfg.model.linear and (not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9)):
        refuse(
            "model.linear", cfg.model.linear, "needs a GPU of compute capability 8.9 or later; set model.linear=null"
        )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _spelt(value: Any) -> str:
    """As on a command line."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

"""What goes to Weights & Biases, TensorBoard and trackio beside metrics.csv.

Method: the rows of metrics.csv under names in groups (train/, val/, speed/, memory/, probe/, eval/). `tokens` is the
axis of Weights & Biases, beside trainer/global_step (it fills in the last value where a row has none). Of what
the probe says of each layer the mean and the largest are sent, and to Weights & Biases one histogram whose bins are the
layers: one panel, not one for each layer.
"""

import os
import re
from argparse import Namespace
from typing import Any

import numpy as np
from hydra.utils import instantiate
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

NAMES = {
    **{name: f"train/{name}" for name in ("loss", "grad_norm", "lr")},
    **{name: f"speed/{name}" for name in ("tokens_per_s", "step_ms", "data_wait", "mfu")},
    "peak_gib": "memory/peak_gib",
    "val_loss": "val/loss",
}


def named(row: dict[str, Any]) -> tuple[dict[str, float], dict[str, list[float]]]:
    """A row of metrics.csv as loggers get it, and the values of each layer by the name that they share."""
    plain, layers = {}, dict[str, list[float]]()
    for name, value in row.items():
        if layer := re.fullmatch(r"(.*)_layer\d+", name):
            layers.setdefault(layer[1], []).append(value)
        elif name != "step":
            plain[NAMES.get(name, name)] = value
    for name, values in layers.items():
        plain |= {f"{name}_mean": float(np.mean(values)), f"{name}_max": max(values)}
    return plain, layers


def send(loggers: list[Logger], row: dict[str, Any], step: int) -> None:
    plain, layers = named(row)
    for logger in loggers:
        more = {}
        if isinstance(logger, WandbLogger) and layers:
            import wandb

            bars = {name: (np.array(values), np.arange(len(values) + 1)) for name, values in layers.items()}
            more = {f"{name}_by_layer": wandb.Histogram(np_histogram=bar) for name, bar in bars.items()}
        logger.log_metrics(plain | more, step)


def start(cfg: DictConfig, facts: dict[str, Any], group: str | None) -> Logger | None:
    """The logger that is configured, started (so that it fails now or not at all); None when there is none.

    facts: run.json. group: the name of the comparison.
    """
    target = cfg.logger.get("_target_")
    if not target:
        return None
    if target.endswith("TensorBoardLogger"):
        return instantiate(cfg.logger, save_dir=cfg.out, name=None, version="tensorboard")
    options = {k: v for k, v in cfg.logger.items() if k not in ("mode", "group")}
    options |= {"name": facts["name"], "group": cfg.logger.group or group}
    if target.endswith("TrackioLogger"):
        options["name"] += f"-{facts['wandb_id']}"  # trackio goes on with the run of a project that has this name
        logger = TrackioLogger(**{name: value for name, value in options.items() if name != "_target_"})
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        return logger
    os.environ.setdefault("WANDB_MODE", cfg.logger.mode)
    os.environ.setdefault("WANDB_SILENT", "true")
    logger = instantiate(options, save_dir=cfg.out, id=facts["wandb_id"], resume="allow")
    try:
        logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        logger.experiment.define_metric("*", step_metric="tokens")  # instead of Lightning's own, trainer/global_step
    except Exception as error:  # wandb's errors have no common kind
        raise ValueError(f"Weights & Biases did not start: {error}. Try wandb login, or logger.mode=offline") from error
    return logger


class TrackioLogger(Logger):
    """trackio for Lightning, which has no logger of its own for it.

    Raises ValueError where trackio is not installed.
    """

    def __init__(self, project: str, name: str, group: str | None = None, **options: Any) -> None:
        try:
            import trackio
        except ModuleNotFoundError as error:
            raise ValueError("logger=trackio: no package trackio: pip install trackio") from error
        self._settings = {"project": project, "name": name, "group": group, "resume": "allow"} | options
        self._trackio, self._run = trackio, None

    @property
    def name(self) -> str:
        return self._settings["project"]

    @property
    def version(self) -> str:
        return self._settings["name"]

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *_: Any, **__: Any) -> None:
        self._run = self._trackio.init(config=dict(params), **self._settings)

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._run.log(metrics, step=step)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        if self._run is not None:
            run, self._run = self._run, None
            run.finish()

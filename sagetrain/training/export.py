"""The way back to transformers: what a run learned, as a folder that `from_pretrained` reads.

Method: `export(run, folder)` reads the weights alone out of a checkpoint (one file; FSDP2's folder, through torch's
distributed checkpoint; DeepSpeed's folder, through its own zero_to_fp32), puts them into the model that the run's
config.yaml describes, and has transformers save it. `save_weights` does the same with the model that has just trained.
Of a run with adapters it is these that are written, as peft writes them, or with `merge` whole weights with them in.
Choice: FP32 weights where the checkpoint has them (DeepSpeed keeps them beside its 16-bit ones).
Cost: the whole model once in the memory of the CPU; no GPU is needed.
"""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import torch
import torch.distributed.checkpoint as dcp
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sagetrain.data import build_tokenizer
from sagetrain.errors import asked_for
from sagetrain.training import lora
from sagetrain.training.checkpoint_files import damage, flush, step_of
from sagetrain.training.module import model_config

PREFIX = "model."  # of the Hugging Face model inside CausalLM
TYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # of the weights, by Lightning's precision; else FP32


def export(run: str | Path, folder: str | Path, merge: bool = False) -> Path:
    """Write weights and tokenizer of a run (its directory, or one of its checkpoints) into `folder`, new or empty: of a
    run with `model.lora` its adapters or, with `merge`, the weights of `model.path` with the adapters in them.

    Raises FileNotFoundError for what is no run or holds no checkpoint, ValueError for one that is damaged or that has
    nothing to merge, FileExistsError when `folder` is in use.
    """
    folder = Path(folder).expanduser().absolute()
    source, checkpoint = _found(run)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is not empty: choose another folder")
    cfg = OmegaConf.load(source / "config.yaml")
    if not merge:
        _export(source, checkpoint, cfg, folder)
        _follow_umask(folder)
        return folder
    if cfg.model.get("lora") is None:
        raise ValueError(f"{run} trained no adapters (model.lora), so there is nothing to merge: leave out --merge")
    with tempfile.TemporaryDirectory() as adapters:
        _export(source, checkpoint, cfg, Path(adapters))
        with asked_for(f"model.path={cfg.model.path}"):
            lora.merge(cfg.model.path, model_config(cfg.model), Path(adapters), folder)
    _write_tokenizer(cfg, folder)
    _follow_umask(folder)
    return folder


def _export(source: Path, checkpoint: Path | None, cfg: DictConfig, folder: Path) -> None:
    """Out of `checkpoint`, or else what a finished run in `source` kept."""
    if checkpoint is None:
        shutil.copytree(source / "weights", folder, dirs_exist_ok=True)
    else:
        _write(cfg, _weights(checkpoint), folder)


def load(run: str | Path) -> tuple[PreTrainedModel, int]:
    """The model of a run (its directory, or one of its checkpoints) on the CPU, with its adapters in it and in the type
    that it trained in, and the step of its weights.

    Raises as `export` does.
    """
    source, checkpoint = _found(run)
    cfg = OmegaConf.load(source / "config.yaml")
    step = step_of(checkpoint.resolve()) if checkpoint else json.loads((source / "run.json").read_text())["steps"]
    dtype = TYPES.get(cfg.trainer.precision, torch.float32)
    if cfg.model.get("lora") is not None:
        with tempfile.TemporaryDirectory() as adapters:
            _export(source, checkpoint, cfg, Path(adapters))
            with asked_for(f"model.path={cfg.model.path}"):
                return lora.load(cfg.model.path, model_config(cfg.model), Path(adapters), dtype), step
    if checkpoint is None:
        return AutoModelForCausalLM.from_pretrained(source / "weights", dtype=dtype), step
    weights = _weights(checkpoint)
    empty = _model(cfg, weights)  # but for the weights: it lacks what no file holds
    return type(empty).from_pretrained(None, config=empty.config, state_dict=weights, dtype=dtype), step


def run_of(path: str | Path) -> Path | None:
    """The run that a path names, itself or by one of its checkpoints; None where it names none."""
    path = Path(path).expanduser().absolute()
    run = path.parent.parent if path.parent.name == "checkpoints" else path
    return run if (run / "config.yaml").exists() else None


def _found(run: str | Path) -> tuple[Path, Path | None]:
    """The directory of a run, and which checkpoint has its weights; None where `weights` holds them."""
    source, run = run_of(run), Path(run).expanduser().absolute()
    if source is None:
        raise FileNotFoundError(
            f"{run} is no run: it has no config.yaml. Give a run directory or one of its checkpoints"
        )
    if run == source and (source / "weights").is_dir():
        return source, None
    checkpoint = source / "checkpoints" / "last.ckpt" if run == source else run
    if not checkpoint.exists():
        raise FileNotFoundError(
            f"{run} holds no checkpoint: none was due yet, or it kept none, as comparisons do unless they are given "
            "checkpoint.keep=weights (or last)"
        )
    if said := damage(checkpoint):
        raise ValueError(f"{checkpoint} is damaged: {said}. Where the run holds an earlier checkpoint, give that one")
    return source, checkpoint


def _weights(checkpoint: Path) -> dict[str, Tensor]:
    return {k.removeprefix(PREFIX): v for k, v in read_weights(checkpoint).items() if k.startswith(PREFIX)}


def save_weights(trainer: L.Trainer, module: L.LightningModule, folder: Path) -> None:
    """As `export`, of the model that `trainer` has trained; all ranks call it, rank 0 writes. Replaces `folder`."""
    some = whole_weights(module.model, trained=bool(module.lora))
    weights = {name: x for name, x in some if trainer.is_global_zero}
    if trainer.is_global_zero:
        _replace(module.cfg, weights, folder)
    trainer.strategy.barrier("weights written")


def save_weights_of(checkpoint: Path, cfg: DictConfig, folder: Path) -> None:
    """As `save_weights`, of a run that was ended between its last step's checkpoint and its weights."""
    _replace(cfg, _weights(checkpoint), folder)


def _replace(cfg: DictConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Write `folder` anew; on the disk when this returns, since the checkpoints may be deleted then."""
    aside = folder.with_name(f".{folder.name}.partial")
    for old in (aside, folder):
        shutil.rmtree(old, ignore_errors=True)
    _write(cfg, weights, aside)
    _follow_umask(aside)
    flush(aside)
    os.replace(aside, folder)


def whole_weights(model: torch.nn.Module, trained: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name and whole tensor, on the CPU, of every parameter and persistent buffer, or of the parameters that are
    `trained`, whichever strategy shards them."""
    kept = model.state_dict().keys()
    for name, x in chain(model.named_parameters(), model.named_buffers()):
        if name not in kept or (trained and not x.requires_grad):
            continue
        gather: Any = nullcontext()
        if hasattr(x, "ds_id"):
            import deepspeed

            gather = deepspeed.zero.GatheredParameters([x])
        with gather, torch.no_grad():
            yield name, (x.full_tensor() if isinstance(x, DTensor) else x).detach().to("cpu", copy=True)


def read_weights(checkpoint: Path) -> Mapping[str, Tensor]:
    """The weights in a checkpoint of any strategy, by their names in the LightningModule."""
    checkpoint = checkpoint.resolve()
    if checkpoint.is_file():
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    if (checkpoint / ".metadata").exists():
        return _from_distributed(checkpoint)
    if (checkpoint / "latest").exists():
        return _from_deepspeed(checkpoint)
    raise FileNotFoundError(f"{checkpoint} is no checkpoint of SageTrain: neither torch's nor DeepSpeed's")


def _from_distributed(checkpoint: Path) -> Mapping[str, Tensor]:
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    names = [name for name in stored if name.startswith("state_dict.")]
    weights = {name: torch.empty(stored[name].size, dtype=stored[name].properties.dtype) for name in names}
    dcp.load(weights, checkpoint_id=checkpoint, no_dist=True)
    return {name.removeprefix("state_dict."): x for name, x in weights.items()}


def _from_deepspeed(checkpoint: Path) -> Mapping[str, Tensor]:
    if find_spec("deepspeed") is None:
        raise ModuleNotFoundError("this is a DeepSpeed checkpoint: DS_BUILD_OPS=0 pip install 'sagetrain[deepspeed]'")
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    parts = checkpoint / (checkpoint / "latest").read_text().strip()
    if not any(parts.glob("*_optim_states.pt")):  # stage 0: nothing is sharded
        weights = torch.load(parts / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)["module"]
    else:
        weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    return {name.removeprefix("_forward_module."): x for name, x in weights.items()}


def _empty(cfg: DictConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a run, without values. A new one's begin and end of text are those of its data: the defaults of its
    kind belong to another vocabulary."""
    with asked_for("model"):
        config = model_config(cfg.model)
    if not cfg.model.path:
        tokenizer = build_tokenizer(cfg.model.tokenizer)
        for name in "bos_token_id", "eos_token_id":
            setattr(config, name, getattr(tokenizer, name))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _model(cfg: DictConfig, weights: dict[str, Tensor]) -> PreTrainedModel:
    """The model of a run with these weights. Raises ValueError when they are not this model's."""
    model = _empty(cfg, _dtype(weights))
    missing, unknown = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    empty = [name for name, x in model.named_parameters() if x.is_meta]
    if empty or unknown:
        raise ValueError(
            f"the checkpoint does not fit the model of this run: {len(empty)} weights missing, {len(unknown)} unknown "
            f"({', '.join([*empty, *unknown][:3])}, ...)"
        )
    return model


def _dtype(weights: dict[str, Tensor]) -> torch.dtype:
    return next(x.dtype for x in weights.values() if x.is_floating_point())


def _write(cfg: DictConfig, weights: dict[str, Tensor], folder: Path) -> None:
    """Model (or adapters) and tokenizer in Hugging Face's format. Raises ValueError when the weights are not this
    model's."""
    if adapters := lora.options(cfg.model):
        model = _empty(cfg, _dtype(weights))
        lora.adapt(model, adapters, cfg.seed)
        lora.save(model, weights, folder)
    else:
        _model(cfg, weights).save_pretrained(folder)
    _write_tokenizer(cfg, folder)


def _write_tokenizer(cfg: DictConfig, folder: Path) -> None:
    if cfg.model.tokenizer != "byte":
        build_tokenizer(cfg.model.tokenizer).save_pretrained(folder)


def _follow_umask(folder: Path) -> None:
    """Weights as readable as the configuration beside them: safetensors writes files for their owner alone."""
    mode = next(folder.glob("*config.json")).stat().st_mode
    for file in folder.glob("*.safetensors"):
        if file.stat().st_mode != mode:
            file.chmod(stat.S_IMODE(mode))

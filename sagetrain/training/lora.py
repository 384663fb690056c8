"""LoRA: the model's own weights stand still, small matrices beside its linear layers are trained. By peft.

Method: `adapt` has transformers put peft's layers into the model, which stays the class that it was: attention, loss,
checkpointing, compilation and strategies see nothing new. The matrices are drawn in fp32 from the seed alone, whatever
reading the weights has drawn. `save` and `merge` write what peft and transformers read: the adapters alone
(adapter_config.json, adapter_model.safetensors), or whole weights with the adapters in them.
Choice: not `get_peft_model`, which wraps the model in another one; what is saved is the same.
Cost: the frozen weights stay in the type that `trainer.precision` gives them, fp32 under bf16-mixed; with bf16-true
they take half, and so do the adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from sagetrain.errors import asked_for

DEFAULTS = {"r": 16, "alpha": 32, "dropout": 0.0, "target_modules": "all-linear"}


def options(model: DictConfig) -> dict[str, Any] | None:
    """What `model.lora` means: None, or all of `DEFAULTS` with what it changes.

    Raises ValueError for what it cannot be, ModuleNotFoundError without peft.
    """
    given = OmegaConf.to_container(OmegaConf.create({"lora": model.get("lora")}))["lora"]
    if given is None:
        return None
    if not isinstance(given, dict) or (unknown := sorted(given.keys() - DEFAULTS)):
        which = given if not isinstance(given, dict) else unknown[0]
        raise ValueError(
            f"model.lora: {which} is none of {', '.join(DEFAULTS)}: give null, or what differs from these, as in "
            "model.lora.r=16 model.lora.alpha=32"
        )
    lora = DEFAULTS | given
    names = [lora["target_modules"]] if isinstance(lora["target_modules"], str) else lora["target_modules"]
    for key, right, wanted in (
        ("r", type(lora["r"]) is int and lora["r"] >= 1, "a whole number, at least 1"),
        ("alpha", _number(lora["alpha"]) and lora["alpha"] > 0, "a number above 0"),
        ("dropout", _number(lora["dropout"]) and 0 <= lora["dropout"] < 1, "a number from 0 to below 1"),
        (
            "target_modules",
            isinstance(names, list) and names and all(isinstance(name, str) for name in names),
            "all-linear or names of layers, as in model.lora.target_modules=[q_proj,v_proj]",
        ),
    ):
        if not right:
            raise ValueError(f"model.lora.{key}={lora[key]}: give {wanted}")
    if not model.path:
        raise ValueError("model.lora adapts weights that are there already: give model.path=, or model.lora=null")
    if model.linear:
        raise ValueError(f"model.lora does not go with model.linear={model.linear}: set one of them to null")
    if find_spec("peft") is None:
        raise ModuleNotFoundError("model.lora: no package peft: pip install 'sagetrain[lora]'")
    return lora


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def adapt(model: PreTrainedModel, lora: Mapping[str, Any], seed: int) -> None:
    """Put adapters into `model`, which are then all of it that is trained. Raises ValueError for layers it lacks."""
    from peft import LoraConfig

    config = LoraConfig(
        r=lora["r"],
        lora_alpha=lora["alpha"],
        lora_dropout=lora["dropout"],
        target_modules=lora["target_modules"],
        task_type="CAUSAL_LM",
    )
    layers = [name for name, _ in model.named_modules()]
    names = [] if isinstance(lora["target_modules"], str) else lora["target_modules"]
    if missing := [name for name in names if not any(f".{layer}".endswith(f".{name}") for layer in layers)]:
        raise ValueError(f"model.lora.target_modules: the model has no {', '.join(missing)}")
    with asked_for("model.lora"), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model.add_adapter(config)


def save(model: PreTrainedModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters among `weights` (by their names in `model`, which is adapted) as peft does.

    Raises ValueError when they are not this model's.
    """
    shapes = {name: x.shape for name, x in model.named_parameters() if x.requires_grad}
    differ = [name for name, shape in shapes.items() if name not in weights or weights[name].shape != shape]
    if differ:
        raise ValueError(
            f"the checkpoint does not fit the model of this run: {len(differ)} of {len(shapes)} adapters are missing "
            f"or of another shape ({differ[0]}, ...)"
        )
    for config in model.peft_config.values():
        config.inference_mode = True  # as peft itself leaves it behind
    model.save_pretrained(folder, state_dict={name: weights[name] for name in shapes})


def load(base: str, config: Any, adapters: Path, dtype: torch.dtype) -> PreTrainedModel:
    """`base` with the adapters beside its weights, all in `dtype`, as they trained: merged into weights of 16 bits (or
    under autocast) an adapter that adds less than their last bit would be lost."""
    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=dtype)
    model.load_adapter(str(adapters))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = weight.data.to(dtype)  # peft has them in fp32
    return model


def merge(base: str, config: Any, adapters: Path, folder: Path) -> None:
    """Write the weights of `base` with the adapters in them, fp32, for `from_pretrained`."""
    from peft import PeftModel

    model = AutoModelForCausalLM.from_pretrained(base, config=config, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(model, adapters)
    ends = {name.rpartition(".")[2] for name, part in adapted.named_modules() if hasattr(part, "lora_A")}
    if model.config.tie_word_embeddings and (tied := sorted(ends & {"lm_head", "embed_tokens"})):
        raise ValueError(
            f"--merge: the adapters change {', '.join(tied)}, which this model has as one with its embeddings "
            "(tie_word_embeddings), and whole weights would have them there too. Export without --merge"
        )
    adapted.merge_and_unload().save_pretrained(folder)

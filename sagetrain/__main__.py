"""The command line: `python -m sagetrain recipe=NAME key=value ...`.

Method: Hydra composes conf/train.yaml, the recipe and the command line; before it runs anything, every override is
checked against what there is, so a mistyped name costs one line that lists the choices, not a traceback.
Exit status: 0; 2 after such a line; 1 after the traceback of what nobody expected; 128 + the number of the signal that
ended the run.
Choice: the configuration folder is passed as an absolute path and each recipe is put into Hydra's ConfigStore as an
option of the group `recipe`, so that all works from a checkout, an editable install and a wheel, in any directory.
Cost: the configuration is composed twice (0.2 s each); in one process the groups that were chosen before, once.
"""

import contextlib
import difflib
import functools
import inspect
import itertools
import os
import re
import sys
from pathlib import Path
from typing import Any

from sagetrain.extras import needs
from sagetrain.paths import CONF_DIR, RECIPES_DIR, groups, recipes
from sagetrain.terminal import print_anything

with needs("train", command=__name__ == "__main__"):
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from lightning.pytorch import Trainer
    from omegaconf import DictConfig, OmegaConf

    from sagetrain.errors import refused
    from sagetrain.training.folder import agreed, quoted
    from sagetrain.training.signals import Stopped, follow_launcher, is_helper

OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
USAGE = """usage: python -m sagetrain recipe=NAME [key=value ...]

recipes:
{recipes}

options of the groups (group=NAME):
{groups}

any key of the configuration: key=value, e.g. trainer.max_steps=100 optim.lr=1e-3 out=FOLDER
  compare.arms=[bf16,sage_int8] compare.seeds=3   run several arms and report the differences
  data.path=FILE                                  local data instead of the hub
  --cfg job   show the composed configuration      -m key=a,b   one run per value      --hydra-help   all flags
  eval.tasks=[gsm8k]                              ask benchmark questions at the end (gsm8k, mmlu, hellaswag, drop)
  model.lora.r=16                                 train adapters instead of all weights
python -m sagetrain.doctor says what runs here, python -m sagetrain.compare RUN RUN... compares finished runs,
python -m sagetrain.evaluate RUN|FOLDER --tasks gsm8k asks benchmark questions of a run or a model,
python -m sagetrain.export RUN FOLDER writes the weights for transformers' from_pretrained."""


def usage() -> str:
    def listed(rows: dict[str, str]) -> str:
        return "\n".join(f"  {name:<20} {text}" for name, text in rows.items())

    options = {name: ", ".join(names) for name, names in groups().items() if name != "recipe"}
    return USAGE.format(recipes=listed(recipes()), groups=listed(options))


@functools.cache
def register() -> None:
    """Put the recipes into Hydra's ConfigStore, each knowing its own name."""
    for name in recipes():
        node = OmegaConf.load(RECIPES_DIR / f"{name}.yaml")
        node["recipe"] = name
        ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


def check(arguments: list[str], sweep: bool = False) -> list[str]:
    """The overrides, ready for Hydra: `trainer`, `data` and `model.config` take keys that conf/ does not list.

    sweep: whether Hydra will take the values of a list one by one (`-m`).
    Raises ValueError, or what Hydra raises, for what cannot be composed: no recipe, an unknown option or key.
    """
    return _checked(arguments, sweep)[0]


def _checked(arguments: list[str], sweep: bool) -> tuple[list[str], DictConfig]:
    """What `check` returns, and the configuration that it makes; of a sweep, one of those."""
    register()
    overrides = []
    for argument in arguments:
        if argument in recipes():
            raise ValueError(f"cannot read {argument!r}: did you mean recipe={argument}?")
        # Few shells expand `~` behind `=`, and Hydra cannot read it.
        argument = re.sub(r"(?<=[=,\[])~[^,\]]*", lambda home: quoted(os.path.expanduser(home[0])), argument)
        try:
            overrides += OverridesParser.create().parse_overrides([argument])
        except HydraException as error:
            raise ValueError(f"cannot read {argument!r}, expected key=value: {str(error).splitlines()[0]}") from error
    chosen = [o for o in overrides if o.key_or_group in groups() and not o.is_delete()]
    rest = [o for o in overrides if o not in chosen]
    names = [o.key_or_group for o in chosen]
    ready: list[str] = []
    for options in itertools.product(*(_lines(o) if sweep else [o.input_line] for o in chosen)):
        known = _keys(options)
        ready = [_known(override, known) for override in rest]
        single = [line for line, o in zip(ready, rest, strict=True) if not (sweep and o.is_sweep_override())]
        cfg = _compose([*options, *single])
        if cfg.compare.arms and "attention" in names:
            raise ValueError(
                f"attention={cfg.attention.name} has no part in a comparison of {', '.join(cfg.compare.arms)}: say "
                "compare.arms=null for one run, or name the arms in compare.arms"
            )
    if "recipe" not in names:
        listed = "; ".join(f"{name}: {text}" for name, text in recipes().items())
        raise ValueError(f"no recipe given: add recipe=NAME. {listed}")
    return [*(o.input_line for o in chosen), *ready], cfg


def _lines(override: Override) -> list[str]:
    """An override as it is, or one for each value of a sweep."""
    if not override.is_sweep_override():
        return [override.input_line]
    return [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]


def compose(arguments: list[str]) -> DictConfig:
    """The checked configuration of a command line, for `sagetrain.training.train.run`. Raises ValueError as `check`."""
    return _checked(arguments, sweep=False)[1]


def _compose(overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return hydra.compose("train", overrides=overrides)


@functools.cache
def _keys(options: tuple[str, ...]) -> dict[Any, Any]:
    """The configuration of the chosen options as it is before any other override."""
    return OmegaConf.to_container(_compose(list(options)), resolve=False)  # type: ignore[return-value]


def _known(override: Override, cfg: Any) -> str:
    """The override as Hydra should get it. Raises ValueError when its key does not exist in `cfg`."""
    key, line = override.key_or_group, override.input_line
    if override.is_add() or override.is_force_add() or override.is_hydra_override() or "/" in key:
        return line
    parts, node = key.split("."), cfg
    for i, part in enumerate(parts):
        place = ".".join(parts[:i])
        if place == "model.lora" and node is None:
            return f"++{line}"
        if not isinstance(node, dict):
            raise ValueError(f"unknown key {key}: {place} is a single value")
        if part not in node:
            names = list(inspect.signature(Trainer).parameters) if place == "trainer" else [str(name) for name in node]
            # The model's configuration and sagetrain.data check what they are given.
            if place in ("model.config", "model.lora", "data") or part in names:
                return f"++{line}"
            close = "".join(f". Did you mean {name}?" for name in difflib.get_close_matches(part, names, 1, 0.5))
            raise ValueError(f"unknown key {key}; choose from {', '.join(names)}{close}")
        node = node[part]
    if len(parts) == 1 and isinstance(node, dict) and not (override.is_delete() or isinstance(override.value(), dict)):
        keys = ", ".join(f"{key}.{name}" for name in node)
        raise ValueError(f"{key} is a group of keys, not a single value: set {keys}")
    return line


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="train")
def _run(cfg: DictConfig) -> None:
    try:
        with needs("train", command=True):
            from sagetrain.training.train import run

        if HydraConfig.get().mode == RunMode.MULTIRUN:
            cfg.out = str(Path(cfg.out) / str(HydraConfig.get().job.num))
        run(cfg)
    except Stopped as stop:
        _say(f"sagetrain: {stop}")
        # At once: what libraries do as a process ends can wait for ranks that are gone. Lightning kills all ranks when
        # one that it started has another status than 0.
        os._exit(0 if is_helper() else stop.code)
    except Exception as error:
        sys.exit(refused(error))


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be what is gone
        print(line, file=sys.stderr, flush=True)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (`sys.argv` when None)."""
    follow_launcher()
    print_anything()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or set(arguments) & {"-h", "--help"}:
        print(usage())
        sys.exit(0 if arguments else 2)
    if not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()  # a file is no place for one
    # Hydra's own flags; the value of --cfg is a word of its own.
    words = [a for a in arguments if a.startswith("-") or a in ("job", "hydra", "all")]
    sweep = bool({"-m", "--multirun"} & set(words))
    try:
        overrides = check([a for a in arguments if a not in words], sweep)
        if not any(o.startswith("out=") for o in overrides):
            parsed = OverridesParser.create().parse_overrides(overrides)
            single = [o.input_line for o in parsed if not (sweep and o.is_sweep_override())]
            overrides.append(f"out={quoted(agreed(_compose(single).out))}")
    except Exception as error:
        sys.exit(refused(error))
    # What Hydra sees, and what Lightning starts its other processes with: the same run directory for all of them.
    sys.argv[1:] = [*words, *overrides]
    GlobalHydra.instance().clear()
    _run()


if __name__ == "__main__":
    main()

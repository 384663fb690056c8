"""The command line: `python -m sagetrain recipe=NAME key=value ...`.

Method: Hydra composes conf/train.yaml, the recipe and the command line; before it runs anything, every override is
checked against what there is, so a mistyped name costs one line that lists the choices, not a traceback.
Exit status: 0; 2 after such a line; 1 after the traceback of what nobody expected; 128 + the number of the signal that
ended the run.
Choice: the configuration folder is passed as an absolute path and each recipe is put into Hydra's ConfigStore as an
option of the group `recipe`, so that all works from a checkout, an editable install and a wheel, in any directory.
Cost: the configuration is composed twice (milliseconds).
"""

import contextlib
import difflib
import inspect
import itertools
import os
import re
import sys
import traceback
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
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from sagetrain.errors import is_bad_input, one_line
    from sagetrain.training.folder import agreed, quoted
    from sagetrain.training.signals import Stopped, follow_launcher, is_helper

OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
USAGE = """usage: python -m sagetrain recipe=NAME [key=value ...]

recipes:
{recipes}

options of the groups (group=NAME):
{groups}

any key of the configuration: key=value, e.g. trainer.max_steps=100 optim.lr=1e-3 out=FOLDER
  compare.arms=[bf16,sage_int8] compare.seeds=2   run several arms and report the differences
  data.path=FILE                                  local data instead of the hub
  --cfg job   show the composed configuration      -m key=a,b   one run per value      --hydra-help   all flags
python -m sagetrain.doctor says what runs here, python -m sagetrain.compare RUN RUN... compares finished runs,
python -m sagetrain.export RUN FOLDER writes the weights for transformers' from_pretrained."""


def usage() -> str:
    def listed(rows: dict[str, str]) -> str:
        return "\n".join(f"  {name:<20} {text}" for name, text in rows.items())

    options = {name: ", ".join(names) for name, names in groups().items() if name != "recipe"}
    return USAGE.format(recipes=listed(recipes()), groups=listed(options))


def register() -> None:
    """Put the recipes into Hydra's ConfigStore, each knowing its own name."""
    for name in recipes():
        node = OmegaConf.load(RECIPES_DIR / f"{name}.yaml")
        node["recipe"] = name
        ConfigStore.instance().store(group="recipe", name=name, node=node, package="_global_")


def _choose(what: str, given: str, choices: list[str]) -> str:
    close = difflib.get_close_matches(given, choices, 1, 0.5)
    return f"unknown {what}; choose from {', '.join(choices)}" + (f". Did you mean {close[0]}?" if close else "")


def _values(override: Override) -> list[Any]:
    """The values an override takes: one, or each one of a sweep."""
    return list(override.sweep_string_iterator()) if override.is_sweep_override() else [override.value()]


def check(arguments: list[str]) -> list[str]:
    """The overrides, ready for Hydra: `trainer`, `data` and `model.config` take keys that conf/ does not list.

    Raises ValueError in one line for what cannot be composed: no recipe, an unknown option, an unknown key.
    """
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
    choices = groups()
    chosen = [o for o in overrides if o.key_or_group in choices and not o.is_delete()]
    for override in chosen:
        for value in _values(override):
            if str(value) not in choices[override.key_or_group]:
                name = override.key_or_group
                raise ValueError(_choose(f"{name}: {name}={value}", str(value), choices[name]))
    if "recipe" not in [o.key_or_group for o in chosen]:
        close = [o.key_or_group for o in overrides if difflib.get_close_matches(o.key_or_group, ["recipe"])]
        typed = f" ({close[0]}= is no key)" if close else ""
        listed = "; ".join(f"{name}: {text}" for name, text in recipes().items())
        raise ValueError(f"no recipe given{typed}: add recipe=NAME. {listed}")
    texts = [[f"{o.key_or_group}={value}" for value in _values(o)] for o in chosen]
    rest = [o for o in overrides if o not in chosen]
    ready: dict[int, str] = {}
    for combination in itertools.product(*texts):
        known = OmegaConf.to_container(_compose(list(combination)), resolve=False)
        for i, override in enumerate(rest):
            ready[i] = _known(override, known)
        one_each = [o.input_line for o in rest if not o.is_sweep_override() and not o.is_hydra_override()]
        cfg = _compose([*combination, *(_known(o, known) for o in rest if o.input_line in one_each)])
        if cfg.compare.arms and "attention" in [o.key_or_group for o in chosen]:
            raise ValueError(
                f"attention={cfg.attention.name} has no part in a comparison of {', '.join(cfg.compare.arms)}: say "
                "compare.arms=null for one run, or name the arms in compare.arms"
            )
    return [*(o.input_line for o in chosen), *ready.values()]


def compose(arguments: list[str]) -> DictConfig:
    """The checked configuration of a command line, for `sagetrain.training.train.run`. Raises ValueError as `check`."""
    return _compose(check(arguments))


def _compose(overrides: list[str]) -> DictConfig:
    with hydra.initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
        return hydra.compose("train", overrides=overrides)


def _known(override: Override, cfg: Any) -> str:
    """The override as Hydra should get it. Raises ValueError when its key does not exist in `cfg`."""
    key, line = override.key_or_group, override.input_line
    if override.is_add() or override.is_force_add() or override.is_hydra_override() or "/" in key:
        return line
    parts, node = key.split("."), cfg
    for i, part in enumerate(parts):
        if not isinstance(node, dict):
            raise ValueError(f"unknown key {key}: {'.'.join(parts[:i])} is a single value")
        if part in node:
            node = node[part]
            continue
        place = ".".join(parts[:i])
        if place in ("model.config", "data"):  # the model's configuration and sagetrain.data check what they are given
            return f"++{line}"
        names = [str(name) for name in node]
        if place == "trainer":
            from lightning.pytorch import Trainer

            names = list(inspect.signature(Trainer).parameters)
            if part in names:
                return f"++{line}"
        raise ValueError(_choose(f"key {key}", part, names))
    return line


@hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name="train")
def _run(cfg: DictConfig) -> None:
    try:
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
        _fail(error)


def _say(line: str) -> None:
    with contextlib.suppress(OSError):  # the terminal may be what is gone
        print(line, file=sys.stderr, flush=True)


def _fail(error: Exception) -> None:
    """Leave with code 2 after one line for bad input, with 1 after the traceback of anything else.

    With HYDRA_FULL_ERROR=1, raise it.
    """
    if os.environ.get("HYDRA_FULL_ERROR", "0") == "1":
        raise error
    expected = is_bad_input(error)
    if not expected:
        _say("".join(traceback.format_exception(error)).rstrip())
    _say(f"sagetrain: error: {one_line(error)}")
    sys.exit(2 if expected else 1)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (`sys.argv` when None)."""
    follow_launcher()
    print_anything()
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or set(arguments) & {"-h", "--help"}:
        print(usage())
        sys.exit(0 if arguments else 2)
    flags = [a for a in arguments if a.startswith("-")]
    try:
        values = [a for a in arguments if not a.startswith("-")]
        if "--cfg" in flags:  # its value is a word of its own
            values = [a for a in values if a not in ("job", "hydra", "all")]
        overrides = check(values)
        if not any(o.startswith("out=") for o in overrides):
            sweep = bool({"-m", "--multirun"} & set(flags))
            parsed = OverridesParser.create().parse_overrides(overrides)
            single = [o for o in parsed if not o.is_hydra_override() and not (sweep and o.is_sweep_override())]
            overrides.append(f"out={quoted(agreed(_compose([o.input_line for o in single]).out))}")
    except (ValueError, HydraException, OmegaConfBaseException) as error:
        _fail(error)
    # What Hydra sees, and what Lightning starts its other processes with: the same run directory for all of them.
    words = [a for a in arguments if a.startswith("-") or a in ("job", "hydra", "all")]
    sys.argv[1:] = [*words, *overrides]
    GlobalHydra.instance().clear()
    _run()


if __name__ == "__main__":
    main()

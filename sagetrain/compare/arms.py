"""Which runs are one arm, and what the arms are called.

Method: an arm is all runs of one attention with the same settings, whatever their seeds. Its name is that of the
attention (`arm` in run.json); where runs of one attention differ in settings (a sweep over optim.lr, say), these stand
in the name of every arm. Runs of the same seed and settings are told apart by what they ran on and with: device,
commit, versions. Where even that is the same, it is one experiment done twice, and one arm cannot hold both.
Choice: settings that differ between attentions alone make no arms; they are mismatches (stats.py), said loudly.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sagetrain.compare.runs import Run
from sagetrain.paths import settings

# What may differ between two runs of one arm.
FREE = ("recipe", "seed", "out", "resume", "logger", "compare", "probe", "eval", "checkpoint", "attention.name")
FREE += tuple(
    f"trainer.{name}" for name in ("default_root_dir", "enable_progress_bar", "log_every_n_steps", "val_check_interval")
)
LONGEST = 60  # characters of settings in a name; arms that would need more are numbered instead


def name_arms(runs: list[Run]) -> tuple[set[str], list[str]]:
    """Sets `arm` of each run. Returns the settings that tell arms of one attention apart, and, where these are too long
    for a name, a line for each number that stands for them.

    Raises:
        ValueError: two runs of one attention and seed that differ in nothing.
    """
    given = [settings(run.config, FREE) for run in runs]
    names = _differing(runs, given)
    if _twins(runs, given, names):
        given = [values | _conditions(run) for run, values in zip(runs, given, strict=True)]
        names = _differing(runs, given)
    if twins := _twins(runs, given, names):
        one, other = twins
        raise ValueError(
            f"two runs of arm {one.kind!r} and seed {one.seed} that differ in no setting: {one.path} and {other.path}; "
            "name only one of them"
        )
    said = [", ".join(f"{name}={_show(values.get(name))}" for name in names) for values in given]
    numbers = {text: f"#{number}" for number, text in enumerate(dict.fromkeys(said), 1)}
    long = max(map(len, said)) > LONGEST
    for run, text in zip(runs, said, strict=True):
        run.arm = f"{run.kind} {numbers[text] if long else text}".strip()
    return set(names), [f"{number} is {text}" for text, number in numbers.items()] if long else []


def _differing(runs: list[Run], given: list[dict[str, Any]]) -> list[str]:
    """The names that have several values among the runs of one attention. Runs without config.yaml do not count."""
    values: dict[tuple[str, str], set[str]] = {}
    for name in dict.fromkeys(name for own in given for name in own):
        for run, own in zip(runs, given, strict=True):
            if own:
                values.setdefault((name, run.kind), set()).add(_show(own.get(name)))
    return list(dict.fromkeys(name for (name, _), several in values.items() if len(several) > 1))


def _twins(runs: list[Run], given: list[dict[str, Any]], names: Iterable[str]) -> tuple[Run, Run] | None:
    """Two runs of one seed that would be of one arm."""
    seen: dict[tuple[Any, ...], Run] = {}
    for run, own in zip(runs, given, strict=True):
        key = (run.kind, run.seed, *(_show(own.get(name)) for name in names))
        if key in seen:
            return seen[key], run
        seen[key] = run
    return None


def _conditions(run: Run) -> dict[str, Any]:
    versions = run.info.get("versions")
    commit = str(run.info.get("git_commit") or "")[:8]
    known = {"device": run.info.get("device"), "commit": commit} | (versions if isinstance(versions, dict) else {})
    return {name: value for name, value in known.items() if value}


def _show(value: Any) -> str:
    return "null" if value is None else str(value)

"""Where the configuration lives, and how it is read where Hydra is not there.

In a checkout (and in an editable install of it) `conf/` and `recipes/` lie beside the package; in a wheel `setup.py`
maps them into it. Both are plain folders, so Hydra gets an absolute path and works from any directory.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PACKAGE_DIR = Path(__file__).resolve().parent


def _folder(name: str) -> Path:
    """The folder `name` inside the package (a wheel) or beside it (a checkout)."""
    for parent in (PACKAGE_DIR, PACKAGE_DIR.parent):
        if (parent / name).is_dir():
            return parent / name
    raise FileNotFoundError(
        f"no {name}/ folder in or beside {PACKAGE_DIR}: reinstall sagetrain, this one is incomplete"
    )


CONF_DIR = _folder("conf")
RECIPES_DIR = _folder("recipes")


def recipes() -> dict[str, str]:
    """Every recipe by name, with what the comment on its first line says it does."""
    lines = {path.stem: path.read_text("utf-8").partition("\n")[0] for path in sorted(RECIPES_DIR.glob("*.yaml"))}
    return {name: line.lstrip("# ") if line.startswith("#") else "" for name, line in lines.items()}


def settings(config: dict[str, Any], without: Iterable[str] = (), prefix: str = "") -> dict[str, Any]:
    """{dotted name: value} of a configuration, but for the groups and values named in `without`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name not in without:
            flat |= settings(value, without, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def groups() -> dict[str, list[str]]:
    """Every configuration group with its options, `recipe` among them."""
    found = {p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in sorted(CONF_DIR.iterdir()) if p.is_dir()}
    return {"recipe": list(recipes()), **found}

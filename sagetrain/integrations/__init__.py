"""Plugs into other libraries, each registered when its library is imported, be it before or after sagetrain.

Method: `after_import` puts a finder in front of `sys.meta_path` that lets the import system find the library as usual
and has its loader import our plug behind it. The plugs add entries to the libraries' registries and change nothing else
there.
Choice: neither transformers nor Lightning has an entry point for this, and importing them ourselves would make `import
sagetrain` cost seconds and need them.
Cost: one string comparison for every module that is imported.
"""

import copy
import importlib
import importlib.util
import sys
import warnings
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Module of a library, loaded before anybody can use the registry -> our plug.
PLUGS = {
    "transformers.modeling_utils": "sagetrain.integrations.huggingface",
    "lightning.pytorch": "sagetrain.integrations.lightning",
}


def _plug_in(plug: str) -> None:
    """Imports it. Where that fails, warns: an old library must still be there for a program that does not need us."""
    try:
        importlib.import_module(plug)
    except Exception as error:  # whatever an old library lacks
        warnings.warn(f"{plug} does not load, so its names are not registered: {error}", RuntimeWarning, stacklevel=2)


class _After(MetaPathFinder):
    def __init__(self, name: str, plug: str) -> None:
        self.name, self.plug, self.looking = name, plug, False

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name or self.looking:
            return None
        self.looking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.looking = False
        if spec is not None and spec.loader is not None:
            spec.loader = copy.copy(spec.loader)  # a library in a zip file shares it with its neighbours
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _plug_in(self.plug)

            spec.loader.exec_module = exec_module
        return spec


def after_import(name: str, plug: str) -> None:
    """Imports module `plug` as soon as module `name` has been imported: now, if it has."""
    if name in sys.modules:
        _plug_in(plug)
    else:
        sys.meta_path.insert(0, _After(name, plug))


def register() -> None:
    """Has every plug registered when its library is there."""
    for name, plug in PLUGS.items():
        after_import(name, plug)

"""How the commands speak: plain text on any terminal.

Choice: rich draws tables and progress, but reads no markup and no emoji codes in what it prints, because paths and
names may hold brackets and colons. A terminal that lacks a character shows `?` for it; a run never ends over a line.
"""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def console(stderr: bool = False) -> "Console":
    """A console that prints text as it is."""
    from rich.console import Console

    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def print_anything() -> None:
    """Have standard output and error replace what their encoding cannot show, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

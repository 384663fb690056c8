"""What a command says when the packages of an extra are not installed: `pip install sagetrain` brings torch alone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around the imports of a command: exit status 2 and one line on stderr when a package of `extra` is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "sagetrain":
            raise
        print(f"sagetrain: error: no package {error.name}: pip install 'sagetrain[{extra}]'", file=sys.stderr)
        sys.exit(2)

"""What is said when the packages of an extra are not installed: `pip install sagetrain` brings torch alone."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(extra: str, command: bool) -> Iterator[None]:
    """Around imports that need the packages of `extra`.

    command: whether the module is being run (`python -m`): then a missing package is one line on stderr and exit
    status 2. Imported by a program, it is a ModuleNotFoundError that says what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "sagetrain":
            raise
        said = f"no package {error.name}: pip install 'sagetrain[{extra}]'"
        if not command:
            raise ModuleNotFoundError(said, name=error.name) from error
        print(f"sagetrain: error: {said}", file=sys.stderr)
        sys.exit(2)

"""Tells bad input, which one line explains, from the unexpected, which needs its traceback.

Method: an error is bad input when the innermost frame of its traceback stands at a `raise` statement of this package:
a check that was written for it. The same exception type out of torch or DeepSpeed, or out of an operation that failed
in our own code, is not. Lightning's checks of the Trainer's arguments, and what Hydra and OmegaConf say of a command
line, count as ours.
Choice: no exception class of our own, so that callers catch the usual ValueError, OSError and so on. Lightning is known
by its name, because to import it takes seconds and commands that do not train can do without.
"""

import dis
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from hydra.errors import HydraException, InstantiationException
from omegaconf.errors import OmegaConfBaseException

from sagetrain.paths import PACKAGE_DIR


def is_bad_input(error: BaseException) -> bool:
    """Whether a check made this error, so that its message alone says what to do."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        return is_bad_input(error.__cause__)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return True
    if (last := error.__traceback__) is None:
        return False
    while last.tb_next is not None:
        last = last.tb_next
    code = last.tb_frame.f_code
    if dis.opname[code.co_code[last.tb_lasti]] != "RAISE_VARARGS":
        return False
    if Path(code.co_filename).is_relative_to(PACKAGE_DIR):
        return True
    usual = isinstance(error, ValueError | TypeError | ModuleNotFoundError)
    checked = usual or type(error).__name__ == "MisconfigurationException"
    return checked and last.tb_frame.f_globals.get("__name__", "").startswith("lightning.")


def one_line(error: BaseException) -> str:
    """What the error says, in one line; of what Hydra could not build, what the constructor said."""
    if isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    said = str(error).partition("\nConfig search path:")[0]  # Hydra's, of an unknown option
    return " ".join(said.split()) or type(error).__name__


def refused(error: Exception) -> int:
    """Exit status 2 after one line on stderr, of bad input. Raises anything else again, for its traceback; with
    HYDRA_FULL_ERROR=1 everything."""
    if not is_bad_input(error) or os.environ.get("HYDRA_FULL_ERROR") == "1":
        raise error
    print(f"sagetrain: error: {one_line(error)}", file=sys.stderr)
    return 2


@contextmanager
def asked_for(what: str) -> Iterator[None]:
    """Around a library that reads what the user asked for: its complaint becomes a ValueError that names it."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, ArithmeticError, StrictDataclassError) as error:
        if is_bad_input(error):
            raise
        raise ValueError(f"{what}: {one_line(error)}") from error

"""`python -m sagetrain.export RUN FOLDER`: the weights of a run, as a folder for transformers' from_pretrained."""

import argparse
import sys

from sagetrain.extras import needs
from sagetrain.terminal import console, print_anything

with needs("train", command=__name__ == "__main__"):
    from sagetrain.errors import refused
    from sagetrain.training.export import export


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr that says what is wrong."""
    print_anything()
    parser = argparse.ArgumentParser(prog="python -m sagetrain.export", description=__doc__.partition(": ")[2])
    parser.add_argument("run", metavar="RUN", help="run directory, or one of its checkpoints")
    parser.add_argument("folder", metavar="FOLDER", help="where to write; new or empty")
    parser.add_argument("--merge", action="store_true", help="of a run with model.lora whole weights, not the adapters")
    options = parser.parse_args(arguments)
    try:
        folder = export(options.run, options.folder, options.merge)
    except Exception as error:
        return refused(error)
    console().print(f"written: {folder}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

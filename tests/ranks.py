"""Several runs on two ranks by one launch, because to start processes takes longer than to train in them.

Lightning starts the second rank by running this script again: python ranks.py COMMANDS.
"""

import json
import os
import signal
import subprocess
import sys

from sagetrain.paths import PACKAGE_DIR


def train_each(commands: list[list[str]]) -> None:
    """Run command lines with trainer.devices=2, one after the other; the last checkpoint of each stays."""
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_DIR.parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, json.dumps(commands)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the rank it started
    assert process.returncode == 0, said[-4000:]


if __name__ == "__main__":
    from sagetrain.__main__ import compose
    from sagetrain.training import checkpoint, train

    checkpoint.Checkpoint.clear = lambda self: None
    for each in json.loads(sys.argv[1]):
        train.run(compose(each))

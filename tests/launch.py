"""Programs that need not import what takes them ten seconds: they are forked from a process that has done so once.

Each is a process like any other all the same, in a session of its own.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import sagetrain.training.train  # noqa: F401 (what is imported here is there in every program)

gc.freeze()  # else every collection of every program goes through all of it

SAGETRAIN = "import runpy; runpy.run_module('sagetrain', run_name='__main__', alter_sys=True)"
"""What `python -m sagetrain` does."""

forks = multiprocessing.get_context("forkserver")
forks.set_forkserver_preload([__name__])


class Program(forks.Process):
    """What `python -c program arguments` would be in a folder; what it says goes to the files `stdout` and `stderr`."""

    def __init__(self, program: str, *arguments: str, folder: Path, **environment: str) -> None:
        super().__init__()
        self.program, self.arguments, self.folder, self.environment = program, arguments, folder, environment
        self.stdout, self.stderr = folder / "stdout", folder / "stderr"
        for path in (self.stdout, self.stderr):
            path.touch()
        self.start()
        atexit.register(self.kill)  # of one that is left running multiprocessing would wait for the end

    def run(self) -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # not ignored, as below `nohup` and `&` of a script
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        for number, path in (1, self.stdout), (2, self.stderr):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.environ |= self.environment
        os.chdir(self.folder)
        sys.argv[1:] = self.arguments
        exec(self.program, {"__name__": "__main__"})

    def ends(self, seconds: float = 300) -> int | None:
        """Its exit status; None where it still runs after so many seconds."""
        self.join(seconds)
        return self.exitcode

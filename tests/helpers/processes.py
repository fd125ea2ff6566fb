"""Commands in processes that are forked from one that has imported the package.

Importing takes seconds of a processor, in every process. A forked command is otherwise a real one: its own process and
session, folder, environment, output and exit code. What only a new interpreter shows is left to `run_command`.
"""

import atexit
import multiprocessing
import os
import runpy
import shutil
import socket
import sys
import tempfile
import threading
import weakref
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

import torch

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["mlpmatch_pl.engine.trainer", "mlpmatch_pl.predictor"])


class ForkedCommand:
    """``python -m MODULE ARGUMENTS`` in a folder; keyword arguments are environment variables."""

    def __init__(self, *arguments: str, cwd: Path, module: str = "mlpmatch_pl.train", **environment: str):
        self.output = Path(tempfile.mkdtemp(prefix="forked"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        environment.pop("MLPMATCH_STAMP", None)  # of another command
        self.process = FORKS.Process(target=_run, args=(module, arguments, cwd, environment, self.output))
        self.process.start()

    @property
    def pid(self) -> int:
        """The process, and the group and session that it leads."""
        return self.process.pid

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def finish(self, timeout: float = 240) -> CompletedProcess[str]:
        """Wait for the end and return exit code and output; kill the process if it takes longer."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutExpired(self.process.name, timeout)
        out, err = ((self.output / name).read_text() for name in ("stdout", "stderr"))
        shutil.rmtree(self.output)
        return CompletedProcess(self.process.name, self.process.exitcode, out, err)


def run_forked(*arguments: str, timeout: float = 240, **options) -> CompletedProcess[str]:
    """Run a command as `run_command` does, without the seconds of importing."""
    return ForkedCommand(*arguments, **options).finish(timeout)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(module: str, arguments: tuple[str, ...], cwd: Path, environment: dict[str, str], output: Path) -> None:
    os.setsid()
    atexit._clear()  # what the server has registered would remove its temporary folders, W&B's among them
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    weakref.finalize._registered_with_atexit = False
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # read before the fork
    multiprocessing.set_start_method(None, force=True)  # the platform's, not that of this process
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [str(cwd), *environment.get("PYTHONPATH", "").split(os.pathsep)]
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:  # as at the end of an interpreter
        threading._shutdown()
        atexit._run_exitfuncs()

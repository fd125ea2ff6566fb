"""What a signal to the whole process group means to the processes that load images."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from ctypes import c_bool
from functools import cache, partial
from multiprocessing import util
from types import FrameType
from typing import Any


def outlive_signals() -> Callable[[int], None]:
    """Return what lets a loading process outlive Ctrl-C and SIGTERM: the main process needs it for its last step.

    Terminals and clusters send them to all processes at once. The main process tells its workers to end itself; at its
    own end it sends SIGTERM to those that are left and waits for them, and then, only then, it ends them.

    Returns:
        A `worker_init_fn` for a `torch.utils.data.DataLoader` of this process.
    """
    return partial(_outlive, _ending(os.getpid()))


@cache
def _ending(pid: int) -> Any:
    """Return a flag, shared with the workers, which this process sets when it ends. A forked child needs its own."""
    flag = multiprocessing.RawValue(c_bool, False)
    # Finalizers of this priority run before multiprocessing sends SIGTERM, which an `atexit` function does not do in
    # a process that multiprocessing started itself.
    util.Finalize(None, setattr, args=(flag, "value", True), exitpriority=100)
    return flag


def _outlive(ending: Any, worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, partial(_end_with_main, ending))


def _end_with_main(ending: Any, signum: int, frame: FrameType | None) -> None:
    if ending.value:
        os._exit(0)  # as PyTorch's own handler does

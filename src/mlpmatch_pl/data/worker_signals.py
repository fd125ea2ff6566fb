"""What a signal to the whole process group means to the processes that load images."""

import signal
from types import FrameType


def outlive_signals(worker: int) -> None:
    """Let a loading process outlive Ctrl-C and a first SIGTERM: the main process still needs it for the last step.

    Terminals and clusters send them to all processes at once. The main process ends its workers itself; a second
    SIGTERM, which it sends to one that does not end, ends it.

    Args:
        worker: The worker's number; `torch.utils.data.DataLoader` passes it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_next_time)


def _end_next_time(signum: int, frame: FrameType | None) -> None:
    signal.signal(signum, signal.SIG_DFL)

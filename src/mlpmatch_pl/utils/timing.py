"""Time measurements on a device without synchronization."""

from __future__ import annotations

import time

import torch

Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """Record a point in time. On a GPU, this is an event in the current stream and does not synchronize.

    The time between two events includes the GPU's work and its idle time. A host that runs ahead of the GPU therefore
    doesn't look like a fast step, and a batch that arrives while the GPU is busy does not count as waiting.

    Example:
        >>> start = now(torch.device("cpu"))
        >>> 0 <= seconds_between(start, now(torch.device("cpu"))) < 1
        True
    """
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        return event
    return time.perf_counter()


def has_passed(moment: Moment) -> bool:
    """Tell whether the device has reached a point in time; always true on a CPU."""
    return not isinstance(moment, torch.cuda.Event) or bool(moment.query())  # type: ignore[no-untyped-call]


def seconds_between(start: Moment, end: Moment) -> float:
    """Return the seconds between two points in time of the same device; waits for the second one."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    return float(end) - float(start)  # type: ignore[arg-type]

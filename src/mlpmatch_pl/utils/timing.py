"""Moments on a device, and the time between them."""

from __future__ import annotations

import time

import torch

Moment = float | torch.cuda.Event


def now(device: torch.device) -> Moment:
    """Mark a moment: on a GPU in its own queue, so that nothing has to wait for it.

    Between two such marks lies what the GPU did, or the time that it had nothing to do. A host that runs ahead of the
    GPU is thus not mistaken for a fast step, and a batch that came while the GPU was busy was not waited for.

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
    """Tell whether the device has come to a moment; on a CPU it always has."""
    return not isinstance(moment, torch.cuda.Event) or bool(moment.query())  # type: ignore[no-untyped-call]


def seconds_between(start: Moment, end: Moment) -> float:
    """Return the seconds from one moment to another of the same device, which is waited for."""
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000
    return float(end) - float(start)  # type: ignore[arg-type]

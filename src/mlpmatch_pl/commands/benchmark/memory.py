"""Peak memory, and the batch size that it allows."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch

MARGIN = 0.1  # of the device's memory, kept free: fragmentation, larger validation images, other processes


@dataclass(frozen=True)
class MemoryLine:
    """Memory as a line over the batch size.

    Example:
        >>> line = MemoryLine.through((4, 3e9), (8, 5e9))
        >>> line.fixed, line.per_image, line.largest_batch(10e9)
        (1000000000.0, 500000000.0, 16)
    """

    fixed: float
    per_image: float

    @classmethod
    def through(cls, first: tuple[int, float], second: tuple[int, float]) -> MemoryLine:
        """Fit the line through two pairs of batch size and bytes."""
        (batch_a, bytes_a), (batch_b, bytes_b) = first, second
        per_image = (bytes_b - bytes_a) / (batch_b - batch_a)
        return cls(bytes_a - per_image * batch_a, per_image)

    def largest_batch(self, total: float) -> int | None:
        """Return the largest batch that leaves a tenth of ``total`` bytes free; None if the line does not rise."""
        if self.per_image <= 0:
            return None
        return max(int((total * (1 - MARGIN) - self.fixed) / self.per_image), 0)


def start_peak(device: torch.device) -> int:
    """Start to look for the peak; returns what `peak` wants to know."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    return _resident_peak()


def peak(device: torch.device, started: int) -> int:
    """Return the peak in bytes: allocated on a GPU; on the CPU, by how much the process grew beyond its peak so far."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return max(_resident_peak() - started, 0)


def device_bytes(device: torch.device) -> int:
    """Return the memory of a GPU."""
    return int(torch.cuda.get_device_properties(device).total_memory)


def _resident_peak() -> int:
    if sys.platform == "win32":
        return 0
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

"""Times training steps in turns, in one process: what benchmarks/step.py and benchmarks/levers.py share."""

import platform
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Contestant:
    """Something to time: a step's number to its loss; the rest of the step is the same for all.

    Attributes:
        name: What the table calls it.
        loss: Forward pass and loss, given the number of the step.
        module: The network. Contestants share it: with the learning rate 0 its weights stay as they are.
        optimizer: Steps after backward; None leaves that out.
        precision: ``float32`` or ``bfloat16`` (autocast).
        heaviest: Number of the step whose draws take the most memory.
        batch: Tensors of the batch, as the device holds them.
    """

    name: str
    loss: Callable[[int], Tensor]
    module: nn.Module
    optimizer: torch.optim.Optimizer | None
    precision: str = "float32"
    heaviest: int = 0
    batch: Any = None
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def step(self, number: int, device: torch.device) -> None:
        """Run one whole step."""
        with torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            loss = self.loss(number)
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()


def shared_optimizer(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Return the method's SGD with the learning rate 0: all its work is done, but the weights stay."""
    return torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4, **options)


def alternate(contestants: Sequence[Contestant], device: torch.device, seconds: float, warmup: int = 1) -> int:
    """Run one step of each in turns until the time is up, 3 rounds at least; returns the number of rounds.

    All take a step of the same number in a round, and so the same draws; each round begins with another one.
    """
    for number in range(warmup):
        for contestant in contestants:
            contestant.step(number, device)
    rounds, end = 0, time.monotonic() + seconds
    while rounds < 3 or time.monotonic() < end:
        shift = rounds % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            started, cpu_started = synchronized(device), time.process_time()
            contestant.step(warmup + rounds, device)
            contestant.seconds.append(synchronized(device) - started)
            contestant.cpu_seconds.append(time.process_time() - cpu_started)
        rounds += 1
    return rounds


def row(contestant: Contestant, base: Contestant, images: int) -> dict[str, Any]:
    """Return the figures of a contestant; ``ratio`` is the base's time over its own, the median over the rounds."""
    seconds = contestant.seconds
    pairs = list(zip(base.seconds, seconds, strict=True))
    cpu_pairs = list(zip(base.cpu_seconds, contestant.cpu_seconds, strict=True))
    return {
        "name": contestant.name,
        "precision": contestant.precision,
        "ms": round(1000 * statistics.median(seconds), 1),
        "ms_min": round(1000 * min(seconds), 1),
        "ms_mean": round(1000 * statistics.fmean(seconds), 1),
        "cpu_ms": round(1000 * statistics.median(contestant.cpu_seconds), 1),
        "images_per_second": round(images / statistics.fmean(seconds), 2),
        "ratio": round(statistics.median(first / own for first, own in pairs), 3),
        "ratio_of_means": round(sum(first for first, _ in pairs) / sum(own for _, own in pairs), 3),
        "cpu_ratio": round(statistics.median(first / own for first, own in cpu_pairs), 3),
    }


def peak_mib(contestant: Contestant, device: torch.device) -> float:
    """Return the peak memory of one step, in MiB: weights, gradients, momentum, the batch and all that is computed.

    On a GPU it is what the allocator held at most (``max_memory_allocated``) less what other contestants keep; on the
    CPU the largest sum of the tensors that lived at the same time, counted after every operation (what an operation
    allocates for itself alone is not seen).
    """
    contestant.module.zero_grad(set_to_none=True)
    states = [] if contestant.optimizer is None else list(contestant.optimizer.state.values())
    kept = [*contestant.module.parameters(), *contestant.module.buffers(), *tree_leaves([states, contestant.batch])]
    own = sum(tensor.untyped_storage().nbytes() for tensor in kept if isinstance(tensor, Tensor))
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.step(contestant.heaviest, device)
        return (own + torch.cuda.max_memory_allocated() - before) / 2**20
    with LivingTensors() as living:
        contestant.step(contestant.heaviest, device)
    return (own + living.peak) / 2**20


def gigaflop(contestant: Contestant, device: torch.device, steps: int = 6) -> float:
    """Return the operations of a step's convolutions, forward and backward, in 10^9: the mean of the first steps."""
    with FlopCounterMode(display=False) as counter:
        for number in range(steps):
            contestant.step(number, device)
    return counter.get_total_flops() / steps / 1e9


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given | self.seen:
                self._watch(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _watch(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.now += size
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.now -= size


def synchronized(device: torch.device) -> float:
    """Return the time, once the device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: str) -> dict[str, Any]:
    """Describe the machine, so that figures can be compared."""
    gpu = torch.cuda.get_device_name() if device.startswith("cuda") else None
    return {
        "gpu": gpu,
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpu else None,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
    }

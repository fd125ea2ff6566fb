"""Times training steps in turns, in one process: what benchmarks/step.py and benchmarks/levers.py share."""

import argparse
import json
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

STEPS = 16  # that stand for all


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
        numbers: Numbers of the steps to time, whose draws stand for all draws, see `representative`.
    """

    name: str
    loss: Callable[[int], Tensor]
    module: nn.Module
    optimizer: torch.optim.Optimizer | None
    precision: str = "float32"
    heaviest: int = 0
    batch: Any = None
    numbers: Sequence[int] = range(1, STEPS + 1)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    def step(self, number: int, device: torch.device) -> None:
        """Run one whole step."""
        # Without cache, as Lightning trains.
        with torch.autocast(device.type, torch.bfloat16, self.precision == "bfloat16", cache_enabled=False):
            loss = self.loss(number)
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()


def shared_optimizer(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Return the method's SGD with the learning rate 0: all its work is done, but the weights stay."""
    return torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4, **options)


def representative(cost: Callable[[int], float], seed: int = 0) -> list[int]:
    """Return steps whose costs are spread as those of many: one of each sixteenth, from cheap to dear, shuffled.

    Which block is deactivated decides how much the perturbed pass shares, so a few steps at random say little.
    """
    ordered = sorted(range(64 * STEPS), key=cost)
    numbers = ordered[32::64]
    random.Random(seed).shuffle(numbers)
    return numbers


def alternate(contestants: Sequence[Contestant], device: torch.device, seconds: float) -> int:
    """Run one step of each in turns, in whole cycles over their numbers until the time is up; returns the rounds.

    Each round begins with another contestant. Without any time it is three rounds, to see that all run.
    """
    for contestant in contestants:
        contestant.step(0, device)  # a warm-up
    rounds, end = 0, time.monotonic() + seconds
    while rounds < 3 or (seconds and (time.monotonic() < end or rounds % STEPS)):
        shift = rounds % len(contestants)
        for contestant in [*contestants[shift:], *contestants[:shift]]:
            started, cpu_started = synchronized(device), time.process_time()
            contestant.step(contestant.numbers[rounds % STEPS], device)
            contestant.seconds.append(synchronized(device) - started)
            contestant.cpu_seconds.append(time.process_time() - cpu_started)
        rounds += 1
    return rounds


def row(contestant: Contestant, base: Contestant, images: int) -> dict[str, Any]:
    """Return the figures of a contestant; ``ratio`` is the base's time over its own, of all rounds together."""
    seconds, cpu_seconds = contestant.seconds, contestant.cpu_seconds
    return {
        "name": contestant.name,
        "precision": contestant.precision,
        "ms": round(1000 * statistics.fmean(seconds), 1),
        "ms_min": round(1000 * min(seconds), 1),
        "cpu_ms": round(1000 * statistics.fmean(cpu_seconds), 1),
        "images_per_second": round(images / statistics.fmean(seconds), 2),
        "ratio": round(sum(base.seconds) / sum(seconds), 3),
        "cpu_ratio": round(sum(base.cpu_seconds) / max(sum(cpu_seconds), 1e-9), 3),
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


def gigaflop(contestant: Contestant, device: torch.device) -> float:
    """Return the operations of a step's convolutions, forward and backward, in 10^9: the mean of the timed steps."""
    with FlopCounterMode(display=False) as counter:
        for number in contestant.numbers:
            contestant.step(number, device)
    return counter.get_total_flops() / len(contestant.numbers) / 1e9


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


def parser(description: str | None, seconds: int) -> argparse.ArgumentParser:
    """Return the arguments that both benchmarks take; ``seconds`` is the time of the rounds on a CPU."""
    arguments = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    arguments.add_argument("--device", default="cuda" if cuda else "cpu")
    arguments.add_argument("--backbone", default="resnet50s", help="a ResNet")
    arguments.add_argument("--crop", type=int, default=321 if cuda else 97)
    arguments.add_argument("--batch", type=int, default=8 if cuda else 2, help="labeled images, and as many unlabeled")
    arguments.add_argument("--classes", type=int, default=21)
    arguments.add_argument("--criterion", default="ce", choices=("ce", "ohem"), help="loss of labeled images")
    arguments.add_argument("--decoder-channels", type=int, default=256)
    arguments.add_argument("--seconds", type=float, default=60 if cuda else seconds, help="time for the rounds")
    arguments.add_argument("--threads", type=int, help="on the CPU; torch decides")
    arguments.add_argument("--out", type=Path, help="JSON file to write")
    return arguments


def start(arguments: argparse.Namespace) -> torch.device:
    """Set threads and cuDNN's choice of algorithms, which `trainer=gpu` and the authors' code both leave to cuDNN."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.benchmark = True
    return torch.device(arguments.device)


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write a result with the machine and the settings, if a file is named."""
    if arguments.out:
        keys = ("backbone", "crop", "batch", "classes", "criterion", "seconds")
        settings = {key: getattr(arguments, key) for key in keys}
        described = {"machine": machine(arguments.device), "settings": settings, **result}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


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

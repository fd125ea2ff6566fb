"""Alternating timing of training steps in one process, for benchmarks/step.py and benchmarks/levers.py."""

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

STEPS = 16  # steps with representative draws


@dataclass
class Contestant:
    """A step to time.

    Attributes:
        name: Its row in the table.
        loss: Computes the loss of a step, given its number.
        module: The network; contestants may share it, as a learning rate of 0 keeps its weights.
        optimizer: Steps after the backward pass; None for no step.
        precision: ``float32`` or ``bfloat16`` (autocast).
        heaviest: Number of the step whose draws take the most memory.
        batch: Tensors of the batch, on the device.
        numbers: The steps to time, see `representative`.
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
        """Run one step: forward, backward, optimizer."""
        # Without cache, as in Lightning.
        with torch.autocast(device.type, torch.bfloat16, self.precision == "bfloat16", cache_enabled=False):
            loss = self.loss(number)
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()


def shared_optimizer(module: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """Return the method's SGD with a learning rate of 0: it does all its work, but keeps the weights."""
    return torch.optim.SGD(module.parameters(), lr=0.0, momentum=0.9, weight_decay=1e-4, **options)


def representative(cost: Callable[[int], float], seed: int = 0) -> list[int]:
    """Return steps whose costs are distributed like those of many: one of each sixteenth by cost, shuffled.

    The deactivated block determines how much the perturbed pass shares, so a few random steps are not representative.
    """
    ordered = sorted(range(64 * STEPS), key=cost)
    numbers = ordered[32::64]
    random.Random(seed).shuffle(numbers)
    return numbers


def alternate(contestants: Sequence[Contestant], device: torch.device, seconds: float) -> int:
    """Alternate between contestants, in whole cycles over their steps, for some seconds; returns the number of rounds.

    Each round starts with another contestant. With ``seconds=0`` there are three rounds, to check that all run.
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
    """Return the figures of a contestant; ``ratio`` is the time of the base over its own, summed over all rounds."""
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
    """Return the peak memory of one step in MiB: weights, gradients, momentum, batch and intermediate results.

    On a GPU, it is ``max_memory_allocated`` without the memory of other contestants; on a CPU, the largest sum of all
    tensors that exist after an operation (without temporary buffers within operations).
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
    """Return the mean number of operations in the convolutions of a step, forward and backward, in 10^9."""
    with FlopCounterMode(display=False) as counter:
        for number in contestant.numbers:
            contestant.step(number, device)
    return counter.get_total_flops() / len(contestant.numbers) / 1e9


class LivingTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create, as long as they exist."""

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
    """Return the common arguments of both benchmarks; ``seconds`` is the default time of the rounds on a CPU."""
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
    arguments.add_argument("--threads", type=int, help="on the CPU (default: as torch decides)")
    arguments.add_argument("--out", type=Path, help="JSON file to write")
    return arguments


def start(arguments: argparse.Namespace) -> torch.device:
    """Set threads, and let cuDNN choose algorithms, as `trainer=gpu` and the authors' code do."""
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.benchmark = True
    return torch.device(arguments.device)


def write(arguments: argparse.Namespace, result: dict[str, Any]) -> None:
    """Write a result with machine and settings, if ``--out`` is given."""
    if arguments.out:
        keys = ("backbone", "crop", "batch", "classes", "criterion", "seconds")
        settings = {key: getattr(arguments, key) for key in keys}
        described = {"machine": machine(arguments.device), "settings": settings, **result}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")


def synchronized(device: torch.device) -> float:
    """Return the time after the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def machine(device: str) -> dict[str, Any]:
    """Describe the machine."""
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

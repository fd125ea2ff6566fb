"""A training step in a folder: what is needed to repeat it elsewhere, without the data.

``module.ckpt`` is a checkpoint of the weights before the step, ``batch.pt`` its batch and its numbers, ``report.json``
what people want to know. Both binary files hold tensors and plain data only.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning
import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
from torch import Tensor, nn

from mlpmatch_pl.methods.method import total_loss
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.predictor import restore
from mlpmatch_pl.utils.checkpoint import read_checkpoint, read_tensors, refuse_expanded, write_checkpoint
from mlpmatch_pl.utils.cpu import usable_cores
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import atomic_write
from mlpmatch_pl.utils.validation import fitted, mapping

_BATCH, _MODULE, _REPORT = "batch.pt", "module.ckpt", "report.json"
DOUBLE = "64-true"
Precision = Literal[
    "64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed", "transformer-engine",
    "transformer-engine-float16",
]  # fmt: skip
_STEP = {
    "batch": dict[str, dict[str, Any]], "terms": dict[str, Any], "draw_step": int, "lambda_np": float,
    "precision": Precision, "device": str, "threads": int,
}  # fmt: skip
_READ_OF_REPORT = {"step": int, "epoch": int, "weights_not_finite": list[str], "images": dict[str, list[str]]}


class Place(NamedTuple):
    """What a step is computed on, and how precisely.

    Attributes:
        device: Type of the device.
        precision: As in Lightning.
    """

    device: str
    precision: str

    def here(self) -> Place:
        """Return the same place if there is such a device here, else the CPU, in float32 or float64.

        Example:
            >>> Place("cpu", "bf16-mixed").here(), Place("xpu", "16-mixed").here()
            (Place(device='cpu', precision='bf16-mixed'), Place(device='cpu', precision='32-true'))
        """
        if self.device in ACCELERATOR_REGISTRY and ACCELERATOR_REGISTRY.get(self.device).is_available():
            return self
        return Place("cpu", DOUBLE if self.precision == DOUBLE else "32-true")

    def __str__(self) -> str:
        """Say it."""
        return f"on {self.device} in {self.precision}"


@dataclass(frozen=True)
class KeptStep:
    """A step with its results, as it was computed.

    Attributes:
        batch: The labeled and the unlabeled half, see `mlpmatch_pl.methods.step`.
        terms: Loss terms and ``loss`` by name.
        draw_step: Number that seeds the step's draws.
        lambda_np: Weight of the volatile term.
        precision: As in Lightning.
        device: Type of the device.
        threads: Threads of the processor, on which sums depend.
    """

    batch: dict[str, Any]
    terms: dict[str, float]
    draw_step: int
    lambda_np: float
    precision: str
    device: str
    threads: int

    def save(self, folder: Path, module: MLPMatch, report: Mapping[str, Any]) -> Path:
        """Write the whole folder, or nothing; where there is one of its name, beside it.

        Args:
            folder: What to call it.
            module: The module before the step.
            report: What is added to report.json.

        Returns:
            The folder that was written.

        Raises:
            UserError: If the disk is full.
            OSError: If it cannot be written.
        """
        checkpoint = {
            "pytorch-lightning_version": lightning.__version__,
            "global_step": self.draw_step,
            "hyper_parameters": dict(module.hparams),
            "state_dict": module.state_dict(),
        }
        details = {**report, "terms": {name: str(value) for name, value in self.terms.items()}}
        folder = _new_folder(folder)
        try:
            write_checkpoint(checkpoint, folder / _MODULE)
            write_checkpoint({**asdict(self), "batch": _on_cpu(self.batch)}, folder / _BATCH)
            atomic_write(folder / _REPORT, json.dumps(details, indent=2) + "\n")
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    @classmethod
    def load(cls, folder: Path) -> tuple[KeptStep, MLPMatch, dict[str, Any]]:
        """Read a folder, which may come from anybody: the step, the module before it, and report.json.

        Raises:
            UserError: If it holds no step.
        """
        try:
            step = cls(**_read_step(folder / _BATCH))
            module = restore(folder / _MODULE)
            if step.precision == DOUBLE:  # else float32 has lost nothing
                module.double().load_state_dict(read_checkpoint(folder / _MODULE)["state_dict"])
            report = mapping(_REPORT, json.loads((folder / _REPORT).read_text(encoding="utf-8")))
            report = fitted(_REPORT, report, _READ_OF_REPORT, _READ_OF_REPORT, is_open=True)
        except Exception as error:  # a broken file makes the readers raise nearly anything
            raise UserError(
                f"expected the folder of a step, as in runs/mine/nonfinite/step_13, but {folder} cannot be read as one "
                f"({_reason(error)})"
            ) from error
        return step, module, report

    @property
    def place(self) -> Place:
        """What it was computed on."""
        return Place(self.device, self.precision)

    @property
    def threads_here(self) -> int:
        """Threads to compute it with: as then, where there are so many cores."""
        return min(self.threads, usable_cores())

    def repeat(self, module: MLPMatch) -> tuple[dict[str, float], str | None]:
        """Compute the step again, where ``place.here()`` says.

        Returns:
            Its terms and its loss, and the first layer whose output is not finite, if there is one.

        Raises:
            UserError: If the batch, or the terms, are not those of the module's step.
        """
        try:
            repeated, layer = self._compute(module)
        except Exception as error:  # as there is no end of wrong batches
            raise UserError(
                f"expected a batch for the {module.method.name} step of the kept network, but it cannot be computed "
                f"({_reason(error)}); keep the files of a step together"
            ) from error
        if unknown := sorted(self.terms.keys() - repeated.keys()):
            raise UserError(f"expected recorded terms of {', '.join(repeated)}, but found {unknown[0]!r} in {_BATCH}")
        return repeated, layer

    def _compute(self, module: MLPMatch) -> tuple[dict[str, float], str | None]:
        torch.set_num_threads(self.threads_here)
        device, precision = self.place.here()
        fabric = Fabric(accelerator=device, devices=1, precision=precision)  # type: ignore[arg-type]
        fabric.setup_module(module.train())  # in place
        batch = fabric.to_device(self.batch)
        with fabric.autocast(), torch.no_grad(), _watched(module) as not_finite:
            result = module.step(batch["labeled"], batch.get("unlabeled", {}), self.draw_step)
            loss = total_loss(result.terms, module.method, self.lambda_np)
        return floats({**result.terms, "loss": loss}), next(iter(not_finite), None)


def floats(terms: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the values of scalars."""
    return {name: float(term) for name, term in terms.items()}


def same(one: float, other: float) -> bool:
    """Tell whether two results are the same, also if neither is a number.

    Example:
        >>> same(math.nan, math.nan), same(math.inf, -math.inf), same(0.5, 0.5)
        (True, False, True)
    """
    return one == other or (math.isnan(one) and math.isnan(other))


@contextmanager
def _watched(module: nn.Module) -> Iterator[list[str]]:
    """List the layers whose outputs are not finite, in the order of their calls."""
    found: list[str] = []

    def look(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and not output.isfinite().all():
            found.append(name)

    layers = [(name, layer) for name, layer in module.named_modules() if not list(layer.children())]
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: look(name, output))
        for name, layer in layers
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _on_cpu(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {key: _on_cpu(value) for key, value in part.items()}
    return part.cpu() if isinstance(part, Tensor) else part


def _new_folder(folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    free.mkdir(parents=True)
    return free


def _read_step(path: Path) -> dict[str, Any]:
    """Read the arguments of a step, none of which is believed."""
    content = mapping(_BATCH, read_tensors(path))
    refuse_expanded(_tensors(content.get("batch")), path)
    step = fitted(_BATCH, content, _STEP, _STEP)
    if step["threads"] < 1 or step["draw_step"] < 0:
        raise UserError(f"expected threads from 1 and draw_step from 0, but got {step['threads']}, {step['draw_step']}")
    if wrong := [name for name, value in step["terms"].items() if not isinstance(value, float)]:
        raise UserError(f"expected numbers as terms, but {wrong[0]!r} is none")
    return step


def _tensors(part: Any) -> Iterator[Tensor]:
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, Mapping | list | tuple):
        for inner in part.values() if isinstance(part, Mapping) else part:
            yield from _tensors(inner)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"

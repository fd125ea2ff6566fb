"""A training step in a folder: what is needed to repeat it elsewhere, without the data.

``module.ckpt`` is a checkpoint of the weights before the step, ``batch.pt`` its batch and its numbers, ``report.json``
what people want to know. Both binary files hold tensors and plain data only.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from lightning.fabric import Fabric
from lightning.fabric.accelerators import ACCELERATOR_REGISTRY
from torch import Tensor, nn

from mlpmatch_pl.errors import UserError
from mlpmatch_pl.module import MLPMatch, total_loss
from mlpmatch_pl.restoring import restore

_BATCH, _MODULE, _REPORT = "batch.pt", "module.ckpt", "report.json"


class Place(NamedTuple):
    """What a step is computed on, and how precisely.

    Attributes:
        device: Type of the device.
        precision: As in Lightning.
    """

    device: str
    precision: str

    def here(self) -> Place:
        """Return the same place if there is such a device here, else the CPU, in float32.

        Example:
            >>> Place("cpu", "bf16-mixed").here(), Place("xpu", "16-mixed").here()
            (Place(device='cpu', precision='bf16-mixed'), Place(device='cpu', precision='32-true'))
        """
        known = self.device in ACCELERATOR_REGISTRY
        return self if known and ACCELERATOR_REGISTRY.get(self.device).is_available() else Place("cpu", "32-true")

    def __str__(self) -> str:
        """Say it."""
        return f"on {self.device} in {self.precision}"


@dataclass(frozen=True)
class KeptStep:
    """A step with its results, as it was computed.

    Attributes:
        batch: The labeled and the unlabeled half, see `mlpmatch_pl.steps`.
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
        """Write the folder at once, or nothing; where there is one of its name, beside it.

        Args:
            folder: What to call it.
            module: The module before the step.
            report: What is added to report.json.

        Returns:
            The folder that was written.
        """
        partial = folder.with_name(f".{folder.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        checkpoint = {
            "pytorch-lightning_version": lightning.__version__,
            "global_step": self.draw_step,
            "hyper_parameters": dict(module.hparams),
            "state_dict": module.state_dict(),
        }
        torch.save(checkpoint, partial / _MODULE)
        torch.save({**asdict(self), "batch": _on_cpu(self.batch)}, partial / _BATCH)
        details = {**report, "terms": {name: str(value) for name, value in self.terms.items()}}
        (partial / _REPORT).write_text(json.dumps(details, indent=2) + "\n", encoding="utf-8")
        return _rename(partial, folder)

    @classmethod
    def load(cls, folder: Path) -> tuple[KeptStep, MLPMatch, dict[str, Any]]:
        """Read a folder: the step, the module before it, and report.json.

        Raises:
            UserError: If it holds no step.
        """
        try:
            step = cls(**torch.load(folder / _BATCH, map_location="cpu", weights_only=True))
            module = restore(folder / _MODULE)
            report = json.loads((folder / _REPORT).read_text(encoding="utf-8"))
        except Exception as error:  # a broken file makes the readers raise nearly anything
            raise UserError(
                f"expected the folder of a step, as in runs/mine/nonfinite/step_13, but {folder} cannot be read as one "
                f"({type(error).__name__}: {' '.join(str(error).split())})"
            ) from error
        return step, module, report

    @property
    def place(self) -> Place:
        """What it was computed on."""
        return Place(self.device, self.precision)

    def repeat(self, module: MLPMatch) -> tuple[dict[str, float], str | None]:
        """Compute the step again, where ``place.here()`` says.

        Returns:
            Its terms and its loss, and the first layer whose output is not finite, if there is one.
        """
        torch.set_num_threads(self.threads)
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


def _rename(partial: Path, folder: Path) -> Path:
    number, free = 1, folder
    while free.exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return partial.rename(free)

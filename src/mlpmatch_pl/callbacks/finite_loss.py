"""A loss that is not finite ends the training, before it reaches the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from mlpmatch_pl.callbacks.async_flag import AsyncFlag
from mlpmatch_pl.callbacks.kept_step import KeptStep, floats
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.errors import UserError

MOST_NAMES = 8  # of each half in the sentence; report.json has all


class FiniteLoss(Callback):
    """Ends the training at the first step whose loss is NaN or infinite, and keeps that step for a replay.

    The loss is looked at between the backward pass and the optimizer step. A GPU is not made to wait for it: the flag
    was copied behind the forward pass, and the host reads it while the GPU still has the backward pass to do.

    Gradients are not looked at: with ``precision=16-mixed`` they overflow now and then, and the scaler leaves them out.

    Args:
        dirpath: Folder for the steps that are kept, ``step_<number>`` each; see `mlpmatch_pl.callbacks.kept_step`.

    Raises:
        UserError: With the step, its terms and the images of its batch.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Make room for BatchNorm's statistics, which a forward pass changes."""
        self._buffers = [buffer for buffer in pl_module.buffers() if buffer.is_floating_point()]
        self._before = [buffer.clone() for buffer in self._buffers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Remember what the step starts from."""
        self._batch, self._batch_idx = batch, batch_idx
        if self._before:
            torch._foreach_copy_(self._before, self._buffers)

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Let the device look at the terms."""
        terms = torch.stack([term.float() for term in pl_module.last_terms.values()])
        bad = (~terms.isfinite()).any().int()
        if trainer.world_size > 1:  # all processes end at the same step; none waits for another for ever
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        self._is_bad = AsyncFlag(bad)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        """End the training if a term is not finite."""
        if self._is_bad.read():
            torch._foreach_copy_(self._buffers, self._before)
            self._end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let go of the batch."""
        self._batch = None

    def _end(self, trainer: Trainer, module: MLPMatch) -> None:
        terms = floats(module.last_terms)
        bad = {name: value for name, value in terms.items() if not math.isfinite(value)}
        weights = [name for name, value in module.state_dict().items() if not value.isfinite().all()]
        names = _names(trainer, self._batch)
        report = {
            "step": trainer.global_step + 1,
            "epoch": trainer.current_epoch + 1,
            "not_finite": sorted(bad),
            "weights_not_finite": weights,
            "images": names,
        }
        where = f"step {report['step']} of epoch {report['epoch']}"
        if not bad:
            raise UserError(f"expected a finite loss, but in {where} that of another process is not; see its message")
        kept = self._keep(trainer, module, terms, report)
        values = ", ".join(f"{name} {value}" for name, value in bad.items())
        raise UserError(
            f"expected a finite loss, but in {where} it is not ({values}); {_advice(weights)}; images of the batch: "
            f"{_listed(names)}; {kept}"
        )

    def _keep(self, trainer: Trainer, module: MLPMatch, terms: dict[str, float], report: Mapping[str, Any]) -> str:
        """Write the folder, and say where."""
        step = KeptStep(
            self._batch, terms, module.draw_step(self._batch_idx), module.volatile_weight(), str(trainer.precision),
            module.device.type, torch.get_num_threads(),
        )  # fmt: skip
        rank = f"_process{trainer.global_rank}" if trainer.world_size > 1 else ""
        try:
            folder = step.save(self.dirpath / f"step_{report['step']}{rank}", module, report)
        except (OSError, UserError) as error:  # the latter where the disk is full
            return f"the step could not be kept for a replay ({error})"
        return f"python -m mlpmatch_pl.replay {folder} repeats the step"


def _names(trainer: Trainer, batch: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the names of the images of each half, where the data module knows them."""
    data = getattr(getattr(trainer, "datamodule", None), "data", None)
    halves = {half: part["index"].tolist() for half, part in batch.items() if "index" in part}
    return {half: [str(i) if data is None else data.train.name(i) for i in indices] for half, indices in halves.items()}


def _listed(names: Mapping[str, Sequence[str]]) -> str:
    texts = []
    for half, images in names.items():
        more = f" and {len(images) - MOST_NAMES} more" if len(images) > MOST_NAMES else ""
        texts.append(f"{half} {', '.join(images[:MOST_NAMES])}{more}")
    return "; ".join(texts) or "unknown"


def _advice(weights: Sequence[str]) -> str:
    if weights:
        return (
            f"{len(weights)} tensors of the network, first {weights[0]}, were not finite before it: lower schedule.lr, "
            "or set trainer.gradient_clip_val"
        )
    return "lower schedule.lr, set trainer.gradient_clip_val or trainer.precision=32-true, or look at the images"

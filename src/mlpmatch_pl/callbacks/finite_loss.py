"""Stop the training at a loss that is NaN or infinite, before it reaches the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from mlpmatch_pl.callbacks.async_flag import AsyncFlag
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.checkpoint import write_checkpoint
from mlpmatch_pl.utils.errors import UserError

MAX_NAMES = 8  # per half of the batch, in the message


class FiniteLoss(Callback):
    """Ends the training at the first step whose loss is NaN or infinite, and saves that step.

    The loss is checked between the backward pass and the optimizer step. A GPU does not wait for the check: the flag is
    copied after the forward pass, and the host reads it while the GPU computes the backward pass. Gradients are not
    checked: with ``precision=16-mixed`` they overflow now and then, and the scaler skips those steps.

    ``step_<number>.pt`` holds tensors and plain data only, so that the step can be repeated without the dataset:

        step = torch.load("step_13.pt", weights_only=True)
        module = MLPMatch(**step["hyper_parameters"])
        module.load_state_dict(step["state_dict"])  # the weights before the step
        module.step(step["batch"]["labeled"], step["batch"].get("unlabeled", {}), step["draw_step"])

    Args:
        dirpath: Folder for the saved step.

    Raises:
        UserError: With the step, its loss terms and the images of its batch.
    """

    def __init__(self, dirpath: str) -> None:
        self.dirpath = Path(dirpath)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Allocate a copy of BatchNorm's statistics, which the forward pass changes."""
        self._buffers = [buffer for buffer in pl_module.buffers() if buffer.is_floating_point()]
        self._before = [buffer.clone() for buffer in self._buffers]

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Keep the batch and BatchNorm's statistics."""
        self._batch, self._batch_idx = batch, batch_idx
        if self._before:
            torch._foreach_copy_(self._before, self._buffers)

    def on_before_backward(self, trainer: Trainer, pl_module: Any, loss: Tensor) -> None:
        """Start the check on the device."""
        terms = torch.stack([term.float() for term in pl_module.last_terms.values()])
        bad = (~terms.isfinite()).any().int()
        if trainer.world_size > 1:  # all processes stop at the same step, or the others would wait forever
            torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX)
        self._is_bad = AsyncFlag(bad)

    def on_after_backward(self, trainer: Trainer, pl_module: Any) -> None:
        """End the training if a term is not finite."""
        if self._is_bad.read():
            torch._foreach_copy_(self._buffers, self._before)
            raise UserError(self._message(trainer, pl_module))

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Release the batch."""
        self._batch = None

    def _message(self, trainer: Trainer, module: MLPMatch) -> str:
        number = trainer.global_step + 1
        where = f"step {number} of epoch {trainer.current_epoch + 1}"
        bad = [f"{name} {float(term)}" for name, term in module.last_terms.items() if not term.isfinite()]
        if not bad:
            return f"expected a finite loss, but that of another process is not finite in {where}; see its message"
        rank = f"_rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        saved = self._save(module, self.dirpath / f"step_{number}{rank}.pt")
        return (
            f"expected a finite loss, but {where} gives {', '.join(bad)}; lower schedule.lr, set "
            "trainer.gradient_clip_val=1 or trainer.precision=32-true, or check the images: "
            f"{self._images(trainer)}; {saved}"
        )

    def _save(self, module: MLPMatch, path: Path) -> str:
        content = {
            "batch": _to_cpu(self._batch),
            "state_dict": module.state_dict(),
            "hyper_parameters": dict(module.hparams),
            "terms": {name: float(term) for name, term in module.last_terms.items()},
            "draw_step": module.draw_step(self._batch_idx),
            "lambda_np": module.volatile_weight(),
        }
        try:
            write_checkpoint(content, path)
        except (OSError, UserError) as error:
            return f"the step could not be saved ({error})"
        return f"the step is saved in {path}"

    def _images(self, trainer: Trainer) -> str:
        """List the images of the batch by name, or by index where the data module knows no names."""
        data = getattr(getattr(trainer, "datamodule", None), "data", None)
        halves = []
        for half, part in self._batch.items():
            indices = part["index"].tolist() if "index" in part else []
            names = [str(index) if data is None else data.train.name(index) for index in indices[:MAX_NAMES]]
            more = f" and {len(indices) - MAX_NAMES} more" if len(indices) > MAX_NAMES else ""
            halves.append(f"{half} {', '.join(names)}{more}")
        return "; ".join(halves)


def _to_cpu(part: Any) -> Any:
    if isinstance(part, Mapping):
        return {key: _to_cpu(value) for key, value in part.items()}
    return part.cpu() if isinstance(part, Tensor) else part

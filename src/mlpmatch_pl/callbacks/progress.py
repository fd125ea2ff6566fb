"""Progress with throughput and the time left for the whole training."""

import logging
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

log = logging.getLogger(__name__)


class Throughput:
    """Measures images a second and the time left, from the first finished step on."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._since: tuple[float, int] | None = None

    def describe(self, step: int, steps: int) -> dict[str, str]:
        """Return what to show after ``step`` of ``steps`` optimizer steps; empty before two steps are known."""
        now = time.monotonic()
        if self._since is None:
            self._since = now, step
        started, first = self._since
        if step <= first or now <= started:
            return {}
        pace = (now - started) / (step - first)  # validation included: it belongs to the time left
        return {"img/s": f"{self.images_per_step / pace:.1f}", "left": duration((steps - step) * pace)}


class ProgressBar(RichProgressBar):
    """A bar for a terminal.

    Args:
        images_per_step: Images in an optimizer step, over all devices.
    """

    def __init__(self, images_per_step: int) -> None:
        super().__init__(refresh_rate=10, leave=False)
        self.throughput = Throughput(images_per_step)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics to show: no version number, but throughput and time left."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training:
            metrics |= self.throughput.describe(trainer.global_step, int(trainer.estimated_stepping_batches))
        return metrics


class ProgressLines(Callback):
    """A line after every validation, in the log and in the terminal.

    Args:
        images_per_step: Images in an optimizer step, over all devices.
    """

    def __init__(self, images_per_step: int) -> None:
        self.throughput = Throughput(images_per_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        if batch_idx == 0:
            self.throughput.describe(trainer.global_step, 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        steps = int(trainer.estimated_stepping_batches)
        metrics = trainer.callback_metrics
        parts = [f"epoch {trainer.current_epoch + 1}", f"step {trainer.global_step}/{steps}"]
        parts += [f"{key} {float(metrics[key]):.4f}" for key in ("train/loss", "val/miou") if key in metrics]
        parts += [f"{key} {value}" for key, value in self.throughput.describe(trainer.global_step, steps).items()]
        log.info("%s", "  ".join(parts))


def duration(seconds: float) -> str:
    """Write a time span.

    Example:
        >>> duration(59), duration(3661)
        ('0:59', '1:01:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

"""Progress with throughput, the share of waiting for data, and the time left for the whole training."""

import logging
import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from mlpmatch_pl.utils.timing import Moment, has_passed, now, seconds_between

log = logging.getLogger(__name__)
MOST_WAIT = 0.05  # share of the time that waiting for data may take
SECONDS_THAT_MATTER = 10.0


class DataWait(Callback):
    """Measures which share of the training time the device waits for the next batch, its transfer included.

    More than some percent says that loading is too slow for the device: add workers, or a cache.

    Attributes:
        share: Waiting time by training time since the start, validation left out, 0..1.
    """

    def __init__(self) -> None:
        self._seconds = {"wait": 0.0, "work": 0.0}
        self._spans: deque[tuple[str, Moment, Moment]] = deque()  # that a GPU may not be through with
        self._mark: Moment = 0.0

    @property
    def share(self) -> float:
        """Return the share so far."""
        self._collect()
        return self._seconds["wait"] / max(sum(self._seconds.values()), 1e-9)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to wait; a training that goes on within an epoch has no start of one."""
        self._mark = now(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to wait for the first batch."""
        self._mark = now(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch has come."""
        self._span("wait", pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Start to wait for the next batch."""
        self._span("work", pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the time of a validation between two batches."""
        self._mark = now(pl_module.device)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once that loading was too slow; in a short training, starting the workers weighs too much to tell."""
        if trainer.is_global_zero and self.share > MOST_WAIT and self._seconds["wait"] > SECONDS_THAT_MATTER:
            log.warning(
                "%.0f %% of the training time was waiting for data: python -m mlpmatch_pl.benchmark with the same "
                "overrides says how many workers it would take",
                100 * self.share,
            )

    def _span(self, kind: str, module: LightningModule) -> None:
        start, self._mark = self._mark, now(module.device)
        self._spans.append((kind, start, self._mark))
        self._collect()

    def _collect(self) -> None:
        while self._spans and has_passed(self._spans[0][2]):
            kind, start, end = self._spans.popleft()
            self._seconds[kind] += seconds_between(start, end)


class Throughput:
    """Measures images a second and the time left, from the first finished step on.

    Args:
        images_per_step: Images in an optimizer step, over all devices.
        data_wait: Measures the time that batches are waited for.
    """

    def __init__(self, images_per_step: int, data_wait: DataWait) -> None:
        self.images_per_step, self.data_wait = images_per_step, data_wait
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
        return {
            "img/s": f"{self.images_per_step / pace:.1f}",
            "data": f"{100 * self.data_wait.share:.0f}%",
            "left": duration((steps - step) * pace),
        }


class ProgressBar(RichProgressBar):
    """A bar for a terminal.

    Args:
        images_per_step: Images in an optimizer step, over all devices.
        data_wait: Measures the time that batches are waited for.
    """

    def __init__(self, images_per_step: int, data_wait: DataWait) -> None:
        super().__init__(refresh_rate=10, leave=False)
        self.throughput = Throughput(images_per_step, data_wait)

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
        data_wait: Measures the time that batches are waited for.
    """

    def __init__(self, images_per_step: int, data_wait: DataWait) -> None:
        self.throughput = Throughput(images_per_step, data_wait)

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

"""Progress of a training: throughput, share of the time spent waiting for data, and time left."""

import logging
import time
from collections import deque
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from mlpmatch_pl.utils.timing import Moment, has_passed, now, seconds_between

log = logging.getLogger(__name__)
MAX_DATA_WAIT = 0.05  # share of the time spent waiting for data, above which a warning is logged
MIN_WAIT_SECONDS = 10.0  # of waiting, below which starting the workers dominates


class DataWait(Callback):
    """Measures the share of the training time that the device waits for the next batch, including its transfer.

    More than a few percent means that loading is too slow for the device: add workers, or a cache.
    """

    def __init__(self) -> None:
        self._seconds = {"wait": 0.0, "work": 0.0}
        self._spans: deque[tuple[str, Moment, Moment]] = deque()  # that a GPU may not have finished
        self._mark: Moment = 0.0

    @property
    def share(self) -> float:
        """The share so far, 0..1, without validation."""
        self._collect()
        return self._seconds["wait"] / max(sum(self._seconds.values()), 1e-9)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to wait; on_train_epoch_start is not called when a run resumes within an epoch."""
        self._mark = now(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to wait for the first batch."""
        self._mark = now(pl_module.device)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop to wait."""
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
        """Warn once if loading was too slow."""
        if trainer.is_global_zero and self.share > MAX_DATA_WAIT and self._seconds["wait"] > MIN_WAIT_SECONDS:
            log.warning(
                "%.0f%% of the training time was spent waiting for data: python -m mlpmatch_pl.benchmark with the same "
                "overrides suggests a number of workers",
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


class ProcessorTime(Callback):
    """Counts the processor seconds of a training over all its starts, without validation and loading workers.

    On one thread they hardly depend on what else the machine computes, so trainings can be compared at equal cost.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._mark = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start to count."""
        self._mark = time.process_time()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add a step, and the loading of its batch."""
        now = time.process_time()
        self.seconds, self._mark = self.seconds + now - self._mark, now

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave out the validation."""
        self._mark = time.process_time()

    def state_dict(self) -> dict[str, float]:
        """Return the seconds so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Continue counting."""
        self.seconds = state_dict["seconds"]


class Throughput:
    """Measures images per second and the time left, from the first finished step on.

    Args:
        images_per_step: Images in an optimizer step, over all devices.
        data_wait: Measures the time spent waiting for data.
    """

    def __init__(self, images_per_step: int, data_wait: DataWait) -> None:
        self.images_per_step, self.data_wait = images_per_step, data_wait
        self._since: tuple[float, int] | None = None

    def describe(self, step: int, steps: int) -> dict[str, str]:
        """Return what to show after ``step`` of ``steps`` optimizer steps; empty at the first call."""
        now = time.monotonic()
        if self._since is None:
            self._since = now, step
        started, first = self._since
        if step <= first or now <= started:
            return {}
        seconds = (now - started) / (step - first)  # including validation, as the time left does
        return {
            "img/s": f"{self.images_per_step / seconds:.1f}",
            "data": f"{100 * self.data_wait.share:.0f}%",
            "left": duration((steps - step) * seconds),
        }


class ProgressBar(RichProgressBar):
    """Lightning's bar for a terminal, with the throughput.

    Args:
        throughput: What to show beside the metrics.
    """

    def __init__(self, throughput: Throughput) -> None:
        super().__init__(refresh_rate=10, leave=False)
        self.throughput = throughput

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Return the metrics to show, without Lightning's version number."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        if trainer.training:
            metrics |= self.throughput.describe(trainer.global_step, int(trainer.estimated_stepping_batches))
        return metrics


class ProgressLines(Callback):
    """Logs a line after every validation, for output that is not a terminal.

    Args:
        throughput: What to show beside the metrics.
    """

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock."""
        if batch_idx == 0:
            self.throughput.describe(trainer.global_step, 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the line."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        steps, metrics = int(trainer.estimated_stepping_batches), trainer.callback_metrics
        parts = [f"epoch {trainer.current_epoch + 1}", f"step {trainer.global_step}/{steps}"]
        parts += [f"{key} {float(metrics[key]):.4f}" for key in ("train/loss", "val/miou") if key in metrics]
        parts += [f"{key} {value}" for key, value in self.throughput.describe(trainer.global_step, steps).items()]
        log.info("%s", "  ".join(parts))


def duration(seconds: float) -> str:
    """Format a time span.

    Example:
        >>> duration(59), duration(3661)
        ('0:59', '1:01:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"

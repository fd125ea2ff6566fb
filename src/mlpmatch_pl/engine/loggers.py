"""Loggers: metrics.csv always, Weights & Biases and TensorBoard when asked for."""

import csv
import io
import logging
import netrc
import os
import secrets
import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import atomic_write

log = logging.getLogger(__name__)
WANDB_MODES = ("online", "offline", "disabled")
ROWS = "metrics_csv_rows"
"""The checkpoint's key for the number of rows in metrics.csv when it was written."""


class _AppendingWriter(ExperimentWriter):
    """Adds to an existing metrics.csv. Lightning's own writer deletes it, and a resumed run would lose its past."""

    def rewind(self, step: int, count: int | None) -> list[dict[str, str]]:
        """Leave out the rows of what will be done again, and return those that stay.

        Not those from a step on: where epochs have had another number of steps, earlier rows have higher numbers.
        """
        path = Path(self.metrics_file_path)
        rows = _rows_before(_whole_rows(path), step, count)
        if rows:
            self._rewrite_with_new_header(list(rows[0]), rows)
            self.metrics_keys = list(rows[0])
        else:
            path.unlink(missing_ok=True)
        return rows

    def _check_log_dir_exists(self) -> None:
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])

    def _rewrite_with_new_header(self, fieldnames: list[str], rows: list[dict[str, str]] | None = None) -> None:
        path = Path(self.metrics_file_path)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        writer.writerows(_whole_rows(path) if rows is None else rows)
        atomic_write(path, text.getvalue())  # Lightning's own way would leave half of it when it is killed


def _rows_before(rows: list[dict[str, str]], step: int, count: int | None) -> list[dict[str, str]]:
    if count is None:  # a checkpoint without it: steps have had one numbering, or nothing better is known
        return [row for row in rows if int(row["step"]) < step]
    last = takewhile(lambda row: int(row["step"]) == step - 1, rows[count:])  # a checkpoint comes before its step's row
    return rows[:count] + list(last)


def _whole_rows(path: Path) -> list[dict[str, str]]:
    """Read the rows of metrics.csv but for a last one that a kill cut off."""
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        text = file.read()
    whole = text[: text.rfind("\n") + 1]
    return list(csv.DictReader(io.StringIO(whole, newline="")))


class MetricsCSV(CSVLogger):
    """Writes metrics.csv into the run folder, and goes on with it when a run is resumed.

    Every step stands in it once: rows after the checkpoint are left out, and written again as their steps are done
    again.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=20)

    @property
    def log_dir(self) -> str:
        """The run folder itself."""
        return str(self._root_dir)

    @property
    def experiment(self) -> Any:
        """The writer, on the first process alone (Lightning guards the calls)."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment

    @rank_zero_only
    def go_on(self, step: int, metrics: Mapping[str, float], log_every_n_steps: int, count: int | None = None) -> None:
        """Go on at an optimizer step.

        Args:
            step: Optimizer steps done.
            metrics: The metrics that the checkpoint holds. It is written before the row of its step: should the process
                have been killed in between, the row is written now.
            log_every_n_steps: Whether that step is logged.
            count: Rows that there were when the checkpoint was written; None where it does not say, as that of a
                training without `CountedRows`.
        """
        rows = self.experiment.rewind(step, count)
        last = next((row for row in reversed(rows) if row.get("train/loss")), None)
        logged = last is not None and int(last["step"]) == step - 1
        trained: dict[str, Any] = {
            key: value for key, value in metrics.items() if key.startswith("train/") or key == "epoch"
        }
        if step and step % log_every_n_steps == 0 and not logged and "train/loss" in trained:
            self.log_metrics(trained, step - 1)
            self.save()

    def count_rows(self) -> int:
        """Return the number of rows that have been logged to the file, in this training and before."""
        return len(_whole_rows(Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE))

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: config.yaml has them."""


class CountedRows(Callback):
    """Says in every checkpoint how many rows metrics.csv has, so that a resume knows which of them come after it."""

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the number."""
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                checkpoint[ROWS] = logger.count_rows()


def build_loggers(config: Mapping[str, Any], output_dir: Path, labeled: Split, step: int = 0) -> list[Logger]:
    """Build the loggers of a run.

    A run that is resumed in its folder goes on with its id in W&B, and hides the steps that are done again in
    TensorBoard.

    Args:
        config: The whole configuration; its node ``logger`` has options for ``wandb`` (None for off) and whether
            ``tensorboard`` is on.
        output_dir: The run folder.
        labeled: The labeled images; W&B's run configuration names their list.
        step: Optimizer steps done before.

    Raises:
        UserError: If a logger's package is not installed, or the W&B mode is unknown.
    """
    options = config["logger"]
    loggers: list[Logger] = [MetricsCSV(str(output_dir))]
    if options["wandb"] is not None:
        logger = _wandb(dict(options["wandb"]), output_dir, f"{config['method']['name']}_{output_dir.name}")
        chosen = {"split": labeled.label, "count": len(labeled.names), "sha256": labeled.sha256}
        logger.log_hyperparams({**{key: config[key] for key in ("dataset", "loader", "schedule")}, "labeled": chosen})
        loggers.append(logger)
    if options["tensorboard"]:
        try:
            loggers.append(TensorBoardLogger(str(output_dir), name="tensorboard", version="", purge_step=step or None))
        except ModuleNotFoundError as error:
            raise UserError(
                "expected TensorBoard to be installed for logger=tensorboard; pip install 'mlpmatch_pl[tensorboard]'"
            ) from error
    return loggers


def finish_wandb(exit_code: int) -> None:
    """End the W&B run, if there is one: else the next job of a sweep would log into it.

    Args:
        exit_code: 0 for a finished run, another for a failed one.
    """
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=exit_code)


def wandb_mode(configured: str | None) -> str:
    """Choose the mode: as configured, else as WANDB_MODE says, else online only where credentials exist.

    Raises:
        UserError: If the configured mode is unknown.
    """
    mode = configured or os.environ.get("WANDB_MODE")
    if mode and mode not in WANDB_MODES:
        where = "logger.wandb.mode" if configured else "the environment variable WANDB_MODE"
        raise UserError(f"expected {where} of {', '.join(WANDB_MODES)}, but got {mode!r}")
    return mode or ("online" if _has_wandb_credentials() else "offline")


def _has_wandb_credentials() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        return False
    address = os.environ.get("WANDB_BASE_URL", "api.wandb.ai")
    return any(host in address for host in hosts)


@rank_zero_only
def _wandb_id(output_dir: Path, anew: bool = False) -> str:
    """Return the run's id in W&B, which is kept in the run folder."""
    path = output_dir / "wandb_id.txt"
    if anew or not path.exists():
        atomic_write(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _wandb(options: dict[str, Any], output_dir: Path, run_name: str) -> Logger:
    mode = wandb_mode(options.pop("mode"))
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise UserError(
            "expected wandb to be installed for logger=wandb; pip install wandb, or use logger=csv"
        ) from error
    if mode == "offline":
        log.info("W&B: offline, no credentials used; upload later with: wandb sync %s/wandb/offline-run-*", output_dir)
    options["name"] = options["name"] or run_name
    options["id"] = _wandb_id(output_dir)

    def build(mode: str) -> WandbLogger:
        # Not WandbLogger(offline=True): it changes WANDB_MODE for the whole process, and so for the next job.
        settings = wandb.Settings(init_timeout=30)
        return WandbLogger(save_dir=str(output_dir), mode=mode, settings=settings, log_model=False, **options)

    logger = build(mode)
    if mode != "online":
        return logger
    try:
        logger.experiment  # noqa: B018  # connects now rather than in the first step
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        log.warning("W&B: cannot connect (%s); logging offline instead", type(error).__name__)
        options["id"] = _wandb_id(output_dir, anew=True)  # W&B holds on to the other one until this process ends
        logger = build("offline")
    return logger

"""Loggers: metrics.csv always, Weights & Biases and TensorBoard when asked for."""

import csv
import logging
import netrc
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.errors import UserError

log = logging.getLogger(__name__)
WANDB_MODES = ("online", "offline", "disabled")


class _AppendingWriter(ExperimentWriter):
    """Adds to an existing metrics.csv. Lightning's own writer deletes it, and a resumed run would lose its past."""

    def _check_log_dir_exists(self) -> None:
        if self._fs.isfile(self.metrics_file_path):
            with self._fs.open(self.metrics_file_path, "r", newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])


class MetricsCSV(CSVLogger):
    """Writes metrics.csv into the run folder, and goes on with it when a run is resumed."""

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

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: config.yaml has them."""


def build_loggers(config: Mapping[str, Any], output_dir: Path, labeled: Split) -> list[Logger]:
    """Build the loggers of a run.

    Args:
        config: The whole configuration; its node ``logger`` has options for ``wandb`` (None for off) and whether
            ``tensorboard`` is on.
        output_dir: The run folder.
        labeled: The labeled images; W&B's run configuration names their list.

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
            loggers.append(TensorBoardLogger(str(output_dir), name="tensorboard", version=""))
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
        logger = build("offline")
    return logger

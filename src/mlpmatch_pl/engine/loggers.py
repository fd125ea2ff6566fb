"""Loggers: metrics.csv always, Weights & Biases, TensorBoard and MLflow on request."""

import csv
import inspect
import io
import logging
import netrc
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only

from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.utils.distributed import is_first_process
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.files import atomic_write

log = logging.getLogger(__name__)
WANDB_MODES = ("online", "offline", "disabled")


class _AppendingWriter(ExperimentWriter):
    """Appends to an existing metrics.csv; Lightning's writer deletes it, and a resumed run would lose its past."""

    def _check_log_dir_exists(self) -> None:
        path = Path(self.metrics_file_path)
        if path.exists():
            content = path.read_bytes()
            if not content.endswith(b"\n"):  # a kill cut the last line off
                atomic_write(path, content[: content.rfind(b"\n") + 1])
            with path.open(encoding="utf-8", newline="") as file:
                self.metrics_keys = next(csv.reader(file), [])
            if not self.metrics_keys:
                path.unlink()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path, text = Path(self.metrics_file_path), io.StringIO(newline="")
        writer = csv.DictWriter(text, fieldnames=fieldnames)
        writer.writeheader()
        with path.open(encoding="utf-8", newline="") as file:
            writer.writerows(csv.DictReader(file))
        atomic_write(path, text.getvalue())  # Lightning's own would leave half of the file when killed


class MetricsCSV(CSVLogger):
    """Writes metrics.csv into the run folder and appends to it when the run is resumed.

    Steps repeated after a resume appear again; readers use the last occurrence.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(folder, name="", version="", flush_logs_every_n_steps=1)

    @property
    def experiment(self) -> Any:
        """The writer, on the first process only (Lightning guards the calls)."""
        if self._experiment is None:
            os.makedirs(self.log_dir, exist_ok=True)
            self._experiment = _AppendingWriter(log_dir=self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Write nothing: config.yaml has them."""


def build_loggers(config: Mapping[str, Any], output_dir: Path, labeled: Split, step: int = 0) -> list[Logger]:
    """Build the loggers of a run.

    A resumed run keeps its id in W&B and MLflow, and TensorBoard hides the steps that are repeated.

    Args:
        config: The whole configuration. ``logger.wandb`` holds the options for W&B (None: off), ``logger.tensorboard``
            switches TensorBoard on, ``logger.mlflow`` holds the options for MLflow.
        output_dir: The run folder.
        labeled: The labeled images; W&B's run configuration names their list.
        step: Optimizer steps done before.

    Raises:
        UserError: If a logger's package is not installed, or the W&B mode is unknown.
    """
    options = config["logger"]
    loggers: list[Logger] = [MetricsCSV(str(output_dir))]
    if options["wandb"] is not None:
        logger = _build_wandb(dict(options["wandb"]), output_dir, f"{config['method']['name']}_{output_dir.name}")
        chosen = {"split": labeled.label, "count": len(labeled.names), "sha256": labeled.sha256}
        logger.log_hyperparams({**_beside_module(config), "labeled": chosen})
        loggers.append(logger)
    if options["tensorboard"]:
        try:
            loggers.append(TensorBoardLogger(str(output_dir), name="tensorboard", version="", purge_step=step or None))
        except ModuleNotFoundError as error:
            raise UserError(
                "expected TensorBoard to be installed for logger=tensorboard; pip install 'mlpmatch_pl[tensorboard]'"
            ) from error
    if options["mlflow"] is not None:
        loggers.append(_build_mlflow(options["mlflow"], output_dir))
    return loggers


def _build_mlflow(options: Mapping[str, Any], output_dir: Path) -> Logger:
    kept = output_dir / "mlflow_id.txt"
    run_id = kept.read_text(encoding="utf-8").strip() if kept.exists() else None
    try:
        logger = MLFlowLogger(options["experiment"], output_dir.name, options["tracking_uri"], run_id=run_id)
    except ModuleNotFoundError as error:
        raise UserError(
            "expected MLflow to be installed for logger=mlflow; pip install 'mlpmatch_pl[mlflow]'"
        ) from error
    if is_first_process():
        try:
            atomic_write(kept, str(logger.run_id))  # connects
        except Exception as error:  # of MLflow, of its database or of its server
            raise UserError(
                f"expected MLflow at {options['tracking_uri']}, but it cannot be used "
                f"({' '.join(str(error).split())[:200]}); set logger.mlflow.tracking_uri"
            ) from error
    return logger


def _beside_module(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the module does not log as its own hyperparameters."""
    logged = {*inspect.signature(MLPMatch.__init__).parameters, "output_dir", "logger"}
    others = {key: value for key, value in config.items() if key not in logged}
    return others | {"pretrained": config["backbone"]["pretrained"]}


def log_results(trainer: Trainer, results: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Log the best score and its step as the summary of a run, and the best checkpoint as an artifact on request.

    Args:
        trainer: Its loggers are W&B, whose summary gets ``best/miou`` and ``best/step``, and TensorBoard, whose
            ``hp_metric`` becomes the score.
        results: The content of metrics.json.
        config: The whole configuration, with ``logger.wandb.artifact``.
    """
    best = results["best"]
    if best["checkpoint"] is None:
        return
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_metrics({"hp_metric": best["val/miou"]}, results["steps"])
        elif isinstance(logger, MLFlowLogger):
            logger.log_metrics({"best/miou": best["val/miou"]}, best["step"])
        elif isinstance(logger, WandbLogger):
            run = logger.experiment
            run.summary.update({"best/miou": best["val/miou"], "best/step": best["step"]})
            if config["logger"]["wandb"]["artifact"]:
                run.log_artifact(best["checkpoint"], name=f"model-{run.id}", type="model", aliases=["best"])


def finish_wandb(exit_code: int) -> None:
    """End the W&B run, if there is one; otherwise the next job of a sweep would log into it.

    Args:
        exit_code: 0 for a finished run, another number for a failed one.
    """
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=exit_code)


def wandb_mode(configured: str | None) -> str:
    """Return the mode: as configured, else that of WANDB_MODE, else online if there are credentials.

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
def _wandb_id(output_dir: Path, new: bool = False) -> str:
    """Return the run's id in W&B, which is stored in the run folder."""
    path = output_dir / "wandb_id.txt"
    if new or not path.exists():
        atomic_write(path, secrets.token_hex(4) + "\n")
    return path.read_text(encoding="utf-8").strip()


def _build_wandb(options: dict[str, Any], output_dir: Path, run_name: str) -> Logger:
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
    options.pop("artifact")
    options["id"] = _wandb_id(output_dir)

    def build(mode: str) -> WandbLogger:
        # WandbLogger(offline=True) would change WANDB_MODE for the whole process, and so for the next job of a sweep.
        settings = wandb.Settings(init_timeout=30)
        return WandbLogger(save_dir=str(output_dir), mode=mode, settings=settings, log_model=False, **options)

    logger = build(mode)
    if mode != "online":
        return logger
    try:
        logger.experiment  # noqa: B018  # connect now, not in the first step
    except (wandb.errors.CommError, wandb.errors.UsageError) as error:
        log.warning("W&B: cannot connect (%s); logging offline instead", type(error).__name__)
        options["id"] = _wandb_id(output_dir, new=True)  # W&B keeps the other id reserved until this process ends
        logger = build("offline")
    return logger

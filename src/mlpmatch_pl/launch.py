"""From a configuration to a finished run. The only caller of hydra.utils.instantiate.

The order is the promise: everything that can be refused is refused first, then the run folder is written.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import DictConfig, OmegaConf

import mlpmatch_pl
from mlpmatch_pl.callbacks.progress import ProgressBar, ProgressLines, duration
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.errors import UserError
from mlpmatch_pl.loggers import build_loggers, finish_wandb
from mlpmatch_pl.methods import Method, resolve_method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.segmentor.weights import load_published
from mlpmatch_pl.summary import class_table

log = logging.getLogger(__name__)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Build everything, train, evaluate the best checkpoint, write the results. See `mlpmatch_pl.train.train`."""
    _quiet()
    config: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    output_dir = Path(config["output_dir"]).resolve()
    checkpoint = find_checkpoint(config["resume"], output_dir)
    if not isinstance(config["seed"], int):
        raise UserError(f"expected seed as a whole number, but got {config['seed']!r}")
    seed_everything(config["seed"], workers=True, verbose=False)
    method = resolve_method(config["method"])
    datamodule = build_datamodule(config, method)
    trainer = build_trainer(config, output_dir, datamodule)
    try:
        module = build_module(config, method, datamodule, trainer)
        datamodule.prepare_data()
        if trainer.is_global_zero:
            _write_run_folder(cfg, output_dir, datamodule)
        _describe(module, datamodule, trainer, output_dir)
        started = time.monotonic()
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint)
        metrics = _finish(trainer, module, datamodule, config, time.monotonic() - started)
        if trainer.is_global_zero:
            (output_dir / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
            log.info("results in %s", output_dir)
        return metrics
    finally:
        finish_wandb()


def find_checkpoint(resume: str | None, output_dir: Path) -> str | None:
    """Return the checkpoint to go on from; refuse to write over a run that has one.

    Args:
        resume: None, ``auto`` or a path.
        output_dir: The run folder.

    Raises:
        UserError: If the run folder holds a checkpoint and nothing says to resume, or there is none to resume.
    """
    last = output_dir / "checkpoints" / "last.ckpt"
    if resume is None:
        existing = sorted((output_dir / "checkpoints").glob("*.ckpt"))
        if existing and int(os.environ.get("LOCAL_RANK", 0)) == 0:
            raise UserError(
                f"expected a new run folder, but {existing[0]} exists; go on with resume=auto, or choose another "
                "hydra.run.dir"
            )
        return None
    path = last if resume == "auto" else Path(resume)
    if not path.is_file():
        raise UserError(
            f"expected a checkpoint to resume from, but {path} does not exist; leave resume out to start anew"
        )
    return str(path)


def build_datamodule(config: dict[str, Any], method: Method) -> SemiSupervisedDataModule:
    """Build the data module with the views that the method needs."""
    data = instantiate(config["dataset"], _convert_="all")
    return SemiSupervisedDataModule(
        data,
        **config["loader"],
        num_strong=len(method.strong_weights),
        partner=method.partner,
        cutmix=method.cutmix,
        seed=config["seed"],
    )


def build_trainer(config: dict[str, Any], output_dir: Path, datamodule: SemiSupervisedDataModule) -> Trainer:
    """Build the trainer: duration from the schedule, DDP settings, loggers, callbacks."""
    options = dict(config["trainer"])
    options.pop("channels_last")
    sync_batchnorm = options.pop("sync_batchnorm")
    on_cpu = options["accelerator"] == "cpu" or not torch.cuda.is_available()
    if sync_batchnorm and on_cpu:
        raise UserError("expected a GPU for trainer.sync_batchnorm=true, but torch has none; leave it null")
    several = options["devices"] not in (1, "1", [0]) or options["num_nodes"] > 1
    # Buffers differ between ranks only without SyncBatchNorm; sending rank 0's in every step gains nothing.
    strategy: Any = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True) if several else "auto"
    name = f"{config['method']['name']}_{output_dir.name}"
    trainer = Trainer(
        **options,
        strategy=strategy,
        sync_batchnorm=several and not on_cpu if sync_batchnorm is None else sync_batchnorm,
        max_epochs=1,  # set below, once the number of processes is known
        default_root_dir=str(output_dir),
        logger=build_loggers(config["logger"], output_dir, name),
        callbacks=_callbacks(config["callbacks"]),
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    steps = math.ceil(datamodule.steps_per_epoch(trainer.world_size) / trainer.accumulate_grad_batches)
    epochs, every = length_of_training(config["schedule"], steps)
    trainer.fit_loop.max_epochs = epochs
    if options["check_val_every_n_epoch"] is None:
        trainer.check_val_every_n_epoch = every
    if options["enable_progress_bar"]:
        images = images_per_update(datamodule, trainer)
        progress = ProgressBar(images) if sys.stdout.isatty() else ProgressLines(images)
        trainer.callbacks = [c for c in trainer.callbacks if "ProgressBar" not in type(c).__name__]  # type: ignore[attr-defined]
        trainer.callbacks.insert(0, progress)  # type: ignore[attr-defined]
    return trainer


def length_of_training(schedule: dict[str, Any], steps_per_epoch: int) -> tuple[int, int]:
    """Return the number of epochs, and after how many of them to validate.

    ``schedule.steps`` is rounded up to whole epochs, so that every image counts alike and the last step is validated;
    many short epochs are validated about twenty times in all.

    Raises:
        UserError: If not exactly one of ``epochs`` and ``steps`` is given, or it is not positive.

    Example:
        >>> length_of_training({"epochs": None, "steps": 500}, steps_per_epoch=59)
        (9, 1)
        >>> length_of_training({"epochs": None, "steps": 500}, steps_per_epoch=4)
        (126, 6)
    """
    epochs, steps = schedule["epochs"], schedule["steps"]
    if (epochs is None) == (steps is None) or (epochs or steps) < 1:
        raise UserError(
            f"expected a positive schedule.epochs or schedule.steps, but got epochs={epochs}, steps={steps}; "
            "set the other to null"
        )
    if epochs is not None:
        return epochs, 1
    whole = math.ceil(steps / steps_per_epoch)
    every = max(whole // 20, 1)
    return math.ceil(whole / every) * every, every


def build_module(
    config: dict[str, Any], method: Method, datamodule: SemiSupervisedDataModule, trainer: Trainer
) -> MLPMatch:
    """Build the module with the learning rate scaled to the images in an optimizer step."""
    backbone, schedule, data = dict(config["backbone"]), config["schedule"], datamodule.data
    if backbone["in_chans"] != 3:
        raise UserError(
            f"expected backbone.in_chans=3, because the data are RGB images, but got {backbone['in_chans']}"
        )
    together = trainer.world_size if trainer.strategy.root_device.type == "cuda" else 1  # SyncBatchNorm
    method.check_batch(
        datamodule.batch_size * together + (0 if method.uses_unlabeled else datamodule.unlabeled_batch_size * together),
        datamodule.unlabeled_batch_size * together,
    )
    images = images_per_update(datamodule, trainer)
    lr = schedule["lr"] * images / schedule["reference_images"]
    module = MLPMatch(
        len(data.class_names),
        method=config["method"],
        backbone=backbone.pop("name"),
        **backbone,
        **config["objective"],
        ignore_index=data.ignore_index,
        lr=lr,
        **{key: schedule[key] for key in ("lr_multi", "momentum", "weight_decay", "power")},
        class_names=list(data.class_names),
        absent=config["evaluation"]["absent"],
        channels_last=config["trainer"]["channels_last"],
        seed=config["seed"],
    )
    log.info(
        "learning rate %.4g = %g * %d / %d images in an optimizer step; decoder x %g",
        lr, schedule["lr"], images, schedule["reference_images"], schedule["lr_multi"],
    )  # fmt: skip
    if config["init_weights"]:
        load_published(module.segmentor, config["init_weights"])
    return module


def images_per_update(datamodule: SemiSupervisedDataModule, trainer: Trainer) -> int:
    """Return the number of images, labeled and unlabeled, in an optimizer step over all devices."""
    return datamodule.images_per_step * trainer.world_size * trainer.accumulate_grad_batches


def _callbacks(config: dict[str, Any]) -> list[Callback]:
    callbacks: list[Callback] = []
    for node in config.values():
        if node is not None:
            built = instantiate(node, _convert_="all")
            callbacks += built if isinstance(built, list) else [built]
    return callbacks


def _write_run_folder(cfg: DictConfig, output_dir: Path, datamodule: SemiSupervisedDataModule) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, output_dir / "config.yaml", resolve=True)
    datamodule.data.labeled.save(output_dir / "labeled.txt")


def _describe(module: MLPMatch, datamodule: SemiSupervisedDataModule, trainer: Trainer, output_dir: Path) -> None:
    data = datamodule.data
    log.info(
        "%s: %d labeled images (%s, sha256 %s), %d unlabeled, %d validation, %d test; %d classes",
        module.method.name, len(data.labeled.names), data.labeled.label, data.labeled.sha256[:8], len(data.unlabeled),
        len(data.val), len(data.test or ()), len(data.class_names),
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in module.parameters()) / 1e6
    log.info(
        "%s, %.1f million parameters; %d epochs of %d steps; run folder %s",
        module.hparams["backbone"], parameters, trainer.max_epochs, datamodule.steps_per_epoch(trainer.world_size),
        output_dir,
    )  # fmt: skip


def _finish(
    trainer: Trainer, module: MLPMatch, datamodule: SemiSupervisedDataModule, config: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """Evaluate the best checkpoint, print the table, and gather what metrics.json holds."""
    last = _floats(trainer.callback_metrics)
    if trainer.interrupted:
        raise KeyboardInterrupt
    checkpoint = trainer.checkpoint_callback
    best_path = getattr(checkpoint, "best_model_path", "") or None
    best_val = getattr(checkpoint, "best_model_score", None)
    trainer.test(module, datamodule=datamodule, ckpt_path=best_path, verbose=False)
    test = _floats(trainer.callback_metrics)
    part = "test" if datamodule.data.test else "validation"
    log.info("%s", class_table(module.last_counts_CC, module.class_names, module.absent, f"best checkpoint, {part}"))
    log.info(
        "%s mIoU %.4f (best checkpoint); best validation mIoU %s; trained %s",
        part, test.get("test/miou", float("nan")), "none" if best_val is None else f"{float(best_val):.4f}",
        duration(seconds),
    )  # fmt: skip
    split = datamodule.data.labeled
    return {
        "method": config["method"]["name"],
        "seed": config["seed"],
        "labeled": {"split": split.label, "count": len(split.names), "sha256": split.sha256},
        "unlabeled": len(datamodule.data.unlabeled),
        "steps": trainer.global_step,
        "best": {"val/miou": None if best_val is None else float(best_val), "checkpoint": best_path},
        "last": last,
        "test": test,
        "evaluated_on": part,
        "seconds": round(seconds, 1),
        "images_per_second": round(
            trainer.global_step * images_per_update(datamodule, trainer) / max(seconds, 1e-9), 2
        ),
        "versions": {
            "mlpmatch_pl": mlpmatch_pl.__version__,
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "python": platform.python_version(),
        },
    }


def _floats(metrics: Any) -> dict[str, float]:
    return {key: float(value) for key, value in metrics.items()}


def _quiet() -> None:
    """Keep the log to what this package says; warnings of substance still come through."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if int(os.environ.get("LOCAL_RANK", 0)) > 0:
        logging.getLogger("mlpmatch_pl").setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # the number is chosen by measurement or by the user
        r".*The number of training batches .* is smaller than the logging interval.*",
        r".*LeafSpec.*",  # Lightning 2.6 with torch 2.14
        r".*recommended to use `self.log\(.*sync_dist=True.*",  # metrics come from one matrix, summed over the ranks
        r".*Checkpoint directory .* exists and is not empty.*",  # a resumed run
    ):
        warnings.filterwarnings("ignore", message=message)

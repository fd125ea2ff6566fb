"""Build data, data module, module and callbacks from a configuration. Only this module instantiates ``_target_``s."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from omegaconf import DictConfig, OmegaConf
from torch.nn.modules.batchnorm import _BatchNorm

from mlpmatch_pl.data.base import SegmentationData
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.schema import checked
from mlpmatch_pl.engine.trainer import MODULE_OPTIONS, images_per_update, uses_sync_batchnorm
from mlpmatch_pl.evaluation import SlidingWindowInference
from mlpmatch_pl.methods.method import Method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.segmentor.weights import load_published
from mlpmatch_pl.utils.errors import UserError, suggest


def read_config(cfg: DictConfig, *others: str) -> dict[str, Any]:
    """Return a training's configuration as plain data, with its types checked.

    Args:
        cfg: As composed from ``conf/train.yaml``.
        others: Further keys that the command reads itself.

    Raises:
        UserError: For the first wrong value, missing key or unknown key.
    """
    return checked(OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True), others)  # type: ignore[arg-type]


def build_data(dataset: dict[str, Any]) -> SegmentationData:
    """Build the dataset that a configuration describes."""
    data: SegmentationData = instantiate(dataset, _convert_="all")
    return data


def build_datamodule(config: dict[str, Any], method: Method) -> SemiSupervisedDataModule:
    """Build the data module for a method."""
    return SemiSupervisedDataModule(
        build_data(config["dataset"]),
        **config["loader"],
        method=method,
        seed=config["seed"],
    )


def build_module(
    config: dict[str, Any], method: Method, datamodule: SemiSupervisedDataModule, trainer: Trainer
) -> MLPMatch:
    """Build the module, with the learning rate scaled to the images in an optimizer step."""
    backbone, schedule, data = dict(config["backbone"]), config["schedule"], datamodule.data
    labeled, unlabeled = datamodule.batch_size, datamodule.unlabeled_batch_size
    synchronized = trainer.world_size if uses_sync_batchnorm(config["trainer"]) else 1
    if schedule["reference_images"] < 1:
        raise UserError(f"expected schedule.reference_images of at least 1, but got {schedule['reference_images']}")
    lr = schedule["lr"] * images_per_update(datamodule, trainer) / schedule["reference_images"]
    module = MLPMatch(
        len(data.class_names),
        method=config["method"],
        backbone=backbone.pop("name"),
        in_chans=data.in_chans,
        **backbone,
        decoder=config["decoder"],
        **config["objective"],
        ignore_index=data.ignore_index,
        lr=lr,
        **{key: schedule[key] for key in ("lr_multi", "layer_decay", "decay", "power", "warmup_steps")},
        optimizer=config["optimizer"],
        class_names=list(data.class_names),
        palette=[list(color) for color in data.colors],
        bit_depth=data.bit_depth,
        image_options=dict(data.image_options) or None,
        absent=config["evaluation"]["absent"],
        **{option: config["trainer"][option] for option in MODULE_OPTIONS},
        seed=config["seed"],
    )
    windows = {key: value for key, value in config["evaluation"].items() if key != "absent"}
    try:
        module.inference = SlidingWindowInference(**windows)
    except UserError as error:  # evaluate and predict have these keys under inference
        raise UserError(str(error).replace("inference.", "evaluation.")) from error
    shared = method.uses_unlabeled and not method.full_labeled_batch
    has_batchnorm = any(isinstance(child, _BatchNorm) for child in module.segmentor.modules())
    method.check_batch_sizes(labeled if shared else labeled + unlabeled, unlabeled, synchronized, has_batchnorm)
    if config["init_weights"]:
        load_published(module.segmentor, config["init_weights"])
    return module


def build_callbacks(config: dict[str, Any]) -> list[Callback]:
    """Build the callbacks of a run; an entry may stand for several callbacks, or none."""
    callbacks: list[Callback] = []
    for node in config.values():
        if node is not None:
            built = instantiate(node, _convert_="all")
            callbacks += built if isinstance(built, list) else [built]
    return callbacks


def check_monitors(callbacks: Iterable[Callback], module: MLPMatch) -> None:
    """Refuse a monitor that is never logged: Lightning would notice after the first epoch.

    Raises:
        UserError: For the first such monitor of a checkpoint, early stopping or the like.
    """
    scores = ["miou", "acc", "dice", *(f"iou/{name}" for name in module.class_names)]
    known = [f"val/{score}" for score in [*scores, *(["student_miou"] if module.teacher else [])]]
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if monitor is not None and not str(monitor).startswith("train/") and monitor not in known:
            raise UserError(
                f"expected a metric of the validation as monitor of {type(callback).__name__}, such as val/miou, but "
                f"got {monitor!r}." + suggest(str(monitor), known)
            )

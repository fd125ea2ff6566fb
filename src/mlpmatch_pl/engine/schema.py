"""Keys and types of a training's configuration, checked before anything is built.

Groups that are passed to a constructor take their types from its annotations. Every key is required: without it, the
constructor's default would silently replace the value that the user removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pydoc import locate
from typing import Any, get_type_hints

from lightning.pytorch import Trainer

from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.trainer import MODULE_OPTIONS
from mlpmatch_pl.evaluation import SlidingWindowInference
from mlpmatch_pl.methods.method import Method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.segmentor.segmentor import resolve_decoder
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.validation import arguments_type, mapping_type, validate


def _hints(function: Any, *keys: str) -> dict[str, Any]:
    hints = get_type_hints(function)
    return {key: hints[key] for key in keys or hints if key not in ("self", "return")}


_CRITERION = mapping_type(
    {"name": str, "class_weights": Sequence[float] | None, "dice_weight": float, "threshold": float, "min_kept": int},
    optional=("class_weights", "dice_weight", "threshold", "min_kept"),
)
_SAMPLER = mapping_type({"sampler": str, "p": float, "k": int}, optional=("p", "k"))
_TEACHER = mapping_type({"decay": float, "ramp": bool})
_WANDB = mapping_type(
    dict.fromkeys(("project", "name", "group", "mode", "entity", "notes", "job_type"), str | None)
    | {"tags": Sequence[str], "artifact": bool},
    optional=("entity", "job_type"),
)
_MLFLOW = mapping_type({"experiment": str, "tracking_uri": str})
_LOADER = {
    key: kind
    for key, kind in _hints(SemiSupervisedDataModule.__init__).items()
    if key not in ("data", "method", "seed")
}
_TRAINER = (
    _hints(Trainer.__init__)
    | _hints(MLPMatch.__init__, *MODULE_OPTIONS)
    | {"sync_batchnorm": bool | None, "log_every_n_steps": int, "enable_progress_bar": bool}
)
_TRAINER_REQUIRED = (
    *MODULE_OPTIONS, "accelerator", "devices", "num_nodes", "precision", "accumulate_grad_batches", "gradient_clip_val",
    "check_val_every_n_epoch", "log_every_n_steps", "deterministic", "benchmark", "fast_dev_run", "enable_progress_bar",
    "sync_batchnorm",
)  # fmt: skip
_TRAINING: dict[str, Any] = {
    "seed": int,
    "resume": str | None,
    "init_weights": str | None,
    "output_dir": str,
    "backbone": mapping_type(
        {"name": str} | _hints(MLPMatch.__init__, "pretrained", "output_stride", "pos_embed", "frozen", "mean", "std")
    ),
    "callbacks": dict[str, dict[str, Any] | None],
    "dataset": dict[str, Any],
    "decoder": dict[str, Any],
    "evaluation": mapping_type(
        _hints(MLPMatch.__init__, "absent")
        | _hints(SlidingWindowInference, "mode", "window", "stride", "window_batch", "windows")
    ),
    "loader": mapping_type(_LOADER),
    "logger": mapping_type({"wandb": _WANDB | None, "tensorboard": bool, "mlflow": _MLFLOW | None}),
    "method": mapping_type(
        _hints(Method)
        | {
            "network_perturbation": _SAMPLER | None,
            "teacher": _TEACHER | None,
            "cutmix": mapping_type(_hints(CutMix)),
        }
    ),
    "objective": mapping_type({"criterion": str | _CRITERION, "confidence_threshold": float}),
    "optimizer": dict[str, Any],
    "schedule": mapping_type(
        {"epochs": int | None, "steps": int | None, "minutes": float | None, "reference_images": int}
        | _hints(MLPMatch.__init__, "lr", "lr_multi", "layer_decay", "power", "warmup_steps")
        | {"decay": str | dict[str, Any]}
    ),
    "trainer": mapping_type(_TRAINER, optional=_TRAINER.keys() - {*_TRAINER_REQUIRED}),
}


@cache
def _training_type(*others: str) -> Any:
    return mapping_type(_TRAINING | dict.fromkeys(others, Any))


def checked(config: dict[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """Return a training's configuration with its values converted to the types of the schema.

    Args:
        config: Plain data, as composed from ``conf/train.yaml``.
        others: Further keys that the command reads itself.

    Raises:
        UserError: For the first wrong value, missing key or unknown key.
    """
    result: dict[str, Any] = validate(_training_type(*others), config)
    if not 0 <= result["seed"] < 2**32:  # numpy's range
        raise UserError(f"expected seed as an integer from 0 to {2**32 - 1}, but got {result['seed']}")
    callbacks = {name: node and checked_target(f"callbacks.{name}", node) for name, node in result["callbacks"].items()}
    dataset, decoder = checked_target("dataset", result["dataset"]), resolve_decoder(result["decoder"])
    return result | {"dataset": dataset, "decoder": decoder, "callbacks": callbacks}


def checked_target(key: str, node: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments for the function or class that a ``_target_`` names.

    Args:
        key: Key of the mapping in the configuration.
        node: The mapping, with ``_target_``.

    Returns:
        The mapping with its values converted to the types of the parameters.

    Raises:
        UserError: If the target does not exist, or an argument is missing, unknown or of the wrong type.

    Example:
        >>> checked_target("dataset", {"_target_": "mlpmatch_pl.data.datasets.shapes.shapes", "size": "64"})
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected dataset.size as an integer, but got '64'
    """
    path, expected = node.get("_target_"), f"expected {key}._target_ as the path of a function or class, but"
    if not isinstance(path, str):
        raise UserError(f"{expected} got {path!r}")
    try:
        target = locate(path)
    except Exception as error:  # importing a user's module may raise anything
        raise UserError(f"{expected} {path} cannot be imported ({' '.join(str(error).split())})") from error
    if not callable(target):
        raise UserError(f"{expected} {path} is none")
    arguments = {name: value for name, value in node.items() if not str(name).startswith("_")}
    return {**node, **validate(arguments_type(target), arguments, key)}

"""Types at the door: the values of a training's configuration against the annotations of what they are passed to.

One place for all of them, before anything is built: constructors may then trust their types, and check ranges only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pydoc import locate
from typing import Any

from lightning.pytorch import Trainer

from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.engine.trainer import MODULE_OPTIONS
from mlpmatch_pl.methods.method import Method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.validation import check_keys, fit, fitted, mapping, parameters

Types = Mapping[str, Any]
_MODULE: Types = parameters(MLPMatch)[0]

# What the launch itself reads, by the key of its mapping; the rest of a mapping is what a constructor takes.
_RUN: Types = {"seed": int, "resume": str | None, "init_weights": str | None, "output_dir": str}
_SCHEDULE: Types = {"epochs": int | None, "steps": int | None, "reference_images": int} | {
    key: _MODULE[key] for key in ("lr", "lr_multi", "momentum", "weight_decay", "power")
}
_NOT_OF_LOADER = ("data", "method", "seed")
_LOADER: Types = {
    key: kind for key, kind in parameters(SemiSupervisedDataModule)[0].items() if key not in _NOT_OF_LOADER
}
_BACKBONE_KEYS = ("pretrained", "output_stride", "decoder_channels", "atrous_rates", "mean", "std")
_BACKBONE: Types = {"name": str} | {key: _MODULE[key] for key in _BACKBONE_KEYS}
_OBJECTIVE: Types = {"criterion": str | Mapping[str, Any], "confidence_threshold": float}
_CRITERION: Types = {
    "name": str,
    "class_weights": Sequence[float] | None,
    "dice_weight": float,
    "threshold": float,
    "min_kept": int,
}
_SAMPLER: Types = {"sampler": str, "p": float, "k": int}
_EVALUATION: Types = {"absent": _MODULE["absent"]}
_LOGGER: Types = {"wandb": Mapping[str, Any] | None, "tensorboard": bool}
_WANDB: Types = {
    "project": str | None,
    "name": str | None,
    "group": str | None,
    "mode": str | None,
    "entity": str | None,
    "tags": Sequence[str] | None,
    "notes": str | None,
    "job_type": str | None,
}
_TRAINER: Types = (
    parameters(Trainer)[0]
    | {key: _MODULE[key] for key in MODULE_OPTIONS}
    | {"sync_batchnorm": bool | None, "log_every_n_steps": int, "enable_progress_bar": bool}
)
_TRAINER_READ = (*MODULE_OPTIONS, "accelerator", "devices", "num_nodes", "sync_batchnorm", "check_val_every_n_epoch",
                 "log_every_n_steps", "enable_progress_bar")  # fmt: skip
_GROUPS = ("backbone", "callbacks", "dataset", "evaluation", "loader", "logger", "method", "objective", "schedule",
           "trainer")  # fmt: skip


def checked(config: dict[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """Check the types in a training's configuration.

    Args:
        config: Plain data, as composed from ``conf/train.yaml``.
        others: Keys beyond those of a training, which the command reads itself; they are left as they are.

    Returns:
        The same, with numbers as texts where a text is meant.

    Raises:
        UserError: For the first value that is of another type, key that is missing, or key that nothing reads.
    """
    check_keys("", config, {*_RUN, *_GROUPS, *others}, (*_RUN, *_GROUPS))
    result = dict(config) | {key: fit(key, config[key], kind) for key, kind in _RUN.items()}
    nodes = {key: mapping(key, config[key]) for key in _GROUPS}
    loader = fitted("loader", nodes["loader"], _LOADER)
    method = fitted("method", nodes["method"], parameters(Method)[0], ["name"])
    method = _inner(method, "method", "cutmix", parameters(CutMix)[0])
    method = _inner(method, "method", "network_perturbation", _SAMPLER)
    objective = fitted("objective", nodes["objective"], _OBJECTIVE)
    logger = fitted("logger", nodes["logger"], _LOGGER, _LOGGER)
    return result | {
        "loader": loader,
        "method": method,
        "objective": _inner(objective, "objective", "criterion", _CRITERION),
        "logger": _inner(logger, "logger", "wandb", _WANDB, ["name", "mode"]),
        "backbone": fitted("backbone", nodes["backbone"], _BACKBONE, ["name"]),
        "schedule": fitted("schedule", nodes["schedule"], _SCHEDULE, _SCHEDULE),
        "trainer": fitted("trainer", nodes["trainer"], _TRAINER, _TRAINER_READ),
        "evaluation": fitted("evaluation", nodes["evaluation"], _EVALUATION, _EVALUATION),
        "dataset": checked_target("dataset", nodes["dataset"]),
        "callbacks": {
            name: None if node is None else checked_target(f"callbacks.{name}", mapping(f"callbacks.{name}", node))
            for name, node in nodes["callbacks"].items()
        },
    }


def _inner(node: dict[str, Any], key: str, name: str, types: Types, required: Iterable[str] = ()) -> dict[str, Any]:
    """Check a mapping inside of one; it may be left out, null, or a name alone."""
    value = node.get(name)
    return node | {name: fitted(f"{key}.{name}", value, types, required)} if isinstance(value, dict) else node


def checked_target(key: str, node: dict[str, Any]) -> dict[str, Any]:
    """Check what is passed to the function or class that a ``_target_`` names.

    Args:
        key: What the mapping is called.
        node: The mapping, with ``_target_``.

    Returns:
        The same, with numbers as texts where a text is meant.

    Raises:
        UserError: If there is no such function or class, or a value or a key is not one that it takes.

    Example:
        >>> checked_target("dataset", {"_target_": "mlpmatch_pl.data.datasets.shapes.shapes", "size": "64"})
        Traceback (most recent call last):
        ...
        mlpmatch_pl.utils.errors.UserError: expected dataset.size as a whole number, but got '64'
    """
    path = node.get("_target_")
    if not isinstance(path, str):
        raise UserError(f"expected {key}._target_ as the path of a function or class, but got {path!r}")
    target = _target(key, path)
    types, is_open = parameters(target)
    own = {name: value for name, value in node.items() if not str(name).startswith("_")}
    return node | fitted(key, own, types, is_open=is_open)


def _target(key: str, path: str) -> Callable[..., Any]:
    try:
        target = locate(path)
    except Exception as error:  # importing runs a user's module, which may raise anything
        reason = " ".join(str(error).split())
        raise UserError(
            f"expected {key}._target_ as the path of a function or class, but {path} cannot be imported ({reason})"
        ) from error
    if not callable(target):
        raise UserError(f"expected {key}._target_ as the path of a function or class, but {path} is none")
    return target

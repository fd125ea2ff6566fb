"""Types at the door: the values of a training's configuration against the annotations of what they are passed to.

One place for all of them, before anything is built: constructors may then trust their types, and check ranges only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pydoc import locate
from typing import Any

from lightning.pytorch import Trainer

from mlpmatch_pl.annotations import fit, parameters
from mlpmatch_pl.data.datamodule import SemiSupervisedDataModule
from mlpmatch_pl.data.strong import StrongView
from mlpmatch_pl.errors import UserError, suggest
from mlpmatch_pl.methods import Method
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.trainer import MODULE_OPTIONS

Types = Mapping[str, Any]
_MODULE: Types = parameters(MLPMatch)[0]

# What the launch itself reads, by the key of its mapping; the rest of a mapping is what a constructor takes.
_RUN: Types = {"seed": int, "resume": str | None, "init_weights": str | None, "output_dir": str}
_SCHEDULE: Types = {"epochs": int | None, "steps": int | None, "reference_images": int} | {
    key: _MODULE[key] for key in ("lr", "lr_multi", "momentum", "weight_decay", "power")
}
_SET_BY_METHOD = ("data", "num_strong", "partner", "cutmix", "seed")
_LOADER: Types = {
    key: kind for key, kind in parameters(SemiSupervisedDataModule)[0].items() if key not in _SET_BY_METHOD
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


def checked(config: dict[str, Any]) -> dict[str, Any]:
    """Check the types in a training's configuration.

    Args:
        config: Plain data, as composed from ``conf/train.yaml``; keys beyond those of a training are left as they are.

    Returns:
        The same, with numbers as texts where a text is meant.

    Raises:
        UserError: For the first value that is of another type, key that is missing, or key that nothing reads.
    """
    _require(config, (*_RUN, *_GROUPS), "")
    result = dict(config) | {key: fit(key, config[key], kind) for key, kind in _RUN.items()}
    nodes = {key: _mapping(config[key], key) for key in _GROUPS}
    loader = _fitted("loader", nodes["loader"], _LOADER)
    loader = _inner(loader, "loader", "strong", parameters(StrongView)[0])
    method = _fitted("method", nodes["method"], parameters(Method)[0], ["name"])
    method = _inner(method, "method", "cutmix", parameters(CutMix)[0])
    method = _inner(method, "method", "network_perturbation", _SAMPLER)
    objective = _fitted("objective", nodes["objective"], _OBJECTIVE)
    logger = _fitted("logger", nodes["logger"], _LOGGER, _LOGGER)
    return result | {
        "loader": loader,
        "method": method,
        "objective": _inner(objective, "objective", "criterion", _CRITERION),
        "logger": _inner(logger, "logger", "wandb", _WANDB, ["name", "mode"]),
        "backbone": _fitted("backbone", nodes["backbone"], _BACKBONE, ["name"]),
        "schedule": _fitted("schedule", nodes["schedule"], _SCHEDULE, _SCHEDULE),
        "trainer": _fitted("trainer", nodes["trainer"], _TRAINER, _TRAINER_READ),
        "evaluation": _fitted("evaluation", nodes["evaluation"], _EVALUATION, _EVALUATION),
        "dataset": checked_target("dataset", nodes["dataset"]),
        "callbacks": {
            name: None if node is None else checked_target(f"callbacks.{name}", _mapping(node, f"callbacks.{name}"))
            for name, node in nodes["callbacks"].items()
        },
    }


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"expected {key} as a mapping of keys to values, but got {value!r}; set its keys, as {key}.a=1")
    return value


def _require(node: Mapping[str, Any], required: Iterable[str], prefix: str) -> None:
    if missing := [key for key in required if key not in node]:
        raise UserError(f"expected a value for {prefix}{missing[0]}, but the configuration lacks it; put it back")


def _fitted(
    key: str, node: Mapping[str, Any], types: Types, required: Iterable[str] = (), is_open: bool = False
) -> dict[str, Any]:
    """Check the values of one mapping; a key that is not among the types is refused, unless the mapping is open."""
    _require(node, required, f"{key}.")
    for name in map(str, node):
        if name not in types and not is_open:
            raise UserError(f"the configuration has no key {key}.{name}." + suggest(name, types))
    return {name: fit(f"{key}.{name}", value, types.get(name, Any)) for name, value in node.items()}


def _inner(
    node: dict[str, Any], key: str, name: str, types: Types, required: Iterable[str] = (), is_open: bool = False
) -> dict[str, Any]:
    """Check a mapping inside of one; it may be left out, null, or a name alone."""
    value = node.get(name)
    return node | {name: _fitted(f"{key}.{name}", value, types, required, is_open)} if isinstance(value, dict) else node


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
        >>> checked_target("dataset", {"_target_": "mlpmatch_pl.data.shapes.shapes", "size": "64"})
        Traceback (most recent call last):
        ...
        mlpmatch_pl.errors.UserError: expected dataset.size as a whole number, but got '64'
    """
    path = node.get("_target_")
    if not isinstance(path, str):
        raise UserError(f"expected {key}._target_ as the path of a function or class, but got {path!r}")
    target = _target(key, path)
    types, is_open = parameters(target)
    own = {name: value for name, value in node.items() if not str(name).startswith("_")}
    return node | _fitted(key, own, types, is_open=is_open)


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

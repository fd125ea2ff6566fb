"""Whether the arguments of the module can be, and whether those in a checkpoint describe the same network."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.palette import require_colors

ARCHITECTURE = ("num_classes", "backbone", "in_chans", "output_stride", "decoder_channels", "atrous_rates")


def check_architecture(saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Compare the hyperparameters that decide the network.

    Raises:
        UserError: For the first one that differs.
    """
    for key in ARCHITECTURE:
        if key in saved and _plain(saved[key]) != _plain(here[key]):
            raise UserError(
                f"expected a checkpoint of this architecture, but it has {key}={saved[key]} and the configuration "
                f"{key}={here[key]}; resume with the configuration of the run that wrote it"
            )


def check_ranges(
    lr: float,
    lr_multi: float,
    momentum: float,
    weight_decay: float,
    power: float,
    confidence_threshold: float,
    std: Sequence[float],
) -> None:
    """Refuse numbers out of range.

    Raises:
        UserError: For the first one.
    """
    numbers = {"lr": lr, "lr_multi": lr_multi, "momentum": momentum, "weight_decay": weight_decay, "power": power}
    if wrong := [key for key, value in numbers.items() if not 0 <= value < math.inf]:
        raise UserError(f"expected {wrong[0]} as a number of at least 0, but got {numbers[wrong[0]]}")
    if not 0 <= confidence_threshold <= 1:
        raise UserError(f"expected confidence_threshold from 0 to 1, but got {confidence_threshold}")
    if not all(value > 0 for value in std):
        raise UserError(f"expected std with values above 0, but got {list(std)}; check prints them")


def names_of_classes(class_names: Sequence[str] | None, num_classes: int) -> list[str]:
    """Return a name for each class: those given, or ``0``, ``1``, ...

    Raises:
        UserError: If there are more or fewer names than classes.
    """
    names = [str(index) for index in range(num_classes)] if class_names is None else list(class_names)
    if len(names) != num_classes:
        raise UserError(f"expected {num_classes} class names, but got {len(names)}")
    return names


def check_palette(palette: Sequence[Sequence[int]], num_classes: int) -> None:
    """Refuse a palette without a color for each class; an empty one is none.

    Raises:
        UserError: If it has other colors, or more or fewer.
    """
    require_colors("palette", palette)
    if palette and len(palette) != num_classes:
        raise UserError(f"expected {num_classes} colors in palette, one a class, but got {len(palette)}")


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, list | tuple) else value

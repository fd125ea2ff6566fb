"""Optimizers of torch and timm by name, and their parameter groups."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mlpmatch_pl.utils.errors import UserError, suggest

PAPER_OPTIMIZER: Mapping[str, Any] = {"name": "SGD", "momentum": 0.9, "weight_decay": 1e-4}


def build_optimizer(
    spec: str | Mapping[str, Any],
    encoder: nn.Module,
    decoder: nn.Module,
    lr: float,
    lr_multi: float = 1.0,
    layer_decay: float = 1.0,
) -> torch.optim.Optimizer:
    """Build an optimizer with a learning rate for the encoder, or for each of its layers, and one for the decoder.

    Args:
        spec: Name of an optimizer, or a mapping of its ``name`` and its arguments. The name is a class of
            ``torch.optim`` (``SGD``, ``AdamW``, ...) or one of ``timm.optim.list_optimizers()`` (``lion``, ...).
        encoder: Trained with ``lr``.
        decoder: Trained with ``lr * lr_multi``.
        lr: Learning rate of the encoder, of its last layer with ``layer_decay``.
        lr_multi: Factor for the decoder.
        layer_decay: Factor of the learning rate from a layer of the encoder to the one before it, from above 0 to 1;
            0.65 to 0.9 are usual for vision transformers. Layers are those of timm's ``group_matcher``.

    Raises:
        UserError: If the optimizer is unknown or refuses its arguments or the parameters.

    Example:
        >>> spec = {"name": "AdamW", "weight_decay": 0.05}
        >>> optimizer = build_optimizer(spec, nn.Linear(2, 2), nn.Linear(2, 2), lr=1e-4, lr_multi=10)
        >>> [group["lr"] for group in optimizer.param_groups]
        [0.0001, 0.001]
    """
    arguments = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = arguments.pop("name", None)
    groups = _layers(encoder, lr, layer_decay) if layer_decay != 1 else []
    groups = groups or [{"params": list(encoder.parameters()), "lr": lr, "name": "encoder"}]
    groups.append({"params": list(decoder.parameters()), "lr": lr * lr_multi, "name": "decoder"})
    factory = _find(name)
    try:
        return factory(groups, lr=lr, **arguments)  # type: ignore[no-any-return]
    except Exception as error:  # each checks its arguments in its own way
        reason = " ".join(str(error).split()).removesuffix(".")
        raise UserError(f"expected an optimizer with arguments that it takes, but {name} refuses: {reason}") from error


def _find(name: Any) -> Any:
    from timm.optim import get_optimizer_class, list_optimizers

    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    if name in classes:
        return classes[name]
    if name in list_optimizers():
        return get_optimizer_class(name)
    raise UserError(
        f"expected optimizer.name as a class of torch.optim or an optimizer of timm, but got {name!r}."
        + suggest(str(name), [*classes, *list_optimizers()])
    )


def _layers(encoder: nn.Module, lr: float, layer_decay: float) -> list[dict[str, Any]]:
    """Return a group for each layer of the encoder, the last one first: its learning rate is logged as that of all."""
    from timm.optim import param_groups_layer_decay

    layers = param_groups_layer_decay(encoder.model, weight_decay_exclude_1d=False, layer_decay=layer_decay)
    layers.sort(key=lambda layer: layer["lr_scale"], reverse=True)
    return [
        {"params": layer["params"], "lr": lr * layer["lr_scale"], "name": f"encoder_{index}"}
        for index, layer in enumerate(layers)
    ]

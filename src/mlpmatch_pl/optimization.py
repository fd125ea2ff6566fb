"""SGD with a learning rate for the encoder and one for the decoder, and how they decay. Pure torch."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


def build_sgd(encoder: nn.Module, decoder: nn.Module, hparams: Mapping[str, Any]) -> torch.optim.SGD:
    """Build the optimizer.

    Args:
        encoder: Learns at ``lr``.
        decoder: Learns at ``lr * lr_multi``.
        hparams: These two, ``momentum``, ``weight_decay`` and ``fused_optimizer``, as `mlpmatch_pl.module.MLPMatch`
            takes them.
    """
    groups = [
        {"params": encoder.parameters(), "lr": hparams["lr"], "name": "encoder"},
        {"params": decoder.parameters(), "lr": hparams["lr"] * hparams["lr_multi"], "name": "decoder"},
    ]
    return torch.optim.SGD(
        groups,
        momentum=hparams["momentum"],
        weight_decay=hparams["weight_decay"],
        fused=hparams["fused_optimizer"] or None,
    )


def poly_decay(step: int, steps: int, power: float, late: bool) -> float:
    """Return the factor of the learning rate, ``(1 - step / steps) ** power``.

    Args:
        step: Optimizer step from 0.
        steps: Number of steps in all; beyond it the factor stays 0.
        power: Exponent, 0.9 in the paper.
        late: Use the value of the step before, as the authors' code does.

    Example:
        >>> [round(poly_decay(step, 10, 0.9, late=True), 4) for step in range(4)]
        [1.0, 1.0, 0.9095, 0.8181]
    """
    return float(max(1 - max(step - late, 0) / max(steps, 1), 0.0) ** power)

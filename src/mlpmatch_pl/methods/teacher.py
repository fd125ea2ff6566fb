"""The teacher: an exponential moving average of the network that is trained (the student)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from mlpmatch_pl.segmentor import Segmentor
from mlpmatch_pl.utils.errors import UserError


class Teacher(nn.Module):
    """Averages the weights and BatchNorm statistics of a network, and predicts in eval mode without gradients.

    After optimizer step ``t``, counted from 0, every floating-point tensor is ``d * teacher + (1 - d) * student`` with
    ``d = min(1 - 1 / (t + 1), decay)`` (UniMatch V2, arXiv 2410.10777, section 3.1); integer counters are copied.

    torch's `AveragedModel` has no such ramp, would round the counters, and waits for a GPU in every step.

    Args:
        student: The network to average; it is copied.
        decay: Largest share of the previous average, from 0 to below 1.
        ramp: Whether the share increases from 0 as above. Otherwise it is ``decay`` from the second step on.

    Raises:
        UserError: If the decay is out of range.

    Example:
        >>> student = Segmentor(2, backbone="test_resnet", decoder={"channels": 8})
        >>> teacher = Teacher(student, decay=0.9)
        >>> _ = student.decoder.classifier.bias.data.fill_(1.0)
        >>> teacher.update(student, step=0)
        >>> _ = student.decoder.classifier.bias.data.fill_(2.0)
        >>> teacher.update(student, step=1)
        >>> teacher.network.decoder.classifier.bias.tolist()
        [1.5, 1.5]
    """

    def __init__(self, student: Segmentor, decay: float, ramp: bool = True) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise UserError(f"expected method.teacher.decay from 0 to below 1, but got {decay}")
        self.decay, self.ramp = decay, ramp
        self.network = copy.deepcopy(student).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Teacher:
        """Stay in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits (B, C, H, W) without gradients."""
        logits_BCHW: Tensor = self.network(image_BCHW)
        return logits_BCHW

    @torch.no_grad()
    def update(self, student: Segmentor, step: int) -> None:
        """Average the student's weights after optimizer step ``step``, counted from 0."""
        decay = min(1 - 1 / (step + 1), self.decay) if self.ramp or step == 0 else self.decay
        pairs = [*zip(_tensors(self.network), _tensors(student), strict=True)]
        averaged = [(own, other) for own, other in pairs if own.is_floating_point()]
        torch._foreach_lerp_([own for own, _ in averaged], [other for _, other in averaged], 1 - decay)
        for own, other in pairs:
            if not own.is_floating_point():
                own.copy_(other)


def _tensors(network: nn.Module) -> list[Any]:
    return [*network.parameters(), *network.buffers()]

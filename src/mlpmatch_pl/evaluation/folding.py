"""A network as it is fastest to infer with: the same function, in fewer operations."""

from __future__ import annotations

import logging
from collections import Counter
from copy import deepcopy
from typing import cast

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

TOLERANCE = 1e-3  # of the largest output: far above rounding, far below what a wrong fold does

log = logging.getLogger(__name__)


@torch.no_grad()
def for_inference(network: nn.Module, example_BCHW: Tensor) -> nn.Module:
    """Return a copy with BatchNorm folded into the convolutions before it, in channels-last memory format.

    Which convolution a BatchNorm follows is seen in a pass over the example, so any network will do. One whose output
    would change is copied as it is, without folding, and the log says so: where something else than its BatchNorm
    reads a convolution.

    Args:
        network: Maps images to one tensor, in float64 too; in eval mode.
        example_BCHW: A small batch on the network's device.

    Returns:
        The copy, which cannot be trained, and does not follow the network's later changes.

    Example:
        >>> network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval()
        >>> for_inference(network, torch.rand(1, 3, 5, 5))
        Sequential(
          (0): Conv2d(3, 4, kernel_size=(1, 1), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    folded = deepcopy(network)
    for conv_name, norm_name in _pairs(network, example_BCHW):
        conv, norm = cast(nn.Conv2d, folded.get_submodule(conv_name)), cast(_BatchNorm, folded.get_submodule(norm_name))
        folded.set_submodule(conv_name, fuse_conv_bn_eval(conv, norm))
        folded.set_submodule(norm_name, _rest(norm))
    change = _change(_exact_output(network, example_BCHW), _exact_output(folded, example_BCHW))
    if change > TOLERANCE:
        log.warning(
            "BatchNorm stays as it is: folded into the convolutions it would change the output by %.1e of its largest "
            "value; inference is a little slower", change
        )  # fmt: skip
    result = folded if change <= TOLERANCE else deepcopy(network)
    return result.requires_grad_(False).to(memory_format=torch.channels_last)


def _exact_output(network: nn.Module, example_BCHW: Tensor) -> Tensor:
    """Return the output in float64: GPUs may round float32 to TF32, and that alone is more than the tolerance."""
    example = example_BCHW.cpu()  # not every device has float64
    output: Tensor = deepcopy(network).cpu().double()(example.double() if example.is_floating_point() else example)
    return output


def _change(before: Tensor, after: Tensor) -> float:
    """Return the largest change, relative to the largest value; broken weights may give NaN, which may stay."""
    if not torch.equal(before.isfinite(), after.isfinite()):
        return float("inf")
    difference = (after - before).nan_to_num(0.0, 0.0, 0.0).abs().max()
    return float(difference / before.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(torch.finfo(before.dtype).tiny))


def _pairs(network: nn.Module, example_BCHW: Tensor) -> list[tuple[str, str]]:
    """List the names of convolutions and the BatchNorm that each feeds, where both run once."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensors are kept: an id is used again when its object is gone
    pairs: list[tuple[str, str]] = []
    runs: Counter[str] = Counter()
    handles = []

    def remember(name: str, output: Tensor) -> None:
        runs[name] += 1
        made[id(output)] = (name, output)

    def look_up(name: str, source: Tensor) -> None:
        runs[name] += 1
        if id(source) in made:
            pairs.append((made[id(source)][0], name))

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            handles.append(module.register_forward_hook(lambda _, __, output, name=name: remember(name, output)))
        elif type(module) in (nn.BatchNorm2d, nn.SyncBatchNorm, BatchNormAct2d) and module.track_running_stats:
            handles.append(module.register_forward_pre_hook(lambda _, inputs, name=name: look_up(name, inputs[0])))
    try:
        network(example_BCHW)
    finally:
        for handle in handles:
            handle.remove()
    return [pair for pair in pairs if runs[pair[0]] == runs[pair[1]] == 1]


def _rest(norm: _BatchNorm) -> nn.Module:
    """Return what a BatchNorm does beside normalizing: timm's may have an activation."""
    return norm.act if isinstance(norm, BatchNormAct2d) else nn.Identity()

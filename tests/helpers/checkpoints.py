"""Checkpoints of tiny networks that were not trained."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer

from mlpmatch_pl import MLPMatch


def make_module(num_classes: int = 4, **options) -> MLPMatch:
    """Build the same network every time, whose decoder is strong enough that all classes are predicted."""
    torch.manual_seed(0)
    module = MLPMatch(num_classes, backbone="test_resnet", decoder={"channels": 8}, **options)
    with torch.no_grad():
        for parameter in module.segmentor.decoder.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return module


def save_checkpoint(module: MLPMatch, path: Path) -> Path:
    """Write a checkpoint as a training does."""
    trainer = Trainer(logger=False, barebones=True)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path

"""A network of segmentation_models_pytorch, trained with all perturbations.

python examples/smp_network.py 200

Needs ``pip install segmentation-models-pytorch``. Models of torchvision are given in the same way; see
`mlpmatch_pl.segmentor.adapter` for networks of your own.
"""

import sys

import segmentation_models_pytorch as smp
from lightning.pytorch import Trainer, seed_everything

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule, shapes
from mlpmatch_pl.perturbation.network import find_blocks


def main(steps: int = 100) -> MLPMatch:
    """Train a U-Net and return the module."""
    seed_everything(0)
    network = smp.Unet("resnet18", encoder_weights=None, decoder_channels=(64, 32, 16, 16, 8), classes=6)
    print(f"blocks that may be deactivated: {', '.join(find_blocks(network.encoder))}")
    module = MLPMatch(6, segmentor=network, lr=0.02, lr_multi=1.0)
    datamodule = SemiSupervisedDataModule(shapes(labeled=20, train=84, val=20, test=20), crop_size=64, batch_size=4)
    trainer = Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(module, datamodule=datamodule)
    trainer.test(module, datamodule=datamodule)
    return module


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))

"""A Hydra application of your own with the groups of mlpmatch_pl, and your own training around its module.

python examples/hydra_app.py method=unimatch backbone=resnet18 steps=200
"""

import hydra
from lightning.pytorch import Trainer, seed_everything
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule, shapes


@hydra.main(version_base="1.3", config_path="conf", config_name="app")
def main(cfg: DictConfig) -> None:
    """Train and test with a composed configuration."""
    seed_everything(0)
    groups = {key: OmegaConf.to_container(cfg[key], resolve=True) for key in ("method", "backbone", "decoder")}
    backbone = groups.pop("backbone")
    module = MLPMatch(cfg.classes, backbone=backbone.pop("name"), **backbone, **groups, lr=0.02, lr_multi=1.0)
    datamodule = SemiSupervisedDataModule(
        shapes(labeled=20, train=84, val=20, test=20), method=module.method, crop_size=64, batch_size=4
    )
    trainer = Trainer(max_steps=cfg.steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(module, datamodule=datamodule)
    trainer.test(module, datamodule=datamodule)


if __name__ == "__main__":
    main()

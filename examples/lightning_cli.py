"""A project with LightningCLI: everything comes from YAML.

    python examples/lightning_cli.py fit --config examples/lightning_cli.yaml
    python examples/lightning_cli.py test --config examples/lightning_cli.yaml --ckpt_path checkpoints/last.ckpt

``validate`` and ``predict`` work likewise, and ``fit --help`` lists every argument. Needs
``pip install 'jsonargparse[signatures]'``.
"""

from lightning.pytorch.cli import LightningCLI

from mlpmatch_pl import MLPMatch, SemiSupervisedDataModule


def main() -> LightningCLI:
    """Run the command line."""
    return LightningCLI(
        MLPMatch, SemiSupervisedDataModule, seed_everything_default=0, save_config_kwargs={"overwrite": True}
    )


if __name__ == "__main__":
    main()

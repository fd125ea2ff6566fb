"""Prepare a public dataset from the command line.

    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc                   # download, convert SBD, verify
    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc splits=unimatch   # and UniMatch's lists of labeled images
    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc archives=/usb     # offline
    python -m mlpmatch_pl.prepare dataset=cityscapes root=/data/cityscapes     # prints how to get the archives

Heavy imports are inside `prepare`, so that ``--help`` and ``--cfg job`` are fast.
"""

import sys

import hydra
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.commands.cli import guarded


def prepare(cfg: DictConfig) -> None:
    """Prepare the dataset of a composed configuration.

    Args:
        cfg: As composed from ``commands/prepare/prepare.yaml``.

    Raises:
        UserError: If the configuration is wrong, or an archive is missing, damaged or incomplete.
    """
    from mlpmatch_pl.commands.prepare.run import Options, prepare_dataset
    from mlpmatch_pl.utils.validation import read_options

    prepare_dataset(read_options(Options, OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))


@hydra.main(version_base="1.3", config_path="pkg://mlpmatch_pl.commands.prepare", config_name="prepare")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> None:
    with guarded("prepare"):
        try:
            prepare(cfg)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to continue", file=sys.stderr)
            sys.exit(130)


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1, an interruption with 130."""
    with guarded("prepare"):
        _hydra_main()


if __name__ == "__main__":
    main()

"""Prepare a benchmark data set from the command line.

    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc                   # download, convert SBD, verify
    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc splits=unimatch   # and the published lists
    python -m mlpmatch_pl.prepare dataset=voc root=/data/voc archives=/usb     # offline
    python -m mlpmatch_pl.prepare dataset=cityscapes root=/data/cityscapes     # says how to get the archives

Heavy imports are inside `prepare`, so that ``--help`` and ``--cfg job`` answer at once.
"""

import sys
from importlib.resources import files
from typing import Any, cast

import hydra
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.cli import guarded


def prepare(cfg: DictConfig) -> None:
    """Prepare what a composed configuration names.

    Args:
        cfg: As composed from ``conf/prepare/prepare.yaml``.

    Raises:
        UserError: If the configuration is wrong, or something cannot be had, is damaged, or is not whole at the end.
    """
    from mlpmatch_pl.preparation.options import read_options
    from mlpmatch_pl.preparation.run import prepare_dataset

    values = cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True))
    prepare_dataset(read_options(values))


# The folder of its own keeps the group dataset/ out of the search path: `dataset=voc` is a plain name here.
_CONFIG_FOLDER = str(files("mlpmatch_pl.conf") / "prepare")
_CONFIG_NAME = "prepare/prepare"  # as seen from mlpmatch_pl.conf, where the nearest key of a mistyped one is looked up


@hydra.main(version_base="1.3", config_path=_CONFIG_FOLDER, config_name="prepare")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> None:
    with guarded(_CONFIG_NAME):
        try:
            prepare(cfg)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1, an interruption with 130."""
    with guarded(_CONFIG_NAME):
        _hydra_main()


if __name__ == "__main__":
    main()

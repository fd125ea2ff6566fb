"""Suggest which images to label next: a few that represent all the others.

Writes suggested.txt, the best image first, as dataset.labeled takes it, and suggested.png, a sheet of these images.
Without a checkpoint, a pretrained encoder compares the images of a folder. With one, the encoder of that training
compares the images that it had no labels for, and an image counts more the less certain the predictions on it are.

Examples:
    python -m mlpmatch_pl.suggest input=photos count=20
    python -m mlpmatch_pl.suggest checkpoint=runs/x/checkpoints/best.ckpt output=second
    python -m mlpmatch_pl.suggest checkpoint=runs/x/checkpoints/best.ckpt dataset.root=/data/mine  # the data has moved
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from mlpmatch_pl.commands.cli import added_keys, plain, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def suggest(cfg: DictConfig) -> list[str]:
    """Suggest images with a composed configuration.

    Args:
        cfg: As composed from ``conf/suggest.yaml``.

    Returns:
        The names of the suggested images, the best one first.

    Raises:
        UserError: If the configuration is wrong, there are too few images that can be read, or a file exists.
    """
    from mlpmatch_pl.commands.suggest.run import SuggestOptions, run
    from mlpmatch_pl.utils.validation import read_options

    return run(read_options(SuggestOptions, plain(cfg)))


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    sys.argv[1:] = added_keys(sys.argv[1:])
    run_command("suggest", suggest, __doc__)


if __name__ == "__main__":
    main()

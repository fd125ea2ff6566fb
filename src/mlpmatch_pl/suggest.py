"""Suggest which images to label next: few that represent all others.

Writes suggested.txt, the best one first, which dataset.labeled takes, and suggested.png with these images. Without a
checkpoint, an encoder with ImageNet weights compares the images. With one, its encoder compares them, images count the
more the less certain its predictions are, and those that its training had labels for are not suggested again.

Examples:
    python -m mlpmatch_pl.suggest input=photos count=20                                     # nothing is labeled yet
    python -m mlpmatch_pl.suggest input=photos labeled=labeled.txt                          # 20 more
    python -m mlpmatch_pl.suggest input=photos checkpoint=runs/x/checkpoints/best.ckpt output=second
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpmatch_pl.commands.cli import plain, run_command

if TYPE_CHECKING:
    from pathlib import Path

    from omegaconf import DictConfig


def suggest(cfg: DictConfig) -> list[Path]:
    """Suggest images with a composed configuration.

    Args:
        cfg: As composed from ``conf/suggest.yaml``.

    Returns:
        The suggested images, the best one first.

    Raises:
        UserError: If the configuration is wrong, there are too few images, one cannot be read, or a file exists.
    """
    from mlpmatch_pl.commands.suggest.run import SuggestOptions, run
    from mlpmatch_pl.utils.validation import read_options

    return run(read_options(SuggestOptions, plain(cfg)))


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    run_command("suggest", suggest, __doc__)


if __name__ == "__main__":
    main()

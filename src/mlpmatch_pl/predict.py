"""Predict the class of each pixel of image files with a trained network.

The same command continues where it was interrupted; overwrite=missing predicts only new images.
Images that cannot be read are skipped and named at the end; the exit code is then 1. In Python:
mlpmatch_pl.load("best.ckpt").predict("a.jpg").

Examples:
    python -m mlpmatch_pl.predict checkpoint=runs/x/checkpoints/best.ckpt input=photos output=predictions
    python -m mlpmatch_pl.predict checkpoint=best.ckpt input='photos/**/*.jpg' output=masks save=index
    python -m mlpmatch_pl.predict checkpoint=best.ckpt input=a.jpg output=p inference.mode=slide inference.window=513
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mlpmatch_pl.commands.cli import plain, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def predict(cfg: DictConfig) -> None:
    """Predict the images that a composed configuration names.

    Args:
        cfg: As composed from ``conf/predict.yaml``.

    Raises:
        UserError: If the configuration is wrong; if some images could not be read, after the others are written.
    """
    from mlpmatch_pl.commands.predict.run import PredictOptions, run
    from mlpmatch_pl.utils.validation import read_options

    run(read_options(PredictOptions, plain(cfg)))


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    run_command("predict", predict, __doc__)


if __name__ == "__main__":
    main()

"""Check the data of a training, before training.

Takes the overrides of mlpmatch_pl.train. Reads every file once; prints what is in the data and what is wrong with it
(check.json), and writes the lists of the split and a picture of the training views.

Examples:
    python -m mlpmatch_pl.check dataset=folder dataset.root=my_images 'dataset.classes=[road,sky]'
    python -m mlpmatch_pl.check experiment=voc_92_r50
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlpmatch_pl.commands.cli import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def check(cfg: DictConfig) -> dict[str, Any]:
    """Check the data of a composed configuration.

    Args:
        cfg: As composed from ``conf/check.yaml``; outside of Hydra's command line, set ``output_dir``.

    Returns:
        The content of check.json: errors, warnings, sizes and classes of each set, mean and standard deviation of the
        channels.

    Raises:
        UserError: If the data cannot be described, or ``output_dir`` holds a run or an earlier check; if there are
            errors in the data, after everything is written.
    """
    from mlpmatch_pl.commands.check import run

    return run(cfg)


def main() -> None:
    """Run the command; wrong data ends with one line and exit code 1."""
    run_command("check", check, __doc__)


if __name__ == "__main__":
    main()

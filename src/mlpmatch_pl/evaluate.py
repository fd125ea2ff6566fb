"""Evaluate a checkpoint on the test or validation images of its own run, or on another dataset.

    python -m mlpmatch_pl.evaluate checkpoint=runs/x/checkpoints/best.ckpt                  # the run's own test images
    python -m mlpmatch_pl.evaluate checkpoint=... part=val inference.flip=true 'inference.scales=[0.75,1.0,1.25]'
    python -m mlpmatch_pl.evaluate checkpoint=... inference.mode=slide inference.window=801
    python -m mlpmatch_pl.evaluate checkpoint=... dataset.root=/data/mine                   # the data has moved
    python -m mlpmatch_pl.evaluate checkpoint=... dataset=camvid dataset.root=/data/camvid  # another dataset
    python -m mlpmatch_pl.evaluate checkpoint=... devices=4                                 # several GPUs
    python -m mlpmatch_pl.evaluate -m checkpoint=a.ckpt,b.ckpt                              # several checkpoints

Prints a table of the classes and writes metrics.json, the tables as CSV, the confusion matrix, the mean IoU of each
image, and the worst images. Heavy imports are inside `evaluate`, so that ``--help`` and ``--cfg job`` are fast.
"""

import sys
from collections.abc import Sequence
from typing import Any

import hydra
from omegaconf import DictConfig

from mlpmatch_pl.commands.cli import guarded_job, literal_paths, run_command


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate with a composed configuration.

    Args:
        cfg: As composed from ``conf/evaluate.yaml``.

    Returns:
        The content of metrics.json: the scores, overall and per class, the images and the options.

    Raises:
        UserError: If the configuration, the checkpoint or the dataset is wrong, before anything is written.
    """
    from mlpmatch_pl.commands.evaluate.run import run

    return run(cfg)


@hydra.main(version_base="1.3", config_path="pkg://mlpmatch_pl.conf", config_name="evaluate")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    with guarded_job("evaluate"):
        cfg.output = HydraConfig.get().runtime.output_dir  # each job of a sweep has its own folder
        evaluate(cfg)


def added_keys(arguments: Sequence[str]) -> list[str]:
    """Prefix keys of the run's own dataset with ``+``: the composed configuration does not have them.

    Example:
        >>> added_keys(["dataset.root=/data", "part=val"]), added_keys(["dataset=camvid", "dataset.root=/data"])
        (['+dataset.root=/data', 'part=val'], ['dataset=camvid', 'dataset.root=/data'])
    """
    if any(argument.startswith("dataset=") for argument in arguments):
        return list(arguments)
    return [f"+{argument}" if argument.startswith("dataset.") else argument for argument in arguments]


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    sys.argv[1:] = added_keys(literal_paths(sys.argv[1:]))
    run_command("evaluate", _hydra_main)


if __name__ == "__main__":
    main()

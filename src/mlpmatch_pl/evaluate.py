"""Evaluate a checkpoint on the test or validation images of its own run, or on another dataset.

Prints a table of the classes. Writes metrics.json, the tables as CSV, the confusion matrix, the mean IoU of each image,
and the worst images. dataset.KEY=VALUE changes single keys of the run's dataset, dataset=NAME selects another one.

Examples:
    python -m mlpmatch_pl.evaluate checkpoint=runs/x/checkpoints/best.ckpt
    python -m mlpmatch_pl.evaluate checkpoint=best.ckpt part=val inference.flip=true 'inference.scales=[0.75,1.0,1.25]'
    python -m mlpmatch_pl.evaluate checkpoint=best.ckpt inference.mode=slide inference.window=801
    python -m mlpmatch_pl.evaluate checkpoint=best.ckpt dataset.root=/data/mine                # the data has moved
    python -m mlpmatch_pl.evaluate checkpoint=best.ckpt dataset=camvid dataset.root=/data/camvid
    python -m mlpmatch_pl.evaluate checkpoint=best.ckpt devices=4                              # several GPUs
    python -m mlpmatch_pl.evaluate -m checkpoint=a.ckpt,b.ckpt
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from mlpmatch_pl.commands.cli import added_keys, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluate with a composed configuration.

    Args:
        cfg: As composed from ``conf/evaluate.yaml``.

    Returns:
        The content of metrics.json: the scores, overall and per class, and what was evaluated how.

    Raises:
        UserError: If the configuration, the checkpoint or the data is wrong, before any existing file is changed.
    """
    from mlpmatch_pl.commands.evaluate.run import run

    return run(cfg)


def _evaluate_job(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig

    cfg.output = HydraConfig.get().runtime.output_dir  # a job of a sweep has its own folder
    evaluate(cfg)


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    sys.argv[1:] = added_keys(sys.argv[1:])
    run_command("evaluate", _evaluate_job, __doc__)


if __name__ == "__main__":
    main()

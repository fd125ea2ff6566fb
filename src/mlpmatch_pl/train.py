"""Train a network with few labeled and many unlabeled images.

Writes a run folder with checkpoints, metrics, pictures of predictions and the configuration. Without arguments it
trains on embedded data, in a few minutes on a CPU.

Examples:
    python -m mlpmatch_pl.train
    python -m mlpmatch_pl.train dataset=folder dataset.root=my_images 'dataset.classes=[road,sky]' dataset.labeled=20
    python -m mlpmatch_pl.train experiment=voc_92_r50 trainer=gpu trainer.devices=4    # 4 GPUs, DDP
    python -m mlpmatch_pl.train hydra.run.dir=runs/mine resume=auto                    # resume a run, or start it
    python -m mlpmatch_pl.train -m method=supervised,mlpmatch seed=0,1,2               # a sweep of 6 runs
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpmatch_pl.commands.cli import run_command
from mlpmatch_pl.commands.sweep import run_job, summary

if TYPE_CHECKING:
    from omegaconf import DictConfig


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train with a composed configuration.

    Args:
        cfg: As composed from ``conf/train.yaml``; outside of Hydra's command line, set ``output_dir``.

    Returns:
        The content of metrics.json: final metrics, name and hash of the split, times, versions.

    Raises:
        UserError: If the configuration or the data is wrong, before any existing file is changed.
    """
    from mlpmatch_pl.commands.train import run

    return run(cfg)


def _best_miou(cfg: DictConfig) -> float:
    """Return what a sweeper such as Optuna maximizes."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job(cfg, Path(HydraConfig.get().runtime.output_dir))
    best: float = train(cfg)["best"]["val/miou"]
    return best


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1, and a sweep with a summary."""
    with summary(sys.argv[1:]):
        run_command("train", _best_miou, __doc__)


if __name__ == "__main__":
    main()

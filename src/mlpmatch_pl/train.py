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

import os
import sys
from typing import TYPE_CHECKING, Any

from mlpmatch_pl.commands.cli import run_command

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
    best: float = train(cfg)["best"]["val/miou"]
    return best


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    arguments = sys.argv[1:]
    run_command("train", _best_miou, __doc__)
    if {"-m", "--multirun"} & set(arguments):
        named = [argument.partition("=")[2] for argument in arguments if argument.startswith("hydra.sweep.dir=")]
        folder = named[-1] if named else f"multirun/{os.environ['MLPMATCH_STAMP']}"
        print(f"compare the runs: python -m mlpmatch_pl.report {folder}")


if __name__ == "__main__":
    main()

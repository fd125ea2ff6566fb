"""Train from the command line.

    python -m mlpmatch_pl.train                                             # embedded data, on a CPU
    python -m mlpmatch_pl.train dataset=folder dataset.root=my_images 'dataset.classes=[road,sky]' dataset.labeled=20
    python -m mlpmatch_pl.train -m method=supervised,mlpmatch seed=0,1,2    # a sweep
    python -m mlpmatch_pl.train trainer.devices=4                           # DDP
    python -m mlpmatch_pl.train hydra.run.dir=runs/mine resume=auto         # continue a run

Heavy imports are inside `train`, so that ``--help`` and ``--cfg job`` answer immediately.
"""

import os
import sys
from typing import Any

import hydra
from omegaconf import DictConfig

from mlpmatch_pl.commands.cli import guarded_job, run_command, sweep_folder


def train(cfg: DictConfig) -> dict[str, Any]:
    """Train with a composed configuration.

    Args:
        cfg: Composed from ``conf/train.yaml``; without Hydra's command line, ``output_dir`` must be set.

    Returns:
        The content of metrics.json: final metrics, name and hash of the split, times, versions.

    Raises:
        UserError: If the configuration or the data is invalid, before anything is overwritten.
    """
    from mlpmatch_pl.commands.train import run

    return run(cfg)


@hydra.main(version_base="1.3", config_path="pkg://mlpmatch_pl.conf", config_name="train")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> float | None:
    with guarded_job("train"):
        best: float | None = train(cfg)["best"]["val/miou"]
        return best  # what a sweeper such as Optuna maximizes
    return None


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    run_command("train", _hydra_main)
    if folder := sweep_folder(sys.argv[1:], os.environ):
        print(f"compare the runs: python -m mlpmatch_pl.report {folder}")


if __name__ == "__main__":
    main()

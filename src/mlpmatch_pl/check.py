"""Check the data of a training, before training.

    python -m mlpmatch_pl.check dataset=folder dataset.root=my_images 'dataset.classes=[road,sky]'
    python -m mlpmatch_pl.check experiment=voc_92_r50

Takes the overrides that ``mlpmatch_pl.train`` takes. Reads every file once; prints and writes what is in the data and
what is wrong with it (check.json), the lists of the split, and a picture of the views that training will see.
"""

from typing import Any

import hydra
from omegaconf import DictConfig

from mlpmatch_pl.commands.cli import guarded_job, run_command


def check(cfg: DictConfig) -> dict[str, Any]:
    """Check the data of a composed configuration.

    Args:
        cfg: As composed from ``conf/check.yaml``; outside of Hydra's command line, ``output_dir`` must be set.

    Returns:
        What check.json holds: errors, warnings, sizes and classes of each set, mean and deviation of the channels.

    Raises:
        UserError: If the data cannot be described, or ``output_dir`` holds a run or an earlier check; or after
            everything has been written, if there are errors in the data.
    """
    from mlpmatch_pl.commands.check import run

    return run(cfg)


@hydra.main(version_base="1.3", config_path="pkg://mlpmatch_pl.conf", config_name="check")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> None:
    with guarded_job("check"):
        check(cfg)


def main() -> None:
    """Run the command; wrong data ends with one line and exit code 1."""
    run_command("check", _hydra_main)


if __name__ == "__main__":
    main()

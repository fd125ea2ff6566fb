"""Measure how fast a training is on this machine, and what slows it down.

Takes the overrides of mlpmatch_pl.train. Runs some steps of that training, discards them, and prints and writes
(benchmark.json) images per second, data wait, memory, the time of the whole training, and what to change first.

Examples:
    python -m mlpmatch_pl.benchmark dataset=folder dataset.root=my_images 'dataset.classes=[road,sky]'
    python -m mlpmatch_pl.benchmark experiment=voc_92_r50 trainer=gpu loader.num_workers=8
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlpmatch_pl.commands.cli import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def benchmark(cfg: DictConfig) -> dict[str, Any]:
    """Measure the training of a composed configuration.

    Args:
        cfg: As composed from ``conf/benchmark.yaml``; outside of Hydra's command line, set ``output_dir``.

    Returns:
        The content of benchmark.json.

    Raises:
        UserError: If the configuration or the data is wrong, ``output_dir`` already holds a benchmark.json, or a batch
            does not fit on the device.
    """
    from mlpmatch_pl.commands.benchmark.run import run

    return run(cfg)


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    run_command("benchmark", benchmark, __doc__)


if __name__ == "__main__":
    main()

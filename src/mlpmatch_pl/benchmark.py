"""How fast will this training be here, and what slows it down?

    python -m mlpmatch_pl.benchmark dataset=folder dataset.root=my_images 'dataset.classes=[road,sky]'
    python -m mlpmatch_pl.benchmark experiment=voc_92_r50 trainer=gpu loader.num_workers=8

Takes the overrides of ``mlpmatch_pl.train``. Runs some steps of that training, discards them, and prints and writes
(benchmark.json) images per second, data wait, memory, the time of the whole training, and what to change first.
"""

from typing import Any

import hydra
from omegaconf import DictConfig

from mlpmatch_pl.commands.cli import guarded_job, run_command


def benchmark(cfg: DictConfig) -> dict[str, Any]:
    """Measure the training of a composed configuration.

    Args:
        cfg: As composed from ``conf/benchmark.yaml``; without Hydra's command line, ``output_dir`` must be set.

    Returns:
        The content of benchmark.json.

    Raises:
        UserError: If the configuration or the data is wrong, ``output_dir`` has a benchmark.json, or a batch does not
            fit into the memory of the device.
    """
    from mlpmatch_pl.commands.benchmark.run import run

    return run(cfg)


@hydra.main(version_base="1.3", config_path="pkg://mlpmatch_pl.conf", config_name="benchmark")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> None:
    with guarded_job("benchmark"):
        benchmark(cfg)


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1."""
    run_command("benchmark", _hydra_main)


if __name__ == "__main__":
    main()

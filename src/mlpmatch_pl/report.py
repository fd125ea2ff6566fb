"""Report runs: tables, plots and one HTML page from run folders.

    python -m mlpmatch_pl.report runs                               # every run below runs/
    python -m mlpmatch_pl.report multirun/2026-01-31_12-00-00 runs/mine output=reports/mine
    python -m mlpmatch_pl.report runs=[multirun/a,runs/b] pool_splits=true  # mean over split seeds, too

Reads what is there: trainings may still be running, may have failed, or be half written. Needs neither torch nor
Lightning. Heavy imports are inside `report`, so that ``--help`` and ``--cfg job`` answer at once.
"""

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import hydra
from omegaconf import DictConfig, OmegaConf

from mlpmatch_pl.commands.cli import guarded_job, literal_paths, run_command


def report(cfg: DictConfig) -> bool:
    """Write the report of a composed configuration, and print its tables.

    Args:
        cfg: As composed from ``conf/report.yaml``.

    Returns:
        Whether all files could be read.

    Raises:
        UserError: If the configuration is wrong, or there is nothing to report.
    """
    from mlpmatch_pl.commands.report.run import Options, write_report
    from mlpmatch_pl.utils.validation import read_options

    result = write_report(read_options(Options, OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)))
    result.show()
    if result.broken:
        print("error: some files are broken, see the table of problems", file=sys.stderr)
    return not result.broken


@hydra.main(version_base="1.3", config_path="pkg://mlpmatch_pl.conf", config_name="report")  # type: ignore[untyped-decorator]
def _hydra_main(cfg: DictConfig) -> None:
    with guarded_job("report"):
        if not report(cfg):
            sys.exit(1)


def named_folders(arguments: Sequence[str]) -> list[str]:
    """Turn folders among a command's arguments into ``runs=[...]``, and quote paths for Hydra.

    Example:
        >>> named_folders(["multirun/a", "runs/b", "output=x", "--cfg", "job"])
        ["runs=['multirun/a','runs/b']", "output='x'", '--cfg', 'job']
        >>> named_folders(["runs=multirun/a, b"]), named_folders(["runs=[a,b]"])
        (["runs='multirun/a, b'"], ['runs=[a,b]'])
    """
    folders, others = [], []
    for before, argument in pairwise(["", *arguments]):
        is_option = argument.startswith("-") or before.startswith("-")
        if is_option or ("=" in argument and not Path(argument).is_dir()):
            others += [argument] if argument.startswith("runs=[") else literal_paths([argument], ("runs", "output"))
        else:
            folders += [quoted.removeprefix("runs=") for quoted in literal_paths([f"runs={argument}"], ("runs",))]
    return [f"runs=[{','.join(folders)}]", *others] if folders else others


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1, and so do broken files, after all the rest."""
    sys.argv[1:] = named_folders(sys.argv[1:])
    run_command("report", _hydra_main)


if __name__ == "__main__":
    main()

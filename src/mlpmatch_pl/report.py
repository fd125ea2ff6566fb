"""Report runs: tables, plots and one page from the folders that trainings wrote.

    python -m mlpmatch_pl.report runs                                        # every run below runs/
    python -m mlpmatch_pl.report multirun/2026-01-31_12-00-00 runs/mine output=reports/mine
    python -m mlpmatch_pl.report runs pool_splits=true                       # mean over split seeds, too

Reads what is there: trainings may go on meanwhile, may have failed, or be half written.
"""

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlpmatch_pl.commands.cli import guarded
from mlpmatch_pl.utils.errors import UserError, suggest

if TYPE_CHECKING:
    from mlpmatch_pl.commands.report.run import Options

_HELP = """options:
  output=FOLDER      where to write; reports/<time> if left out
  overwrite=true     replace a report that is there
  pool_splits=true   average over seeded splits of one size, 1/8 (seed 0) and 1/8 (seed 1); else each split is a row
  pictures=3         prediction pictures of a run; 0 for none

writes report.html (everything, in one file), summary.md, summary.csv (mean, deviation and number of runs of every
score), runs.csv (a run a line), miou_*.svg and curves_*.svg

Runs are averaged if they differ in nothing but their seed: every other key in which runs of a data set differ is a
column, and labeled lists are told apart by their hash. Exit code 1 if a file is broken; all else is reported."""
_OPTIONS = ("output", "overwrite", "pool_splits", "pictures")


def read_arguments(arguments: Sequence[str]) -> "tuple[list[Path], Options]":
    """Tell folders from options.

    Args:
        arguments: Folders, and options as ``key=value``; what is there as a file or folder is never an option.

    Raises:
        UserError: If there is no folder, an option is unknown, or its value is wrong.

    Example:
        >>> folders, options = read_arguments(["runs", "output=out", "pictures=0"])
        >>> [str(folder) for folder in folders], str(options.output), options.pictures
        (['runs'], 'out', 0)
    """
    from mlpmatch_pl.commands.report.run import Options
    from mlpmatch_pl.utils.validation import read_options

    given: dict[str, Any] = {"output": f"reports/{time.strftime('%Y-%m-%d_%H-%M-%S')}"}
    folders = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key in _OPTIONS:
            given[key] = value if key == "output" else _plain(value)
        elif equals and not Path(argument).exists():
            raise UserError(f"there is no option {key}, only {', '.join(_OPTIONS)}.{suggest(key, _OPTIONS)}")
        else:
            folders.append(Path(argument))
    if not folders:
        raise UserError("expected a folder of runs, but got none; name one, as in: python -m mlpmatch_pl.report runs")
    return folders, read_options(Options, given)


def _plain(value: str) -> bool | int | str:
    """Read a value as YAML would."""
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    return int(value) if re.fullmatch(r"-?[0-9]{1,9}", value) else value


def report(arguments: Sequence[str]) -> int:
    """Report what the arguments name, print the tables, and return the exit code.

    Args:
        arguments: As on the command line.

    Raises:
        UserError: If the arguments are wrong, or there is nothing to report.
    """
    from mlpmatch_pl.commands.report.run import write_report
    from mlpmatch_pl.commands.report.terminal import show

    folders, options = read_arguments(arguments)
    result = write_report(folders, options)
    for table in result.tables:
        show(table)
    print(result.summary)
    print("\n".join(f"wrote {path}" for path in result.files))
    if result.broken:
        print("error: some files are broken, see the table of problems", file=sys.stderr)
    return int(result.broken)


def main() -> None:
    """Run the command; wrong input ends with one line and exit code 1, and so do broken files, after all the rest."""
    parser = argparse.ArgumentParser(
        "python -m mlpmatch_pl.report",
        description="Report runs: tables of mean and deviation, plots, and one page.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("arguments", nargs="*", metavar="FOLDER", help="run folders, or folders with runs below")
    arguments = parser.parse_args().arguments
    with guarded("train"):
        sys.exit(report(arguments))


if __name__ == "__main__":
    main()

"""The command line: ``mlpmatch train ...`` is ``python -m mlpmatch_pl.train ...``."""

import runpy
import sys
from importlib import import_module

from mlpmatch_pl.utils.errors import suggest

COMMANDS = ("train", "check", "evaluate", "predict", "suggest", "export", "report", "prepare", "benchmark")


def main() -> None:
    """Run the command that the first argument names; without one, print the commands."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print("Usage: mlpmatch COMMAND KEY=VALUE ...\n")
        for name in COMMANDS:
            doc = import_module(f"mlpmatch_pl.{name}").__doc__ or ""
            print(f"  {name:<10} {doc.partition(chr(10))[0]}")
        print("\nmlpmatch COMMAND --help explains a command.")
    elif command in COMMANDS:
        sys.argv[1:] = arguments
        # As __main__ with its own spec, so that Lightning starts the other processes of a run with python -m.
        runpy.run_module(f"mlpmatch_pl.{command}", run_name="__main__", alter_sys=True)
    else:
        sys.exit(f"error: there is no command {command}, only {', '.join(COMMANDS)}.{suggest(command, COMMANDS)}")


if __name__ == "__main__":
    main()

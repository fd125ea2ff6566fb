"""Commands that a notebook starts, in the notebook's own process, which has imported the package."""

import contextlib
import io
import os
import runpy
import sys
from subprocess import CalledProcessError, CompletedProcess


def run_here(command, cwd, **options):
    """Do what `subprocess.run` does with ``python -m MODULE`` or ``python FILE``, without a new process."""
    assert (command[0], options["capture_output"], options["text"]) == (sys.executable, True, True)
    before, arguments, out, err, code = os.getcwd(), sys.argv, io.StringIO(), io.StringIO(), 0
    is_module = command[1] == "-m"
    sys.argv = list(command[2 if is_module else 1 :])
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if is_module:
                runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
            else:
                runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os.chdir(before)
        sys.argv = arguments
        os.environ.pop("MLPMATCH_STAMP", None)
    if options["check"] and code:
        raise CalledProcessError(code, command, out.getvalue(), err.getvalue())
    return CompletedProcess(command, code, out.getvalue(), err.getvalue())

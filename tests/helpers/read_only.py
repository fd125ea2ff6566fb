"""Run commands in one process in which a folder cannot be changed: ``FOLDER MODULE ARGUMENTS -- MODULE ARGUMENTS``."""

import os
import runpy
import sys

CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}


def seal(root: str) -> None:
    """Refuse every change below a folder until the process ends."""

    def refuse(event, arguments):
        if event == "open":
            path, _, flags = arguments
            changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        else:
            path, changes = (arguments or [None])[0], event in CHANGES
        if not changes or not isinstance(path, (str, bytes, os.PathLike)):
            return
        if os.path.abspath(os.fsdecode(path)).startswith(root):
            raise OSError(30, "Read-only file system", os.fsdecode(path))

    sys.addaudithook(refuse)


if __name__ == "__main__":
    seal(sys.argv[1])
    for command in " ".join(sys.argv[2:]).split(" -- "):
        module, *sys.argv[1:] = command.split()
        runpy.run_module(module, run_name="__main__", alter_sys=True)

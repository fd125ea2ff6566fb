"""Run the commands of a page and write their output below them.

    python docs/transcripts.py                    # all blocks of docs/commands.md, in a few minutes on a CPU

A ``console`` block contains ``$ command``, which is kept, and its output, which is replaced. The commands run in order
in a new folder, in which ``my_images`` (with masks) and ``photos`` contain generated scenes. Values that differ between
runs are written as ``<time>``, ``<date>``, ``<rate>``, ``<share>`` or ``<device>``.
"""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mlpmatch_pl.data.datasets.shapes import Shapes

PAGE = Path(__file__).with_name("commands.md")
_BLOCK = re.compile(r"```console\n\$ (?P<command>(?:.*\\\n)*.*)\n(?P<output>(?:.*\n)*?)```")
_NORMALIZED = (
    (r"\x1b\[[0-9;?]*[A-Za-z]", ""),
    (r"\d{4}-\d\d-\d\d[ _]\d\d[-:]\d\d([-:]\d\d(,\d+)?)?", "<date>"),
    (r"\b(left|trained) \d+(:\d\d)+", r"\1 <time>"),
    (r"\bimg/s \d+(\.\d+)?", "img/s <rate>"),
    (r"\bdata \d+%", "data <share>"),
    (r"\bin (\d+(:\d\d)+|\d+(\.\d+)? s)\b", "in <time>"),
    (r"\b\d+(\.\d+)? a second", "<rate> a second"),
    (r"\b\d+ x \S+, \d+ threads", "<device>"),
    (r" +$", ""),
)


def outputs(page: str) -> dict[str, str]:
    """Map the commands of a page, in order, to their output."""
    return {match["command"]: match["output"] for match in _BLOCK.finditer(page)}


def write_images(folder: Path) -> None:
    """Write generated scenes as files: 12 images with 8 masks, and 4 photos."""
    scenes = Shapes("files", count=16, size=96)
    for index in range(16):
        part = "photos" if index >= 12 else "my_images/images"
        _save(scenes.image(index), folder / part / f"scene{index:02}.png")
        if index < 8:
            _save(scenes.mask(index), folder / "my_images/masks" / f"scene{index:02}.png")


def _save(pixels: NDArray[np.uint8], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def run(command: str, folder: Path) -> str:
    """Run a command and return its normalized output.

    Raises:
        RuntimeError: If it fails with anything but a one-line error.
    """
    arguments = [sys.executable if part == "python" else part for part in shlex.split(command.replace("\\\n", " "))]
    done = subprocess.run(
        arguments,
        cwd=folder,
        env={**os.environ, "COLUMNS": "110", "OMP_NUM_THREADS": "1", "TERM": "dumb"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode and not done.stdout.splitlines()[-1].startswith("error: "):
        raise RuntimeError(f"{command} ended with exit code {done.returncode}:\n{done.stdout}")
    return normalize(done.stdout, folder)


def normalize(text: str, folder: Path) -> str:
    """Replace paths, dates, times and rates.

    Example:
        >>> print(normalize("/tmp/x/runs/a  trained 1:02  img/s 31.5", Path("/tmp/x")), end="")
        runs/a  trained <time>  img/s <rate>
    """
    text = text.replace(f"{folder}/", "")
    for pattern, replacement in _NORMALIZED:
        text = re.sub(pattern, replacement, text, flags=re.M)
    return shorten(text.strip("\n") + "\n")


def shorten(text: str) -> str:
    r"""Shorten the jobs of a sweep after the first to their result.

    Example:
        >>> print(shorten("[HYDRA] #0\nloss\ntest mIoU 1\n[HYDRA] #1\nloss\ntest mIoU 2\n"), end="")
        [HYDRA] #0
        loss
        test mIoU 1
        [HYDRA] #1
        ...
        test mIoU 2
    """
    first, *others = re.split(r"^(?=.*\[HYDRA\]\s+#[1-9])", text, flags=re.M)
    return first + "".join(re.sub(r"\n(?s:.*?)\n(?=test mIoU)", r"\n...\n", other, count=1) for other in others)


def replace_output(page: str, command: str, output: str) -> str:
    r"""Return the page with the output of a command replaced.

    Example:
        >>> replace_output("```console\n$ true\nold\n```", "true", "new\n")
        '```console\n$ true\nnew\n```'
    """
    return _BLOCK.sub(
        lambda block: f"```console\n$ {command}\n{output}```" if block["command"] == command else block[0], page
    )


def main() -> None:
    """Rewrite the page, block by block."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        write_images(folder)
        for command in outputs(PAGE.read_text(encoding="utf-8")):
            print(f"$ {command}", flush=True)
            output = run(command, folder)
            PAGE.write_text(replace_output(PAGE.read_text(encoding="utf-8"), command, output), encoding="utf-8")


if __name__ == "__main__":
    main()

import importlib
import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before the first import of the package, and for child processes
os.environ["MPLBACKEND"] = "Agg"  # no window, should a dependency import matplotlib

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.images import save_image, save_mask

CLASSES = ("background", "road", "sky")
FOLDERS = ("", "day/", "night/late/")
LEVELS = 80  # gray levels between two classes in the images


def pytest_sessionstart():
    torch.set_num_threads(1)
    # A shell's background jobs ignore Ctrl-C, and so would the commands that are interrupted here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    data = os.environ.get("MLPMATCH_DATA")
    if not data or not Path(data).is_dir():
        _skip(items, "real_data", "set MLPMATCH_DATA to a folder with real data")
    if not torch.cuda.is_available():
        _skip(items, "gpu", "needs a CUDA device")


def _skip(items, marker, reason):
    for item in items:
        if marker in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def make_folder(tmp_path) -> Callable[..., Path]:
    """A factory of small data sets: img0.jpg, day/img1.png, night/late/img2.jpg, ... all of different sizes.

    Every image is a top and a bottom half of two classes (its gray level is 80 times the class), with a
    border of the ignore value; the first `masked` of `count` images have masks, palette and gray by turns.
    """

    def make(name: str = "data", count: int = 8, masked: int = 5, classes: int = 3) -> Path:
        root = tmp_path / name
        for index in range(count):
            height, width = 40 + 3 * index, 64 - 4 * index
            mask = np.full((height, width), index % classes, np.uint8)
            mask[height // 2 :] = (index + 1) % classes
            pixels = np.repeat((mask * LEVELS)[..., None], 3, axis=2)
            mask[:2] = 255
            stem = f"{FOLDERS[index % 3]}img{index}"
            save_image(root / "images" / f"{stem}{'.png' if index % 2 else '.jpg'}", pixels)
            if index < masked:
                save_mask(root / "masks" / f"{stem}.png", mask, palette=index % 2 == 0)
        return root

    return make


@pytest.fixture
def folder_root(make_folder) -> Path:
    """Eight images, five of them with masks, three classes."""
    return make_folder()


@pytest.fixture
def classes() -> tuple[str, ...]:
    """Class names of `folder_root`."""
    return CLASSES


@pytest.fixture
def real_data() -> Path:
    """Folder with real data, for tests marked `real_data`."""
    return Path(os.environ["MLPMATCH_DATA"])


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run a command's main in this process and in `tmp_path`; return its exit code, output and errors."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("MLPMATCH_STAMP", "stamp")
        monkeypatch.setattr("sys.argv", [name, *arguments])
        code = 0
        try:
            importlib.import_module(f"mlpmatch_pl.{name}").main()
        except SystemExit as ended:
            code = ended.code
        return code, *capsys.readouterr()

    return run

"""Data that may not be written, and output folders that cannot be: the system refuses, as an audit hook plays it.

(Permission bits do not bind the superuser, as whom tests often run.)
"""

import os
import subprocess
import sys

import pytest

READ_ONLY = """
import os, runpy, sys

root, module = sys.argv.pop(1), sys.argv.pop(1)
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod"}


def refuse(event, arguments):
    if event == "open":
        path, _, flags = arguments
        changes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    else:
        path, changes = (arguments or [None])[0], event in CHANGES
    if changes and isinstance(path, (str, bytes, os.PathLike)) and os.path.abspath(os.fsdecode(path)).startswith(root):
        raise OSError(30, "Read-only file system", os.fsdecode(path))


sys.addaudithook(refuse)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""
TRAINING = (
    "dataset=folder", "dataset.classes=[background,road,sky]", "dataset.val=1", "loader.crop_size=40",
    "loader.batch_size=2", "loader.unlabeled_batch_size=3", "schedule.steps=2", "backbone.decoder_channels=8",
    "loader.num_workers=1",
)  # fmt: skip


def run(read_only, module, *arguments, cwd):
    return subprocess.run(
        [sys.executable, "-c", READ_ONLY, str(read_only), f"mlpmatch_pl.{module}", *arguments],
        cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.mark.slow
def test_data_are_never_written(folder_root, tmp_path):
    data = f"dataset.root={folder_root}"
    checked = run(folder_root, "check", *TRAINING, data, "hydra.run.dir=checked", cwd=tmp_path)
    assert checked.returncode == 0, checked.stderr
    trained = run(folder_root, "train", *TRAINING, data, "loader.cache=cache", "hydra.run.dir=run", cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    checkpoint = tmp_path / "run/checkpoints/best.ckpt"
    photos = f"input={folder_root / 'images'}"
    predicted = run(folder_root, "predict", f"checkpoint={checkpoint}", photos, "output=masks", cwd=tmp_path)
    assert predicted.returncode == 0, predicted.stderr


@pytest.mark.parametrize("module", ["train", "check"])
def test_an_output_folder_that_cannot_be_written_is_named_in_one_line(module, folder_root, tmp_path):
    output = tmp_path / "sealed"
    done = run(
        output, module, *TRAINING, f"dataset.root={folder_root}", f"hydra.run.dir={output / 'run'}", cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: expected to be allowed to use {output / 'run'}, but the system refuses (Read-only file system); "
        "change its rights, or choose another folder"
    )
    assert "Traceback" not in done.stderr
    assert not output.exists()

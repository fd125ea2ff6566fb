"""Datasets and output folders that are read-only, simulated by an audit hook.

(Permission bits do not apply to the superuser, as whom tests often run.)
"""

from pathlib import Path

import helpers
import pytest
from helpers.processes import run_forked

TRAINING = (
    "dataset=folder", "dataset.classes=[background,road,sky]", "dataset.val=1", "loader.crop_size=40",
    "loader.batch_size=2", "loader.unlabeled_batch_size=3", "backbone=tiny", "schedule.steps=2", "decoder.channels=8",
    "loader.num_workers=1",
)  # fmt: skip


def run(read_only, *commands, cwd):
    arguments = " -- ".join(" ".join(["mlpmatch_pl." + command[0], *command[1:]]) for command in commands).split()
    folder = str(Path(helpers.__file__).parents[1])
    return run_forked(str(read_only), *arguments, cwd=cwd, module="helpers.read_only", PYTHONPATH=folder)


@pytest.mark.slow
def test_the_dataset_is_never_written_to(folder_root, tmp_path):
    data = f"dataset.root={folder_root}"
    done = run(
        folder_root,
        ("check", *TRAINING, data, "hydra.run.dir=checked"),
        ("train", *TRAINING, data, "loader.cache=cache", "hydra.run.dir=run"),
        ("predict", "checkpoint=run/checkpoints/best.ckpt", f"input={folder_root / 'images'}", "output=masks"),
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checked" / "check.json").is_file()
    assert len(list((tmp_path / "masks" / "index").rglob("*.png"))) == 8


def test_an_output_folder_that_cannot_be_written_is_named_in_one_line(folder_root, tmp_path):
    output = tmp_path / "sealed"
    command = ("train", *TRAINING, f"dataset.root={folder_root}", f"hydra.run.dir={output / 'run'}")
    done = run(output, command, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"error: expected access to {output / 'run'}, but the system denies it (Read-only file system); change its "
        "permissions, or choose another folder"
    )
    assert "Traceback" not in done.stderr
    assert not output.exists()

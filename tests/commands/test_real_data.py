"""Trainings on photos, in the folder that MLPMATCH_DATA names."""

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import run_forked
from PIL import Image

pytestmark = [pytest.mark.real_data, pytest.mark.slow]


def test_camvid_trains_from_its_recipe_with_local_weights(tmp_path):
    result = run_forked(
        "experiment=camvid_1-8_mobilenetv2",
        "loader.crop_size=64",
        "schedule.steps=3",
        "loader.batch_size=8",
        "+trainer.limit_train_batches=3",
        "+trainer.limit_val_batches=2",
        "+trainer.limit_test_batches=2",
        "hydra.run.dir=run",
        cwd=tmp_path,
        HOME=str(tmp_path),
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    assert "46 labeled images (1/8 (seed 0), sha256" in result.stdout
    assert "loaded 306 of 306 tensors" in result.stdout
    assert "W&B: offline" in result.stdout
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["labeled"]["count"] == 46
    assert metrics["unlabeled"] == 321


@pytest.fixture
def run_short(command, tmp_path):
    """Check and train by the commands, and return metrics.json."""
    return partial(_run_short, command, tmp_path)


def _run_short(command, tmp_path, *overrides):
    weights = Path(os.environ["MLPMATCH_DATA"]) / "weights" / "timm_mobilenetv2_100.pth"
    network = (
        "backbone=mobilenetv2_100",
        f"backbone.pretrained={weights}",
        "decoder.channels=32",
        "loader.batch_size=4",
        "schedule.epochs=null",
        "schedule.steps=3",
        "logger=csv",
    )
    code, _, errors = command("check", *network, *overrides, "hydra.run.dir=check")
    assert code == 0, errors
    assert (tmp_path / "check/views.png").is_file()
    short = ("+trainer.limit_train_batches=3", "+trainer.limit_val_batches=2", "+trainer.limit_test_batches=2")
    code, _, errors = command("train", *network, *short, *overrides, "hydra.run.dir=run")
    assert code == 0, errors
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert 0 <= metrics["test"]["test/miou"] <= 1
    return metrics


def test_voc_by_a_recipe_and_its_published_list(real_data, run_short):
    metrics = run_short(
        "experiment=voc_92_r50",
        f"dataset.root={real_data / 'voc2012'}",
        "loader.crop_size=65",
    )
    # The lists are cut to the available images, and the name says so.
    assert metrics["labeled"]["split"] == "voc/92, changed: not the published list"
    assert (metrics["labeled"]["count"], metrics["unlabeled"]) == (31, 149)


def test_cityscapes_by_its_recipe_and_seeded_split(real_data, run_short, tmp_path):
    root = make_cityscapes(real_data, tmp_path / "cityscapes")
    metrics = run_short(
        "experiment=cityscapes_1-16_r50",
        f"dataset.root={root}",
        "dataset.labeled=1/2",
        "dataset.cover_classes=true",
        "loader.crop_size=129",
        "objective.criterion.min_kept=1000",
    )
    assert metrics["labeled"]["split"] == "1/2 (seed 0, every class)"
    assert (metrics["labeled"]["count"], metrics["unlabeled"]) == (2, 2)


def make_cityscapes(real_data, root):
    """Make a set of half the original size in the original layout: parts of the one scene at hand, enlarged."""
    scene = real_data / "cityscapes_fixture"
    image = Image.open(next(scene.rglob("*_leftImg8bit.png")))
    ids = Image.open(next(scene.rglob("*_labelIds.png")))
    rng = np.random.default_rng(0)
    for part, count in (("train", 4), ("val", 1)):
        for number in range(count):
            left, top = rng.integers(0, 64), rng.integers(0, 32)
            box = (int(left), int(top), int(left) + 192, int(top) + 96)
            stem = f"{part}/zurich/zurich_{number:06}_000019"
            for folder, suffix, picture, how in (
                ("leftImg8bit", "leftImg8bit", image, Image.Resampling.BICUBIC),
                ("gtFine", "gtFine_labelIds", ids, Image.Resampling.NEAREST),
            ):
                path = root / folder / f"{stem}_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.resize((1024, 512), how, box=box).save(path, compress_level=1)
    return root

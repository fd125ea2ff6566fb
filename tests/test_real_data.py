"""On photos, where MLPMATCH_DATA names them."""

import json
import os
from pathlib import Path

import pytest
from helpers import compose_train, run_command

from mlpmatch_pl.train import train

pytestmark = [pytest.mark.real_data, pytest.mark.slow]

VOC = (
    "background,aeroplane,bicycle,bird,boat,bottle,bus,car,cat,chair,cow,diningtable,dog,horse,motorbike,person,"
    "pottedplant,sheep,sofa,train,tvmonitor"
)


def test_camvid_trains_from_its_recipe_with_local_weights(tmp_path):
    result = run_command(
        "experiment=camvid_1-8_mobilenetv2",
        "loader.crop_size=64",
        "schedule.steps=6",
        "loader.batch_size=8",
        "+trainer.limit_train_batches=6",
        "+trainer.limit_val_batches=5",
        "+trainer.limit_test_batches=5",
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


def test_voc_animals_trains_with_a_published_list(tmp_path):
    root = Path(os.environ["MLPMATCH_DATA"]) / "voc_animals_320"
    cfg = compose_train(
        "dataset=folder",
        f"dataset.root={root}",
        f"dataset.classes=[{VOC}]",
        "dataset.labeled=splits/92/labeled.txt",
        "dataset.unlabeled=splits/92/unlabeled.txt",
        "dataset.val=splits/val.txt",
        "loader.crop_size=65",
        "loader.batch_size=4",
        "schedule.steps=20",
        "+trainer.limit_train_batches=20",
        "+trainer.limit_val_batches=20",
        "+trainer.limit_test_batches=20",
        output_dir=tmp_path,
    )
    metrics = train(cfg)
    assert metrics["labeled"]["count"] == 31
    assert metrics["unlabeled"] == 1406
    assert metrics["steps"] == 20
    assert metrics["last"]["train/loss_x"] < 3.2  # ln(21) = 3.04

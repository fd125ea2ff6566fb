"""The commands on a practitioner's data: a folder of grayscale 16-bit TIFF files, of which a few have masks."""

import json
import re

import cv2
import numpy as np
import pytest
import tifffile
import torch
from helpers.images import save_mask

from mlpmatch_pl import MLPMatch
from mlpmatch_pl.data.dataset import image_tensor
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader

pytestmark = pytest.mark.slow

HEIGHT, WIDTH, MASKED, UNMASKED, EXTRA = 56, 72, 12, 4, 8


def scene(rng):
    """A dark background with bright disks and striped bars, as a microscope might see them."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    image = rng.normal(9000, 500, (HEIGHT, WIDTH))
    stripes = np.where(np.arange(WIDTH) % 6 < 3, 14000.0, 26000.0)[None].repeat(HEIGHT, 0)
    for label in (1, 2, 1, 2):
        x, y, size = int(rng.integers(8, WIDTH - 8)), int(rng.integers(8, HEIGHT - 8)), int(rng.integers(6, 12))
        inside = np.zeros_like(mask)
        if label == 1:
            cv2.circle(inside, (x, y), size, 1, -1)
        else:
            cv2.rectangle(inside, (x - size, y - size // 2), (x + size, y + size // 2), 1, -1)
        image = np.where(inside, 45000.0 if label == 1 else stripes, image)
        mask[inside > 0] = label
    return image.clip(0, 65535).astype(np.uint16), mask


@pytest.fixture
def overrides(tmp_path):
    rng, root, extra = np.random.default_rng(0), tmp_path / "data", tmp_path / "extra"
    (root / "images").mkdir(parents=True)
    extra.mkdir()
    for number in range(MASKED + UNMASKED):
        image, mask = scene(rng)
        tifffile.imwrite(root / f"images/slide {number}.tif", image)
        if number < MASKED:
            save_mask(root / f"masks/slide {number}.png", mask, palette=False)
    for number in range(EXTRA):
        tifffile.imwrite(extra / f"more{number}.tiff", scene(rng)[0], compression="zlib")
    return (
        "dataset=folder", f"dataset.root={root}", "dataset.classes=[background,disk,bar]", "dataset.in_chans=1",
        "dataset.bit_depth=16", f"dataset.unlabeled=[images,{extra}]", "dataset.labeled=6", "dataset.val=4",
        "loader.crop_size=48", "loader.batch_size=4", "loader.num_workers=0", "objective.confidence_threshold=0.8",
        "backbone=tiny", "schedule=demo",
    )  # fmt: skip


def test_from_check_to_masks(overrides, command, tmp_path):
    code, checked, _ = command("check", *overrides, "hydra.run.dir=check")
    assert code == 0
    report = json.loads((tmp_path / "check/check.json").read_text())
    assert {part: content["count"] for part, content in report["sets"].items()} == {
        "labeled": 6, "val": 4, "unlabeled": MASKED + UNMASKED - 6 - 4 + EXTRA,
    }  # fmt: skip
    assert report["errors"] == []

    code, _, errors = command("train", *overrides, "hydra.run.dir=run")
    assert code == 1
    assert "set backbone.mean and backbone.std, which 'python -m mlpmatch_pl.check' prints" in errors
    printed = re.search(r"(backbone\.mean=\S+) (backbone\.std=\S+)", checked)
    code, _, errors = command("train", *overrides, *printed.groups(), "schedule.steps=60", "hydra.run.dir=run")
    assert code == 0, errors
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    assert metrics["test"]["test/miou"] > 0.6
    assert 0 <= metrics["data_wait"] < 1
    assert len(list((tmp_path / "run/predictions").glob("*.png"))) == 4

    best = "checkpoint=run/checkpoints/best.ckpt"
    code, _, errors = command("predict", best, "input=extra", "output=masks", "save=index")
    assert code == 0, errors
    module = MLPMatch.load_from_checkpoint(tmp_path / "run/checkpoints/best.ckpt", map_location="cpu").eval()
    read_image, read_mask = ImageReader(in_chans=1, bit_depth=16), MaskReader()
    found = set()
    for path in sorted((tmp_path / "extra").iterdir()):
        back = read_mask(tmp_path / "masks/index" / f"{path.stem}.png")
        with torch.no_grad():
            expected = module(image_tensor(read_image(path))[None]).argmax(1)[0].numpy()
        assert (back == expected).mean() > 0.999  # another batch size may sum in another order
        found |= set(np.unique(back).tolist())
    assert found == {0, 1, 2}

import csv
import json

import numpy as np
import pytest
import torch
from conftest import save_mask
from helpers import TINY, compose_train
from PIL import Image

from mlpmatch_pl.bars import COLORS, bar_picture
from mlpmatch_pl.callbacks.diagnostics import PseudoLabelDiagnostics
from mlpmatch_pl.confusion_picture import confusion_picture
from mlpmatch_pl.data.folder import folder
from mlpmatch_pl.data.shapes import CLASS_NAMES, shapes
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.perturbation import NetworkPerturbation
from mlpmatch_pl.spread import spread
from mlpmatch_pl.train import train


def untrained(num_classes=6, threshold=0.2):
    torch.manual_seed(0)
    module = MLPMatch(num_classes, backbone="test_resnet", decoder_channels=8, confidence_threshold=threshold)
    return module.eval()


def plainly(module, data, indices):
    """Collect truth, prediction and confidence of all pixels of some images, one by one."""
    truths, labels, confidences = [], [], []
    for index in indices:
        image = torch.from_numpy(data.train.image(index)).permute(2, 0, 1)[None]
        with torch.no_grad():
            probabilities = torch.softmax(module(image)[0], 0).numpy()
        truths.append(data.train.mask(index).ravel())
        labels.append(probabilities.argmax(0).ravel())
        confidences.append(probabilities.max(0).ravel())
    return (np.concatenate(values) for values in (truths, labels, confidences))


def test_metrics_are_those_of_a_plain_count():
    data, module = shapes(labeled=3, train=9, val=1, test=1, size=48), untrained()
    truth, label, _ = plainly(module, data, data.labeled_indices)
    labeled_acc = (truth == label).mean()
    truth, label, confidence = plainly(module, data, [data.unlabeled[place] for place in (0, 2, 3, 5)])
    threshold = float(np.median(confidence))
    sure = confidence >= threshold
    measured = PseudoLabelDiagnostics(num_images=4).measure(untrained(threshold=threshold), data)
    expected = {
        "pseudo/labeled_acc": labeled_acc,
        "pseudo/unlabeled_acc": (truth == label).mean(),
        "pseudo/fitting_gap": labeled_acc - (truth == label).mean(),
        "pseudo/confident_ratio": sure.mean(),
        "pseudo/confident_acc": (truth == label)[sure].mean(),
    }
    for number, name in enumerate(data.class_names):
        chosen = sure & (label == number)
        if chosen.any():
            expected[f"pseudo/precision/{name}"] = (truth[chosen] == number).mean()
    assert measured.keys() == expected.keys()
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, abs=1e-4), name  # a pixel on the threshold may fall either way


def test_without_hidden_truth_only_the_labeled_images_are_measured(folder_root, classes):
    data = folder(str(folder_root), classes, labeled=4, val=1)
    assert set(PseudoLabelDiagnostics().measure(untrained(3), data)) == {"pseudo/labeled_acc"}


def test_hidden_masks_are_used_where_there_are_some_and_broken_ones_left_out(folder_root, classes, caplog):
    data = folder(str(folder_root), classes, labeled=2, val=1)
    hidden = [index for index in data.unlabeled if data.train.has_mask(index)]
    assert len(hidden) == 2
    whole = PseudoLabelDiagnostics().measure(untrained(3), data)
    assert "pseudo/fitting_gap" in whole
    path = folder_root / data.train.pair(hidden[0]).mask
    with Image.open(path) as file:
        save_mask(path, np.full_like(np.array(file), 9), palette=False)
    rest = PseudoLabelDiagnostics().measure(untrained(3), data)
    assert "left out of the diagnostics: expected mask values 0..2 or 255 (ignore)" in caplog.text
    assert rest["pseudo/labeled_acc"] == whole["pseudo/labeled_acc"]
    assert rest["pseudo/unlabeled_acc"] != whole["pseudo/unlabeled_acc"]


@pytest.mark.parametrize(("length", "count"), [(1, 4), (5, 5), (100, 7)])
def test_images_are_spread_evenly_and_come_once(length, count):
    taken = spread(range(length), count)
    assert len(taken) == len(set(taken)) == min(length, count)
    assert taken[0] == 0
    assert taken[-1] == length - 1 or count == 1


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """A short run with all that looks inside, logged to W&B offline."""
    run = tmp_path_factory.mktemp("inspected")
    overrides = ("callbacks=inspect", "callbacks.predictions.every_n_validations=1", "logger=wandb",
                 "logger.wandb.mode=offline", "schedule.steps=10", "schedule.lr=0.01")  # fmt: skip
    metrics = train(compose_train(*TINY, *overrides, output_dir=run))
    return run, metrics


def test_diagnostics_are_logged_after_every_validation(inspected):
    run, _ = inspected
    with (run / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["pseudo/fitting_gap"]]
    assert [row["epoch"] for row in rows] == ["0", "1"]
    for row in rows:
        gap = float(row["pseudo/labeled_acc"]) - float(row["pseudo/unlabeled_acc"])
        assert float(row["pseudo/fitting_gap"]) == pytest.approx(gap, abs=1e-6)


def test_every_draw_of_a_deactivated_block_is_counted(inspected):
    run, metrics = inspected
    report = json.loads((run / "deactivated.json").read_text())
    assert report["steps"] == metrics["steps"] == 10
    stages = MLPMatch(6, backbone="test_resnet", decoder_channels=8).segmentor.encoder.stages
    drawn = [next(iter(NetworkPerturbation("single_block", seed=0).draw(stages, step))) for step in range(10)]
    assert report["blocks"] == {str(block): drawn.count(block) for stage in stages for block in stage}
    assert sum(report["stages"]) == 10


def test_the_histogram_has_a_bar_for_every_block(inspected):
    run, _ = inspected
    blocks = json.loads((run / "deactivated.json").read_text())["blocks"]
    with Image.open(run / "deactivated.png") as picture:
        pixels = np.array(picture).reshape(-1, 3).tolist()
    assert (list(COLORS[0]) in pixels) == any(list(blocks.values())[:2])
    bars = bar_picture([[("a", 3), ("b", 1)], [("c", 0)]], "t")
    heights = [sum(bars.getpixel((x, y)) == COLORS[0] for y in range(bars.height)) for x in (8, 8 + 30, 8 + 60)]
    assert heights == [160, 53, 0]


def test_the_confusion_of_validation_and_test_is_drawn(inspected):
    run, _ = inspected
    for part in ("val", "test"):
        with Image.open(run / f"confusion_{part}.png") as picture:
            assert picture.size == confusion_picture(np.eye(6), CLASS_NAMES).size


def test_sheets_are_written_while_training_with_the_pseudo_labels(inspected):
    run, _ = inspected
    for step in ("step_000005", "step_000010"):
        sheets = sorted((run / "predictions" / step).glob("*.png"))
        assert len(sheets) == 2
        with Image.open(sheets[0]) as sheet:
            assert sheet.width == 5 * (320 + 8) + 8


def test_wandb_has_the_pictures_with_masks_and_the_metrics(inspected):
    run, _ = inspected
    (offline,) = (run / "wandb").glob("offline-run-*")
    for part, count in (("val", 2 * 2), ("test", 2)):
        assert len(list(offline.glob(f"files/media/images/{part}/predictions_*.png"))) == count
        masks = list(offline.glob(f"files/media/images/mask/{part}/predictions_*.png"))
        assert len(masks) == 2 * count  # truth and prediction
        with Image.open(masks[0]) as mask:
            assert np.array(mask).max() <= 5
    for part, count in (("val", 2), ("test", 1)):
        assert len(list(offline.glob(f"files/media/images/{part}/confusion_*.png"))) == count
    assert len(list(offline.glob("files/media/images/train/deactivated_blocks_*.png"))) == 1
    (record,) = offline.glob("*.wandb")
    content = record.read_bytes()
    for name in (b"pseudo/fitting_gap", b"class_labels", b"triangle"):
        assert name in content

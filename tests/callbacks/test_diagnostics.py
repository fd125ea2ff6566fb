import csv
import json
import struct

import numpy as np
import pytest
import torch
from helpers import TINY, compose_train
from helpers.checkpoints import make_module
from helpers.images import save_mask
from PIL import Image
from wandb.proto.wandb_internal_pb2 import Record

from mlpmatch_pl.callbacks.diagnostics import DeactivatedBlocks, PseudoLabelDiagnostics
from mlpmatch_pl.callbacks.images import PredictionPanels
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.datasets.shapes import CLASS_NAMES, shapes
from mlpmatch_pl.module import MLPMatch
from mlpmatch_pl.perturbation import NetworkPerturbation
from mlpmatch_pl.train import train
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.seeding import evenly_spaced
from mlpmatch_pl.visualization.plots import bar_plot, confusion_matrix_plot


def untrained(num_classes=6, threshold=0.2):
    torch.manual_seed(0)
    module = MLPMatch(num_classes, backbone="test_resnet", decoder={"channels": 8}, confidence_threshold=threshold)
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


def test_an_image_that_a_source_of_ones_own_cannot_read_is_left_out(caplog):
    data, module = shapes(labeled=3, train=9, val=1, test=1, size=48), untrained()
    lost, read = data.unlabeled[2], data.train.mask

    def mask(index):
        if index == lost:
            raise OSError("the disk is gone")
        return read(index)

    data.train.mask = mask
    measured = PseudoLabelDiagnostics().measure(module, data)
    assert f"{data.train.name(lost)} is left out of the diagnostics: the disk is gone" in caplog.text
    truth, label, _ = plainly(module, data, [index for index in data.unlabeled if index != lost])
    assert measured["pseudo/unlabeled_acc"] == pytest.approx((truth == label).mean(), abs=1e-4)


@pytest.mark.parametrize(("length", "count"), [(1, 4), (5, 5), (100, 7)])
def test_images_are_spread_evenly_and_come_once(length, count):
    taken = evenly_spaced(range(length), count)
    assert len(taken) == len(set(taken)) == min(length, count)
    assert taken[0] == 0
    assert taken[-1] == length - 1 or count == 1


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """A short run with all that looks inside, logged to W&B offline."""
    run = tmp_path_factory.mktemp("inspected")
    overrides = ("callbacks=inspect", "callbacks.predictions.every_n_validations=1", "logger=wandb",
                 "logger.wandb.mode=offline", "schedule.steps=10", "schedule.lr=0.01",
                 "objective.confidence_threshold=0.25")  # fmt: skip
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
    stages = MLPMatch(6, backbone="test_resnet", decoder={"channels": 8}).segmentor.encoder.stages
    drawn = [next(iter(NetworkPerturbation("single_block", seed=0).draw(stages, step))) for step in range(10)]
    assert report["blocks"] == {str(block): drawn.count(block) for stage in stages for block in stage}
    assert sum(report["stages"]) == 10


def test_no_block_is_deactivated_during_burn_in(tmp_path):
    callback, module = DeactivatedBlocks(str(tmp_path)), make_module(method="mlpmatch_burn_in")
    callback.on_train_batch_start(None, module, {"labeled": {"image": 0}, "unlabeled": {}}, 0)
    assert (callback.steps, callback.counts.total()) == (1, 0)
    callback.on_train_batch_start(None, module, {"labeled": {"image": 0}, "unlabeled": {"weak": 0}}, 1)
    assert (callback.steps, callback.counts.total()) == (2, 1)


def test_the_histogram_has_a_bar_for_every_block(inspected):
    run, _ = inspected
    blocks = json.loads((run / "deactivated.json").read_text())["blocks"]
    with Image.open(run / "deactivated.png") as picture:
        assert picture.size == bar_plot([list(blocks.items())], "title", "block", "steps").size


def test_the_confusion_of_validation_and_test_is_drawn(inspected):
    run, _ = inspected
    for part in ("val", "test"):
        with Image.open(run / f"confusion_{part}.png") as picture:
            assert picture.size == confusion_matrix_plot(np.eye(6), CLASS_NAMES).size


def test_sheets_are_written_while_training_with_the_pseudo_labels(inspected):
    run, _ = inspected
    for step in ("step_000005", "step_000010"):
        sheets = sorted((run / "predictions" / step).glob("*.png"))
        assert len(sheets) == 2
        with Image.open(sheets[0]) as sheet:
            assert sheet.width == 5 * (320 + 8) + 8


def offline_records(content):
    """Yield the records of a .wandb file: a head of 7 bytes, then pieces that end where a block of 32 KiB does."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if (rest := 32768 - place % 32768) < 7:
            place += rest
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)
        record += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or a last piece
            yield Record.FromString(record)
            record = b""


def logged_to_wandb(run):
    """Return what was logged to W&B, step by step, and the folder of the run's files."""
    (offline,) = (run / "wandb").glob("offline-run-*")
    (path,) = offline.glob("*.wandb")
    rows = []
    for record in offline_records(path.read_bytes()):
        row = {}
        for item in record.history.item:
            key, *rest = [item.key] if item.key else item.nested_key
            value = json.loads(item.value_json)
            row[key] = {**row.get(key, {}), rest[0]: value} if rest else value
        rows.append(row)
    return rows, offline / "files"


def test_wandb_has_the_metrics_and_every_picture_once(inspected):
    rows, files = logged_to_wandb(inspected[0])
    for part, count in (("val", 2), ("test", 1)):
        for kind in ("predictions", "confidence"):
            logged = [row[f"{part}/{kind}"] for row in rows if f"{part}/{kind}" in row]
            assert len(logged) == count
            assert all(len(entry["filenames"]) == 2 for entry in logged)
            assert len(list(files.glob(f"media/images/{part}/{kind}_*.png"))) == 2 * count
        assert len(list(files.glob(f"media/images/{part}/confusion_*.png"))) == count
    assert len([row for row in rows if "pseudo/fitting_gap" in row]) == 2


def test_the_histogram_is_in_wandb_after_every_validation(inspected):
    run, _ = inspected
    rows, files = logged_to_wandb(run)
    shown = [row for row in rows if "train/deactivated_blocks" in row]
    assert len(shown) == 2  # and not once more at the end, where nothing has changed
    pictures = [Image.open(files / row["train/deactivated_blocks"]["filenames"][0]).convert("RGB") for row in shown]
    with Image.open(run / "deactivated.png") as last:
        assert np.array_equal(pictures[1], last)
    assert not np.array_equal(pictures[0], pictures[1])


def test_wandb_has_truth_prediction_pseudo_label_and_confidence(inspected):
    run, _ = inspected
    rows, files = logged_to_wandb(run)
    data = shapes(labeled=4, train=24, val=5, test=3, size=48)
    module = MLPMatch.load_from_checkpoint(run / "checkpoints" / "last.ckpt").eval()
    threshold = module.hparams["confidence_threshold"]
    last = [row for row in rows if "val/predictions" in row][-1]["val/predictions"]
    grays = [row for row in rows if "val/confidence" in row][-1]["val/confidence"]["filenames"]
    for place, index in enumerate((0, 4)):
        image = torch.from_numpy(data.val.image(index)).permute(2, 0, 1)[None]
        with torch.no_grad():
            probabilities = torch.softmax(module(image)[0], 0).numpy()
        confidence, label = probabilities.max(0), probabilities.argmax(0)
        expected = {"truth": data.val.mask(index), "prediction": label}
        expected["pseudo_label"] = np.where(confidence >= threshold, label, 255)
        assert 0.01 < (confidence >= threshold).mean() < 0.99
        masks = last["all_masks"][place]
        assert masks.keys() == expected.keys()
        for name, values in expected.items():
            with Image.open(files / masks[name]["path"]) as mask:
                assert (np.array(mask) == values).mean() > 0.999, name
        with Image.open(files / grays[place]) as gray:
            assert gray.mode == "L"
            assert np.abs(np.array(gray) - confidence * 255).max() < 1.01


def test_a_resumed_run_writes_the_pictures_of_one_that_was_never_stopped(tmp_path):
    overrides = (
        "callbacks.predictions.every_n_validations=2", "callbacks.predictions.num_images=1", "resume=auto",
        "dataset.train=12",
    )  # fmt: skip

    def pictures(folder, *stop):
        train(compose_train(*TINY, "schedule.steps=8", *overrides, *stop, output_dir=folder))
        found = folder.glob("predictions/step_*/*.png")
        return {str(path.relative_to(folder)): path.read_bytes() for path in found}

    straight = pictures(tmp_path / "straight")
    assert sorted(name.split("/")[1] for name in straight) == ["step_000004", "step_000008"]
    stop = "+callbacks.stop._target_=helpers.StopAfterFirstEpoch"
    with_stop = tmp_path / "stopped"
    assert pictures(with_stop, stop) == {}
    (with_stop / "metrics.json").unlink()
    assert pictures(with_stop) == straight


def test_no_interval_between_pictures_is_refused():
    with pytest.raises(UserError, match="every_n_validations of at least 1, but got 0; null switches it off"):
        PredictionPanels("predictions", every_n_validations=0)

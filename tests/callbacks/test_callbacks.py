from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mlpmatch_pl.callbacks.checkpoints import best_and_last
from mlpmatch_pl.callbacks.progress import DataWait, Throughput
from mlpmatch_pl.evaluation import Scores
from mlpmatch_pl.evaluation.table import metrics_table
from mlpmatch_pl.visualization.panels import IGNORED_COLOR, MARGIN, TITLE, colorize, prediction_panels

COLORS = [(10, 0, 0), (0, 200, 0), (0, 0, 250)]


def test_colorize_maps_classes_and_leaves_the_rest_white():
    labels = np.array([[0, 1], [2, 255]])
    assert colorize(labels, COLORS).tolist() == [[[10, 0, 0], [0, 200, 0]], [[0, 0, 250], list(IGNORED_COLOR)]]


@pytest.mark.parametrize(("height", "width"), [(40, 60), (300, 700), (1, 1)])
def test_a_sheet_shows_image_truth_prediction_and_confidence_side_by_side(height, width):
    image = np.full((height, width, 3), 77, np.uint8)
    truth, label = np.full((height, width), 1), np.full((height, width), 2)
    sheet = prediction_panels(image, truth, label, np.full((height, width), 0.5), ["a", "b", "c"], COLORS)
    panel = (sheet.width - 5 * MARGIN) // 4
    centers = [(MARGIN + index * (panel + MARGIN) + panel // 2, TITLE + 5) for index in range(4)]
    assert [sheet.getpixel(center) for center in centers] == [(77, 77, 77), COLORS[1], COLORS[2], (127, 127, 127)]


def test_the_legend_has_every_class_even_when_they_need_several_rows():
    flat = np.zeros((20, 20), np.uint8)
    colors = [(index, 255 - index, 128) for index in range(40)]
    names = [f"a rather long class name {index}" for index in range(40)]
    sheet = prediction_panels(np.zeros((20, 20, 3), np.uint8), flat, flat, flat / 1.0, names, colors)
    pixels = set(map(tuple, np.asarray(sheet).reshape(-1, 3).tolist()))
    assert set(colors) <= pixels


def test_sheets_are_readable_files(tmp_path):
    flat = np.zeros((20, 20), np.uint8)
    prediction_panels(np.zeros((20, 20, 3), np.uint8), flat, flat, flat / 1.0, ["a", "b"], COLORS[:2]).save(
        tmp_path / "a.png"
    )
    assert Image.open(tmp_path / "a.png").mode == "RGB"


def test_throughput_counts_images_and_the_time_left(monkeypatch):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("mlpmatch_pl.callbacks.progress.time.monotonic", lambda: next(clock))
    throughput = Throughput(16, DataWait())
    assert throughput.describe(step=4, steps=100) == {}
    assert throughput.describe(step=24, steps=100) == {"img/s": "32.0", "data": "0%", "left": "0:38"}


def test_waiting_for_data_is_measured_without_validation(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("mlpmatch_pl.utils.timing.time.perf_counter", lambda: now[0])
    wait, module = DataWait(), SimpleNamespace(device=torch.device("cpu"))
    assert wait.share == 0

    def after(seconds, hook, *arguments):
        now[0] += seconds
        hook(None, module, *arguments)

    after(50, wait.on_train_epoch_start)  # what comes before does not count
    after(2, wait.on_train_batch_start, None, 0)
    after(6, wait.on_train_batch_end, None, None, 0)
    assert wait.share == 0.25
    after(70, wait.on_validation_end)
    after(1, wait.on_train_batch_start, None, 1)
    after(3, wait.on_train_batch_end, None, None, 1)
    assert wait.share == 0.25
    after(30, wait.on_train_epoch_start)
    after(12, wait.on_train_batch_start, None, 0)
    assert wait.share == 15 / 24


def test_the_table_names_absent_classes_and_means():
    counts = torch.tensor([[3, 1, 0], [0, 6, 0], [0, 0, 0]])
    table = metrics_table(counts, ["road", "sky", "moon"], "exclude", "title")
    moon = next(line for line in table.splitlines() if "moon" in line)
    assert "absent" in moon
    mean = next(line for line in table.splitlines() if "mean" in line)
    assert f"{100 * Scores.of(counts).miou:.2f}" in mean
    assert "87.50" in mean  # recall of 3/4 and 1


def test_two_checkpoints_with_fixed_names(tmp_path):
    best, last = best_and_last(str(tmp_path), "val/miou")
    assert (best.filename, last.path.name, best.monitor, best.mode) == ("best", "last.ckpt", "val/miou", "max")

import json

import numpy as np
import pytest
from PIL import Image

from mlpmatch_pl.visualization.panels import (
    FRAME,
    IGNORED_COLOR,
    LISTED,
    MARGIN,
    TITLE,
    colorize,
    contact_sheet,
    prediction_panels,
    read_panels,
    save_panels,
    to_rgb,
)

COLORS = [(10, 0, 0), (0, 200, 0), (0, 0, 250)]


def sheet_of_flat(height, width, **options):
    """An image of gray level 77 with truth 1, prediction 2 and confidence 0.5."""
    flat = np.ones((height, width), np.uint8)
    image = np.full((height, width, 3), 77, np.uint8)
    return prediction_panels(image, flat, 2 * flat, flat / 2, ["a", "b", "c"], COLORS, **options)


def test_colorize_maps_classes_to_colors_and_other_values_to_white():
    labels = np.array([[0, 1], [2, 255]])
    assert colorize(labels, COLORS).tolist() == [[[10, 0, 0], [0, 200, 0]], [[0, 0, 250], list(IGNORED_COLOR)]]


@pytest.mark.parametrize(("height", "width"), [(40, 60), (300, 700), (1, 1)])
def test_panels_show_image_truth_prediction_and_confidence_side_by_side(height, width):
    sheet = sheet_of_flat(height, width)
    panel = (sheet.width - 5 * MARGIN) // 4
    centers = [(MARGIN + index * (panel + MARGIN) + panel // 2, TITLE + 5) for index in range(4)]
    assert [sheet.getpixel(center) for center in centers] == [(77, 77, 77), COLORS[1], COLORS[2], (127, 127, 127)]


def test_a_white_panel_has_a_frame():
    white = np.full((400, 400), 255, np.uint8)
    image = np.repeat(white[..., None], 3, axis=2)
    sheet = prediction_panels(image, white, white, white / 255, ["a"], [(0, 0, 0)])
    assert sheet.getpixel((MARGIN - 1, TITLE + 9)) == sheet.getpixel((MARGIN + 400, TITLE + 9)) == FRAME
    assert sheet.getpixel((MARGIN, TITLE + 9)) == (255, 255, 255)


@pytest.mark.parametrize(("threshold", "color"), [(0.5, COLORS[2]), (0.6, IGNORED_COLOR)])
def test_a_threshold_adds_a_panel_of_the_predictions_that_reach_it(threshold, color, tmp_path):
    save_panels(sheet_of_flat(20, 30, threshold=threshold), tmp_path / "a.png")
    panels, classes = read_panels(tmp_path / "a.png")
    assert list(panels)[:3] == ["image", "truth", "prediction"]
    assert panels[f"pseudo-label (confidence >= {threshold})"].getpixel((5, 5)) == color
    assert classes == {"a": "#0a0000", "b": "#00c800", "c": "#0000fa"}


def test_other_png_files_have_no_panels(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert read_panels(tmp_path / "a.png") == ({}, {})


def test_the_legend_shows_every_class_also_in_several_rows():
    flat = np.zeros((20, 20), np.uint8)
    colors = [(index, 255 - index, 128) for index in range(LISTED)]
    names = [f"a rather long class name {index}" for index in range(LISTED)]
    sheet = prediction_panels(np.zeros((20, 20, 3), np.uint8), flat, flat, flat / 1.0, names, colors)
    assert set(colors) <= set(map(tuple, np.asarray(sheet).reshape(-1, 3).tolist()))


def test_the_legend_of_many_classes_lists_those_in_the_picture():
    truth = np.full((20, 20), 3, np.uint8)
    colors = [(index, 255 - index, 128) for index in range(40)]
    image, names = np.zeros((20, 20, 3), np.uint8), [str(index) for index in range(40)]
    sheet = prediction_panels(image, truth, truth + 4, truth / 3, names, colors)
    drawn = set(map(tuple, np.asarray(sheet).reshape(-1, 3).tolist()))
    assert drawn & set(colors) == {colors[3], colors[7]}
    assert set(json.loads(sheet.info["panels"])["classes"]) == {"3", "7"}


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint8), (2, np.uint16), (3, np.uint16), (12, np.uint16)])
def test_images_of_any_depth_and_channels_are_stretched_to_rgb(channels, dtype):
    image = np.random.default_rng(0).integers(40, 200, (20, 30, channels)).astype(dtype)
    shown = to_rgb(image)
    assert (shown.shape, shown.dtype, shown.min(), shown.max()) == ((20, 30, 3), np.uint8, 0, 255)
    order = np.argsort(image[..., 0], axis=None, kind="stable")
    assert (np.diff(shown[..., 0].ravel()[order].astype(int)) >= 0).all()
    assert (to_rgb(image, limits=(0, 400)) <= 128).all()


def test_eight_bit_rgb_is_shown_unchanged():
    image = np.random.default_rng(0).integers(40, 200, (20, 30, 3), dtype=np.uint8)
    assert (to_rgb(image) == image).all()


def test_a_contact_sheet_keeps_the_shapes_and_order_of_images():
    images = {(10, 0, 99): (30, 60), (20, 0, 99): (90, 45), (30, 0, 99): (40, 40)}
    panels = [(str(number), np.tile(np.uint8(color), (*images[color], 1))) for number, color in enumerate(images)]
    sheet = np.array(contact_sheet(iter(panels), columns=2, side=90))
    boxes = [np.argwhere((sheet == color).all(2)) for color in images]
    tops, lefts = zip(*(box.min(0).tolist() for box in boxes), strict=True)
    sizes = [tuple((box.max(0) - box.min(0) + 1).tolist()) for box in boxes]
    assert sizes == [(45, 90), (90, 45), (90, 90)]
    assert tops == (TITLE, TITLE, 2 * TITLE + 90 + MARGIN)
    assert lefts == (MARGIN, 2 * MARGIN + 90, MARGIN)


def test_a_long_title_of_a_contact_sheet_stays_above_its_image():
    flat = np.zeros((90, 90, 3), np.uint8)
    for title in ("1  a", "2  " + "folder/" * 20 + "0001.png"):
        sheet = np.array(contact_sheet([(title, flat), ("", flat)], side=90))
        above = (sheet[:TITLE] != sheet[0, 0]).any(2)
        assert above[:, : MARGIN + 90].any()
        assert not above[:, MARGIN + 91 :].any()

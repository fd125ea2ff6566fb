import numpy as np
import pytest

from mlpmatch_pl.visualization.plots import BAR_COLORS, bar_plot, confusion_matrix_plot


def count_pixels(picture, color, tolerance=2) -> int:
    return int((np.abs(np.array(picture, int) - color).max(axis=2) <= tolerance).sum())


def test_bars_are_as_high_as_their_counts():
    picture = bar_plot([[("a", 30)], [("b", 10), ("c", 0)]], "title", "block", "steps")
    areas = [count_pixels(picture, [int(color[i : i + 2], 16) for i in (1, 3, 5)]) for color in BAR_COLORS]
    assert areas[1] / areas[0] == pytest.approx(1 / 3, rel=0.05)


def test_axes_have_names():
    pictures = [np.array(bar_plot([[("a", 3)]], "title", *axes)) for axes in (("", ""), ("block", ""), ("", "steps"))]
    changed = [np.argwhere((picture != pictures[0]).any(axis=2)).mean(axis=0) for picture in pictures[1:]]
    height, width = pictures[0].shape[:2]
    assert changed[0][0] > changed[1][0]  # the name of the horizontal axis is below that of the vertical one
    assert (height, width) == pictures[1].shape[:2]


def test_a_confusion_matrix_is_normalized_by_row():
    picture = confusion_matrix_plot(np.array([[0, 20, 0], [1, 1, 2], [0, 0, 0]]), ["a", "bb", "c"])
    full, absent = count_pixels(picture, (8, 48, 107)), count_pixels(picture, (225, 225, 225), 0)
    assert absent / full == pytest.approx(3, rel=0.3)  # a row of three cells without pixels; "100" covers some of one
    half = count_pixels(picture, (106, 174, 214), 6)  # the color map at 50 %
    assert half / full == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize("classes", [1, 40])
def test_names_are_shown_literally_and_cut_when_long(classes):
    picture = confusion_matrix_plot(np.eye(classes, dtype=np.int64), [f"$x^ {'long ' * 9}{i}" for i in range(classes)])
    assert picture.width < 14 * classes + 400
    corner = np.array(picture)[-20:, :20]
    assert (corner == 255).all()

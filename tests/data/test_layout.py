"""Folders as annotation tools leave them, read without options."""

import numpy as np
import pytest
from helpers.images import save_image
from PIL import Image

from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.utils.errors import UserError

COLORS = np.array([[0, 0, 0], [250, 50, 83], [51, 221, 255], [9, 9, 9]], np.uint8)
LABELMAP = "# label:color_rgb:parts:actions\nbackground:0,0,0::\nroad: old:250,50,83::\nb:51,221,255::\nvoid:9,9,9::\n"


def scene(number):
    return np.random.default_rng(number).integers(0, 4, (8, 9)).astype(np.uint8)


def write(root, image, mask, convert, count=4):
    for number in range(count):
        save_image(root / image.format(number), np.full((8, 9, 3), number, np.uint8))
        (root / mask).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(convert(scene(number))).save(root / mask.format(number))


def masks(data):
    """Return the masks by the number of their image."""
    sources = [source for source in (data.train, data.val, data.test) if source is not None]
    pairs = [(source, index) for source in sources for index in range(len(source))]
    return {int(source.image(index)[0, 0, 0]): source.mask(index).tolist() for source, index in pairs}


@pytest.mark.parametrize("images", ["JPEGImages", "images"])
def test_segmentation_masks_of_cvat_have_their_classes_in_labelmap_txt(tmp_path, images):
    write(tmp_path, images + "/{}.png", "SegmentationClass/{}.png", COLORS.__getitem__)
    write(tmp_path, images + "/{}.png", "SegmentationObject/{}.png", COLORS[::-1].__getitem__)
    (tmp_path / "labelmap.txt").write_text(LABELMAP)
    data = folder(str(tmp_path))
    assert data.class_names == ("background", "road: old", "b")
    assert data.palette == tuple(map(tuple, COLORS[:3].tolist()))
    expected = {number: np.where(scene(number) == 3, 255, scene(number)).tolist() for number in range(4)}
    assert masks(data) == expected


def test_semantic_masks_of_roboflow_have_their_classes_in_classes_csv(tmp_path):
    for part, count in (("train", 4), ("valid", 2), ("test", 1)):
        write(
            tmp_path / part,
            "{}_jpg.rf.0a.jpg",
            "{}_jpg.rf.0a_mask.png",
            np.array([0, 2, 1, 7], np.uint8).__getitem__,
            count,
        )
        (tmp_path / part / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, b\n2, a\n7, ignore\n")
    data = folder(str(tmp_path), train="train", val="valid", test="test")
    assert data.class_names == ("background", "b", "a")
    assert (len(data.train), len(data.val), len(data.test)) == (4, 2, 1)
    assert data.train.mask(3).tolist() == np.array([0, 2, 1, 255])[scene(3)].tolist()


def test_options_win_over_the_file(tmp_path):
    write(tmp_path, "images/{}.png", "masks/{}.png", lambda mask: np.minimum(mask, 1))
    (tmp_path / "labelmap.txt").write_text(LABELMAP)
    data = folder(str(tmp_path), ["x", "y"])
    assert (data.class_names, data.palette) == (("x", "y"), ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected dataset.classes, or labelmap.txt or _classes.csv in"),
        ("background:0,0,0::\nroad:::\n", "but found 'road:::'"),
        ("background:0,0,0::\nbackground:0,0,1::\n", "background occurs more than once"),
    ],
)
def test_a_wrong_or_missing_file_is_refused_by_name(tmp_path, text, message):
    write(tmp_path, "images/{}.png", "masks/{}.png", lambda mask: mask)
    if text:
        (tmp_path / "labelmap.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        folder(str(tmp_path))


def test_folders_with_different_classes_are_refused(tmp_path):
    for name in "ab":
        write(tmp_path / name, f"images/{name}{{}}.png", f"masks/{name}{{}}.png", lambda mask: mask)
        (tmp_path / name / "labelmap.txt").write_text(LABELMAP.replace("road", name))
    with pytest.raises(UserError, match=r"expected the same classes in .*a/labelmap.txt and .*b/labelmap.txt"):
        folder([str(tmp_path / "a"), str(tmp_path / "b")])

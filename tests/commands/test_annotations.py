"""Exports of annotation tools, from `prepare` to the masks that `dataset=folder` reads."""

import json
import re

import numpy as np
import pytest
from helpers.exports import (
    CLASSES,
    HEIGHT,
    WIDTH,
    brush,
    random_shapes,
    reference,
    save_photos,
    write_coco,
    write_cvat,
    write_label_studio,
    write_labelme,
    write_yolo,
)
from PIL import Image

from mlpmatch_pl.commands.prepare.regions import Region, draw
from mlpmatch_pl.commands.prepare.run import Options, prepare_dataset
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.utils.errors import UserError
from mlpmatch_pl.utils.validation import read_options

SORTED = tuple(sorted(CLASSES))
FORMATS = {
    # what writes it, where the images are, the order of the classes, and whether it is drawn by size
    "coco": (lambda root, scenes: write_coco(root / "instances.json", scenes), "images", CLASSES, True),
    "roboflow": (lambda root, scenes: write_coco(root / "train/_a.coco.json", scenes, True), "train", CLASSES, True),
    "yolo": (write_yolo, "images", CLASSES, True),
    "labelme": (lambda root, scenes: write_labelme(root / "json", scenes), "photos", SORTED, False),
    "cvat": (lambda root, scenes: write_cvat(root / "annotations.xml", scenes), "images", CLASSES, False),
    "label_studio": (lambda root, scenes: write_label_studio(root / "project.json", scenes), ".", SORTED, False),
}


def prepare(root, **values):
    options = {"dataset": "annotations", "root": str(root), "num_workers": 0, **values}
    prepare_dataset(read_options(Options, options))


def read_masks(root, **options):
    data = folder(str(root), **options)
    masks = {}
    for source in (data.train, data.val):
        for index in range(len(source)):
            if source.has_mask(index):
                masks[source.name(index).rpartition("/")[2]] = source.mask(index)
    return data, masks


@pytest.fixture(scope="module")
def scenes():
    """200 regions, a third of them with a hole, in 20 images."""
    rng = np.random.default_rng(0)
    return {f"street {number}.jpg": random_shapes(rng, 10) for number in range(20)}


@pytest.mark.parametrize("form", FORMATS)
def test_masks_are_those_of_another_rasterizer(form, scenes, tmp_path):
    write, images, order, by_size = FORMATS[form]
    save_photos(tmp_path / images, [*scenes, "unlabeled.jpg"])
    write(tmp_path, scenes)
    prepare(tmp_path)
    data, masks = read_masks(tmp_path)
    assert data.class_names == ("background", *order)
    assert masks.keys() == scenes.keys()
    drawn = np.stack([masks[name] for name in scenes])
    expected = np.stack([reference(shapes, order, by_size) for shapes in scenes.values()])
    for label in range(4):
        one, two = drawn == label, expected == label
        assert (one & two).sum() / (one | two).sum() >= 0.999


def square(left, top, size=40):
    return [[left, top], [left + size, top], [left + size, top + size], [left, top + size]]


def labelme(root, *shapes, name="a.jpg"):
    save_photos(root, [name])
    written = [{"label": label, "points": points, "shape_type": kind} for label, points, kind in shapes]
    content = {"shapes": written, "imagePath": name, "imageHeight": HEIGHT, "imageWidth": WIDTH}
    (root / name).with_suffix(".json").write_text(json.dumps(content))


def coco(root, *annotations, file="instances.json", names=("a.jpg",), size=(HEIGHT, WIDTH), photos=True):
    if photos:
        save_photos(root, names)
    images = [{"id": id_, "file_name": name, "height": size[0], "width": size[1]} for id_, name in enumerate(names)]
    listed = [{"id": id_, "image_id": 0, "category_id": 1, **entry} for id_, entry in enumerate(annotations)]
    content = {"images": images, "annotations": listed, "categories": [{"id": 1, "name": "car"}]}
    (root / file).write_text(json.dumps(content))


def polygon(left, top, size=40):
    return {"segmentation": [np.ravel(square(left, top, size)).tolist()]}


def values(root):
    """Return the ids of the only mask at some points: (x, y) to value."""
    mask = np.asarray(Image.open(next((root / "masks").rglob("*.png"))))
    return lambda *points: [int(mask[y, x]) for x, y in points]


def test_later_shapes_cover_earlier_ones_and_labels_for_nothing_have_a_meaning(tmp_path):
    labelme(
        tmp_path,
        ("tree", square(0, 0, 100), "polygon"),
        ("car", square(10, 10, 60), "polygon"),
        ("_background_", square(20, 20, 20), "polygon"),
        ("__ignore__", square(50, 50, 10), "polygon"),
    )
    prepare(tmp_path)
    assert (tmp_path / "labelmap.txt").read_text().splitlines()[1:] == [
        "background:0,0,0::", "car:128,0,0::", "tree:0,128,0::", "ignored:224,224,192::"
    ]  # fmt: skip
    assert values(tmp_path)((5, 5), (15, 15), (25, 25), (55, 55), (200, 200)) == [2, 1, 0, 255, 0]


def test_crowds_and_ignored_regions_are_ignored_below_the_others(tmp_path):
    coco(tmp_path, polygon(10, 10, 60), {**polygon(50, 50), "iscrowd": 1}, {**polygon(120, 0), "ignore": 1})
    prepare(tmp_path)
    assert values(tmp_path)((15, 15), (60, 60), (80, 80), (130, 10), (200, 200)) == [1, 1, 255, 255, 0]


OTHERS = {
    "labelme": lambda root: labelme(
        root, ("car", square(100, 100), "polygon"), ("car", [[10, 10], [30, 20]], "rectangle"),
        ("car", [[60, 60], [60, 70]], "circle"), ("car", [[200, 200]], "point"),
    ),
    "coco": lambda root: coco(root, polygon(100, 100), {"segmentation": [], "bbox": [10, 10, 20, 10]}),
}  # fmt: skip


@pytest.mark.parametrize("form", OTHERS)
def test_boxes_are_refused_or_their_pixels_ignored(form, tmp_path):
    OTHERS[form](tmp_path)
    with pytest.raises(
        UserError, match=r"expected polygons or masks, but a.jpg in .*json has \d other shapes, the first"
    ):
        prepare(tmp_path)
    assert not (tmp_path / "masks").exists()
    prepare(tmp_path, other_shapes="ignore")
    expected = [255, 0, 1, 255 if form == "labelme" else 0]
    assert values(tmp_path)((29, 19), (31, 21), (110, 110), (55, 65)) == expected


def test_listed_images_without_a_region_are_unlabeled_unless_they_show_background(tmp_path):
    coco(tmp_path, polygon(10, 10), names=("a.jpg", "b.jpg", "c.jpg"))
    prepare(tmp_path)
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["a.png"]
    prepare(tmp_path, empty="background")
    assert len(read_masks(tmp_path, val=1)[1]) == 3


def test_an_image_that_was_annotated_as_empty_is_background(tmp_path):
    labelme(tmp_path, ("car", square(10, 10), "polygon"))
    labelme(tmp_path, name="b.jpg")
    prepare(tmp_path)
    assert not np.asarray(Image.open(tmp_path / "masks/b.png")).any()


def test_parts_of_an_export_become_lists(tmp_path, capsys):
    for part, names in (("train", ("a.jpg", "b.jpg")), ("valid", ("c.jpg",)), ("test", ("d.jpg",))):
        (tmp_path / part).mkdir()
        coco(tmp_path / part, polygon(10, 10), file="_annotations.coco.json", names=names)
    prepare(tmp_path)
    options = dict(re.findall(r"dataset\.(val|test)=(\S+)", capsys.readouterr().out))
    assert options == {"val": "masks/val.txt", "test": "masks/test.txt"}
    data = folder(str(tmp_path), **options)
    names = [[source.name(index) for index in range(len(source))] for source in (data.train, data.val, data.test)]
    assert names == [["train/a.jpg", "train/b.jpg"], ["valid/c.jpg"], ["test/d.jpg"]]


def test_exports_of_masks_need_no_drawing(tmp_path, capsys):
    for part in ("train", "valid", "test"):
        save_photos(tmp_path / part, ["a.jpg"])
        Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / part / "a_mask.png")
        (tmp_path / part / "_classes.csv").write_text("Pixel Value, Class\n0, background\n1, car\n")
    prepare(tmp_path)
    options = dict(re.findall(r"dataset\.(\w+)=(\S+)", capsys.readouterr().out))
    assert options == {"root": str(tmp_path), "train": "train", "val": "valid", "test": "test"}
    data = folder(**options)
    assert [source.name(0) for source in (data.train, data.val, data.test)] == [
        "train/a.jpg", "valid/a.jpg", "test/a.jpg"
    ]  # fmt: skip


def test_images_are_found_by_the_folders_that_names_share(tmp_path):
    for day in ("mon", "tue"):
        save_photos(tmp_path / "photos" / day, ["a.jpg"])
    coco(tmp_path, polygon(10, 10), names=("C:\\job\\tue\\a.jpg",), photos=False)
    prepare(tmp_path / "photos", annotations=str(tmp_path / "instances.json"))
    assert [path.parent.name for path in (tmp_path / "photos").rglob("a.png")] == ["tue"]
    coco(tmp_path, polygon(10, 10), file="other.json", photos=False)
    with pytest.raises(
        UserError, match=r"expected one image a.jpg of .*, but found (mon|tue)/a.jpg and (mon|tue)/a.jpg"
    ):
        prepare(tmp_path / "photos", annotations=str(tmp_path / "other.json"))


@pytest.mark.parametrize("turned", [False, True])
def test_masks_fit_turned_photos_as_the_export_has_them(tmp_path, turned):
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / "a.jpg", exif=exif)
    size = (WIDTH, HEIGHT) if turned else (HEIGHT, WIDTH)
    coco(tmp_path, polygon(10, 10), size=size, photos=False)
    prepare(tmp_path)
    data, masks = read_masks(tmp_path, val=1, orientation="apply" if turned else "ignore")
    assert masks["a.jpg"].shape == data.val.image(0).shape[:2] == size


def test_a_repeated_command_changes_nothing_and_another_export_is_refused(tmp_path):
    coco(tmp_path, polygon(10, 10))
    prepare(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    prepare(tmp_path)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    coco(tmp_path, {**polygon(10, 10), "iscrowd": 1}, names=("b.jpg",))
    text = (tmp_path / "instances.json").read_text()
    (tmp_path / "instances.json").write_text(text.replace("car", "bus"))
    with pytest.raises(UserError, match=r"expected to create .*labelmap.txt, but a different file exists there"):
        prepare(tmp_path)
    assert not (tmp_path / "masks/b.png").exists()  # its classes would not be those of a.png
    coco(tmp_path, polygon(20, 20))
    with pytest.raises(UserError, match=r"expected to create .*a.png, but a different file exists there"):
        prepare(tmp_path)


WRONG_REGIONS = {
    "run lengths for another size": ("coco", {"size": [3, 2], "counts": [2, 4]}, "are for 2 x 3 pixels"),
    "too few run lengths": ("coco", {"size": [2, 3], "counts": [2, 3]}, "sum up to 5 instead of 3 x 2"),
    "damaged run lengths": ("coco", {"size": [2, 3], "counts": "zz~~9"}, "damaged"),
    "too few packed run lengths": ("coco", {"size": [900, 900], "counts": "52203"}, "are damaged"),
    "too few run lengths of CVAT": ("cvat", ([1, 2], 0, 0, 2, 2), "sum up to 3 instead of 2 x 2"),
    "no PNG": ("png", ("AAAA", 0, 0), "it is damaged"),
    "no numbers in a brush": ("brush", [0, "x"], "it is damaged"),
    "far points": ("polygons", [np.array([[0, 0], [1e9, 0], [0, 5]])], "far outside"),
    "no numbers": ("polygons", [np.array([[0, 0], [np.nan, 0], [0, 5]])], "far outside"),
    "a brush for another size": ("brush", brush(np.zeros((HEIGHT, WIDTH), bool)), "values instead of 4 x 3 x 2"),
    "a short brush": ("brush", [0, 0, 0, 24, 63], "its brush is damaged"),
}


@pytest.mark.parametrize("name", WRONG_REGIONS)
def test_damaged_regions_are_refused(name):
    kind, data, message = WRONG_REGIONS[name]
    height, width = data["size"] if name == "too few packed run lengths" else (2, 3)
    with pytest.raises(UserError, match=message):
        draw(Region("car", kind, data), height, width)


def test_regions_may_cross_the_border_of_the_image():
    rows, columns, inside = draw(Region("car", "polygons", [np.array(square(-5.0, -5.0, 7.0))]), 4, 3)
    assert (rows, columns, inside.tolist()) == (slice(0, 2), slice(0, 2), [[True, True], [True, True]])
    rows, columns, inside = draw(Region("car", "cvat", ([1, 2, 1], 2, -1, 2, 2)), 4, 3)
    assert (rows, columns, inside.tolist()) == (slice(0, 1), slice(2, 3), [[True]])
    for left, top in ((3, 0), (-2, 0), (0, 9), (0, -7)):
        assert not draw(Region("car", "cvat", ([0, 4], left, top, 2, 2)), 4, 3)[2].size
    for rings in ([np.array(square(-9.0, -9.0, 7.0))], []):
        assert not draw(Region("car", "polygons", rings), 4, 3)[2].size


TASK = {"id": 3, "data": {"image": "a.jpg"}, "annotations": []}
NO_IMAGE = {**TASK, "data": {"text": "x"}, "annotations": [{"result": []}]}
CVAT = '<annotations><image id="0" name="a.jpg" width="320" height="240">{}</image></annotations>'
WRONG_FILES = {
    "a.json": {
        "{": "cannot read .*a.json",
        '{"notes": 1}': "expected COCO JSON, .* in .*, but found none",
        '{"images": [], "categories": [{}]}': "expected COCO JSON in .*a.json, but found no 'id'",
        '{"shapes": [{"label": "x", "points": [0, 1, 2, 3, 4]}]}': "expected labelme JSON in .*a.json, but found",
        json.dumps([TASK]): "expected annotated images in .*, but Label Studio JSON has none",
        '[{"annotation_id": 1}]': "but .*a.json is JSON-MIN",
        json.dumps([{**TASK, "annotations": [{"result": []}] * 2}]): "the task 3 in .*a.json has 2",
        json.dumps(
            [{**TASK, "data": {"text": "x"}, "annotations": [{"result": []}]}]
        ): "but found no image in the data of the task 3",
    },
    "a.xml": {
        "<a": "cannot read .*a.xml",
        "<annotation/>": "is XML of Pascal VOC or of the old LabelMe",
        "<annotations><track/></annotations>": "is CVAT for video",
        CVAT.format('<polygon label="x" points="1,1;2"/>'): "expected CVAT for images in .*a.xml, but found",
        CVAT.format('<box label="x" xtl="1" rotation="9.5"/>'): "but found a rotated box",
        CVAT.format("<polyline points='1,1;2,2'/>"): "has 1 other shapes, the first is a polyline",
    },
    "data.yaml": {
        "names: [a]\nkpt_shape: [17, 3]": "but found keypoints",
        "names: [a]": "expected lines 'class x y x y x y ...' in .*b.txt, with a class from 0 to 0, but found '3 0.1",
    },
    "a.zip": {"": "expected COCO JSON, .*, but found none"},
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in WRONG_FILES.items() for text in texts])
def test_wrong_files_are_refused_by_name(name, text, tmp_path):
    save_photos(tmp_path / "images", ["a.jpg", "b.jpg"])
    (tmp_path / name).write_text(text)
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels/b.txt").write_text("3 0.1 0.1 0.2 0.1 0.2 0.2")
    with pytest.raises(UserError, match=WRONG_FILES[name][text]):
        prepare(tmp_path)
    assert not (tmp_path / "masks").exists()


def test_other_images_archives_and_two_exports_are_refused(tmp_path):
    coco(tmp_path, polygon(10, 10), size=(HEIGHT // 2, WIDTH // 2))
    with pytest.raises(UserError, match=r"a.jpg of 160 x 120 pixels, as .*instances.json says, but it is 320 x 240"):
        prepare(tmp_path)
    labelme(tmp_path, ("car", square(0, 0), "polygon"))
    with pytest.raises(UserError, match=r"a.json is labelme JSON and .*instances.json is COCO JSON; name one"):
        prepare(tmp_path)
    with pytest.raises(UserError, match=r"but found none of them, such as a.jpg; set root"):
        prepare(tmp_path / "none", annotations=str(tmp_path / "a.json"))
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match="is an archive; unpack it"):
        prepare(tmp_path, annotations=str(tmp_path / "a.zip"))
    with pytest.raises(UserError, match="expected annotations= with dataset=annotations, but got dataset=voc"):
        prepare(tmp_path, dataset="voc", annotations=str(tmp_path))


def test_from_an_export_to_masks_of_new_photos_in_three_commands(command, tmp_path):
    scenes = {f"photo {number}.jpg": random_shapes(np.random.default_rng(number), 4) for number in range(8)}
    write_labelme(tmp_path / "photos", scenes)
    save_photos(tmp_path / "photos", [*scenes, *(f"more {number}.jpg" for number in range(4))])
    save_photos(tmp_path / "new", ["a.jpg"])
    tiny = ("loader.crop_size=48", "loader.batch_size=4", "loader.num_workers=0", "schedule.steps=2")
    tiny += ("backbone=tiny", "decoder.channels=8", "hydra.run.dir=run")
    best = "checkpoint=run/checkpoints/best.ckpt"
    for name, arguments in (
        ("prepare", ("dataset=annotations", "root=photos")),
        ("train", ("dataset=folder", "dataset.root=photos", *tiny)),
        ("predict", (best, "input=new", "output=predictions")),
    ):
        code, _, errors = command(name, *arguments)
        assert code == 0, errors
    splits = json.loads((tmp_path / "run/splits.json").read_text())
    assert [splits[part]["count"] for part in ("labeled", "val", "unlabeled")] == [6, 2, 4]
    assert np.asarray(Image.open(tmp_path / "predictions/index/a.png")).shape == (HEIGHT, WIDTH)
    classes = json.loads((tmp_path / "predictions/classes.json").read_text())
    assert [entry["name"] for entry in classes] == ["background", *SORTED]

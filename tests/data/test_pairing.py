import unicodedata

import numpy as np
import pytest
from helpers.images import save_image, save_mask
from PIL import Image

from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.datasets.voc import voc
from mlpmatch_pl.data.files import FileIndex
from mlpmatch_pl.data.pairing import NameRule, find_rule, mask_pattern
from mlpmatch_pl.utils.errors import UserError

CLASSES = ["background", "road"]
LOSSLESS = "images/{}.png", "masks/{}.png"


def make(root, image, mask, count=6, masked=4):
    """Write images, and masks whose only value identifies their image."""
    for number in range(count):
        save_image(root / image.format(number), np.full((8, 9, 3), 20 * number, np.uint8))
        if number < masked:
            save_mask(root / mask.format(number), np.full((8, 9), number, np.uint8), palette=False)


def paired(root, **options):
    """Load a folder; return the number of each image and that of its mask, read from the pixels."""
    data = folder(str(root), [*map(str, range(8))], val=1, **options)
    return sorted(
        (round(source.image(index).mean() / 20), int(source.mask(index)[0, 0]) if source.has_mask(index) else None)
        for source in (data.train, data.val)
        for index in range(len(source))
    ), data.notes


RIGHT = [(0, 0), (1, 1), (2, 2), (3, 3), (4, None), (5, None)]


@pytest.mark.parametrize(
    ("image", "mask", "rule"),
    [
        ("images/a{}.png", "masks/a{}_mask.png", "*_mask"),
        ("images/a{}.png", "masks/mask_a{}.png", "mask_*"),
        ("images/day/a{}.jpg", "masks/day/a{}-seg.png", "*-seg"),
        ("images/img_{}.png", "masks/gt_{}.png", "gt*"),
        ("images/{}_sat.png", "masks/{}_mask.png", "*mask"),
        ("images/{}_leftImg8bit.png", "masks/{}_gtFine_labelIds.png", "*gtFine_labelIds"),
        ("images/{}.PNG", "masks/{}_Label.PNG", "*_Label"),
    ],
)
def test_masks_may_have_one_word_more_or_another_word(tmp_path, image, mask, rule):
    make(tmp_path, image, mask)
    pairs, notes = paired(tmp_path)
    assert pairs == RIGHT
    assert notes[0].startswith(f"the masks in {tmp_path / 'masks'} are paired by the names {rule},")


@pytest.mark.parametrize(
    ("image", "mask"),
    [("{}.jpg", "{}_mask.png"), ("{}.png", "mask_{}.png"), ("{}.jpg", "{}.png"), ("img_{}.png", "label_{}.png")],
)
def test_images_and_masks_may_be_in_one_folder(tmp_path, image, mask):
    make(tmp_path, image, mask)
    assert paired(tmp_path, images=".", masks=".")[0] == RIGHT


def test_folders_of_a_part_may_hold_images_and_masks_side_by_side(tmp_path):
    make(tmp_path / "train", "{}.jpg", "{}_mask.png")
    make(tmp_path / "valid", "{}.jpg", "{}_mask.png", count=2)
    data = folder(str(tmp_path), [*map(str, range(8))], train="train", val="valid")
    assert (len(data.labeled.names), len(data.unlabeled), len(data.val)) == (4, 2, 2)
    assert [int(data.val.mask(index)[0, 0]) for index in range(2)] == [0, 1]


def test_patterns_choose_among_several_kinds_of_masks(tmp_path):
    make(tmp_path, "images/{}_sat.png", "masks/{}_ids.png")
    make(tmp_path, "images/{}_depth.png", "masks/{}_color.png")
    assert paired(tmp_path, image_name="*_sat", mask_name="*_ids")[0] == RIGHT
    with pytest.raises(UserError, match="expected an image for every mask"):
        folder(str(tmp_path), CLASSES)


@pytest.mark.parametrize(("images", "masks"), [(".", "masks"), ("images", ".")])
def test_a_folder_inside_the_other_one_is_not_part_of_it(tmp_path, images, masks):
    make(tmp_path, "{}.png" if images == "." else "images/{}.png", "{}.png" if masks == "." else "masks/{}.png")
    assert paired(tmp_path, images=images, masks=masks)[0] == RIGHT


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_two_spellings_of_an_accent_are_one_name(tmp_path, forms):
    image, mask = (
        unicodedata.normalize(form, f"{kind}/forêt{{}}.png")
        for form, kind in zip(forms, ("images", "masks"), strict=True)
    )
    make(tmp_path, image, mask)
    assert paired(tmp_path)[0] == RIGHT


def test_a_list_may_spell_an_accent_in_the_other_way(tmp_path):
    make(tmp_path, unicodedata.normalize("NFD", "images/é{}.png"), "masks/{}.png", masked=0)
    (tmp_path / "u.txt").write_text(unicodedata.normalize("NFC", "images/é0.png"), encoding="utf-8")
    make(tmp_path, "images/{}.png", "masks/{}.png")
    assert len(folder(str(tmp_path), [*map(str, range(8))], unlabeled="u.txt", val=1).unlabeled) == 1


@pytest.mark.parametrize(
    "line",
    ["/images/{0}.png /masks/{0}.png", "images\\{0}.png masks\\{0}.png", "{0}", "{0}.png", "{0} {0}", "images/{0}"],
)
def test_lists_of_other_projects_are_read(tmp_path, line):
    make(tmp_path, *LOSSLESS)
    (tmp_path / "train.txt").write_text("\n".join(line.format(number) for number in range(3)))
    (tmp_path / "val.txt").write_text(line.format(3))
    data = folder(str(tmp_path), [*map(str, range(8))], train="train.txt", val="val.txt")
    assert data.labeled.names == ("images/0.png", "images/1.png", "images/2.png")
    assert [int(data.train.mask(index)[0, 0]) for index in range(3)] == [0, 1, 2]
    assert int(data.val.mask(0)[0, 0]) == 3


@pytest.mark.parametrize("line", ["day 1/my photo", "day 1/my photo.png", "images/day 1/my photo.png"])
def test_a_listed_name_may_have_spaces(tmp_path, line):
    """Also below the folder of the images."""
    for name in ("day 1/my photo", "day"):
        save_image(tmp_path / f"images/{name}.png", np.zeros((40, 40, 3), np.uint8))
        save_mask(tmp_path / f"masks/{name}.png", np.zeros((40, 40), np.uint8), palette=False)
    (tmp_path / "list.txt").write_text(f"{line}\n", encoding="utf-8")
    (pair,) = FileIndex([tmp_path], "images", "masks").part("list.txt")
    assert pair.image == "images/day 1/my photo.png"


def test_a_listed_suffix_must_be_that_of_the_file(tmp_path):
    make(tmp_path, "images/day_{}.png", "masks/day_{}.png")
    (tmp_path / "train.txt").write_text("day_0.jpg")
    with pytest.raises(UserError, match=r"day_0.jpg, which .* does not exist; the nearest is images/day_0.png"):
        folder(str(tmp_path), CLASSES, train="train.txt", val=1)


def test_backslashes_do_not_lead_out_of_the_root(tmp_path):
    make(tmp_path, *LOSSLESS)
    (tmp_path / "train.txt").write_text("images\\..\\..\\0.png")
    with pytest.raises(UserError, match="expected paths below"):
        folder(str(tmp_path), CLASSES, train="train.txt", val=1)


def test_a_refusal_shows_the_nearest_file_and_the_rule(tmp_path):
    make(tmp_path, "images/a{}.png", "masks/a{}_mask.png")
    make(tmp_path, "images/b{}.png", "masks/b{}.png")
    with pytest.raises(UserError) as caught:
        folder(str(tmp_path), CLASSES)
    assert str(caught.value).endswith("the nearest image is images/a0.png, paired by 'dataset.mask_name=*_mask'")


@pytest.mark.parametrize(
    ("images", "masks"),
    [(["1", "2"], ["3", "4"]), (["a1", "a2"], ["a1_1", "a2_2"]), (["a", "b"], ["a_mask", "b_label"]), (["a"], ["ab"])],
)
def test_names_that_no_rule_explains_are_not_paired(images, masks):
    assert find_rule(images, masks) is None


def test_patterns_need_one_star(tmp_path):
    make(tmp_path, *LOSSLESS)
    for pattern in ("_mask", "*_*", "masks/*"):
        with pytest.raises(UserError, match=r"expected dataset\.mask_name with one"):
            folder(str(tmp_path), CLASSES, mask_name=pattern)


def test_two_kinds_of_masks_beside_the_images_are_refused():
    with pytest.raises(UserError, match="a_label and a_mask follow two"):
        mask_pattern(["a", "a_mask", "a_label"], "data")


def test_numbers_are_no_words():
    assert mask_pattern(["mask_1_2", "img_1_2"], "data") == "mask_*"
    assert NameRule("*", "mask_*").key("mask_", "mask") is None


def scenes(root):
    for scene in range(4):
        make(root, f"images/scene_{scene}/f{{}}.png", f"masks/scene_{scene}/f{{}}.png")


@pytest.mark.parametrize("group_by", ["folder", r"scene_\d+", r"(scene_\d)/"])
def test_scenes_stay_on_one_side_of_the_validation_share(tmp_path, group_by):
    scenes(tmp_path)
    data = folder(str(tmp_path), [*map(str, range(8))], val=0.25, group_by=group_by)
    held_out = {data.val.name(index).split("/")[1] for index in range(len(data.val))}
    assert len(data.val) == 4
    assert len(held_out) == 1
    assert not held_out & {name.split("/")[1] for name in data.labeled.names}


@pytest.mark.parametrize(
    ("group_by", "message"),
    [
        ("images", "at least 2 groups"),
        ("(", "a regular expression, but got '\\('"),
        ("day", "does not match images/scene_0"),
    ],
)
def test_wrong_groups_are_explained(tmp_path, group_by, message):
    scenes(tmp_path)
    with pytest.raises(UserError, match=message):
        folder(str(tmp_path), CLASSES, group_by=group_by)


@pytest.mark.parametrize("part", ["val", "test"])
def test_all_images_may_be_held_out_for_scoring(tmp_path, part):
    make(tmp_path, *LOSSLESS, count=4)
    data = folder(str(tmp_path), [*map(str, range(8))], **{part: "."})
    assert len(getattr(data, part)) == 4
    assert data.labeled.names == ()


def test_lists_of_labeled_and_unlabeled_images_need_one_of_validation_images(tmp_path):
    make(tmp_path, *LOSSLESS)
    (tmp_path / "l.txt").write_text("0\n1")
    (tmp_path / "u.txt").write_text("4\n5")
    with pytest.raises(UserError, match=r"dataset\.val=0\.2 from, but there are none; set dataset\.val to a list"):
        folder(str(tmp_path), CLASSES, labeled="l.txt", unlabeled="u.txt")


@pytest.mark.parametrize("line", ["{}", "/JPEGImages/{0}.jpg /SegmentationClassAug/{0}.png"])
@pytest.mark.parametrize("name", ["train_aug", "trainaug"])
def test_voc_is_read_as_most_repositories_keep_it(tmp_path, name, line):
    make(tmp_path, "JPEGImages/2007_{}.jpg", "SegmentationClassAug/2007_{}.png", masked=6)
    save_mask(tmp_path / "SegmentationClass/2007_5.png", np.full((8, 9), 5, np.uint8), palette=True)
    lists = tmp_path / "ImageSets/Segmentation"
    lists.mkdir(parents=True)
    (lists / f"{name}.txt").write_text("".join(line.format(f"2007_{number}") + "\n" for number in range(5)))
    (lists / "val.txt").write_text("2007_5\n")
    (tmp_path / "mine.txt").write_text("JPEGImages/2007_1.jpg SegmentationClass/2007_1.png\n/2007_2\n")
    data = voc(str(tmp_path), labeled="mine.txt")
    assert data.labeled.names == ("JPEGImages/2007_1.jpg", "JPEGImages/2007_2.jpg")
    assert [int(data.train.mask(index)[0, 0]) for index in data.labeled_indices] == [1, 2]
    assert data.val.pair(0).mask == "SegmentationClass/2007_5.png"


@pytest.mark.parametrize(("image", "mask"), [("{}.png", "{}.npy"), ("{}.jpg", "{}_mask.npy")])
def test_npy_masks_may_lie_beside_the_images(tmp_path, image, mask):
    make(tmp_path, image, "masks/{}.png")
    for path in sorted((tmp_path / "masks").glob("*.png")):
        np.save(tmp_path / mask.format(path.stem), np.asarray(Image.open(path)))
        path.unlink()
    assert paired(tmp_path, images=".", masks=".")[0] == RIGHT

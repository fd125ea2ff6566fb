import itertools
import os
import time

import numpy as np
import pytest
from helpers.images import save_image, save_mask
from PIL import Image

from mlpmatch_pl.data.cache import CachedSource
from mlpmatch_pl.data.dataset import UnlabeledDataset
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.files import FileIndex, Pair
from mlpmatch_pl.data.readers.image import IMAGE_SUFFIXES
from mlpmatch_pl.data.splits import Split
from mlpmatch_pl.data.transforms.strong import StrongView
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.engine.run_folder import save_lists
from mlpmatch_pl.perturbation import CutMix
from mlpmatch_pl.utils.errors import UserError

IMAGE_LIST = ", ".join(sorted(IMAGE_SUFFIXES))

IMAGES = [
    "images/img0.jpg",
    "images/day/img1.png",
    "images/night/late/img2.jpg",
    "images/img3.png",
    "images/day/img4.jpg",
    "images/night/late/img5.png",
    "images/img6.jpg",
    "images/day/img7.png",
]
MASKS = ["masks/img0.png", "masks/day/img1.png", "masks/night/late/img2.png", "masks/img3.png", "masks/day/img4.png"]


@pytest.fixture
def load(folder_root, classes):
    def load(**options):
        return folder(str(folder_root), classes, **options)

    return load


@pytest.fixture
def write(folder_root):
    def write(name, lines, end="\n"):
        (folder_root / name).parent.mkdir(parents=True, exist_ok=True)
        (folder_root / name).write_text("\n".join(lines) + end, encoding="utf-8")
        return name

    return write


def names(source, indices=None):
    return [source.name(index) for index in (range(len(source)) if indices is None else indices)]


def pairs(start, stop):
    return [f"{IMAGES[index]} {MASKS[index]}" for index in range(start, stop)]


def sentence(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# Reading --------------------------------------------------------------------------------------------------------------


def test_images_and_masks_are_paired_by_path_without_suffix(load):
    data = load(val=1)
    assert sorted(names(data.train) + names(data.val)) == sorted(IMAGES)
    for source in (data.train, data.val):
        for index in range(len(source)):
            number = IMAGES.index(source.name(index))
            assert (source.pair(index).mask is not None) == (number < 5)
            image = source.image(index)
            assert image.shape == (40 + 3 * number, 64 - 4 * number, 3)
            assert image.dtype == np.uint8
            if number < 5:
                mask = source.mask(index)
                assert mask.dtype == np.uint8
                assert mask[5, 5] == number % 3
                assert mask[-1, -1] == (number + 1) % 3
                assert mask[0, 0] == 255


def test_images_without_mask_are_unlabeled_and_all_masks_are_used_by_default(load):
    data = load(val=1)
    assert set(names(data.train, data.unlabeled)) == set(IMAGES[5:])
    assert set(data.labeled.names) | set(names(data.val)) == set(IMAGES[:5])
    assert set(names(data.train, data.labeled_indices)) == set(data.labeled.names)


def test_masked_images_that_are_not_chosen_are_unlabeled(load):
    data = load(labeled=1, val=1)
    assert len(data.labeled.names) == 1
    assert len(data.unlabeled) == 6
    assert not set(names(data.train, data.unlabeled)) & (set(data.labeled.names) | set(names(data.val)))


def test_data_without_any_sub_folder_and_other_folder_names(folder_root, classes):
    for old, new in (("images", "photos/rgb"), ("masks", "truth")):
        (folder_root / new).parent.mkdir(exist_ok=True)
        (folder_root / old).rename(folder_root / new)
    data = folder(str(folder_root), classes, images="photos/rgb", masks="truth", val=1)
    assert len(data.labeled.names) == 4
    assert all(name.startswith("photos/rgb/") for name in data.labeled.names)


def test_hidden_and_other_files_are_passed_over(load, folder_root):
    for name in ("images/._img0.jpg", "images/.DS_Store", "images/notes.txt", "masks/readme.md", "images/Thumbs.db"):
        (folder_root / name).write_bytes(b"x")
    data = load(val=1)
    assert len(data.train) + len(data.val) == 8


def test_suffixes_may_be_upper_case(load, folder_root):
    (folder_root / IMAGES[0]).rename(folder_root / "images/img0.JPG")
    (folder_root / MASKS[0]).rename(folder_root / "masks/img0.PNG")
    data = load(val=1)
    assert "images/img0.JPG" in (*data.labeled.names, *names(data.val))


def test_palette_masks_keep_their_indices(load, folder_root):
    with Image.open(folder_root / MASKS[0]) as palette, Image.open(folder_root / MASKS[1]) as gray:
        assert (palette.mode, gray.mode) == ("P", "L")
    data = load(val=1)
    source = data.train if IMAGES[0] in names(data.train) else data.val
    assert set(np.unique(source.mask(names(source).index(IMAGES[0])))) == {0, 1, 255}


@pytest.mark.parametrize(("mode", "values"), [("1", {0, 1}), ("I;16", {0, 2, 255})])
def test_masks_of_one_and_sixteen_bits_are_read_as_ids(load, folder_root, write, mode, values):
    ids = np.zeros((40, 64), np.uint16)
    ids[10:], ids[20:] = sorted(values)[1], sorted(values)[-1]
    Image.fromarray(ids.astype(bool) if mode == "1" else ids).save(folder_root / MASKS[0])
    with Image.open(folder_root / MASKS[0]) as file:
        assert file.mode == mode
    data = load(labeled=write("l.txt", pairs(0, 1)), val=1)
    assert set(np.unique(data.train.mask(data.labeled_indices[0])).tolist()) == values


def test_images_are_rgb_and_grey_images_become_rgb(load, folder_root, write):
    color = np.zeros((40, 64, 3), np.uint8)
    color[:] = (200, 100, 0)
    Image.fromarray(color).save(folder_root / IMAGES[1])
    Image.fromarray(color[..., 0]).save(folder_root / IMAGES[3])
    alpha = np.concatenate([color, np.full((40, 64, 1), 7, np.uint8)], axis=2)
    Image.fromarray(alpha).save(folder_root / IMAGES[5])
    data = load(val=write("val.txt", pairs(0, 1)))
    found = {name: data.train.image(index) for index, name in enumerate(names(data.train))}
    assert found[IMAGES[1]][3, 3].tolist() == [200, 100, 0]
    assert found[IMAGES[3]][3, 3].tolist() == [200, 200, 200]
    assert found[IMAGES[5]].shape == (40, 64, 3)
    assert found[IMAGES[5]][3, 3].tolist() == [200, 100, 0]


def test_exif_rotation_is_applied(load, folder_root, write):
    pixels = np.zeros((30, 50, 3), np.uint8)
    pixels[:, :25] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the image rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(folder_root / IMAGES[0], exif=exif, quality=95)
    data = load(labeled=write("l.txt", pairs(0, 1)), val=1)
    image = data.train.image(data.labeled_indices[0])
    assert image.shape == (50, 30, 3)
    assert image[:20].min() > 240
    assert image[30:].max() < 15


@pytest.mark.parametrize("home", [False, True])
def test_root_may_be_relative_or_below_the_home_folder(folder_root, classes, monkeypatch, home):
    monkeypatch.setenv("HOME", str(folder_root.parent))
    monkeypatch.chdir(folder_root.parent)
    data = folder(f"~/{folder_root.name}" if home else folder_root.name, classes, val=1)
    assert data.train.image(0).ndim == 3


# Lists ----------------------------------------------------------------------------------------------------------------


def test_all_sets_can_be_lists(load, write):
    data = load(
        labeled=write("labeled.txt", pairs(0, 2)),
        unlabeled=write("unlabeled.txt", IMAGES[5:7]),
        val=write("val.txt", pairs(2, 4)),
        test=write("test.txt", pairs(4, 5)),
    )
    assert data.labeled == Split("labeled.txt", tuple(IMAGES[:2]))
    assert names(data.train, data.labeled_indices) == IMAGES[:2]
    assert names(data.train, data.unlabeled) == IMAGES[5:7]
    assert names(data.train) == IMAGES[:2] + IMAGES[5:7]
    assert names(data.val) == IMAGES[2:4]
    assert names(data.test) == IMAGES[4:5]
    assert all(source.pair(index).mask for source in (data.val, data.test) for index in range(len(source)))


def test_lists_may_pair_files_of_any_folders_and_names(load, folder_root, write):
    (folder_root / "gtFine").mkdir()
    (folder_root / MASKS[0]).rename(folder_root / "gtFine/other_labelTrainIds.png")
    lists = {
        "labeled": write("a.txt", [f"{IMAGES[0]} gtFine/other_labelTrainIds.png"]),
        "unlabeled": write("b.txt", IMAGES[5:]),
        "val": write("c.txt", pairs(1, 2)),
    }
    data = load(**lists)
    assert data.train.mask(data.labeled_indices[0]).shape == (40, 64)


@pytest.mark.parametrize("end", ["\n", "", "\n\n", "\r\n", "  \n"])
def test_end_of_the_list_does_not_matter(load, write, end):
    data = load(labeled=write("labeled.txt", pairs(0, 2), end), val=1)
    assert data.labeled.names == tuple(IMAGES[:2])


def test_blank_lines_and_windows_line_ends_are_passed_over(load, folder_root):
    (folder_root / "labeled.txt").write_bytes("\r\n\r\n".join(pairs(0, 2)).encode())
    assert load(labeled="labeled.txt", val=1).labeled.names == tuple(IMAGES[:2])


def test_lists_may_lie_in_the_working_directory(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text(pairs(0, 1)[0])
    assert load(labeled="mine.txt", val=1).labeled.names == (IMAGES[0],)
    assert load(labeled=str(tmp_path / "mine.txt"), val=1).labeled.names == (IMAGES[0],)


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("images/my photo.jpg", "masks/my truth.png"),
        ("images/a b c d.jpg", "masks/x.png"),
        ("images/Straße.jpg", "masks/Straße.png"),
        ("images/图 像.jpg", "masks/マスク.png"),
    ],
)
def test_names_with_spaces_and_unicode_are_paired_by_a_tab(load, folder_root, write, image, mask):
    (folder_root / IMAGES[0]).rename(folder_root / image)
    (folder_root / MASKS[0]).rename(folder_root / mask)
    lists = {"labeled": write("l.txt", [f"{image}\t{mask}"]), "unlabeled": write("u.txt", IMAGES[5:])}
    data = load(**lists, val=write("v.txt", pairs(1, 2)))
    assert data.labeled.names == (image,)
    assert data.train.image(0).shape == (40, 64, 3)
    assert data.train.mask(0).shape == (40, 64)


@pytest.mark.parametrize("name", ["images/Ä.jpg", "images/one space.jpg", "images/two more spaces.jpg"])
def test_an_unlabeled_list_may_hold_any_name(load, folder_root, write, name):
    (folder_root / IMAGES[6]).rename(folder_root / name)
    data = load(labeled=write("l.txt", pairs(0, 2)), unlabeled=write("u.txt", [name]), val=write("v.txt", pairs(2, 3)))
    assert names(data.train, data.unlabeled) == [name]


def test_a_labeled_list_of_bare_names_finds_the_masks(load, write):
    data = load(labeled=write("labeled.txt", IMAGES[:2]), val=1)
    assert data.labeled.names == tuple(IMAGES[:2])
    assert [data.train.pair(index).mask is not None for index in data.labeled_indices] == [True, True]


def test_a_train_list_limits_the_training_images(load, write):
    train = write("train.txt", [*pairs(0, 4), IMAGES[5]])
    data = load(train=train, labeled=2, val=write("val.txt", pairs(4, 5)))
    assert sorted(names(data.train)) == sorted([*IMAGES[:4], IMAGES[5]])
    assert len(data.labeled.names) == 2
    assert set(data.labeled.names) <= set(IMAGES[:4])
    assert len(data.unlabeled) == 3


def test_validation_and_test_lists_are_left_out_of_training(load, write):
    data = load(val=write("val.txt", pairs(0, 1)), test=write("test.txt", pairs(1, 2)))
    assert not set(names(data.train)) & set(IMAGES[:2])
    assert set(data.labeled.names) == set(IMAGES[2:5])


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("val", [1, 2, 0.2, "1/2"])
def test_chosen_validation_images_are_never_labeled_nor_unlabeled(load, write, val, seed):
    lists = {"labeled": write("labeled.txt", IMAGES[1:3])}
    for options in ({"labeled": 2}, {"labeled": None}, lists):
        data = load(**options, val=val, split_seed=seed)
        assert len(data.val) >= 1
        sets = [set(names(data.val)), set(data.labeled.names), set(names(data.train, data.unlabeled))]
        assert all(not first & second for first, second in itertools.combinations(sets, 2))
        assert set().union(*sets) == set(IMAGES)


def test_same_files_give_the_same_sets_and_another_seed_others(load):
    assert load(labeled=2, val=1).labeled == load(labeled=2, val=1).labeled
    assert len({load(labeled=2, val=1, split_seed=seed).labeled.names for seed in range(8)}) > 1


def test_palette_and_names_are_kept_or_made(load, classes):
    colors = ((0, 0, 0), (1, 2, 3), (4, 5, 6))
    assert load(val=1, palette=[list(color) for color in colors]).colors == colors
    assert load(val=1).colors == ((0, 0, 0), (128, 0, 0), (0, 128, 0))
    assert load(val=1).class_names == classes
    assert (load(val=1).ignore_index, load(val=1, ignore_index=254).ignore_index) == (255, 254)


# Errors ---------------------------------------------------------------------------------------------------------------


def test_missing_root_is_named(tmp_path, classes):
    assert sentence(folder, str(tmp_path / "none"), classes) == (
        f"expected dataset.root to be a folder, but {tmp_path / 'none'} does not exist; set dataset.root=/path/to/data"
    )


def test_missing_images_folder_is_named(load, folder_root):
    assert sentence(load, images="photos") == (
        f"expected a folder with images at {folder_root / 'photos'}, but it does not exist; "
        "set dataset.images, or give list files with dataset.train, dataset.labeled and dataset.val"
    )


def test_empty_images_folder_is_named(load, folder_root):
    (folder_root / "photos").mkdir()
    (folder_root / "photos/notes.txt").write_text("no image")
    assert sentence(load, images="photos") == (
        f"expected images ({IMAGE_LIST}) in {folder_root / 'photos'}, but found none"
    )


def test_masks_without_image_are_named_and_counted(load, folder_root):
    (folder_root / IMAGES[1]).unlink()
    (folder_root / IMAGES[2]).unlink()
    assert sentence(load) == (
        f"expected an image for every mask, but {MASKS[1]} has none (2 in total); "
        "an image and its mask have the same path below their folders, without suffix; the nearest image is "
        "images/day/img7.png"
    )


def test_two_images_of_one_name_are_refused(load, folder_root):
    (folder_root / "images/day/img1.jpg").write_bytes((folder_root / IMAGES[0]).read_bytes())
    assert sentence(load) == (
        f"expected one file named day/img1 in {folder_root / 'images'}, but found images/day/img1.jpg and img1.png"
    )


def test_two_masks_of_one_name_are_refused(load, folder_root):
    (folder_root / "masks/img0.tif").write_bytes(b"")
    assert sentence(load) == (
        f"expected one file named img0 in {folder_root / 'masks'}, but found masks/img0.png and img0.tif"
    )


def test_no_masks_at_all_is_said(make_folder, classes):
    root = make_folder("bare", masked=0)
    (root / "val.txt").write_text("images/img0.jpg")
    assert sentence(folder, str(root), classes, val="val.txt") == (
        f"expected masks for some training images below {root / 'masks'}, but that folder does "
        "not exist; a mask has the path and name of its image, with its own suffix, or set dataset.masks and "
        "dataset.mask_name"
    )


@pytest.mark.parametrize("key", ["train", "labeled", "unlabeled", "val", "test"])
def test_missing_list_is_named(load, folder_root, key):
    assert sentence(load, **{"val": 1, key: "none.txt"}) == (
        f"expected a list file or folder, but none.txt exists neither in {folder_root} nor in the working directory; "
        "write a fraction as 1/8 or a count as 92"
    )


def test_a_fraction_with_an_underscore_is_explained(load):
    assert sentence(load, labeled="1_8").endswith("write a fraction as 1/8 or a count as 92")


@pytest.mark.parametrize("content", ["", "\n", "  \n\n"])
@pytest.mark.parametrize("key", ["train", "labeled", "unlabeled", "val", "test"])
def test_empty_list_is_named(load, folder_root, key, content):
    (folder_root / "empty.txt").write_text(content)
    assert sentence(load, **{"val": 1, key: "empty.txt"}) == (
        f"expected at least one image in the list {folder_root / 'empty.txt'}, but it is empty"
    )


@pytest.mark.parametrize(
    ("line", "missing"),
    [
        (f"images/none.jpg {MASKS[0]}", "images/none.jpg"),
        (f"{IMAGES[0]} masks/none.png", "masks/none.png"),
        ("none.jpg", "none.jpg"),
        (f"{IMAGES[0]}\tmasks/no ne.png", "masks/no ne.png"),
    ],
)
def test_missing_file_of_a_list_is_named(load, folder_root, write, line, missing):
    assert sentence(load, labeled=write("l.txt", [*pairs(1, 2), line]), val=1).startswith(
        f"expected the file {folder_root / missing}, which {folder_root / 'l.txt'} lists, but it does not exist"
    )


def test_an_image_listed_twice_is_named(load, folder_root, write):
    assert sentence(load, labeled=write("l.txt", [*pairs(0, 3), *pairs(1, 2)]), val=1) == (
        f"expected every image once in the list {folder_root / 'l.txt'}, but {IMAGES[1]} occurs more than once"
    )


def test_a_line_of_three_names_is_explained(load, folder_root, write):
    assert sentence(load, labeled=write("l.txt", ["a b c"]), val=1) == (
        f"expected 'image mask' in {folder_root / 'l.txt'}, but found 'a b c'; separate names with spaces by a tab"
    )


@pytest.mark.parametrize("path", ["../outside.jpg", "images/../../outside.jpg"])
@pytest.mark.parametrize("place", ["{path}", "{path} masks/img0.png", "images/img0.jpg {path}"])
def test_paths_that_leave_the_root_are_refused(load, folder_root, write, path, place):
    (folder_root.parent / "outside.jpg").write_bytes((folder_root / IMAGES[0]).read_bytes())
    assert sentence(load, labeled=write("l.txt", [place.format(path=path)]), val=1) == (
        f"expected paths below {folder_root} in {folder_root / 'l.txt'}, but found {path!r}"
    )


@pytest.mark.parametrize(("key", "what"), [("val", "validation"), ("test", "test")])
def test_labeled_images_must_not_be_held_out(load, write, key, what):
    options = {
        "labeled": write("l.txt", pairs(0, 3)),
        "val": write("v.txt", pairs(3, 4)),
        key: write("h.txt", pairs(1, 4)),
    }
    assert sentence(load, **options) == (
        f"expected labeled and {what} images to differ, but {min(IMAGES[1:3])} is in both (2 in total); "
        "remove them from one list"
    )


def test_another_spelling_of_a_path_does_not_hide_an_overlap(load, write):
    options = {"labeled": write("l.txt", pairs(0, 2)), "val": write("v.txt", [f"./{line}" for line in pairs(1, 3)])}
    assert "expected labeled and validation images to differ" in sentence(load, **options)


def test_train_list_with_validation_images_as_labeled_is_refused(load, write):
    options = {"train": write("t.txt", pairs(0, 5)), "val": write("v.txt", pairs(0, 1))}
    assert sentence(load, **options) == (
        f"expected labeled and validation images to differ, but {IMAGES[0]} is in both (1 in total); "
        "remove them from one list"
    )


def test_labeled_and_unlabeled_lists_must_not_overlap(load, write):
    options = {"labeled": write("l.txt", pairs(0, 2)), "unlabeled": write("u.txt", IMAGES[1:4])}
    options["val"] = write("v.txt", pairs(4, 5))
    assert sentence(load, **options) == (
        f"expected labeled and unlabeled images to differ, but {IMAGES[1]} is in both lists"
    )


def test_labeled_list_needs_masks(load, write):
    assert sentence(load, labeled=write("l.txt", [*pairs(0, 1), IMAGES[5]]), val=1) == (
        f"expected a mask for every image in l.txt, but {IMAGES[5]} has none (1 in total); an image and its mask have "
        "the same path below their folders, without suffix; the nearest mask is masks/night/late/img2.png"
    )


def test_more_labels_than_masks_are_refused(load):
    assert sentence(load, labeled=5, val=1) == (
        "expected dataset.labeled of at most 4, the number of images with a mask to choose from, but got 5"
    )


def test_more_validation_images_than_masks_are_refused(load):
    assert sentence(load, val=6) == (
        "expected dataset.val of at most 5, the number of images with a mask to choose from, but got 6"
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ["only"],
            "expected at least 2 class names, background included, but got ['only']; "
            "set dataset.classes, as in 'dataset.classes=[background,road]'",
        ),
        (
            [],
            "expected at least 2 class names, background included, but got []; "
            "set dataset.classes, as in 'dataset.classes=[background,road]'",
        ),
        (["a", "b", "a"], "expected different class names, but got ['a', 'b', 'a']"),
        (
            [str(index) for index in range(256)],
            "expected an ignore value from 256 (the number of classes) to 255, but got 255",
        ),
    ],
)
def test_wrong_class_names_are_refused(folder_root, names, message):
    assert sentence(folder, str(folder_root), names, val=1) == message


@pytest.mark.parametrize("value", [2, -1, 256])
def test_ignore_value_must_be_no_class(load, value):
    assert sentence(load, ignore_index=value) == (
        f"expected an ignore value from 3 (the number of classes) to 255, but got {value}"
    )


def test_palette_needs_a_color_for_each_class(load):
    assert sentence(load, palette=[[0, 0, 0], [1, 1, 1]]) == (
        "expected 3 colors in dataset.palette, one per class, but got 2"
    )


def test_a_mask_that_does_not_exist_is_not_invented(load):
    data = load(val=1)
    index = data.unlabeled[0]
    assert sentence(data.train.mask, index) == (
        f"expected a mask for the image {data.train.name(index)}, but it has none"
    )


def test_a_file_that_went_away_is_named(load, folder_root):
    data = load(val=1)
    name = data.train.name(0)
    (folder_root / name).unlink()
    assert sentence(data.train.image, 0).startswith(f"cannot read the image {folder_root / name} (")


def test_the_lists_that_a_run_saves_give_another_run_the_same_split(load, write):
    first = load(labeled=2, val=2)
    labeled = write("labeled.txt", first.labeled.names)
    again = load(labeled=labeled, val=write("val.txt", names(first.val)))
    assert again.labeled.sha256 == first.labeled.sha256
    assert names(again.val) == names(first.val)
    assert all(again.val.pair(index).mask for index in range(len(again.val)))
    assert sorted(names(again.train, again.unlabeled)) == sorted(names(first.train, first.unlabeled))


# CSV files ------------------------------------------------------------------------------------------------------------


def write_csv(root, content, name="list.csv"):
    (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


@pytest.mark.parametrize("mark", [",", ";", "\t"], ids=["comma", "semicolon", "tab"])
@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
def test_csv_files_of_every_kind_are_read(load, folder_root, mark, end, bom):
    rows = [("id", "image", "mask"), *((str(index), IMAGES[index], MASKS[index]) for index in range(2))]
    content = bom + end.join(mark.join(row) for row in rows).encode()
    data = load(labeled=write_csv(folder_root, content), val=1)
    assert data.labeled == Split("list.csv", tuple(IMAGES[:2]))
    assert [data.train.pair(index).mask for index in data.labeled_indices] == MASKS[:2]


@pytest.mark.parametrize(
    ("image", "mask"),
    [("images/a,b.jpg", "masks/a,b.png"), ('images/a "b".jpg', "masks/x y.png"), ("images/a;b c.jpg", "masks/图.png")],
)
def test_csv_files_may_quote_any_name(load, folder_root, image, mask):
    (folder_root / IMAGES[0]).rename(folder_root / image)
    (folder_root / MASKS[0]).rename(folder_root / mask)
    quoted = [f'"{name}"' for name in (image.replace('"', '""'), mask)]
    train = write_csv(folder_root, f"mask,image\n{quoted[1]},{quoted[0]}\n{MASKS[1]},{IMAGES[1]}\n")
    data = load(train=train, val=1)
    assert {*data.labeled.names, *names(data.val)} == {image, IMAGES[1]}
    assert {data.train.pair(0).mask, data.val.pair(0).mask} == {mask, MASKS[1]}


def test_csv_rows_without_mask_are_unlabeled(load, folder_root):
    rows = ["image,mask", f"{IMAGES[0]},{MASKS[0]}", f"{IMAGES[1]},", f"{IMAGES[5]}", "", f"{IMAGES[2]},{MASKS[2]}"]
    data = load(train=write_csv(folder_root, "\n".join(rows)), val=1)
    assert set(names(data.train, data.unlabeled)) == {IMAGES[1], IMAGES[5]}
    assert {*data.labeled.names, *names(data.val)} == {IMAGES[0], IMAGES[2]}


def test_csv_files_with_images_alone_are_unlabeled_lists(load, folder_root, write):
    unlabeled = write_csv(folder_root, "\n".join(["image", *IMAGES[5:7]]))
    data = load(labeled=write("l.txt", pairs(0, 2)), unlabeled=unlabeled, val=write("v.txt", pairs(2, 3)))
    assert names(data.train, data.unlabeled) == IMAGES[5:7]


@pytest.mark.parametrize("content", ["", "image,mask\n", "image;mask\r\n\r\n", "image,mask\n,\n"])
def test_csv_files_without_images_are_named(load, folder_root, content):
    assert sentence(load, labeled=write_csv(folder_root, content)) == (
        f"expected at least one image in the list {folder_root / 'list.csv'}, but it is empty"
    )


@pytest.mark.parametrize("header", ["file,mask", f"{IMAGES[0]},{MASKS[0]}"])
def test_csv_files_without_the_columns_are_explained(load, folder_root, header):
    assert sentence(load, labeled=write_csv(folder_root, f"{header}\n{IMAGES[1]},{MASKS[1]}")) == (
        f"expected a first line with the columns image and mask in {folder_root / 'list.csv'}, but found {header!r}; "
        "name the columns"
    )


@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_lists_that_are_no_utf8_are_explained(load, folder_root, name):
    mark = "," if name == "list.csv" else " "
    content = "" if mark == " " else "image,mask\n"
    write_csv(folder_root, f"{content}images/Straße.jpg{mark}masks/x.png".encode("latin-1"), name)
    assert sentence(load, labeled=name) == (
        f"expected the list {folder_root / name} in UTF-8, but it is not; save it in UTF-8"
    )


def test_missing_files_of_a_csv_file_are_named(load, folder_root):
    assert sentence(load, labeled=write_csv(folder_root, f"image,mask\n{IMAGES[0]},masks/none.png\n")).startswith(
        f"expected the file {folder_root / 'masks/none.png'}, which {folder_root / 'list.csv'} lists, but it does not "
        "exist"
    )


# Folders as parts -----------------------------------------------------------------------------------------------------


def save_pairs(folder, count, images="images", masks="masks", mark="a"):
    """Write small images with masks of 0 and 1, gray value `count`, named after a mark."""
    mask = np.zeros((8, 10), np.uint8)
    mask[4:] = 1
    for index in range(count):
        for sub, pixels in ((images, np.full((8, 10, 3), count, np.uint8)), (masks, mask)):
            if sub:
                (folder / sub).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / sub / f"{mark}{index}.png")


def in_root(folder, count, mark="a"):
    return [f"{folder}/{mark}{index}.png" for index in range(count)]


@pytest.fixture
def parts(tmp_path, classes):
    """A root with train, val and test, in one of the two usual layouts."""

    def make(layout):
        root = tmp_path / "parts"
        for part, count in (("train", 4), ("val", 3), ("test", 2)):
            if layout == "part/images":
                save_pairs(root / part, count, mark=part)
            else:
                save_pairs(root, count, f"images/{part}", f"masks/{part}", mark=part)
        return root

    return make


@pytest.mark.parametrize("layout", ["part/images", "images/part"])
@pytest.mark.parametrize("absolute", [False, True])
def test_parts_may_be_folders_with_images_and_masks(parts, classes, layout, absolute):
    root = parts(layout)
    found = {part: layout.replace("part", part) for part in ("train", "val", "test")}
    given = {part: part if layout == "part/images" else folder for part, folder in found.items()}
    if absolute:
        given = {part: str(root / folder) for part, folder in given.items()}
    data = folder(str(root), classes, **given)
    for source, part, count in ((data.train, "train", 4), (data.val, "val", 3), (data.test, "test", 2)):
        assert names(source) == in_root(found[part], count, part)
        for index in range(count):
            assert source.image(index).max() == count
            assert (source.mask(index)[[0, -1], 0] == [0, 1]).all()
    assert set(data.labeled.names) == set(names(data.train))


def test_without_a_train_folder_the_rest_below_images_is_for_training(parts, classes):
    root = parts("images/part")
    data = folder(str(root), classes, val="images/val", test="images/test")
    assert names(data.train) == in_root("images/train", 4, "train")


def test_labeled_and_unlabeled_parts_may_be_folders(parts, classes):
    root = parts("part/images")
    save_pairs(root / "more", 5, images="deep/er", masks=None)
    data = folder(str(root), classes, labeled="train", unlabeled="more", val="val")
    assert data.labeled.label == "train"
    assert list(data.labeled.names) == in_root("train/images", 4, "train")
    assert names(data.train, data.unlabeled) == in_root("more/deep/er", 5)
    assert data.notes == ()


def test_unlabeled_images_may_lie_in_several_folders_outside_the_root(load, tmp_path):
    for index in range(2):
        save_pairs(tmp_path / f"out{index}", 2 + index, images="in", masks=None)
    data = load(labeled=2, unlabeled=[str(tmp_path / "out0"), str(tmp_path / "out1/in")], val=1)
    expected = [str(tmp_path / f"out{number}/in/a{index}.png") for number in range(2) for index in range(2 + number)]
    assert names(data.train, data.unlabeled) == expected
    assert [int(data.train.image(index).max()) for index in data.unlabeled] == [2, 2, 3, 3, 3]
    assert "it is not used" in data.notes[0]


def test_all_that_is_in_no_other_set_is_unlabeled_though_it_has_a_mask(load):
    data = load(labeled=2, val=1, unlabeled="images")
    assert set(names(data.train, data.unlabeled)) == set(IMAGES) - {*data.labeled.names, *names(data.val)}


def test_a_folder_without_images_is_named(load, tmp_path):
    (tmp_path / "empty").mkdir()
    assert sentence(load, unlabeled=str(tmp_path / "empty"), val=1) == (
        f"expected images ({IMAGE_LIST}) in {tmp_path / 'empty'}, but found none"
    )


def test_a_labeled_folder_needs_masks(load, tmp_path):
    save_pairs(tmp_path / "bare", 2, masks=None)
    assert sentence(load, labeled=str(tmp_path / "bare"), val=1) == (
        f"expected a mask for every image in {tmp_path / 'bare'}, but {tmp_path / 'bare/images/a0.png'} has none (2 in "
        "total); an image and its mask have the same path below their folders, without suffix"
    )


def test_a_mask_may_be_found_elsewhere_than_a_list_says(folder_root, write):
    asked = []

    def find_mask(name):
        asked.append(name)
        return name.replace("truth_", "masks/")

    listed = write("l.txt", [f"{IMAGES[0]} truth_img0.png", IMAGES[1]])
    found = FileIndex([folder_root], "images", "masks", find_mask=find_mask)
    assert found.part(listed) == [Pair(IMAGES[0], MASKS[0]), Pair(IMAGES[1], None)]
    assert asked == ["truth_img0.png"]
    assert found.part(listed, with_masks=False) == [Pair(IMAGES[0], None), Pair(IMAGES[1], None)]


# Several roots, links and many files ----------------------------------------------------------------------------------


def test_several_roots_are_one_data_set_with_names_below_their_common_folder(tmp_path, classes):
    for name, count in (("sites/north", 3), ("sites/south/2024", 2)):
        save_pairs(tmp_path / name, count)  # the same file names in both
    data = folder([str(tmp_path / "sites/north"), str(tmp_path / "sites/south/2024")], classes, val=1, labeled=3)
    expected = [*in_root("north/images", 3), *in_root("south/2024/images", 2)]
    assert sorted({*names(data.train), *names(data.val)}) == expected
    assert len(data.train) + len(data.val) == 5
    for source in (data.train, data.val):
        for index in range(len(source)):
            assert source.image(index).max() == (3 if source.name(index).startswith("north") else 2)
            assert source.pair(index).mask == source.name(index).replace("images", "masks")
            assert source.mask(index).max() == 1
    (tmp_path / "sites/val.txt").write_text("south/2024/images/a1.png\n")
    listed = folder([str(tmp_path / "sites/north"), str(tmp_path / "sites/south/2024")], classes, val="val.txt")
    assert names(listed.val) == ["south/2024/images/a1.png"]
    assert listed.val.mask(0).max() == 1


def test_one_of_several_roots_that_is_missing_is_named(folder_root, classes):
    assert f"but {folder_root}/none does not exist" in sentence(
        folder, [str(folder_root), str(folder_root / "none")], classes
    )


def test_no_root_is_refused(classes):
    assert sentence(folder, [], classes) == (
        "expected dataset.root to be a folder or a list of folders, but the list is empty"
    )


def test_a_root_that_is_given_twice_counts_once(folder_root, classes):
    twice = folder([str(folder_root), f"{folder_root}/../{folder_root.name}"], classes, val=1)
    once = folder(str(folder_root), classes, val=1)
    assert (names(twice.train), names(twice.val)) == (names(once.train), names(once.val))


@pytest.mark.parametrize("what", ["root", "images", "sub-folder"])
def test_linked_folders_are_followed(folder_root, tmp_path, classes, what):
    linked = tmp_path / "linked"
    if what == "root":
        linked.symlink_to(folder_root)
    else:
        subs = ("images", "masks") if what == "images" else ("images/day", "masks/day")
        for sub in subs:
            (linked / sub).parent.mkdir(parents=True, exist_ok=True)
            (linked / sub).symlink_to(folder_root / sub)
    data = folder(str(linked), classes, val=1)
    expected = [name for name in IMAGES if what != "sub-folder" or "/day/" in name]
    assert sorted(names(data.train) + names(data.val)) == sorted(expected)
    assert data.train.image(0).ndim == 3


@pytest.mark.parametrize("given", ["link", "folder"])
@pytest.mark.parametrize("key", ["val", "test"])
def test_a_linked_root_does_not_hide_an_overlap(folder_root, tmp_path, classes, given, key):
    (tmp_path / "link").symlink_to(folder_root)
    (folder_root / "images/day/img7.png").unlink()  # has no mask
    root, other = (tmp_path / "link", folder_root) if given == "link" else (folder_root, tmp_path / "link")
    data = folder(str(root), classes, **{"val": 1, "labeled": 1, key: str(other / "images/day")})
    held_out = data.val if key == "val" else data.test
    files = [(root / name).resolve() for name in names(held_out)]
    assert len(files) == 2
    used = [(root / data.train.name(index)).resolve() for index in (*data.labeled_indices, *data.unlabeled)]
    assert not set(files) & set(used)


def test_a_link_to_a_folder_above_ends(folder_root, load):
    (folder_root / "images/day/up").symlink_to(folder_root / "images")
    data = load(val=1)
    assert len(data.train) + len(data.val) == 8


@pytest.mark.parametrize("name", [b"images/\xff\xe4.png", b"images/plain.png"])
def test_names_that_are_no_utf8_can_be_hashed_saved_and_read_again(tmp_path, classes, name):
    save_pairs(tmp_path / "data", 3)
    path = os.fsdecode(name)
    try:
        for old, new in (("images/a0.png", path), ("masks/a0.png", path.replace("images", "masks"))):
            (tmp_path / "data" / old).rename(tmp_path / "data" / new)
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (tmp_path / "data/val.txt").write_text("images/a1.png\n")
    data = folder(str(tmp_path / "data"), classes, val="val.txt")
    assert path in data.labeled.names
    save_lists(tmp_path / "data", data)
    again = folder(str(tmp_path / "data"), classes, val="val.txt", labeled="labeled.txt")
    assert again.labeled.sha256 == data.labeled.sha256
    assert data.train.image(data.labeled.names.index(path)).shape == (8, 10, 3)


def test_lists_may_name_images_outside_the_root_by_their_whole_paths(load, folder_root, tmp_path, write):
    save_pairs(tmp_path / "other", 2)
    outside = [str(tmp_path / "other" / name) for name in in_root("images", 2)]
    lines = [f"{name} {name.replace('/images/', '/masks/')}" for name in outside]
    data = load(
        labeled=write("l.txt", lines),
        unlabeled=write("u.txt", [IMAGES[5], str(folder_root / IMAGES[6])]),
        val=write("v.txt", pairs(0, 1)),
    )
    assert list(data.labeled.names) == outside
    assert [int(data.train.mask(index).max()) for index in data.labeled_indices] == [1, 1]
    assert names(data.train, data.unlabeled) == IMAGES[5:7]  # one name for one file


def test_a_saved_list_of_a_labeled_folder_outside_the_root_is_read_again(load, folder_root, tmp_path):
    save_pairs(tmp_path / "other", 2)
    first = load(labeled=str(tmp_path / "other"), val=1)
    save_lists(folder_root, first)
    again = load(labeled="labeled.txt", val=1)
    assert again.labeled.sha256 == first.labeled.sha256
    assert [int(again.train.mask(index).max()) for index in again.labeled_indices] == [1, 1]


def touch_many(root, count):
    (root / "many").mkdir()
    listed = [f"many/{index:06d}.png" for index in range(count)]
    for name in listed:
        (root / name).touch()
    return listed


def test_a_long_list_is_read_in_no_time_even_if_it_is_wrong(folder_root, write):
    listed = touch_many(folder_root, 20_000)
    files = FileIndex([folder_root], "images", "masks")
    start = time.perf_counter()
    assert [pair.image for pair in files.part(write("l.txt", listed))] == listed
    good = time.perf_counter() - start
    start = time.perf_counter()
    assert f"but {listed[-1]} occurs more than once" in sentence(files.part, write("l.txt", [*listed, listed[-1]]))
    assert time.perf_counter() - start < 2 * good + 1


# What a newcomer does -------------------------------------------------------------------------------------------------


def test_a_wrong_masks_folder_is_named(load, folder_root):
    assert sentence(load, masks="labels") == (
        f"expected masks for some training images below {folder_root / 'labels'}, but that folder "
        "does not exist; a mask has the path and name of its image, with its own suffix, or set dataset.masks and "
        "dataset.mask_name"
    )


def test_hidden_folders_are_passed_over(load, folder_root):
    for name in ("images/.thumbs/img0.jpg", "masks/.ipynb_checkpoints/img0-checkpoint.png", "images/__MACOSX/img0.jpg"):
        (folder_root / name).parent.mkdir(parents=True)
        (folder_root / name).write_bytes((folder_root / "images/img0.jpg").read_bytes())
    data = load(val=1)
    assert len(data.train) + len(data.val) == 8


def test_folders_that_are_called_like_numbers(make_folder, classes):
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    root = make_folder("data")
    for year in ("2019", "2020", "2021"):
        make_folder(f"data/{year}", masked=8)
    options = ["train=[2019,2020]", "test=2021", "val=1", f"classes=[{','.join(classes)}]", f"root={root}"]
    config = OmegaConf.from_dotlist([*options, "_target_=mlpmatch_pl.data.datasets.folder.folder"])
    data = instantiate(config, _convert_="all")
    assert (len(data.train), len(data.val), len(data.test)) == (15, 1, 8)


def test_an_overlap_of_bare_lists_is_called_one(load, write):
    options = {"labeled": write("l.txt", [IMAGES[1], IMAGES[3]]), "val": write("v.txt", IMAGES[1:3])}
    assert "expected labeled and validation images to differ, but images/day/img1.png is in both" in sentence(
        load, **options
    )


@pytest.mark.parametrize("line", ["  {} {}", "{}  {} ", " {}\t{} "])
def test_spaces_around_names_do_not_matter(load, write, line):
    assert load(labeled=write("l.txt", [line.format(IMAGES[0], MASKS[0])]), val=1).labeled.names == (IMAGES[0],)


def test_headers_of_csv_files_may_be_capitalized(load, write):
    assert load(labeled=write("l.csv", ["Image;Mask", f"{IMAGES[0]};{MASKS[0]}"]), val=1).labeled.names == (IMAGES[0],)


def test_files_of_other_formats_are_counted_by_suffix(tmp_path):
    for index in range(4):
        save_image(tmp_path / f"images/{index}.png", np.full((8, 8, 3), index, np.uint8))
        save_mask(tmp_path / f"masks/{index}.png", np.zeros((8, 8), np.uint8), palette=False)
    assert not folder(str(tmp_path), ["a", "b"]).notes
    for name in ("a.NEF", "sub/b.nef", "c.jxl", "notes.txt", "a.json", ".hidden.raw"):
        (tmp_path / "images" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "images" / name).write_bytes(b"x")
    (tmp_path / "masks/0.mat").write_bytes(b"x")
    assert folder(str(tmp_path), ["a", "b"]).notes == (
        f"3 files in {tmp_path / 'images'} are left out, because they cannot be read: 2 .nef, 1 .jxl",
        f"1 files in {tmp_path / 'masks'} are left out, because they cannot be read: 1 .mat",
    )
    for path in (tmp_path / "masks").glob("*.png"):
        path.unlink()
    assert "but found only 1 .mat, which cannot be read;" in sentence(folder, str(tmp_path), ["a", "b"])
    for path in (tmp_path / "images").glob("*.png"):
        path.unlink()
    assert sentence(folder, str(tmp_path), ["a", "b"]).endswith(", but found only 2 .nef, 1 .jxl; convert them")


def test_transparent_pixels_count_neither_as_labels_nor_for_pseudo_labels(tmp_path):
    rng = np.random.default_rng(0)
    hidden = np.zeros((60, 60), np.bool_)
    hidden[:, :30] = True
    for index in range(6):
        pixels = np.full((60, 60, 4), 200, np.uint8)
        pixels[hidden] = 7, 7, 7, 0
        save_image(tmp_path / f"images/{index}.png", pixels)
        if index < 4:
            save_mask(tmp_path / f"masks/{index}.png", (rng.random((60, 60)) < 0.5).astype(np.uint8), palette=False)
    data = folder(str(tmp_path), ["a", "b"], val=1)
    for source in (data.train, CachedSource(data.train, tmp_path)):
        for _ in range(2):  # decoded, and from the cache
            assert ((source.mask(data.labeled_indices[0]) == 255) == hidden).all()
        views = UnlabeledDataset(source, data.unlabeled, WeakView(48), StrongView([]), CutMix(), 1, True, seed=0)
        shares = []
        for draw in range(6):
            sample = views[0, draw]
            for view in (sample, sample["partner"]):
                pixels, valid = view["weak"].numpy(), view["valid"].numpy()
                assert (pixels[:, valid] > 80).all()
                assert (pixels[:, ~valid] < 130).all()
                shares.append(valid.mean())
        assert 0.1 < np.mean(shares) < 0.9

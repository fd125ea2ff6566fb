import dataclasses
import logging

import numpy as np
import pytest
from helpers.images import save_image, save_mask
from PIL import Image

from mlpmatch_pl.data import validation as checks
from mlpmatch_pl.data.dataset import EvalDataset, LabeledDataset
from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.datasets.shapes import shapes
from mlpmatch_pl.data.files import FileSource
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.data.readers.mask import MaskReader
from mlpmatch_pl.data.transforms.weak import WeakView
from mlpmatch_pl.data.validation import Job, all_jobs, find_problems, sample, scan_files, validate_dataset
from mlpmatch_pl.utils.errors import UserError

CROP = 33
ROLES = {  # image and mask of every role; img0 ... img4 have masks, img3 is unlabeled all the same
    "labeled": ("images/img0.jpg", "masks/img0.png"),
    "val": ("images/day/img1.png", "masks/day/img1.png"),
    "test": ("images/night/late/img2.jpg", "masks/night/late/img2.png"),
    "unlabeled": ("images/img3.png", "masks/img3.png"),
}


@pytest.fixture
def load(folder_root, classes):
    for role in ("labeled", "val", "test"):
        (folder_root / f"{role}.txt").write_text(" ".join(ROLES[role]))

    def load(**options):
        lists = {"labeled": "labeled.txt", "val": "val.txt", "test": "test.txt"}
        return folder(str(folder_root), classes, **{**lists, **options})

    return load


def complaint(data):
    with pytest.raises(UserError) as caught:
        validate_dataset(data, CROP)
    return str(caught.value)


def rewrite(path, change):
    with Image.open(path) as file:
        pixels = np.array(file)
    Image.fromarray(change(pixels)).save(path)


def with_value(value):
    def change(mask):
        mask[3, 4] = value
        return mask

    return change


def test_clean_data_pass(load):
    validate_dataset(load(), CROP)
    validate_dataset(load(test=None), CROP)
    validate_dataset(shapes(labeled=2, train=4, val=1, test=1, size=48), CROP)


@pytest.mark.parametrize("role", ROLES)
def test_an_image_that_is_none_is_found(load, folder_root, role):
    path = folder_root / ROLES[role][0]
    path.write_bytes(b"this is no image")
    assert complaint(load()) == f"cannot read the image {path}: it is damaged or not an image; replace or remove it"


@pytest.mark.parametrize("role", ROLES)
def test_an_empty_image_file_is_found_in_one_line(load, folder_root, role):
    path = folder_root / ROLES[role][0]
    path.write_bytes(b"")
    message = complaint(load())
    assert message.startswith(f"cannot read the image {path}")
    assert "\n" not in message


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("role", ["labeled", "unlabeled"])
def test_a_truncated_image_is_found(load, folder_root, role, share):
    path = folder_root / ROLES[role][0]
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert complaint(load()) == f"cannot read the image {path}: it is damaged or not an image; replace or remove it"


@pytest.mark.parametrize("content", [b"", b"this is no image", "truncated"])
@pytest.mark.parametrize("role", ["labeled", "val", "test"])
def test_a_broken_mask_is_found(load, folder_root, role, content):
    path = folder_root / ROLES[role][1]
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 3, (400, 400), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    message = complaint(load())
    assert message.startswith(f"cannot read the mask {path}")
    assert message.endswith("; replace or remove it")


@pytest.mark.parametrize("role", ["labeled", "val", "test"])
def test_image_and_mask_of_different_size_are_found(load, folder_root, role):
    image, mask = ROLES[role]
    rewrite(folder_root / mask, lambda ids: ids[:30, :20])
    data = load()
    source, index = {"labeled": (data.train, data.labeled_indices[0]), "val": (data.val, 0), "test": (data.test, 0)}[
        role
    ]
    height, width = source.image(index).shape[:2]
    assert complaint(data) == (
        f"expected image and mask of the same size, but {image} is {width} x {height} and its mask 20 x 30 pixels"
    )


@pytest.mark.parametrize("value", [3, 7, 254])
@pytest.mark.parametrize("role", ["labeled", "val", "test"])
def test_a_single_wrong_mask_value_is_found(load, folder_root, role, value):
    image, mask = ROLES[role]
    rewrite(folder_root / mask, with_value(value))
    assert complaint(load()) == (
        f"expected mask values 0..2 or 255 (ignore), but the mask of {image} has {value}; "
        "correct the mask, dataset.classes or dataset.ignore_index, or map the values by dataset.mask_values"
    )


def test_at_most_five_wrong_values_are_listed_in_order(load, folder_root):
    rewrite(
        folder_root / ROLES["labeled"][1], lambda ids: (np.arange(ids.size).reshape(ids.shape) % 12).astype(np.uint8)
    )
    assert "has 3, 4, 5, 6, 7; correct" in complaint(load())


def test_another_ignore_value_is_allowed_and_255_is_then_wrong(load, folder_root):
    for role in ("labeled", "val", "test"):
        rewrite(folder_root / ROLES[role][1], lambda ids: np.where(ids == 255, 200, ids).astype(np.uint8))
    validate_dataset(load(ignore_index=200), CROP)
    rewrite(folder_root / ROLES["val"][1], with_value(255))
    assert "expected mask values 0..2 or 200 (ignore), but the mask of images/day/img1.png has 255;" in complaint(
        load(ignore_index=200)
    )


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("role", ["labeled", "val", "test"])
def test_a_mask_of_colors_is_found(load, folder_root, role, mode):
    path = folder_root / ROLES[role][1]
    with Image.open(path) as file:
        converted = file.convert("L").convert(mode)
    converted.save(path)
    assert complaint(load()) == (
        f"expected a mask with one channel of class ids, but {path} has 3 color channels; save class ids as a gray or "
        "palette PNG, or set dataset.palette to the color of each class, or dataset.class_channels=true if it has a "
        "channel for each class"
    )


def test_a_value_beyond_eight_bits_is_found(load, folder_root):
    path = folder_root / ROLES["labeled"][1]
    Image.fromarray(np.full((40, 64), 700, np.uint16)).save(path)
    assert complaint(load()) == (
        f"expected class ids from 0 to 255, but {path} has the value 700; map the values to classes, as in "
        "'dataset.mask_values={700:255,0:0,1:1}'"
    )


def test_a_validation_list_without_masks_is_found(load, folder_root):
    (folder_root / "val.txt").write_text(ROLES["val"][0])  # a bare name: its mask is looked for by path
    (folder_root / ROLES["val"][1]).unlink()
    with pytest.raises(UserError) as caught:
        load()
    assert str(caught.value) == (
        f"expected a mask for every validation image, but {ROLES['val'][0]} has none (1 in total); an image and its "
        "mask have the same path below their folders, without suffix; the nearest mask is masks/day/img4.png"
    )


def test_an_empty_validation_set_is_found(load, folder_root):
    data = dataclasses.replace(load(), val=FileSource(folder_root, [], ImageReader(), MaskReader()))
    assert complaint(data) == "expected at least 1 validation image, but found none; set dataset.val"


def test_masks_of_unlabeled_images_are_never_opened(load, folder_root):
    (folder_root / ROLES["unlabeled"][1]).write_bytes(b"this is no image")
    validate_dataset(load(), CROP)


def test_every_file_is_read_once_and_no_other(load, folder_root, monkeypatch):
    (folder_root / "unlabeled.txt").write_text("images/img3.png\nimages/img6.jpg")
    data = load(unlabeled="unlabeled.txt")
    read = {"image": [], "mask": []}
    for kind, names in read.items():
        original = getattr(FileSource, kind)

        def spy(self, index, original=original, names=names):
            names.append(self.name(index))
            return original(self, index)

        monkeypatch.setattr(FileSource, kind, spy)
    validate_dataset(data, CROP)
    held = [ROLES[role][0] for role in ("labeled", "val", "test")]
    assert sorted(read["mask"]) == sorted(held)
    assert sorted(read["image"]) == sorted([*held, "images/img3.png", "images/img6.jpg"])


def test_the_first_file_in_order_is_named(load, folder_root):
    for role in ("unlabeled", "test", "val"):
        (folder_root / ROLES[role][0]).write_bytes(b"this is no image")
        for _ in range(3):  # not the one that a thread happens to reach first
            assert str(folder_root / ROLES[role][0]) in complaint(load())


# What concerns several files ------------------------------------------------------------------------------------------


def findings(data, crop_size=CROP):
    return [
        (item.is_error, item.message)
        for item in find_problems(data, list(scan_files(data, all_jobs(data), True)), crop_size)
    ]


def test_masks_of_zero_and_255_are_suspected(load, folder_root):
    for role in ("labeled", "val"):
        rewrite(folder_root / ROLES[role][1], lambda ids: np.where(ids == 1, 255, 0).astype(np.uint8))
    message = (
        "expected at least two classes in the labeled masks, but they have only background and 255 (ignore); if other "
        "values in your files are classes, map them, as in 'dataset.mask_values={0:0,255:1}', else label images that "
        "show other classes"
    )
    assert complaint(load()) == message
    assert (True, message) in findings(load())
    validate_dataset(load(mask_values={0: 0, 255: 1, "other": 2}), CROP)


def test_classes_that_are_never_labeled_or_validated_are_named(load):
    assert [finding for finding in findings(load()) if "nearly the same" not in finding[1]] == [
        (False, "no labeled mask has the class sky"),
        (False, "no validation mask has the class background"),
    ]


def test_several_missing_classes_are_named_together(folder_root, load):
    data = folder(
        str(folder_root), [*"abcde"], labeled="labeled.txt", val="val.txt", unlabeled=["images/night", "images/day"]
    )
    assert (False, "no labeled mask has the classes c, d, e") in findings(data)


def test_a_mask_without_any_class_is_named(load, folder_root):
    rewrite(folder_root / ROLES["test"][1], lambda ids: np.full_like(ids, 255))
    assert (
        False,
        "every pixel of the mask of images/night/late/img2.jpg is ignored (1 such masks in total)",
    ) in findings(load())


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
def test_copies_under_another_name_and_format_are_found(load, folder_root, suffix):
    original = folder_root / ROLES["val"][0]
    with Image.open(original) as file:
        file.convert("RGB").save(folder_root / f"images/copy{suffix}")
    (folder_root / "labeled.txt").write_text(f"images/copy{suffix} masks/day/img1.png")
    message = (
        f"expected labeled and val images to differ, but images/copy{suffix} and images/day/img1.png are the same "
        "image (1 in total); remove them from one of them"
    )
    assert (True, message) in findings(load())


@pytest.mark.parametrize(("role", "part"), [("val", "val"), ("test", "test"), ("labeled", "labeled")])
def test_unlabeled_copies_are_a_warning(load, folder_root, role, part):
    original = folder_root / ROLES[role][0]
    copy = folder_root / f"images/copy{original.suffix}"
    copy.write_bytes(original.read_bytes())
    message = (
        f"expected {part} and unlabeled images to differ, but {ROLES[role][0]} and {copy.relative_to(folder_root)} "
        "are the same image (1 in total)"
    )
    assert (False, message) in findings(load())


def test_the_same_picture_twice_among_the_unlabeled_is_told(load, folder_root):
    for number in range(2):
        (folder_root / f"images/copy{number}.png").write_bytes((folder_root / "images/img3.png").read_bytes())
    (message,) = [text for _, text in findings(load()) if "are the same" in text]
    assert message.startswith("expected unlabeled images to differ, but images/")
    assert message.endswith("are the same image (2 in total)")


def test_images_of_equal_bytes_but_another_shape_are_no_copies(load, folder_root):
    for number, shape in enumerate([(40, 60, 3), (60, 40, 3)]):
        Image.fromarray(np.full(shape, 9, np.uint8)).save(folder_root / f"images/flat{number}.png")
    assert not [text for _, text in findings(load()) if "are the same" in text]


def test_images_smaller_than_the_crop_are_counted(load):
    sizes = [(40 + 3 * index, 64 - 4 * index) for index in (0, 3, 4, 5, 6, 7)]  # labeled and unlabeled
    small = [size for size in sizes if min(size) < 45]
    height, width = min(small)
    assert findings(load(), crop_size=45)[-1] == (
        False,
        f"{len(small)} of {len(sizes)} training images read are smaller than the crop of 45 pixels (the smallest "
        f"{width} x {height}); their views are padded, or lower loader.crop_size",
    )


def test_errors_come_first_and_every_broken_file_is_named(load, folder_root):
    for role in ("labeled", "unlabeled", "val"):
        (folder_root / ROLES[role][0]).write_bytes(b"this is no image")
    found = findings(load())
    assert [is_error for is_error, _ in found] == sorted((is_error for is_error, _ in found), reverse=True)
    for role in ("labeled", "unlabeled", "val"):
        assert sum(str(folder_root / ROLES[role][0]) in message for _, message in found) == 1


def test_nothing_is_concluded_from_what_a_sample_does_not_show(monkeypatch, caplog):
    monkeypatch.setattr(checks, "MAX_FILES", 24)
    data = shapes(labeled=30, train=60, val=8, test=8, size=48)
    monkeypatch.setattr(type(data.train), "mask", lambda self, index: np.zeros((48, 48), np.uint8))
    with caplog.at_level(logging.WARNING, logger="mlpmatch_pl"):
        validate_dataset(data, CROP)  # the labeled images that were not read may hold other classes
    assert "mask has" not in caplog.text.replace("no validation mask has", "")
    monkeypatch.setattr(checks, "MAX_FILES", 2000)
    assert complaint(data).startswith(
        "expected at least two classes in the labeled masks, but they have only background"
    )


# The cheap level at the start of a training ---------------------------------------------------------------------------


def test_of_a_large_data_set_some_of_every_part_are_read(caplog, monkeypatch):
    monkeypatch.setattr(checks, "MAX_FILES", 40)
    data = shapes(labeled=30, train=200, val=25, test=8, size=48)
    read = []
    original = type(data.train).image
    monkeypatch.setattr(type(data.train), "image", lambda self, i: read.append(self.name(i)) or original(self, i))
    with caplog.at_level(logging.INFO, logger="mlpmatch_pl"):
        validate_dataset(data, CROP)
    assert len(read) == 40
    assert sum(name.startswith("test") for name in read) == 8
    assert sum(name.startswith("val") for name in read) == 10
    assert sum(name in data.labeled.names for name in read) == 11
    assert "read 40 of 233 files; python -m mlpmatch_pl.check reads all" in caplog.text


@pytest.mark.parametrize("limit", [1, 4, 7, 100, 1000])
@pytest.mark.parametrize("counts", [(5, 0, 0, 3), (1, 1, 1, 1), (40, 7, 0, 300), (0, 2, 9, 0)])
def test_the_limit_is_kept_and_used_up(limit, counts):
    parts = ("labeled", "val", "test", "unlabeled")
    jobs = [Job(part, None, index) for part, count in zip(parts, counts, strict=True) for index in range(count)]
    taken = sample(jobs, limit)
    assert len(taken) == min(limit, len(jobs))
    assert len({(job.part, job.index) for job in taken}) == len(taken)


def test_warnings_are_logged(load, caplog):
    with caplog.at_level(logging.WARNING, logger="mlpmatch_pl"):
        validate_dataset(load(), CROP)
    assert "note: no labeled mask has the class sky" in caplog.text


def small_folder(root, count=4, size=(40, 64)):
    """Write images and masks of three classes below a root, and return the masks."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "masks").mkdir()
    masks = [rng.integers(0, 3, size, np.uint8) for _ in range(count)]
    for index, mask in enumerate(masks):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / f"images/{index}.png")
        Image.fromarray(mask).save(root / f"masks/{index}.png")
    return masks


def messages(root, **options):
    data = folder(str(root), ["a", "b", "c"], **options)
    found = find_problems(data, list(scan_files(data, all_jobs(data), thorough=False)), crop_size=33)
    return [(finding.is_error, finding.message) for finding in found]


@pytest.mark.parametrize("values", [[255, 0, 1], [1, 2, 3]])
def test_ids_that_are_all_shifted_by_one_are_named(tmp_path, values):
    for index, mask in enumerate(small_folder(tmp_path)):
        Image.fromarray(np.array(values, np.uint8)[np.where(index == 0, mask, mask // 2)]).save(
            tmp_path / f"masks/{index}.png"
        )
    data = folder(str(tmp_path), ["background", "road", "sky"])
    found = [message for _, message in findings(data, crop_size=33)]
    assert any("all ids are shifted by one" in message or "all ids were shifted by one" in message for message in found)


def test_few_ignored_pixels_or_all_classes_are_no_sign_of_a_shift(tmp_path):
    for index, mask in enumerate(small_folder(tmp_path)):
        mask[:, :9] = 255
        Image.fromarray(np.where(mask == 2, index % 2, mask).astype(np.uint8)).save(tmp_path / f"masks/{index}.png")
    data = folder(str(tmp_path), ["background", "road", "sky"])
    assert not any("shifted" in message for _, message in findings(data, crop_size=33))


PALETTES = [[0, 0, 0, 9, 9, 9, 5, 5, 5], [0, 0, 0, 5, 5, 5, 9, 9, 9]]


def test_masks_whose_palettes_differ_need_a_declaration(tmp_path):
    for index, mask in enumerate(small_folder(tmp_path)):
        picture = Image.fromarray(mask)
        picture.putpalette(PALETTES[index == 3])
        picture.save(tmp_path / f"masks/{index}.png")
    ((is_error, message),) = messages(tmp_path)
    assert is_error
    assert message.startswith("expected masks with the same palette, but 1 is [9, 9, 9] in the mask of images/")
    assert not messages(tmp_path, mask_values={0: 0, 1: 1, 2: 2})
    assert not messages(tmp_path, palette=[[0, 0, 0], [9, 9, 9], [5, 5, 5]])


def test_palettes_of_different_length_and_shared_colors_are_no_conflict(tmp_path):
    for index, mask in enumerate(small_folder(tmp_path)):
        picture = Image.fromarray(mask if index else np.minimum(mask, 1))
        picture.putpalette([0, 0, 0, 9, 9, 9, 9, 9, 9] if index else [0, 0, 0, 9, 9, 9])
        picture.save(tmp_path / f"masks/{index}.png")
    assert not [message for is_error, message in messages(tmp_path) if is_error]


@pytest.mark.parametrize("size", [(40, 40), (40, 64)])
@pytest.mark.parametrize("tag", [3, 6])
def test_an_orientation_tag_is_named_where_the_mask_may_not_be_turned(tmp_path, size, tag):
    small_folder(tmp_path, size=size)
    exif = Image.Exif()
    exif[274] = tag
    for path in (tmp_path / "images").iterdir():
        with Image.open(path) as file:
            file.save(path, exif=exif)
    found = messages(tmp_path)
    if tag == 6 and size == (40, 64):
        assert [is_error for is_error, _ in found] == [True] * 4
        assert "but the orientation tag 6 turns images/" in found[0][1]
        assert found[0][1].endswith(
            "to 40 x 64, and its mask is 64 x 40 pixels; set dataset.orientation=ignore if masks were drawn on the "
            "stored pixels"
        )
        data = folder(str(tmp_path), ["a", "b", "c"])
        labeled = LabeledDataset(data.train, data.labeled_indices, 3, WeakView(CROP), seed=0)
        for dataset in (EvalDataset(data.val, 3, 255), labeled):
            with pytest.raises(UserError, match="but the orientation tag 6 turns images/"):
                dataset[0]
    else:
        ((is_error, message),) = found
        assert not is_error
        assert message.startswith(
            "4 images with masks are turned by their orientation tag (EXIF), the first is images/"
        )
    assert not messages(tmp_path, orientation="ignore")


@pytest.mark.parametrize(("group_by", "warned"), [(None, True), ("folder", False)])
def test_frames_of_one_scene_on_both_sides_are_a_warning(tmp_path, classes, group_by, warned):
    for scene in range(4):
        rng = np.random.default_rng(scene)
        frame = np.kron(rng.integers(0, 256, (6, 6, 3)), np.ones((10, 10, 1))).astype(np.uint8)
        for shift in range(5):
            save_image(tmp_path / f"images/s{scene}/{shift}.png", np.roll(frame, shift, 1))
            save_mask(
                tmp_path / f"masks/s{scene}/{shift}.png", np.arange(3600, dtype=np.uint8).reshape(60, 60) % 3, False
            )
    data = folder(str(tmp_path), classes, val=0.25, group_by=group_by)
    messages = [message for _, message in findings(data)]
    assert any("dataset.group_by=folder" in message for message in messages) == warned
    assert any("5 of 5 validation images look nearly the same" in message for message in messages) == warned


@pytest.mark.parametrize("masked", [5, 10])
def test_frames_in_a_validation_set_of_one_or_two_images_are_a_warning(tmp_path, classes, masked):
    frame = np.kron(np.random.default_rng(0).integers(0, 256, (6, 6, 3)), np.ones((10, 10, 1))).astype(np.uint8)
    for index in range(masked):
        save_image(tmp_path / f"images/{index}.png", np.roll(frame, index, 1))
        save_mask(tmp_path / f"masks/{index}.png", np.arange(3600, dtype=np.uint8).reshape(60, 60) % 3, False)
    count = masked // 5
    messages = [message for _, message in findings(folder(str(tmp_path), classes))]
    assert any(f"{count} of {count} validation images look nearly the same" in message for message in messages)


@pytest.mark.parametrize("transparent", ["masks", "images"])
def test_a_class_that_is_hidden_by_transparency_is_explained(transparent, tmp_path):
    rng = np.random.default_rng(0)
    for index in range(4):
        mask = np.zeros((40, 40), np.uint8)
        mask[5:20, 5:20], mask[20:30, 5:20] = 1, 2
        opaque = np.where(mask, 255, 0).astype(np.uint8)
        image = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        colors = np.array([[0, 0, 0], [200, 0, 0], [0, 200, 0]], np.uint8)[mask]
        files = {"images": image, "masks": colors}
        files[transparent] = np.dstack([files[transparent], opaque])
        for part, pixels in files.items():
            save_image(tmp_path / part / f"{index}.png", pixels)
    data = folder(str(tmp_path), ["sky", "a", "b"], palette=[[0, 0, 0], [200, 0, 0], [0, 200, 0]], val=1)
    files = list(scan_files(data, all_jobs(data), thorough=False))
    (message,) = (finding.message for finding in find_problems(data, files, 40) if "labeled" in finding.message)
    assert message.startswith("no labeled mask has the class sky; transparent pixels are ignored, as in images/")
    assert "(3 such files in total): remove the transparency" in message

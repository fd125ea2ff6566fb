import dataclasses

import numpy as np
import pytest
from PIL import Image

from mlpmatch_pl.data.checks import check_data
from mlpmatch_pl.data.folder import FolderSource, folder
from mlpmatch_pl.data.shapes import shapes
from mlpmatch_pl.errors import UserError

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
        check_data(data)
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
    check_data(load())
    check_data(load(test=None))
    check_data(shapes(labeled=2, train=4, val=1, test=1, size=48))


@pytest.mark.parametrize("role", ROLES)
def test_an_image_that_is_none_is_found(load, folder_root, role):
    path = folder_root / ROLES[role][0]
    path.write_bytes(b"this is no image")
    assert complaint(load()) == f"cannot read the image {path}: it is broken or no image; replace or remove it"


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
    assert complaint(load()) == f"cannot read the image {path}: it is broken or no image; replace or remove it"


@pytest.mark.parametrize("content", [b"", b"this is no image", "truncated"])
@pytest.mark.parametrize("role", ["labeled", "val", "test"])
def test_a_broken_mask_is_found(load, folder_root, role, content):
    path = folder_root / ROLES[role][1]
    if content == "truncated":
        Image.fromarray(np.random.default_rng(0).integers(0, 3, (400, 400), dtype=np.uint8)).save(path)
        content = path.read_bytes()[:2000]
    path.write_bytes(content)
    message = complaint(load())
    assert message.startswith(f"cannot read the mask {path} (")
    assert message.endswith("); replace or remove it")


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
        "correct the mask, dataset.classes or dataset.ignore_index"
    )


def test_at_most_five_wrong_values_are_listed_in_order(load, folder_root):
    rewrite(
        folder_root / ROLES["labeled"][1], lambda ids: (np.arange(ids.size).reshape(ids.shape) % 12).astype(np.uint8)
    )
    assert "has 3, 4, 5, 6, 7; correct" in complaint(load())


def test_another_ignore_value_is_allowed_and_255_is_then_wrong(load, folder_root):
    for role in ("labeled", "val", "test"):
        rewrite(folder_root / ROLES[role][1], lambda ids: np.where(ids == 255, 200, ids).astype(np.uint8))
    check_data(load(ignore_index=200))
    rewrite(folder_root / ROLES["val"][1], with_value(255))
    assert "expected mask values 0..2 or 200 (ignore), but the mask of images/day/img1.png has 255;" in complaint(
        load(ignore_index=200)
    )


@pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("RGBA", 4), ("LA", 2)])
@pytest.mark.parametrize("role", ["labeled", "val", "test"])
def test_a_mask_of_colors_is_found(load, folder_root, role, mode, channels):
    path = folder_root / ROLES[role][1]
    with Image.open(path) as file:
        converted = file.convert("L").convert(mode)
    converted.save(path)
    assert complaint(load()) == (
        f"expected a mask with one channel of class ids, but {path} has {channels} channels (mode {mode}); "
        "save class ids as a grey or palette PNG"
    )


def test_a_value_beyond_eight_bits_is_found(load, folder_root):
    path = folder_root / ROLES["labeled"][1]
    Image.fromarray(np.full((40, 64), 700, np.uint16)).save(path)
    assert complaint(load()) == f"expected class ids from 0 to 255, but {path} has the value 700"


def test_a_validation_list_without_masks_is_found(load, folder_root):
    (folder_root / "val.txt").write_text(ROLES["val"][0])  # a bare name: its mask is looked for by path
    (folder_root / ROLES["val"][1]).unlink()
    assert complaint(load()) == f"expected a mask for the image {ROLES['val'][0]}, but it has none"


def test_an_empty_validation_set_is_found(load, folder_root):
    data = dataclasses.replace(load(), val=FolderSource(folder_root, []))
    assert complaint(data) == "expected at least 1 validation image, but there is none; set dataset.val"


def test_masks_of_unlabeled_images_are_never_opened(load, folder_root):
    (folder_root / ROLES["unlabeled"][1]).write_bytes(b"this is no image")
    check_data(load())


def test_every_file_is_read_once_and_no_other(load, folder_root, monkeypatch):
    (folder_root / "unlabeled.txt").write_text("images/img3.png\nimages/img6.jpg")
    data = load(unlabeled="unlabeled.txt")
    read = {"image": [], "mask": []}
    for kind, names in read.items():
        original = getattr(FolderSource, kind)

        def spy(self, index, original=original, names=names):
            names.append(self.name(index))
            return original(self, index)

        monkeypatch.setattr(FolderSource, kind, spy)
    check_data(data)
    held = [ROLES[role][0] for role in ("labeled", "val", "test")]
    assert sorted(read["mask"]) == sorted(held)
    assert sorted(read["image"]) == sorted([*held, "images/img3.png", "images/img6.jpg"])


def test_the_first_file_in_order_is_named(load, folder_root):
    for role in ("unlabeled", "test", "val"):
        (folder_root / ROLES[role][0]).write_bytes(b"this is no image")
        for _ in range(3):  # not the one that a thread happens to reach first
            assert str(folder_root / ROLES[role][0]) in complaint(load())

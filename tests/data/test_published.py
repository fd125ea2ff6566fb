import hashlib
import re

import pytest

from mlpmatch_pl.data.datasets.published import PUBLISHED, VAL_SHA256, is_original, published_list

UNIMATCH_FOLDERS = {"voc": "pascal", "cityscapes": "cityscapes"}
TRAIN_IMAGES = {"voc": 10582, "cityscapes": 2975}
LABELED_IMAGES = {
    "voc": {
        **{str(count): count for count in (92, 183, 366, 732, 1464)},
        **{
            f"{family}/1-{part}": count
            for family in ("blended", "u2pl")
            for part, count in ((16, 662), (8, 1323), (4, 2646))
        },
    },
    "cityscapes": {"1-30": 100, "1-16": 186, "1-8": 372, "1-4": 744, "1-2": 1488},
}


def all_lists():
    return [(dataset, entry) for dataset, lists in PUBLISHED.items() for entry in lists.values()]


def test_names_are_those_of_the_papers():
    assert {dataset: set(lists) for dataset, lists in PUBLISHED.items()} == {
        dataset: set(counts) for dataset, counts in LABELED_IMAGES.items()
    }
    assert set(VAL_SHA256) == set(PUBLISHED)


def test_every_entry_is_filed_under_its_own_name_with_its_own_hashes():
    hashes = list(VAL_SHA256.values())
    for dataset, entry in all_lists():
        assert PUBLISHED[dataset][entry.name] is entry
        hashes += [entry.labeled_sha256, entry.unlabeled_sha256]
    assert len(set(hashes)) == len(hashes)
    assert all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes)


def test_folders_are_unique_and_safe_as_paths():
    for lists in PUBLISHED.values():
        folders = [entry.folder for entry in lists.values()]
        assert len(set(folders)) == len(folders)
        assert all(re.fullmatch(r"\w+", folder) for folder in folders)


@pytest.mark.parametrize(
    ("dataset", "choice", "folder"),
    [
        ("voc", 92, "92"),
        ("voc", "92", "92"),
        ("voc", "1464", "1464"),
        ("voc", "blended/1-16", "1_16"),
        ("voc", "u2pl/1-4", "u2pl_1_4"),
        ("cityscapes", "1-30", "1_30"),
    ],
)
def test_a_name_or_a_number_finds_its_list(dataset, choice, folder):
    entry = published_list(dataset, choice)
    assert entry is not None
    assert entry.folder == folder


@pytest.mark.parametrize(
    ("dataset", "choice"),
    [
        ("voc", 93),
        ("voc", 92.0),
        ("voc", True),
        ("voc", None),
        ("voc", "1/16"),
        ("voc", "1-16"),
        ("voc", ["92"]),
        ("cityscapes", 92),
        ("cityscapes", "1/30"),
        ("folder", 92),
    ],
)
def test_other_choices_are_no_published_list(dataset, choice):
    assert published_list(dataset, choice) is None


def test_is_original_compares_bytes(tmp_path):
    path = tmp_path / "labeled.txt"
    path.write_bytes(b"a.jpg a.png\nb.jpg b.png")
    digest = hashlib.sha256(b"a.jpg a.png\nb.jpg b.png").hexdigest()
    assert is_original(path, digest)
    path.write_bytes(path.read_bytes() + b"\n")  # the last line's end is part of the file
    assert not is_original(path, digest)
    assert not is_original(tmp_path / "missing.txt", digest)
    assert not is_original(tmp_path, digest)


@pytest.mark.real_data
@pytest.mark.parametrize(("dataset", "entry"), all_lists(), ids=lambda value: getattr(value, "name", value))
def test_the_public_files_have_these_hashes(real_data, dataset, entry):
    folder = real_data / "splits" / UNIMATCH_FOLDERS[dataset] / entry.folder
    assert is_original(folder / "labeled.txt", entry.labeled_sha256)
    assert is_original(folder / "unlabeled.txt", entry.unlabeled_sha256)
    labeled, unlabeled = (set((folder / name).read_text().splitlines()) for name in ("labeled.txt", "unlabeled.txt"))
    assert len(labeled) == LABELED_IMAGES[dataset][entry.name]
    assert not labeled & unlabeled
    assert len(labeled | unlabeled) == TRAIN_IMAGES[dataset]


@pytest.mark.real_data
@pytest.mark.parametrize("dataset", sorted(PUBLISHED))
def test_the_public_val_list_has_this_hash(real_data, dataset):
    assert is_original(real_data / "splits" / UNIMATCH_FOLDERS[dataset] / "val.txt", VAL_SHA256[dataset])

import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from mlpmatch_pl.data.datasets.shapes import CLASS_NAMES, PALETTE, Shapes, shapes
from mlpmatch_pl.utils.errors import UserError


def digest(source, count=3):
    content = b"".join(source.image(index).tobytes() + source.mask(index).tobytes() for index in range(count))
    return hashlib.sha256(content).hexdigest()


SCRIPT = """
import builtins, hashlib, json, os, socket, sys
from mlpmatch_pl.data.datasets.shapes import Shapes, shapes
sys.path.insert(0, sys.argv[1])
from test_shapes import digest

def refuse(*arguments, **options):
    raise AssertionError(f"files or network were used: {arguments}")

builtins.open = os.open = os.listdir = socket.socket.connect = socket.getaddrinfo = refuse
data = shapes(labeled=3, train=9, val=3, test=3)
print(json.dumps([*map(digest, (data.train, data.val, data.test)), data.labeled.names]))
"""


def test_another_process_draws_the_same_data_without_files_or_network(request):
    command = [sys.executable, "-c", SCRIPT, str(request.path.parent)]
    output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    data = shapes(labeled=3, train=9, val=3, test=3)
    assert json.loads(output) == [*map(digest, (data.train, data.val, data.test)), list(data.labeled.names)]


def test_a_scene_does_not_depend_on_those_drawn_before_it():
    forward, backward = Shapes("train", 5), Shapes("train", 500)
    images = [forward.image(index) for index in range(5)]
    for index in reversed(range(5)):
        assert (backward.image(index) == images[index]).all()


def test_parts_seeds_and_indices_hold_different_scenes():
    sources = [Shapes("train", 3), Shapes("val", 3), Shapes("test", 3), Shapes("train", 3, seed=1)]
    scenes = [source.image(index).tobytes() for source in sources for index in range(3)]
    assert len(set(scenes)) == 12


@pytest.mark.parametrize("size", [33, 64, 100])
def test_images_and_masks_have_the_size_types_and_labels_of_the_contract(size):
    source = Shapes("train", 10, size)
    for index in range(10):
        image, mask = source.image(index), source.mask(index)
        assert (image.shape, image.dtype) == ((size, size, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((size, size), np.uint8)
        assert mask.max() < len(CLASS_NAMES)
        assert image.std() > 5


def test_all_classes_are_present_and_none_is_rare():
    source = Shapes("train", 120)
    counts = sum(np.bincount(source.mask(index).ravel(), minlength=len(CLASS_NAMES)) for index in range(120))
    shares = counts / counts.sum()
    assert len(shares) == len(CLASS_NAMES)
    assert shares.min() > 0.02
    assert 0.3 < shares[0] < 0.9


def test_a_scene_shows_several_classes():
    source = Shapes("train", 60)
    assert np.mean([len(np.unique(source.mask(index))) for index in range(60)]) > 2.5


def test_classes_differ_in_color_but_not_by_color_alone():
    source = Shapes("train", 100)
    pixels = np.concatenate([source.image(index).reshape(-1, 3) for index in range(100)]).astype(float)
    labels = np.concatenate([source.mask(index).ravel() for index in range(100)])
    means = np.stack([pixels[labels == label].mean(0) for label in range(len(CLASS_NAMES))])
    nearest = ((pixels[:, None] - means) ** 2).sum(2).argmin(1)
    accuracy = np.mean([(nearest[labels == label] == label).mean() for label in range(len(CLASS_NAMES))])
    assert 1.2 / len(CLASS_NAMES) < accuracy < 0.6


def test_data_set_is_split_without_overlap():
    data = shapes(labeled="1/4", train=20, val=3, test=4)
    assert (len(data.train), len(data.labeled.names), len(data.unlabeled), len(data.val), len(data.test)) == (
        20, 5, 15, 3, 4,
    )  # fmt: skip
    assert set(data.labeled_indices) | set(data.unlabeled) == set(range(20))
    assert not set(data.labeled_indices) & set(data.unlabeled)
    assert data.class_names == CLASS_NAMES
    assert data.colors == PALETTE
    assert len(set(PALETTE)) == len(CLASS_NAMES)


def test_split_seed_chooses_other_labeled_images_of_the_same_scenes():
    first, second = shapes(labeled=5, train=40, split_seed=0), shapes(labeled=5, train=40, split_seed=1)
    assert first.labeled.names != second.labeled.names
    assert digest(first.train) == digest(second.train)


def test_all_images_may_be_labeled():
    data = shapes(labeled=4, train=4)
    assert data.unlabeled == ()
    assert set(data.labeled_indices) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"labeled": 5, "train": 4},
            "expected dataset.labeled of at most 4, the number of images with a mask to choose from, but got 5",
        ),
        ({"labeled": 0}, "expected dataset.labeled to choose at least 1 image, but 0 chooses none of 480"),
        (
            {"val": 0},
            "expected 1 to 1,000,000 images per part of 33 to 4096 pixels, but got train=480, val=0, test=120, size=64",
        ),
        (
            {"size": 32},
            "expected 1 to 1,000,000 images per part of 33 to 4096 pixels, but got train=480, val=60, "
            "test=120, size=32",
        ),
    ],
)
def test_numbers_out_of_range_are_refused(options, sentence):
    with pytest.raises(UserError) as caught:
        shapes(**options)
    assert str(caught.value) == sentence

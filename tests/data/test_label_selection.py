import itertools

import numpy as np
import pytest
from helpers.images import save_image, save_mask
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.splits import choose, cover_first
from mlpmatch_pl.utils.errors import UserError

CLASSES = ("background", "road", "sky", "tree", "car")
quick = settings(max_examples=60, deadline=None)

# The classes in each image: class 4 is in one image, class 3 in two; all hold class 0.
CONTENT = [{0}, {0, 1}, {0, 2}, {0, 1, 2}, {0, 3}, {0, 1}, {0}, {0, 4}, {0, 2}, {0, 1}, {0, 3, 1}, {0, 2}]


@pytest.fixture
def root(tmp_path):
    """Twelve images with masks of known classes, and pixels that do not count in each."""
    for index, labels in enumerate(CONTENT):
        mask = np.full((10, 12), 255, np.uint8)
        for row, label in enumerate(sorted(labels)):
            mask[2 * row : 2 * row + 2] = label
        save_image(tmp_path / f"images/{index:02d}.png", np.zeros((10, 12, 3), np.uint8))
        save_mask(tmp_path / f"masks/{index:02d}.png", mask, palette=index % 2 == 0)
    (tmp_path / "val.txt").write_text("images/00.png\n")
    return tmp_path


def load(root, **options):
    return folder(str(root), CLASSES, **{"val": "val.txt", **options})


def names(source, indices=None):
    return [source.name(index) for index in (range(len(source)) if indices is None else indices)]


def labels_in(chosen):
    return set().union(*(CONTENT[int(name[-6:-4])] for name in chosen))


def sentence(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    return str(caught.value)


# Every class ----------------------------------------------------------------------------------------------------------

contents = st.lists(st.frozensets(st.integers(0, 6)), min_size=1, max_size=25)


@quick
@given(contents, st.randoms(use_true_random=False))
def test_the_first_images_together_hold_every_class(content, rng):
    classes = {f"{index}.png": labels for index, labels in enumerate(content)}
    shuffled = sorted(classes)
    rng.shuffle(shuffled)
    ordered = cover_first(shuffled, classes)
    everything = frozenset().union(*content)
    assert sorted(ordered) == sorted(shuffled)
    head = ordered[: len(everything)]  # one image a class is enough
    assert frozenset().union(*(classes[name] for name in head)) == everything
    moved = [name for name in ordered if ordered.index(name) >= len(everything)]
    assert moved == [name for name in shuffled if name in moved]  # the rest stays shuffled as it was


@quick
@given(contents, st.integers(0, 100))
def test_choices_that_cover_stay_inside_larger_ones(content, seed):
    classes = {f"{index:02d}.png": labels for index, labels in enumerate(content)}
    chosen = [
        set(choose(list(classes), count, seed, order=lambda names: cover_first(names, classes)).names)
        for count in range(1, len(classes) + 1)
    ]
    assert all(small < large for small, large in itertools.pairwise(chosen))


@pytest.mark.parametrize("seed", range(10))
def test_a_covering_choice_holds_every_class_with_every_seed(root, seed):
    chosen = {
        count: set(load(root, labeled=count, cover_classes=True, split_seed=seed).labeled.names) for count in (4, 6, 11)
    }
    assert all(len(found) == count and labels_in(found) == set(range(5)) for count, found in chosen.items())
    assert chosen[4] < chosen[6] < chosen[11]
    assert "images/00.png" not in chosen[11]  # it is for validation


def test_a_plain_choice_of_that_many_often_leaves_classes_out(root):
    plain = [labels_in(load(root, labeled=4, split_seed=seed).labeled.names) for seed in range(10)]
    assert sum(labels == set(range(5)) for labels in plain) < 5


def test_the_seed_chooses_and_is_in_the_label(root):
    splits = [load(root, labeled=5, cover_classes=True, split_seed=seed).labeled for seed in range(10)]
    assert len({split.names for split in splits}) > 3
    assert len({split.sha256 for split in splits}) == len({split.names for split in splits})
    assert splits[3].label == "5 (seed 3, every class)"
    assert splits[3] == load(root, labeled=5, cover_classes=True, split_seed=3).labeled
    assert load(root, labeled="1/2", cover_classes=True).labeled.label == "1/2 (seed 0, every class)"


def test_too_few_images_to_hold_every_class_are_refused(root):
    # Any two images hold at most three of the four classes beside the background, and the rare ones come first.
    assert sentence(load, root, labeled=2, cover_classes=True).startswith(
        "expected enough labeled images to contain every class, but 2 have no "
    )
    message = sentence(load, root, labeled=1, cover_classes=True)
    assert message == (
        "expected enough labeled images to contain every class, but 1 have no road (3 classes in total); raise "
        "dataset.labeled, or set dataset.cover_classes=false"
    )


def test_classes_that_no_mask_holds_cannot_be_covered(root):
    more = (*CLASSES, "nowhere")
    data = folder(str(root), more, val="val.txt", labeled=5, cover_classes=True)
    assert labels_in(data.labeled.names) == set(range(5))


def test_classes_of_validation_images_alone_need_not_be_covered(root):
    (root / "val.txt").write_text("images/07.png\n")  # the only one with cars
    assert labels_in(load(root, labeled=4, cover_classes=True).labeled.names) == {0, 1, 2, 3}


def test_masks_are_not_read_without_cover_classes(root):
    for path in (root / "masks").iterdir():
        path.write_bytes(b"broken")
    assert len(load(root, labeled=5).labeled.names) == 5
    assert sentence(load, root, labeled=5, cover_classes=True).startswith(f"cannot read the mask {root / 'masks'}")


# Labels, hashes and notes ---------------------------------------------------------------------------------------------


def write(root, name, indices, masks=False):
    lines = [f"images/{index:02d}.png" + (f" masks/{index:02d}.png" if masks else "") for index in indices]
    (root / name).write_text("\n".join(lines))
    return name


@pytest.mark.parametrize(
    ("labeled", "label"),
    [
        (3, "3 (seed 0)"),
        ("3", "3 (seed 0)"),
        ("1/4", "1/4 (seed 0)"),
        (0.25, "0.25 (seed 0)"),
        (None, "all"),
        ("lists/mine.txt", "lists/mine.txt"),
    ],
)
def test_a_choice_is_called_after_what_was_asked_for(root, labeled, label):
    (root / "lists").mkdir()
    write(root, "lists/mine.txt", [3, 1])
    split = load(root, labeled=labeled).labeled
    assert split.label == label
    if labeled == "lists/mine.txt":
        assert split.names == ("images/03.png", "images/01.png")  # the order of the list


def test_the_hash_is_of_the_names_and_not_of_how_they_were_chosen(root):
    chosen = load(root, labeled=3).labeled
    (root / "mine.txt").write_text("\n".join(chosen.names))
    again = load(root, labeled="mine.txt").labeled
    assert again.sha256 == chosen.sha256
    assert again.label != chosen.label


def test_validation_images_that_are_tested_are_noted(root):
    lists = {
        "val": write(root, "v.txt", range(1, 4), masks=True),
        "test": write(root, "te.txt", range(2, 6), masks=True),
    }
    assert load(root, **lists).notes == ("images/02.png is a validation image and a test image (2 in total)",)


def test_images_of_no_set_and_of_two_sets_are_noted(root):
    data = load(root, labeled=write(root, "l.txt", range(1, 4)), train=write(root, "t.txt", range(12), masks=True))
    assert data.notes == (
        "images/00.png is a training image and a validation or test image (1 in total); it is "
        "removed from the training images",
    )
    assert names(data.train, data.unlabeled) == [f"images/{index:02d}.png" for index in range(4, 12)]


@pytest.mark.parametrize("key", ["val", "test"])
def test_unlabeled_images_that_are_held_out_are_noted_and_left_out(root, key):
    options = {"labeled": write(root, "l.txt", [1, 2]), "unlabeled": write(root, "u.txt", [5, 6, 7, 8])}
    data = load(root, **options, **{key: write(root, "h.txt", [6, 8], masks=True)})
    assert names(data.train, data.unlabeled) == ["images/05.png", "images/07.png"]
    assert data.notes == (
        "images/06.png is a training image and a validation or test image (2 in total); it is "
        "removed from the training images",
    )


def test_training_images_that_no_list_names_are_noted(root):
    data = load(root, labeled=4, unlabeled=write(root, "u.txt", [1, 2]))
    used = {*data.labeled.names, *names(data.train, data.unlabeled)}
    unused = sorted({f"images/{index:02d}.png" for index in range(1, 12)} - used)
    assert data.notes == (
        f"{unused[0]} is a training image, but neither labeled nor in dataset.unlabeled ({len(unused)} in total); it "
        "is not used",
    )


def test_sets_that_do_not_meet_need_no_note(root):
    assert load(root, labeled=4).notes == ()
    lists = {"labeled": write(root, "l.txt", [1, 2]), "unlabeled": write(root, "u.txt", [3, 4])}
    assert load(root, **lists).notes == ()


# Palette --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("color", [[1, 2], [1, 2, 3, 4], [1, 2, 256], [-1, 2, 3], [1.0, 2, 3], ["a", 2, 3], 7, "abc"])
def test_palettes_of_wrong_colors_are_refused(root, color):
    assert sentence(load, root, palette=[[0, 0, 0], [1, 1, 1], [2, 2, 2], [3, 3, 3], color]) == (
        f"expected colors as [red, green, blue] from 0 to 255 in dataset.palette, but got {color}"
    )


@pytest.mark.parametrize("count", [0, 4, 6])
def test_palettes_need_a_color_for_each_class(root, count):
    assert sentence(load, root, palette=[[index, 0, 0] for index in range(count)]) == (
        f"expected 5 colors in dataset.palette, one per class, but got {count}"
    )


def test_masks_in_colors_are_read_where_the_palette_says_so(root):
    palette = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]]
    table = np.zeros((256, 3), np.uint8)
    table[:5], table[255] = palette, (224, 224, 192)
    data = load(root, labeled=4, cover_classes=True)
    before = [data.train.mask(index) for index in range(len(data.train))]
    for index, labels in enumerate(CONTENT):
        mask = np.full((10, 12), 255, np.uint8)
        for row, label in enumerate(sorted(labels)):
            mask[2 * row : 2 * row + 2] = label
        save_image(root / f"masks/{index:02d}.png", table[mask])
    data = load(root, palette=palette, ignore_colors=[[224, 224, 192]], labeled=4, cover_classes=True)
    assert data.palette == tuple(map(tuple, palette))
    assert [data.train.mask(index).tolist() for index in range(len(data.train))] == [mask.tolist() for mask in before]
    assert labels_in(data.labeled.names) == set(range(5))

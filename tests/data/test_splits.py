import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.data.splits import Split, choose, is_path
from mlpmatch_pl.engine.run_folder import save_lists
from mlpmatch_pl.utils.errors import UserError

NAMES = [f"images/{index:03d}.jpg" for index in range(160)]
quick = settings(max_examples=60, deadline=None)


@pytest.mark.parametrize(
    ("spec", "count"),
    [("1/16", 10), ("1/8", 20), (0.125, 20), ("0.125", 20), (92, 92), ("92", 92), ("1/1", 160), (1.0, 160), (1, 1)],
)
def test_fraction_and_count_choose_that_many(spec, count):
    split = choose(NAMES, spec, seed=0)
    assert len(split.names) == len(set(split.names)) == count
    assert set(split.names) <= set(NAMES)


@pytest.mark.parametrize("spec", ["1/1000", 0.001])
def test_a_small_fraction_chooses_at_least_one(spec):
    assert len(choose(NAMES, spec, seed=0).names) == 1


@quick
@given(st.integers(0, 1000))
def test_smaller_choices_are_inside_larger_ones(seed):
    chosen = [set(choose(NAMES, spec, seed).names) for spec in ("1/16", "1/8", "1/4", 92, "1/1")]
    assert all(small < large for small, large in itertools.pairwise(chosen))


@quick
@given(st.permutations(NAMES[:20]), st.integers(0, 100))
def test_order_of_the_files_does_not_matter(shuffled, seed):
    assert choose(shuffled, 5, seed) == choose(NAMES[:20], 5, seed)


def test_another_seed_and_another_key_choose_other_images():
    chosen = {choose(NAMES, 20, seed, what).names for seed in range(5) for what in ("labeled", "val")}
    assert len(chosen) == 10


def test_choice_is_the_same_forever():
    split = choose([f"{letter}.png" for letter in "abcdefghijklmnop"], "1/4", seed=0)
    assert split.names == ("a.png", "h.png", "i.png", "n.png")
    assert split.sha256 == "b784b8a867ad15d5bc07d3a6893736830cf55ad20b2efa2f6a7066ea43957f91"
    assert split.label == "1/4 (seed 0)"


def test_hash_is_of_the_names_alone():
    names = ("a.png", "b.png")
    assert Split("one", names).sha256 == Split("other", names).sha256
    # printf "a.png\nb.png" | sha256sum
    assert Split("one", names).sha256 == "1baca9d47fd86b4a995bb3508dea720d384b601ee539a4961303e841d4b856ac"
    assert Split("one", names[::-1]).sha256 != Split("one", names).sha256
    assert Split("one", ("a.pngb.png",)).sha256 != Split("one", names).sha256


@pytest.mark.parametrize("name", ["split.txt", "my split.txt"])
def test_a_saved_list_gives_the_same_images_and_hash(folder_root, classes, name, tmp_path):
    chosen = folder(str(folder_root), classes, labeled=2, val=1)
    save_lists(tmp_path, chosen)
    (tmp_path / "labeled.txt").rename(folder_root / name)
    again = folder(str(folder_root), classes, labeled=name, val=1)
    assert again.labeled.names == chosen.labeled.names
    assert again.labeled.sha256 == chosen.labeled.sha256
    assert [again.train.mask(index).tolist() for index in again.labeled_indices] == [
        chosen.train.mask(index).tolist() for index in chosen.labeled_indices
    ]


@pytest.mark.parametrize(
    "name", ["images/plain.jpg", "images/two words.jpg", "images/a b c.jpg", "images/Grüße 图.jpg"]
)
def test_a_saved_list_can_hold_any_name(make_folder, classes, name):
    root = make_folder(count=3, masked=3)
    (root / "images/img0.jpg").rename(root / name)
    (root / "masks/img0.png").rename((root / name.replace("images", "masks")).with_suffix(".png"))
    (root / "labeled.txt").write_text(f"{name}\n", encoding="utf-8")
    assert folder(str(root), classes, labeled="labeled.txt", val=1).labeled.names == (name,)


def test_a_saved_list_needs_neither_the_layout_nor_the_lists_that_it_came_from(make_folder, classes, tmp_path):
    root = make_folder()
    (root / "masks").rename(root / "truth")
    lines = [f"images/img{number}.{suffix},truth/img{number}.png" for number, suffix in ((0, "jpg"), (3, "png"))]
    (root / "mine.csv").write_text("\n".join(["image,mask", *lines]))
    (root / "val.txt").write_text("images/day/img1.png truth/day/img1.png")
    first = folder(str(root), classes, labeled="mine.csv", val="val.txt", unlabeled="images")
    save_lists(tmp_path, first)
    (root / "mine.csv").unlink()
    lists = {"labeled": str(tmp_path / "labeled.txt"), "val": str(tmp_path / "val.txt")}
    again = folder(str(root), classes, **lists, unlabeled="images")
    assert again.labeled.sha256 == first.labeled.sha256
    assert [again.train.pair(index) for index in again.labeled_indices] == [
        first.train.pair(index) for index in first.labeled_indices
    ]
    assert again.val.pair(0) == first.val.pair(0)


WRONG = "expected dataset.labeled as a fraction such as 1/8, a count such as 92, or a list file, but got "


@pytest.mark.parametrize(
    ("spec", "sentence"),
    [
        (0, "expected dataset.labeled to choose at least 1 image, but 0 chooses none of 160"),
        ("0", "expected dataset.labeled to choose at least 1 image, but 0 chooses none of 160"),
        ("0/8", "expected dataset.labeled to choose at least 1 image, but 0/8 chooses none of 160"),
        (0.0, "expected dataset.labeled to choose at least 1 image, but 0.0 chooses none of 160"),
        (
            161,
            "expected dataset.labeled of at most 160, the number of images with a mask to choose from, but got 161",
        ),
        ("9/8", "expected dataset.labeled as a fraction of at most 1, but got 9/8"),
        ("1/0", "expected dataset.labeled as a fraction of at most 1, but got 1/0"),
        (1.5, "expected dataset.labeled as a fraction of at most 1 or an integer count, but got 1.5"),
        ("1.5", "expected dataset.labeled as a fraction of at most 1 or an integer count, but got 1.5"),
        ("1_8", f"{WRONG}'1_8'"),
        ("some", f"{WRONG}'some'"),
        (-3, f"{WRONG}-3"),
        ("-0.5", f"{WRONG}'-0.5'"),
        (True, f"{WRONG}True"),
        (float("nan"), f"{WRONG}nan"),
        (float("inf"), f"{WRONG}inf"),
        ("nan", f"{WRONG}'nan'"),
    ],
)
def test_choices_that_make_no_sense_are_refused(spec, sentence):
    with pytest.raises(UserError) as caught:
        choose(NAMES, spec, seed=0)
    assert str(caught.value) == sentence


def test_messages_name_the_key():
    with pytest.raises(UserError, match=r"expected dataset\.val to choose at least 1 image"):
        choose(NAMES, 0, seed=0, what="val")


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("labeled.txt", True),
        ("splits/1_8/labeled.txt", True),
        ("1_8", True),
        ("1/8", False),
        ("0.5", False),
        ("92", False),
        (92, False),
        (0.5, False),
        (None, False),
    ],
)
def test_list_files_are_told_from_numbers(spec, expected):
    assert is_path(spec) is expected

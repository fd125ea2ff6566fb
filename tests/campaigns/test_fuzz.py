"""Random and broken input: some seconds of each area of fuzz.py."""

import importlib.util
import logging
import sys
import time
import warnings
from collections import Counter
from pathlib import Path

import pytest

from mlpmatch_pl.data.datasets.folder import folder
from mlpmatch_pl.utils.errors import UserError

SCRIPT = Path(__file__).parent / "fuzz.py"
EXAMPLES = {"choices": 300, "run folders": 150, "lists": 80, "configs": 60, "sizes": 60, "paths": 40, "masks": 40,
            "files": 100, "checkpoints": 40, "caches": 20, "commands": 60}  # fmt: skip


# An area whose valid input were refused would test nothing. What hypothesis draws differs between its versions.
HARMLESS = ("flip", [(0.0, 0)])
VALID = {
    "choices": (10, "1/2"),
    "lists": (b"images/0.png\nimages/1.png", "unlabeled", "list.txt"),
    "configs": ("mlpmatch", {}, []),
    "sizes": (48, 60, 33),
    "paths": ("top", "below", "stem"),
    "masks": (3, [0, 1, 2], None, 255),
    "files": ("images", "png", HARMLESS),
    "checkpoints": {"seed": 1},
    "caches": HARMLESS,
    "commands": ("predict", {}, [], {}),
}


@pytest.fixture(scope="module")
def fuzz():
    spec = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["fuzz"]


@pytest.mark.parametrize("area", EXAMPLES)
def test_valid_input_is_accepted(fuzz, area):
    valid = fuzz.GOOD if area == "run folders" else VALID[area]
    assert fuzz.outcome(fuzz.AREAS[area], valid) == fuzz.CLEAN


@pytest.mark.parametrize("area", EXAMPLES)
def test_random_input_gives_a_result_or_a_sentence(fuzz, area):
    assert set(EXAMPLES) == set(fuzz.AREAS)
    counts = Counter()
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            failure = fuzz.run_area(area, 0, EXAMPLES[area], counts)
    finally:
        logging.disable(logging.NOTSET)
    assert failure is None, failure
    assert sum(counts.values())


def test_a_failure_is_found_and_a_hang_is_one(fuzz, monkeypatch):
    def fails(drawn):
        if drawn > 100:
            raise KeyError(drawn)

    strategy = fuzz.st.integers(0, 1000)
    monkeypatch.setitem(fuzz.AREAS, "broken", fuzz.Area(strategy, fails))
    failure = fuzz.run_area("broken", 0, 50, Counter())
    assert failure.startswith("101\n")  # the smallest
    assert "KeyError" in failure
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setitem(fuzz.AREAS, "hangs", fuzz.Area(fuzz.st.just(60), time.sleep))
    assert "still running after 1 seconds" in fuzz.run_area("hangs", 0, 1, Counter())


# Found by the campaign.


def test_a_csv_file_with_a_blank_first_line_names_its_columns(folder_root, classes):
    (folder_root / "list.csv").write_bytes(b"\n\x01")
    with pytest.raises(UserError, match="expected a first line with the columns image and mask"):
        folder(str(folder_root), classes, labeled="list.csv")
    (folder_root / "list.csv").write_text("\n\nimage,mask\nimages/img0.jpg,masks/img0.png\n")
    assert folder(str(folder_root), classes, labeled="list.csv").labeled.names == ("images/img0.jpg",)


def test_a_cache_with_a_flipped_bit_is_rebuilt(fuzz):
    fuzz.try_cache(("flip", [(0.984375, 1)]))


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("trainer.accumulate_grad_batches", 0, "expected trainer.accumulate_grad_batches of at least 1, but got 0"),
        ("schedule.reference_images", 0, "expected schedule.reference_images of at least 1, but got 0"),
        ("schedule.lr", -1.0, "expected lr as a number of at least 0"),
        ("schedule.lr_multi", -1.0, "expected lr_multi as a number of at least 0"),
        ("objective.confidence_threshold", 1.5, "expected confidence_threshold from 0 to 1"),
        ("backbone.std", [1.0, 0.0, 1.0], "expected std with values above 0"),
        ("decoder.channels", 10**9, "expected decoder.channels from 1 to 4096"),
        ("decoder.atrous_rates", [], "expected decoder.atrous_rates as 1 to 16 numbers"),
        ("decoder.atrous_rates", [10**9], "expected decoder.atrous_rates as 1 to 16 numbers from 1 to 1024"),
        ("loader.crop_size", 10**9, "expected loader.crop_size from 33 to 8192 pixels"),
        ("loader.strong", [{"name": "ToGray", "p": 2}], "{name: ToGray, p: 2} fails: p: "),
        ("dataset.train", 10**12, "expected 1 to 1,000,000 images per part"),
    ],
)
def test_numbers_out_of_range_are_refused_before_anything_is_built(fuzz, key, value, sentence):
    with pytest.raises(UserError, match=sentence):
        fuzz.try_config(("mlpmatch", {key: value}, []))

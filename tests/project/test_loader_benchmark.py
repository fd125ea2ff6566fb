import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks.loader import main
from benchmarks.loader_photos import make_cityscapes_pairs, voc_pairs

PIPELINES = ["reference", "mlpmatch_pl", "with cache"]


@pytest.fixture
def voc(tmp_path):
    """Four smooth images in VOC's layout, with palette masks."""
    rng = np.random.default_rng(0)
    for name in ("JPEGImages", "SegmentationClass"):
        (tmp_path / "voc" / name).mkdir(parents=True)
    for number in range(4):
        picture = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8)).resize((500, 375))
        picture.save(tmp_path / "voc/JPEGImages" / f"{number}.jpg", quality=90)
        mask = Image.fromarray(rng.integers(0, 21, (375, 500), dtype=np.uint8))
        mask.putpalette(list(range(256)) * 3)
        mask.save(tmp_path / "voc/SegmentationClass" / f"{number}.png")
    return tmp_path / "voc"


@pytest.fixture
def run_benchmark(monkeypatch):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["loader.py", *map(str, arguments)])
        main()

    return run


def test_every_pipeline_is_timed_and_written(run_benchmark, voc, tmp_path, capsys):
    out = tmp_path / "results" / "loader.json"
    run_benchmark("--root", voc, "--formats", "voc", "--rounds", 2, "--samples", 4, "--out", out)
    result = json.loads(out.read_text())
    assert str(voc) not in out.read_text()
    assert {"cpu", "threads", "torch", "pillow"} <= set(result["machine"])
    rows = [row for row in result["rows"] if "ratio" in row]
    assert [(row["format"], row["crop"], row["pipeline"]) for row in rows] == [("voc", 321, name) for name in PIPELINES]
    assert rows[0]["ratio"] == 1
    assert min(row["ratio"] for row in rows[1:]) > 2  # processor time; 7 and more where it was measured
    for row in rows:
        assert row["ratio"] == pytest.approx(row["steps_per_second"] / rows[0]["steps_per_second"])
        slower = min(row["labeled_per_second"], row["unlabeled_per_second"])
        assert row["steps_per_second"] < 1.2 * slower  # a step is one of each
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["voc"] * 5


def test_a_folder_without_pairs_is_one_sentence(run_benchmark, tmp_path):
    with pytest.raises(SystemExit, match=r"^expected pairs of images and masks in [^\n]*$"):
        run_benchmark("--root", tmp_path, "--formats", "voc")


@pytest.mark.real_data
def test_generated_files_have_the_size_of_cityscapes(real_data, tmp_path):
    pairs = make_cityscapes_pairs(voc_pairs(real_data / "voc2012", 20), tmp_path / "city", 2)
    assert len(pairs) == 2
    for image, mask in pairs:
        assert 2.0e6 <= image.stat().st_size <= 2.6e6
        assert Image.open(image).size == (2048, 1024)
        labels = np.asarray(Image.open(mask))
        assert labels.shape == (1024, 2048)
        assert set(np.unique(labels)) <= {*range(19), 255}

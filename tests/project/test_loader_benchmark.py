import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PIPELINES = ["reference", "mlpmatch_pl", "with cache"]


@pytest.fixture
def voc(tmp_path):
    """Four smooth pictures in VOC's layout, with palette masks."""
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


def run(*arguments):
    command = [sys.executable, str(BENCHMARKS / "loader.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_pipeline_is_timed_and_written(voc, tmp_path):
    out = tmp_path / "results" / "loader.json"
    done = run("--root", voc, "--formats", "voc", "--rounds", 2, "--samples", 3, "--out", out)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert str(voc) not in out.read_text()
    assert {"cpu", "threads", "torch", "pillow"} <= set(result["machine"])
    rows = [row for row in result["rows"] if "ratio" in row]
    assert [(row["format"], row["crop"], row["pipeline"]) for row in rows] == [("voc", 321, name) for name in PIPELINES]
    assert rows[0]["ratio"] == 1
    assert min(row["ratio"] for row in rows[1:]) > 2  # 9 where it was measured, but this machine may be busy
    for row in rows:
        assert row["ratio"] == pytest.approx(row["steps_per_second"] / rows[0]["steps_per_second"])
        slower = min(row["labeled_per_second"], row["unlabeled_per_second"])
        assert row["steps_per_second"] < 1.2 * slower  # a step is one of each
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["voc"] * 5


def test_a_folder_without_pairs_is_one_sentence(tmp_path):
    done = run("--root", tmp_path, "--formats", "voc")
    assert done.returncode == 1
    assert done.stderr.startswith("expected pairs of images and masks in")
    assert done.stderr.count("\n") == 1


@pytest.mark.real_data
def test_generated_files_have_the_size_of_cityscapes(real_data, tmp_path):
    script = (
        "import sys; from pathlib import Path; from loader_photos import *; "
        "make_cityscapes_pairs(voc_pairs(Path(sys.argv[1]), 20), Path(sys.argv[2]), 2)"
    )
    command = [sys.executable, "-c", script, str(real_data / "voc2012"), str(tmp_path / "city")]
    subprocess.run(command, cwd=BENCHMARKS, check=True, timeout=120)
    images = sorted((tmp_path / "city/images").iterdir())
    assert len(images) == 2
    for image in images:
        assert 2.0e6 <= image.stat().st_size <= 2.6e6
        assert Image.open(image).size == (2048, 1024)
        mask = np.asarray(Image.open(tmp_path / "city/masks" / image.name))
        assert mask.shape == (1024, 2048)
        assert set(np.unique(mask)) <= {*range(19), 255}

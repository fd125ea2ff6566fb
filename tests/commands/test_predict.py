import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from helpers import compose_config, run_command
from helpers.checkpoints import make_module, save_checkpoint
from helpers.images import save_image
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlpmatch_pl.commands.cli import literal_paths
from mlpmatch_pl.commands.predict import run as prediction
from mlpmatch_pl.data.readers.image import ImageReader
from mlpmatch_pl.evaluation.sliding_window import SlidingWindowInference
from mlpmatch_pl.predict import predict
from mlpmatch_pl.predictor import Predictor
from mlpmatch_pl.utils.errors import UserError

COLORS = [[0, 0, 0], [200, 30, 7], [1, 220, 3], [255, 0, 104]]
NAMES = ("plain.jpg", "day/two words.png", "night/late/Föhr (2), x=1 [ä].v2.png")
ALL = "save=[index,color,overlay,confidence,probabilities]"


@pytest.fixture(scope="module")
def module():
    return make_module(class_names=["a", "b", "c", "d"], palette=COLORS).eval()


@pytest.fixture(scope="module")
def checkpoint(module, tmp_path_factory):
    return save_checkpoint(module, tmp_path_factory.mktemp("my run") / "epoch=1-step=5.ckpt")


@pytest.fixture
def photos(tmp_path):
    """Images of different sizes in subfolders."""
    rng = np.random.default_rng(0)
    for index, name in enumerate(NAMES):
        small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
        save_image(tmp_path / "my photos" / name, np.array(small.resize((60 + 7 * index, 41 + index), Image.BICUBIC)))
    return tmp_path / "my photos"


def run_predict(checkpoint, source, output, *overrides):
    arguments = literal_paths([f"checkpoint={checkpoint}", f"input={source}", f"output={output}"])
    predict(compose_config("predict", *arguments, *overrides))


def plain_probabilities(module, path):
    pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
    with torch.no_grad():
        return module(pixels[None])[0].softmax(0).numpy()


def written(folder):
    """Return the files in a folder beside the record of what made them."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "predict.json")
    return sorted(path.relative_to(folder).as_posix() for path in files)


def test_temperature_divides_the_logits_and_an_miou_is_estimated(checkpoint, module, photos, tmp_path, capsys):
    run_predict(checkpoint, photos / NAMES[1], tmp_path / "out", "save=[probabilities]", "temperature=2")
    (file,) = (tmp_path / "out/probabilities").rglob("*.npz")
    roots = np.sqrt(plain_probabilities(module, photos / NAMES[1]))
    expected = roots / roots.sum(0)
    with np.load(file) as content:
        np.testing.assert_allclose(content["probabilities"], expected, atol=1e-5)
    label, ious = expected.argmax(0), []
    for c in set(label.flatten().tolist()):
        hit = expected[c][label == c].sum()
        ious.append(hit / ((label == c).sum() + expected[c].sum() - hit))
    assert f"estimated mIoU {100 * np.mean(ious):.1f} %, from the confidences\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="temperature above 0, but got 0"):
        run_predict(checkpoint, photos, tmp_path / "none", "temperature=0")


def test_files_equal_a_plain_loop(checkpoint, module, photos, tmp_path):
    run_predict(checkpoint, photos, tmp_path / "out", ALL)
    seen = set()
    for name in NAMES[1:]:  # PNG, which every reader decodes alike
        stem = name.rpartition(".")[0]
        probabilities = plain_probabilities(module, photos / name)
        label, image = probabilities.argmax(0), np.array(Image.open(photos / name))
        color = np.array(COLORS, np.uint8)[label]
        with Image.open(tmp_path / f"out/index/{stem}.png") as index:
            assert index.mode == "P"
            np.testing.assert_array_equal(np.array(index), label)
            np.testing.assert_array_equal(np.array(index.convert("RGB")), color)
        np.testing.assert_array_equal(np.array(Image.open(tmp_path / f"out/color/{stem}.png")), color)
        overlay = np.array(Image.open(tmp_path / f"out/overlay/{stem}.png")).astype(float)
        blended = np.where(color.max(axis=-1, keepdims=True) >= 64, (image.astype(float) + color) / 2, image)
        np.testing.assert_allclose(overlay, blended, atol=0.5)
        confidence = np.array(Image.open(tmp_path / f"out/confidence/{stem}.png")).astype(float)
        np.testing.assert_allclose(confidence, probabilities.max(0) * 255, atol=0.51)
        with np.load(tmp_path / f"out/probabilities/{stem}.npz") as content:
            assert content["probabilities"].dtype == np.float32
            np.testing.assert_allclose(content["probabilities"], probabilities, atol=1e-5)
        seen |= set(np.unique(label))
    assert len(seen) > 2


def test_names_and_subfolders_are_those_of_the_input(checkpoint, photos, tmp_path):
    run_predict(checkpoint, photos, tmp_path / "out")
    stems = sorted(name.rpartition(".")[0] for name in NAMES)
    assert written(tmp_path / "out") == [
        "classes.json", *(f"{kind}/{stem}.png" for kind in ("color", "index", "overlay") for stem in stems)
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/classes.json").read_text(encoding="utf-8"))[1] == {
        "index": 1, "name": "b", "color": [200, 30, 7]
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "stems"),
    [
        ("*.jpg", ["plain"]),
        ("**/*.png", ["day/two words", "night/late/Föhr (2), x=1 [ä].v2"]),
        ("n*/late/*", ["night/late/Föhr (2), x=1 [ä].v2"]),
        ("day", ["two words"]),
        (NAMES[2], ["Föhr (2), x=1 [ä].v2"]),  # there is such a file, so its brackets are no pattern
    ],
)
def test_a_file_a_folder_or_a_pattern(checkpoint, photos, tmp_path, source, stems):
    run_predict(checkpoint, photos / source, tmp_path / "out", "save=index")
    assert written(tmp_path / "out") == ["classes.json", *(f"index/{stem}.png" for stem in stems)]


def test_inference_options_reach_the_network(checkpoint, module, photos, tmp_path):
    options = ("inference.mode=slide", "inference.window=40", "inference.scales=[1.0,1.5]", "inference.flip=true")
    run_predict(checkpoint, photos / NAMES[1], tmp_path / "out", "save=probabilities", *options)
    image = torch.from_numpy(np.array(Image.open(photos / NAMES[1]))).permute(2, 0, 1)[None]
    expected = SlidingWindowInference("slide", window=40, scales=(1.0, 1.5), flip=True)(module.segmentor, image)[0]
    with np.load(tmp_path / "out/probabilities/two words.npz") as content:
        np.testing.assert_allclose(content["probabilities"], expected, atol=1e-5)


def test_gray_images_of_16_bits(tmp_path):
    module = make_module(in_chans=1, mean=[30000.0], std=[12000.0], bit_depth=16)
    checkpoint = save_checkpoint(module, tmp_path / "deep.ckpt")
    deep = np.random.default_rng(0).integers(0, 65536, (44, 50)).astype(np.uint16)
    save_image(tmp_path / "deep.png", deep)
    run_predict(checkpoint, tmp_path / "deep.png", tmp_path / "out")
    expected = Predictor(module).predict(deep)
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out/index/deep.png")), expected)
    assert Image.open(tmp_path / "out/overlay/deep.png").mode == "RGB"


# Existing files ----------------------------------------------------------------------------------------------


def test_existing_files_are_refused_before_anything_is_written(checkpoint, photos, tmp_path):
    save_image(tmp_path / "out/color/plain.png", np.zeros((2, 2), np.uint8))
    before = (tmp_path / "out/color/plain.png").read_bytes()
    with pytest.raises(UserError) as caught:
        run_predict(checkpoint, photos, tmp_path / "out")
    assert str(caught.value) == (
        f"expected to write new files only, but {tmp_path / 'out/color/plain.png'} exists; choose another output, or "
        "set overwrite=missing (only images without predictions) or overwrite=true"
    )
    assert written(tmp_path / "out") == ["color/plain.png"]
    assert (tmp_path / "out/color/plain.png").read_bytes() == before
    run_predict(checkpoint, photos, tmp_path / "out", "overwrite=true")
    assert len(written(tmp_path / "out")) == 10
    assert (tmp_path / "out/color/plain.png").read_bytes() != before


def test_a_folder_takes_more_images_but_not_of_other_classes(checkpoint, photos, tmp_path):
    run_predict(checkpoint, photos / NAMES[0], tmp_path / "out")
    run_predict(checkpoint, photos / NAMES[1], tmp_path / "out")
    assert len(written(tmp_path / "out")) == 7
    other = save_checkpoint(make_module(class_names=["a", "b", "c", "other"], palette=COLORS), tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=r"expected predictions of the same classes in one folder, but .*classes\.json"):
        run_predict(other, photos / NAMES[2], tmp_path / "out")
    assert len(written(tmp_path / "out")) == 7


def test_images_that_would_write_one_file_are_refused(checkpoint, photos, tmp_path):
    save_image(photos / "day/two words.jpg", np.zeros((40, 40, 3), np.uint8))
    with pytest.raises(UserError) as caught:
        run_predict(checkpoint, photos, tmp_path / "out")
    assert str(caught.value) == (
        f"expected images whose names differ without suffix, but {photos / 'day/two words.jpg'} and "
        f"{photos / 'day/two words.png'} would write one file; rename one, or predict them into different folders"
    )
    assert not (tmp_path / "out").exists()


def test_predictions_written_into_the_input_folder_are_not_input(checkpoint, photos):
    run_predict(checkpoint, photos, photos)
    before = written(photos)
    run_predict(checkpoint, photos, photos, "overwrite=true")
    assert written(photos) == before
    run_predict(checkpoint, photos / "**/*", photos, "overwrite=true", "save=index")
    assert written(photos) == before


def test_a_file_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a/b.png"
    prediction.write_file(path, b"old")

    def fail(self, content):
        Path.open(self, "wb").close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match=r"expected to write .*b\.png, but No space left on device"):
        prediction.write_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_an_output_that_cannot_be_written_is_named(checkpoint, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/index").write_text("a file")
    with pytest.raises(UserError, match=r"expected to write .*out/index/plain\.png, but"):
        run_predict(checkpoint, photos / NAMES[0], tmp_path / "out")


# TIFF files -----------------------------------------------------------------------------------------------------------

GEO = [
    (33550, "d", 3, (0.5, 0.5, 0.0), True),
    (33922, "d", 6, (0, 0, 0, 500000.0, 4100000.0, 0), True),
    (34735, "H", 8, (1, 1, 0, 1, 3072, 0, 1, 32610), True),
]


def geo_tags(path):
    with tifffile.TiffFile(path) as file:
        tags = file.pages[0].tags
        return {code: (tags[code].dtype, tags[code].value) for code, *_ in GEO if code in tags}


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A tiled GeoTIFF of 530 x 610 pixels."""
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (53, 61, 3), dtype=np.uint8))
    path = tmp_path_factory.mktemp("scenes") / "scene.tif"
    pixels = np.array(small.resize((610, 530), Image.BICUBIC))
    tifffile.imwrite(path, pixels, photometric="rgb", tile=(64, 64), compression="zlib", extratags=GEO)
    return path


def test_predictions_of_a_geotiff_lie_at_its_place(checkpoint, scene, tmp_path):
    run_predict(checkpoint, scene, tmp_path / "out", ALL)
    Image.fromarray(tifffile.imread(scene)).save(tmp_path / "scene.png")
    run_predict(checkpoint, tmp_path / "scene.png", tmp_path / "plain", ALL)
    for kind in ("index", "color", "overlay", "confidence"):
        path = tmp_path / f"out/{kind}/scene.tif"
        assert geo_tags(path) == geo_tags(scene)
        assert len(geo_tags(path)) == 3
        np.testing.assert_array_equal(tifffile.imread(path), np.array(Image.open(tmp_path / f"plain/{kind}/scene.png")))
    with Image.open(tmp_path / "out/index/scene.tif") as index:  # colors, as other programs show them
        np.testing.assert_array_equal(np.array(index.convert("RGB")), tifffile.imread(tmp_path / "out/color/scene.tif"))
    assert written(tmp_path / "out/probabilities") == ["scene.npz"]


@pytest.mark.parametrize("windows", ["inside", "cut"])
def test_a_large_tiff_has_the_prediction_of_one_piece(windows, checkpoint, scene, tmp_path, monkeypatch, capsys):
    options = ("save=[index,color,overlay,confidence]", "inference.mode=slide", "inference.window=96")
    options += ("inference.stride=60", f"inference.windows={windows}")
    run_predict(checkpoint, scene, tmp_path / "whole", *options)
    monkeypatch.setattr(SlidingWindowInference.blocks, "__defaults__", (256,))
    largest = []
    read = ImageReader.__call__

    def measured(self, path, window=None):
        pixels = read(self, path, window)
        largest.append(pixels.shape[0])
        return pixels

    monkeypatch.setattr(ImageReader, "__call__", measured)
    run_predict(checkpoint, scene, tmp_path / "blocks", *options)
    assert len(largest) == 9 + 3  # blocks, and the rows of tiles of the overlay
    assert max(largest) < 256 + 2 * 96
    for kind in ("index", "color", "overlay", "confidence"):
        path = tmp_path / f"blocks/{kind}/scene.tif"
        found, expected = (tifffile.imread(tmp_path / part / kind / "scene.tif") for part in ("blocks", "whole"))
        assert found.shape == expected.shape
        differ = np.abs(found.astype(int) - expected) > (kind == "confidence")
        assert differ.mean() < 1e-4
        assert geo_tags(path) == geo_tags(scene)
    assert len(np.unique(tifffile.imread(tmp_path / "blocks/index/scene.tif"))) > 2
    assert not [path for path in (tmp_path / "blocks").iterdir() if path.name.startswith(".")]
    with pytest.raises(UserError):
        run_predict(checkpoint, scene, tmp_path / "no", "save=probabilities", *options[1:])
    assert "expected save without probabilities for a TIFF file as large as" in capsys.readouterr().err
    with pytest.raises(UserError, match="expected temperature=1 for confidences of images that are read in blocks"):
        run_predict(checkpoint, scene, tmp_path / "no", *options, "temperature=2")


# Wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        (
            "save=[index,colort]",
            r"expected save\[1\] as 'index', 'color', .*, but got 'colort'\. Did you mean color",
        ),
        ("save=[]", "expected something to save, but save is empty"),
        ("opacity=1.5", "expected opacity from 0 to 1, but got 1.5"),
        ("inference.window=40", "set inference.mode=slide, or omit them"),
        ("input=none.jpg", "expected input as an image file, a folder or a glob pattern, but none.jpg does not exist"),
        ("input='*.none'", r"expected images \(.bmp, .*\) in input=\*.none, but found none"),
        ("checkpoint=none.ckpt", "expected a checkpoint, but none.ckpt does not exist"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(checkpoint, photos, tmp_path, override, sentence):
    with pytest.raises(UserError, match=sentence):
        run_predict(checkpoint, photos, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_a_file_is_refused(checkpoint, photos, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"expected output to be a folder, but .*out is a file"):
        run_predict(checkpoint, photos, tmp_path / "out")


MEMORY = (torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory"))


@pytest.mark.parametrize("error", MEMORY, ids=["gpu", "cpu"])
def test_an_image_too_large_for_memory_is_skipped_and_named(error, checkpoint, photos, tmp_path, monkeypatch, capsys):
    infer = Predictor.infer

    def fail_on_one(self, image):
        if image.shape[:2] == (41, 60):
            raise error
        return infer(self, image)

    monkeypatch.setattr(Predictor, "infer", fail_on_one)
    with pytest.raises(UserError, match="expected images that can be predicted, but 1 of 3 could not be"):
        run_predict(checkpoint, photos, tmp_path / "out", "save=index")
    assert "plain.jpg is 60 x 41 pixels; set inference.mode=slide" in capsys.readouterr().err
    assert len(written(tmp_path / "out/index")) == 2


# The command ----------------------------------------------------------------------------------------------------------


@given(st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="$"), min_size=1))
def test_any_path_reaches_the_configuration_as_it_is(path):
    (argument,) = literal_paths([f"input={path}"])
    quoted = len(path) > 1 and path[0] == path[-1] and path[0] in "'\""
    if not quoted and path != "null":  # which are left to Hydra
        assert OverridesParser.create().parse_override(argument).value() == path


def test_other_arguments_and_sweeps_are_left_to_hydra():
    assert literal_paths(["save=[index]", "input='a b'", "--help"]) == ["save=[index]", "input='a b'", "--help"]
    assert literal_paths(["-m", "checkpoint=a.ckpt,b.ckpt"]) == ["-m", "checkpoint=a.ckpt,b.ckpt"]


def test_the_command_skips_unreadable_files_and_names_them_at_the_end(checkpoint, photos, tmp_path):
    (photos / "day/broken ä.jpg").write_bytes(b"no image")
    (photos / "notes.txt").write_text("no image either, and no suffix of one")
    arguments = (f"checkpoint={checkpoint}", "input=my photos", "output=out, ö=1")
    done = run_command(*arguments, cwd=tmp_path, module="mlpmatch_pl.predict")
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "skipped: cannot read the image my photos/day/broken ä.jpg: it is damaged or not an image; replace or remove "
        "it",
        "error: expected images that can be predicted, but 1 of 4 could not be (see above); fix or remove them",
    ]
    assert "predicted 3 of 4 in " in done.stdout
    assert len(written(tmp_path / "out, ö=1")) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my photos", "out, ö=1"]  # and no folder of Hydra's


def test_help_and_configuration_need_no_heavy_imports():
    code = "import sys, mlpmatch_pl.predict; print({'torch', 'lightning', 'cv2', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_the_same_command_continues_where_it_was_interrupted(checkpoint, photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = prediction.write_file

    def interrupt(path, content):
        if "index" in path.parts and len(list(out.rglob("*.png"))) == 2:
            raise KeyboardInterrupt
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(prediction, "write_file", interrupt)
        patch.setattr(prediction, "THREADS", 1)
        with pytest.raises(KeyboardInterrupt):
            run_predict(checkpoint, photos, out, "save=index")
    first = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(first) == 2
    with pytest.raises(UserError, match="expected to write new files only"):
        run_predict(checkpoint, photos, out, "save=index", "inference.flip=true")
    run_predict(checkpoint, photos, out, "save=index")
    assert len(list(out.rglob("*.png"))) == 3
    assert {path: path.stat().st_mtime_ns for path in first} == first
    with pytest.raises(UserError, match="overwrite=missing"):
        run_predict(checkpoint, photos, out, "save=index")


def test_missing_predicts_new_images_only_and_never_mixes_options(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    run_predict(checkpoint, photos, out, "save=index")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    save_image(photos / "new.png", np.zeros((40, 40, 3), np.uint8))
    run_predict(checkpoint, photos, out, "save=index", "overwrite=missing")
    assert len(list(out.rglob("*.png"))) == 4
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UserError, match="expected predictions of one checkpoint with one set of options"):
        run_predict(checkpoint, photos, out, "save=index", "overwrite=missing", "inference.flip=true")
